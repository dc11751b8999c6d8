// SPDX-License-Identifier: Apache-2.0
// The Hopper backward kernel of bands: one branch whose queries attend keys of their own tile of
// 128 rows and of the one before, at most. All gradients at once, every tensor read once.
//
// A CTA takes tiles one after another: those of groups that fit one, or a run of neighbours. One
// warp loads; two warpgroups own 64 keys of a tile each, sum dk and dv in registers and share dq.
// README.md in this folder has the schedule and the counts.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/registers.cuh"
#include "sm90/backward_band/config.h"
#include "sm90/backward_band/store_sum.cuh"
#include "sm90/load_rows.cuh"
#include "sm90/multiply.cuh"
#include "sm90/query_tiles.h"

namespace sparse_attn::sm90::backward_band {

struct Maps {
  ViewMap q, k, v, dout;
};

__device__ __forceinline__ int kv_head_of(const BackwardParams& params, int head) {
  return head / (params.heads / params.kv_heads);
}

__device__ __forceinline__ QueryTile tile_before(const QueryTile& tile) {
  return {tile.batch, tile.head, tile.group, tile.first_row - kTileRows, kTileRows};
}

// The tiles of a CTA: every so-many-th, or neighbours where queries attend the tile before.
struct Share {
  int index, end, step;

  __device__ __forceinline__ explicit Share(const QueryTiles& tiles) {
    const auto cut = [&](int cta) {
      return static_cast<int>(static_cast<int64_t>(tiles.count) * cta / gridDim.x);
    };
    if (tiles.tiles.value > 1) {
      index = cut(blockIdx.x), end = cut(blockIdx.x + 1), step = 1;
    } else {
      index = blockIdx.x, end = tiles.count, step = gridDim.x;
    }
  }
};

// The warp that loads.
template <class Config, class SharedMemory>
__device__ __forceinline__ void load(SharedMemory& smem, const BackwardParams& params,
                                     const QueryTiles& tiles, const Maps& maps) {
  using T = typename Config::Element;
  const Branch& branch = params.branch;
  const SequenceView& view = branch.queries;
  const bool walks = tiles.tiles.value > 1;
  Place<Config::kKeyStages> k_place, v_place;
  Place<Config::kQueryStages> query_place;
  Place<Config::kStepStages> step_place;

  const auto publish = [&](const Step& step) {
    step_place.wait_empty(smem.step_ring);
    if (threadIdx.x == 0) {
      smem.step[step_place.stage] = step;
      ptx::mbarrier_arrive(smem.step_ring.full[step_place.stage]);
    }
    step_place.advance();
  };
  // 64 rows of a tile.
  const auto load_part = [&](auto& part_smem, uint64_t& full, const ViewMap& map,
                             const TensorView& tensor, int head_dim, int head,
                             const QueryTile& part) {
    Rows<T>(map, view, tensor, head_dim, part.batch, head)
        .template load<32>(part_smem, full, part.group, part.first_row,
                           part.first_row + part.rows);
  };
  const auto load_keys = [&](auto& parts_smem, uint64_t& full, const ViewMap& map,
                             const TensorView& tensor, int head_dim, const QueryTile& tile) {
#pragma unroll 1
    for (int number = 0; number < kParts; ++number) {
      const QueryTile part = part_of(tile, number);
      if (part.rows == 0) break;
      load_part(parts_smem[number], full, map, tensor, head_dim, kv_head_of(params, tile.head),
                part);
    }
    ptx::cp_async_arrive(full);
  };
  const auto load_k = [&](const QueryTile& tile) {
    k_place.wait_empty(smem.k_ring);
    uint64_t& full = smem.k_ring.full[k_place.stage];
    Band& band = smem.band[k_place.stage];
#pragma unroll 1
    for (int row = threadIdx.x; row < kTileRows; row += 32) {
      const int token = view.position(tile.group, tile.first_row + row);
      Interval queries = {tile.first_row, tile.first_row};
      if (row < tile.rows) queries = branch.segments[0].bounds(branch.run, tile.group, token);
      band.first[row] = static_cast<int16_t>(queries.first - tile.first_row);
      band.end[row] = static_cast<int16_t>(queries.end - tile.first_row);
    }
    band.rows = tile.rows;
    ptx::mbarrier_arrive(full);
    load_keys(smem.k[k_place.stage], full, maps.k, params.k, params.head_dim, tile);
    k_place.advance();
  };
  const auto load_v = [&](const QueryTile& tile) {
    v_place.wait_empty(smem.v_ring);
    load_keys(smem.v[v_place.stage], smem.v_ring.full[v_place.stage], maps.v, params.v,
              params.head_dim_v, tile);
    v_place.advance();
  };
  const auto load_queries = [&](const QueryTile& tile) {
    const RowStats* stats_gmem =
        params.stats + (static_cast<int64_t>(tile.batch) * params.heads + tile.head) * params.seq_q;
#pragma unroll 1
    for (int number = 0; number < kParts; ++number) {
      const QueryTile part = part_of(tile, number);
      if (part.rows == 0) break;
      query_place.wait_empty(smem.query_ring);
      const int stage = query_place.stage;
      uint64_t& full = smem.query_ring.full[stage];
      load_part(smem.q[stage], full, maps.q, params.q, params.head_dim, tile.head, part);
      load_part(smem.dout[stage], full, maps.dout, params.dout, params.head_dim_v, tile.head, part);
#pragma unroll 1
      for (int row = threadIdx.x; row < kWarpgroupRows; row += 32) {
        const RowStats* row_gmem = stats_gmem + view.position(part.group, part.first_row + row);
        ptx::cp_async_4(&smem.stats[stage].lse_log2[row], &row_gmem->lse_log2, row < part.rows);
        ptx::cp_async_4(&smem.stats[stage].delta[row], &row_gmem->delta, row < part.rows);
      }
      ptx::cp_async_arrive(full);
      query_place.advance();
    }
  };
  const auto parts = [](const QueryTile& tile) { return tile.rows > kWarpgroupRows ? 2 : 1; };

  Share share(tiles);
  bool first = true;
#pragma unroll 1
  for (int index = share.index; index < share.end; index += share.step) {
    const QueryTile tile = tiles.at(index, view);
    if (tile.rows == 0) continue;
    const bool back = tile.first_row > 0;
    const bool more = walks && tile.first_row + kTileRows < view.max_rows;
    publish({tile, parts(tile), back, back && first, true, more});
    if (back && first) {
      load_v(tile_before(tile));
      load_k(tile_before(tile));
    }
    first = false;
    // In the order in which the stages of few are let go.
    load_v(tile);
    if (!walks) load_k(tile);
    load_queries(tile);
    if (walks) load_k(tile);
    if (more && index + 1 == share.end) {  // the keys need the queries of the next CTA
      const QueryTile next = tiles.at(index + 1, view);
      publish({next, parts(next), true, false, false, false});
      load_queries(next);
    }
  }
  publish({});
}

// Where the gradients of scores of a part of queries and a part of keys are: those of the tile
// before are 0 and 1, its own 2 and 3. Queries attend at most three of these, and the first part of
// keys only with the first part of queries, or all four are not there.
__device__ __forceinline__ int slot_of(int part, int keys) {
  return part == 0 ? keys : (keys + 2) % 4;
}

// Keeps registers that a wgmma reads from being reused before this point.
template <class T, class Tile>
__device__ __forceinline__ void keep(Rounded<T, Tile>& rounded) {
#pragma unroll
  for (auto& fragment : rounded.at) {
#pragma unroll
    for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair)::"memory");
  }
}

// A warpgroup that computes the `number`-th 64 keys of every tile.
template <class Config, class SharedMemory>
__device__ __forceinline__ void compute(SharedMemory& smem, const BackwardParams& params,
                                        int number) {
  using T = typename Config::Element;
  using Scores = typename Config::Scores;
  constexpr int kLaneRows = Scores::kLaneRows;
  const Branch& branch = params.branch;
  const float scale_log2 = params.scale * kLog2E;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // of a part
  Place<Config::kKeyStages> back_place, own_place;
  Place<Config::kQueryStages> query_place;
  Place<Config::kStepStages> step_place;
  Place<1> dscores_place;  // filled for every part of queries
  typename Config::GradientK gradient_k;  // over scale
  typename Config::GradientV gradient_v;

  // Whether queries [first, first + 64), counted from the first key of a tile, attend a part of it.
  const auto attended = [&](const Band& band, int part, int first) {
    const int first_key = part * kWarpgroupRows;
    const int keys = least(band.rows - first_key, kWarpgroupRows);
    return keys > 0 && band.first[first_key] < first + kWarpgroupRows &&
           band.end[first_key + keys - 1] > first;
  };
  // Sums this warpgroup's keys over one part of queries.
  const auto sum_part = [&](int key_stage, int query_stage, int first, int slot) {
    const Stats& stats = smem.stats[query_stage];
    Scores weights, dscores;
    ptx::fence_async_proxy();  // between cp.async and wgmma
    ptx::wgmma_fence();
    start_multiply_transposed<T>(weights, smem.k[key_stage][number], smem.q[query_stage]);
    start_multiply_transposed<T>(dscores, smem.v[key_stage][number], smem.dout[query_stage]);
    ptx::wgmma_wait<1>();
    ptx::pin(weights);
    weights.for_each([&](float& weight, int, int column) {
      weight = ptx::exp2(weight * scale_log2 - stats.lse_log2[column]);
    });
    const Band& band = smem.band[key_stage];
    const int first_key = number * kWarpgroupRows;
    const int keys = band.rows - first_key;
    if (first < band.first[first_key + least(keys, kWarpgroupRows) - 1] ||
        first + kWarpgroupRows > band.end[first_key] || keys < kWarpgroupRows) {
      int from[kLaneRows], to[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        const int key = first_key + warp_row + Scores::row(i);
        from[i] = band.first[key] - first, to[i] = band.end[key] - first;
      }
      weights.for_each([&](float& weight, int row, int column) {
        if (column < from[row] || column >= to[row]) weight = 0.f;
      });
    }
    ptx::wgmma_wait<0>();
    ptx::pin(dscores);
    dscores.for_each(weights, [&](float& dscore, float weight, int, int column) {
      dscore = weight * (dscore - stats.delta[column]);
    });
    Rounded<T, Scores> rounded_weights(weights), rounded_dscores(dscores);
    dscores_place.wait_empty(smem.dscores_ring);
    auto& dscores_smem = smem.dscores[slot];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpgroupRows / 16; ++i) {
      ptx::stmatrix_x4(dscores_smem.at(warp_row + lane % 16, 2 * i + lane / 16),
                       rounded_dscores.at[i]);
    }
    ptx::fence_async_proxy();  // between these stores and wgmma
    ptx::wgmma_fence();
    start_multiply_add<T>(gradient_v, rounded_weights, smem.dout[query_stage]);
    start_multiply_add<T>(gradient_k, rounded_dscores, smem.q[query_stage]);
    ptx::wgmma_wait<0>();
    ptx::pin(gradient_v);
    ptx::pin(gradient_k);
    keep(rounded_weights);
    keep(rounded_dscores);
  };

  while (true) {
    step_place.wait_full(smem.step_ring);
    const Step& step = smem.step[step_place.stage];  // read when needed: registers are scarce
    if (step.tile.rows == 0) break;
    if (step.loads_back) {
      back_place = own_place;
      own_place.advance();
    }
    auto first_query_place = query_place;
#pragma unroll 1
    for (int own = step.back ? 0 : 1; own < (step.own ? 2 : 1); ++own) {
      const bool last = own == (step.own ? 1 : 0);
      const auto key_place = own ? own_place : back_place;
      key_place.wait_full(smem.k_ring);
      key_place.wait_full(smem.v_ring);
      if (own || step.loads_back) {
        gradient_k.clear();
        gradient_v.clear();
      }
      query_place = first_query_place;
#pragma unroll 1
      for (int part = 0; part < step.parts; ++part) {
        query_place.wait_full(smem.query_ring);
        const int first = (own ? 0 : kTileRows) + part * kWarpgroupRows;
        if (attended(smem.band[key_place.stage], number, first)) {
          sum_part(key_place.stage, query_place.stage, first, slot_of(part, 2 * own + number));
        }
        if (last) query_place.arrive_empty(smem.query_ring);
        query_place.advance();
        if (!own) continue;

        // dq: some columns of the sum over all keys.
        constexpr int kColumns = Config::GradientQ::kColumns;
        typename Config::GradientQ gradient_q;
        gradient_q.clear();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem.dscores_ring.full[0]);
        dscores_place.wait_full(smem.dscores_ring);
#pragma unroll 1
        for (int keys = step.back ? 0 : 2; keys < 4; ++keys) {
          const int stage = keys < 2 ? back_place.stage : own_place.stage;
          const int first = (keys < 2 ? kTileRows : 0) + part * kWarpgroupRows;
          if (!attended(smem.band[stage], keys % 2, first)) continue;
          ptx::wgmma_fence();
          start_multiply_add_across<T>(gradient_q, smem.dscores[slot_of(part, keys)],
                                       smem.k[stage][keys % 2], number * kColumns);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::pin(gradient_q);
        }
        dscores_place.arrive_empty(smem.dscores_ring);
        dscores_place.advance();
        store_sum<T>(gradient_q, params.scale, params.dq, branch.queries, step.tile,
                     step.tile.head, part * kWarpgroupRows + warp_row, number * kColumns,
                     params.head_dim, params.accumulate);
      }
      if (!own || !step.keeps_own) key_place.arrive_empty(smem.v_ring);
      if (last && step.back) back_place.arrive_empty(smem.k_ring);
      if (own && !step.keeps_own) own_place.arrive_empty(smem.k_ring);
      if (own ? !step.keeps_own : !step.loads_back) {
        const QueryTile tile = own ? step.tile : tile_before(step.tile);
        const int row = number * kWarpgroupRows + warp_row;
        store_sum<T>(gradient_k, params.scale, params.dk, branch.queries, tile, tile.head, row, 0,
                     params.head_dim, params.accumulate);
        store_sum<T>(gradient_v, 1.f, params.dv, branch.queries, tile, tile.head, row, 0,
                     params.head_dim_v, params.accumulate);
      }
    }
    if (step.own) {
      back_place = own_place;
      own_place.advance();
    }
    step_place.arrive_empty(smem.step_ring);
    step_place.advance();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_band_kernel(const __grid_constant__ BackwardParams params,
                         const __grid_constant__ QueryTiles tiles,
                         const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * kConsumers;
    smem.k_ring.init(2 * 32, kWarps);  // of each lane: its copies, its bands
    smem.v_ring.init(32, kWarps);
    smem.query_ring.init(32, kWarps);
    smem.step_ring.init(1, kWarps);
    smem.dscores_ring.init(kWarps, kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    if (threadIdx.x < 32) load<Config>(smem, params, tiles, maps);
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    compute<Config>(smem, params, warpgroup - 1);
  }
}

}  // namespace sparse_attn::sm90::backward_band
