// SPDX-License-Identifier: Apache-2.0
// Products of tiles with mma.sync. Each warp owns neighbouring rows of the CTA's own tile.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma_sync.cuh"

namespace sparse_attn::sm80 {

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// product = own b^T: the rows of this warp times the rows of b from `b_row` on. kStepsAtOnce: fewer
// hold fewer registers.
template <class T, int kStepsAtOnce = 16, class Product, class OwnTile, class Tile>
__device__ __forceinline__ void multiply_transposed(Product& product, OwnTile& own_smem,
                                                    Tile& b_smem, int b_row = 0) {
  static_assert(OwnTile::kColumns == Tile::kColumns && Tile::kRows % Product::kColumns == 0);
  const int lane = lane_index(), first_row = warp_row<OwnTile::kRows, Product::kRows>();
  product.clear();
#pragma unroll kStepsAtOnce
  for (int step = 0; step < Tile::kColumns / 16; ++step) {  // 16 columns of both
    uint32_t a[Product::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
      ptx::ldmatrix_x4(a[i], own_smem.at(first_row + i * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Product::kColumnTiles; j += 2) {  // 16 rows of b
      uint32_t b[4];  // rows 0-7: columns 0-7, 8-15; rows 8-15: likewise
      const int row = b_row + j * 8 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b, b_smem.at(row, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < Product::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(product.at[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(product.at[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// sum += a b, with a rounded to T and the rows of b from `b_row` on. Two neighbouring 8-column
// tiles of an accumulator have the layout of one mma operand of 16 columns.
template <class T, class Sum, class Factor, class Tile>
__device__ __forceinline__ void multiply_add(Sum& sum, const Factor& a, Tile& b_smem,
                                             int b_row = 0) {
  static_assert(Tile::kRows % Factor::kColumns == 0 && Sum::kColumns == Tile::kColumns);
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < Factor::kColumns / 16; ++step) {  // 16 columns of a, rows of b
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
      ptx::ldmatrix_x4_trans(b, b_smem.at(b_row + step * 16 + lane % 16, j + lane / 16));
#pragma unroll
      for (int i = 0; i < Sum::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(sum.at[i][j], fragment[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sum.at[i][j + 1], fragment[i], b[2], b[3]);
      }
    }
  }
}

}  // namespace sparse_attn::sm80
