// SPDX-License-Identifier: Apache-2.0
// Additions of 16-bit elements: in registers, and to global memory, which return nothing (PTX: add;
// red, of vectors from 9.0 on).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparse_attn::ptx {

// Of two elements each, each sum rounded to nearest.
template <class T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sums;
  if constexpr (std::is_same_v<T, __half>) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  } else {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  }
  return sums;
}

// Adds eight elements to those at an address on 16 bytes, each sum rounded to nearest, in L2.
template <class T>
__device__ __forceinline__ void add_vector(void* gmem, const uint4& vector) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(gmem),
                 "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w)
                 : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(gmem),
                 "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w)
                 : "memory");
  }
}

}  // namespace sparse_attn::ptx
