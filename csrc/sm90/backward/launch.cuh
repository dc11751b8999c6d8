// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/reach.h"
#include "attention/short_groups.h"
#include "sm90/backward/kernel.cuh"
#include "sm90/backward/launch.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::backward {

template <class Config>
void launch_config(const BackwardParams& params) {
  const Order order = reach_of(params.branch) == Reach::many ? Order::by_length : Order::by_head;
  launch_staying<Config>(
      backward_kernel<Config>, params,
      QueryTiles::of(params.branch, Config::kTileOwn, 0, params.head_count / params.heads_together,
                     params.batch, order));
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& call) {
  BackwardParams params = call;
  params.branch = with_short_groups_together(params.branch, 2 * kWarpgroupRows);
  if (params.owner == Owner::queries) {
    launch_config<Config<T, kHeadDim, kHeadDimV, Sums::dq>>(params);
  } else if constexpr (kHeadDim + kHeadDimV <= 256) {
    launch_config<Config<T, kHeadDim, kHeadDimV, Sums::dk_dv>>(params);
  } else {
    launch_config<Config<T, kHeadDim, kHeadDimV, Sums::dk>>(params);
    launch_config<Config<T, kHeadDim, kHeadDimV, Sums::dv>>(params);
  }
}

}  // namespace sparse_attn::sm90::backward
