// SPDX-License-Identifier: Apache-2.0
// What earlier branches left of a sum, on its way to shared memory.
#pragma once

#include "sm90/store_sum.cuh"

namespace sparse_attn::sm90::backward_band {

// Of 16 rows of a warp, one sum after another.
struct Earlier {
  uint64_t& full;  // of one arrival
  bool comes = false;
  int round = 0;

  // Starts copying the rows of a target to those of a tile from `first_row` on, if the map holds
  // them. Each time before `take`.
  template <class T, class Tile>
  __device__ __forceinline__ void fetch(Tile& tile_smem, int first_row, const Target& target) {
    const QueryTile& tile = target.tile;
    const int rows = least(tile.rows - target.row, kSumRows);
    const int view_row = tile.first_row + target.row;
    comes = rows > 0 && view_row + rows <= target.map.rows;
    if (ptx::lane() != 0) return;
    if (comes) {
      const int run = view_row / target.map.run;
      const int place = tile.group * target.map.group_step + view_row - run * target.map.run.value;
      ptx::mbarrier_expect(full, kSumRows * Tile::kColumns * sizeof(T));
#pragma unroll
      for (int column = 0; column < Tile::kColumns; column += Tile::kPanelColumns) {
        T* panel_smem = tile_smem.elements + column / Tile::kPanelColumns * Tile::kPanelElements +
                        first_row * Tile::kPanelColumns;
        ptx::tma_load(panel_smem, target.map.map, column, place, run, tile.head, tile.batch, full);
      }
    }
    ptx::mbarrier_arrive(full);
  }

  // Whether they have come. (A branch around the wait would cost ptxas the knowledge that warps go
  // together.)
  __device__ __forceinline__ bool take() {
    ptx::mbarrier_wait(full, round);
    round ^= 1;
    return comes;
  }
};

}  // namespace sparse_attn::sm90::backward_band
