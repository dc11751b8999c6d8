// SPDX-License-Identifier: Apache-2.0
// The query tiles of a launch, numbered.
#pragma once

#include "attention/tiles.h"
#include "check.h"

namespace sparse_attn::sm90 {

constexpr int kWarpgroupRows = 64;  // the rows of one wgmma

// In which order, so that CTAs that stay share the work and what is in the L2 cache.
enum class Order {
  by_head,    // a head's tiles together: they read the same keys
  by_token,   // those of all heads together: in (batch, seq, heads, dim) memory they are neighbours
  by_length,  // of some units at a time the longest first
};

struct QueryTiles {
  static constexpr int kBranches = 1;

  int count;
  int tile_rows;
  int first_head;
  bool later_first;  // without a future, the later queries attend more keys
  int missing;       // rows of the first tile, if a group has fewer than its tiles
  Order order;
  Divisor tiles;    // of a unit, a (batch, head, group)
  Divisor section;  // units that go together
  Divisor inner;    // by_token: heads, else groups
  Divisor outer;    // the other

  // `part_rows`: what a warpgroup takes of a tile. If there is nothing to take for some, then in
  // the first tile of a group, where queries attend few keys, not in the last. `ctas` share them.
  static QueryTiles of(const Branch& branch, int tile_rows, int first_head, int heads, int batch,
                       Order order, int part_rows, int ctas) {
    const SequenceView& queries = branch.queries;
    const int64_t count = QueryTile::count(queries, tile_rows, heads, batch);
    REQUIRE(count <= 0x7fffffff, "more than 2^31 - 1 tiles in one launch");
    const int tiles = (queries.max_rows + tile_rows - 1) / tile_rows;
    const int inner = order == Order::by_token ? heads : queries.groups;
    const int outer = order == Order::by_token ? queries.groups : heads;
    int section = inner;
    if (order == Order::by_length) {
      // As few as are nearly three tiles for each CTA, rounded up to a divisor: of fewer the
      // longest of the last ones end late, and of more the keys leave the L2 cache. Tuned on an
      // H100.
      const int units = greatest(count / greatest(tiles, 1), 1);
      section = least((8 * ctas / 3 + tiles - 1) / greatest(tiles, 1), units);
      while (units % section != 0) ++section;
    }
    return {static_cast<int>(count),
            tile_rows,
            first_head,
            !branch.run.future,
            branch.run.future ? 0 : (tiles * tile_rows - queries.max_rows) / part_rows * part_rows,
            order,
            Divisor::of(greatest(tiles, 1)),
            Divisor::of(greatest(section, 1)),
            Divisor::of(greatest(inner, 1)),
            Divisor::of(greatest(outer, 1))};
  }

  static QueryTiles by_head(const Branch& branch, int tile_rows, int first_head, int heads,
                            int batch) {
    return of(branch, tile_rows, first_head, heads, batch, Order::by_head, tile_rows, 1);
  }

  HOST_DEVICE QueryTile at(int index, const SequenceView& queries) const {
    QueryTile tile;
    const int number = index / section % tiles;
    const int unit = index / section / tiles * section.value + index % section;
    const int place = unit % inner, rest = unit / inner;
    const int head = order == Order::by_token ? place : rest % outer;
    tile.group = order == Order::by_token ? rest % outer : place;
    const int end_row = (later_first ? tiles.value - number : number + 1) * tile_rows - missing;
    tile.first_row = greatest(end_row - tile_rows, 0);
    tile.head = first_head + head;
    tile.batch = rest / outer;
    tile.rows = greatest(least(queries.rows(tile.group), end_row) - tile.first_row, 0);
    return tile;
  }
};

}  // namespace sparse_attn::sm90
