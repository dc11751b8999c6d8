// SPDX-License-Identifier: Apache-2.0
// Sums from registers to global memory.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/ldmatrix.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::backward_band {

// Where the sums of 16 rows of a warp go: rows of `tile` from `row` on, columns from `column` on.
struct Target {
  const TensorView& tensor;
  const SequenceView& view;
  const QueryTile& tile;
  int row;
  int column;
  int head_dim;
  bool accumulate;  // add to what is there
};

// By way of a tile in shared memory that nobody reads any more: its rows from `scratch_row` on,
// vectors from `scratch_vector` on.
template <class T, class Sum, class Tile>
__device__ __forceinline__ void store_sum(Sum& sum, float factor, Tile& scratch_smem,
                                          int scratch_row, int scratch_vector,
                                          const Target& target) {
  constexpr int kVectors = Sum::kColumns / 8;
  constexpr int kLanes = kVectors < 8 ? kVectors : 8;  // that share a row
  constexpr int kCopies = 16 * kVectors / 32;          // of a lane, 16 bytes each
  constexpr int kRowsAtOnce = 32 / kLanes;
  const int lane = threadIdx.x % 32;
  T* gmem = head_gmem<T>(target.tensor, target.tile.batch, target.tile.head) + target.column;
  // f(vector in shared memory, in global memory, whether it exists)
  const auto for_each_copy = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i % (16 / kRowsAtOnce) * kRowsAtOnce + lane / kLanes;
      const int vector = i / (16 / kRowsAtOnce) * kLanes + lane % kLanes;
      const int64_t token =
          target.view.position(target.tile.group, target.tile.first_row + target.row + row);
      f(i, *reinterpret_cast<uint4*>(scratch_smem.at(scratch_row + row, scratch_vector + vector)),
        reinterpret_cast<uint4*>(gmem + token * target.tensor.row_stride + vector * 8),
        target.row + row < target.tile.rows && target.column + vector * 8 < target.head_dim);
    }
  };
  // The row and the vector of matrix lane / 8 of four.
  const auto matrix_smem = [&](int i) {
    return scratch_smem.at(scratch_row + lane % 16, scratch_vector + 2 * i + lane / 16);
  };

  sum.for_each([&](float& element, int, int) { element *= factor; });
  if (target.accumulate) {
    uint4 earlier[kCopies];
    for_each_copy([&](int i, uint4&, const uint4* gmem, bool exists) {
      earlier[i] = exists ? *gmem : uint4{};
    });
    for_each_copy([&](int i, uint4& smem, const uint4*, bool) { smem = earlier[i]; });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVectors / 2; ++i) {
      uint32_t pairs[4];
      ptx::ldmatrix_x4(pairs, matrix_smem(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = ptx::unpack<T>(pairs[j]);
        sum.at[0][2 * i + j / 2][j % 2 * 2] += pair.x;
        sum.at[0][2 * i + j / 2][j % 2 * 2 + 1] += pair.y;
      }
    }
    __syncwarp();
  }
  const Rounded<T, Sum> rounded(sum);
#pragma unroll
  for (int i = 0; i < kVectors / 2; ++i) ptx::stmatrix_x4(matrix_smem(i), rounded.at[i]);
  __syncwarp();
  for_each_copy([&](int, const uint4& smem, uint4* gmem, bool exists) {
    if (exists) *gmem = smem;
  });
  __syncwarp();
}

}  // namespace sparse_attn::sm90::backward_band
