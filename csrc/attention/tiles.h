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
class KeyTiles {
 public:
  HOST_DEVICE KeyTiles(const Branch& branch, const QueryTile& tile, int tile_rows)
      : branch_(branch),
        group_(tile.group),
        first_token_(branch.queries.position(tile.group, tile.first_row)),
        last_token_(branch.queries.position(tile.group, tile.first_row + tile.rows - 1)),
        tile_rows_(tile_rows) {}

  HOST_DEVICE bool valid(const KeyTile& tile) const { return tile.segment < branch_.segment_count; }

  HOST_DEVICE KeyTile first() {
    of_first_ = of_last_ = {0, 0};
    return next({-1, 0, 0, false});
  }

  // The tile after the one that was returned last.
  HOST_DEVICE KeyTile next(KeyTile tile) {
    tile.first_row = tile.end_row;
    while (tile.first_row >= of_last_.end && ++tile.segment < branch_.segment_count) {
      const Segment& segment = branch_.segments[tile.segment];
      of_first_ = segment.bounds(branch_.run, group_, first_token_);
      of_last_ = segment.bounds(branch_.run, group_, last_token_);
      tile.first_row = of_first_.first;
    }
    tile.end_row = least(tile.first_row + tile_rows_, of_last_.end);
    tile.masked = tile.first_row < of_last_.first || tile.end_row > of_first_.end ||
                  tile.end_row < tile.first_row + tile_rows_;
    return tile;
  }

 private:
  const Branch& branch_;
  const int group_;
  const int first_token_;
  const int last_token_;
  const int tile_rows_;
  // Key rows that the first and the last query attend in the segment of the last tile. Both ends
  // grow with the query, so they bound what the queries between attend.
  Interval of_first_{0, 0};
  Interval of_last_{0, 0};
};

}  // namespace sparse_attn
