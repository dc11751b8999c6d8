// SPDX-License-Identifier: Apache-2.0
// Additions to global memory that return nothing (PTX: red; of vectors from 9.0 on).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparse_attn::ptx {

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
