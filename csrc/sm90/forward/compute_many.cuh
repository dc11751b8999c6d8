// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes, where queries attend many keys. Registers leave room for two or three
// warps on a scheduler, so what counts is how long one warp takes for a tile.
#pragma once

#include <cfloat>

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/parts.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// The softmax of 16 queries of a warp, in units of log 2. Maxima lag: they are left alone until one
// of a lane passes its limit, as weights up to 2^8 are as exact in 16 bits. Only then do lanes
// exchange theirs.
struct LaggingSoftmax {
  static constexpr float kLag = 7.f;
  float limit[2];    // kLag above the maxima; finite: the weights of a query without keys are 0
  float row_sum[2];  // of this lane's columns

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) limit[i] = -FLT_MAX, row_sum[i] = 0.f;
  }

  // What weights are relative to: the maximum, but for rounding. A sum of its own for each tile, so
  // that ptxas gives those of two rows an odd and an even register (README.md).
  __device__ __forceinline__ float row_max(int row) const { return limit[row] - kLag; }

  // Whether some score of the warp passes its limit. lane_max: of this lane's columns.
  template <class Scores>
  __device__ __forceinline__ bool passes_limit(Scores& scores, float scale_log2,
                                               float (&lane_max)[2]) const {
    float even[2], odd[2];  // two chains of comparisons a row
#pragma unroll
    for (int i = 0; i < 2; ++i) even[i] = odd[i] = minus_infinity();
    scores.for_each([&](float& score, int row, int column) {
      float& max = column % 2 == 0 ? even[row] : odd[row];
      max = fmaxf(max, score);
    });
    bool passes = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lane_max[i] = fmaxf(even[i], odd[i]) * scale_log2;
      passes |= lane_max[i] > limit[i];
    }
    return __any_sync(0xffffffff, passes);
  }

  // Raises the maxima to these of all lanes; by what earlier sums shrink.
  __device__ __forceinline__ void raise(const float (&lane_max)[2], float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float old_max = row_max(i);
      limit[i] = fmaxf(limit[i], quad_max(lane_max[i]) + kLag);
      shrink[i] = ptx::exp2(old_max - row_max(i));
      row_sum[i] *= shrink[i];
    }
  }

  // Turns scores into weights.
  template <class Scores>
  __device__ __forceinline__ void weigh(Scores& scores, float scale_log2) {
    const float max[2] = {row_max(0), row_max(1)};
    scores.for_each([&](float& score, int row, int) {
      score = ptx::exp2(score * scale_log2 - max[row]);
      row_sum[row] += score;
    });
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
      weight[i] = ptx::exp2(earlier_max[i] - row_max(i));
      if (threadIdx.x % 4 == 0) row_sum[i] += weight[i];
    }
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
    earlier_rows.for_each(
        out, [&](float& element, float earlier, int row) { element += weight[row] * earlier; });
  }

  __device__ __forceinline__ void finish(float* lse_smem, float (&share)[2]) const {
    finish_softmax(
        row_sum, [&](int row) { return row == 0 ? row_max(0) : row_max(1); }, lse_smem, share);
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
    const auto start_scores = [&] {
      ptx::fence_async_proxy_if(some_copied);  // between cp.async and wgmma
      ptx::wgmma_fence();
      start_multiply_transposed<T>(scores, part_smem.q, smem.k[key_place.stage]);
    };
    const auto start_sums = [&] {
      ptx::fence_async_proxy_if(some_copied);
      ptx::wgmma_fence();
      start_multiply_add<T>(out, weights, smem.v[weighed_place.stage]);
    };
    const auto end_sums = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      weighed_place.arrive_empty(smem.v_ring);
    };
    // From scores to weights. `end`: ends the sums that need the weights before these.
    const auto weigh = [&](auto end) {
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
      float lane_max[2], shrink[2];
      const bool passes = softmax.passes_limit(scores, scale_log2, lane_max);
      // Here, not before the sums that need it: ptxas moves no later wait for wgmma above a loop.
      key_place.wait_full(smem.v_ring);
      end();
      if (passes) {
        softmax.raise(lane_max, shrink);
        out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
      }
      softmax.weigh(scores, scale_log2);
      weights.round(scores);
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
      weigh([] {});
      // A tile that is passed over ends this: with values in hand there may be no stage to load the
      // next ones into.
      while (more && attends_tile()) {
        start_scores();
        start_sums();
        ptx::wgmma_wait<1>();
        weigh(end_sums);
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
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        ptx::mbarrier_arrive(smem.earlier_empty[warpgroup % Config::kEarlierTiles]);
      }
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
