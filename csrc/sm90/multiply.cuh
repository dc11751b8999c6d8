// SPDX-License-Identifier: Apache-2.0
// Products of tiles with wgmma: 64 rows of a warpgroup, 16 of each warp.
#pragma once

#include "attention/shared_tile.cuh"
#include "ptx/mma_sync.cuh"
#include "ptx/wgmma.cuh"

namespace sparse_attn::sm90 {

// A tile as an operand of wgmma, from one of its rows on.
template <class Tile>
__device__ __forceinline__ uint64_t operand(const Tile& tile_smem, int first_row = 0) {
  static_assert(Tile::kPanelColumns == 64 || Tile::kPanelColumns == 32);
  const uint64_t whole =
      ptx::wgmma_operand(tile_smem.elements, Tile::kPanelColumns * 2, Tile::kPanelElements * 2);
  return ptx::moved(whole, first_row * Tile::kPanelColumns * 2);
}

// Starts product = a b^T, or product += a b^T, for the rows of b from `first_row` on.
template <class T, bool kAdd = false, class Product, class TileA, class TileB>
__device__ __forceinline__ void start_multiply_transposed(Product& product, const TileA& a_smem,
                                                          const TileB& b_smem, int first_row = 0) {
  static_assert(TileA::kRows == 64 && TileB::kRows % Product::kColumns == 0);
  static_assert(TileA::kColumns == TileB::kColumns);
  constexpr int kPanel = TileA::kPanelColumns;
  const uint64_t a = operand(a_smem), b = operand(b_smem, first_row);
#pragma unroll
  for (int column = 0; column < TileA::kColumns; column += 16) {
    const auto bytes = [column](int panel_elements) {
      return (column / kPanel * panel_elements + column % kPanel) * int{sizeof(T)};
    };
    const uint64_t a_operand = ptx::moved(a, bytes(TileA::kPanelElements));
    const uint64_t b_operand = ptx::moved(b, bytes(TileB::kPanelElements));
    if (column == 0 && !kAdd) {
      ptx::wgmma_transposed<T, false>(product, a_operand, b_operand);
    } else {
      ptx::wgmma_transposed<T, true>(product, a_operand, b_operand);
    }
  }
  ptx::wgmma_commit();
}

// A register tile rounded to T, as the left operand of a product.
template <class T, class Tile>
struct Rounded {
  uint32_t at[Tile::kColumns / 16][4];

  Rounded() = default;
  __device__ __forceinline__ explicit Rounded(const Tile& tile) { round(tile); }

  __device__ __forceinline__ void round(const Tile& tile) {
    static_assert(Tile::kRows == 16);
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 16; ++i) {
      const float (&low)[4] = tile.at[0][2 * i], (&high)[4] = tile.at[0][2 * i + 1];
      at[i][0] = ptx::pack<T>(low[0], low[1]);
      at[i][1] = ptx::pack<T>(low[2], low[3]);
      at[i][2] = ptx::pack<T>(high[0], high[1]);
      at[i][3] = ptx::pack<T>(high[2], high[3]);
    }
  }
};

// Keeps registers that a wgmma reads from being reused before this point.
template <class T, class Tile>
__device__ __forceinline__ void keep(Rounded<T, Tile>& rounded) {
#pragma unroll
  for (auto& fragment : rounded.at) {
#pragma unroll
    for (uint32_t& pair : fragment) asm volatile("" : "+r"(pair)::"memory");
  }
}

// Starts product = a b^T, with rows of a in registers.
template <class T, class Product, class TileA, class TileB>
__device__ __forceinline__ void start_multiply_transposed(Product& product,
                                                          const Rounded<T, TileA>& a,
                                                          const TileB& b_smem) {
  static_assert(TileB::kRows == Product::kColumns && TileB::kColumns == TileA::kColumns);
  static_assert(TileB::kPanelColumns == 64);
  const uint64_t b = operand(b_smem);
#pragma unroll
  for (int i = 0; i < TileA::kColumns / 16; ++i) {
    const int elements = 16 * i / 64 * TileB::kPanelElements + 16 * i % 64;
    const uint64_t b_operand = ptx::moved(b, elements * int{sizeof(T)});
    if (i == 0) {
      ptx::wgmma_transposed<T, false>(product, a.at[i], b_operand);
    } else {
      ptx::wgmma_transposed<T, true>(product, a.at[i], b_operand);
    }
  }
  ptx::wgmma_commit();
}

// Starts sum += a b, for the rows of b from `first_row` on.
template <class T, class Sum, class TileA, class TileB>
__device__ __forceinline__ void start_multiply_add(Sum& sum, const Rounded<T, TileA>& a,
                                                   const TileB& b_smem, int first_row = 0) {
  static_assert(TileB::kRows % TileA::kColumns == 0 && TileB::kColumns == Sum::kColumns);
  const uint64_t b = operand(b_smem, first_row);
#pragma unroll
  for (int i = 0; i < TileA::kColumns / 16; ++i) {  // 16 rows of b
    ptx::wgmma_add<T>(sum, a.at[i], ptx::moved(b, i * 16 * TileB::kPanelColumns * int{sizeof(T)}));
  }
  ptx::wgmma_commit();
}

// Likewise, with a in shared memory.
template <class T, class Sum, class TileA, class TileB>
__device__ __forceinline__ void start_multiply_add(Sum& sum, const TileA& a_smem,
                                                   const TileB& b_smem) {
  static_assert(TileA::kColumns == 64 && TileB::kRows == 64 && TileB::kPanelColumns == 64);
  static_assert(TileB::kColumns == Sum::kColumns);
  const uint64_t a = operand(a_smem), b = operand(b_smem);
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 16 columns of a, 16 rows of b
    ptx::wgmma<T, true>(sum, ptx::moved(a, i * 16 * int{sizeof(T)}),
                        ptx::moved(b, i * 16 * 64 * int{sizeof(T)}));
  }
  ptx::wgmma_commit();
}

// sum = a^T b, or sum += a^T b, for as many columns of b as sum has, from first_column on.
template <class T, bool kAdd, class Sum, class TileA, class TileB>
__device__ __forceinline__ void multiply_across(Sum& sum, const TileA& a_smem, const TileB& b_smem,
                                                int first_column) {
  static_assert(TileA::kColumns == 64 && TileA::kRows == TileB::kRows);
  constexpr int kPanel = TileB::kPanelColumns;
  const int first = first_column / kPanel * TileB::kPanelElements + first_column % kPanel;
  const uint64_t a = operand(a_smem), b = ptx::moved(operand(b_smem), first * int{sizeof(T)});
#pragma unroll
  for (int row = 0; row < TileA::kRows; row += 16) {
    const uint64_t a_rows = ptx::moved(a, row * TileA::kPanelColumns * int{sizeof(T)});
    const uint64_t b_rows = ptx::moved(b, row * kPanel * int{sizeof(T)});
    if (row == 0 && !kAdd) {
      ptx::wgmma_across<T, false>(sum, a_rows, b_rows);
    } else {
      ptx::wgmma_across<T, true>(sum, a_rows, b_rows);
    }
  }
}

// Starts sum += a^T b.
template <class T, class Sum, class TileA, class TileB>
__device__ __forceinline__ void start_multiply_add_across(Sum& sum, const TileA& a_smem,
                                                          const TileB& b_smem) {
  static_assert(TileB::kColumns == Sum::kColumns);
  multiply_across<T, true>(sum, a_smem, b_smem, 0);
  ptx::wgmma_commit();
}

}  // namespace sparse_attn::sm90
