// SPDX-License-Identifier: Apache-2.0
// How a branch is cut into tiles: which queries a CTA owns, and the key tiles it walks.
// Host and device: the kernels walk these, and `cover` (cover.h) checks them without a GPU.
#pragma once

#include "attention/plan.h"

namespace sparse_attn {

// The queries of one CTA: `rows` rows of a group, from `first_row`. No row if the group is short.
struct QueryTile {
  int batch;
  int head;  // counted from the first head of the launch
  int group;
  int first_row;
  int rows;

  // Groups vary fastest: neighbouring CTAs then read neighbouring tokens of a residue.
  HOST_DEVICE static QueryTile of(int64_t index, const SequenceView& queries, int tile_rows,
                                  int heads) {
    const int tiles = (queries.max_rows + tile_rows - 1) / tile_rows;
    QueryTile tile;
    tile.group = static_cast<int>(index % queries.groups);
    index /= queries.groups;
    tile.first_row = static_cast<int>(index % tiles) * tile_rows;
    index /= tiles;
    tile.head = static_cast<int>(index % heads);
    tile.batch = static_cast<int>(index / heads);
    tile.rows = greatest(least(queries.rows(tile.group) - tile.first_row, tile_rows), 0);
    return tile;
  }

  HOST_DEVICE static int64_t count(const SequenceView& queries, int tile_rows, int heads,
                                   int batch) {
    const int tiles = (queries.max_rows + tile_rows - 1) / tile_rows;
    return static_cast<int64_t>(tiles) * queries.groups * heads * batch;
  }
};

// Some key rows of a segment. `masked`: not every query of the tile attends every row of it.
struct KeyTile {
  int segment;  // segment_count once past the last tile
  int first_row;
  int end_row;
  bool masked;
};

// The key tiles of a query tile, segment by segment, each segment from its first attended row.
struct KeyTiles {
  const Branch& branch;
  const int group;
  const int first_token;  // of the query tile
  const int last_token;
  const int tile_rows;

  HOST_DEVICE KeyTiles(const Branch& branch, const QueryTile& tile, int tile_rows)
      : branch(branch),
        group(tile.group),
        first_token(branch.queries.position(tile.group, tile.first_row)),
        last_token(branch.queries.position(tile.group, tile.first_row + tile.rows - 1)),
        tile_rows(tile_rows) {}

  HOST_DEVICE KeyTile first() const { return next({-1, 0, 0, false}); }

  HOST_DEVICE bool valid(const KeyTile& tile) const { return tile.segment < branch.segment_count; }

  HOST_DEVICE KeyTile next(KeyTile tile) const {
    int row = tile.end_row;
    for (int segment = tile.segment; segment < branch.segment_count; ++segment) {
      if (segment >= 0) {
        // The ends of an interval grow with the token, so the first and last query bound them all.
        const Interval of_first = branch.segments[segment].bounds(branch.run, group, first_token);
        const Interval of_last = branch.segments[segment].bounds(branch.run, group, last_token);
        if (segment != tile.segment) row = of_first.first;
        if (row < of_last.end) {
          const int end = least(row + tile_rows, of_last.end);
          const bool masked = row < of_last.first || end > of_first.end || end < row + tile_rows;
          return {segment, row, end, masked};
        }
      }
    }
    return {branch.segment_count, 0, 0, false};
  }
};

}  // namespace sparse_attn
