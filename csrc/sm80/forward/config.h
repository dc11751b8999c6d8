// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable forward kernel.
#pragma once

#include "attention/shared_tile.cuh"

namespace sparse_attn::sm80::forward {

template <class T, int kHeadDim_, int kHeadDimV_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLeastCtas = 2;  // on a multiprocessor: up to 255 registers, no spills
  static constexpr int kTileQueries = 16 * kWarps;  // a warp owns 16 queries, the rows of one mma
  static constexpr int kTileKeys = 64;
  static constexpr int kStages = 2;  // one key tile is computed while the next one loads

  using QueryTile = SharedTile<T, kTileQueries, kHeadDim>;
  using OutputTile = SharedTile<T, kTileQueries, kHeadDimV>;
  using KeyTile = SharedTile<T, kTileKeys, kHeadDim>;
  using ValueTile = SharedTile<T, kTileKeys, kHeadDimV>;

  struct SharedMemory {
    union {  // the queries move to registers before anything is written to the output
      QueryTile q;
      OutputTile out;
    };
    KeyTile k[kStages];
    ValueTile v[kStages];
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::forward
