// SPDX-License-Identifier: Apache-2.0
// What the host hands to a kernel: plain structs, strides in elements.
#pragma once

#include <cstdint>

#include "attention/plan.h"

namespace sparse_attn {

// Of a call: queries in token order, queries of a residue.
constexpr int kMaxBranches = 2;

enum class Element : int { float16, bfloat16 };

// Which kernels run a call: those of any GPU from compute capability 8.0 on, or those of 9.0.
enum class Kernels : int { sm80, sm90 };

// (batch, heads, seq, dim) in any memory order; the last dimension is contiguous, every row starts
// on 16 bytes.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int row_stride;
};

// What forward and backward launches share.
struct CallParams {
  TensorView q;    // (batch, heads, seq_q, head_dim)
  TensorView k;    // (batch, kv_heads, seq_k, head_dim)
  TensorView v;    // (batch, kv_heads, seq_k, head_dim_v)
  TensorView out;  // (batch, heads, seq_q, head_dim_v)
  float* lse;      // (batch, heads, seq_q), contiguous, natural logarithm

  int batch;
  int heads;       // of the tensors
  int first_head;  // of this launch, a query head
  int head_count;  // of this launch, query heads
  int kv_heads;    // divides heads
  int seq_q;
  int seq_k;           // equals seq_q
  int first_position;  // of the first query; 0
  int head_dim;        // multiples of 8
  int head_dim_v;
  const int* cu_seqlens;  // (batch + 1); null: every sequence has seq_q tokens

  float scale;
  Element element;
  Kernels kernels;
  int device;
  void* stream;  // cudaStream_t
};

struct ForwardParams : CallParams {
  Branch branches[kMaxBranches];
  int branch_count;
  // Merge with what out and lse already hold: the branches of the plan before these.
  bool merge;
  // Overwritten: hands out the work, and orders that on two branches in one launch. Of the size
  // that forward_counters gives; null where that is 0.
  int* counters;
};

// Runs the branches of a call one after another: launch(params) of one branch.
template <class Launch>
void one_by_one(const ForwardParams& params, Launch launch) {
  for (int i = 0; i < params.branch_count; ++i) {
    ForwardParams one = params;
    one.branches[0] = params.branches[i];
    one.branch_count = 1;
    one.merge = params.merge || i > 0;
    launch(one);
  }
}

// What a row of scores needs in the backward pass.
struct RowStats {
  float lse_log2;  // lse / log(2); +inf for a query with no key, whose weights exp2(score - lse)
                   // are 0
  float delta;     // rowsum(dout * out) - dlse; 0 for a query with no key
};

// The rows whose gradients a backward launch sums: queries (dq), keys (dk and dv) or both at once.
enum class Owner : int { queries, keys, both };

struct BackwardParams : CallParams {
  TensorView dout;  // (batch, heads, seq_q, head_dim_v)
  TensorView dq;    // as q, k and v
  TensorView dk;
  TensorView dv;
  RowStats* stats;    // (batch, heads, seq_q)
  const float* dlse;  // likewise; may be null

  // Query heads whose gradients are summed: 1 for dq. For dk and dv the group of a kv head; or 1 if
  // they have a head for each query head.
  int heads_together;
  Owner owner;
  Branch branch;  // transposed unless queries own: its queries are the keys
  // Add to what the gradients already hold: the branches before this one.
  bool accumulate;
  // If both own, in the kernel of bands: find the statistics in out, lse and dlse, and leave them
  // in `stats` unless it is null. Else they are there.
  bool finds_stats;
  // If both own: of a branch with blocks, those of each block of queries, (heads, blocks, words) as
  // the branch has those of keys.
  const uint32_t* query_blocks;
  // Overwritten; of the bytes that GradientLaunch gives, null where these are 0. If both own: what
  // dq is summed in (sm90/backward_ordered/plan.h), null for the kernel of bands. Else a ticket.
  void* workspace;
};

// The kv head of a query head. (heads * kv_heads is no int.)
HOST_DEVICE int kv_head_of(const CallParams& params, int head) {
  return head / (params.heads / params.kv_heads);
}

// Packs a layout of blocks into the rows of a branch.
struct BlockRowsParams {
  const bool* layout;  // (heads, blocks, blocks) in any memory order
  int64_t head_stride;
  int64_t row_stride;     // between blocks of the rows' side
  int64_t column_stride;  // between blocks of the other side
  uint32_t* rows;         // (heads, blocks, words)

  int heads;
  int blocks;
  int words;
  // Which side of the diagonal a row attends; see Run.
  bool past;
  bool future;

  int device;
  void* stream;  // cudaStream_t
};

}  // namespace sparse_attn
