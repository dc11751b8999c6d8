// SPDX-License-Identifier: Apache-2.0
// A tile of rows in shared memory.
#pragma once

#include <cstdint>

namespace sparse_attn {

// kRows rows of kColumns 16-bit elements, in panels of 64 columns where these divide kColumns. The
// 16-byte vectors of a panel's row are permuted by the row, so that eight lanes that read one
// vector column of eight rows (ldmatrix) meet all 32 banks. Panels of 64 columns are what wgmma
// and tensor maps call the 128-byte swizzle; of 32, the 64-byte swizzle.
template <class T, int kRows_, int kColumns_>
struct alignas(1024) SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kVectors = kColumns / 8;  // of 16 bytes in a row
  static constexpr int kPanelVectors = kVectors % 8 == 0 ? 8 : kVectors;
  static constexpr int kPanelColumns = kPanelVectors * 8;
  static constexpr int kPanelElements = kRows * kPanelColumns;
  static_assert(sizeof(T) == 2 && kVectors % 4 == 0, "a row must be whole half bank lines");

  T elements[kRows * kColumns];

  // The 16 bytes that hold columns 8 * vector to 8 * vector + 7 of a row.
  __device__ __forceinline__ T* at(int row, int vector) {
    const int permutation = kPanelVectors == 8 ? row % 8 : row / 2 % 4;
    if constexpr (kPanelVectors == kVectors) {
      return elements + (row * kVectors + (vector ^ permutation)) * 8;
    } else {
      return elements + vector / kPanelVectors * kPanelElements +
             (row * kPanelVectors + (vector % kPanelVectors ^ permutation)) * 8;
    }
  }
};

}  // namespace sparse_attn
