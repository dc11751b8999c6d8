// SPDX-License-Identifier: Apache-2.0
// What a CTA of the portable kernels does with tiles: copies rows of a strided view to and from
// shared memory, and multiplies them with mma.sync. A warp owns 16 rows of the CTA's own tile.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tiles.h"
#include "params.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sync.cuh"

namespace sparse_attn::sm80 {

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// Row of the own tile that this lane holds in an mma accumulator: elements 0, 1 (half 0) or 2, 3.
__device__ __forceinline__ int own_row(int half) {
  return warp_index() * 16 + lane_index() / 4 + half * 8;
}

// First element of a (batch, head) of a tensor.
template <class T>
__device__ __forceinline__ T* head_gmem(const TensorView& tensor, int batch, int head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

// Starts copying rows [first_row, end_row) of a view into a tile; zeros where there is no row, and
// past head_dim.
template <int kThreads, class T, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile_smem, const T* gmem, int64_t row_stride,
                                          const SequenceView& view, int group, int first_row,
                                          int end_row, int head_dim) {
#pragma unroll
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kVectors; i += kThreads) {
    const int row = i / Tile::kVectors, vector = i % Tile::kVectors;
    const bool exists = first_row + row < end_row && vector * 8 < head_dim;
    const int64_t token = exists ? view.position(group, first_row + row) : 0;
    const T* row_gmem = gmem + (exists ? token * row_stride + vector * 8 : 0);
    ptx::cp_async_16(tile_smem.at(row, vector), row_gmem, exists);
  }
}

template <int kThreads, class T, class Tile>
__device__ __forceinline__ void store_tile(Tile& tile_smem, T* gmem, int64_t row_stride,
                                           const SequenceView& view, const QueryTile& tile,
                                           int head_dim) {
#pragma unroll
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kVectors; i += kThreads) {
    const int row = i / Tile::kVectors, vector = i % Tile::kVectors;
    if (row < tile.rows && vector * 8 < head_dim) {
      const int64_t token = view.position(tile.group, tile.first_row + row);
      *reinterpret_cast<uint4*>(gmem + token * row_stride + vector * 8) =
          *reinterpret_cast<const uint4*>(tile_smem.at(row, vector));
    }
  }
}

// The mma operand (16 rows of this warp, columns 16 step to 16 step + 15).
template <class Tile>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], Tile& own_smem, int step) {
  const int lane = lane_index();
  ptx::ldmatrix_x4(fragment, own_smem.at(warp_index() * 16 + lane % 16, step * 2 + lane / 16));
}

// accumulator (16, rows) += a (16, 16) b^T: columns 16 step to 16 step + 15 of the rows of b.
template <class T, class Tile, int kTiles>
__device__ __forceinline__ void multiply_transposed(float (&accumulator)[kTiles][4],
                                                    const uint32_t (&a)[4], Tile& b_smem,
                                                    int step) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {  // 16 rows of b
    uint32_t b[4];                       // rows 0-7: columns 0-7, 8-15; rows 8-15: likewise
    ptx::ldmatrix_x4(b, b_smem.at(i * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    ptx::mma_m16n8k16<T>(accumulator[i], a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(accumulator[i + 1], a, b[2], b[3]);
  }
}

// accumulator (16, columns) += a (16, rows) b (rows, columns). `a` is an accumulator itself, whose
// two neighbouring 8-column tiles have the layout of one operand of 16 columns; it is rounded to T.
template <class T, class Tile, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply(float (&accumulator)[kColumnTiles][4],
                                         const float (&a)[kRowTiles][4], Tile& b_smem) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < kRowTiles / 2; ++step) {  // 16 rows of b
    const float (&low)[4] = a[2 * step], (&high)[4] = a[2 * step + 1];
    const uint32_t fragment[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]),
                                  ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < kColumnTiles; i += 2) {  // 16 columns of b
      uint32_t b[4];  // columns 0-7: rows 0-7, 8-15; columns 8-15: likewise
      ptx::ldmatrix_x4_trans(b, b_smem.at(step * 16 + lane % 16, i + lane / 16));
      ptx::mma_m16n8k16<T>(accumulator[i], fragment, b[0], b[1]);
      ptx::mma_m16n8k16<T>(accumulator[i + 1], fragment, b[2], b[3]);
    }
  }
}

// Rows of the other side that this lane's two own rows are paired with, in one segment.
struct Attended {
  Interval rows[2];
  int segment = -1;

  __device__ __forceinline__ void update(const Branch& branch, int new_segment, int group,
                                         const int (&token)[2]) {
    if (new_segment == segment) return;
    segment = new_segment;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = branch.segments[segment].bounds(branch.run, group, token[half]);
    }
  }
};

// `value` where a pair is not in the pattern.
template <int kTiles>
__device__ __forceinline__ void fill_masked(float (&pairs)[kTiles][4], int first_row,
                                            const Attended& attended, float value) {
  const int column = lane_index() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first_row + i * 8 + column + j % 2;
      if (!attended.rows[j / 2].contains(row)) pairs[i][j] = value;
    }
  }
}

}  // namespace sparse_attn::sm80
