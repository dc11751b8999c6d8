// SPDX-License-Identifier: Apache-2.0
// The query tiles of a launch, numbered.
#pragma once

#include "attention/tiles.h"
#include "check.h"

namespace sparse_attn::sm90 {

// In which order, so that CTAs that stay share the work and what is in the L2 cache.
enum class Order {
  by_head,    // a head's tiles together: they read the same keys
  by_length,  // of some heads at a time the longest first: a CTA's tiles then differ least
};

struct QueryTiles {
  static constexpr int kBranches = 1;

  int count;
  int tile_rows;
  int first_head;
  bool later_first;  // without a future, the later queries attend more keys
  Order order;
  Divisor groups;
  Divisor tiles;  // of a group
  Divisor heads;
  Divisor section;  // (batch, head) pairs that go together

  static QueryTiles of(const Branch& branch, int tile_rows, int first_head, int heads, int batch,
                       Order order = Order::by_head) {
    const SequenceView& queries = branch.queries;
    const int64_t count = QueryTile::count(queries, tile_rows, heads, batch);
    REQUIRE(count <= 0x7fffffff, "more than 2^31 - 1 tiles in one launch");
    const int tiles = (queries.max_rows + tile_rows - 1) / tile_rows;
    int section = 16;  // their keys and values fit the L2 cache of an H100 up to some MB each
    while (heads * int64_t{batch} % section != 0) --section;
    return {static_cast<int>(count),
            tile_rows,
            first_head,
            !branch.run.future,
            order,
            Divisor::of(greatest(queries.groups, 1)),
            Divisor::of(greatest(tiles, 1)),
            Divisor::of(greatest(heads, 1)),
            Divisor::of(section)};
  }

  // The round-th tile of CTA `cta` of `ctas`; not less than `count`: none. With few rounds every
  // other one goes backwards: who had a long tile gets a short one.
  HOST_DEVICE int index(int round, int cta, int ctas) const {
    const bool backwards = order == Order::by_length && round % 2 == 1 && count < 16 * ctas;
    return backwards ? (round + 1) * ctas - 1 - cta : round * ctas + cta;
  }

  HOST_DEVICE QueryTile at(int index, const SequenceView& queries) const {
    int pair = 0;
    if (order == Order::by_length) {
      pair = index % section;
      index = index / section;
    }
    QueryTile tile;
    tile.group = index % groups;
    index = index / groups;
    const int number = index % tiles;
    index = index / tiles;
    pair += order == Order::by_length ? index * section.value : index;
    tile.first_row = (later_first ? tiles.value - 1 - number : number) * tile_rows;
    tile.head = first_head + pair % heads;
    tile.batch = pair / heads;
    tile.rows = greatest(least(queries.rows(tile.group) - tile.first_row, tile_rows), 0);
    return tile;
  }
};

}  // namespace sparse_attn::sm90
