// SPDX-License-Identifier: Apache-2.0
// The portable forward kernel: one branch of a plan, one CTA per tile of 64 queries.
//
// Four warps, 16 queries each, hold their queries, the running softmax and the output in registers.
// Key and value tiles stream through two stages of shared memory by cp.async. README.md in this
// folder has the schedule and the counts.
#pragma once

#include "sm80/forward/config.h"
#include "sm80/tile_ops.cuh"

namespace sparse_attn::sm80::forward {

// scores (16, keys) = q k^T, in units of log 2.
template <class T, class Tile, int kSteps, int kKeyTiles>
__device__ __forceinline__ void scores_qk(float (&scores)[kKeyTiles][4],
                                          const uint32_t (&q_reg)[kSteps][4], Tile& k_smem,
                                          float scale_log2) {
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_transposed<T>(scores, q_reg[step], k_smem, step);
  // Before any maximum is taken, so that scale may be 0 or negative.
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] *= scale_log2;
  }
}

// out (16, kHeadDimV) = out * shrink + weights (16, keys) v (keys, kHeadDimV).
template <class T, class Tile, int kKeyTiles, int kOutTiles>
__device__ __forceinline__ void accumulate_pv(float (&out)[kOutTiles][4],
                                              const float (&weights)[kKeyTiles][4], Tile& v_smem,
                                              float2 shrink) {
#pragma unroll
  for (int i = 0; i < kOutTiles; ++i) {
    out[i][0] *= shrink.x, out[i][1] *= shrink.x;
    out[i][2] *= shrink.y, out[i][3] *= shrink.y;
  }
  multiply<T>(out, weights, v_smem);
}

// Divides by the softmax sum, merges with the earlier branches (their output is in out_smem) and
// leaves the tile in out_smem, the lse in global memory.
template <class T, class Tile, int kOutTiles>
__device__ __forceinline__ void finish_rows(float (&out)[kOutTiles][4], Tile& out_smem,
                                            const OnlineSoftmax& softmax,
                                            float* const (&lse_gmem)[2], bool merge) {
  const int lane = lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(softmax.row_sum[half]);
    // A query with no key: sum 0, output 0, lse -inf.
    float lse = sum == 0.f ? minus_infinity() : (softmax.row_max[half] + log2f(sum)) * kLn2;
    float share = sum == 0.f ? 0.f : 1.f / sum;
    float earlier_share = 0.f;
    if (merge && lse_gmem[half] != nullptr) {
      const float earlier = *lse_gmem[half];
      const float top = finite(fmaxf(lse, earlier));
      const float own_weight = exp2f((lse - top) * kLog2E);
      const float earlier_weight = exp2f((earlier - top) * kLog2E);
      const float total = own_weight + earlier_weight;
      lse = total == 0.f ? minus_infinity() : top + log2f(total) * kLn2;
      share *= total == 0.f ? 0.f : own_weight / total;
      earlier_share = total == 0.f ? 0.f : earlier_weight / total;
    }
    // All four lanes of a row read the earlier lse before one writes the new one.
    __syncwarp();
    if (lane % 4 == 0 && lse_gmem[half] != nullptr) *lse_gmem[half] = lse;

#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
      auto* pair_smem = reinterpret_cast<uint32_t*>(out_smem.at(own_row(half), i)) + lane % 4;
      float2 pair = {out[i][2 * half] * share, out[i][2 * half + 1] * share};
      if (merge) {
        const float2 earlier = ptx::unpack<T>(*pair_smem);
        pair.x += earlier.x * earlier_share;
        pair.y += earlier.y * earlier_share;
      }
      *pair_smem = ptx::pack<T>(pair.x, pair.y);
    }
  }
}

template <class T, int kHeadDim, int kHeadDimV>
__global__ void __launch_bounds__(Config<T, kHeadDim, kHeadDimV>::kThreads,
                                  Config<T, kHeadDim, kHeadDimV>::kLeastCtas)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  extern __shared__ char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);

  // Which queries, and where they and their keys lie.
  const Branch& branch = params.branch;
  const QueryTile queries =
      QueryTile::of(blockIdx.x, branch.queries, Config::kTileQueries, params.head_count);
  if (queries.rows == 0) return;
  const int head = params.first_head + queries.head;
  const int kv_head = head / (params.heads / params.kv_heads);
  const T* q_gmem = head_gmem<T>(params.q, queries.batch, head);
  const T* k_gmem = head_gmem<T>(params.k, queries.batch, kv_head);
  const T* v_gmem = head_gmem<T>(params.v, queries.batch, kv_head);
  T* out_gmem = head_gmem<T>(params.out, queries.batch, head);
  float* lse_gmem =
      params.lse + (static_cast<int64_t>(queries.batch) * params.heads + head) * params.seq_q;

  const auto load_queries = [&](auto& tile_smem, const T* gmem, int64_t row_stride, int head_dim) {
    load_tile<kThreads>(tile_smem, gmem, row_stride, branch.queries, queries.group,
                        queries.first_row, queries.first_row + queries.rows, head_dim);
  };
  const auto load_keys = [&](const KeyTile& tile, int stage) {
    const SequenceView& view = branch.segments[tile.segment].keys;
    load_tile<kThreads>(smem.k[stage], k_gmem, params.k.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim);
    load_tile<kThreads>(smem.v[stage], v_gmem, params.v.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim_v);
  };

  // This lane's two queries; the last query stands in for rows that do not exist.
  int token[2];
  float* row_lse_gmem[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own_row(half);
    token[half] =
        branch.queries.position(queries.group, queries.first_row + least(row, queries.rows - 1));
    row_lse_gmem[half] = row < queries.rows ? lse_gmem + token[half] : nullptr;
  }

  const KeyTiles key_tiles(branch, queries, Config::kTileKeys);
  KeyTile tile = key_tiles.first();
  load_queries(smem.q, q_gmem, params.q.row_stride, params.head_dim);
  ptx::cp_async_commit();
  if (key_tiles.valid(tile)) load_keys(tile, 0);
  ptx::cp_async_commit();

  uint32_t q_reg[kHeadDim / 16][4];
  ptx::cp_async_wait<1>();
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) load_fragment(q_reg[step], smem.q, step);
  __syncthreads();  // the output takes the place of the queries
  if (params.merge) load_queries(smem.out, out_gmem, params.out.row_stride, params.head_dim_v);

  float out[kHeadDimV / 8][4] = {};
  OnlineSoftmax softmax;
  Attended attended;
  for (int stage = 0; key_tiles.valid(tile); stage = (stage + 1) % kStages) {
    const KeyTile next = key_tiles.next(tile);
    if (key_tiles.valid(next)) load_keys(next, (stage + 1) % kStages);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();

    float scores[Config::kTileKeys / 8][4];
    scores_qk<T>(scores, q_reg, smem.k[stage], params.scale * kLog2E);
    if (tile.masked) {
      attended.update(branch, tile.segment, queries.group, token);
      fill_masked(scores, tile.first_row, attended, minus_infinity());
    }
    const float2 shrink = softmax.update(scores);
    accumulate_pv<T>(out, scores, smem.v[stage], shrink);
    __syncthreads();  // the next copy overwrites this stage
    tile = next;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  finish_rows<T>(out, smem.out, softmax, row_lse_gmem, params.merge);
  __syncthreads();
  store_tile<kThreads>(smem.out, out_gmem, params.out.row_stride, branch.queries, queries,
                       params.head_dim_v);
}

}  // namespace sparse_attn::sm80::forward
