// SPDX-License-Identifier: Apache-2.0
// A warpgroup that computes, where queries attend few keys: most tiles are cut, and each warp
// leaves out what its 16 queries do not attend.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/parts.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// The scores of 16 queries and 16 keys in a lane: f(score, row of the lane, column of the tile).
template <class Scores, class F>
__device__ __forceinline__ void for_each_of_block(Scores& scores, int block, F f) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    f(scores.at[0][2 * block + i / 4][i % 4], i / 2 % 2, 16 * block + i / 4 * 8 + i % 2);
  }
}

// f(block) for the blocks of 16 columns, in code of its own each.
template <class F>
__device__ __forceinline__ void for_each_block(F f) {
#pragma unroll
  for (int block = 0; block < 4; ++block) f(block);
}

// Minus infinity where a query does not attend a key, in the blocks that are cut.
template <class Scores>
__device__ __forceinline__ void cut_blocks(Scores& scores, const WarpTile& tile, TileBits bits,
                                           const Interval* attended_smem) {
  int before[Scores::kLaneRows], keys[Scores::kLaneRows];
#pragma unroll
  for (int i = 0; i < Scores::kLaneRows; ++i) {
    const Interval attended = attended_smem[Scores::row(i)];
    before[i] = attended.first - tile.first_row - threadIdx.x % 4 * 2;
    keys[i] = greatest(least(attended.end, tile.end_row) - attended.first, 0);
  }
  for_each_block([&](int block) {
    if (!bits.cuts(block)) return;
    for_each_of_block(scores, block, [&](float& score, int row, int column) {
      if (static_cast<unsigned>(column - before[row]) >= static_cast<unsigned>(keys[row])) {
        score = minus_infinity();
      }
    });
  });
}

// The softmax of 16 queries of a warp, in units of log 2.
struct FewSoftmax {
  float row_max[2];
  float row_sum[2];  // of this lane's columns

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_max[i] = minus_infinity(), row_sum[i] = 0.f;
  }

  // With what earlier branches left: outputs are sums over weights that sum up to 1.
  __device__ __forceinline__ void begin_with(const float* lse_smem) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_max[i] = lse_smem[threadIdx.x % 32 / 4 + 8 * i] * kLog2E;
      row_sum[i] = threadIdx.x % 4 == 0 && row_max[i] != minus_infinity() ? 1.f : 0.f;
    }
  }

  // Turns the scores of the blocks that a warp attends into weights, 0 elsewhere. Maxima are left
  // alone until one falls behind by more than a factor of 2^8. Whether earlier sums shrink, and by
  // what.
  template <class Scores>
  __device__ __forceinline__ bool weigh(Scores& scores, TileBits tile, float scale_log2,
                                        float (&shrink)[2]) {
    float tile_max[2] = {minus_infinity(), minus_infinity()};
    for_each_block([&](int block) {
      if (!tile.attends(block)) return;
      for_each_of_block(scores, block, [&](float score, int row, int) {
        tile_max[row] = fmaxf(tile_max[row], score);
      });
    });
    bool behind = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) behind |= tile_max[i] * scale_log2 > row_max[i] + 8.f;
    const bool shrinks = __any_sync(0xffffffff, behind);
    if (shrinks) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float new_max = fmaxf(row_max[i], quad_max(tile_max[i]) * scale_log2);
        shrink[i] = ptx::exp2(row_max[i] - finite(new_max));
        row_max[i] = new_max;
        row_sum[i] *= shrink[i];
      }
    }
    const float offset[2] = {finite(row_max[0]), finite(row_max[1])};
    for_each_block([&](int block) {
      const bool attends = tile.attends(block);
      if (attends) {
        for_each_of_block(scores, block, [&](float& score, int row, int) {
          score = ptx::exp2(score * scale_log2 - offset[row]);
          row_sum[row] += score;
        });
      } else {
        for_each_of_block(scores, block, [](float& score, int, int) { score = 0.f; });
      }
    });
    return shrinks;
  }

  __device__ __forceinline__ void finish(float* lse_smem, float (&share)[2]) const {
    finish_softmax(
        row_sum, [&](int row) { return finite(row == 0 ? row_max[0] : row_max[1]); }, lse_smem,
        share);
  }
};

// A warpgroup that computes 64 queries of every tile. What earlier branches left is where its sums
// and its maxima begin.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void compute_few(SharedMemory& smem, const ForwardParams& params,
                                            const ForwardMaps<Tiles::kBranches>& maps,
                                            int warpgroup) {
  using T = typename Config::Element;
  const int warp_row = threadIdx.x / 32 % 4 * kWarpRows;  // of the part
  Place<Config::kQueryStages> query_place;
  Place<Config::kKeyStages> place;
  int merged = 0;  // parity of the tiles merged
  while (true) {
    const int stage = query_place.stage;
    query_place.wait_full(smem.query_ring);
    const auto& taken = taken_of<Config>(smem, stage);
    const QueryTile& queries = taken.queries;
    if (queries.rows == 0) break;
    const int branch_number = Tiles::kBranches == 1 ? 0 : taken.branch;
    const Branch& branch = params.branches[branch_number];
    const int number = part_number<Config>(warpgroup, stage);
    const int first_row = number * kWarpgroupRows;
    auto& part_smem = smem.queries[stage].part[number];
    float* lse_smem = smem.lse[stage][warpgroup] + warp_row;

    typename Config::Output out;
    FewSoftmax softmax;
    bool summed = merges<Config>(params, branch_number, part_of(queries, number));
    if (summed) {
      ptx::mbarrier_wait(smem.earlier_full[warpgroup], merged);
      merged ^= 1;
      auto& earlier_smem = earlier_of<Config>(smem, warpgroup);
      const WarpRows<T, typename Config::OutputPart> rows(earlier_smem, warp_row);
      rows.for_each(out, [](float& element, float earlier, int) { element = earlier; });
      softmax.begin_with(earlier_lse_of<Config>(smem, warpgroup) + warp_row);
      let_go_of_earlier<Config>(smem, warpgroup);
    } else {
      out.clear();
      softmax.begin();
    }

    typename Config::Scores scores;
    Rounded<T, typename Config::Scores> weights;
    bool more = true;  // there is a tile at `place`
    while (more) {
      place.wait_full(smem.k_ring);
      const WarpTile& tile = smem.tile[place.stage][number * 4 + threadIdx.x / 32 % 4];
      const TileBits bits = tile.bits.uniform();
      more = bits.more();
      if (!bits.exists()) {
        place.arrive_empty(smem.k_ring);
        place.wait_full(smem.v_ring);
        place.arrive_empty(smem.v_ring);
        place.advance();
        continue;
      }
      ptx::fence_async_proxy_if(
          maps.branch[branch_number].some_copied);  // between cp.async and wgmma
      ptx::wgmma_fence();
      start_multiply_transposed<T>(scores, part_smem.q, smem.k[place.stage]);
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
      float scale_log2 = params.scale * kLog2E;
      if (scale_log2 <= 0.f) {  // the greatest score has not the greatest product
        scores.for_each([&](float& score, int, int) { score *= scale_log2; });
        scale_log2 = 1.f;
      }
      if (bits.cuts_some()) {
        cut_blocks(scores, tile, bits, taken.attended[tile.segment] + first_row + warp_row);
      }
      if (branch.residues > 1) {
        fill_other_residues(scores, branch.residues, tile.first_row, minus_infinity());
      }
      place.arrive_empty(smem.k_ring);
      float shrink[2];
      const bool shrinks = softmax.weigh(scores, bits, scale_log2, shrink);
      if (shrinks && summed) {
        out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
      }
      summed = true;
      weights.round(scores);
      place.wait_full(smem.v_ring);
      ptx::fence_async_proxy_if(maps.branch[branch_number].some_copied);
      ptx::wgmma_fence();
      start_multiply_add<T>(out, weights, smem.v[place.stage]);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      place.arrive_empty(smem.v_ring);
      place.advance();
    }

    // The output takes the place of the queries.
    float share[2];
    softmax.finish(lse_smem, share);
    ptx::named_barrier(kComputeBarrier + warpgroup, 128);
    WarpRows<T, typename Config::OutputPart>(part_smem.out, warp_row).write(out, share);
    ptx::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem.computed[stage][warpgroup]);
    query_place.advance();
  }
}

}  // namespace sparse_attn::sm90::forward
