// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sm90/backward_band/kernel.cuh"
#include "sm90/backward_band/launch.h"

namespace sparse_attn::sm90::backward_band {

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  const SequenceView& view = params.branch.queries;
  const QueryTiles tiles =
      QueryTiles::of(params.branch, kTileRows, params.first_head, params.head_count, params.batch);
  if (tiles.count == 0) return;
  const auto map = [&](const TensorView& tensor, int head_dim, int heads) {
    return ViewMap::of(tensor, view, head_dim, heads, params.batch, kWarpgroupRows, params.element,
                       tensor.data != nullptr);
  };
  const Maps maps = {map(params.q, params.head_dim, params.heads),
                     map(params.k, params.head_dim, params.kv_heads),
                     map(params.v, params.head_dim_v, params.kv_heads),
                     map(params.dout, params.head_dim_v, params.heads),
                     map(params.out, params.head_dim_v, params.heads)};
  int multiprocessors = 0;
  CHECK_CUDA(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, params.device));
  auto* kernel = backward_band_kernel<Config>;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<least(tiles.count, multiprocessors), Config::kThreads, kBytes,
           static_cast<cudaStream_t>(params.stream)>>>(params, tiles, maps);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90::backward_band
