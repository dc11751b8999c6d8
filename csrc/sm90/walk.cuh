// SPDX-License-Identifier: Apache-2.0
// The walk over the key tiles of a query tile, by the warps that load; and how the warpgroups that
// compute see these tiles.
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

constexpr int kWarpgroupRows = 64;  // the rows of one wgmma

// The rows of the `number`-th warpgroup that computes; none if the tile is short.
__device__ __forceinline__ QueryTile part_of(const QueryTile& tile, int number) {
  const int first_row = number * kWarpgroupRows;
  return {tile.batch, tile.head, tile.group, tile.first_row + first_row,
          greatest(least(tile.rows - first_row, kWarpgroupRows), 0)};
}

// What the warps that load tell a computing warpgroup of a tile in a ring.
struct SeenTile {
  KeyTile tile;  // exists: intervals of the warpgroup's rows meet it; cut: for these rows
  bool more;     // tiles after it
};

template <int kTileKeys, int kRows>
__device__ __forceinline__ SeenTile as_seen(KeyTile tile, bool more, const QueryTile& queries,
                                            int number,
                                            const Interval (&attended_smem)[kMaxSegments][kRows]) {
  const QueryTile part = part_of(queries, number);
  tile.exists = false;
  if (part.rows > 0) {
    const Interval* part_smem = attended_smem[tile.segment] + number * kWarpgroupRows;
    const Interval first = part_smem[0], last = part_smem[part.rows - 1];
    tile.exists = tile.end_row > first.first && tile.first_row < last.end;
    tile.cut_before = tile.first_row < last.first;
    tile.cut_after = tile.end_row > first.end || tile.end_row < tile.first_row + kTileKeys;
  }
  return {tile, more};
}

}  // namespace sparse_attn::sm90
