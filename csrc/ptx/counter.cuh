// SPDX-License-Identifier: Apache-2.0
// Counters and sums in global memory that CTAs share (PTX: red, ld.acquire, st.release), and the
// fence between ordinary and asynchronous accesses to global memory.
#pragma once

#include <cstdint>

namespace sparse_attn::ptx {

// What this thread has written, or seen written by threads it has waited for, comes before.
__device__ __forceinline__ void add_release(int* counter, int amount) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

// Likewise, for the one thread that may write the counter now.
__device__ __forceinline__ void store_release(int* counter, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// What is read after comes after.
__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Adds four numbers at the L2 cache, each on its own.
__device__ __forceinline__ void add(float4* gmem, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(gmem),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// Between ordinary accesses to global memory and those of the tensor memory accelerator.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace sparse_attn::ptx
