// SPDX-License-Identifier: Apache-2.0
// What the host hands to the decoding kernels: new queries against the stores of a cache.
#pragma once

#include "attention/plan.h"
#include "params.h"

namespace sparse_attn {

// Near keys and far keys of a causal pattern.
constexpr int kMaxReads = 2;
constexpr int kMaxStores = 2;
// Into which the keys of a query are split.
constexpr int kMaxParts = 256;

// The group of a view that lists a token, for a view whose groups list every token; the twin of
// group_of in python/sparse_attn/decode_plan.py.
struct Groups {
  bool one;  // group 0 for every token
  bool take_turns;
  int offset;
  Divisor turn;  // if they take turns: tokens from a row of a group to its next row
  Divisor step;

  static Groups of(const SequenceView& view) {
    const bool one = view.groups == 1;
    return {one, view.group_step < view.run_stride.value, view.offset, view.run_stride,
            Divisor::of(one ? 1 : view.group_step)};
  }

  HOST_DEVICE int of_token(int token) const {
    if (one) return 0;
    const int distance = token - offset;
    return (take_turns ? distance % turn : distance) / step;
  }
};

// The newest tokens of a list; row r of the list is in slot r % slots.
struct DecodeStore {
  TensorView k;         // (batch, kv heads of the launch, slots, head_dim)
  TensorView v;         // (batch, kv heads of the launch, slots, head_dim_v)
  SequenceView tokens;  // one group: every token, or a panel
  Divisor slots;

  // Whether the list has this token.
  HOST_DEVICE bool lists(int token) const {
    return tokens.rows_before(0, token + 1) > tokens.rows_before(0, token);
  }
};

// The keys of one segment, out of a store.
struct DecodeRead {
  Groups groups;  // of the query view
  Run run;
  Segment segment;
  int store;

  // Row in the store of a key row. With groups, the store has every token.
  HOST_DEVICE int store_row(int group, int row) const {
    return segment.keys.groups == 1 ? row : segment.keys.position(group, row);
  }
};

// The fp32 results of one part of a query's keys.
struct DecodePart {
  float max_log2;  // greatest score, in units of log 2; -inf without a key
  float sum;       // of exp2(score - max)
};

struct DecodeParams {
  TensorView q;             // (batch, heads, new_tokens, head_dim)
  TensorView k_new;         // (batch, kv_heads, new_tokens, head_dim)
  TensorView v_new;         // (batch, kv_heads, new_tokens, head_dim_v)
  TensorView out;           // (batch, heads, new_tokens, head_dim_v)
  const int64_t* position;  // of the first new token, on the device
  DecodePart* parts;        // (batch, head_count, new_tokens, part_count)
  float* part_out;          // (batch, head_count, new_tokens, part_count, head_dim_v), not divided

  int batch;
  int heads;       // of the tensors
  int first_head;  // of this launch
  int head_count;  // of this launch
  int kv_heads;    // divides heads
  int new_tokens;  // 1 to 16
  int head_dim;    // multiples of 8, at most 256
  int head_dim_v;
  int part_count;  // at most kMaxParts

  float scale;
  Element element;
  DecodeRead reads[kMaxReads];
  int read_count;
  DecodeStore stores[kMaxStores];
  int store_count;

  int device;
  void* stream;  // cudaStream_t

  HOST_DEVICE int group() const { return heads / kv_heads; }
  HOST_DEVICE int first_kv_head() const { return first_head / group(); }
  HOST_DEVICE int kv_head_count() const {
    return (first_head + head_count - 1) / group() - first_kv_head() + 1;
  }
};

}  // namespace sparse_attn
