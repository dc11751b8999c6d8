// SPDX-License-Identifier: Apache-2.0
// The Hopper forward kernel: one branch of a plan, or two; CTAs that stay and take one tile of 128
// or 192 queries after another.
//
// Four warps move data: one loads the queries of the next tile while these are computed, one key
// and value tiles into rings, one what earlier branches left of the output, and one stores. Two or
// three warpgroups compute 64 queries each with wgmma. README.md in this folder has the schedule
// and the counts.
#pragma once

#include "ptx/registers.cuh"
#include "sm90/forward/compute_few.cuh"
#include "sm90/forward/compute_many.cuh"
#include "sm90/forward/compute_scattered.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/load_blocks.cuh"
#include "sm90/forward/parts.cuh"
#include "sm90/load_rows.cuh"
#include "sm90/tickets.cuh"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

// The number of a tile's (batch, head) in a launch.
__device__ __forceinline__ int pair_of(const ForwardParams& params, const QueryTile& tile) {
  return tile.batch * params.head_count + tile.head - params.first_head;
}

// The warp that takes tiles, finds what their queries attend, and loads the queries.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void load_queries(SharedMemory& smem, const ForwardParams& params,
                                             const Tiles& tiles,
                                             const ForwardMaps<Tiles::kBranches>& maps) {
  using T = typename Config::Element;
  const bool first_lane = threadIdx.x % 32 == 0;
  const Counters counters = {params.counters};
  Items<Tiles> items(tiles, counters);
  Place<Config::kQueryStages> place;
  Place<Config::kTakenStages> taken_place;
  const auto at = [&] { return Config::kAhead ? taken_place.stage : place.stage; };
  bool more = true;  // tiles to come
  const auto take = [&] {
    auto& taken = smem.taken[at()];
    Item item{};
    while (items.next(item, params.branches) && item.tile.rows == 0) {
      if (Tiles::kBranches > 1 && item.branch == 0 && first_lane) {
        counters.publish(pair_of(params, item.tile));
      }
      item = {};
    }
    const int branch_number = Tiles::kBranches == 1 ? 0 : item.branch;
    if (first_lane) taken.branch = branch_number, taken.queries = item.tile;
    __syncwarp();
    more = item.tile.rows > 0;
  };
  const auto find = [&] {
    auto& taken = smem.taken[at()];
    const Branch& branch = params.branches[Tiles::kBranches == 1 ? 0 : taken.branch];
    if (more) {
      if constexpr (Config::kMany) {
        find_ends(taken.attended, branch, taken.queries);
      } else {
        find_attended<32>(taken.attended, branch, taken.queries);
      }
    }
    __syncwarp();
    if (first_lane) ptx::mbarrier_arrive(smem.found[at()]);
  };
  while (more) {
    if (Config::kAhead) take(), find();
    place.wait_empty(smem.query_ring);
    if (!Config::kAhead) take();
    const int stage = place.stage;
    const auto& taken = smem.taken[at()];  // read when needed: registers are scarce
    if (Config::kAhead && first_lane) smem.taken_at[stage] = at();
    if (more) {
      const int branch_number = Tiles::kBranches == 1 ? 0 : taken.branch;
      const Rows<T> q(maps.branch[branch_number].q, params.branches[branch_number].queries,
                      params.q, params.head_dim, taken.queries.batch, taken.queries.head);
#pragma unroll 1
      for (int number = 0; number < Config::kConsumers; ++number) {
        const QueryTile part = part_of(taken.queries, number);
        q.template load<32>(smem.queries[stage].part[number].q, smem.query_ring.full[stage],
                            part.group, part.first_row, part.first_row + part.rows,
                            branch_number > 0);
      }
    }
    if (!Config::kAhead) find();
    ptx::cp_async_arrive(smem.query_ring.full[stage]);
    ptx::mbarrier_arrive(smem.query_ring.full[stage]);  // what was not copied
    place.advance();
    taken_place.advance();
  }
}

// The warp that walks the key tiles of each tile of queries, and loads keys and values.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void load_keys(SharedMemory& smem, const ForwardParams& params,
                                          const ForwardMaps<Tiles::kBranches>& all_maps) {
  using T = typename Config::Element;
  const int lane = threadIdx.x % 32;
  Place<Config::kTakenStages> taken_place;
  Place<Config::kKeyStages> place;
  while (true) {
    const auto& taken = smem.taken[taken_place.stage];
    ptx::mbarrier_wait(smem.found[taken_place.stage], taken_place.round);
    const QueryTile& queries = taken.queries;  // read when needed: registers are scarce
    if (queries.rows == 0) break;
    const int branch_number = Tiles::kBranches == 1 ? 0 : taken.branch;
    const Branch& branch = params.branches[branch_number];
    const BranchMaps& maps = all_maps.branch[branch_number];
    const auto& attended_smem = taken.attended;
    KeyWalk<Config::kTileKeys, Config::kTileQueries> walk(branch, queries, attended_smem);
    const bool any = walk.next();  // else there is one tile that nobody attends
    const int kv_head = kv_head_of(params, queries.head);
    bool more = true;
    while (more) {
      KeyTile tile = walk.tile;
      if (!any) tile.segment = 0;
      const bool keeps = any && walk.keeps();
      more = any && walk.next();  // ahead: the intervals are not read once all tiles are full
      const SequenceView& view = branch.segments[tile.segment].keys;
      const auto load = [&](auto& tile_smem, auto& ring, const ViewMap& map,
                            const TensorView& tensor, int head_dim) {
        Rows<T>(map, view, tensor, head_dim, queries.batch, kv_head)
            .template load<32>(tile_smem[place.stage], ring.full[place.stage], queries.group,
                               tile.first_row, tile.end_row, branch_number > 0);
        ptx::cp_async_arrive(ring.full[place.stage]);
      };
      place.wait_empty(smem.k_ring);
      if constexpr (Config::kMany) {
        if (lane < Config::kConsumers) {
          smem.tile[place.stage][lane] = PartTile::of(
              as_seen<Config::kTileKeys>(tile, more, queries, lane, attended_smem), keeps);
          ptx::mbarrier_arrive(smem.k_ring.full[place.stage]);
        }
      } else {
        const bool part_keeps = __shfl_sync(0xffffffff, keeps, lane / 4 % Config::kConsumers);
        if (lane < 4 * Config::kConsumers) {
          smem.tile[place.stage][lane] =
              WarpTile::of(tile, more, part_keeps, queries, lane, attended_smem);
          ptx::mbarrier_arrive(smem.k_ring.full[place.stage]);
        }
      }
      load(smem.k, smem.k_ring, maps.k[tile.segment], params.k, params.head_dim);
      place.wait_empty(smem.v_ring);
      load(smem.v, smem.v_ring, maps.v[tile.segment], params.v, params.head_dim_v);
      place.advance();
    }
    taken_place.advance();
  }
}

// f(row of the part, its lse in global memory, whether it exists) for this lane's rows.
template <class F>
__device__ __forceinline__ void for_each_lse(const ForwardParams& params, const Branch& branch,
                                             const QueryTile& part, F f) {
  float* lse_gmem =
      params.lse + (static_cast<int64_t>(part.batch) * params.heads + part.head) * params.seq_q;
#pragma unroll
  for (int row = threadIdx.x % 32; row < kWarpgroupRows; row += 32) {
    f(row, lse_gmem + branch.queries.position(part.group, part.first_row + row), row < part.rows);
  }
}

// The warp that loads what earlier branches left.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void load_earlier(SharedMemory& smem, const ForwardParams& params,
                                             const Tiles& tiles,
                                             const ForwardMaps<Tiles::kBranches>& maps) {
  using T = typename Config::Element;
  Place<Config::kTakenStages> taken_place;
  Place<Config::kQueryStages> query_place;
  int used = 0;  // a bit for each place: parity of the times
  while (true) {
    ptx::mbarrier_wait(smem.found[taken_place.stage], taken_place.round);
    const int stage = query_place.stage;
    const auto& taken = smem.taken[taken_place.stage];
    const QueryTile queries = taken.queries;
    const int branch_number = Tiles::kBranches == 1 ? 0 : taken.branch;
    if (queries.rows == 0) break;
    if (merges<Config>(params, branch_number, queries)) {
      if constexpr (Tiles::kBranches > 1) {
        Counters{params.counters}.wait(pair_of(params, queries), tiles.first);
      }
      const Branch& branch = params.branches[branch_number];
      const Rows<T> out(maps.branch[branch_number].out, branch.queries, params.out,
                        params.head_dim_v, queries.batch, queries.head);
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < Config::kConsumers; ++warpgroup) {
        const QueryTile part = part_of(queries, part_number<Config>(warpgroup, stage));
        if (part.rows == 0) continue;
        const int place = warpgroup % Config::kEarlierTiles;
        uint64_t& full = smem.earlier_full[warpgroup];
        ptx::mbarrier_wait(smem.earlier_empty[place], (used >> place & 1) ^ 1);
        used ^= 1 << place;
        out.template load<32>(earlier_of<Config>(smem, warpgroup), full, part.group, part.first_row,
                              part.first_row + part.rows, Tiles::kBranches > 1);
        float* lse_smem = earlier_lse_of<Config>(smem, warpgroup);
        for_each_lse(params, branch, part, [&](int row, const float* lse_gmem, bool exists) {
          ptx::cp_async_4(lse_smem + row, lse_gmem, exists);
        });
        ptx::cp_async_arrive(full);
      }
    }
    query_place.wait_full(smem.query_ring);
    query_place.arrive_empty(smem.query_ring);
    query_place.advance();
    taken_place.advance();
  }
}

// The warp that stores, and publishes the tiles that others wait for.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void store(SharedMemory& smem, const ForwardParams& params,
                                      const ForwardMaps<Tiles::kBranches>& maps) {
  using T = typename Config::Element;
  const bool first_lane = threadIdx.x % 32 == 0;
  Place<Config::kQueryStages> query_place;
  while (true) {
    query_place.wait_full(smem.query_ring);
    const int stage = query_place.stage;
    const auto& taken = taken_of<Config>(smem, stage);
    const QueryTile queries = taken.queries;
    const int branch_number = Tiles::kBranches == 1 ? 0 : taken.branch;
    if (queries.rows == 0) break;
    const Branch& branch = params.branches[branch_number];
    const Rows<T> out(maps.branch[branch_number].out, branch.queries, params.out, params.head_dim_v,
                      queries.batch, queries.head);
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < Config::kConsumers; ++warpgroup) {
      const int number = part_number<Config>(warpgroup, stage);
      const QueryTile part = part_of(queries, number);
      ptx::mbarrier_wait(smem.computed[stage][warpgroup], query_place.round);
      out.store(smem.queries[stage].part[number].out, part.group, part.first_row,
                part.first_row + part.rows, branch_number > 0);
      for_each_lse(params, branch, part, [&](int row, float* lse_gmem, bool exists) {
        if (exists) *lse_gmem = smem.lse[stage][warpgroup][row];
      });
    }
    if (first_lane) ptx::tma_wait_read();
    query_place.arrive_empty(smem.query_ring);
    query_place.advance();
    if (Tiles::kBranches > 1 && branch_number == 0 && first_lane) {
      ptx::tma_wait_written();
      Counters{params.counters}.publish(pair_of(params, queries));
    }
  }
}

template <class Config, class Tiles>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    forward_kernel(const __grid_constant__ ForwardParams params,
                   const __grid_constant__ Tiles tiles,
                   const __grid_constant__ ForwardMaps<Tiles::kBranches> maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Config::kConsumers;
    // Of each lane: its copies, its intervals. Emptied by the warps that load earlier output and
    // store.
    smem.query_ring.init(2 * 32, 2);
    for (uint64_t& found : smem.found) ptx::mbarrier_init(found, 1);
    for (auto& stage : smem.computed) {
      for (uint64_t& computed : stage) ptx::mbarrier_init(computed, 4);
    }
    for (uint64_t& full : smem.earlier_full) ptx::mbarrier_init(full, 32);
    for (uint64_t& empty : smem.earlier_empty) ptx::mbarrier_init(empty, 4);
    if constexpr (Config::kScattered) {
      smem.k_ring.init(1, kWarps);  // and the values
      for (auto& pairs : smem.listed) {
        for (uint64_t& listed : pairs) ptx::mbarrier_init(listed, 1);
      }
    } else {
      // And how each part, or each warp, sees the tile.
      smem.k_ring.init(32 + (Config::kMany ? Config::kConsumers : kWarps), kWarps);
      smem.v_ring.init(32, kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    if (warp == 0) {
      load_queries<Config>(smem, params, tiles, maps);
    } else if (warp == 1) {
      if constexpr (Config::kScattered) {
        load_blocks<Config, Tiles>(smem, params, maps);
      } else {
        load_keys<Config, Tiles>(smem, params, maps);
      }
    } else if (warp == 2) {
      load_earlier<Config>(smem, params, tiles, maps);
    } else {
      store<Config, Tiles>(smem, params, maps);
    }
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    if constexpr (Config::kScattered) {
      compute_scattered<Config, Tiles>(smem, params, warpgroup - 1);
    } else if constexpr (Config::kMany) {
      compute_many<Config, Tiles>(smem, params, maps, warpgroup - 1);
    } else {
      compute_few<Config, Tiles>(smem, params, maps, warpgroup - 1);
    }
  }
}

}  // namespace sparse_attn::sm90::forward
