// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/tiles.h"
#include "sm80/forward/kernel.cuh"
#include "sm80/forward/launch.h"
#include "sm80/launch_tiles.cuh"

namespace sparse_attn::sm80::forward {

// Key rows that the middle query of a branch attends, without regard to blocks.
inline int64_t typical_keys(const Branch& branch) {
  const int token = branch.queries.position(0, branch.queries.max_rows / 2);
  int64_t keys = 0;
  for (int segment = 0; segment < branch.segment_count; ++segment) {
    const Interval attended = branch.segments[segment].bounds(branch.run, 0, token);
    keys += attended.end - attended.first;
  }
  return keys;
}

template <class T, int kHeadDim, int kHeadDimV, Reach kReach>
void launch_reach(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kReach>;
  launch_tiles<Config>(forward_kernel<Config>, params,
                       QueryTile::count(params.branch.queries, Config::kTileQueries,
                                        params.head_count, params.batch));
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& params) {
  if constexpr (Config<T, kHeadDim, kHeadDimV, Reach::many>::kMany) {
    // On an H100 many pays from four tiles on.
    if (typical_keys(params.branch) >= 512) {
      return launch_reach<T, kHeadDim, kHeadDimV, Reach::many>(params);
    }
  }
  launch_reach<T, kHeadDim, kHeadDimV, Reach::few>(params);
}

}  // namespace sparse_attn::sm80::forward
