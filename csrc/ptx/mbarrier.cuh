// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory on which some threads wait for others (PTX: mbarrier), and barriers
// among a part of a CTA (PTX: bar).
#pragma once

#include "ptx/cp_async.cuh"

namespace sparse_attn::ptx {

// A phase completes after `arrivals` arrivals.
__device__ __forceinline__ void mbarrier_init(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy and the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// So many arrivals at once.
__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// The phase also waits for `bytes` of tma_load.
__device__ __forceinline__ void mbarrier_expect(uint64_t& barrier, int bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives once all cp.async of this thread so far have landed. Counts as one of the arrivals that
// the barrier was initialised with.
__device__ __forceinline__ void cp_async_arrive(uint64_t& barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}

// Waits for the end of the phase with this parity: 0 for the first phase.
__device__ __forceinline__ void mbarrier_wait(uint64_t& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Whether the phase with this parity has ended.
__device__ __forceinline__ bool mbarrier_ended(uint64_t& barrier, int parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

// Among `threads` threads of the CTA; barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace sparse_attn::ptx
