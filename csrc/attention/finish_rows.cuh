// SPDX-License-Identifier: Apache-2.0
// From sums over keys to the output and the lse, merged with earlier branches.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tile_copy.cuh"

namespace sparse_attn {

// Divides by the softmax sum and merges with the earlier branches, whose output is in out_smem.
// Leaves the output there and the lse at its place (null for a row that does not exist), where that
// of the earlier branches is.
template <class T, class Output, class OutputTile, int kLaneRows>
__device__ __forceinline__ void finish_rows(const Output& out, OutputTile& out_smem,
                                            const OnlineSoftmax<kLaneRows>& softmax,
                                            float* const (&lse)[kLaneRows], bool merge) {
  float share[kLaneRows], earlier_share[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    // In units of log 2; the greater of the two weighs 1.
    const float own_max = softmax.row_max[i];
    const float earlier = merge && lse[i] != nullptr ? *lse[i] * kLog2E : minus_infinity();
    const float top = finite(fmaxf(own_max, earlier));
    const float own_weight = ptx::exp2(own_max - top), earlier_weight = ptx::exp2(earlier - top);
    const float total = fmaf(quad_sum(softmax.row_sum[i]), own_weight, earlier_weight);
    // A query with no key: total 0, output 0, lse -inf.
    const float inverse = total == 0.f ? 0.f : __fdividef(1.f, total);
    share[i] = own_weight * inverse;
    earlier_share[i] = earlier_weight * inverse;
    __syncwarp();  // four lanes read the earlier lse of a row, then one writes the new one
    if (threadIdx.x % 4 == 0 && lse[i] != nullptr) *lse[i] = fmaf(top, kLn2, logf(total));
  }
  write_rows<T>(out_smem, out, share, earlier_share, merge);
}

}  // namespace sparse_attn
