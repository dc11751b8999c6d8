// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the Hopper forward kernel.
#pragma once

#include "attention/reach.h"
#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "sm90/query_tiles.h"
#include "sm90/ring.cuh"
#include "sm90/view_map.h"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

// How the tensor memory accelerator reads the tensors of a call.
struct ForwardMaps {
  ViewMap q;
  ViewMap k[kMaxSegments];
  ViewMap v[kMaxSegments];
  bool some_copied;  // tiles that no map holds, copied by cp.async
};

// Few keys are bound by bytes and latency: two small CTAs a multiprocessor and tiles of 64 keys, of
// which a window or a chunk needs few. Many are bound by arithmetic: large products.
template <class T, int kHeadDim_, int kHeadDimV_, Reach kReach>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kMany = kReach == Reach::many;
  static constexpr bool kSmall = kHeadDim <= 64 && kHeadDimV <= 64;
  static constexpr bool kWide = kHeadDim + kHeadDimV > 256;
  static constexpr int kConsumers = kMany && kSmall ? 3 : 2;  // warpgroups that compute
  static constexpr int kTileQueries = kConsumers * kWarpgroupRows;
  static constexpr int kTileKeys = kMany && !kWide ? 128 : 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kKeyStages = kWide || (kMany && !kSmall) ? 2 : 4;  // of keys, and of values
  // The next queries load while these are computed, where there is room for both.
  static constexpr int kQueryStages = kWide ? 1 : 2;
  static constexpr int kCtas = kMany || !kSmall ? 1 : 2;  // on a multiprocessor
  // Of a lane that loads and of one that computes.
  static constexpr int kLoadRegisters = kConsumers == 3 ? 32 : kCtas == 2 ? 48 : 56;
  static constexpr int kComputeRegisters = kConsumers == 3 ? 160 : kCtas == 2 ? 96 : 224;
  // The scores of a tile beside the sums of the one before: if there are registers for both.
  static constexpr bool kOverlap = kCtas == 1 || kHeadDimV <= 32;
  // Who finds what each query attends: with two CTAs, warps that compute have no issue slots to
  // spare.
  static constexpr bool kLoaderFinds = kCtas == 2;
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

  struct SharedMemory {
    Queries queries[kQueryStages];
    Keys k[kKeyStages];
    Values v[kKeyStages];
    QueryTile query_tile[kQueryStages];  // no row: the last
    bool any_keys[kQueryStages];
    SeenTile tile[kKeyStages][kConsumers];  // of the keys at a stage
    Interval attended[kQueryStages][kMaxSegments][kTileQueries];
    RingBarriers<kQueryStages> query_ring;
    RingBarriers<kKeyStages> k_ring;
    RingBarriers<kKeyStages> v_ring;
  };
  static_assert(kCtas * (sizeof(SharedMemory) + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB, a CTA takes 1 KB more than it asks for");
};

}  // namespace sparse_attn::sm90::forward
