// SPDX-License-Identifier: Apache-2.0
// The portable forward kernel: one branch of a plan, one CTA per tile of 64 queries.
//
// A warp owns 16 queries and holds their running softmax and output in registers. Key and value
// tiles stream through two stages of shared memory by cp.async. README.md in this folder has the
// schedule and the counts.
#pragma once

#include "attention/softmax.cuh"
#include "sm80/forward/config.h"
#include "sm80/tile_ops.cuh"

namespace sparse_attn::sm80::forward {

// Divides by the softmax sum and merges with the earlier branches, whose output is in out_smem.
// Leaves the output there and the lse in global memory (null for a row that does not exist).
template <class T, class Output, class OutputTile, int kLaneRows>
__device__ __forceinline__ void finish_rows(const Output& out, OutputTile& out_smem,
                                            const OnlineSoftmax<kLaneRows>& softmax,
                                            float* const (&lse_gmem)[kLaneRows], bool merge) {
  float share[kLaneRows], earlier_share[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float sum = quad_sum(softmax.row_sum[i]);
    // A query with no key: sum 0, output 0, lse -inf.
    float lse = sum == 0.f ? minus_infinity() : (softmax.row_max[i] + log2f(sum)) * kLn2;
    share[i] = sum == 0.f ? 0.f : 1.f / sum;
    earlier_share[i] = 0.f;
    if (merge && lse_gmem[i] != nullptr) {
      const float earlier = *lse_gmem[i];
      const float top = finite(fmaxf(lse, earlier));
      const float own_weight = exp2f((lse - top) * kLog2E);
      const float earlier_weight = exp2f((earlier - top) * kLog2E);
      const float total = own_weight + earlier_weight;
      lse = total == 0.f ? minus_infinity() : top + log2f(total) * kLn2;
      share[i] *= total == 0.f ? 0.f : own_weight / total;
      earlier_share[i] = total == 0.f ? 0.f : earlier_weight / total;
    }
    __syncwarp();  // four lanes read the earlier lse of a row, then one writes the new one
    if (lane_index() % 4 == 0 && lse_gmem[i] != nullptr) *lse_gmem[i] = lse;
  }
  write_rows<T>(out_smem, out, share, earlier_share, merge);
}

template <class T, int kHeadDim, int kHeadDimV>
__global__ void __launch_bounds__(Config<T, kHeadDim, kHeadDimV>::kThreads,
                                  Config<T, kHeadDim, kHeadDimV>::kLeastCtas)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using Config = Config<T, kHeadDim, kHeadDimV>;
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  constexpr int kLaneRows = Config::Output::kLaneRows;
  extern __shared__ char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);

  // Which queries, and where they and their keys lie.
  const Branch& branch = params.branch;
  const QueryTile queries =
      QueryTile::of(blockIdx.x, branch.queries, Config::kTileQueries, params.head_count);
  if (queries.rows == 0) return;
  const int head = params.first_head + queries.head;
  const int kv_head = head / (params.heads / params.kv_heads);
  const T* k_gmem = head_gmem<const T>(params.k, queries.batch, kv_head);
  const T* v_gmem = head_gmem<const T>(params.v, queries.batch, kv_head);
  float* lse_gmem =
      params.lse + (static_cast<int64_t>(queries.batch) * params.heads + head) * params.seq_q;

  const auto load_queries = [&](auto& tile_smem, const TensorView& tensor, int head_dim) {
    load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, queries.batch, head),
                        tensor.row_stride, branch.queries, queries.group, queries.first_row,
                        queries.first_row + queries.rows, head_dim);
  };
  const auto load_keys = [&](const KeyTile& tile, int stage) {
    const SequenceView& view = branch.segments[tile.segment].keys;
    load_tile<kThreads>(smem.k[stage], k_gmem, params.k.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim);
    load_tile<kThreads>(smem.v[stage], v_gmem, params.v.row_stride, view, queries.group,
                        tile.first_row, tile.end_row, params.head_dim_v);
  };

  KeyTiles key_tiles(branch, queries, Config::kTileKeys);
  KeyTile tile = key_tiles.first();
  load_queries(smem.q, params.q, params.head_dim);
  if (key_tiles.valid(tile)) load_keys(tile, 0);
  ptx::cp_async_commit();

  // Token of this lane's queries; the last query stands in for rows that do not exist.
  const auto own_row = [&](int i) {
    return warp_index() * Config::kWarpQueries + Config::Output::row(i);
  };
  const auto token = [&](int i) {
    const int row = queries.first_row + least(own_row(i), queries.rows - 1);
    return branch.queries.position(queries.group, row);
  };

  typename Config::Output out;
  out.clear();
  OnlineSoftmax<kLaneRows> softmax;
  Attended<kLaneRows> attended;
  for (int stage = 0; key_tiles.valid(tile); stage = (stage + 1) % kStages) {
    const KeyTile next = key_tiles.next(tile);
    if (key_tiles.valid(next)) load_keys(next, (stage + 1) % kStages);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();

    typename Config::Scores scores;
    multiply_transposed<T>(scores, smem.q, smem.k[stage]);
    float scale_log2 = params.scale * kLog2E;
    if (scale_log2 <= 0.f) {  // the greatest score has not the greatest product
      scores.for_each([&](float& score, int, int) { score *= scale_log2; });
      scale_log2 = 1.f;
    }
    if (tile.masked) {
      attended.update(branch, tile.segment, queries.group, token);
      attended.fill_others(scores, tile.first_row, minus_infinity());
    }
    float shrink[kLaneRows];
    softmax.update(scores, scale_log2, shrink);
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
    multiply_add<T>(out, scores, smem.v[stage]);
    __syncthreads();  // the next copy overwrites this stage
    tile = next;
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
  float* row_lse_gmem[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    row_lse_gmem[i] = own_row(i) < queries.rows ? lse_gmem + token(i) : nullptr;
  }
  finish_rows<T>(out, smem.out, softmax, row_lse_gmem, params.merge);
  __syncthreads();
  store_tile<kThreads>(smem.out, head_gmem<T>(params.out, queries.batch, head),
                       params.out.row_stride, branch.queries, queries, params.head_dim_v);
}

}  // namespace sparse_attn::sm80::forward
