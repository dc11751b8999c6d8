// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable backward kernels.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "params.h"

namespace sparse_attn::sm80::backward {

// What a kernel sums. dk and dv of one tile fit the registers together up to head dims of 128.
enum class Sums { dq, dk_dv, dk, dv };

template <class T, int kHeadDim_, int kHeadDimV_, Sums kSums>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kOwnsQueries = kSums == Sums::dq;  // else keys
  static constexpr bool kSumsDqOrDk = kSums != Sums::dv;
  static constexpr bool kSumsDv = kSums == Sums::dk_dv || kSums == Sums::dv;
  static constexpr int kSumColumns = (kSumsDqOrDk ? kHeadDim : 0) + (kSumsDv ? kHeadDimV : 0);
  // With 32 rows a warp, a fragment of a streamed tile, once loaded, serves two mma; 16 where the
  // sums of 32 rows would not fit the registers.
  static constexpr int kWarpRows = kSumColumns <= 64 ? 32 : 16;
  static constexpr int kTileOwn = kHeadDim + kHeadDimV <= 256 ? 64 : 32;
  // Weights and their gradient take the registers that the sums leave.
  static constexpr int kTileStreamed = kSumColumns == 128 ? 64 : kSumColumns < 256 ? 32 : 16;
  static constexpr int kWarps = kTileOwn / kWarpRows;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kLeastCtas = 8 / kWarps;  // on a multiprocessor: up to 255 registers a lane
  static constexpr int kStages = 2;              // one tile is computed while the next one loads

  using Scores = RegisterTile<kWarpRows, kTileStreamed>;
  using Gradient = RegisterTile<kWarpRows, kHeadDim>;
  using GradientV = RegisterTile<kWarpRows, kHeadDimV>;

  struct SharedMemory {
    SharedTile<T, kTileOwn, kHeadDim> own;                        // q or k; in the end dq or dk
    SharedTile<T, kTileOwn, kHeadDimV> own_v;                     // dout or v; in the end dv
    SharedTile<T, kTileStreamed, kHeadDim> streamed[kStages];     // k or q
    SharedTile<T, kTileStreamed, kHeadDimV> streamed_v[kStages];  // v or dout
    RowStats stats[kStages][kTileStreamed];                       // of streamed queries
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::backward
