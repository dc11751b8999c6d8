// SPDX-License-Identifier: Apache-2.0
// The Hopper backward kernels: one branch of a plan; CTAs that stay and take one tile of own rows
// after another.
//
// Two owners, one kernel, as in sm80/backward: a CTA that owns queries streams the keys they attend
// and sums dq; one that owns keys streams the queries that attend them, over all heads of their
// group, and sums dk and dv. No atomics: a gradient is summed by one warpgroup in one order.
//
// One warpgroup loads: the next own rows while these are computed, streamed tiles into a ring. The
// others compute 64 own rows each with wgmma. README.md in this folder has the formulas, the
// schedule and the counts.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "ptx/registers.cuh"
#include "sm90/backward/config.h"
#include "sm90/load_rows.cuh"
#include "sm90/multiply.cuh"
#include "sm90/tickets.cuh"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::backward {

enum Barrier { kLoadBarrier = 1, kComputeBarrier };  // 0 is __syncthreads

// The streamed tiles of a tile of own rows, over the heads summed together.
template <class Config>
struct Walk {
  KeyWalk<Config::kTileStreamed, Config::kTileOwn> of_head;
  int end_head;

  __device__ __forceinline__ Walk(const BackwardParams& params, const QueryTile& own,
                                  const Interval (&attended_smem)[kMaxSegments][Config::kTileOwn])
      : of_head(params.branch, own, attended_smem), end_head(own.head + params.heads_together) {}

  // Whether there is another tile: then it is `of_head.tile`.
  __device__ __forceinline__ bool next() {
#pragma unroll 1
    while (!of_head.next()) {
      const int head = of_head.tile.head + 1;
      if (head == end_head) return false;
      of_head.tile = {head, -1, 0, 0, true, false, false, false};  // before the first segment
      of_head.end = 0;
    }
    return true;
  }
};

// Starts copying the statistics of `rows` queries of a view; zeros where there is no row. Half of
// the warpgroup copies the lse, half delta.
template <int kRows>
__device__ __forceinline__ void load_stats(Stats<kRows>& stats_smem, const RowStats* stats_gmem,
                                           const SequenceView& view, int group, int first_row,
                                           int rows) {
  const bool lse = threadIdx.x % 128 < 64;
#pragma unroll 1
  for (int row = threadIdx.x % 64; row < kRows; row += 64) {
    const RowStats* row_gmem = stats_gmem + view.position(group, first_row + row);
    ptx::cp_async_4(lse ? &stats_smem.lse_log2[row] : &stats_smem.delta[row],
                    lse ? &row_gmem->lse_log2 : &row_gmem->delta, row < rows);
  }
}

// Starts loading rows [first_row, end_row) of a group.
template <class Config, class T, class Tile>
__device__ __forceinline__ void load_rows(Tile& tile_smem, const Rows<T>& rows, uint64_t& full,
                                          int group, int first_row, int end_row) {
  if constexpr (Config::kByMap) {
    rows.template load<128>(tile_smem, full, group, first_row, end_row);
  } else {
    rows.template copy<128>(tile_smem, group, first_row, end_row);
  }
}

// The warpgroup that loads.
template <class Config, class SharedMemory>
__device__ __forceinline__ void load(SharedMemory& smem, const BackwardParams& params,
                                     const QueryTiles& tiles, const BackwardMaps& maps) {
  using T = typename Config::Element;
  constexpr bool kOwnsQueries = Config::kOwnsQueries;
  const Branch& branch = params.branch;
  const TensorView& own_view = kOwnsQueries ? params.q : params.k;
  const TensorView& own_v_view = kOwnsQueries ? params.dout : params.v;
  const TensorView& streamed_view = kOwnsQueries ? params.k : params.q;
  const TensorView& streamed_v_view = kOwnsQueries ? params.v : params.dout;
  const auto stats_gmem = [&](int batch, int head) {
    return params.stats + (static_cast<int64_t>(batch) * params.heads + head) * params.seq_q;
  };
  Place<Config::kOwnStages> own_place;
  Place<Config::kStages> place;
  const Counters counters = {static_cast<int*>(params.workspace)};
  int index = blockIdx.x;
  for (int round = 0; index < tiles.count; ++round) {
    int next = index + gridDim.x;
    if (threadIdx.x == 0 && counters.next != nullptr) next = gridDim.x + counters.take();
    const auto hand_over_next = [&] {
      if (threadIdx.x == 0) smem.next_tile[round % 2] = next;
      ptx::named_barrier(kLoadBarrier, 128);
      index = smem.next_tile[round % 2];
    };
    QueryTile own = tiles.at(index, branch.queries);
    if (own.rows == 0) {
      hand_over_next();
      continue;
    }
    own.head = params.first_head + own.head * params.heads_together;
    const int kv_head = kv_head_of(params, own.head);
    const int stage = own_place.stage;
    own_place.wait_empty(smem.own_ring);
    auto& attended_smem = smem.attended[stage];
    find_attended<128>(attended_smem, branch, own);
    if (threadIdx.x == 0) smem.rows[stage] = own;

    const int own_head = kOwnsQueries ? own.head : kv_head;
#pragma unroll 1
    for (int number = 0; number < Config::kConsumers; ++number) {
      const QueryTile part = part_of(own, number);
      const auto load_own = [&](auto& tile_smem, const ViewMap& map, const TensorView& tensor,
                                int head_dim) {
        const Rows<T> rows(map, branch.queries, tensor, head_dim, own.batch, own_head);
        load_rows<Config>(tile_smem, rows, smem.own_ring.full[stage], part.group, part.first_row,
                          part.first_row + part.rows);
      };
      auto& part_smem = smem.own[stage].part[number];
      load_own(part_smem.own, maps.own, own_view, params.head_dim);
      if constexpr (Config::kSumsDqOrDk) {
        load_own(part_smem.own_v, maps.own_v, own_v_view, params.head_dim_v);
      }
    }
    if constexpr (kOwnsQueries) {
      load_stats(smem.stats[stage], stats_gmem(own.batch, own.head), branch.queries, own.group,
                 own.first_row, own.rows);
    }
    hand_over_next();  // and all intervals
    Walk<Config> walk(params, own, attended_smem);
    bool more = walk.next();
    if (threadIdx.x == 0) smem.any_streamed[stage] = more;
    ptx::cp_async_arrive(smem.own_ring.full[stage]);
    ptx::mbarrier_arrive(smem.own_ring.full[stage]);  // what was not copied
    own_place.advance();

    while (more) {
      const KeyTile tile = walk.of_head.tile;
      more = walk.next();  // ahead: no thread reads the intervals once all tiles are full
      const SequenceView& view = branch.segments[tile.segment].keys;
      const int rows = tile.end_row - tile.first_row;
      const int head = kOwnsQueries ? kv_head : tile.head;
      const auto load_streamed = [&](auto& tile_smem, const ViewMap& map, const TensorView& tensor,
                                     int head_dim) {
        const Rows<T> rows(map, view, tensor, head_dim, own.batch, head);
        load_rows<Config>(tile_smem, rows, smem.ring.full[place.stage], own.group, tile.first_row,
                          tile.end_row);
      };
      place.wait_empty(smem.ring);
      if (threadIdx.x < Config::kConsumers) {
        smem.tile[place.stage][threadIdx.x] =
            as_seen<Config::kTileStreamed>(tile, more, own, threadIdx.x, attended_smem);
        ptx::mbarrier_arrive(smem.ring.full[place.stage]);
      }
      load_streamed(smem.streamed[place.stage], maps.streamed[tile.segment], streamed_view,
                    params.head_dim);
      load_streamed(smem.streamed_v[place.stage], maps.streamed_v[tile.segment], streamed_v_view,
                    params.head_dim_v);
      if constexpr (!kOwnsQueries) {
        load_stats(smem.stats[place.stage], stats_gmem(own.batch, head), view, own.group,
                   tile.first_row, rows);
      }
      ptx::cp_async_arrive(smem.ring.full[place.stage]);
      place.advance();
    }
  }
  own_place.wait_empty(smem.own_ring);
  smem.rows[own_place.stage].rows = 0;
  ptx::cp_async_arrive(smem.own_ring.full[own_place.stage]);
  ptx::mbarrier_arrive(smem.own_ring.full[own_place.stage]);
}

// A warpgroup that computes the `number`-th 64 rows of every own tile.
template <class Config, class SharedMemory>
__device__ __forceinline__ void compute(SharedMemory& smem, const BackwardParams& params,
                                        int number) {
  using T = typename Config::Element;
  using Scores = typename Config::Scores;
  constexpr bool kOwnsQueries = Config::kOwnsQueries;
  constexpr int kLaneRows = Scores::kLaneRows;
  const Branch& branch = params.branch;
  const float scale_log2 = params.scale * kLog2E;
  const int first_row = number * kWarpgroupRows;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // of the part
  const auto sync = [&] { ptx::named_barrier(kComputeBarrier + number, 128); };
  Place<Config::kOwnStages> own_place;
  Place<Config::kStages> place;
  while (true) {
    const int own_stage = own_place.stage;
    own_place.wait_full(smem.own_ring);
    const QueryTile& own = smem.rows[own_stage];  // read when needed: registers are scarce
    if (own.rows == 0) break;
    const auto own_part = [&] { return part_of(own, number); };
    auto& part_smem = smem.own[own_stage].part[number];
    auto& attended_smem = smem.attended[own_stage];

    typename Config::Gradient gradient;     // dq or dk, over scale
    typename Config::GradientV gradient_v;  // dv
    gradient.clear();
    gradient_v.clear();
    // The statistics of the query of a pair: of this lane's rows, or of a column.
    float own_lse_log2[kLaneRows], own_delta[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = first_row + warp_row + Scores::row(i);
      own_lse_log2[i] = kOwnsQueries ? smem.stats[own_stage].lse_log2[row] : 0.f;
      own_delta[i] = kOwnsQueries ? smem.stats[own_stage].delta[row] : 0.f;
    }
    const auto lse_log2 = [&](int row, int column) {
      return kOwnsQueries ? own_lse_log2[row] : smem.stats[place.stage].lse_log2[column];
    };
    const auto delta = [&](int row, int column) {
      return kOwnsQueries ? own_delta[row] : smem.stats[place.stage].delta[column];
    };

    bool more = smem.any_streamed[own_stage];  // whether there is a tile at `place`
    Scores weights, dscores;
    const auto tile = [&]() -> const KeyTile& { return smem.tile[place.stage][number].tile; };
    // Whether blocks smaller than a part leave pairs of the tile out.
    const auto mixed = [&] { return tile().mixed && branch.blocks.size < kWarpgroupRows; };
    const auto attended = [&] {  // whether this part attends the tile at `place`
      place.wait_full(smem.ring);
      if (!tile().exists) return false;
      // In larger blocks the rows of the part lie in one, and so do those of the tile.
      return !tile().mixed || mixed() ||
             branch.keeps(tile().head, own_part().first_row, tile().first_row);
    };
    const auto advance = [&] {
      more = smem.tile[place.stage][number].more;
      place.advance();
    };
    // Scores, and gradients of weights: two groups.
    const auto start_products = [&] {
      start_multiply_transposed<T>(weights, part_smem.own, smem.streamed[place.stage]);
      if constexpr (Config::kSumsDqOrDk) {
        start_multiply_transposed<T>(dscores, part_smem.own_v, smem.streamed_v[place.stage]);
      }
    };
    // From scores, in place.
    const auto find_weights = [&] {
      ptx::pin(weights);
      weights.for_each([&](float& weight, int row, int column) {
        weight = ptx::exp2(weight * scale_log2 - lse_log2(row, column));
      });
      fill_others(weights, attended_smem[tile().segment] + first_row + warp_row, tile(), 0.f);
      if (branch.residues > 1) {
        fill_other_residues(weights, branch.residues, tile().first_row, 0.f);
      }
      if (mixed()) {
        fill_other_blocks<kWarpgroupRows>(weights, branch, own_part(), tile(), 0.f);
      }
    };
    // From gradients of weights, in place.
    const auto find_dscores = [&] {
      if constexpr (!Config::kSumsDqOrDk) return;
      ptx::pin(dscores);
      dscores.for_each(weights, [&](float& dscore, float weight, int row, int column) {
        dscore = weight * (dscore - delta(row, column));
      });
      // A key that no query attends may be NaN, and 0 * NaN is NaN.
      if (mixed()) {
        fill_other_blocks<kWarpgroupRows>(dscores, branch, own_part(), tile(), 0.f);
      }
    };
    while (more) {
      if (!attended()) {
        const auto skipped = place;
        advance();
        skipped.arrive_empty(smem.ring);
        continue;
      }
      ptx::fence_async_proxy();  // between cp.async and wgmma
      ptx::wgmma_fence();
      start_products();
      ptx::wgmma_wait<Config::kSumsDqOrDk ? 1 : 0>();
      find_weights();
      ptx::wgmma_wait<0>();
      find_dscores();
      Rounded<T, Scores> rounded_weights(weights), rounded_dscores(dscores);
      auto summed = place;
      advance();
      const auto start_sums = [&] {
        if constexpr (Config::kSumsDv) {
          start_multiply_add<T>(gradient_v, rounded_weights, smem.streamed_v[summed.stage]);
        }
        if constexpr (Config::kSumsDqOrDk) {
          start_multiply_add<T>(gradient, rounded_dscores, smem.streamed[summed.stage]);
        }
      };
      const auto finish_sums = [&] {
        ptx::wgmma_wait<0>();
        if constexpr (Config::kSumsDv) {
          ptx::pin(gradient_v);
          keep(rounded_weights);
        }
        if constexpr (Config::kSumsDqOrDk) {
          ptx::pin(gradient);
          keep(rounded_dscores);
        }
        summed.arrive_empty(smem.ring);
      };
      if constexpr (Config::kOverlapsSums) {
        // The products of a tile beside the sums of the one before. A tile that is not attended
        // ends this: all but one of the stages must be let go while waiting for others.
        static_assert(Config::kSumsDqOrDk);
        constexpr int kSums = Config::kSumsDv ? 2 : 1;
        while (more && attended()) {
          ptx::fence_async_proxy();
          ptx::wgmma_fence();
          start_products();
          start_sums();
          ptx::wgmma_wait<kSums + 1>();
          find_weights();
          ptx::wgmma_wait<kSums>();
          find_dscores();
          finish_sums();
          rounded_weights.round(weights);
          rounded_dscores.round(dscores);
          summed = place;
          advance();
        }
      }
      ptx::wgmma_fence();
      start_sums();
      finish_sums();
    }

    // The gradients take the place of the own rows.
    const QueryTile part = own_part();
    const int target_head = part.head / params.heads_together;
    const TensorView& target = kOwnsQueries ? params.dq : params.dk;
    const auto load_earlier = [&](auto& own_smem, const TensorView& target, int head_dim) {
      load_tile<128>(own_smem, head_gmem<const T>(target, part.batch, target_head),
                     target.row_stride, branch.queries, part.group, part.first_row,
                     part.first_row + part.rows, head_dim);
    };
    const auto write = [&](auto& own_smem, const auto& sum, float factor) {
      float factors[kLaneRows], ones[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) factors[i] = factor, ones[i] = 1.f;
      write_rows<T>(own_smem, sum, factors, ones, params.accumulate);
    };
    const auto store = [&](auto& own_smem, const TensorView& target, int head_dim) {
      T* gmem = head_gmem<T>(target, part.batch, target_head);
      for_each_row<std::decay_t<decltype(own_smem)>>(
          branch.queries, part.group, part.first_row, part.rows,
          [&](int row, int64_t token, bool exists) {
            store_row(own_smem, row, gmem + token * target.row_stride, head_dim, exists);
          });
    };
    sync();  // no warp's wgmma reads the own rows any more
    if (params.accumulate) {
      if constexpr (Config::kSumsDqOrDk) load_earlier(part_smem.own, target, params.head_dim);
      if constexpr (Config::kSumsDv) load_earlier(part_smem.own_v, params.dv, params.head_dim_v);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      sync();
    }
    if constexpr (Config::kSumsDqOrDk) write(part_smem.own, gradient, params.scale);
    if constexpr (Config::kSumsDv) write(part_smem.own_v, gradient_v, 1.f);
    sync();
    if constexpr (Config::kSumsDqOrDk) store(part_smem.own, target, params.head_dim);
    if constexpr (Config::kSumsDv) store(part_smem.own_v, params.dv, params.head_dim_v);
    if constexpr (Config::kByMap) {
      ptx::fence_async_proxy();  // between these stores and the next own rows
    }
    own_place.arrive_empty(smem.own_ring);
    own_place.advance();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    backward_kernel(const __grid_constant__ BackwardParams params,
                    const __grid_constant__ QueryTiles tiles,
                    const __grid_constant__ BackwardMaps maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Config::kConsumers;
    smem.own_ring.init(2 * 128, kWarps);               // of each lane: its copies, its intervals
    smem.ring.init(128 + Config::kConsumers, kWarps);  // copies; the tile as each part sees it
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    load<Config>(smem, params, tiles, maps);
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    compute<Config>(smem, params, warpgroup - 1);
  }
}

}  // namespace sparse_attn::sm90::backward
