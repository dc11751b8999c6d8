// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "sm80/forward/kernel.cuh"
#include "sm80/forward/launch.h"
#include "sm80/launch_tiles.cuh"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  launch_tiles<Config>(forward_kernel<T, kHeadDim, kHeadDimV>, params,
                       QueryTile::count(params.branch.queries, Config::kTileQueries,
                                        params.head_count, params.batch));
}

}  // namespace sparse_attn::sm80::forward
