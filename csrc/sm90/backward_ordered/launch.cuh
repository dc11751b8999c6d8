// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sm90/backward_ordered/kernel.cuh"
#include "sm90/backward_ordered/launch.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::backward_ordered {

template <class Config>
void launch_plan(const BackwardParams& params, const Plan& plan) {
  const SequenceView& keys = params.branch.queries;
  const SequenceView& queries = params.branch.segments[0].keys;
  const auto map = [&](auto map_of, const TensorView& tensor, const SequenceView& view,
                       int head_dim, int heads) {
    return map_of(tensor, view, head_dim, heads, params.batch, params.element, true);
  };
  const Maps maps = {
      map(ViewMap::of<typename Config::Queries>, params.q, queries, params.head_dim, params.heads),
      map(ViewMap::of<typename Config::QueriesV>, params.dout, queries, params.head_dim_v,
          params.heads),
      map(ViewMap::of<typename Config::Rows>, params.k, keys, params.head_dim, params.kv_heads),
      map(ViewMap::of<typename Config::RowsV>, params.v, keys, params.head_dim_v, params.kv_heads),
      map(ViewMap::of<typename Config::SumRows>, params.dq, queries, params.head_dim, params.heads),
      map(ViewMap::of<typename Config::SumRows>, params.dk, keys, params.head_dim, params.heads),
      map(ViewMap::of<typename Config::SumRowsV>, params.dv, keys, params.head_dim_v,
          params.heads)};
  int* counters = static_cast<int*>(params.workspace);
  zero_counters(params, counters, plan.counters());
  const Workspace workspace = {
      {counters},
      counters + 1 + plan.units,
      reinterpret_cast<float4*>(static_cast<char*>(params.workspace) + plan.slots_at())};
  launch_staying<Config>(backward_ordered_kernel<Config>, params, plan, maps, workspace);
}

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params) {
  const std::optional<Plan> plan = Plan::of(params, kHeadDim);
  REQUIRE(plan && params.workspace != nullptr, "the ordered kernel is not made for this branch");
  REQUIRE(!params.finds_stats, "the ordered kernel does not find the statistics");
  if constexpr (queries_of_tile(kHeadDim, kHeadDimV, 0) == 128) {
    if (plan->tile_queries == 128) {
      return launch_plan<Config<T, kHeadDim, kHeadDimV, 128>>(params, *plan);
    }
  }
  launch_plan<Config<T, kHeadDim, kHeadDimV, 64>>(params, *plan);
}

}  // namespace sparse_attn::sm90::backward_ordered
