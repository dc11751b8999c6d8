// SPDX-License-Identifier: Apache-2.0
// From a call to the kernel instance that runs it.
#pragma once

#include <utility>
#include <vector>

#include "params.h"

namespace sparse_attn {

// Each launches one kernel on params.stream and returns without waiting for it: the rows of a
// layout of blocks, one branch of the output, the statistics of the queries, one branch of dq or of
// dk and dv.
void block_rows(const BlockRowsParams& params);
void forward(const ForwardParams& params);
void row_stats(const RowStatsParams& params);
void backward(const BackwardParams& params);

// Head-dim pairs (head_dim, head_dim_v) that kernels are built for. Others run in the smallest pair
// that holds both.
std::vector<std::pair<int, int>> head_dims();

// Whether the kernels of compute capability 9.0 are built and as small a pair of theirs holds these
// head dims.
bool sm90_fits(int head_dim, int head_dim_v);

// CUDA version that the driver supports (13000 for 13.0); 0 without a driver.
int driver_version();

}  // namespace sparse_attn
