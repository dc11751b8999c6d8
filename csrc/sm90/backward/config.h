// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the Hopper backward kernels.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "params.h"
#include "sm90/query_tiles.h"
#include "sm90/ring.cuh"
#include "sm90/view_map.h"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::backward {

// How the tensor memory accelerator reads the tensors of a call.
struct BackwardMaps {
  ViewMap own;
  ViewMap own_v;
  ViewMap streamed[kMaxSegments];
  ViewMap streamed_v[kMaxSegments];
};

// Of queries, what RowStats holds: a lane reads neighbouring ones of a kind together.
template <int kRows>
struct alignas(16) Stats {
  float lse_log2[kRows];
  float delta[kRows];
};

// The gradients of a launch: of queries; of keys and values, or of one of these where the registers
// do not hold both.
enum class Sums { dq, dk_dv, dk, dv };

template <class T, int kHeadDim_, int kHeadDimV_, Sums kSums>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kOwnsQueries = kSums == Sums::dq;  // else keys
  static constexpr bool kSumsDqOrDk = kSums != Sums::dv;
  static constexpr bool kSumsDv = kSums == Sums::dk_dv || kSums == Sums::dv;
  static constexpr bool kNarrow = kHeadDim <= 32 && kHeadDimV <= 32;
  static constexpr bool kWide = kHeadDim + kHeadDimV > 256;
  static constexpr int kConsumers = 2;  // warpgroups that compute
  static constexpr int kTileOwn = kConsumers * kWarpgroupRows;
  static constexpr int kTileStreamed = kNarrow || kWide ? 32 : 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kStages = kHeadDim + kHeadDimV <= 192 ? 4 : 2;  // streamed tiles in flight
  // The next own rows load while these are computed, where there is room for both.
  static constexpr int kOwnStages = kWide ? 1 : 2;
  // Whether the sums of a tile run beside the products of the next one: not where the registers of
  // the sums leave no room.
  static constexpr bool kOverlapsSums =
      kNarrow ? kOwnsQueries : kHeadDim + kHeadDimV <= (kOwnsQueries ? 192 : 128);
  // Rows of 64 bytes, or of many boxes, come faster as copies of 128 threads than by tensor map.
  static constexpr bool kByMap = !kNarrow && !kWide;
  // On a multiprocessor; then the registers of a lane that loads and of one that computes.
  static constexpr int kCtas = kNarrow ? 2 : 1;
  static constexpr int kLoadRegisters = kNarrow ? 48 : kWide ? 88 : 56;
  static constexpr int kComputeRegisters = kNarrow ? 96 : kWide ? 208 : 224;
  // What a CTA starts with is all there is to share.
  static constexpr int kRegisters = 65536 / (kCtas * kThreads) / 8 * 8;
  static_assert(kLoadRegisters + kConsumers * kComputeRegisters <= (1 + kConsumers) * kRegisters);

  using Scores = RegisterTile<16, kTileStreamed>;  // of a warp
  using Gradient = RegisterTile<16, kHeadDim>;
  using GradientV = RegisterTile<16, kHeadDimV>;

  using Own = SharedTile<T, kWarpgroupRows, kHeadDim>;
  using OwnV = SharedTile<T, kWarpgroupRows, kHeadDimV>;
  using Streamed = SharedTile<T, kTileStreamed, kHeadDim>;
  using StreamedV = SharedTile<T, kTileStreamed, kHeadDimV>;

  struct Part {
    Own own;     // q or k; in the end dq or dk
    OwnV own_v;  // dout or v; in the end dv
  };
  struct OwnTile {
    Part part[kConsumers];
  };

  struct SharedMemory {
    OwnTile own[kOwnStages];
    Streamed streamed[kStages];     // k or q
    StreamedV streamed_v[kStages];  // v or dout
    // Of the queries, own or streamed.
    Stats<kOwnsQueries ? kTileOwn : kTileStreamed> stats[kOwnsQueries ? kOwnStages : kStages];
    QueryTile rows[kOwnStages];  // the head is the first of those summed; no row: the last tile
    int next_tile[2];            // the numbers of this tile and the next, in turns
    Interval attended[kOwnStages][kMaxSegments][kTileOwn];
    bool any_streamed[kOwnStages];
    SeenTile tile[kStages][kConsumers];
    RingBarriers<kOwnStages> own_ring;
    RingBarriers<kStages> ring;
  };
  static_assert(kCtas * (sizeof(SharedMemory) + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB, a CTA takes 1 KB more than it asks for");
};

}  // namespace sparse_attn::sm90::backward
