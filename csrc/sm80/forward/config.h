// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable forward kernel.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim_, int kHeadDimV_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kWarpQueries = 16;  // the rows of one mma
  static constexpr int kTileQueries = 64;
  static constexpr int kTileKeys = kHeadDim + kHeadDimV <= 256 ? 64 : 32;
  static constexpr int kWarps = kTileQueries / kWarpQueries;
  static constexpr int kThreads = 32 * kWarps;
  // On a multiprocessor: bounds the registers of a lane to 128 or 255, the least without spills. At
  // head dim 64 four CTAs of 16 queries a warp beat four of 32 with half as many warps, on an H100.
  static constexpr int kLeastCtas = kHeadDimV == 64 ? 4 : 2;
  static constexpr int kStages = 2;  // one key tile is computed while the next one loads

  using Scores = RegisterTile<kWarpQueries, kTileKeys>;
  using Output = RegisterTile<kWarpQueries, kHeadDimV>;

  struct SharedMemory {
    union {  // the output is written when the queries are no longer read
      SharedTile<T, kTileQueries, kHeadDim> q;
      SharedTile<T, kTileQueries, kHeadDimV> out;
    };
    SharedTile<T, kTileKeys, kHeadDim> k[kStages];
    SharedTile<T, kTileKeys, kHeadDimV> v[kStages];
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::forward
