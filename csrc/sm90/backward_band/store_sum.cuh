// SPDX-License-Identifier: Apache-2.0
// Sums from registers to global memory.
#pragma once

#include "attention/tile_copy.cuh"
#include "ptx/add_vector.cuh"
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
  bool adds;  // to what is there, which no other launch or lane adds to now
};

// A sum on its way, as a lane stores it: 16 bytes of a row at a time.
template <class T, class Sum>
struct Outgoing {
  static constexpr int kVectors = Sum::kColumns / 8;
  static constexpr int kLanes = kVectors < 8 ? kVectors : 8;  // that share a row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kRowCopies = kVectors / kLanes;  // of a row, one after another
  static constexpr int kCopies = 16 / kRowsAtOnce * kRowCopies;
  uint4 vectors[kCopies];

  // The row and the vector of a row that a lane stores.
  static __device__ __forceinline__ int row(int copy, int lane) {
    return copy / kRowCopies * kRowsAtOnce + lane / kLanes;
  }
  static __device__ __forceinline__ int vector(int copy, int lane) {
    return copy % kRowCopies * kLanes + lane % kLanes;
  }

  // factor * sum, by way of a tile in shared memory that nobody reads any more: its rows from
  // `first_row` on.
  template <class Tile>
  __device__ __forceinline__ Outgoing(Sum& sum, float factor, Tile& tile_smem, int first_row) {
    const int lane = ptx::lane();
    sum.for_each([&](float& element, int, int) { element *= factor; });
    const Rounded<T, Sum> rounded(sum);
#pragma unroll
    for (int i = 0; i < kVectors / 2; ++i) {  // rows of four matrices of 16 columns
      ptx::stmatrix_x4(tile_smem.at(first_row + lane % 16, 2 * i + lane / 16), rounded.at[i]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      vectors[i] =
          *reinterpret_cast<const uint4*>(tile_smem.at(first_row + row(i, lane), vector(i, lane)));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void store(const Target& target) const {
    T* gmem = head_gmem<T>(target.tensor, target.tile.batch, target.tile.head);
    const int lane = ptx::lane();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int tile_row = target.row + row(i, lane);
      const int64_t token =
          target.view.position(target.tile.group, target.tile.first_row + tile_row);
      T* vector_gmem = gmem + token * target.tensor.row_stride + vector(i, lane) * 8;
      const bool exists = tile_row < target.tile.rows && vector(i, lane) * 8 < target.head_dim;
      if (exists && target.adds) {
        ptx::add_vector<T>(vector_gmem, vectors[i]);
      } else if (exists) {
        *reinterpret_cast<uint4*>(vector_gmem) = vectors[i];
      }
    }
  }
};

}  // namespace sparse_attn::sm90::backward_band
