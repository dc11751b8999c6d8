// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/short_groups.h"
#include "sm90/forward/kernel.cuh"
#include "sm90/forward/launch.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::forward {

template <class T, int kHeadDim, int kHeadDimV, Reach kReach>
void launch_reach(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kReach>;
  const Branch& branch = params.branch;
  const bool has_blocks = branch.blocks.rows != nullptr;
  // Then a tile ends with its block, and shows no key that maybe no query attends.
  REQUIRE(!has_blocks || branch.blocks.size % Config::kTileKeys == 0,
          "a block must hold whole tiles");
  ForwardMaps maps;
  maps.q = ViewMap::of<typename Config::QueryPart>(
      params.q, branch.queries, params.head_dim, params.heads, params.batch, params.element, true);
  maps.some_copied = !maps.q.holds_all(branch.queries, true);
  for (int i = 0; i < branch.segment_count; ++i) {
    const SequenceView& view = branch.segments[i].keys;
    maps.k[i] = ViewMap::of<typename Config::Keys>(params.k, view, params.head_dim, params.kv_heads,
                                                   params.batch, params.element, true);
    maps.v[i] = ViewMap::of<typename Config::Values>(
        params.v, view, params.head_dim_v, params.kv_heads, params.batch, params.element, true);
    const bool from_first = branch.segments[i].part == Part::before;
    maps.some_copied |=
        !maps.k[i].holds_all(view, from_first) || !maps.v[i].holds_all(view, from_first);
  }
  launch_staying<Config>(
      forward_kernel<Config>, params,
      QueryTiles::of(branch, Config::kTileQueries, params.first_head, params.head_count,
                     params.batch, Config::kMany || has_blocks ? Order::by_length : Order::by_head),
      maps);
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& call) {
  ForwardParams params = call;
  params.branch = with_short_groups_together(params.branch, 2 * kWarpgroupRows);
  if (reach_of(params.branch) == Reach::many) {
    launch_reach<T, kHeadDim, kHeadDimV, Reach::many>(params);
  } else {
    launch_reach<T, kHeadDim, kHeadDimV, Reach::few>(params);
  }
}

}  // namespace sparse_attn::sm90::forward
