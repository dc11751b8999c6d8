// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/short_groups.h"
#include "sm80/forward/launch.h"
#include "sm90/forward/kernel.cuh"
#include "sm90/forward/launch.h"
#include "sm90/forward/together.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::forward {

template <class Config>
BranchMaps maps_of(const ForwardParams& params, const Branch& branch) {
  // Then a tile ends with its block, and shows no key that maybe no query attends.
  REQUIRE(branch.blocks.rows == nullptr || branch.blocks.size % Config::kTileKeys == 0,
          "a block must hold whole tiles");
  BranchMaps maps;
  maps.q = ViewMap::of<typename Config::QueryPart>(
      params.q, branch.queries, params.head_dim, params.heads, params.batch, params.element, true);
  maps.out =
      ViewMap::of<typename Config::OutputPart>(params.out, branch.queries, params.head_dim_v,
                                               params.heads, params.batch, params.element, true);
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
  return maps;
}

// Tiles of few keys in the order of memory.
inline Order order_of(const ForwardParams& params) {
  if (by_tickets(params.branches[0])) return Order::by_length;
  return params.q.head_stride < params.q.row_stride ? Order::by_token : Order::by_head;
}

// One branch.
template <class T, int kHeadDim, int kHeadDimV, Reach kReach>
void launch_one(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kReach, 1>;
  const Branch& branch = params.branches[0];
  const BranchMaps maps = maps_of<Config>(params, branch);
  if constexpr (Config::kScattered) {  // loads by tensor maps alone
    if (maps.some_copied) return launch_one<T, kHeadDim, kHeadDimV, Reach::few>(params);
    REQUIRE(branch.segment_count == 1, "blocks are of one key view");
  }
  if (params.counters != nullptr) zero_counters(params, params.counters, 1);
  launch_staying<Config>(forward_kernel<Config, QueryTiles>, params,
                         QueryTiles::of(branch, Config::kTileQueries, params.first_head,
                                        params.head_count, params.batch, order_of(params),
                                        Config::kMany ? kWarpgroupRows : Config::kTileQueries,
                                        ctas_of<Config>(params.device)),
                         ForwardMaps<1>{{maps}});
}

// Two branches of few keys, the second close behind the first.
template <class T, int kHeadDim, int kHeadDimV>
void launch_two(const ForwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV, Reach::few, 2>;
  zero_counters(params, params.counters, 1 + params.batch * params.head_count);
  // A CTA computes one item, loads the next and has taken a third. Tuned on an H100: nearer waits
  // longer, farther leaves L2.
  const int ctas = ctas_of<Config>(params.device);
  const int distance = Config::kCtas == 2 ? 9 * ctas / 4 : ctas;
  launch_staying<Config>(forward_kernel<Config, MergedTiles>, params,
                         MergedTiles::of(params.branches, Config::kTileQueries, params.first_head,
                                         params.head_count, params.batch, distance),
                         ForwardMaps<2>{{maps_of<Config>(params, params.branches[0]),
                                         maps_of<Config>(params, params.branches[1])}});
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const ForwardParams& call) {
  using Few = Config<T, kHeadDim, kHeadDimV, Reach::few, 1>;
  constexpr bool kTogether = takes_two_branches(kHeadDim, kHeadDimV);
  static_assert(!kTogether || Few::kMerges);
  const bool together = kTogether && go_together(call);
  if (call.branch_count > 1 && !together) {
    return one_by_one(call, launch<T, kHeadDim, kHeadDimV>);
  }
  if (call.merge && !Few::kMerges) return sm80::forward::launch<T, kHeadDim, kHeadDimV>(call);
  ForwardParams params = call;
  for (int i = 0; i < params.branch_count; ++i) {
    params.branches[i] = with_short_groups_together(params.branches[i], 2 * kWarpgroupRows);
  }
  const Reach reach = reach_of(params.branches[0]);
  if (together) {
    if constexpr (kTogether) launch_two<T, kHeadDim, kHeadDimV>(params);
  } else if (reach == Reach::many) {
    launch_one<T, kHeadDim, kHeadDimV, Reach::many>(params);
  } else if (Few::kSmall && reach == Reach::scattered && !params.merge) {
    if constexpr (Few::kSmall) launch_one<T, kHeadDim, kHeadDimV, Reach::scattered>(params);
  } else {
    launch_one<T, kHeadDim, kHeadDimV, Reach::few>(params);
  }
}

}  // namespace sparse_attn::sm90::forward
