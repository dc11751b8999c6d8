// SPDX-License-Identifier: Apache-2.0
// The Hopper forward kernel: one branch of a plan; CTAs that stay and take one tile of 128 or 192
// queries after another.
//
// One warp loads: the queries of the next tile while these are computed, key and value tiles into
// rings. Two or three warpgroups compute 64 queries each with wgmma. README.md in this folder has
// the schedule and the counts.
#pragma once

#include "attention/finish_rows.cuh"
#include "attention/mask.cuh"
#include "ptx/registers.cuh"
#include "sm90/forward/config.h"
#include "sm90/load_rows.cuh"
#include "sm90/multiply.cuh"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

constexpr int kComputeBarrier = 1;  // and on; 0 is __syncthreads

// The warp that loads.
template <class Config, class SharedMemory>
__device__ __forceinline__ void load(SharedMemory& smem, const ForwardParams& params,
                                     const QueryTiles& tiles, const ForwardMaps& maps) {
  using T = typename Config::Element;
  const Branch& branch = params.branch;
  Place<Config::kQueryStages> query_place;
  Place<Config::kKeyStages> key_place;
  for (int round = 0;; ++round) {
    const int index = tiles.index(round, blockIdx.x, gridDim.x);
    if (round * gridDim.x >= tiles.count) break;
    if (index >= tiles.count) continue;
    const QueryTile found = tiles.at(index, branch.queries);
    if (found.rows == 0) continue;
    const int stage = query_place.stage;
    uint64_t& full = smem.query_ring.full[stage];
    query_place.wait_empty(smem.query_ring);
    auto& attended_smem = smem.attended[stage];
    if (threadIdx.x == 0) smem.query_tile[stage] = found;
    __syncwarp();
    const QueryTile& queries = smem.query_tile[stage];  // read when needed: registers are scarce
    const Rows<T> q(maps.q, branch.queries, params.q, params.head_dim, queries.batch, queries.head);
#pragma unroll 1
    for (int number = 0; number < Config::kConsumers; ++number) {
      const QueryTile part = part_of(queries, number);
      q.template load<32>(smem.queries[stage].part[number].q, full, part.group, part.first_row,
                          part.first_row + part.rows);
    }
    if constexpr (Config::kLoaderFinds) {
      find_attended<32>(attended_smem, branch, queries);
    } else {
      find_ends(attended_smem, branch, queries);
    }
    __syncwarp();
    KeyWalk<Config::kTileKeys, Config::kTileQueries> walk(branch, queries, attended_smem);
    bool more = walk.next();
    if (threadIdx.x == 0) smem.any_keys[stage] = more;
    ptx::cp_async_arrive(full);
    ptx::mbarrier_arrive(full);  // what was not copied
    query_place.advance();

    const int kv_head = queries.head / (params.heads / params.kv_heads);
    while (more) {
      KeyTile tile = walk.tile;
      const bool keeps = walk.keeps();
      more = walk.next();  // ahead: the intervals are not read once all tiles are full
      const SequenceView& view = branch.segments[tile.segment].keys;
      const auto load_keys = [&](auto& tile_smem, auto& ring, const ViewMap& map,
                                 const TensorView& tensor, int head_dim) {
        Rows<T>(map, view, tensor, head_dim, queries.batch, kv_head)
            .template load<32>(tile_smem[key_place.stage], ring.full[key_place.stage],
                               queries.group, tile.first_row, tile.end_row);
        ptx::cp_async_arrive(ring.full[key_place.stage]);
      };
      key_place.wait_empty(smem.k_ring);
      if (threadIdx.x < Config::kConsumers) {
        SeenTile seen = as_seen<Config::kTileKeys>(tile, more, queries, threadIdx.x, attended_smem);
        seen.tile.exists = seen.tile.exists && keeps;
        smem.tile[key_place.stage][threadIdx.x] = seen;
        ptx::mbarrier_arrive(smem.k_ring.full[key_place.stage]);
      }
      load_keys(smem.k, smem.k_ring, maps.k[tile.segment], params.k, params.head_dim);
      key_place.wait_empty(smem.v_ring);
      load_keys(smem.v, smem.v_ring, maps.v[tile.segment], params.v, params.head_dim_v);
      key_place.advance();
    }
  }
  query_place.wait_empty(smem.query_ring);
  smem.query_tile[query_place.stage].rows = 0;
  ptx::cp_async_arrive(smem.query_ring.full[query_place.stage]);
  ptx::mbarrier_arrive(smem.query_ring.full[query_place.stage]);
}

// A warpgroup that computes the `number`-th 64 queries of every tile.
template <class Config, class SharedMemory>
__device__ __forceinline__ void compute(SharedMemory& smem, const ForwardParams& params,
                                        const ForwardMaps& maps, int number) {
  using T = typename Config::Element;
  constexpr int kLaneRows = Config::Output::kLaneRows;
  const Branch& branch = params.branch;
  const int first_row = number * kWarpgroupRows;
  const int warp_row = threadIdx.x / 32 % 4 * 16;  // of the part
  const auto sync = [&] { ptx::named_barrier(kComputeBarrier + number, 128); };
  Place<Config::kQueryStages> query_place;
  Place<Config::kKeyStages> key_place;
  while (true) {
    const int stage = query_place.stage;
    query_place.wait_full(smem.query_ring);
    const QueryTile& queries = smem.query_tile[stage];
    if (queries.rows == 0) break;
    const QueryTile part = part_of(queries, number);
    auto& q_smem = smem.queries[stage].part[number].q;
    auto& attended_smem = smem.attended[stage];

    typename Config::Scores scores;
    Rounded<T, typename Config::Scores> weights;
    float shrink[kLaneRows];  // by which a tile's greater maxima shrink what is summed
    bool shrinks;
    bool summed = Config::kOverlap;  // few tiles: the first has nothing to shrink
    typename Config::Output out;
    out.clear();
    OnlineSoftmax<kLaneRows> softmax;
    bool more = smem.any_keys[stage];   // whether there is a tile at key_place
    bool found = Config::kLoaderFinds;  // what the queries attend
    const auto tile = [&]() -> const KeyTile& { return smem.tile[key_place.stage][number].tile; };
    const auto attends_tile = [&] {
      key_place.wait_full(smem.k_ring);
      return tile().exists;
    };
    const auto pass_over = [&] {
      more = smem.tile[key_place.stage][number].more;
      key_place.arrive_empty(smem.k_ring);
      key_place.wait_full(smem.v_ring);
      key_place.arrive_empty(smem.v_ring);
      key_place.advance();
    };
    Place<Config::kKeyStages> weighed_place;  // of the tile whose weights are taken
    const auto start_scores = [&] {
      ptx::fence_async_proxy_if(maps.some_copied);  // between cp.async and wgmma
      ptx::wgmma_fence();
      start_multiply_transposed<T>(scores, q_smem, smem.k[key_place.stage]);
    };
    // From scores to weights, in place.
    const auto weigh = [&] {
      ptx::pin(scores);
      float scale_log2 = params.scale * kLog2E;
      if (scale_log2 <= 0.f) {  // the greatest score has not the greatest product
        scores.for_each([&](float& score, int, int) { score *= scale_log2; });
        scale_log2 = 1.f;
      }
      fill_others(scores, attended_smem[tile().segment] + first_row + warp_row, tile(),
                  minus_infinity());
      if (!Config::kMany && branch.residues > 1) {
        fill_other_residues(scores, branch.residues, tile().first_row, minus_infinity());
      }
      more = smem.tile[key_place.stage][number].more;
      key_place.arrive_empty(smem.k_ring);
      shrinks = softmax.update_rarely(scores, scale_log2, shrink);
      ptx::pin(scores);
      // Here, not before the sums that need it: ptxas moves no later wait for wgmma above a loop.
      key_place.wait_full(smem.v_ring);
    };
    const auto start_sums = [&] {
      ptx::fence_async_proxy_if(maps.some_copied);
      ptx::wgmma_fence();
      start_multiply_add<T>(out, weights, smem.v[weighed_place.stage]);
    };
    const auto end_sums = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      weighed_place.arrive_empty(smem.v_ring);
    };
    const auto take_weights = [&] {
      if (shrinks && summed) {
        out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
      }
      summed = true;
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
      weigh();
      take_weights();
      if constexpr (Config::kOverlap) {
        // A tile that is passed over ends this: with values in hand there may be no stage to load
        // the next ones into.
        while (more && attends_tile()) {
          start_scores();
          start_sums();
          ptx::wgmma_wait<1>();
          weigh();
          end_sums();
          take_weights();
        }
      }
      start_sums();
      end_sums();
    }

    // The output takes the place of the queries.
    auto& out_smem = smem.queries[stage].part[number].out;
    T* out_gmem = head_gmem<T>(params.out, part.batch, part.head);
    sync();
    if (params.merge) {
      load_tile<128>(out_smem, out_gmem, params.out.row_stride, branch.queries, part.group,
                     part.first_row, part.first_row + part.rows, params.head_dim_v);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      sync();
    }
    float* lse_gmem =
        params.lse + (static_cast<int64_t>(part.batch) * params.heads + part.head) * params.seq_q;
    float* row_lse_gmem[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = warp_row + Config::Output::row(i);
      const int token = branch.queries.position(part.group, part.first_row + row);
      row_lse_gmem[i] = row < part.rows ? lse_gmem + token : nullptr;
    }
    finish_rows<T>(out, out_smem, softmax, row_lse_gmem, params.merge);
    sync();
    for_each_row<typename Config::OutputPart>(branch.queries, part.group, part.first_row, part.rows,
                                              [&](int row, int64_t token, bool exists) {
                                                store_row(out_smem, row,
                                                          out_gmem + token * params.out.row_stride,
                                                          params.head_dim_v, exists);
                                              });
    ptx::fence_async_proxy();  // between these stores and the next queries
    query_place.arrive_empty(smem.query_ring);
    query_place.advance();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    forward_kernel(const __grid_constant__ ForwardParams params,
                   const __grid_constant__ QueryTiles tiles,
                   const __grid_constant__ ForwardMaps maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Config::kConsumers;
    smem.query_ring.init(2 * 32, kWarps);               // of each lane: its copies, its intervals
    smem.k_ring.init(32 + Config::kConsumers, kWarps);  // and how each part sees the tile
    smem.v_ring.init(32, kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    if (threadIdx.x < 32) load<Config>(smem, params, tiles, maps);
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    compute<Config>(smem, params, maps, warpgroup - 1);
  }
}

}  // namespace sparse_attn::sm90::forward
