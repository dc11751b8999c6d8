// SPDX-License-Identifier: Apache-2.0
// 2^x (PTX: ex2.approx).
#pragma once

namespace sparse_attn::ptx {

// One instruction, relative error 2^-22; exp2f adds steps that keep denormal results.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace sparse_attn::ptx
