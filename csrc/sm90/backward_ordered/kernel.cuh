// SPDX-License-Identifier: Apache-2.0
// The ordered backward kernel: all three gradients of one branch of a plan with five products.
//
// A CTA takes a tile of 128 keys and streams the queries that attend them, the last ones first; dk
// and dv are summed in registers. What its keys give to dq of a query tile is added to a slot in
// global memory when the keys before them have added theirs: a fixed order, the same bits in every
// run. README.md in this folder has the schedule and the counts.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/registers.cuh"
#include "sm90/backward_ordered/config.h"
#include "sm90/load_rows.cuh"
#include "sm90/multiply.cuh"
#include "sm90/store_sum.cuh"

namespace sparse_attn::sm90::backward_ordered {

// 0 is __syncthreads; kPart and on: the threads of a warpgroup.
enum Barrier { kPart = 1 };

constexpr int kFinished = -1;                   // the turn of a query tile whose dq is written
constexpr Interval kNone = {1 << 30, 1 << 30};  // what a key attends that does not exist

// The bits of a row of blocks, of queries or of keys.
__device__ __forceinline__ const uint32_t* bits_of(const Blocks& blocks, const uint32_t* rows,
                                                   int head, int row) {
  return rows + head * blocks.head_stride +
         static_cast<int64_t>(row >> lowest_bit(blocks.size)) * blocks.words;
}

// Whether a block of queries attends any keys before those of a tile: then the last tile of these,
// else -1.
__device__ __forceinline__ int key_tile_before(const Blocks& blocks, const uint32_t* bits,
                                               int key_tile) {
  const int block = key_tile * kTileKeys >> lowest_bit(blocks.size);
  int word = block / 32;
  uint32_t found = bits[word] & ~(~0u << block % 32);
#pragma unroll 1
  while (found == 0 && word > 0) found = bits[--word];
  const int last = word * 32 + 31 - __clz(found);
  return found == 0 ? -1 : (last << lowest_bit(blocks.size)) / kTileKeys;
}

// Whether it attends any after them.
__device__ __forceinline__ bool any_key_after(const Blocks& blocks, const uint32_t* bits,
                                              int key_tile) {
  const int block = (key_tile + 1) * kTileKeys >> lowest_bit(blocks.size);
  uint32_t found = 0;
#pragma unroll 1
  for (int word = block / 32; word < blocks.words && found == 0; ++word) {
    found = bits[word] & (word == block / 32 ? ~0u << block % 32 : ~0u);
  }
  return found != 0;
}

// Whether a tile of queries attends the keys of a warpgroup, as far as blocks go.
template <int kTileQueries>
__device__ __forceinline__ bool keeps(const Blocks& blocks, const QueryTile& keys, int number,
                                      int query_tile) {
  if (number * kWarpgroupRows >= keys.rows) return false;
  const int block = query_tile * kTileQueries >> lowest_bit(blocks.size);
  const uint32_t* bits =
      bits_of(blocks, blocks.rows, keys.head, keys.first_row + number * kWarpgroupRows);
  return bits[block / 32] >> block % 32 & 1;
}

// The last query tile before `end` that attends some of a tile of keys, for a warp; negative: none.
template <int kTileQueries>
__device__ __forceinline__ int query_tile_before(const Blocks& blocks, const OwnTile& own,
                                                 int end) {
  if (blocks.rows == nullptr) return end > own.first ? end - 1 : -1;
#pragma unroll 1
  for (; end > own.first; end -= 32) {
    const int tile = end - 1 - ptx::lane();
    const bool any = tile >= own.first && (keeps<kTileQueries>(blocks, own.keys, 0, tile) ||
                                           keeps<kTileQueries>(blocks, own.keys, 1, tile));
    const uint32_t found = __ballot_sync(0xffffffff, any);
    if (found != 0) return end - 1 - lowest_bit(found);
  }
  return -1;
}

// What scores are multiplied with, over which their lse is summed: no smaller number than fp32 can
// divide by.
__device__ __forceinline__ float scale_log2_of(const BackwardParams& params) {
  return fabsf(params.scale) < 1e-30f ? 1e-30f : params.scale * kLog2E;
}

// Starts copying the statistics of `rows` queries of a view, for a warp; zeros where there is no
// row.
template <int kTileQueries>
__device__ __forceinline__ void fetch_stats(Stats<kTileQueries>& stats_smem,
                                            const RowStats* stats_gmem, const SequenceView& view,
                                            int group, int first_row, int rows) {
#pragma unroll 1
  for (int row = ptx::lane(); row < kTileQueries; row += 32) {
    const RowStats* row_gmem = stats_gmem + view.position(group, first_row + row);
    ptx::cp_async_4(&stats_smem.lse_log2[row], &row_gmem->lse_log2, row < rows);
    ptx::cp_async_4(&stats_smem.delta[row], &row_gmem->delta, row < rows);
  }
}

// The warp that loads.
template <class Config, class SharedMemory>
__device__ __forceinline__ void load(SharedMemory& smem, const BackwardParams& params,
                                     const Plan& plan, const Maps& maps,
                                     const Workspace& workspace) {
  constexpr int kTileQueries = Config::kTileQueries;
  using T = typename Config::Element;
  const Branch& branch = params.branch;
  const SequenceView& keys_view = branch.queries;
  const Segment& segment = branch.segments[0];
  const SequenceView& view = segment.keys;  // of queries
  const int lane = threadIdx.x;
  Place<Config::kKeyStages> key_place;
  Place<Config::kStages> place;
  while (true) {
    const int ticket = workspace.counters.take_by_warp();
    if (ticket >= plan.count) break;
    const Item item = plan.at(ticket, keys_view);
    if (item.keys.rows == 0) {
      if (lane == 0 && item.unit < plan.units) workspace.counters.publish(item.unit);
      continue;
    }
    OwnTile& own = smem.own[key_place.twice()];  // read when needed: registers are scarce
    if (lane == 0) own.keys = item.keys, own.unit = item.unit;
    __syncwarp();
    auto& attended_smem = smem.attended[key_place.twice()];
    const int key_rows = keys_view.rows(own.keys.group);
    uint32_t lacking = 0;  // a bit for each part: whether a key has no query
#pragma unroll 1
    for (int i = lane; i < kTileKeys + 2; i += 32) {
      const int row = own.keys.first_row - 1 + i;
      Interval attended = row < 0 ? Interval{0, 0} : kNone;
      if (0 <= row && row < key_rows) {
        const int token = keys_view.position(own.keys.group, row);
        attended = segment.bounds(branch.run, own.keys.group, token);
        if (attended.first >= attended.end) lacking |= 1 << (i - 1) / kWarpgroupRows;
      }
      attended_smem[i] = attended;
    }
    __syncwarp();
    if (lane == 0) {
      own.first = attended_smem[1].first / kTileQueries;
      own.end = (attended_smem[own.keys.rows].end + kTileQueries - 1) / kTileQueries;
      own.query_rows = view.rows(own.keys.group);
    }
    __syncwarp();
    if (branch.blocks.rows != nullptr) {
#pragma unroll 1
      for (int part = 0; part < Config::kConsumers; ++part) {
        bool any = false;
#pragma unroll 1
        for (int tile = own.first + lane; tile < own.end; tile += 32) {
          any = any || keeps<kTileQueries>(branch.blocks, own.keys, part, tile);
        }
        if (__any_sync(0xffffffff, any)) continue;
        lacking |= 1 << part;
        Interval* part_smem = attended_smem + 1 + part * kWarpgroupRows;
        part_smem[lane] = part_smem[32 + lane] = kNone;
      }
    }
    lacking = __reduce_or_sync(0xffffffff, lacking);
    int number = query_tile_before<kTileQueries>(branch.blocks, own, own.end);
    if (lane == 0) {
      own.any_queries = number >= 0;
      if (number < 0) workspace.counters.publish(own.unit);
    }

    key_place.wait_empty(smem.key_ring);
    uint64_t& full = smem.key_ring.full[key_place.stage];
    const auto load_keys = [&](auto& tile_smem, const ViewMap& map, const TensorView& tensor,
                               int head_dim, int number) {
      const QueryTile part = part_of(own.keys, number);
      const Rows<T> rows(map, keys_view, tensor, head_dim, part.batch,
                         kv_head_of(params, part.head));
      if (!(lacking >> number & 1)) {
        rows.template load<32>(tile_smem, full, part.group, part.first_row,
                               part.first_row + part.rows);
      } else {  // a key that no query attends may be NaN: it is zero here
        for_each_row<std::decay_t<decltype(tile_smem)>, 32>(
            keys_view, part.group, part.first_row, part.rows,
            [&](int row, int64_t token, bool exists) {
              const Interval attended = attended_smem[1 + number * kWarpgroupRows + row];
              load_row(tile_smem, row, rows.gmem + token * rows.row_stride, head_dim,
                       exists && attended.first < attended.end);
            });
      }
    };
#pragma unroll 1
    for (int number = 0; number < Config::kConsumers; ++number) {
      load_keys(smem.keys[key_place.stage][number].k, maps.k, params.k, params.head_dim, number);
      load_keys(smem.keys[key_place.stage][number].v, maps.v, params.v, params.head_dim_v, number);
    }
    ptx::cp_async_arrive(full);
    ptx::mbarrier_arrive(full);  // what was not copied
    key_place.advance();

    // In registers: reading shared memory takes long beside products.
    const QueryTile keys = own.keys;
    const int unit = own.unit, query_rows = own.query_rows;
    const Rows<T> q_rows(maps.q, view, params.q, params.head_dim, keys.batch, keys.head);
    const Rows<T> dout_rows(maps.dout, view, params.dout, params.head_dim_v, keys.batch, keys.head);
    // The queries that all keys of warpgroup `lane` attend; for the other lanes, those that neither
    // the keys before these attend nor the keys after.
    const Interval* part_smem = attended_smem + 1 + lane * kWarpgroupRows;
    const bool of_part = lane < Config::kConsumers;
    const int inner_first = of_part ? part_smem[kWarpgroupRows - 1].first : attended_smem[0].end;
    const int inner_end = of_part ? part_smem[0].end : attended_smem[kTileKeys + 1].first;
    const RowStats* stats_gmem =
        params.stats + (static_cast<int64_t>(keys.batch) * params.heads + keys.head) * params.seq_q;
#pragma unroll 1
    while (number >= 0) {
      const int first_row = number * kTileQueries, after = first_row + kTileQueries;
      const int end_row = least(after, query_rows);
      place.wait_empty(smem.ring);
      uint64_t& tile_full = smem.ring.full[place.stage];
      q_rows.template load<32>(smem.q[place.stage], tile_full, keys.group, first_row, end_row);
      dout_rows.template load<32>(smem.dout[place.stage], tile_full, keys.group, first_row,
                                  end_row);
      fetch_stats(smem.stats[place.stage], stats_gmem, view, keys.group, first_row,
                  query_rows - first_row);
      const int next = query_tile_before<kTileQueries>(branch.blocks, own, number);
      StreamedTile& tile_smem = smem.tile[place.stage];
      const bool begins = first_row >= inner_first, ends = after <= inner_end;
      if (of_part) {
        const bool left_out = branch.blocks.rows != nullptr &&
                              !keeps<kTileQueries>(branch.blocks, keys, lane, number);
        const bool cut_before = !begins, cut_after = keys.rows < kTileKeys || !ends;
        const bool copied =
            !maps.q.holds(first_row, end_row) || !maps.dout.holds(first_row, end_row);
        tile_smem.marks[lane] =
            (cut_before ? StreamedTile::kCutBefore : 0) |
            (cut_after ? StreamedTile::kCutAfter : 0) | (left_out ? StreamedTile::kLeftOut : 0) |
            (copied ? StreamedTile::kCopied : 0) | (next < 0 ? StreamedTile::kLast : 0);
      }
      if (lane == Config::kConsumers) {  // one of the others
        tile_smem.first = begins;
        tile_smem.complete = ends;
        tile_smem.key_tile = keys.first_row / kTileKeys;
        tile_smem.unit = unit;
        tile_smem.number = unit * plan.query_tiles.value + number;
        tile_smem.slot = plan.slot_of(unit, number);
        tile_smem.queries = {keys.batch, keys.head, keys.group, first_row, end_row - first_row};
      }
      ptx::cp_async_arrive(tile_full);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(tile_full);  // what was not copied
      place.advance();
      number = next;
    }
  }
  place.wait_empty(smem.ring);
  smem.tile[place.stage].number = -1;
  ptx::cp_async_arrive(smem.ring.full[place.stage]);
  if (lane == 0) ptx::mbarrier_arrive(smem.ring.full[place.stage]);
  key_place.wait_empty(smem.key_ring);
  smem.own[key_place.twice()].keys.rows = 0;
  ptx::cp_async_arrive(smem.key_ring.full[key_place.stage]);
  ptx::mbarrier_arrive(smem.key_ring.full[key_place.stage]);
}

// tile *= factors.
template <class T, class Tile>
__device__ __forceinline__ void multiply_elements(Tile& tile, const Rounded<T, Tile>& factors) {
#pragma unroll
  for (int i = 0; i < Tile::kColumnTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 pair = ptx::unpack<T>(factors.at[i / 2][i % 2 * 2 + j]);
      tile.at[0][i][2 * j] *= pair.x;
      tile.at[0][i][2 * j + 1] *= pair.y;
    }
  }
}

// A lane's place in the 16 rows and 16 columns that stmatrix moves.
template <class Tile>
__device__ __forceinline__ auto* matrix_row(Tile& tile_smem, int lane, int warp_row, int column) {
  return tile_smem.at(warp_row + lane % 16, column / 8 + lane / 16);
}

// The slot in which dq of a query tile is summed, over scale, in parts: 64 rows and half of the
// columns. Of a part, of each of four warps its 16 rows, a lane's part of 16 x 8 accumulators
// together.
template <class Config>
struct DqSlot {
  static constexpr int kColumnTiles = Config::kDqColumns / 8;
  static constexpr int kParts = 2 * Config::kQueryParts;
  static constexpr int kWarpVectors = kColumnTiles * 32;

  static __device__ __forceinline__ float4* of(const Workspace& workspace, int slot, int part,
                                               int warp) {
    const int64_t place = (static_cast<int64_t>(slot) * kParts + part) * 4 + warp;
    return workspace.slots + place * kWarpVectors;
  }

  // From the first accumulators of a warp to the i-th, across the columns of two parts.
  static __device__ __forceinline__ constexpr int vector(int i) {
    return i / kColumnTiles * 4 * kWarpVectors + i % kColumnTiles * 32;
  }
};

// The warp that writes dq of the query tiles to which the last keys have added, and then tells that
// an item is done.
template <class Config, class SharedMemory>
__device__ __forceinline__ void finish(SharedMemory& smem, const BackwardParams& params,
                                       const Maps& maps, const Workspace& workspace) {
  using T = typename Config::Element;
  using Slot = DqSlot<Config>;
  const SequenceView& view = params.branch.segments[0].keys;
  const int lane = threadIdx.x % 32;
  int sum_round = 0;
  Place<Config::kJobs> place;
  for (;; place.advance()) {
    place.wait_full(smem.job_ring);
    const Job& job = smem.job[place.stage];  // read when needed: registers are scarce
    const QueryTile& queries = job.queries;
    if (job.kind == Job::kEnd) break;
    if (job.kind == Job::kItemDone) {
      if (lane == 0) workspace.counters.publish(job.number);
      place.arrive_empty(smem.job_ring);
      continue;
    }
#pragma unroll 1
    for (int half = 0; half < Config::kQueryParts; ++half) {
      __syncwarp();
      if (lane == 0) {
        ptx::fence_async_proxy_global();
        ptx::mbarrier_expect(smem.sum_full, sizeof(smem.sum));
        ptx::bulk_load(&smem.sum, Slot::of(workspace, job.slot, 2 * half, 0), sizeof(smem.sum),
                       smem.sum_full);
        ptx::mbarrier_arrive(smem.sum_full);
      }
      ptx::mbarrier_wait(smem.sum_full, sum_round);
      sum_round ^= 1;
#pragma unroll 1
      for (int warp = 0; warp < 4; ++warp) {
        const float4* warp_smem = smem.sum[0][warp][0] + lane;
        const auto pair = [&](float first, float second) {
          return ptx::pack<T>(first * params.scale, second * params.scale);
        };
        auto& dq_smem = smem.dq[warp % 2];
#pragma unroll
        for (int i = 0; i < Config::kHeadDim / 16; ++i) {
          const float4 low = warp_smem[Slot::vector(2 * i)];
          const float4 high = warp_smem[Slot::vector(2 * i + 1)];
          ptx::stmatrix_x4(
              dq_smem.at(lane % 16, 2 * i + lane / 16),
              {pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w)});
        }
        ptx::fence_async_proxy();
        __syncwarp();
        store_rows<T, Config::kHeadDim>(
            dq_smem, 0,
            {params.dq, maps.dq, view, queries, half * kWarpgroupRows + warp * kSumRows,
             params.head_dim, params.accumulate});
        if (lane == 0) ptx::tma_wait_read<1>();
      }
    }
    __syncwarp();
    if (lane == 0) ptx::store_release(workspace.turns + job.number, kFinished);
    place.arrive_empty(smem.job_ring);
  }
  if (lane == 0) ptx::tma_wait_read();
}

// The warp that waits until the slot of each streamed tile is ours.
template <class Config, class SharedMemory>
__device__ __forceinline__ void await_turns(SharedMemory& smem, const BackwardParams& params,
                                            const Plan& plan, const Workspace& workspace) {
  const Blocks& blocks = params.branch.blocks;
  for (Place<Config::kStages> place;; place.advance()) {
    place.wait_full(smem.ring);
    StreamedTile& tile = smem.tile[place.stage];
    const int number = tile.number;
    if (number < 0) break;
    int before = tile.first ? -1 : tile.key_tile - 1;
    if (blocks.rows != nullptr) {
      const QueryTile& queries = tile.queries;
      const uint32_t* bits = bits_of(blocks, params.query_blocks, queries.head, queries.first_row);
      before = key_tile_before(blocks, bits, tile.key_tile);
    }
    const auto wait = [](const int* counter, int value) {
      while (ptx::load_acquire(counter) != value) {
      }
    };
    const int query_tile = number - tile.unit * plan.query_tiles.value;
    const int earlier = plan.earlier(tile.unit, query_tile);
    if (before >= 0) {
      wait(workspace.turns + number, before + 1);
    } else if (earlier >= 0 && plan.by_unit) {
      wait(workspace.counters.done(earlier / plan.query_tiles), plan.key_tiles.value);
    } else if (earlier >= 0) {
      wait(workspace.turns + earlier, kFinished);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      tile.first = before < 0;
      ptx::mbarrier_arrive(smem.turn[place.stage]);
    }
  }
}

// The warp that tells when our turn is over, and lets go of the streamed tile.
template <class Config, class SharedMemory>
__device__ __forceinline__ void end_turns(SharedMemory& smem, const BackwardParams& params,
                                          const Workspace& workspace) {
  const Blocks& blocks = params.branch.blocks;
  Place<Config::kJobs> job_place;
  const auto write_job = [&](const Job& job) {
    job_place.wait_empty(smem.job_ring);
    __syncwarp();
    if (threadIdx.x % 32 == 0) smem.job[job_place.stage] = job;
  };
  const auto give_job = [&] {
    job_place.arrive_full(smem.job_ring);
    job_place.advance();
  };
  for (Place<Config::kStages> place;; place.advance()) {
    place.wait_full(smem.ring);
    const StreamedTile& tile = smem.tile[place.stage];
    const int number = tile.number, turn = tile.key_tile + 1, unit = tile.unit;
    const bool last = tile.marks[0] & StreamedTile::kLast;
    if (number < 0) break;
    bool complete = tile.complete;
    if (blocks.rows != nullptr) {
      const QueryTile& queries = tile.queries;
      const uint32_t* bits = bits_of(blocks, params.query_blocks, queries.head, queries.first_row);
      complete = !any_key_after(blocks, bits, tile.key_tile);
    }
    ptx::mbarrier_wait(smem.added[place.stage], place.round);
    if (complete) write_job({Job::kFinish, number, tile.slot, tile.queries});
    place.arrive_empty(smem.ring);
    // Also before the job: the release makes what the others have added visible at L2.
    if (threadIdx.x % 32 == 0) ptx::store_release(workspace.turns + number, turn);
    if (complete) give_job();
    if (last) {
      write_job({Job::kItemDone, unit, 0, {}});
      give_job();
    }
  }
  write_job({Job::kEnd, 0, 0, {}});
  give_job();
}

// A warpgroup that computes the `number`-th 64 keys of every own tile.
template <class Config, class SharedMemory>
__device__ __forceinline__ void compute(SharedMemory& smem, const BackwardParams& params,
                                        const Maps& maps, const Workspace& workspace, int number) {
  using T = typename Config::Element;
  using Scores = typename Config::Scores;
  using Dq = typename Config::Dq;
  const Branch& branch = params.branch;
  const float scale_log2 = scale_log2_of(params), unscale_log2 = 1 / scale_log2;
  const int thread = ptx::kept(threadIdx.x % 128);
  const int warp_row = thread / 32 * 16;  // of the part
  Place<Config::kKeyStages> key_place;
  Place<Config::kStages> place;
  Place<Config::kSharedStages> shared_place, sum_place;  // in dscores: written, read
  while (true) {
    const int key_stage = key_place.stage;
    key_place.wait_full(smem.key_ring);
    const OwnTile& own_tile = smem.own[key_place.twice()];
    const QueryTile& own = own_tile.keys;  // read when needed: registers are scarce
    if (own.rows == 0) break;
    auto& keys_smem = smem.keys[key_stage];
    auto& part_smem = keys_smem[number];
    const Interval* attended_smem =
        smem.attended[key_place.twice()] + 1 + number * kWarpgroupRows + warp_row;

    typename Config::Dk dk;  // over scale
    typename Config::Dv dv;
    dk.clear();
    dv.clear();
    ptx::pin(dk);
    ptx::pin(dv);
    Scores weights, dscores;
    Rounded<T, Scores> rounded_weights, rounded_dscores;
    ptx::fence_async_proxy();  // between cp.async and wgmma
    int marks;                 // of the tile at `place`
    const auto await_queries = [&] {
      place.wait_full(smem.ring);
      marks = smem.tile[place.stage].marks[number];
    };
    const auto fence_queries = [&] {  // late: the marks take a while
      ptx::fence_async_proxy_if(marks & StreamedTile::kCopied);
      ptx::wgmma_fence();
    };
    // f(element, statistic of its query).
    const auto for_each_with = [thread](Scores& product, const float* stats_smem, auto f) {
#pragma unroll
      for (int j = 0; j < Scores::kColumnTiles; ++j) {
        const float2 pair = reinterpret_cast<const float2*>(stats_smem)[4 * j + thread % 4];
        float (&own)[4] = product.at[0][j];
        f(own[0], pair.x), f(own[1], pair.y), f(own[2], pair.x), f(own[3], pair.y);
      }
    };
    // Products may add to the statistics.
    const auto begin = [&](Scores& product, const float* stats_smem, float factor) {
      if constexpr (!Config::kStatsFirst) return;
      for_each_with(product, stats_smem,
                    [&](float& element, float statistic) { element = statistic * factor; });
      ptx::pin(product);
    };
    const auto begin_scores = [&] {
      begin(weights, smem.stats[place.stage].lse_log2, -unscale_log2);
    };
    const auto begin_dscores = [&] { begin(dscores, smem.stats[place.stage].delta, -1.f); };
    const auto start_scores = [&] {
      start_multiply_transposed<T, Config::kStatsFirst>(weights, part_smem.k, smem.q[place.stage]);
    };
    const auto start_dscores = [&] {
      start_multiply_transposed<T, Config::kStatsFirst>(dscores, part_smem.v,
                                                        smem.dout[place.stage]);
    };
    // From scores, in place.
    const auto find_weights = [&] {
      ptx::pin(weights);
      if constexpr (Config::kStatsFirst) {
        weights.for_each([&](float& weight, int, int) { weight = ptx::exp2(weight * scale_log2); });
      } else {
        for_each_with(
            weights, smem.stats[place.stage].lse_log2, [&](float& weight, float lse_log2) {
              weight = ptx::exp2(fmaf(weight, scale_log2, Config::kWeightsLog2 - lse_log2));
            });
      }
      const bool cut_before = marks & StreamedTile::kCutBefore;
      const bool cut_after = marks & StreamedTile::kCutAfter;
      const bool left_out = marks & StreamedTile::kLeftOut;
      if (cut_before || cut_after || left_out) {
        const QueryTile& queries = smem.tile[place.stage].queries;
        const int first_row = queries.first_row, end_row = first_row + queries.rows;
        fill_others(weights, attended_smem,
                    {queries.head, 0, first_row, end_row, true, cut_before, cut_after, false}, 0.f);
        if (left_out) weights.clear();
      }
      ptx::pin(weights);  // here, beside what runs
    };
    // From gradients of weights, in place.
    const auto find_dscores = [&] {
      ptx::pin(dscores);
      if constexpr (Config::kStatsFirst) {
        dscores.for_each(weights, [](float& dscore, float weight, int, int) { dscore *= weight; });
      } else {
        for_each_with(dscores, smem.stats[place.stage].delta, [](float& dscore, float delta) {
          dscore = fmaf(dscore, Config::kUnscale, delta * -Config::kUnscale);
        });
        multiply_elements(dscores, rounded_weights);
      }
      ptx::pin(dscores);
    };
    // With the other warpgroup.
    const auto share_dscores = [&] {
      auto& ring = smem.shared_ring[number * Config::kSharedRings / Config::kConsumers];
      shared_place.wait_empty(ring);
#pragma unroll
      for (int i = 0; i < Scores::kColumns / 16; ++i) {
        auto& queries_smem = smem.dscores[shared_place.stage][number][i / 4];
        ptx::stmatrix_x4(matrix_row(queries_smem, thread % 32, warp_row, i % 4 * 16),
                         rounded_dscores.at[i]);
      }
      ptx::fence_async_proxy();
      __syncwarp();
      if (thread % 32 == 0) ptx::mbarrier_arrive(ring.full[shared_place.stage]);
      shared_place.advance();
    };
    const auto start_dk = [&](const auto& summed) {
      if constexpr (Config::kDscoresInRegisters) {
        start_multiply_add<T>(dk, rounded_dscores, smem.q[summed.stage]);
      } else {
        sum_place.wait_full(smem.shared_ring[number * Config::kSharedRings / Config::kConsumers]);
        ptx::wgmma_fence();
        start_multiply_add<T>(dk, smem.dscores[sum_place.stage][number][0], smem.q[summed.stage]);
      }
    };
    const auto start_dq = [&](Dq& dq) {
      const int part = Config::kQueryParts == 1 ? 0 : number;
      const int column = Config::kQueryParts == 1 ? number * Config::kDqColumns : 0;
      const auto& dscores_smem = smem.dscores[sum_place.stage];
      for (auto& ring : smem.shared_ring) sum_place.wait_full(ring);
      ptx::wgmma_fence();
      multiply_across<T, false>(dq, dscores_smem[0][part], keys_smem[0].k, column);
      multiply_across<T, true>(dq, dscores_smem[1][part], keys_smem[1].k, column);
      ptx::wgmma_commit();
    };
    const auto add_dq = [&](const Dq& dq, int slot, bool first) {
      using Slot = DqSlot<Config>;
      const int part = number * Config::kQueryParts;
      float4* slot_gmem = Slot::of(workspace, slot, part, thread / 32) + thread % 32;
      const auto for_each = [&](auto f) {
#pragma unroll
        for (int j = 0; j < Dq::kColumnTiles; ++j) {
          const float (&own)[4] = dq.at[0][j];
          f(slot_gmem + Slot::vector(j), float4{own[0], own[1], own[2], own[3]});
        }
      };
      if (first) {
        for_each([](float4* gmem, float4 value) { *gmem = value; });
      } else {
        for_each([](float4* gmem, float4 value) { ptx::add(gmem, value); });
      }
    };
    // In our turn.
    const auto end_dq = [&](const auto& summed, Dq& dq) {
      // A loop: ptxas moves no wait for wgmma above it.
      ptx::mbarrier_wait(smem.turn[summed.stage], summed.round);
      const StreamedTile& streamed = smem.tile[summed.stage];
      const int slot = streamed.slot;
      const bool first = streamed.first;
      ptx::wgmma_wait<0>();
      ptx::pin(dq);
      for (auto& ring : smem.shared_ring) sum_place.arrive_empty(ring);
      sum_place.advance();
      add_dq(dq, slot, first);
      __syncwarp();
      if (thread % 32 == 0) ptx::mbarrier_arrive(smem.added[summed.stage]);
    };
    // The copy of our rows before has read them.
    const auto let_go = [&] {
      if (thread % 32 == 0) ptx::tma_wait_read();
      __syncwarp();
    };
    // A sum, by way of the values, which are read no more.
    const auto leave = [&](auto& sum, float factor, const TensorView& tensor, const ViewMap& map,
                           int head_dim) {
      store_sum<T>(sum, factor, part_smem.v, warp_row,
                   {tensor, map, branch.queries, own, number * kWarpgroupRows + warp_row, head_dim,
                    params.accumulate});
    };
    // Beside the products that are still running.
    const auto leave_both = [&] {
      ptx::wgmma_wait<2>();
      ptx::pin(dv);
      ptx::named_barrier(kPart + number, 128);  // no warp's wgmma reads the values any more
      leave(dv, Config::kUnscale, params.dv, maps.dv, params.head_dim_v);
      ptx::wgmma_wait<1>();
      ptx::pin(dk);
      let_go();
      leave(dk, params.scale, params.dk, maps.dk, params.head_dim);
    };
    const auto end_sums = [&] {
      ptx::pin(dk);
      ptx::pin(dv);
      if constexpr (Config::kOverlapsDv) keep(rounded_weights);
      if constexpr (Config::kDscoresInRegisters) keep(rounded_dscores);
    };
    // From the weights of the tile at `place` to its sums, beside which run the scores of the next
    // one and their exponentials.
    const auto step = [&](auto has_next) {
      constexpr bool kHasNext = decltype(has_next)::value;
      rounded_weights.round(weights);
      begin_dscores();
      ptx::wgmma_fence();
      start_dscores();
      start_multiply_add<T>(dv, rounded_weights, smem.dout[place.stage]);
      ptx::wgmma_wait<1>();
      find_dscores();
      rounded_dscores.round(dscores);
      share_dscores();
      const auto summed = place;
      place.advance();
      Dq dq;
      if constexpr (kHasNext) await_queries();
      if constexpr (!Config::kOverlapsDv) {
        ptx::wgmma_wait<0>();
        keep(rounded_weights);
      }
      if constexpr (kHasNext) {
        begin_scores();
        fence_queries();
        start_scores();
      } else {
        ptx::wgmma_fence();
      }
      start_dk(summed);
      start_dq(dq);
      if constexpr (kHasNext) {
        ptx::wgmma_wait<2>();
        find_weights();
      } else {
        leave_both();
      }
      end_dq(summed, dq);
      end_sums();
    };
    if (own_tile.any_queries) {
      await_queries();
      begin_scores();
      fence_queries();
      start_scores();
      ptx::wgmma_wait<0>();
      find_weights();
#pragma unroll 1
      while (!(marks & StreamedTile::kLast)) step(std::true_type{});
      step(std::false_type{});
    }

    if (!own_tile.any_queries && !params.accumulate) {
      leave(dv, Config::kUnscale, params.dv, maps.dv, params.head_dim_v);
      let_go();
      leave(dk, params.scale, params.dk, maps.dk, params.head_dim);
    }
    let_go();
    key_place.arrive_empty(smem.key_ring);
    key_place.advance();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    backward_ordered_kernel(const __grid_constant__ BackwardParams params,
                            const __grid_constant__ Plan plan, const __grid_constant__ Maps maps,
                            const __grid_constant__ Workspace workspace) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Config::kConsumers;
    smem.key_ring.init(2 * 32, kWarps);  // of each lane: its copies, its intervals
    smem.ring.init(32 + 1, 1);           // copies of each lane; what was not copied
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(smem.turn[stage], 1);
      ptx::mbarrier_init(smem.added[stage], kWarps);
    }
    for (auto& ring : smem.shared_ring) ring.init(kWarps / Config::kSharedRings, kWarps);
    smem.job_ring.init(1, 1);
    ptx::mbarrier_init(smem.sum_full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    if (warp == 0) load<Config>(smem, params, plan, maps, workspace);
    if (warp == 1) finish<Config>(smem, params, maps, workspace);
    if (warp == 2) await_turns<Config>(smem, params, plan, workspace);
    if (warp == 3) end_turns<Config>(smem, params, workspace);
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    compute<Config>(smem, params, maps, workspace, warpgroup - 1);
  }
}

}  // namespace sparse_attn::sm90::backward_ordered
