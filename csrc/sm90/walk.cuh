// SPDX-License-Identifier: Apache-2.0
// The walk over the key tiles of a query tile, by the warps that load; and how the warpgroups that
// compute see these tiles.
#pragma once

#include "sm90/query_tiles.h"

namespace sparse_attn::sm90 {

// The rows of the `number`-th warpgroup that computes; none if the tile is short.
__device__ __forceinline__ QueryTile part_of(const QueryTile& tile, int number) {
  const int first_row = number * kWarpgroupRows;
  return {tile.batch, tile.head, tile.group, tile.first_row + first_row,
          greatest(least(tile.rows - first_row, kWarpgroupRows), 0)};
}

// What the first and the last query of each warpgroup attend: all that the walk needs, found by one
// warp, so that the next tiles load soon.
template <int kRows>
__device__ __forceinline__ void find_ends(Interval (&attended_smem)[kMaxSegments][kRows],
                                          const Branch& branch, const QueryTile& queries) {
  constexpr int kEnds = 2 * kRows / kWarpgroupRows;
  static_assert(kMaxSegments * kEnds <= 32, "a lane for each");
  const int segment = threadIdx.x % 32 / kEnds, end = threadIdx.x % 32 % kEnds;
  int row = end / 2 * kWarpgroupRows;
  if (segment >= branch.segment_count || row >= queries.rows) return;
  if (end % 2 == 1) row = least(row + kWarpgroupRows, queries.rows) - 1;
  const int token = branch.queries.position(queries.group, queries.first_row + row);
  attended_smem[segment][row] = branch.segments[segment].bounds(branch.run, queries.group, token);
}

// What the other queries of this warp attend, for its masks. The last row stands in for rows that
// do not exist. `first_row`: of the warpgroup's rows.
template <int kRows>
__device__ __forceinline__ void find_between(Interval (&attended_smem)[kMaxSegments][kRows],
                                             int first_row, const Branch& branch,
                                             const QueryTile& part) {
  const int warp_row = threadIdx.x / 32 % 4 * 16;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * branch.segment_count; i += 32) {
    const int segment = i / 16, row = warp_row + i % 16;
    if (row == 0 || row == part.rows - 1) continue;
    const int token =
        branch.queries.position(part.group, part.first_row + least(row, part.rows - 1));
    attended_smem[segment][first_row + row] =
        branch.segments[segment].bounds(branch.run, part.group, token);
  }
  __syncwarp();
}

// Which blocks of keys the queries of each warpgroup attend: lane i has the bits of the i-th, 32
// blocks of keys at a time. Blocks are not smaller than a tile or the queries of a warpgroup.
struct AttendedWord {
  int index = -1;    // of the word
  uint32_t own = 0;  // of this lane's warpgroup
  uint32_t any = 0;  // of all

  __device__ __forceinline__ void read(const Branch& branch, const QueryTile& queries, int head,
                                       int new_index) {
    const Blocks& blocks = branch.blocks;
    const int lane = threadIdx.x % 32;
    index = new_index;
    own = 0;
    if (lane * kWarpgroupRows < queries.rows) {
      const int block = (queries.first_row + lane * kWarpgroupRows) >> lowest_bit(blocks.size);
      own = AttendedBlocks::of(blocks, head, block, block + 1).word(index);
    }
    any = __reduce_or_sync(0xffffffff, own);
  }
};

// The tiles of at most kTileKeys keys that KeyTiles finds for one head, without the flags `cut`.
template <int kTileKeys, int kRows>
struct KeyWalk {
  const Branch& branch;
  const QueryTile& queries;
  const Interval (&attended_smem)[kMaxSegments][kRows];  // of the queries
  KeyTile tile;
  int end;  // of the keys in the tile's segment
  AttendedWord word;

  __device__ __forceinline__ KeyWalk(const Branch& branch, const QueryTile& queries,
                                     const Interval (&attended_smem)[kMaxSegments][kRows])
      : branch(branch),
        queries(queries),
        attended_smem(attended_smem),
        tile{queries.head, -1, 0, 0, true, false, false, false},
        end(0) {}

  // Whether there is another tile: then it is `tile`. By whole warps.
  __device__ __forceinline__ bool next() {
    const bool has_blocks = branch.blocks.rows != nullptr;
    tile.first_row = tile.end_row;
#pragma unroll 1
    while (true) {
      if (has_blocks) skip_blocks();
      if (tile.first_row < end) break;
      if (++tile.segment == branch.segment_count) return false;
      tile.first_row = attended_smem[tile.segment][0].first;
      end = attended_smem[tile.segment][queries.rows - 1].end;
      word.index = -1;
    }
    tile.end_row = least(tile.first_row + kTileKeys, end);
    if (has_blocks) {
      const int size = branch.blocks.size;
      tile.mixed = (queries.first_row ^ (queries.first_row + queries.rows - 1)) >= size;
    }
    return true;
  }

  // Whether the blocks let the queries of this lane's warpgroup attend the tile.
  __device__ __forceinline__ bool keeps() const {
    return branch.blocks.rows == nullptr || word.own >> block() % 32 & 1;
  }

 private:
  __device__ __forceinline__ int block() const {
    return tile.first_row >> lowest_bit(branch.blocks.size);
  }

  // Moves on to the first row in a block that some query attends, if there is one.
  __device__ __forceinline__ void skip_blocks() {
    const int log2_size = lowest_bit(branch.blocks.size);
#pragma unroll 1
    while (tile.first_row < end) {
      const int first = block();
      if (first / 32 != word.index) word.read(branch, queries, tile.head, first / 32);
      const uint32_t bits = word.any >> first % 32;
      if (bits & 1) break;
      const int next = bits != 0 ? first + lowest_bit(bits) : (word.index + 1) * 32;
      tile.first_row = next << log2_size;
    }
  }
};

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
