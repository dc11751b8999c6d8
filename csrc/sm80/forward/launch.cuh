// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "check.h"
#include "sm80/forward/kernel.cuh"
#include "sm80/forward/launch.h"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  const int64_t tiles = QueryTile::count(params.branch.queries, Config::kTileQueries,
                                         params.head_count, params.batch);
  // grid.x: y and z stop at 65,535.
  REQUIRE(tiles <= 0x7fffffff, "more than 2^31 - 1 query tiles in one launch");
  auto* kernel = forward_kernel<T, kHeadDim, kHeadDimV>;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  if constexpr (kBytes > 48 * 1024) {  // more than a CTA gets unasked
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  }
  kernel<<<static_cast<unsigned>(tiles), Config::kThreads, kBytes,
           static_cast<cudaStream_t>(params.stream)>>>(params);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm80::forward
