// SPDX-License-Identifier: Apache-2.0
// Sums from registers to global memory.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/add_vector.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "sm90/multiply.cuh"
#include "sm90/view_map.h"

namespace sparse_attn::sm90 {

constexpr int kSumRows = 16;  // of the sums of a warp

// Where the sums of 16 rows of a warp go: rows of `tile` from `row` on.
struct Target {
  const TensorView& tensor;
  const ViewMap& map;  // of tiles of 16 rows
  const SequenceView& view;
  const QueryTile& tile;
  int row;
  int head_dim;
  bool adds;  // to what is there, which no other launch or lane adds to now
};

// Starts storing 16 rows of a tile in shared memory, from `first_row` on, with the map if it holds
// them, else row by row: by a warp, whose first lane then waits for the copy. kFetches: rows that
// add are those that were not fetched, and go row by row; the map holds the others.
template <class T, int kColumns, bool kFetches = false, class Tile>
__device__ __forceinline__ void store_rows(Tile& tile_smem, int first_row, const Target& target) {
  const int rows = least(target.tile.rows - target.row, kSumRows), lane = ptx::lane();
  if (rows <= 0) return;  // the map has rows of the next group there
  const QueryTile& tile = target.tile;
  const int view_row = tile.first_row + target.row;
  // Additions to a row of several panels are faster when all of it leaves at once.
  const bool by_map = (!kFetches && kColumns == Tile::kPanelColumns) || !target.adds;
  // It starts on a run's first place.
  if (by_map && (kFetches || view_row + rows <= target.map.rows)) {
    if (lane != 0) return;
    const int run = view_row / target.map.run;
    const int place = tile.group * target.map.group_step + view_row - run * target.map.run.value;
#pragma unroll
    for (int column = 0; column < kColumns; column += Tile::kPanelColumns) {
      const T* panel_smem = tile_smem.elements +
                            column / Tile::kPanelColumns * Tile::kPanelElements +
                            first_row * Tile::kPanelColumns;
      const CUtensorMap& map = target.map.map;
      if (!kFetches && target.adds) {
        ptx::tma_add(map, panel_smem, column, place, run, tile.head, tile.batch);
      } else {
        ptx::tma_store(map, panel_smem, column, place, run, tile.head, tile.batch);
      }
    }
  } else {
    T* gmem = head_gmem<T>(target.tensor, tile.batch, tile.head);
    constexpr int kVectors = kColumns / 8;
#pragma unroll(kColumns > 64 ? 4 : 1)
    for (int i = lane; i < kSumRows * kVectors; i += 32) {
      const int row = i / kVectors, vector = i % kVectors;
      if (row >= rows || vector * 8 >= target.head_dim) continue;
      const int64_t token = target.view.position(tile.group, view_row + row);
      T* vector_gmem = gmem + token * target.tensor.row_stride + vector * 8;
      const uint4 sums = *reinterpret_cast<const uint4*>(tile_smem.at(first_row + row, vector));
      if (kFetches || target.adds) {
        ptx::add_vector<T>(vector_gmem, sums);
      } else {
        *reinterpret_cast<uint4*>(vector_gmem) = sums;
      }
    }
  }
}

// rounded += 16 rows of a tile, from `first_row` on; as L2 would add.
template <class T, class Sum, class Tile>
__device__ __forceinline__ void add_rows(Rounded<T, Sum>& rounded, Tile& tile_smem, int first_row) {
  const int lane = ptx::lane();
#pragma unroll
  for (int i = 0; i < Sum::kColumns / 16; ++i) {  // rows of four matrices of 16 columns
    uint32_t there[4];
    ptx::ldmatrix_x4(there, tile_smem.at(first_row + lane % 16, 2 * i + lane / 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rounded.at[i][j] = ptx::add_pairs<T>(rounded.at[i][j], there[j]);
    }
  }
}

// Starts storing factor * sum, by way of a tile in shared memory that nobody else reads: its rows
// from `first_row` on, until the copies of this warp's first lane have read them. kFetches:
// unless the target adds, these rows of `there_smem` are added first.
template <class T, bool kFetches = false, class Sum, class Tile>
__device__ __forceinline__ void store_sum(Sum& sum, float factor, Tile& tile_smem, int first_row,
                                          const Target& target, Tile* there_smem = nullptr) {
  const int lane = ptx::lane();
  sum.for_each([&](float& element, int, int) { element *= factor; });
  Rounded<T, Sum> rounded(sum);
  if (kFetches && !target.adds) add_rows(rounded, *there_smem, first_row);
#pragma unroll
  for (int i = 0; i < Sum::kColumns / 16; ++i) {  // rows of four matrices of 16 columns
    ptx::stmatrix_x4(tile_smem.at(first_row + lane % 16, 2 * i + lane / 16), rounded.at[i]);
  }
  ptx::fence_async_proxy();
  __syncwarp();
  store_rows<T, Sum::kColumns, kFetches>(tile_smem, first_row, target);
}

}  // namespace sparse_attn::sm90
