// SPDX-License-Identifier: Apache-2.0
// The softmax of a row whose scores come tile by tile.
#pragma once

#include <cuda_runtime.h>

namespace sparse_attn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// x, or 0 in place of minus infinity: keeps (-inf) - (-inf) out of the exponent of an empty row.
__device__ __forceinline__ float finite(float x) { return x == minus_infinity() ? 0.f : x; }

// The four lanes that hold a row of an mma accumulator agree on its greatest value, or its sum.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Rows lane/4 and lane/4 + 8 of a warp's 16. Scores are in units of log 2.
struct OnlineSoftmax {
  float row_max[2] = {minus_infinity(), minus_infinity()};
  float row_sum[2] = {0.f, 0.f};  // of this lane's columns

  // Turns scores into weights exp2(score - max); returns what earlier sums and outputs shrink by.
  template <int kTiles>
  __device__ __forceinline__ float2 update(float (&scores)[kTiles][4]) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = row_max[half];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        tile_max = fmaxf(tile_max, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
      }
      tile_max = quad_max(tile_max);
      shrink[half] = exp2f(row_max[half] - finite(tile_max));
      row_max[half] = tile_max;
      row_sum[half] *= shrink[half];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          scores[i][j] = exp2f(scores[i][j] - finite(tile_max));
          row_sum[half] += scores[i][j];
        }
      }
    }
    return {shrink[0], shrink[1]};
  }
};

}  // namespace sparse_attn
