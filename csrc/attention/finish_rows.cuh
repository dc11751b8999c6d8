// SPDX-License-Identifier: Apache-2.0
// From sums over keys to the output and the lse, merged with earlier branches.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tile_copy.cuh"

namespace sparse_attn {

// Divides by the softmax sum and merges with the earlier branches, whose output is in out_smem.
// Leaves the output there and the lse in global memory (null for a row that does not exist).
template <class T, class Output, class OutputTile, int kLaneRows>
__device__ __forceinline__ void finish_rows(const Output& out, OutputTile& out_smem,
                                            const OnlineSoftmax<kLaneRows>& softmax,
                                            float* const (&lse_gmem)[kLaneRows], bool merge) {
  float share[kLaneRows], earlier_share[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float sum = quad_sum(softmax.row_sum[i]);
    // A query with no key: sum 0, output 0, lse -inf.
    float lse = sum == 0.f ? minus_infinity() : fmaf(softmax.row_max[i], kLn2, logf(sum));
    share[i] = sum == 0.f ? 0.f : 1.f / sum;
    earlier_share[i] = 0.f;
    if (merge && lse_gmem[i] != nullptr) {
      const float earlier = *lse_gmem[i];
      const float top = finite(fmaxf(lse, earlier));
      const float own_weight = exp2f((lse - top) * kLog2E);
      const float earlier_weight = exp2f((earlier - top) * kLog2E);
      const float total = own_weight + earlier_weight;
      lse = total == 0.f ? minus_infinity() : top + logf(total);
      share[i] *= total == 0.f ? 0.f : own_weight / total;
      earlier_share[i] = total == 0.f ? 0.f : earlier_weight / total;
    }
    __syncwarp();  // four lanes read the earlier lse of a row, then one writes the new one
    if (threadIdx.x % 4 == 0 && lse_gmem[i] != nullptr) *lse_gmem[i] = lse;
  }
  write_rows<T>(out_smem, out, share, earlier_share, merge);
}

}  // namespace sparse_attn
