// SPDX-License-Identifier: Apache-2.0
// Rows of a strided view on their way to and from shared memory.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/view_map.h"

namespace sparse_attn::sm90 {

// The threads that share a row, 16 bytes each at a time.
template <class Tile>
constexpr int kRowThreads = Tile::kVectors < 8 ? Tile::kVectors : 8;

// f(row of the tile, its token, whether it exists) for this thread's rows of a tile, of which
// `rows` exist.
template <class Tile, int kThreads = 128, class F>
__device__ __forceinline__ void for_each_row(const SequenceView& view, int group, int first_row,
                                             int rows, F f) {
#pragma unroll(kThreads == 32 ? 1 : 2)  // a warp that loads has few registers
  for (int i = 0; i < Tile::kRows; i += kThreads / kRowThreads<Tile>) {
    const int row = i + threadIdx.x % kThreads / kRowThreads<Tile>;
    f(row, view.position(group, first_row + row), row < rows);
  }
}

// Starts copying this thread's part of a row; zeros past head_dim, and where there is no row.
template <class T, class Tile>
__device__ __forceinline__ void load_row(Tile& tile_smem, int row, const T* row_gmem, int head_dim,
                                         bool exists) {
  const int first_vector = threadIdx.x % kRowThreads<Tile>;
#pragma unroll
  for (int i = 0; i < Tile::kVectors; i += kRowThreads<Tile>) {
    const int vector = i + first_vector;
    ptx::cp_async_16(tile_smem.at(row, vector), row_gmem + vector * 8,
                     exists && vector * 8 < head_dim);
  }
}

// Stores this thread's part of a row.
template <class T, class Tile>
__device__ __forceinline__ void store_row(Tile& tile_smem, int row, T* row_gmem, int head_dim,
                                          bool exists) {
  const int first_vector = threadIdx.x % kRowThreads<Tile>;
#pragma unroll
  for (int i = 0; i < Tile::kVectors; i += kRowThreads<Tile>) {
    const int vector = i + first_vector;
    if (exists && vector * 8 < head_dim) {
      *reinterpret_cast<uint4*>(row_gmem + vector * 8) =
          *reinterpret_cast<const uint4*>(tile_smem.at(row, vector));
    }
  }
}

// The rows of a head in global memory.
template <class T>
struct Rows {
  const ViewMap& map;
  const SequenceView& view;
  T* gmem;  // of the head
  int row_stride;
  int head_dim;
  int head;
  int batch;

  __device__ __forceinline__ Rows(const ViewMap& map, const SequenceView& view,
                                  const TensorView& tensor, int head_dim, int batch, int head)
      : map(map),
        view(view),
        gmem(head_gmem<T>(tensor, batch, head)),
        row_stride(tensor.row_stride),
        head_dim(head_dim),
        head(head),
        batch(batch) {}

  // Stores rows [first_row, end_row) of a group, with the map if it holds them: by a warp, whose
  // first lane then waits for the copy. `last`: nobody reads these rows soon.
  template <class Tile>
  __device__ __forceinline__ void store(Tile& tile_smem, int group, int first_row, int end_row,
                                        bool last = false) const {
    if (first_row == end_row) return;  // the map has rows of the next group there
    if (map.holds(first_row, end_row)) {
      if (threadIdx.x % 32 != 0) return;
#pragma unroll
      for (int panel = 0; panel < Tile::kColumns / Tile::kPanelColumns; ++panel) {
        const T* panel_smem = tile_smem.elements + panel * Tile::kPanelElements;
        const int column = panel * Tile::kPanelColumns;
        const int place = group * map.group_step + first_row % map.run, run = first_row / map.run;
        if (last) {
          ptx::tma_store_last(map.map, panel_smem, column, place, run, head, batch);
        } else {
          ptx::tma_store(map.map, panel_smem, column, place, run, head, batch);
        }
      }
    } else {
      for_each_row<Tile, 32>(
          view, group, first_row, end_row - first_row, [&](int row, int64_t token, bool exists) {
            store_row(tile_smem, row, gmem + token * row_stride, head_dim, exists);
          });
    }
  }

  // Starts copying rows [first_row, end_row) of a group into a tile, zeros where there is no row;
  // with the map if it holds them. By kThreads threads; `full` completes after the cp_async_arrive
  // of each. `last`: nobody reads these rows again.
  template <int kThreads, class Tile>
  __device__ __forceinline__ void load(Tile& tile_smem, uint64_t& full, int group, int first_row,
                                       int end_row, bool last = false) const {
    if (map.holds(first_row, end_row)) {
      if (threadIdx.x % kThreads != 0) return;
      ptx::mbarrier_expect(full, sizeof(tile_smem.elements));
#pragma unroll
      for (int panel = 0; panel < Tile::kColumns / Tile::kPanelColumns; ++panel) {
        T* panel_smem = tile_smem.elements + panel * Tile::kPanelElements;
        const int column = panel * Tile::kPanelColumns;
        const int place = group * map.group_step + first_row % map.run, run = first_row / map.run;
        if (last) {
          ptx::tma_load_last(panel_smem, map.map, column, place, run, head, batch, full);
        } else {
          ptx::tma_load(panel_smem, map.map, column, place, run, head, batch, full);
        }
      }
    } else {
      copy<kThreads>(tile_smem, group, first_row, end_row);
    }
  }

  // Likewise, never with the map.
  template <int kThreads, class Tile>
  __device__ __forceinline__ void copy(Tile& tile_smem, int group, int first_row,
                                       int end_row) const {
    for_each_row<Tile, kThreads>(
        view, group, first_row, end_row - first_row, [&](int row, int64_t token, bool exists) {
          load_row<T>(tile_smem, row, gmem + token * row_stride, head_dim, exists);
        });
  }
};

}  // namespace sparse_attn::sm90
