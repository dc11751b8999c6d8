// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes, where queries attend many keys. Registers leave room for two or three
// warps on a scheduler, so what counts is how long one warp takes for a tile.
#pragma once

#include <type_traits>

#include "attention/mask.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/lagging_softmax.cuh"
#include "sm90/forward/parts.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// A warpgroup that computes 64 queries of every tile.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void compute_many(SharedMemory& smem, const ForwardParams& params,
                                             const ForwardMaps<Tiles::kBranches>& maps,
                                             int warpgroup) {
  using T = typename Config::Element;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // of the part
  const Branch& branch = params.branches[0];
  const bool some_copied = maps.branch[0].some_copied;
  Place<Config::kQueryStages> query_place;
  Place<Config::kKeyStages> key_place;
  int merged = 0;  // parity of the tiles merged
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
    auto& attended_smem = taken.attended;

    typename Config::Scores scores;
    Rounded<T, typename Config::Scores> weights;
    typename Config::Output out;
    out.clear();
    LaggingSoftmax softmax;
    softmax.begin();
    // Whether there is a tile at key_place. The first is there, but a constant makes ptxas spill.
    bool more = queries.rows > 0;
    bool found = false;                       // what the queries attend
    PartTile tile;                            // at key_place
    Place<Config::kKeyStages> weighed_place;  // of the tile whose weights are taken

    const auto attends_tile = [&] {
      key_place.wait_full(smem.k_ring);
      tile = smem.tile[key_place.stage][number];
      return tile.exists();
    };
    const auto pass_over = [&] {
      more = tile.more();
      key_place.arrive_empty(smem.k_ring);
      key_place.wait_full(smem.v_ring);
      key_place.arrive_empty(smem.v_ring);
      key_place.advance();
    };
    using QueryRows = WarpRows<T, typename Config::QueryPart>;
    Rounded<T, RegisterTile<16, Config::kHoldsQueries ? Config::kHeadDim : 16>> queries_held;
    if constexpr (Config::kHoldsQueries) QueryRows(part_smem.q, warp_row).read(queries_held);

    const auto start_scores = [&] {
      ptx::fence_async_proxy_if(some_copied);  // between cp.async and wgmma
      ptx::wgmma_fence();
      if constexpr (Config::kHoldsQueries) {
        start_multiply_transposed<T>(scores, queries_held, smem.k[key_place.stage]);
      } else {
        start_multiply_transposed<T>(scores, part_smem.q, smem.k[key_place.stage]);
      }
    };
    const auto start_sums = [&] {
      ptx::fence_async_proxy_if(some_copied);
      ptx::wgmma_fence();
      start_multiply_add<T>(out, weights, smem.v[weighed_place.stage]);
    };
    const auto end_sums = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      keep(weights);
      weighed_place.arrive_empty(smem.v_ring);
    };
    // From scores to weights. But for the first, ends the sums that need the weights before these.
    const auto weigh = [&](auto first) {
      constexpr bool kFirst = decltype(first)::value;
      ptx::pin(scores);
      float scale_log2 = params.scale * kLog2E;
      if (scale_log2 <= 0.f) {  // the greatest score has not the greatest product
        scores.for_each([&](float& score, int, int) { score *= scale_log2; });
        scale_log2 = 1.f;
      }
      fill_others(scores, attended_smem[tile.segment] + first_row + warp_row, tile.key_tile(),
                  minus_infinity());
      more = tile.more();
      key_place.arrive_empty(smem.k_ring);
      constexpr int kBlocks = Config::kTileKeys / 16;
      constexpr int kEarly = kFirst ? 0 : Config::kEarlyBlocks;
      float sum[2] = {0.f, 0.f};
      Rounded<T, RegisterTile<16, 16 * (kEarly > 0 ? kEarly : 1)>> early;
      if constexpr (kEarly > 0) {
        softmax.template weigh<0, kEarly>(early, scores, scale_log2, sum);
        keep(early);
      }
      // Here, not before the sums that need it: ptxas moves no later wait for wgmma above a loop.
      key_place.wait_full(smem.v_ring);
      if (kFirst) {
        softmax.raise(scores, scale_log2, out);
      } else {
        end_sums();
      }
#pragma unroll
      for (int i = 0; i < 4 * kEarly; ++i) weights.at[i / 4][i % 4] = early.at[i / 4][i % 4];
      softmax.template weigh<kEarly, kBlocks>(weights, scores, scale_log2, sum);
      if (!kFirst && softmax.too_large(sum)) {
        softmax.raise(scores, scale_log2, out);
        sum[0] = sum[1] = 0.f;
        softmax.template weigh<0, kBlocks>(weights, scores, scale_log2, sum);
      }
      softmax.add(sum);
      weighed_place = key_place;
      key_place.advance();
    };

    while (more) {
      if (!attends_tile()) {
        pass_over();
        continue;
      }
      start_scores();
      if (!found) find_between(attended_smem, first_row, branch, part);
      found = true;
      ptx::wgmma_wait<0>();
      weigh(std::true_type{});
      // A tile that is passed over ends this: with values in hand there may be no stage to load the
      // next ones into.
      while (more && attends_tile()) {
        start_scores();
        start_sums();
        ptx::wgmma_wait<1>();
        weigh(std::false_type{});
      }
      start_sums();
      end_sums();
    }

    // The output takes the place of the queries.
    float* lse_smem = smem.lse[stage][warpgroup] + warp_row;
    using OutputRows = WarpRows<T, typename Config::OutputPart>;
    if (merges<Config>(params, 0, part)) {
      ptx::mbarrier_wait(smem.earlier_full[warpgroup], merged);
      merged ^= 1;
      softmax.join(out, OutputRows(earlier_of<Config>(smem, warpgroup), warp_row),
                   earlier_lse_of<Config>(smem, warpgroup) + warp_row);
      let_go_of_earlier<Config>(smem, warpgroup);
    }
    float share[2];
    softmax.finish(lse_smem, share);
    ptx::named_barrier(kComputeBarrier + warpgroup, 128);
    OutputRows(part_smem.out, warp_row).write(out, share);
    ptx::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem.computed[stage][warpgroup]);
    query_place.advance();
  }
}

}  // namespace sparse_attn::sm90::forward
