// SPDX-License-Identifier: Apache-2.0
// A tile of rows in shared memory.
#pragma once

#include <cstdint>

namespace sparse_attn {

// kRows rows of kColumns 16-bit elements. The 16-byte vectors of a row are permuted by the row, so
// that eight lanes that read one vector column of eight rows (ldmatrix) meet all 32 banks.
template <class T, int kRows_, int kColumns_>
struct alignas(128) SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kVectors = kColumns / 8;  // of 16 bytes in a row
  static_assert(sizeof(T) == 2 && kVectors % 4 == 0, "a row must be whole half bank lines");

  T elements[kRows * kColumns];

  // The 16 bytes that hold columns 8 * vector to 8 * vector + 7 of a row.
  __device__ __forceinline__ T* at(int row, int vector) {
    const int permutation = kVectors % 8 == 0 ? row % 8 : row / 2 % 4;
    return elements + row * kColumns + (vector ^ permutation) * 8;
  }
};

}  // namespace sparse_attn
