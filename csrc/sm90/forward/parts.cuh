// SPDX-License-Identifier: Apache-2.0
// What the warps that move data and those that compute must agree on.
#pragma once

#include "params.h"
#include "ptx/wgmma.cuh"
#include "sm90/forward/config.h"

namespace sparse_attn::sm90::forward {

constexpr int kComputeBarrier = 1;  // and on; 0 is __syncthreads

// Which 64 queries of a tile a warpgroup computes.
template <class Config>
__device__ __forceinline__ int part_number(int warpgroup, int stage) {
  return Config::kTurns && stage == 1 ? Config::kConsumers - 1 - warpgroup : warpgroup;
}

// What was taken and has its queries at a stage.
template <class Config, class SharedMemory>
__device__ __forceinline__ auto& taken_of(SharedMemory& smem, int stage) {
  return smem.taken[Config::kAhead ? smem.taken_at[stage] : stage];
}

// Whether queries of a branch merge with earlier branches.
template <class Config>
__device__ __forceinline__ bool merges(const ForwardParams& params, int branch_number,
                                       const QueryTile& queries) {
  return Config::kMerges && (branch_number > 0 || params.merge) && queries.rows > 0;
}

// What earlier branches left for a warpgroup that computes.
template <class Config, class SharedMemory>
__device__ __forceinline__ auto& earlier_of(SharedMemory& smem, int warpgroup) {
  if constexpr (Config::kMerges) {
    return smem.earlier[warpgroup % Config::kEarlierTiles];
  } else {
    return smem.queries[0].part[warpgroup].out;  // not used
  }
}

// Likewise the lse.
template <class Config, class SharedMemory>
__device__ __forceinline__ float* earlier_lse_of(SharedMemory& smem, int warpgroup) {
  return smem.earlier_lse[warpgroup % Config::kEarlierTiles];
}

// By a warp that has read its rows. An arrival alone waits for no read (ptxas 13.0): the next copy
// would overtake an ldmatrix where shared memory is busy.
template <class Config, class SharedMemory>
__device__ __forceinline__ void let_go_of_earlier(SharedMemory& smem, int warpgroup) {
  ptx::fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    ptx::mbarrier_arrive(smem.earlier_empty[warpgroup % Config::kEarlierTiles]);
  }
}

}  // namespace sparse_attn::sm90::forward
