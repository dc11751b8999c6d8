// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/reach.h"
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
void launch(const BackwardParams& params) {
  if (params.owner == Owner::queries) {
    launch_config<Config<T, kHeadDim, kHeadDimV, Owner::queries>>(params);
  } else {
    launch_config<Config<T, kHeadDim, kHeadDimV, Owner::keys>>(params);
  }
}

}  // namespace sparse_attn::sm90::backward
