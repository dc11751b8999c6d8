// SPDX-License-Identifier: Apache-2.0
// A tile of fp32 numbers in the registers of one warp.
#pragma once

namespace sparse_attn {

// kRows x kColumns in the layout of mma accumulators: of each 16 x 8, lane l holds rows l/4
// (elements 0, 1) and l/4 + 8 (elements 2, 3), columns 2 (l % 4) and 2 (l % 4) + 1.
template <int kRows_, int kColumns_>
struct RegisterTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kLaneRows = 2 * kRowTiles;  // rows of which a lane holds a part

  float at[kRowTiles][kColumnTiles][4];

  // Row of the tile that is this lane's `lane_row`-th.
  static __device__ __forceinline__ int row(int lane_row) {
    return lane_row / 2 * 16 + lane_row % 2 * 8 + threadIdx.x % 32 / 4;
  }

  // f(element, lane_row, column) for each element of this lane.
  template <class F>
  __device__ __forceinline__ void for_each(F f) {
    const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) f(at[i][j][k], 2 * i + k / 2, j * 8 + lane_column + k % 2);
      }
    }
  }

  // f(element, element of the other tile, lane_row, column).
  template <class F>
  __device__ __forceinline__ void for_each(const RegisterTile& other, F f) {
    const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          f(at[i][j][k], other.at[i][j][k], 2 * i + k / 2, j * 8 + lane_column + k % 2);
        }
      }
    }
  }

  __device__ __forceinline__ void clear() {
    for_each([](float& element, int, int) { element = 0.f; });
  }
};

}  // namespace sparse_attn
