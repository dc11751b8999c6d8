// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/short_groups.h"
#include "device.h"
#include "sm90/backward_band/kernel.cuh"
#include "sm90/backward_band/launch.h"

namespace sparse_attn::sm90::backward_band {

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& call) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  BackwardParams params = call;
  const Branch together = with_short_groups_together(params.branch, kTileRows);
  if (fits(together)) params.branch = together;
  const SequenceView& view = params.branch.queries;
  const QueryTiles tiles =
      QueryTiles::of(params.branch, kTileRows, params.first_head, params.head_count, params.batch);
  if (tiles.count == 0) return;
  const auto map = [&](const TensorView& tensor, int heads) {
    return ViewMap::of<typename Config::Part>(tensor, view, params.head_dim, heads, params.batch,
                                              params.element, true);
  };
  const auto map_v = [&](const TensorView& tensor, int heads, bool usable = true) {
    return ViewMap::of<typename Config::PartV>(tensor, view, params.head_dim_v, heads, params.batch,
                                               params.element, usable);
  };
  const Maps maps = {map(params.q, params.heads), map(params.k, params.kv_heads),
                     map_v(params.v, params.kv_heads), map_v(params.dout, params.heads),
                     map_v(params.out, params.heads, params.finds_stats)};
  auto* kernel = backward_band_kernel<Config>;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, params.device);
  kernel<<<least(tiles.count, Config::kCtas * multiprocessors(params.device)), Config::kThreads,
           kBytes, static_cast<cudaStream_t>(params.stream)>>>(params, tiles, maps);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90::backward_band
