// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "sm80/backward/kernel.cuh"
#include "sm80/backward/launch.h"
#include "sm80/launch_tiles.cuh"

namespace sparse_attn::sm80::backward {

template <class Config>
void launch_config(const BackwardParams& params) {
  launch_tiles<Config>(backward_kernel<Config>, params,
                       QueryTile::count(params.branch.queries, Config::kTileOwn,
                                        params.head_count / params.heads_together, params.batch));
}

template <class T, int kHeadDim, int kHeadDimV, Sums kSums>
void launch_sums(const BackwardParams& params) {
  using Many = Config<T, kHeadDim, kHeadDimV, kSums, Reach::many>;
  if constexpr (Many::kMany) {
    if (reach_of(params.branch) == Reach::many) return launch_config<Many>(params);
  }
  launch_config<Config<T, kHeadDim, kHeadDimV, kSums, Reach::few>>(params);
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params) {
  if (params.owner == Owner::queries) {
    launch_sums<T, kHeadDim, kHeadDimV, Sums::dq>(params);
  } else if constexpr (kHeadDim + kHeadDimV <= 256) {
    launch_sums<T, kHeadDim, kHeadDimV, Sums::dk_dv>(params);
  } else {
    launch_sums<T, kHeadDim, kHeadDimV, Sums::dk>(params);
    launch_sums<T, kHeadDim, kHeadDimV, Sums::dv>(params);
  }
}

}  // namespace sparse_attn::sm80::backward
