// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes, where keys are many and scattered in blocks of 64: two of those that
// its queries attend at a time, from anywhere.
#pragma once

#include "attention/mask.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/lagging_softmax.cuh"
#include "sm90/forward/parts.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// A warpgroup that computes 64 queries of every tile.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void compute_scattered(SharedMemory& smem, const ForwardParams& params,
                                                  int warpgroup) {
  using T = typename Config::Element;
  using Scores = typename Config::Scores;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // of the part
  const Branch& branch = params.branches[0];
  Place<Config::kQueryStages> query_place;
  Place<kPairs> pair_place;
  while (true) {
    const int stage = query_place.stage;
    query_place.wait_full(smem.query_ring);
    auto& taken = taken_of<Config>(smem, stage);
    const QueryTile& queries = taken.queries;
    if (queries.rows == 0) break;
    const int number = part_number<Config>(warpgroup, stage);
    const int first_row = number * kWarpgroupRows;
    const QueryTile part = part_of(queries, number);
    auto& part_smem = smem.queries[stage].part[number];
    const Interval* attended_smem = taken.attended[0] + first_row + warp_row;

    using QueryRows = WarpRows<T, typename Config::QueryPart>;
    Rounded<T, RegisterTile<16, Config::kHoldsQueries ? Config::kHeadDim : 16>> queries_held;
    if constexpr (Config::kHoldsQueries) QueryRows(part_smem.q, warp_row).read(queries_held);
    Scores scores[2];
    Rounded<T, Scores> weights[2];
    typename Config::Output out;
    out.clear();
    LaggingSoftmax softmax;
    softmax.begin();
    bool first = true;
    while (true) {
      ptx::mbarrier_wait(smem.listed[warpgroup][pair_place.stage], pair_place.round);
      const KeyPair& pair = smem.tile[warpgroup][pair_place.stage];
      pair_place.advance();
      const int count = pair.count();
      if (count == 0) break;
      // In place of a second block that is missing stands the first, and its weights are 0.
      const int last = count - 1, key_stage[2] = {pair.stage(0), pair.stage(last)};
      float scale_log2 = params.scale * kLog2E;
      const bool falls = scale_log2 <= 0.f;  // the greatest score has not the greatest product
      const float factor = falls ? scale_log2 : 1.f;
      if (falls) scale_log2 = 1.f;
      float sum[2];

      const auto wait_full = [&](int i) {
        ptx::mbarrier_wait(smem.k_ring.full[key_stage[i]], pair.round(i == 0 ? 0 : last));
      };
      const auto let_go = [&](int i) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem.k_ring.empty[key_stage[i]]);
      };
      const auto start_scores = [&](int i) {
        ptx::wgmma_fence();
        if constexpr (Config::kHoldsQueries) {
          start_multiply_transposed<T>(scores[i], queries_held, smem.k[key_stage[i]]);
        } else {
          start_multiply_transposed<T>(scores[i], part_smem.q, smem.k[key_stage[i]]);
        }
      };
      const auto start_sums = [&](int i) {
        ptx::wgmma_fence();
        start_multiply_add<T>(out, weights[i], smem.v[key_stage[i]]);
      };
      const auto mask = [&](int i) {
        ptx::pin(scores[i]);
        if (falls) scores[i].for_each([&](float& score, int, int) { score *= factor; });
        const int row = pair.first_row[i];
        const bool missing = i == count, cut = pair.cut(i) || missing;
        const int end_row = missing ? row : row + Config::kTileKeys;
        fill_others(scores[i], attended_smem, {0, 0, row, end_row, true, cut, cut, false},
                    minus_infinity());
      };
      const auto weigh = [&](int i) {
        sum[0] = sum[1] = 0.f;
        softmax.template weigh<0, Config::kTileKeys / 16>(weights[i], scores[i], scale_log2, sum);
        keep(weights[i]);
      };
      const auto weigh_again_if_too_large = [&](int i) {
        if (softmax.too_large(sum)) {
          softmax.raise(scores[i], scale_log2, out);
          weigh(i);
        }
        softmax.add(sum);
      };

      wait_full(0);
      start_scores(0);
      wait_full(1);
      start_scores(1);
      if (first) find_between(taken.attended, first_row, branch, part);
      ptx::wgmma_wait<1>();
      mask(0);
      if (first) softmax.raise(scores[0], scale_log2, out);
      first = false;
      weigh(0);
      weigh_again_if_too_large(0);
      wait_full(1);  // again: ptxas moves the wait for wgmma up, but not above a loop
      ptx::wgmma_wait<0>();
      mask(1);
      start_sums(0);
      weigh(1);
      wait_full(1);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      keep(weights[0]);
      if (count == 2) let_go(0);
      weigh_again_if_too_large(1);
      start_sums(1);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      keep(weights[1]);
      let_go(1);
    }

    // The output takes the place of the queries.
    float share[2];
    softmax.finish(smem.lse[stage][warpgroup] + warp_row, share);
    ptx::named_barrier(kComputeBarrier + warpgroup, 128);
    WarpRows<T, typename Config::OutputPart>(part_smem.out, warp_row).write(out, share);
    ptx::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem.computed[stage][warpgroup]);
    query_place.advance();
  }
}

}  // namespace sparse_attn::sm90::forward
