// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/reach.h"
#include "attention/short_groups.h"
#include "sm90/backward/kernel.cuh"
#include "sm90/backward/launch.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::backward {

// Of tensors of the rows that own, or of those that stream.
template <class Tile, class TileV>
struct Maps {
  const BackwardParams& params;
  bool queries;  // and dout; else keys and values

  ViewMap of(const SequenceView& view, bool usable) const {
    return ViewMap::of<Tile>(queries ? params.q : params.k, view, params.head_dim, heads(),
                             params.batch, params.element, usable);
  }
  ViewMap of_v(const SequenceView& view, bool usable) const {
    return ViewMap::of<TileV>(queries ? params.dout : params.v, view, params.head_dim_v, heads(),
                              params.batch, params.element, usable);
  }

 private:
  int heads() const { return queries ? params.heads : params.kv_heads; }
};

template <class Config>
void launch_config(const BackwardParams& params) {
  const Branch& branch = params.branch;
  REQUIRE(branch.blocks.rows == nullptr || branch.blocks.size % kWarpgroupRows == 0,
          "a block must hold whole parts of a tile");
  const Maps<typename Config::Own, typename Config::OwnV> own{params, Config::kOwnsQueries};
  const Maps<typename Config::Streamed, typename Config::StreamedV> streamed{params,
                                                                             !Config::kOwnsQueries};
  // Tiles that end with a block must not show the rows after it, which maybe nothing attends.
  const bool usable = Config::kByMap && branch.blocks.rows == nullptr;
  BackwardMaps maps;
  maps.own = own.of(branch.queries, Config::kByMap);
  maps.own_v = own.of_v(branch.queries, Config::kByMap);
  for (int i = 0; i < branch.segment_count; ++i) {
    maps.streamed[i] = streamed.of(branch.segments[i].keys, usable);
    maps.streamed_v[i] = streamed.of_v(branch.segments[i].keys, usable);
  }
  const Order order = by_tickets(branch) ? Order::by_length : Order::by_head;
  if (params.workspace != nullptr) zero_counters(params, params.workspace, 1);
  launch_staying<Config>(
      backward_kernel<Config>, params,
      QueryTiles::of(branch, Config::kTileOwn, 0, params.head_count / params.heads_together,
                     params.batch, order, Config::kTileOwn, ctas_of<Config>(params.device)),
      maps);
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
