// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the ordered backward kernel.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/shared_tile.cuh"
#include "sm90/backward_ordered/plan.h"
#include "sm90/ring.cuh"
#include "sm90/store_sum.cuh"
#include "sm90/tickets.cuh"
#include "sm90/view_map.h"
#include "sm90/walk.cuh"

namespace sparse_attn::sm90::backward_ordered {

// How the tensor memory accelerator reads and writes the tensors of a call.
struct Maps {
  ViewMap q, dout, k, v;
  ViewMap dq, dk, dv;  // of kSumRows rows
};

// Where dq is summed, and what CTAs tell each other.
struct Workspace {
  Counters counters;  // the ticket; items done, by unit
  int* turns;         // of each query tile: the key tile that has added last, and 1
  float4* slots;
};

// Statistics of the queries of a tile.
template <int kQueries>
struct alignas(16) Stats {
  float lse_log2[kQueries];
  float delta[kQueries];
};

// A tile of keys.
struct OwnTile {
  QueryTile keys;  // no row: the end
  int unit;
  int first, end;  // query tiles, by the intervals alone
  int query_rows;  // of the group
  bool any_queries;
};

// A tile of queries as the warp that loads leaves it to the others.
struct StreamedTile {
  // As the keys of each warpgroup see it: one read.
  enum Mark {
    kCutBefore = 1,  // some key is not attended by its first rows
    kCutAfter = 2,   // by its last ones, or it is not whole
    kLeftOut = 4,    // no key is attended: blocks
    kCopied = 8,     // by ordinary copies, else by the tensor memory accelerator
    kLast = 16,      // of its keys
  };
  int marks[2];
  bool first;     // no keys before add to its dq
  bool complete;  // nor after; with blocks others find both
  int key_tile;
  int unit;
  int number;  // of all query tiles of the launch; negative: the end
  int slot;
  QueryTile queries;
};

// What is left to do when some keys have added.
struct Job {
  enum Kind { kFinish, kItemDone, kEnd } kind;
  int number;  // of a query tile whose dq is complete; of a unit
  int slot;
  QueryTile queries;
};

template <class T, int kHeadDim_, int kHeadDimV_, int kTileQueries_>
struct Config {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kTileQueries = kTileQueries_;
  static constexpr int kQueryParts = kTileQueries / kWarpgroupRows;  // of 64
  static constexpr int kConsumers = 2;                               // warpgroups that compute
  static_assert(kTileKeys == kConsumers * kWarpgroupRows);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kCtas = 1;  // on a multiprocessor
  static constexpr bool kLong = kQueryParts > 1;
  static constexpr bool kWide = kHeadDim + kHeadDimV > 192;
  static constexpr int kStages = kHeadDim + kHeadDimV <= 128 && !kLong ? 5 : 3;  // of queries
  static constexpr int kKeyStages = kWide ? 1 : 2;
  static constexpr int kSharedStages = kWide || kLong ? 1 : 2;  // of dscores
  static constexpr int kJobs = 16;  // the queries next to the keys are complete all at once
  static constexpr int kDqColumns = kHeadDim / 2;  // that lie together in a slot
  // Where registers are scarce: dv is summed before the next scores are started, and the left
  // operand of the sum of dk is in shared memory.
  static constexpr bool kOverlapsDv = !kWide && !kLong;
  static constexpr bool kDscoresInRegisters = !kWide;
  // Products add to the statistics; where a tile is long, these are read when products have ended.
  static constexpr bool kStatsFirst = !kLong;
  // Registers do not hold dscores and weights of a long tile in fp32: it has weights in 16 bits for
  // both sums. They are 2^8 times as large, so that those of 2^20 keys are normal numbers in fp16.
  static constexpr float kWeightsLog2 = kLong ? 8.f : 0.f;
  static constexpr float kUnscale = kLong ? 1.f / 256 : 1.f;
  // One, or one of each warpgroup where who sums dk waits for its own dscores alone.
  static constexpr int kSharedRings = kDscoresInRegisters ? 1 : kConsumers;
  // Of a lane that loads and of one that computes.
  static constexpr int kLoadRegisters = 56;
  static constexpr int kComputeRegisters = 224;
  // What a CTA starts with is all there is to share.
  static constexpr int kRegisters = 65536 / (kCtas * kThreads) / 8 * 8;
  static_assert(kLoadRegisters + kConsumers * kComputeRegisters <= (1 + kConsumers) * kRegisters);

  using Scores = RegisterTile<16, kTileQueries>;  // of a warp
  using Dk = RegisterTile<16, kHeadDim>;
  using Dv = RegisterTile<16, kHeadDimV>;
  using Dq = RegisterTile<16, kQueryParts * kDqColumns>;  // half of a tile's

  using Rows = SharedTile<T, kWarpgroupRows, kHeadDim>;
  using RowsV = SharedTile<T, kWarpgroupRows, kHeadDimV>;
  using SumRows = SharedTile<T, kSumRows, kHeadDim>;
  using SumRowsV = SharedTile<T, kSumRows, kHeadDimV>;
  using Queries = SharedTile<T, kTileQueries, kHeadDim>;
  using QueriesV = SharedTile<T, kTileQueries, kHeadDimV>;

  struct Keys {
    Rows k;
    RowsV v;  // in the end dv, then dk
  };

  struct SharedMemory {
    Keys keys[kKeyStages][kConsumers];
    Queries q[kStages];
    QueriesV dout[kStages];
    // Transposed: rows are keys.
    SharedTile<T, kWarpgroupRows, 64> dscores[kSharedStages][kConsumers][kQueryParts];
    // dq of 64 queries as slots have it: of each half of the columns the rows of four warps, 8
    // columns at a time; a lane's part. And rounded, on its way out.
    float4 sum[2][4][kDqColumns / 8][32];
    SumRows dq[2];
    Stats<kTileQueries> stats[kStages];
    StreamedTile tile[kStages];
    // More than keys: who computes reads these of an item until it lets go of its keys.
    OwnTile own[2 * kKeyStages];
    // Queries, by key; and of the keys beside these.
    Interval attended[2 * kKeyStages][1 + kTileKeys + 1];
    Job job[kJobs];
    RingBarriers<kJobs> job_ring;
    RingBarriers<kKeyStages> key_ring;
    RingBarriers<kStages> ring;
    RingBarriers<kSharedStages> shared_ring[kSharedRings];  // of dscores
    uint64_t turn[kStages];                                 // the slot of the tile is ours
    uint64_t added[kStages];                                // dq is added to it
    uint64_t sum_full;
  };
  static_assert(sizeof(SharedMemory) <= 227 * 1024, "what a CTA may have");
};

}  // namespace sparse_attn::sm90::backward_ordered
