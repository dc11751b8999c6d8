// SPDX-License-Identifier: Apache-2.0
// Sums from registers straight to global memory, 16 bytes a lane.
#pragma once

#include "attention/register_tile.cuh"
#include "attention/tile_copy.cuh"

namespace sparse_attn::sm90::backward_band {

// Of four lanes that share a row, lane i has the i-th pair of columns of each of four column tiles;
// afterwards all pairs of the i-th column tile. Its own inverse.
__device__ __forceinline__ void exchange(uint32_t (&pairs)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = pairs[i], &high = pairs[i + step];
      const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? low : high, step);
      (upper ? low : high) = other;
    }
  }
}

// Stores factor * sum, the 16 rows of a warp from `row` of a tile and columns from `first_column`,
// or adds it to what is there.
template <class T, class Sum>
__device__ __forceinline__ void store_sum(const Sum& sum, float factor, const TensorView& target,
                                          const SequenceView& view, const QueryTile& tile, int head,
                                          int row, int first_column, int head_dim,
                                          bool accumulate) {
  T* gmem = head_gmem<T>(target, tile.batch, head);
#pragma unroll
  for (int i = 0; i < Sum::kLaneRows; ++i) {
    const int lane_row = row + Sum::row(i);
    const bool exists = lane_row < tile.rows;
    const int64_t token = view.position(tile.group, tile.first_row + lane_row);
    T* row_gmem = gmem + token * target.row_stride;
#pragma unroll
    for (int j = 0; j < Sum::kColumnTiles; j += 4) {
      const int column = first_column + (j + threadIdx.x % 4) * 8;
      const bool stores = exists && column < head_dim;
      uint4* vector_gmem = reinterpret_cast<uint4*>(row_gmem + column);
      uint32_t earlier[4] = {};
      if (accumulate) {
        const uint4 vector = stores ? *vector_gmem : uint4{};
        earlier[0] = vector.x, earlier[1] = vector.y, earlier[2] = vector.z, earlier[3] = vector.w;
        exchange(earlier);
      }
      uint32_t pairs[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&elements)[4] = sum.at[0][j + k];
        const float2 before = ptx::unpack<T>(earlier[k]);
        pairs[k] = ptx::pack<T>(elements[2 * i] * factor + before.x,
                                elements[2 * i + 1] * factor + before.y);
      }
      exchange(pairs);
      if (stores) *vector_gmem = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

}  // namespace sparse_attn::sm90::backward_band
