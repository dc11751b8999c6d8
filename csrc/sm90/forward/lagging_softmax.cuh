// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfloat>

#include "attention/softmax.cuh"
#include "sm90/forward/warp_rows.cuh"
#include "sm90/multiply.cuh"

namespace sparse_attn::sm90::forward {

// The softmax of 16 queries of a warp, in units of log 2. Maxima lag: weights are found with those
// of the tiles before, without a look at the scores. Only if they come out too large for 16 bits
// are the maxima raised, and the weights found again.
struct LaggingSoftmax {
  // Weights are relative to less than the maximum: more of them are normal numbers in fp16.
  static constexpr float kAbove = 7.f;
  static constexpr float kMostSum = 32768.f;  // of a lane's weights: each is finite in fp16
  float row_max[2];                           // finite: the weights of a query without keys are 0
  float row_sum[2];                           // of this lane's columns

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_max[i] = -FLT_MAX, row_sum[i] = 0.f;
  }

  // What weights are relative to. A sum of its own for each tile, so that ptxas gives those of two
  // rows an odd and an even register (README.md).
  __device__ __forceinline__ float reference(int row) const { return row_max[row] - kAbove; }

  // Raises the maxima to these of all lanes; by what earlier sums shrink.
  __device__ __forceinline__ void raise(const float (&lane_max)[2], float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float old_reference = reference(i);
      row_max[i] = fmaxf(row_max[i], quad_max(lane_max[i]));
      shrink[i] = ptx::exp2(old_reference - reference(i));
      row_sum[i] *= shrink[i];
    }
  }

  // Raises them to those of scores.
  template <class Scores, class Output>
  __device__ __forceinline__ void raise(Scores& scores, float scale_log2, Output& out) {
    float even[2], odd[2];  // two chains of comparisons a row
#pragma unroll
    for (int i = 0; i < 2; ++i) even[i] = odd[i] = minus_infinity();
    scores.for_each([&](float& score, int row, int column) {
      float& max = column % 2 == 0 ? even[row] : odd[row];
      max = fmaxf(max, score);
    });
    float lane_max[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) lane_max[i] = fmaxf(even[i], odd[i]) * scale_log2;
    raise(lane_max, shrink);
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
  }

  // The weights of blocks [kFirst, kEnd) of 16 columns, added to `sum`.
  template <int kFirst, int kEnd, class T, class Weighed, class Scores>
  __device__ __forceinline__ void weigh(Rounded<T, Weighed>& weights, const Scores& scores,
                                        float scale_log2, float (&sum)[2]) const {
    const float max[2] = {reference(0), reference(1)};
#pragma unroll
    for (int i = 2 * kFirst; i < 2 * kEnd; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float (&columns)[4] = scores.at[0][i];
        const float low = ptx::exp2(fmaf(columns[2 * row], scale_log2, -max[row]));
        const float high = ptx::exp2(fmaf(columns[2 * row + 1], scale_log2, -max[row]));
        sum[row] += low;
        sum[row] += high;
        weights.at[i / 2][i % 2 * 2 + row] = ptx::pack<T>(low, high);
      }
    }
  }

  // Whether some weights of the warp are too large, by their sums.
  static __device__ __forceinline__ bool too_large(const float (&sum)[2]) {
    return __any_sync(0xffffffff, fmaxf(sum[0], sum[1]) > kMostSum);
  }

  __device__ __forceinline__ void add(const float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row_sum[i] += sum[i];
  }

  // Adds keys that others have summed up to an output, of this lse.
  template <class Output, class Rows>
  __device__ __forceinline__ void join(Output& out, const Rows& earlier_rows,
                                       const float* lse_smem) {
    float earlier_max[2], shrink[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      earlier_max[i] = lse_smem[threadIdx.x % 32 / 4 + 8 * i] * kLog2E;
    }
    raise(earlier_max, shrink);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = ptx::exp2(earlier_max[i] - reference(i));
      if (threadIdx.x % 4 == 0) row_sum[i] += weight[i];
    }
    out.for_each([&](float& element, int row, int) { element *= shrink[row]; });
    earlier_rows.for_each(
        out, [&](float& element, float earlier, int row) { element += weight[row] * earlier; });
  }

  __device__ __forceinline__ void finish(float* lse_smem, float (&share)[2]) const {
    finish_softmax(
        row_sum, [&](int row) { return row == 0 ? reference(0) : reference(1); }, lse_smem, share);
  }
};

}  // namespace sparse_attn::sm90::forward
