// SPDX-License-Identifier: Apache-2.0
// From a call to the kernel instance that runs it.
#pragma once

#include <utility>
#include <vector>

#include "decode/decode_params.h"
#include "params.h"

namespace sparse_attn {

// Each launches work on params.stream and returns without waiting for it: the rows of a layout of
// blocks, the output, the statistics of the queries of all heads, one branch of dq, of dk and dv,
// or of all three.
void block_rows(const BlockRowsParams& params);
void forward(const ForwardParams& params);
void row_stats(const BackwardParams& params);
void backward(const BackwardParams& params);

// Likewise, for new tokens against a cache: the parts of every query's keys; then their sum and the
// new keys and values in the stores, after the parts of all launches that share these stores.
void decode_parts(const DecodeParams& params);
void decode_finish(const DecodeParams& params);

// The integers that `counters` of a forward launch must have.
int forward_counters(const ForwardParams& params);

// Head-dim pairs (head_dim, head_dim_v) that kernels are built for. Others run in the smallest pair
// that holds both.
std::vector<std::pair<int, int>> head_dims();

// Whether the kernels of compute capability 9.0 are built and a pair of theirs holds these head
// dims. Wider rows than needed cost them less than the portable kernels' own width (96 in 128).
bool sm90_fits(int head_dim, int head_dim_v);

// CUDA version that the driver supports (13000 for 13.0); 0 without a driver.
int driver_version();

}  // namespace sparse_attn
