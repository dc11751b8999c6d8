// SPDX-License-Identifier: Apache-2.0
// What a CTA of the portable kernels does with tiles: copies rows of a strided view to and from
// shared memory, and multiplies them with mma.sync. Each warp owns neighbouring rows of the CTA's
// own tile.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/tiles.h"
#include "params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sync.cuh"

namespace sparse_attn::sm80 {

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// First element of a (batch, head) of a tensor.
template <class T>
__device__ __forceinline__ T* head_gmem(const TensorView& tensor, int batch, int head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// Calls f(row of the tile, 16-byte vector of the row, its address) for this thread's share of a
// tile whose first row is `first_row` of a view.
template <int kThreads, class Tile, class T, class F>
__device__ __forceinline__ void for_each_vector(T* gmem, int64_t row_stride,
                                                const SequenceView& view, int group, int first_row,
                                                F f) {
  // Neighbouring threads take neighbouring vectors: all of a row, or four at a time of 12.
  constexpr int kVectorsAtOnce = Tile::kVectors % 8 == 0 ? Tile::kVectors : 4;
  constexpr int kRowsAtOnce = kThreads / kVectorsAtOnce;
  static_assert(kThreads % kVectorsAtOnce == 0 && Tile::kRows % kRowsAtOnce == 0);
  const int first_vector = threadIdx.x % kVectorsAtOnce;
  const int thread_row = threadIdx.x / kVectorsAtOnce;
  const auto for_each_of_row = [&](int row, T* row_gmem) {
#pragma unroll
    for (int vector = 0; vector < Tile::kVectors; vector += kVectorsAtOnce) {
      f(row, vector + first_vector, row_gmem + (vector + first_vector) * 8);
    }
  };
  if (view.run == 1) {  // rows are evenly spaced: one multiplication for all of them
    const int64_t step = view.run_stride * row_stride;
    T* row_gmem = gmem + view.position(group, 0) * row_stride + (first_row + thread_row) * step;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowsAtOnce) {
      for_each_of_row(row + thread_row, row_gmem);
      row_gmem += kRowsAtOnce * step;
    }
  } else {
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowsAtOnce) {
      const int64_t token = view.position(group, first_row + row + thread_row);
      for_each_of_row(row + thread_row, gmem + token * row_stride);
    }
  }
}

// Starts copying rows [first_row, end_row) of a view into a tile; zeros where there is no row, and
// past head_dim.
template <int kThreads, class T, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile_smem, const T* gmem, int64_t row_stride,
                                          const SequenceView& view, int group, int first_row,
                                          int end_row, int head_dim) {
  for_each_vector<kThreads, Tile>(
      gmem, row_stride, view, group, first_row, [&](int row, int vector, const T* vector_gmem) {
        const bool exists = first_row + row < end_row && vector * 8 < head_dim;
        ptx::cp_async_16(tile_smem.at(row, vector), exists ? vector_gmem : gmem, exists);
      });
}

template <int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(Tile& tile_smem, T* gmem, int64_t row_stride,
                                           const SequenceView& view, const QueryTile& tile,
                                           int head_dim) {
  for_each_vector<kThreads, Tile>(
      gmem, row_stride, view, tile.group, tile.first_row, [&](int row, int vector, T* vector_gmem) {
        if (row < tile.rows && vector * 8 < head_dim) {
          *reinterpret_cast<uint4*>(vector_gmem) =
              *reinterpret_cast<const uint4*>(tile_smem.at(row, vector));
        }
      });
}

// product = own b^T: the rows of this warp times all rows of b.
template <class T, class Product, class OwnTile, class Tile>
__device__ __forceinline__ void multiply_transposed(Product& product, OwnTile& own_smem,
                                                    Tile& b_smem) {
  static_assert(OwnTile::kColumns == Tile::kColumns && Product::kColumns == Tile::kRows);
  const int lane = lane_index(), first_row = warp_index() * Product::kRows;
  product.clear();
#pragma unroll
  for (int step = 0; step < Tile::kColumns / 16; ++step) {  // 16 columns of both
    uint32_t a[Product::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
      ptx::ldmatrix_x4(a[i], own_smem.at(first_row + i * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Product::kColumnTiles; j += 2) {  // 16 rows of b
      uint32_t b[4];  // rows 0-7: columns 0-7, 8-15; rows 8-15: likewise
      ptx::ldmatrix_x4(b, b_smem.at(j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < Product::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(product.at[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(product.at[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// sum += a b, with a rounded to T. Two neighbouring 8-column tiles of an accumulator have the
// layout of one mma operand of 16 columns.
template <class T, class Sum, class Factor, class Tile>
__device__ __forceinline__ void multiply_add(Sum& sum, const Factor& a, Tile& b_smem) {
  static_assert(Factor::kColumns == Tile::kRows && Sum::kColumns == Tile::kColumns);
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < Tile::kRows / 16; ++step) {  // 16 columns of a, rows of b
    uint32_t fragment[Sum::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Sum::kRowTiles; ++i) {
      const float (&low)[4] = a.at[i][2 * step], (&high)[4] = a.at[i][2 * step + 1];
      fragment[i][0] = ptx::pack<T>(low[0], low[1]);
      fragment[i][1] = ptx::pack<T>(low[2], low[3]);
      fragment[i][2] = ptx::pack<T>(high[0], high[1]);
      fragment[i][3] = ptx::pack<T>(high[2], high[3]);
    }
#pragma unroll
    for (int j = 0; j < Sum::kColumnTiles; j += 2) {  // 16 columns of b
      uint32_t b[4];  // columns 0-7: rows 0-7, 8-15; columns 8-15: likewise
      ptx::ldmatrix_x4_trans(b, b_smem.at(step * 16 + lane % 16, j + lane / 16));
#pragma unroll
      for (int i = 0; i < Sum::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(sum.at[i][j], fragment[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sum.at[i][j + 1], fragment[i], b[2], b[3]);
      }
    }
  }
}

// Leaves factor[row] * tile + earlier_factor[row] * (what own_smem holds) in own_smem, rounded to
// T.
template <class T, class Tile, class OwnTile, int kLaneRows>
__device__ __forceinline__ void write_rows(OwnTile& own_smem, const Tile& tile,
                                           const float (&factor)[kLaneRows],
                                           const float (&earlier_factor)[kLaneRows],
                                           bool has_earlier) {
  static_assert(kLaneRows == Tile::kLaneRows && OwnTile::kColumns == Tile::kColumns);
  const int first_row = warp_index() * Tile::kRows;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      auto* pair_smem =
          reinterpret_cast<uint32_t*>(own_smem.at(first_row + Tile::row(i), j)) + lane_index() % 4;
      const float (&elements)[4] = tile.at[i / 2][j];
      float2 pair = {elements[i % 2 * 2] * factor[i], elements[i % 2 * 2 + 1] * factor[i]};
      if (has_earlier) {
        const float2 earlier = ptx::unpack<T>(*pair_smem);
        pair.x += earlier.x * earlier_factor[i];
        pair.y += earlier.y * earlier_factor[i];
      }
      *pair_smem = ptx::pack<T>(pair.x, pair.y);
    }
  }
}

// Rows of the other side that this lane's own rows are paired with, in one segment.
template <int kLaneRows>
struct Attended {
  Interval rows[kLaneRows];
  int segment = -1;

  // token(lane_row) is the token of a row.
  template <class F>
  __device__ __forceinline__ void update(const Branch& branch, int new_segment, int group,
                                         F token) {
    if (new_segment == segment) return;
    segment = new_segment;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      rows[i] = branch.segments[segment].bounds(branch.run, group, token(i));
    }
  }

  // `value` where a pair is not in the pattern.
  template <class Tile>
  __device__ __forceinline__ void fill_others(Tile& pairs, int first_row, float value) const {
    pairs.for_each([&](float& pair, int row, int column) {
      if (!rows[row].contains(first_row + column)) pair = value;
    });
  }
};

}  // namespace sparse_attn::sm80
