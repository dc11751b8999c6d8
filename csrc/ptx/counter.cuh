// SPDX-License-Identifier: Apache-2.0
// Counters in global memory that CTAs share (PTX: red, ld.acquire), and the fence between ordinary
// and asynchronous accesses to global memory.
#pragma once

#include <cstdint>

namespace sparse_attn::ptx {

// What this thread has written, or seen written by threads it has waited for, comes before.
__device__ __forceinline__ void add_release(int* counter, int amount) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

// What is read after comes after.
__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Between ordinary accesses to global memory and those of the tensor memory accelerator.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace sparse_attn::ptx
