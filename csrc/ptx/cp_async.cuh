// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (PTX: cp.async).
#pragma once

#include <cstdint>

namespace sparse_attn::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes past L1; writes 16 zeros and reads nothing where `exists` is false.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(gmem), "r"(exists ? 16 : 0)
               : "memory");
}

// Likewise 8 bytes, through L1.
__device__ __forceinline__ void cp_async_8(void* smem, const void* gmem, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(smem)),
               "l"(gmem), "r"(exists ? 8 : 0)
               : "memory");
}

// Likewise 4 bytes, through L1.
__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(smem)),
               "l"(gmem), "r"(exists ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sparse_attn::ptx
