// SPDX-License-Identifier: Apache-2.0
// The portable forward kernel: one branch of a plan, one CTA per tile of 64 queries.
//
// Four warps, 16 queries each, hold their queries, the running softmax and the output in registers.
// Key and value tiles stream through two stages of shared memory by cp.async. README.md in this
// folder has the schedule and the counts.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tiles.h"
#include "params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sync.cuh"
#include "sm80/forward/config.h"

namespace sparse_attn::sm80::forward {

// First element of a (batch, head) of a tensor.
template <class T>
__device__ __forceinline__ T* head_gmem(const TensorView& tensor, int batch, int head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// Starts copying rows [first_row, end_row) of a view into a tile; zeros where there is no row, and
// past head_dim.
template <int kThreads, class T, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile_smem, const T* head_gmem, int64_t row_stride,
                                          const SequenceView& view, int group, int first_row,
                                          int end_row, int head_dim) {
  constexpr int kRowsAtOnce = kThreads / Tile::kVectors;
  const int vector = threadIdx.x % Tile::kVectors;
#pragma unroll
  for (int row = threadIdx.x / Tile::kVectors; row < Tile::kRows; row += kRowsAtOnce) {
    const bool exists = first_row + row < end_row && vector * 8 < head_dim;
    const int64_t token = exists ? view.position(group, first_row + row) : 0;
    const T* row_gmem = head_gmem + (exists ? token * row_stride + vector * 8 : 0);
    ptx::cp_async_16(tile_smem.at(row, vector), row_gmem, exists);
  }
}

// The mma fragments of a warp's 16 queries, (16, kHeadDim).
template <class Tile, int kSteps>
__device__ __forceinline__ void load_query_fragments(uint32_t (&q_reg)[kSteps][4], Tile& q_smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {  // 16 columns each
    ptx::ldmatrix_x4(q_reg[step], q_smem.at(warp * 16 + lane % 16, step * 2 + lane / 16));
  }
}

// scores (16, keys) = q (16, kHeadDim) k^T, in units of log 2.
template <class T, class Tile, int kSteps, int kKeyTiles>
__device__ __forceinline__ void scores_qk(float (&scores)[kKeyTiles][4],
                                          const uint32_t (&q_reg)[kSteps][4], Tile& k_smem,
                                          float scale_log2) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {  // 16 columns of q and k
#pragma unroll
    for (int i = 0; i < kKeyTiles; i += 2) {  // 16 keys
      uint32_t k_reg[4];                      // keys 0-7: columns 0-7, 8-15; keys 8-15: likewise
      ptx::ldmatrix_x4(k_reg, k_smem.at(i * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      ptx::mma_m16n8k16<T>(scores[i], q_reg[step], k_reg[0], k_reg[1]);
      ptx::mma_m16n8k16<T>(scores[i + 1], q_reg[step], k_reg[2], k_reg[3]);
    }
  }
  // Before any maximum is taken, so that scale may be 0 or negative.
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] *= scale_log2;
  }
}

// Minus infinity where a query (this lane has two) does not attend the key row.
template <int kKeyTiles>
__device__ __forceinline__ void mask_scores(float (&scores)[kKeyTiles][4], int first_row,
                                            const Interval (&attended)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key_row = first_row + i * 8 + column + j % 2;
      if (!attended[j / 2].contains(key_row)) scores[i][j] = minus_infinity();
    }
  }
}

// out (16, kHeadDimV) = out * shrink + weights (16, keys) v (keys, kHeadDimV).
template <class T, class Tile, int kKeyTiles, int kOutTiles>
__device__ __forceinline__ void accumulate_pv(float (&out)[kOutTiles][4],
                                              const float (&weights)[kKeyTiles][4], Tile& v_smem,
                                              float2 shrink) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kOutTiles; ++i) {
    out[i][0] *= shrink.x, out[i][1] *= shrink.x;
    out[i][2] *= shrink.y, out[i][3] *= shrink.y;
  }
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {  // 16 keys
    // An accumulator of two 8-key tiles has the layout of one operand of 16 keys.
    const float (&low)[4] = weights[2 * step], (&high)[4] = weights[2 * step + 1];
    const uint32_t p_reg[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                               ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < kOutTiles; i += 2) {  // 16 columns of v
      uint32_t v_reg[4];                      // columns 0-7: keys 0-7, 8-15; columns 8-15: likewise
      ptx::ldmatrix_x4_trans(v_reg, v_smem.at(step * 16 + lane % 16, i + lane / 16));
      ptx::mma_m16n8k16<T>(out[i], p_reg, v_reg[0], v_reg[1]);
      ptx::mma_m16n8k16<T>(out[i + 1], p_reg, v_reg[2], v_reg[3]);
    }
  }
}

// Divides by the softmax sum, merges with the earlier branches (their output is in out_smem) and
// leaves the tile in out_smem, the lse in global memory.
template <class T, class Tile, int kOutTiles>
__device__ __forceinline__ void finish_rows(float (&out)[kOutTiles][4], Tile& out_smem,
                                            const OnlineSoftmax& softmax,
                                            float* const (&lse_gmem)[2], bool merge) {
  const int lane = threadIdx.x % 32;
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

    const int row = threadIdx.x / 32 * 16 + lane / 4 + half * 8;
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
      auto* pair_smem = reinterpret_cast<uint32_t*>(out_smem.at(row, i)) + lane % 4;
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

template <int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(Tile& out_smem, T* head_gmem, int64_t row_stride,
                                           const SequenceView& view, const QueryTile& queries,
                                           int head_dim) {
  constexpr int kRowsAtOnce = kThreads / Tile::kVectors;
  const int vector = threadIdx.x % Tile::kVectors;
#pragma unroll
  for (int row = threadIdx.x / Tile::kVectors; row < Tile::kRows; row += kRowsAtOnce) {
    if (row < queries.rows && vector * 8 < head_dim) {
      const int64_t token = view.position(queries.group, queries.first_row + row);
      *reinterpret_cast<uint4*>(head_gmem + token * row_stride + vector * 8) =
          *reinterpret_cast<const uint4*>(out_smem.at(row, vector));
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
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
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
  load_query_fragments(q_reg, smem.q);
  __syncthreads();  // the output takes the place of the queries
  if (params.merge) load_queries(smem.out, out_gmem, params.out.row_stride, params.head_dim_v);

  float out[kHeadDimV / 8][4] = {};
  OnlineSoftmax softmax;
  Interval attended[2];  // key rows of this lane's queries, in one segment
  int attended_segment = -1;
  for (int stage = 0; key_tiles.valid(tile); stage = (stage + 1) % kStages) {
    const KeyTile next = key_tiles.next(tile);
    if (key_tiles.valid(next)) load_keys(next, (stage + 1) % kStages);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();

    float scores[Config::kTileKeys / 8][4];
    scores_qk<T>(scores, q_reg, smem.k[stage], params.scale * kLog2E);
    if (tile.masked) {
      if (tile.segment != attended_segment) {
        attended_segment = tile.segment;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          attended[half] =
              branch.segments[tile.segment].bounds(branch.run, queries.group, token[half]);
        }
      }
      mask_scores(scores, tile.first_row, attended);
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
