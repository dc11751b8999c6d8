// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable forward kernel.
#pragma once

#include "attention/reach.h"
#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "attention/tiles.h"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim_, int kHeadDimV_, Reach kReach>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kMany = kReach == Reach::many && kHeadDim <= 64 && kHeadDimV <= 64;
  static constexpr int kWarpQueries = kMany ? 32 : 16;  // of 16, the rows of one mma
  static constexpr int kTileQueries = kMany ? 128 : 64;
  static constexpr int kTileKeys = kMany ? 128 : kHeadDim + kHeadDimV <= 256 ? 64 : 32;
  // Keys whose scores are in registers at a time.
  static constexpr int kScoreColumns = kTileKeys < 64 ? kTileKeys : 64;
  static constexpr int kWarps = kTileQueries / kWarpQueries;
  static constexpr int kThreads = 32 * kWarps;
  // On a multiprocessor: bounds the registers of a lane to 128 or 255, the least without spills on
  // 8.0, 8.6 and 9.0.
  static constexpr int kLeastCtas = kHeadDimV <= 64 && !kMany ? 4 : 2;
  static constexpr int kStages = 2;  // one key tile is computed while the next one loads

  using Scores = RegisterTile<kWarpQueries, kScoreColumns>;
  using Output = RegisterTile<kWarpQueries, kHeadDimV>;

  struct SharedMemory {
    static constexpr int kTileRows = kTileKeys;  // of a streamed tile
    union {  // the output is written when the queries are no longer read
      SharedTile<T, kTileQueries, kHeadDim> q;
      SharedTile<T, kTileQueries, kHeadDimV> out;
    };
    SharedTile<T, kTileKeys, kHeadDim> k[kStages];
    SharedTile<T, kTileKeys, kHeadDimV> v[kStages];
    // What is needed now and then, out of the way of the registers.
    QueryTile queries;
    const T* k_gmem;  // of the kv head
    const T* v_gmem;
    Interval attended[kMaxSegments][kTileQueries];
    KeyTiles walk;     // of thread 0
    KeyTile tiles[4];  // the one computed, the one loading, the one found; a power of 2
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::forward
