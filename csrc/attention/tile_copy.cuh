// SPDX-License-Identifier: Apache-2.0
// Tiles between global and shared memory and registers: rows of a strided view, 16 bytes a thread.
#pragma once

#include <type_traits>

#include "attention/register_tile.cuh"
#include "attention/tiles.h"
#include "params.h"
#include "ptx/cp_async.cuh"
#include "ptx/mma_sync.cuh"

namespace sparse_attn {

// First element of a (batch, head) of a tensor.
template <class T>
__device__ __forceinline__ T* head_gmem(const TensorView& tensor, int batch, int head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// Calls f(row of the tile, 16-byte vector of the row, its address) for this thread's share of a
// tile whose first row is `first_row` of a view. Copies are shared among kThreads neighbours.
template <int kThreads, class Tile, int kUnroll, class T, class F>
__device__ __forceinline__ void for_each_vector(T* gmem, int row_stride, const SequenceView& view,
                                                int group, int first_row, F f) {
  // Neighbouring threads take neighbouring vectors: all of a row, or four at a time of 12.
  constexpr int kVectorsAtOnce = Tile::kVectors % 8 == 0 ? Tile::kVectors : 4;
  constexpr int kRowsAtOnce = kThreads / kVectorsAtOnce;
  static_assert(kThreads % kVectorsAtOnce == 0 && Tile::kRows % kRowsAtOnce == 0);
  const int thread = threadIdx.x % kThreads;
  const int first_vector = thread % kVectorsAtOnce;
#pragma unroll kUnroll
  for (int i = 0; i < Tile::kRows; i += kRowsAtOnce) {
    const int row = i + thread / kVectorsAtOnce;
    const int64_t token = view.position(group, first_row + row);
    T* row_gmem = gmem + token * row_stride;
#pragma unroll
    for (int j = 0; j < Tile::kVectors; j += kVectorsAtOnce) {
      const int vector = j + first_vector;
      f(row, vector, row_gmem + vector * 8);
    }
  }
}

// Starts copying rows [first_row, end_row) of a view into a tile; zeros where there is no row, and
// past head_dim.
template <int kThreads, int kUnroll = 64, class T, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile_smem, const T* gmem, int row_stride,
                                          const SequenceView& view, int group, int first_row,
                                          int end_row, int head_dim) {
  for_each_vector<kThreads, Tile, kUnroll>(
      gmem, row_stride, view, group, first_row, [&](int row, int vector, const T* vector_gmem) {
        const bool exists = first_row + row < end_row && vector * 8 < head_dim;
        ptx::cp_async_16(tile_smem.at(row, vector), vector_gmem, exists);
      });
}

template <int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(Tile& tile_smem, T* gmem, int row_stride,
                                           const SequenceView& view, const QueryTile& tile,
                                           int head_dim) {
  for_each_vector<kThreads, Tile, 64>(
      gmem, row_stride, view, tile.group, tile.first_row, [&](int row, int vector, T* vector_gmem) {
        if (row < tile.rows && vector * 8 < head_dim) {
          *reinterpret_cast<uint4*>(vector_gmem) =
              *reinterpret_cast<const uint4*>(tile_smem.at(row, vector));
        }
      });
}

// The first row of this warp in a tile of kRows rows, of which every warp owns kWarpRows.
template <int kRows, int kWarpRows>
__device__ __forceinline__ int warp_row() {
  return threadIdx.x / 32 % (kRows / kWarpRows) * kWarpRows;
}

// Leaves factor[row] * tile + earlier_factor[row] * (what own_smem holds) in own_smem, rounded to
// T.
template <class T, class Tile, class OwnTile, int kLaneRows>
__device__ __forceinline__ void write_rows(OwnTile& own_smem, const Tile& tile,
                                           const float (&factor)[kLaneRows],
                                           const float (&earlier_factor)[kLaneRows],
                                           bool has_earlier) {
  static_assert(kLaneRows == Tile::kLaneRows && OwnTile::kColumns == Tile::kColumns);
  const int first_row = warp_row<OwnTile::kRows, Tile::kRows>();
  const auto write = [&](auto adds) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        auto* pair_smem =
            reinterpret_cast<uint32_t*>(own_smem.at(first_row + Tile::row(i), j)) + threadIdx.x % 4;
        const float (&elements)[4] = tile.at[i / 2][j];
        float2 pair = {elements[i % 2 * 2] * factor[i], elements[i % 2 * 2 + 1] * factor[i]};
        if constexpr (decltype(adds)::value) {
          const float2 earlier = ptx::unpack<T>(*pair_smem);
          pair.x += earlier.x * earlier_factor[i];
          pair.y += earlier.y * earlier_factor[i];
        }
        *pair_smem = ptx::pack<T>(pair.x, pair.y);
      }
    }
  };
  if (has_earlier) {
    write(std::true_type{});
  } else {
    write(std::false_type{});
  }
}

}  // namespace sparse_attn
