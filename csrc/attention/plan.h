// SPDX-License-Identifier: Apache-2.0
// The plan of a pattern: attention over intervals, read through strided views of the sequence.
// The twin of python/sparse_attn/plan.py, which explains it, for host and device. All plain data.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace sparse_attn {

// Near run, far keys before it, far keys after it.
constexpr int kMaxSegments = 3;
// Chunk lengths in one run, none a multiple of another.
constexpr int kMaxChunks = 4;

HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int greatest(int a, int b) { return a > b ? a : b; }

// Tokens listed as (group, row): runs of `run` neighbours, `run_stride` apart.
struct SequenceView {
  int length;  // tokens in the sequence
  int groups;
  int max_rows;  // rows of the longest group, which is group 0
  int offset;
  int group_step;
  int run;
  int run_stride;

  HOST_DEVICE int position(int group, int row) const {
    const int base = offset + group * group_step;
    // Most views have runs of one token: no division.
    return run == 1 ? base + row * run_stride : base + row / run * run_stride + row % run;
  }

  // Rows of the group whose token is less than `token`.
  HOST_DEVICE int rows_before(int group, int token) const {
    const int distance = greatest(token - offset - group * group_step, 0);
    if (run_stride == 1) return least(distance, max_rows);
    const int rows = distance / run_stride * run + least(distance % run_stride, run);
    return least(rows, max_rows);
  }

  HOST_DEVICE int rows(int group) const { return rows_before(group, length); }
};

// The tokens [start(i), end(i)) around token i: a window and the chunks of some lengths, united;
// cut to the tokens up to i without `future`, from i without `past`.
struct Run {
  int length;
  int window;
  int chunks[kMaxChunks];
  int chunk_count;
  bool past;
  bool future;

  HOST_DEVICE int start(int token) const {
    if (!past) return token;
    int start = greatest(token - window + 1, 0);
    for (int i = 0; i < chunk_count; ++i) start = least(start, token - token % chunks[i]);
    return start;
  }

  HOST_DEVICE int end(int token) const {
    if (!future) return token + 1;
    int end = token + window;
    for (int i = 0; i < chunk_count; ++i) {
      end = greatest(end, token - token % chunks[i] + chunks[i]);
    }
    return least(end, length);
  }
};

enum class Part : int { before, inside, after };

// Key rows [first, end).
struct Interval {
  int first;
  int end;

  HOST_DEVICE bool contains(int row) const { return first <= row && row < end; }
};

// The rows of a key view that lie before, inside or after the run of a query.
struct Segment {
  SequenceView keys;
  Part part;

  // Rows that the query at `token` of `group` attends. Both ends grow with the token.
  HOST_DEVICE Interval bounds(const Run& run, int group, int token) const {
    switch (part) {
      case Part::before:
        return {0, keys.rows_before(group, run.start(token))};
      case Part::inside:
        return {keys.rows_before(group, run.start(token)), keys.rows_before(group, run.end(token))};
      default:
        return {keys.rows_before(group, run.end(token)), keys.rows(group)};
    }
  }
};

// Queries in the order of one view, and the segments they attend. A key view has the groups of the
// query view, or one group that all queries share.
struct Branch {
  SequenceView queries;
  Run run;
  Segment segments[kMaxSegments];
  int segment_count;
};

}  // namespace sparse_attn
