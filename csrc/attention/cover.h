// SPDX-License-Identifier: Apache-2.0
// The tile walk of the kernels on the host: how often each (query, key) pair is attended.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/tiles.h"

namespace sparse_attn {

// Counts (length, length) [query, key], by the arithmetic and in the tiles that a kernel uses,
// for one head.
// A tile said to need no mask is counted without one.
inline std::vector<uint8_t> cover(const std::vector<Branch>& branches, int length, int tile_queries,
                                  int tile_keys) {
  std::vector<uint8_t> counts(static_cast<size_t>(length) * length, 0);
  for (const Branch& branch : branches) {
    const int64_t tiles = QueryTile::count(branch.queries, tile_queries, 1, 1);
    for (int64_t index = 0; index < tiles; ++index) {
      const QueryTile queries = QueryTile::of(index, branch, tile_queries, 0, 1);
      if (queries.rows == 0) continue;
      KeyTiles tiles = KeyTiles::of(branch, queries, 0, 1);
      const auto of_token = [&](int token) {
        return [&branch, &queries, token](int segment) {
          return branch.segments[segment].bounds(branch.run, queries.group, token);
        };
      };
      const auto next_tile = [&] {
        return tiles.next(branch, tile_keys, of_token(tiles.first_token),
                          of_token(tiles.last_token));
      };
      for (KeyTile tile = next_tile(); tile.exists; tile = next_tile()) {
        const Segment& segment = branch.segments[tile.segment];
        for (int row = queries.first_row; row < queries.first_row + queries.rows; ++row) {
          const int query = branch.queries.position(queries.group, row);
          const Interval attended = segment.bounds(branch.run, queries.group, query);
          for (int key_row = tile.first_row; key_row < tile.end_row; ++key_row) {
            if (tile.cut_before && key_row < attended.first) continue;
            if (tile.cut_after && key_row >= attended.end) continue;
            if (tile.mixed && !branch.keeps(0, query, key_row)) continue;
            if ((row - key_row) % branch.residues != 0) continue;
            const int key = segment.keys.position(queries.group, key_row);
            ++counts[static_cast<size_t>(query) * length + key];
          }
        }
      }
    }
  }
  return counts;
}

}  // namespace sparse_attn
