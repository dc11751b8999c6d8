// SPDX-License-Identifier: Apache-2.0
// The 16 rows of a warp: in shared memory, and the end of their softmax.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/reciprocal.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// A warp's 16 rows of a tile, 16 columns at a time, as ldmatrix and stmatrix have them: the layout
// of accumulators.
template <class T, class Tile>
struct WarpRows {
  Tile& tile_smem;
  int offset;  // of this lane's vector of the first 16 columns

  __device__ __forceinline__ WarpRows(Tile& tile_smem, int warp_row) : tile_smem(tile_smem) {
    offset = tile_smem.at(warp_row + threadIdx.x % 16, threadIdx.x % 32 / 16) - tile_smem.elements;
  }

  // f(element of a sum, the number at its place, row of the lane)
  template <class Sum, class F>
  __device__ __forceinline__ void for_each(Sum& sum, F f) const {
#pragma unroll
    for (int i = 0; i < Sum::kColumns / 16; ++i) {
      uint32_t pairs[4];
      ptx::ldmatrix_x4(pairs, at(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = ptx::unpack<T>(pairs[j]);
        float (&elements)[4] = sum.at[0][2 * i + j / 2];
        f(elements[j % 2 * 2], pair.x, j % 2);
        f(elements[j % 2 * 2 + 1], pair.y, j % 2);
      }
    }
  }

  // As the left operand of a product.
  __device__ __forceinline__ void read(Rounded<T, RegisterTile<16, Tile::kColumns>>& rows) const {
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 16; ++i) ptx::ldmatrix_x4(rows.at[i], at(i));
  }

  // share * sum, rounded.
  template <class Sum>
  __device__ __forceinline__ void write(Sum& sum, const float (&share)[2]) const {
    sum.for_each([&](float& element, int row, int) { element *= share[row]; });
    const Rounded<T, Sum> rounded(sum);
#pragma unroll
    for (int i = 0; i < Sum::kColumns / 16; ++i) ptx::stmatrix_x4(at(i), rounded.at[i]);
  }

 private:
  // Vectors of a panel are permuted by an exclusive or.
  __device__ __forceinline__ T* at(int i) const {
    constexpr int kOfPanel = Tile::kPanelVectors / 2;
    return tile_smem.elements + (offset ^ i % kOfPanel * 16) + i / kOfPanel * Tile::kPanelElements;
  }
};

// Leaves the lse; what the sums of this lane's two rows are to be multiplied by. max_of(row): what
// their weights are relative to, in units of log 2. A query with no key: 0, lse -inf.
template <class MaxOf>
__device__ __forceinline__ void finish_softmax(const float (&row_sum)[2], MaxOf max_of,
                                               float* lse_smem, float (&share)[2]) {
  float total[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] = quad_sum(row_sum[i]);
    share[i] = total[i] == 0.f ? 0.f : ptx::reciprocal(total[i]);
  }
  // Two of the four lanes of a row take one of its logarithms each.
  const int row = threadIdx.x % 2;
  const float lse = fmaf(max_of(row), kLn2, logf(row == 0 ? total[0] : total[1]));
  if (threadIdx.x % 4 < 2) lse_smem[threadIdx.x % 32 / 4 + 8 * row] = lse;
}

}  // namespace sparse_attn::sm90::forward
