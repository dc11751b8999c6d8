// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes, where queries attend many keys. Registers leave room for two or three
// warps on a scheduler, so what counts is how long one warp takes for a tile.
#pragma once

#include <cfloat>
#include <type_traits>

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/parts.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// The softmax of 16 queries of a warp, in units of log 2. Maxima lag: weights are found with those
// of the tiles before, without a look at the scores. Only if they come out too large for 16 bits
// are the maxima raised, and the weights found again.
struct LaggingSoftmax {
  // Weights are relative to less than the maximum: more of them are normal numbers in fp16.
  static constexpr float kAbove = 7.f;
  static constexpr float kMostSum = 32768.f;  // of a lane's weights: each is finite in fp16
  float row_max[2];                           // finite: the weights of a query without keys are 0
  float row_sum[2];                           // of this lane's columns

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_max[i] = -FLT_MAX, row_sum[i] = 0.f;
  }

  // What weights are relative to. A sum of its own for each tile, so that ptxas gives those of two
  // rows an odd and an even register (README.md).
  __device__ __forceinline__ float reference(int row) const { return row_max[row] - kAbove; }

  // Raises the maxima to these of all lanes; by what earlier sums shrink.
  __device__ __forceinline__ void raise(const float (&lane_max)[2], float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float old_reference = reference(i);
      row_max[i] = fmaxf(row_max[i], quad_max(lane_max[i]));
      shrink[i] = ptx::exp2(old_reference - reference(i));
      row_sum[i] *= shrink[i];
    }
  }

  // Raises them to those of scores.
  template <class Scores, class Output>
  __device__ __forceinline__ void raise(Scores& scores, float scale_log2, Output& out) {
    float even[2], odd[2];  // two chains of comparisons a row
#pragma unroll
    for (int i = 0; i < 2; ++i) even[i] = odd[i] = minus_infinity();
    scores.for_each([&](float& score, int row, int column) {
      float& max = column % 2 == 0 ? even[row] : odd[row];
      max = fmaxf(max, score);
    });
    float lane_max[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) lane_max[i] = fmaxf(even[i], odd[i]) * scale_log2;
    raise(lane_max, shrink);
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
  }

  // The weights of blocks [kFirst, kEnd) of 16 columns, added to `sum`.
  template <int kFirst, int kEnd, class T, class Weighed, class Scores>
  __device__ __forceinline__ void weigh(Rounded<T, Weighed>& weights, const Scores& scores,
                                        float scale_log2, float (&sum)[2]) const {
    const float max[2] = {reference(0), reference(1)};
#pragma unroll
    for (int i = 2 * kFirst; i < 2 * kEnd; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float (&columns)[4] = scores.at[0][i];
        const float low = ptx::exp2(fmaf(columns[2 * row], scale_log2, -max[row]));
        const float high = ptx::exp2(fmaf(columns[2 * row + 1], scale_log2, -max[row]));
        sum[row] += low;
        sum[row] += high;
        weights.at[i / 2][i % 2 * 2 + row] = ptx::pack<T>(low, high);
      }
    }
  }

  // Whether some weights of the warp are too large, by their sums.
  static __device__ __forceinline__ bool too_large(const float (&sum)[2]) {
    return __any_sync(0xffffffff, fmaxf(sum[0], sum[1]) > kMostSum);
  }

  __device__ __forceinline__ void add(const float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_sum[i] += sum[i];
  }

  // Adds keys that others have summed up to an output, of this lse.
  template <class Output, class Rows>
  __device__ __forceinline__ void join(Output& out, const Rows& earlier_rows,
                                       const float* lse_smem) {
    float earlier_max[2], shrink[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      earlier_max[i] = lse_smem[threadIdx.x % 32 / 4 + 8 * i] * kLog2E;
    }
    raise(earlier_max, shrink);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = ptx::exp2(earlier_max[i] - reference(i));
      if (threadIdx.x % 4 == 0) row_sum[i] += weight[i];
    }
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
    earlier_rows.for_each(
        out, [&](float& element, float earlier, int row) { element += weight[row] * earlier; });
  }

  __device__ __forceinline__ void finish(float* lse_smem, float (&share)[2]) const {
    finish_softmax(
        row_sum, [&](int row) { return row == 0 ? reference(0) : reference(1); }, lse_smem, share);
  }
};

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
