// SPDX-License-Identifier: Apache-2.0
// The query tiles of two branches in one launch, in the order in which they are handed out.
#pragma once

#include "sm90/query_tiles.h"

namespace sparse_attn::sm90 {

// A tile of queries of one of the branches.
struct Item {
  int branch;
  QueryTile tile;
};

// Head by head: tiles of the first branch, and behind them the tiles of the second branch of an
// earlier head, which wait for all first ones of that head. Far enough behind to find these
// finished, near enough to find keys, values and outputs in the L2 cache.
struct MergedTiles {
  static constexpr int kBranches = 2;

  QueryTiles branch[kBranches];
  int count;
  int heads;          // (batch, head) pairs
  int first, second;  // tiles of a head
  int behind;         // beside first tiles stand second ones of the head this many before,
  int lag;            // after so many of the first
  Divisor both;

  // `distance`: items between the last first tile of a head and its first second one.
  static MergedTiles of(const Branch (&branches)[kBranches], int tile_rows, int first_head,
                        int heads, int batch, int distance) {
    MergedTiles tiles{};
    for (int i = 0; i < kBranches; ++i) {
      tiles.branch[i] = QueryTiles::by_head(branches[i], tile_rows, first_head, heads, batch);
    }
    tiles.heads = heads * batch;
    tiles.first = tiles.branch[0].count / greatest(tiles.heads, 1);
    tiles.second = tiles.branch[1].count / greatest(tiles.heads, 1);
    REQUIRE(int64_t{tiles.branch[0].count} + tiles.branch[1].count <= 0x7fffffff,
            "more than 2^31 - 1 tiles in one launch");
    tiles.count = tiles.branch[0].count + tiles.branch[1].count;
    const int both = greatest(tiles.first + tiles.second, 1);
    tiles.behind = 1 + distance / both;
    tiles.lag = least(distance % both, tiles.first);
    tiles.both = Divisor::of(both);
    return tiles;
  }

  HOST_DEVICE Item at(int ticket, const Branch* branches) const {
    const int alone = least(behind, heads);  // heads whose first tiles begin, second tiles end all
    const int begin = alone * first, end = count - alone * second;
    int number, place;  // of the branch; of the tile in it
    if (ticket < begin) {
      number = 0, place = ticket;
    } else if (ticket >= end) {
      number = 1, place = ticket - heads * first;
    } else {
      const int head = (ticket - begin) / both;
      const int within = (ticket - begin) - head * both.value;
      number = lag <= within && within < lag + second ? 1 : 0;
      place = number == 1 ? head * second + within - lag
                          : (alone + head) * first + (within < lag ? within : within - second);
    }
    return {number, branch[number].at(place, branches[number].queries)};
  }
};

}  // namespace sparse_attn::sm90
