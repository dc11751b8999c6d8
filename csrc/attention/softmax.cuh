// SPDX-License-Identifier: Apache-2.0
// The softmax of rows whose scores come tile by tile.
#pragma once

#include "attention/register_tile.cuh"
#include "ptx/exp2.cuh"

namespace sparse_attn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// x, or 0 in place of minus infinity: keeps (-inf) - (-inf) out of the exponent of an empty row.
__device__ __forceinline__ float finite(float x) { return x == minus_infinity() ? 0.f : x; }

// The four lanes that hold a row agree on its greatest value, or its sum.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// The rows of a register tile. Maxima are in units of log 2, as `scores * scale_log2`.
template <int kLaneRows>
struct OnlineSoftmax {
  float row_max[kLaneRows];
  float row_sum[kLaneRows];  // of this lane's columns

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) row_max[i] = minus_infinity(), row_sum[i] = 0.f;
  }

  // Turns scores into weights exp2(score * scale_log2 - max), and tells by which factors earlier
  // sums and outputs shrink. scale_log2 must be positive: the greatest score then has the greatest
  // product.
  template <class Tile>
  __device__ __forceinline__ void update(Tile& scores, float scale_log2,
                                         float (&shrink)[kLaneRows]) {
    float tile_max[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) tile_max[i] = minus_infinity();
    scores.for_each(
        [&](float& score, int row, int) { tile_max[row] = fmaxf(tile_max[row], score); });
    float offset[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const float new_max = fmaxf(row_max[i], quad_max(tile_max[i]) * scale_log2);
      offset[i] = finite(new_max);
      shrink[i] = ptx::exp2(row_max[i] - offset[i]);
      row_max[i] = new_max;
      row_sum[i] *= shrink[i];
    }
    scores.for_each([&](float& score, int row, int) {
      score = ptx::exp2(score * scale_log2 - offset[row]);
      row_sum[row] += score;
    });
  }
};

}  // namespace sparse_attn
