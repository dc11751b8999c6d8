// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "sm80/backward/kernel.cuh"
#include "sm80/backward/launch.h"
#include "sm80/launch_tiles.cuh"

namespace sparse_attn::sm80::backward {

template <class T, int kHeadDim, int kHeadDimV, Owner kOwner>
void launch_owner(const BackwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kOwner>;
  const int heads = kOwner == Owner::queries ? params.head_count
                                             : params.head_count / (params.heads / params.kv_heads);
  launch_tiles<Config>(
      backward_kernel<T, kHeadDim, kHeadDimV, kOwner>, params,
      QueryTile::count(params.branch.queries, Config::kTileOwn, heads, params.batch));
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params) {
  if (params.owner == Owner::queries) {
    launch_owner<T, kHeadDim, kHeadDimV, Owner::queries>(params);
  } else {
    launch_owner<T, kHeadDim, kHeadDimV, Owner::keys>(params);
  }
}

}  // namespace sparse_attn::sm80::backward
