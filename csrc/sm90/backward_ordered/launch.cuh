// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "sm90/backward_ordered/kernel.cuh"
#include "sm90/backward_ordered/launch.h"
#include "sm90/launch_staying.cuh"

namespace sparse_attn::sm90::backward_ordered {

template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  const std::optional<Plan> plan = Plan::of(params, kHeadDim);
  REQUIRE(plan && params.workspace != nullptr, "the ordered kernel is not made for this branch");
  REQUIRE(!params.finds_stats, "the ordered kernel does not find the statistics");
  const SequenceView& keys = params.branch.queries;
  const SequenceView& queries = params.branch.segments[0].keys;
  const auto map = [&](const TensorView& tensor, const SequenceView& view, int heads) {
    return ViewMap::of<typename Config::Rows>(tensor, view, params.head_dim, heads, params.batch,
                                              params.element, true);
  };
  const auto map_v = [&](const TensorView& tensor, const SequenceView& view, int heads) {
    return ViewMap::of<typename Config::RowsV>(tensor, view, params.head_dim_v, heads, params.batch,
                                               params.element, true);
  };
  const Maps maps = {map(params.q, queries, params.heads),
                     map_v(params.dout, queries, params.heads),
                     map(params.k, keys, params.kv_heads), map_v(params.v, keys, params.kv_heads)};
  int* counters = static_cast<int*>(params.workspace);
  CHECK_CUDA(cudaMemsetAsync(counters, 0, sizeof(int) * plan->counters(),
                             static_cast<cudaStream_t>(params.stream)));
  const Workspace workspace = {
      {counters},
      counters + 1 + plan->units,
      reinterpret_cast<float4*>(static_cast<char*>(params.workspace) + plan->slots_at())};
  launch_staying<Config>(backward_ordered_kernel<Config>, params, *plan, maps, workspace);
}

}  // namespace sparse_attn::sm90::backward_ordered
