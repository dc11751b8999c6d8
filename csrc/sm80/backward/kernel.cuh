// SPDX-License-Identifier: Apache-2.0
// The portable backward kernels: one branch of a plan, one CTA per tile of rows, mostly 64, whose
// gradient it owns.
//
// Two owners, one kernel: a CTA that owns queries streams the keys they attend and sums dq; one
// that owns keys streams the queries that attend them, over all heads of their group, and sums dk
// and dv. Each computes the weights again. No atomics: a gradient is summed by one CTA in one
// order. README.md in this folder has the formulas and the counts.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "sm80/backward/config.h"
#include "sm80/multiply.cuh"
#include "sm80/walk.cuh"

namespace sparse_attn::sm80::backward {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kLeastCtas)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using T = typename Config::Element;
  constexpr int kThreads = Config::kThreads;
  static_assert(Config::kStages == 2);
  constexpr int kLaneRows = Config::Gradient::kLaneRows;
  constexpr bool kOwnsQueries = Config::kOwnsQueries;
  __builtin_assume(threadIdx.x < kThreads);
  extern __shared__ char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);

  // Which rows, and the query heads that go with them.
  const Branch& branch = params.branch;
  if (threadIdx.x == 0) {
    const int together = params.heads_together;
    smem.rows =
        QueryTile::of(blockIdx.x, branch, Config::kTileOwn, 0, params.head_count / together);
    smem.rows.head = params.first_head + smem.rows.head * together;
    smem.kv_head = kv_head_of(params, smem.rows.head);
  }
  __syncthreads();
  const QueryTile& own = smem.rows;
  if (own.rows == 0) return;

  const auto load_own = [&](auto& tile_smem, const TensorView& tensor, int head, int head_dim) {
    load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, own.batch, head), tensor.row_stride,
                        branch.queries, own.group, own.first_row, own.first_row + own.rows,
                        head_dim);
  };
  const auto load_stats = [&](auto& stats_smem, int head, const SequenceView& view, int first_row,
                              int rows) {
    const RowStats* stats_gmem =
        params.stats + (static_cast<int64_t>(own.batch) * params.heads + head) * params.seq_q;
    for (int row = threadIdx.x; row < Config::kStatsRows; row += kThreads) {
      const int token = row < rows ? view.position(own.group, first_row + row) : 0;
      ptx::cp_async_8(&stats_smem[row], stats_gmem + token, row < rows);
    }
  };
  const auto load_streamed = [&](const KeyTile& tile, int stage) {
    const SequenceView& view = branch.segments[tile.segment].keys;
    const int head = kOwnsQueries ? smem.kv_head : tile.head;
    const auto load = [&](auto& tile_smem, const TensorView& tensor, int head_dim) {
      load_tile<kThreads>(tile_smem, head_gmem<const T>(tensor, own.batch, head), tensor.row_stride,
                          view, own.group, tile.first_row, tile.end_row, head_dim);
    };
    load(smem.streamed[stage], kOwnsQueries ? params.k : params.q, params.head_dim);
    load(smem.streamed_v[stage], kOwnsQueries ? params.v : params.dout, params.head_dim_v);
    if constexpr (!kOwnsQueries) {
      load_stats(smem.stats[stage], head, view, tile.first_row, tile.end_row - tile.first_row);
    }
  };

  const int own_head = kOwnsQueries ? own.head : smem.kv_head;
  load_own(smem.own, kOwnsQueries ? params.q : params.k, own_head, params.head_dim);
  load_own(smem.own_v, kOwnsQueries ? params.dout : params.v, own_head, params.head_dim_v);
  if constexpr (kOwnsQueries) {
    load_stats(smem.stats[0], own_head, branch.queries, own.first_row, own.rows);
  }
  find_attended<kThreads>(smem.attended, branch, own);
  __syncthreads();
  // Thread 0 finds the streamed tiles, two ahead.
  if (threadIdx.x == 0) {
    smem.walk = KeyTiles::of(branch, own, own.head, own.head + params.heads_together);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) smem.tiles[i] = next_tile(smem, branch, own);
  }
  __syncthreads();
  if (smem.tiles[0].exists) load_streamed(smem.tiles[0], 0);
  ptx::cp_async_commit();

  const int own_row = warp_row<Config::kTileOwn, Config::kWarpRows>();
  // The statistics of the query of a pair.
  const auto stats = [&](int stage, int row, int column) -> const RowStats& {
    return kOwnsQueries ? smem.stats[0][own_row + Config::Scores::row(row)]
                        : smem.stats[stage][column];
  };
  typename Config::Gradient gradient;     // dq or dk, over scale
  typename Config::GradientV gradient_v;  // dv
  gradient.clear();
  gradient_v.clear();
  for (int step = 0; smem.tiles[step % 4].exists; ++step) {
    const KeyTile& tile = smem.tiles[step % 4];
    const KeyTile& next = smem.tiles[(step + 1) % 4];
    const int stage = step % 2;
    if (next.exists) load_streamed(next, stage ^ 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (threadIdx.x == 0) smem.tiles[(step + 2) % 4] = next_tile(smem, branch, own);

#pragma unroll 1
    for (int i = 0; tile.first_row + i < tile.end_row; i += Config::kScoreColumns) {
      KeyTile part = tile;
      part.first_row += i;
      typename Config::Scores weights, dscores;
      multiply_transposed<T, Config::kStepsAtOnce>(weights, smem.own, smem.streamed[stage], i);
      weights.for_each([&](float& weight, int row, int column) {
        weight =
            ptx::exp2(weight * (params.scale * kLog2E) - stats(stage, row, i + column).lse_log2);
      });
      fill_others(weights, smem.attended[part.segment] + own_row, part, 0.f);
      if (tile.mixed) fill_other_blocks<Config::kTileOwn>(weights, branch, own, part, 0.f);
      if constexpr (Config::kSumsDv) {
        multiply_add<T>(gradient_v, weights, smem.streamed_v[stage], i);
      }
      if constexpr (Config::kSumsDqOrDk) {
        multiply_transposed<T, Config::kStepsAtOnce>(dscores, smem.own_v, smem.streamed_v[stage],
                                                     i);
        dscores.for_each(weights, [&](float& dscore, float weight, int row, int column) {
          dscore = weight * (dscore - stats(stage, row, i + column).delta);
        });
        // A key that no query attends may be NaN, and 0 * NaN is NaN.
        if (tile.mixed) fill_other_blocks<Config::kTileOwn>(dscores, branch, own, part, 0.f);
        multiply_add<T>(gradient, dscores, smem.streamed[stage], i);
      }
    }
    __syncthreads();  // the next copy overwrites this stage
  }

  // The gradients take the place of the own rows.
  ptx::cp_async_wait<0>();
  __syncthreads();
  const auto finish = [&](auto& own_smem, const auto& sum, const TensorView& target, int head_dim,
                          float factor) {
    const int target_head = own.head / params.heads_together;
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
