// SPDX-License-Identifier: Apache-2.0
// 1 / x (PTX: rcp.approx).
#pragma once

namespace sparse_attn::ptx {

// One instruction, an error of one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace sparse_attn::ptx
