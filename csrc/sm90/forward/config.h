// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the Hopper forward kernel.
#pragma once

#include <type_traits>

#include "attention/reach.h"
#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "sm90/forward/key_pair.cuh"
#include "sm90/forward/part_tile.cuh"
#include "sm90/forward/warp_tile.cuh"
#include "sm90/query_tiles.h"
#include "sm90/ring.cuh"
#include "sm90/view_map.h"

namespace sparse_attn::sm90::forward {

// How the tensor memory accelerator reads the tensors of a branch.
struct BranchMaps {
  ViewMap q;
  ViewMap out;
  ViewMap k[kMaxSegments];
  ViewMap v[kMaxSegments];
  bool some_copied;  // tiles that no map holds, copied by cp.async
};

template <int kBranches>
struct ForwardMaps {
  BranchMaps branch[kBranches];
};

// Few keys are bound by bytes and latency: two small CTAs a multiprocessor and tiles of 64 keys, of
// which a window or a chunk needs few. Many are bound by arithmetic: large products. Scattered ones
// are many, but come 64 at a time.
template <class T, int kHeadDim_, int kHeadDimV_, Reach kReach, int kBranches>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kScattered = kReach == Reach::scattered;
  static constexpr bool kMany = kReach == Reach::many || kScattered;
  static constexpr bool kSmall = kHeadDim <= 64 && kHeadDimV <= 64;
  static constexpr bool kWide = kHeadDim + kHeadDimV > 256;
  static constexpr int kConsumers = kMany && kSmall ? 3 : 2;  // warpgroups that compute
  static constexpr int kTileQueries = kConsumers * kWarpgroupRows;
  static constexpr int kTileKeys = kMany && !kWide && !kScattered ? 128 : 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // A tile is taken while there is no room yet for its queries: its keys go ahead.
  static constexpr bool kAhead = !kMany && (kBranches > 1 || kHeadDim <= 32);
  // Tiles of keys, and of values.
  static constexpr int kKeyStages = kScattered                    ? 10
                                    : kWide || (kMany && !kSmall) ? 2
                                    : kMany || kBranches == 1     ? 4
                                                                  : 3;
  // The next queries load while these are computed, where there is room for both.
  static constexpr int kQueryStages = kWide ? 1 : 2;
  static constexpr int kTakenStages = kQueryStages + kAhead;
  // Else there is no room for what earlier branches left.
  static constexpr bool kMerges = !kWide && !kScattered;
  // Of that, for as many parts of the queries at a time; or, for want of room, for one.
  static constexpr int kEarlierTiles = (kMany ? kSmall : kBranches > 1) ? kConsumers : 1;
  static constexpr int kCtas = kMany || !kSmall ? 1 : 2;  // on a multiprocessor
  // Warpgroups that have a multiprocessor to themselves compute the parts of every other tile in
  // reverse: the later parts may attend more keys.
  static constexpr bool kTurns = kCtas == 1 && kQueryStages == 2;
  // Where registers leave room: queries stay in them, for fewer bytes from shared memory; and so
  // many blocks of 16 keys get their weights while the sums that need those before still run.
  static constexpr bool kHoldsQueries = kScattered ? kHeadDim > 32 : kMany && !kSmall && !kWide;
  static constexpr int kEarlyBlocks = kHoldsQueries && !kScattered ? 3 : 0;
  // Of a lane that loads and of one that computes.
  static constexpr int kLoadRegisters = kConsumers == 3  ? 32
                                        : kCtas == 2     ? 48
                                        : kMany && kWide ? 40
                                                         : 56;
  static constexpr int kComputeRegisters = kConsumers == 3  ? 160
                                           : kCtas == 2     ? 96
                                           : kMany && kWide ? 232
                                                            : 224;
  // What a CTA starts with is all there is to share.
  static constexpr int kRegisters = 65536 / (kCtas * kThreads) / 8 * 8;
  static_assert(kLoadRegisters + kConsumers * kComputeRegisters <= (1 + kConsumers) * kRegisters);

  using Scores = RegisterTile<16, kTileKeys>;  // of a warp
  using Output = RegisterTile<16, kHeadDimV>;

  using QueryPart = SharedTile<T, kWarpgroupRows, kHeadDim>;  // of a warpgroup
  using OutputPart = SharedTile<T, kWarpgroupRows, kHeadDimV>;
  using Keys = SharedTile<T, kTileKeys, kHeadDim>;
  using Values = SharedTile<T, kTileKeys, kHeadDimV>;

  struct Queries {
    union {  // the output is written when the queries are no longer read
      QueryPart q;
      OutputPart out;
    } part[kConsumers];
  };
  struct Nothing {};

  struct SharedMemory {
    Queries queries[kQueryStages];
    // What earlier branches left, for each warpgroup that computes, or for one at a time.
    std::conditional_t<kMerges, OutputPart[kEarlierTiles], Nothing> earlier;
    Keys k[kKeyStages];
    Values v[kKeyStages];
    struct Taken {
      int branch;
      QueryTile queries;  // no row: the last
      Interval attended[kMaxSegments][kTileQueries];
    } taken[kTakenStages];
    int taken_at[kQueryStages];  // stage of what was taken, of the queries at a stage
    // Of the keys at a stage, as each warpgroup or each warp that computes sees them; scattered
    // ones are in a list of each warpgroup.
    std::conditional_t<kScattered, KeyPair[kConsumers][kPairs],
                       std::conditional_t<kMany, PartTile[kKeyStages][kConsumers],
                                          WarpTile[kKeyStages][4 * kConsumers]>>
        tile;
    float earlier_lse[kEarlierTiles][kWarpgroupRows];
    float lse[kQueryStages][kConsumers][kWarpgroupRows];
    RingBarriers<kQueryStages> query_ring;
    uint64_t found[kTakenStages];                 // what the queries attend
    uint64_t computed[kQueryStages][kConsumers];  // the output and the lse
    uint64_t earlier_full[kConsumers];            // of a warpgroup that computes
    uint64_t earlier_empty[kEarlierTiles];
    RingBarriers<kKeyStages> k_ring;  // scattered: of the values, too
    RingBarriers<kKeyStages> v_ring;
    std::conditional_t<kScattered, uint64_t[kConsumers][kPairs], Nothing> listed;
  };
  static_assert(!kScattered || kTakenStages == kQueryStages);
  static_assert(!kScattered || kKeyStages + kTakenStages < kPairs, "a list would overrun");
  static_assert(kCtas * (sizeof(SharedMemory) + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB, a CTA takes 1 KB more than it asks for");
};

}  // namespace sparse_attn::sm90::forward
