// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "sm80/forward/kernel.cuh"
#include "sm80/forward/launch.h"
#include "sm80/launch_tiles.cuh"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim, int kHeadDimV, Reach kReach>
void launch_reach(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kReach>;
  launch_tiles<Config>(forward_kernel<Config>, params,
                       QueryTile::count(params.branches[0].queries, Config::kTileQueries,
                                        params.head_count, params.batch));
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& params) {
  if (params.branch_count > 1) return one_by_one(params, launch<T, kHeadDim, kHeadDimV>);
  if constexpr (Config<T, kHeadDim, kHeadDimV, Reach::many>::kMany) {
    if (reach_of(params.branches[0]) == Reach::many) {
      return launch_reach<T, kHeadDim, kHeadDimV, Reach::many>(params);
    }
  }
  launch_reach<T, kHeadDim, kHeadDimV, Reach::few>(params);
}

}  // namespace sparse_attn::sm80::forward
