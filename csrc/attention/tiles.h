// SPDX-License-Identifier: Apache-2.0
// How a branch is cut into tiles: which queries a CTA owns, and the key tiles it walks.
// Host and device: the kernels walk these, and `cover` (cover.h) checks them without a GPU.
#pragma once

#include "attention/plan.h"

namespace sparse_attn {

// The queries of one CTA: `rows` rows of a group, from `first_row`. No row if the group is short.
struct QueryTile {
  int batch;
  int head;
  int group;
  int first_row;
  int rows;

  // Groups vary fastest: neighbouring CTAs then read neighbouring tokens of a residue. Without a
  // future, the later queries attend more keys and come first, so that no long tile is left last.
  HOST_DEVICE static QueryTile of(int64_t index, const Branch& branch, int tile_rows,
                                  int first_head, int heads) {
    const SequenceView& queries = branch.queries;
    const int tiles = (queries.max_rows + tile_rows - 1) / tile_rows;
    QueryTile tile;
    tile.group = static_cast<int>(index % queries.groups);
    index /= queries.groups;
    const int number = static_cast<int>(index % tiles);
    tile.first_row = (branch.run.future ? number : tiles - 1 - number) * tile_rows;
    index /= tiles;
    tile.head = first_head + static_cast<int>(index % heads);
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

// Some key rows of a segment, for a head.
struct KeyTile {
  int head;
  int segment;
  int first_row;
  int end_row;
  bool exists;
  // Whether some query does not attend the tile's first rows; its last ones, or those missing to a
  // whole tile; or a block inside, since the queries lie in several blocks.
  bool cut_before;
  bool cut_after;
  bool mixed;
};

// The key tiles of a query tile, for some heads: segment by segment, each segment from its first
// attended row. Of a branch with blocks, a tile holds only blocks that some query attends. Plain
// data: one thread walks, and the others see what it leaves in shared memory.
struct KeyTiles {
  int first_token;
  int last_token;
  int end_head;
  KeyTile last;  // returned last

  HOST_DEVICE static KeyTiles of(const Branch& branch, const QueryTile& tile, int first_head,
                                 int end_head) {
    const SequenceView& queries = branch.queries;
    return {queries.position(tile.group, tile.first_row),
            queries.position(tile.group, tile.first_row + tile.rows - 1),
            end_head,
            {first_head, -1, 0, 0, false, false, false, false}};
  }

  // The next tile of at most `tile_rows` rows.
  // of_first(segment) and of_last(segment) are what the first and the last query attend. Both ends
  // of an interval grow with the query, so these two bound what the queries between attend.
  template <class F, class G>
  HOST_DEVICE KeyTile next(const Branch& branch, int tile_rows, F of_first, G of_last) {
    KeyTile tile = last;
    tile.first_row = tile.end_row;
    while (tile.head < end_head) {
      if (tile.segment >= 0) {
        if (branch.blocks.rows != nullptr) tile.first_row = next_attended(branch, tile);
        if (tile.first_row < of_last(tile.segment).end) break;
      }
      if (++tile.segment == branch.segment_count) {
        tile.segment = 0;
        if (++tile.head == end_head) break;
      }
      tile.first_row = of_first(tile.segment).first;
    }
    const Interval every = {of_last(tile.segment).first, of_first(tile.segment).end};
    tile.end_row = least(tile.first_row + tile_rows, of_last(tile.segment).end);
    tile.exists = tile.head < end_head;
    tile.mixed = false;
    if (branch.blocks.rows != nullptr && tile.exists) {
      tile.end_row = least(tile.end_row, end_of_attended(branch, tile));
      tile.mixed = first_token / branch.blocks.size != last_token / branch.blocks.size;
    }
    tile.cut_before = tile.first_row < every.first;
    tile.cut_after = tile.end_row > every.end || tile.end_row < tile.first_row + tile_rows;
    last = tile;
    return tile;
  }

  // The first row from the tile's first on that lies in an attended block.
  HOST_DEVICE int next_attended(const Branch& branch, const KeyTile& tile) const {
    const int size = branch.blocks.size, block = tile.first_row / size;
    const int next = attended_blocks(branch, tile.head).next(block);
    return next == block ? tile.first_row : next * size;
  }

  // Where the attended blocks that a tile begins with end.
  HOST_DEVICE int end_of_attended(const Branch& branch, const KeyTile& tile) const {
    const int size = branch.blocks.size;
    int block = tile.first_row / size + 1;
    NOT_UNROLLED
    while (block * size < tile.end_row && attended_blocks(branch, tile.head).contains(block)) {
      ++block;
    }
    return block * size;
  }

 private:
  HOST_DEVICE AttendedBlocks attended_blocks(const Branch& branch, int head) const {
    const int size = branch.blocks.size;
    return AttendedBlocks::of(branch.blocks, head, first_token / size, last_token / size + 1);
  }
};

}  // namespace sparse_attn
