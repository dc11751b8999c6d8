// SPDX-License-Identifier: Apache-2.0
// Which items a CTA that stays works on, and how an item waits for others of the same launch.
//
// Where items wait, or differ in length, or are so many that it counts that some multiprocessors
// are faster than others, they are handed out by tickets: in order, to whoever is there to take the
// next one. A CTA works on its tickets in order, and an item waits only for smaller tickets. So the
// least ticket that is not done waits for nobody, whichever CTAs are on the GPU and whatever else
// runs there. For this to hold nothing that waits for a greater ticket may stand between the end of
// an item and its publication: the warp that stores publishes right after, in order; an item
// without rows is published as soon as it is taken.
#pragma once

#include "ptx/counter.cuh"
#include "sm90/merged_tiles.h"

namespace sparse_attn::sm90 {

// In global memory, 0 before the launch: the next ticket; then, for each (batch, head), or unit of
// an ordered backward, how many tiles are done, of two branches those of the first.
struct Counters {
  int* next;

  __device__ __forceinline__ int* done(int pair) const { return next + 1 + pair; }

  // By one thread.
  __device__ __forceinline__ int take() const { return atomicAdd(next, 1); }

  // The same ticket for all lanes of a warp.
  __device__ __forceinline__ int take_by_warp() const {
    const int ticket = threadIdx.x % 32 == 0 ? take() : 0;
    return __shfl_sync(0xffffffff, ticket, 0);
  }

  // By one thread that has waited, at a barrier of the CTA, for all that stored a tile's output:
  // the release covers what they stored.
  __device__ __forceinline__ void publish(int pair) const { ptx::add_release(done(pair), 1); }

  // By every thread that then reads or copies what was published, or lets others of its CTA do so
  // after a barrier. Other multiprocessors' stores went through L2, where copies read.
  __device__ __forceinline__ void wait(int pair, int count) const {
    while (ptx::load_acquire(done(pair)) < count) __nanosleep(64);
    ptx::fence_async_proxy_global();
  }
};

// The items of this CTA, for a warp; a tile may have no row.
template <class Tiles>
struct Items;

// Of one branch, by tickets after the first where there are counters, else every so-many-th tile.
template <>
struct Items<QueryTiles> {
  const QueryTiles& tiles;
  Counters counters;
  int round = 0;

  __device__ __forceinline__ Items(const QueryTiles& tiles, Counters counters)
      : tiles(tiles), counters(counters) {}

  __device__ __forceinline__ bool next(Item& item, const Branch* branches) {
    int index = round * gridDim.x + blockIdx.x;
    if (counters.next != nullptr && round > 0) index = gridDim.x + counters.take_by_warp();
    ++round;
    if (index >= tiles.count) return false;
    item = {0, tiles.at(index, branches[0].queries)};
    return true;
  }
};

// By tickets.
template <>
struct Items<MergedTiles> {
  const MergedTiles& tiles;
  Counters counters;

  __device__ __forceinline__ Items(const MergedTiles& tiles, Counters counters)
      : tiles(tiles), counters(counters) {}

  __device__ __forceinline__ bool next(Item& item, const Branch* branches) {
    const int ticket = counters.take_by_warp();
    if (ticket >= tiles.count) return false;
    item = tiles.at(ticket, branches);
    return true;
  }
};

}  // namespace sparse_attn::sm90
