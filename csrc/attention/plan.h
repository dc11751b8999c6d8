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
#ifdef __CUDA_ARCH__
#define NOT_UNROLLED _Pragma("unroll 1")
#else
#define NOT_UNROLLED
#endif

namespace sparse_attn {

// Near run, far keys before it, far keys after it.
constexpr int kMaxSegments = 3;
// Chunk lengths in one run, none a multiple of another.
constexpr int kMaxChunks = 4;
// Neighbouring residues in one group: the rows of a lane differ by 8, which the mask makes use of.
constexpr int kMostResidues = 8;

HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int greatest(int a, int b) { return a > b ? a : b; }

HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

// A positive number to divide by: a multiplication and a shift instead of some twenty instructions.
// Granlund and Montgomery, Division by invariant integers using multiplication, 1994, figure 4.1.
struct Divisor {
  int value;
  uint32_t factor;  // floor(2^32 (2^shift - value) / value) + 1
  int shift;        // ceil(log2(value))

  static Divisor of(int value) {
    int shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - value;
    return {value, static_cast<uint32_t>((excess << 32) / value + 1), shift};
  }
};

// Of numbers from 0 to 2^31 - 1.
HOST_DEVICE int operator/(int dividend, const Divisor& divisor) {
  const uint32_t product = high_product(dividend, divisor.factor);
  return static_cast<int>((product + static_cast<uint32_t>(dividend)) >> divisor.shift);
}

HOST_DEVICE int operator%(int dividend, const Divisor& divisor) {
  return dividend - dividend / divisor * divisor.value;
}

// Tokens listed as (group, row): runs of `run` neighbours, `run_stride` apart.
struct SequenceView {
  int length;  // tokens in the sequence
  int groups;
  int max_rows;  // rows of the longest group, which is group 0
  int offset;
  int group_step;
  Divisor run;
  Divisor run_stride;

  HOST_DEVICE int position(int group, int row) const {
    return offset + group * group_step + row / run * run_stride.value + row % run;
  }

  // Rows of the group whose token is less than `token`.
  HOST_DEVICE int rows_before(int group, int token) const {
    const int distance = greatest(token - offset - group * group_step, 0);
    const int rows = distance / run_stride * run.value + least(distance % run_stride, run.value);
    return least(rows, max_rows);
  }

  HOST_DEVICE int rows(int group) const { return rows_before(group, length); }
};

// The tokens [start(i), end(i)) around token i: a window and the chunks of some lengths, united;
// cut to the tokens up to i without `future`, from i without `past`.
struct Run {
  int length;
  int window;
  Divisor chunks[kMaxChunks];
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
      end = greatest(end, token - token % chunks[i] + chunks[i].value);
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

HOST_DEVICE int lowest_bit(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Which blocks of key rows each block of query rows attends, one bit a pair. Without `rows`: all.
struct Blocks {
  int size;              // rows in a block: 16, 32, 64 or 128
  int words;             // of 32 bits in a row of blocks
  int64_t head_stride;   // in words; 0 if all heads share their blocks
  const uint32_t* rows;  // (heads, blocks of queries, words)
};

// The blocks that neighbouring query blocks [first, end) of a head attend together.
struct AttendedBlocks {
  const uint32_t* rows;
  int words;
  int first;
  int end;

  HOST_DEVICE static AttendedBlocks of(const Blocks& blocks, int head, int first, int end) {
    return {blocks.rows + head * blocks.head_stride, blocks.words, first, end};
  }

  HOST_DEVICE uint32_t word(int index) const {
    uint32_t bits = 0;
    NOT_UNROLLED
    for (int block = first; block < end; ++block) {
      bits |= rows[static_cast<int64_t>(block) * words + index];
    }
    return bits;
  }

  HOST_DEVICE bool contains(int key_block) const {
    return word(key_block / 32) >> key_block % 32 & 1;
  }

  // The first attended block from `key_block` on; past all blocks if there is none.
  HOST_DEVICE int next(int key_block) const {
    int index = key_block / 32;
    if (index >= words) return key_block;
    uint32_t bits = word(index) & ~0u << key_block % 32;
    NOT_UNROLLED
    while (bits == 0) {
      if (++index == words) return 32 * words;
      bits = word(index);
    }
    return 32 * index + lowest_bit(bits);
  }
};

// Queries in the order of one view, and the segments they attend. A key view has the groups of the
// query view, or one group that all queries share. With blocks, queries and keys are in token
// order.
struct Branch {
  SequenceView queries;
  Run run;
  Segment segments[kMaxSegments];
  int segment_count;
  Blocks blocks;
  // So many neighbouring residues are one group, a power of 2: a query attends the keys of its own.
  int residues = 1;

  // Whether the blocks of a head let a query attend a key.
  HOST_DEVICE bool keeps(int head, int query, int key) const {
    if (blocks.rows == nullptr) return true;
    const int block = query / blocks.size;
    return AttendedBlocks::of(blocks, head, block, block + 1).contains(key / blocks.size);
  }
};

}  // namespace sparse_attn
