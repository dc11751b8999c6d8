// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the portable backward kernels.
#pragma once

#include "attention/reach.h"
#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "attention/tiles.h"
#include "params.h"

namespace sparse_attn::sm80::backward {

// What a kernel sums. dk and dv of one tile fit the registers together up to head dims of 128.
enum class Sums { dq, dk_dv, dk, dv };

template <class T, int kHeadDim_, int kHeadDimV_, Sums kSums, Reach kReach>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kOwnsQueries = kSums == Sums::dq;  // else keys
  static constexpr bool kSumsDqOrDk = kSums != Sums::dv;
  static constexpr bool kSumsDv = kSums == Sums::dk_dv || kSums == Sums::dv;
  static constexpr int kSumColumns = (kSumsDqOrDk ? kHeadDim : 0) + (kSumsDv ? kHeadDimV : 0);
  static constexpr bool kMany = kReach == Reach::many && kHeadDim <= 64 && kHeadDimV <= 64;
  static constexpr int kWarpRows = kMany ? 32 : 16;  // of 16, the rows of one mma
  static constexpr int kTileOwn = kMany ? 128 : kHeadDim + kHeadDimV <= 256 ? 64 : 32;
  static constexpr int kTileStreamed = kHeadDim + kHeadDimV <= 256 ? 64 : 16;
  // Streamed rows whose weights and gradients of weights are in registers at a time.
  static constexpr int kScoreColumns = kMany && kSumColumns <= 64   ? 64
                                       : kMany || kSumColumns < 256 ? 32
                                                                    : 16;
  // Of 16 columns of own and streamed rows in a product: all, or what the registers leave room for.
  static constexpr int kStepsAtOnce = kMany && kSumColumns > 64 ? 2 : 16;
  static constexpr int kWarps = kTileOwn / kWarpRows;
  static constexpr int kThreads = 32 * kWarps;
  // On a multiprocessor: as many as have no spills and fit its shared memory.
  static constexpr int kLeastCtas = kMany || kHeadDim + kHeadDimV > 192                ? 2
                                    : kHeadDim + kHeadDimV <= 128 && kSumColumns <= 64 ? 4
                                    : kSumColumns <= 128                               ? 3
                                                                                       : 2;
  static constexpr int kStages = 2;  // one tile is computed while the next one loads

  static constexpr int kStatsRows = kOwnsQueries ? kTileOwn : kTileStreamed;  // queries' rows

  using Scores = RegisterTile<kWarpRows, kScoreColumns>;
  using Gradient = RegisterTile<kWarpRows, kHeadDim>;
  using GradientV = RegisterTile<kWarpRows, kHeadDimV>;

  struct SharedMemory {
    static constexpr int kTileRows = kTileStreamed;
    SharedTile<T, kTileOwn, kHeadDim> own;                        // q or k; in the end dq or dk
    SharedTile<T, kTileOwn, kHeadDimV> own_v;                     // dout or v; in the end dv
    SharedTile<T, kTileStreamed, kHeadDim> streamed[kStages];     // k or q
    SharedTile<T, kTileStreamed, kHeadDimV> streamed_v[kStages];  // v or dout
    RowStats stats[kOwnsQueries ? 1 : kStages][kStatsRows];       // of the queries
    // What is needed now and then, out of the way of the registers.
    QueryTile rows;  // own rows; the head is the first of those summed
    int kv_head;
    Interval attended[kMaxSegments][kTileOwn];
    KeyTiles walk;     // of thread 0
    KeyTile tiles[4];  // the one computed, the one loading, the one found; a power of 2
  };
  static_assert(sizeof(SharedMemory) <= 99 * 1024,
                "a CTA has 99 KB on compute capability 8.6, 8.9");
};

}  // namespace sparse_attn::sm80::backward
