// SPDX-License-Identifier: Apache-2.0
// The walk over the key tiles of a query tile, in registers: the warps that load and those that
// compute find the same tiles, each by itself.
#pragma once

#include "attention/tiles.h"

namespace sparse_attn::sm90 {

// The tiles of at most kTileKeys keys that KeyTiles finds for one head, without the flags `cut`.
template <int kTileKeys, int kRows>
struct KeyWalk {
  const Branch& branch;
  const QueryTile& queries;
  const Interval (&attended_smem)[kMaxSegments][kRows];  // of the queries
  KeyTile tile;
  int end;  // of the keys in the tile's segment

  __device__ __forceinline__ KeyWalk(const Branch& branch, const QueryTile& queries,
                                     const Interval (&attended_smem)[kMaxSegments][kRows])
      : branch(branch),
        queries(queries),
        attended_smem(attended_smem),
        tile{queries.head, -1, 0, 0, true, false, false, false},
        end(0) {}

  // Whether there is another tile: then it is `tile`.
  __device__ __forceinline__ bool next() {
    const bool has_blocks = branch.blocks.rows != nullptr;
    tile.first_row = tile.end_row;
#pragma unroll 1
    while (true) {
      if (has_blocks && tile.segment >= 0) tile.first_row = tokens().next_attended(branch, tile);
      if (tile.first_row < end) break;
      if (++tile.segment == branch.segment_count) return false;
      tile.first_row = attended_smem[tile.segment][0].first;
      end = attended_smem[tile.segment][queries.rows - 1].end;
    }
    tile.end_row = least(tile.first_row + kTileKeys, end);
    if (has_blocks) {
      const int size = branch.blocks.size;
      tile.end_row = least(tile.end_row, tokens().end_of_attended(branch, tile));
      tile.mixed = tokens().first_token / size != tokens().last_token / size;
    }
    return true;
  }

 private:
  __device__ __forceinline__ KeyTiles tokens() const {
    return KeyTiles::of(branch, queries, queries.head, queries.head + 1);
  }
};

// f(tile) for all of them.
template <int kTileKeys, int kRows, class F>
__device__ __forceinline__ void for_each_key_tile(
    const Branch& branch, const QueryTile& queries,
    const Interval (&attended_smem)[kMaxSegments][kRows], F f) {
  KeyWalk<kTileKeys, kRows> walk(branch, queries, attended_smem);
  while (walk.next()) f(walk.tile);
}

}  // namespace sparse_attn::sm90
