// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the Hopper backward kernel of bands.
#pragma once

#include <type_traits>

#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "params.h"
#include "sm90/backward_band/fits.h"
#include "sm90/ring.cuh"
#include "sm90/store_sum.cuh"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::backward_band {

constexpr int kConsumers = 2;  // warpgroups that compute
static_assert(kTileRows == kConsumers * kWarpgroupRows);
constexpr int kParts = kTileRows / kWarpgroupRows;  // a tile comes 64 rows at a time
constexpr int kStatsWarps = 2;

// The query rows that each key of a tile is attended by, counted from the tile's first row: kFar
// ends those of a key that lacks no later query, and begins those of a key that does not exist.
struct Band {
  int16_t first[kTileRows];
  int16_t end[kTileRows];
  // Bit 4 i + j, of the i-th 64 keys and the j-th 64 queries from the tile's first on: whether any
  // pair is attended; 8 bits on: whether a key lacks the first queries; 16 bits on: the last.
  uint32_t seen;
};

constexpr int kFar = 2 * kTileRows;  // no step has queries from there on

// Of some queries.
struct alignas(16) Stats {
  float lse_log2[kWarpgroupRows];
  float delta[kWarpgroupRows];
};

// A tile of queries beside the keys of the tile before, and of its own rows.
struct Step {
  QueryTile tile;  // no row: the last step
  struct Kind {
    uint32_t parts : 2;       // of 64 queries
    uint32_t back : 1;        // the keys of the tile before
    uint32_t loads_back : 1;  // which begin here: another CTA sums their gradients
    uint32_t own : 1;         // the keys of the tile
    uint32_t keeps_own : 1;   // which the queries of the next tile attend too
  } kind;                     // one word, to be read once
};

struct Nothing {};

template <class T, int kHeadDim_, int kHeadDimV_>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kColumns = kHeadDim + kHeadDimV;
  static constexpr bool kNarrow = kColumns <= 64;
  static constexpr bool kScarce = kColumns > 128;  // what follows is
  // dk has shared memory to leave through: else it leaves through the values, before dv.
  static constexpr bool kDkBesideDv = kColumns == 128;
  static constexpr int kKeyStages = !kNarrow && kColumns <= 128 ? 3 : 2;  // of 128
  static constexpr int kValueStages = kDkBesideDv       ? 5
                                      : kColumns <= 192 ? kParts * kKeyStages
                                                        : 3;  // of 64
  // Values of a tile that load before its keys: others wait for the tile before.
  static constexpr int kValuesFirst = kValueStages > 3 ? kParts : 1;
  static constexpr int kQueryStages = kColumns <= 128 ? 4 : kColumns <= 192 ? 3 : 2;  // of 64
  static constexpr int kStepStages = 4;
  static constexpr int kOutStages = kNarrow ? 3 : kScarce ? 1 : 2;  // of 64
  // What a sum is added to comes to the multiprocessor, at the rate of a copy: L2 adds at 14 %
  // less.
  static constexpr bool kFetches = kHeadDim > 64 || kDkBesideDv;
  // On a multiprocessor; then the registers of a lane that loads and of one that computes.
  static constexpr int kCtas = kNarrow ? 2 : 1;
  static constexpr int kLoadRegisters = kNarrow ? 32 : 40;
  static constexpr int kComputeRegisters = kNarrow ? 104 : 232;
  // What a CTA starts with is all there is to share.
  static constexpr int kRegisters = 65536 / (kCtas * kThreads) / 8 * 8;
  static_assert(kLoadRegisters + kConsumers * kComputeRegisters <= (1 + kConsumers) * kRegisters);

  // Of a warp: keys, and as many queries of a part as there are registers for at a time.
  using Scores = RegisterTile<16, kNarrow ? kWarpgroupRows / 2 : kWarpgroupRows>;
  using GradientK = RegisterTile<16, kHeadDim>;
  using GradientV = RegisterTile<16, kHeadDimV>;
  using GradientQ = RegisterTile<16, kHeadDim>;

  using Part = SharedTile<T, kWarpgroupRows, kHeadDim>;
  using PartV = SharedTile<T, kWarpgroupRows, kHeadDimV>;
  // As a warp stores sums.
  using WarpPart = SharedTile<T, kSumRows, kHeadDim>;
  using WarpPartV = SharedTile<T, kSumRows, kHeadDimV>;

  struct SharedMemory {
    Part k[kKeyStages][kParts];
    PartV v[kValueStages];
    Part q[kQueryStages];
    PartV dout[kQueryStages];
    // Gradients of scores, keys by queries; `slot_of` tells where.
    SharedTile<T, kWarpgroupRows, kWarpgroupRows> dscores[4];
    PartV out[kOutStages];
    std::conditional_t<kDkBesideDv, Part[kConsumers], Nothing> dk;
    uint64_t earlier_full[2][4 * kConsumers];  // of each warp that computes
    Stats stats[kQueryStages];
    Band band[kKeyStages];
    Step step[kStepStages];
    RingBarriers<kKeyStages> k_ring;
    RingBarriers<kValueStages> v_ring;
    RingBarriers<kQueryStages> query_ring, stats_ring;
    RingBarriers<kOutStages> out_ring;
    RingBarriers<kStepStages> step_ring;
    RingBarriers<1> dscores_ring;
  };
  static_assert(kCtas * (sizeof(SharedMemory) + 1024) <= 228 * 1024,
                "a multiprocessor has 228 KB, a CTA takes 1 KB more than it asks for");
};

}  // namespace sparse_attn::sm90::backward_band
