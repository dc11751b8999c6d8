// SPDX-License-Identifier: Apache-2.0
// Sums from registers to global memory.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/registers.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::backward_band {

// Where the sums of 16 rows of a warp go: rows of `tile` from `row` on.
struct Target {
  const TensorView& tensor;
  const SequenceView& view;
  const QueryTile& tile;
  int row;
  int head_dim;
  bool accumulate;  // add to what is there
};

// A sum on its way, as a lane stores it: 16 bytes of a row at a time.
template <class T, class Sum>
struct Outgoing {
  static constexpr int kVectors = Sum::kColumns / 8;
  static constexpr int kLanes = kVectors < 8 ? kVectors : 8;  // that share a row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kSteps = 16 / kRowsAtOnce;
  static constexpr int kCopies = kSteps * kVectors / kLanes;
  uint4 vectors[kCopies];

  // f(index, row, vector, address in global memory, whether it exists)
  template <class F>
  static __device__ __forceinline__ void for_each(const Target& target, F f) {
    T* gmem = head_gmem<T>(target.tensor, target.tile.batch, target.tile.head);
    const int lane = ptx::lane();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i % kSteps * kRowsAtOnce + lane / kLanes;
      const int vector = i / kSteps * kLanes + lane % kLanes;
      const int64_t token =
          target.view.position(target.tile.group, target.tile.first_row + target.row + row);
      f(i, row, vector,
        reinterpret_cast<uint4*>(gmem + token * target.tensor.row_stride + vector * 8),
        target.row + row < target.tile.rows && vector * 8 < target.head_dim);
    }
  }

  // factor * sum, by way of a tile in shared memory that nobody reads any more: its rows from
  // `first_row` on.
  template <class Tile>
  __device__ __forceinline__ Outgoing(Sum& sum, float factor, Tile& tile_smem, int first_row,
                                      const Target& target) {
    const auto vector_smem = [&](int row, int vector) -> uint4& {
      return *reinterpret_cast<uint4*>(tile_smem.at(first_row + row, vector));
    };
    const int lane = ptx::lane();
    // A row of four matrices of 16 columns.
    const auto matrix_smem = [&](int i) { return &vector_smem(lane % 16, 2 * i + lane / 16); };
    sum.for_each([&](float& element, int, int) { element *= factor; });
    if (target.accumulate) {
      for_each(target, [&](int i, int, int, const uint4* gmem, bool exists) {
        vectors[i] = exists ? *gmem : uint4{};
      });
      for_each(target, [&](int i, int row, int vector, const uint4*, bool) {
        vector_smem(row, vector) = vectors[i];
      });
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
    for_each(target, [&](int i, int row, int vector, const uint4*, bool) {
      vectors[i] = vector_smem(row, vector);
    });
    __syncwarp();
  }

  __device__ __forceinline__ void store(const Target& target) const {
    for_each(target, [&](int i, int, int, uint4* gmem, bool exists) {
      if (exists) *gmem = vectors[i];
    });
  }
};

}  // namespace sparse_attn::sm90::backward_band
