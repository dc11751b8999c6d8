// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable backward kernels.
#pragma once

#include "attention/shared_tile.cuh"
#include "params.h"

namespace sparse_attn::sm80::backward {

template <class T, int kHeadDim_, int kHeadDimV_, Owner kOwner_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr Owner kOwner = kOwner_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLeastCtas = 2;  // on a multiprocessor: up to 255 registers, no spills
  static constexpr int kTileOwn = 16 * kWarps;  // a warp owns 16 rows, those of one mma
  // Scores and their gradient take kTileStreamed registers a lane, dk and dv (kHeadDim + kHeadDimV)
  // / 2.
  static constexpr int kTileStreamed = kHeadDim + kHeadDimV <= 128 ? 64 : 32;
  static constexpr int kStages = 2;  // one tile is computed while the next one loads

  using OwnTile = SharedTile<T, kTileOwn, kHeadDim>;
  using OwnTileV = SharedTile<T, kTileOwn, kHeadDimV>;
  using StreamedTile = SharedTile<T, kTileStreamed, kHeadDim>;
  using StreamedTileV = SharedTile<T, kTileStreamed, kHeadDimV>;

  struct SharedMemory {
    OwnTile own;                             // q or k; in the end dq or dk
    OwnTileV own_v;                          // dout or v; in the end dv
    StreamedTile streamed[kStages];          // k or q
    StreamedTileV streamed_v[kStages];       // v or dout
    RowStats stats[kStages][kTileStreamed];  // of streamed queries
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::backward
