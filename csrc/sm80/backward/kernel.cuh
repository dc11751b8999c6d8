// SPDX-License-Identifier: Apache-2.0
// The portable backward kernels: one branch of a plan, one CTA per tile of 64 rows whose gradient
// it owns.
//
// Two owners, one kernel: a CTA that owns queries streams the keys they attend and sums dq; one
// that owns keys streams the queries that attend them, over all heads of their group, and sums dk
// and dv. Each computes the weights again. No atomics: a gradient is summed by one CTA in one
// order. README.md in this folder has the formulas and the counts.
#pragma once

#include "attention/softmax.cuh"
#include "sm80/backward/config.h"
#include "sm80/tile_ops.cuh"

namespace sparse_attn::sm80::backward {

// The statistics of the query of each pair: of this lane's own rows, or of the streamed rows.
template <bool kOwnsQueries, int kLaneRows>
struct QueryStats {
  const RowStats (&own)[kLaneRows];
  const RowStats* streamed_smem;

  __device__ __forceinline__ const RowStats& of(int row, int column) const {
    return kOwnsQueries ? own[row] : streamed_smem[column];
  }
};

template <class T, int kHeadDim, int kHeadDimV, Sums kSums>
__global__ void __launch_bounds__(Config<T, kHeadDim, kHeadDimV, kSums>::kThreads,
                                  Config<T, kHeadDim, kHeadDimV, kSums>::kLeastCtas)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Config = Config<T, kHeadDim, kHeadDimV, kSums>;
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  constexpr int kLaneRows = Config::Gradient::kLaneRows;
  constexpr bool kOwnsQueries = Config::kOwnsQueries;
  extern __shared__ char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);

  // Which rows, and the query heads that go with them: one, or the group of a kv head.
  const Branch& branch = params.branch;
  const int group_heads = params.heads / params.kv_heads;
  const int owned_heads = kOwnsQueries ? params.head_count : params.head_count / group_heads;
  const QueryTile own = QueryTile::of(blockIdx.x, branch.queries, Config::kTileOwn, owned_heads);
  if (own.rows == 0) return;
  const int first_head = params.first_head + (kOwnsQueries ? own.head : own.head * group_heads);
  const int end_head = first_head + (kOwnsQueries ? 1 : group_heads);
  const int kv_head = first_head / group_heads;
  const auto stats_gmem = [&](int head) {
    return params.stats + (static_cast<int64_t>(own.batch) * params.heads + head) * params.seq_q;
  };

  const auto load_own = [&](auto& tile_smem, const TensorView& tensor, int head, int head_dim) {
    load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, own.batch, head), tensor.row_stride,
                        branch.queries, own.group, own.first_row, own.first_row + own.rows,
                        head_dim);
  };
  const auto load_streamed = [&](int head, const KeyTile& tile, int stage) {
    const SequenceView& view = branch.segments[tile.segment].keys;
    const auto load = [&](auto& tile_smem, const TensorView& tensor, int head, int head_dim) {
      load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, own.batch, head), tensor.row_stride,
                          view, own.group, tile.first_row, tile.end_row, head_dim);
    };
    load(smem.streamed[stage], kOwnsQueries ? params.k : params.q, kOwnsQueries ? kv_head : head,
         params.head_dim);
    load(smem.streamed_v[stage], kOwnsQueries ? params.v : params.dout,
         kOwnsQueries ? kv_head : head, params.head_dim_v);
    if constexpr (!kOwnsQueries) {
      for (int row = threadIdx.x; row < Config::kTileStreamed; row += kThreads) {
        const bool exists = tile.first_row + row < tile.end_row;
        const int token = exists ? view.position(own.group, tile.first_row + row) : 0;
        ptx::cp_async_8(&smem.stats[stage][row], stats_gmem(head) + token, exists);
      }
    }
  };

  // Token of this lane's rows; the last row stands in for rows that do not exist.
  const auto token = [&](int i) {
    const int row = warp_index() * Config::kWarpRows + Config::Gradient::row(i);
    return branch.queries.position(own.group, own.first_row + least(row, own.rows - 1));
  };
  RowStats own_stats[kLaneRows] = {};
  if constexpr (kOwnsQueries) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) own_stats[i] = stats_gmem(first_head)[token(i)];
  }

  KeyTiles tiles(branch, own, Config::kTileStreamed);
  KeyTile tile = tiles.first();
  int head = first_head;
  load_own(smem.own, kOwnsQueries ? params.q : params.k, kOwnsQueries ? head : kv_head,
           params.head_dim);
  load_own(smem.own_v, kOwnsQueries ? params.dout : params.v, kOwnsQueries ? head : kv_head,
           params.head_dim_v);
  if (tiles.valid(tile)) load_streamed(head, tile, 0);
  ptx::cp_async_commit();

  typename Config::Gradient gradient;     // dq or dk, over scale
  typename Config::GradientV gradient_v;  // dv
  gradient.clear();
  gradient_v.clear();
  Attended<kLaneRows> attended;
  for (int stage = 0; tiles.valid(tile); stage = (stage + 1) % kStages) {
    // The tiles of a head, then those of the next one.
    KeyTile next = tiles.next(tile);
    int next_head = head;
    if (!tiles.valid(next) && ++next_head < end_head) next = tiles.first();
    if (tiles.valid(next)) load_streamed(next_head, next, (stage + 1) % kStages);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();

    const QueryStats<kOwnsQueries, kLaneRows> stats{own_stats, smem.stats[stage]};
    typename Config::Scores weights, dscores;
    multiply_transposed<T>(weights, smem.own, smem.streamed[stage]);
    weights.for_each([&](float& weight, int row, int column) {
      weight = ptx::exp2(weight * (params.scale * kLog2E) - stats.of(row, column).lse_log2);
    });
    if (tile.masked) {
      attended.update(branch, tile.segment, own.group, token);
      attended.fill_others(weights, tile.first_row, 0.f);
    }
    if constexpr (Config::kSumsDv) multiply_add<T>(gradient_v, weights, smem.streamed_v[stage]);
    if constexpr (Config::kSumsDqOrDk) {
      multiply_transposed<T>(dscores, smem.own_v, smem.streamed_v[stage]);
      dscores.for_each(weights, [&](float& dscore, float weight, int row, int column) {
        dscore = weight * (dscore - stats.of(row, column).delta);
      });
      multiply_add<T>(gradient, dscores, smem.streamed[stage]);
    }
    __syncthreads();  // the next copy overwrites this stage
    tile = next;
    head = next_head;
  }

  // The gradients take the place of the own rows.
  ptx::cp_async_wait<0>();
  __syncthreads();
  const auto finish = [&](auto& own_smem, const auto& sum, const TensorView& target, int head_dim,
                          float factor) {
    const int target_head = kOwnsQueries ? first_head : kv_head;
    if (params.accumulate) {
      load_own(own_smem, target, target_head, head_dim);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    float factors[kLaneRows], ones[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) factors[i] = factor, ones[i] = 1.f;
    write_rows<T>(own_smem, sum, factors, ones, params.accumulate);
    __syncthreads();
    store_tile<kThreads>(own_smem, head_gmem<T>(target, own.batch, target_head), target.row_stride,
                         branch.queries, own, head_dim);
  };
  if constexpr (Config::kSumsDqOrDk) {
    finish(smem.own, gradient, kOwnsQueries ? params.dq : params.dk, params.head_dim, params.scale);
  }
  if constexpr (Config::kSumsDv) finish(smem.own_v, gradient_v, params.dv, params.head_dim_v, 1.f);
}

}  // namespace sparse_attn::sm80::backward
