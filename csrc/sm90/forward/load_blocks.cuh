// SPDX-License-Identifier: Apache-2.0
// The warp that loads keys and values, where they are scattered in blocks of 64.
#pragma once

#include <type_traits>

#include "params.h"
#include "ptx/elect.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/forward/config.h"
#include "sm90/forward/parts.cuh"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

// The stages of keys and values, taken as they get free, not in turns. By whole warps.
template <int kStages>
struct FreeStages {
  static_assert(kStages <= 32, "a lane looks at each");
  uint32_t rounds = 0;  // a bit for each stage: parity of the times it was taken
  uint32_t free = 0;    // those seen to be free

  __device__ __forceinline__ int round(int stage) const { return rounds >> stage & 1; }

  // One that is free, when there is one.
  __device__ __forceinline__ int find(RingBarriers<kStages>& ring) {
    const int lane = threadIdx.x % 32;
    while (free == 0) {
      const bool ended = lane < kStages && ptx::mbarrier_ended(ring.empty[lane], round(lane) ^ 1);
      free = __ballot_sync(0xffffffff, ended);
      __syncwarp();
    }
    return lowest_bit(free);
  }

  __device__ __forceinline__ void take(int stage) {
    rounds ^= 1u << stage;
    free ^= 1u << stage;
  }
};

// Walks the blocks that some warpgroup attends. Each of the first lanes tells one warpgroup of
// those that it attends, and lets go of the others in its place.
template <class Config, class Tiles, class SharedMemory>
__device__ __forceinline__ void load_blocks(SharedMemory& smem, const ForwardParams& params,
                                            const ForwardMaps<Tiles::kBranches>& all_maps) {
  constexpr int kBlock = Config::kTileKeys, kParts = Config::kConsumers;
  constexpr int kWords = 32 / kParts;  // of bits that a warp reads at a time, for each part
  constexpr int kBytes = sizeof(smem.k[0].elements) + sizeof(smem.v[0].elements);
  const int warpgroup = threadIdx.x % 32 % kParts, lane_word = threadIdx.x % 32 / kParts;
  const bool lists = lane_word == 0;
  const Blocks& blocks = params.branches[0].blocks;
  const BranchMaps& maps = all_maps.branch[0];
  Place<Config::kTakenStages> taken_place;
  FreeStages<Config::kKeyStages> stages;
  int listed = 0;
  while (true) {
    const auto& taken = smem.taken[taken_place.stage];
    ptx::mbarrier_wait(smem.found[taken_place.stage], taken_place.round);
    const QueryTile& queries = taken.queries;
    if (queries.rows == 0) break;
    const int batch = queries.batch, kv_head = kv_head_of(params, queries.head);
    const int number = part_number<Config>(warpgroup, taken_place.stage);
    const QueryTile part = part_of(queries, number);
    const Interval* attended_smem = taken.attended[0] + number * kWarpgroupRows;
    const int end = taken.attended[0][queries.rows - 1].end;
    // What all queries of the part attend.
    const Interval every = {attended_smem[greatest(part.rows - 1, 0)].first, attended_smem[0].end};
    const AttendedBlocks attended = AttendedBlocks::of(
        blocks, queries.head, part.first_row / kBlock, part.first_row / kBlock + 1);

    uint32_t pair_bits = 0;
    const auto list_pair = [&] {
      const int slot = listed++ % kPairs;
      smem.tile[warpgroup][slot].bits = pair_bits;
      ptx::mbarrier_arrive(smem.listed[warpgroup][slot]);
      pair_bits = 0;
    };
    uint32_t held = 0;
#pragma unroll 1
    for (int word = 0; word * 32 * kBlock < end; ++word) {
      if (word % kWords == 0) {
        const int index = word + lane_word;
        held = part.rows > 0 && index < blocks.words ? attended.word(index) : 0;
      }
      const uint32_t own = __shfl_sync(0xffffffff, held, word % kWords * kParts + warpgroup);
      uint32_t any = __reduce_or_sync(0xffffffff, own);
#pragma unroll 1
      for (; any != 0; any &= any - 1) {
        const int bit = lowest_bit(any), first_row = (32 * word + bit) * kBlock;
        if (first_row >= end) break;
        const int stage = stages.find(smem.k_ring);
        if (ptx::elect()) {
          uint64_t& full = smem.k_ring.full[stage];
          const auto load = [&](auto& tile_smem, const ViewMap& map) {
            using Tile = std::remove_reference_t<decltype(tile_smem)>;
#pragma unroll
            for (int panel = 0; panel < Tile::kColumns / Tile::kPanelColumns; ++panel) {
              ptx::tma_load(tile_smem.elements + panel * Tile::kPanelElements, map.map,
                            panel * Tile::kPanelColumns, first_row, 0, kv_head, batch, full);
            }
          };
          ptx::mbarrier_expect(full, kBytes);
          load(smem.k[stage], maps.k[0]);
          load(smem.v[stage], maps.v[0]);
          ptx::mbarrier_arrive(full);
        }
        if (lists && own >> bit & 1) {
          KeyPair& pair = smem.tile[warpgroup][listed % kPairs];
          const int count = pair_bits & 3;
          pair.first_row[count] = first_row;
          pair.place[count] = 2 * stage + stages.round(stage);
          pair_bits =
              KeyPair::added(pair_bits, first_row < every.first || first_row + kBlock > every.end);
          if (count == 1) list_pair();
        } else if (lists) {
          ptx::mbarrier_arrive(smem.k_ring.empty[stage], 4);
        }
        stages.take(stage);
      }
    }
    if (lists) {
      if (pair_bits != 0) list_pair();
      list_pair();  // the end
    }
    __syncwarp();
    taken_place.advance();
  }
}

}  // namespace sparse_attn::sm90::forward
