// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/short_groups.h"
#include "check.h"
#include "device.h"
#include "sm90/backward_band/kernel.cuh"
#include "sm90/backward_band/launch.h"

namespace sparse_attn::sm90::backward_band {

// Of a tensor, as tiles of some type.
template <class Tile>
ViewMap map_of(const BackwardParams& params, const TensorView& tensor, int head_dim, int heads,
               bool usable = true) {
  return ViewMap::of<Tile>(tensor, params.branch.queries, head_dim, heads, params.batch,
                           params.element, usable);
}

template <class Config>
Maps maps_of(const BackwardParams& params) {
  using Part = typename Config::Part;
  using PartV = typename Config::PartV;
  using WarpPart = typename Config::WarpPart;
  using WarpPartV = typename Config::WarpPartV;
  const int dim = params.head_dim, dim_v = params.head_dim_v, heads = params.heads;
  return {map_of<Part>(params, params.q, dim, heads),
          map_of<Part>(params, params.k, dim, params.kv_heads),
          map_of<PartV>(params, params.v, dim_v, params.kv_heads),
          map_of<PartV>(params, params.dout, dim_v, heads),
          map_of<PartV>(params, params.out, dim_v, heads, params.finds_stats),
          map_of<WarpPart>(params, params.dq, dim, heads),
          map_of<WarpPart>(params, params.dk, dim, heads),
          map_of<WarpPartV>(params, params.dv, dim_v, heads)};
}

// Chunks in the order of memory: where heads are neighbours, those of all heads together. Residues
// of one head are nearer to each other.
inline Order order_of(const BackwardParams& params) {
  const SequenceView& view = params.branch.queries;
  const bool chunks = view.groups > 1 && view.run.value == 1 && view.run_stride.value == 1;
  return chunks && params.q.head_stride < params.q.row_stride ? Order::by_token : Order::by_head;
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& call) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  BackwardParams params = call;
  const Branch together = with_short_groups_together(params.branch, kTileRows);
  if (fits(together)) params.branch = together;
  const QueryTiles tiles =
      QueryTiles::of(params.branch, kTileRows, params.first_head, params.head_count, params.batch,
                     order_of(params), kTileRows, 1);
  if (tiles.count == 0) return;
  REQUIRE(!params.accumulate || !params.finds_stats, "a launch that adds has statistics");
  auto* kernel =
      params.accumulate ? backward_band_kernel<Config, true> : backward_band_kernel<Config, false>;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, params.device);
  kernel<<<least(tiles.count, Config::kCtas * multiprocessors(params.device)), Config::kThreads,
           kBytes, static_cast<cudaStream_t>(params.stream)>>>(params, tiles,
                                                               maps_of<Config>(params));
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90::backward_band
