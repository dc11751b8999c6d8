// SPDX-License-Identifier: Apache-2.0
// The portable forward kernel: one branch of a plan, one CTA per tile of 64 or 128 queries.
//
// A warp owns 16 or 32 queries and holds their running softmax and output in registers. Key and
// value tiles stream through two stages of shared memory by cp.async. README.md in this folder has
// the schedule and the counts.
#pragma once

#include "attention/finish_rows.cuh"
#include "attention/mask.cuh"
#include "sm80/forward/config.h"
#include "sm80/multiply.cuh"
#include "sm80/walk.cuh"

namespace sparse_attn::sm80::forward {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kLeastCtas)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using T = typename Config::Element;
  constexpr int kThreads = Config::kThreads;
  static_assert(Config::kStages == 2);
  constexpr int kLaneRows = Config::Output::kLaneRows;
  __builtin_assume(threadIdx.x < kThreads);
  extern __shared__ char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);

  // Which queries, and where they and their keys lie.
  const Branch& branch = params.branches[0];
  if (threadIdx.x == 0) {
    const QueryTile tile = QueryTile::of(blockIdx.x, branch, Config::kTileQueries,
                                         params.first_head, params.head_count);
    const int kv_head = kv_head_of(params, tile.head);
    smem.queries = tile;
    smem.k_gmem = head_gmem<const T>(params.k, tile.batch, kv_head);
    smem.v_gmem = head_gmem<const T>(params.v, tile.batch, kv_head);
  }
  __syncthreads();
  const QueryTile& queries = smem.queries;
  if (queries.rows == 0) return;

  const auto load_queries = [&](auto& tile_smem, const TensorView& tensor, int head_dim) {
    load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, queries.batch, queries.head),
                        tensor.row_stride, branch.queries, queries.group, queries.first_row,
                        queries.first_row + queries.rows, head_dim);
  };
  const auto load_keys = [&](const KeyTile& tile, int stage) {
    const SequenceView& view = branch.segments[tile.segment].keys;
    load_tile<kThreads>(smem.k[stage], smem.k_gmem, params.k.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim);
    load_tile<kThreads>(smem.v[stage], smem.v_gmem, params.v.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim_v);
  };

  load_queries(smem.q, params.q, params.head_dim);
  find_attended<kThreads>(smem.attended, branch, queries);
  __syncthreads();
  // Thread 0 finds the key tiles, two ahead.
  if (threadIdx.x == 0) {
    smem.walk = KeyTiles::of(branch, queries, queries.head, queries.head + 1);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) smem.tiles[i] = next_tile(smem, branch, queries);
  }
  __syncthreads();
  if (smem.tiles[0].exists) load_keys(smem.tiles[0], 0);
  ptx::cp_async_commit();

  const int own_row = warp_row<Config::kTileQueries, Config::kWarpQueries>();
  typename Config::Output out;
  out.clear();
  OnlineSoftmax<kLaneRows> softmax;
  for (int step = 0; smem.tiles[step % 4].exists; ++step) {
    const KeyTile& tile = smem.tiles[step % 4];
    const KeyTile& next = smem.tiles[(step + 1) % 4];
    const int stage = step % 2;
    if (next.exists) load_keys(next, stage ^ 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (threadIdx.x == 0) smem.tiles[(step + 2) % 4] = next_tile(smem, branch, queries);

    float scale_log2 = params.scale * kLog2E;
#pragma unroll 1
    for (int i = 0; tile.first_row + i < tile.end_row; i += Config::kScoreColumns) {
      KeyTile part = tile;
      part.first_row += i;
      typename Config::Scores scores;
      multiply_transposed<T>(scores, smem.q, smem.k[stage], i);
      if (params.scale <= 0.f) {  // the greatest score has not the greatest product
        scores.for_each([&](float& score, int, int) { score *= params.scale * kLog2E; });
        scale_log2 = 1.f;
      }
      fill_others(scores, smem.attended[part.segment] + own_row, part, minus_infinity());
      if (tile.mixed)
        fill_other_blocks<Config::kTileQueries>(scores, branch, queries, part, minus_infinity());
      float shrink[kLaneRows];
      softmax.update(scores, scale_log2, shrink);
      out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
      multiply_add<T>(out, scores, smem.v[stage], i);
    }
    __syncthreads();  // the next copy overwrites this stage
  }

  // The output takes the place of the queries.
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (params.merge) {
    load_queries(smem.out, params.out, params.head_dim_v);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  float* lse_gmem =
      params.lse +
      (static_cast<int64_t>(queries.batch) * params.heads + queries.head) * params.seq_q;
  float* row_lse_gmem[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = own_row + Config::Output::row(i);
    const int token = branch.queries.position(queries.group, queries.first_row + row);
    row_lse_gmem[i] = row < queries.rows ? lse_gmem + token : nullptr;
  }
  finish_rows<T>(out, smem.out, softmax, row_lse_gmem, params.merge);
  __syncthreads();
  store_tile<kThreads>(smem.out, head_gmem<T>(params.out, queries.batch, queries.head),
                       params.out.row_stride, branch.queries, queries, params.head_dim_v);
}

}  // namespace sparse_attn::sm80::forward
