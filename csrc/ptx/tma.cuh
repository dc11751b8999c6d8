// SPDX-License-Identifier: Apache-2.0
// Copies by the tensor memory accelerator (PTX: cp.async.bulk.tensor).
#pragma once

#include <cuda.h>

#include "ptx/cp_async.cuh"

namespace sparse_attn::ptx {

// One thread starts copying the box of a map at (column, place, run, head, batch) to shared memory;
// zeros where the tensor ends. The bytes count on the barrier.
__device__ __forceinline__ void tma_load(void* smem, const CUtensorMap& map, int column, int place,
                                         int run, int head, int batch, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(smem)),
      "l"(&map), "r"(column), "r"(place), "r"(run), "r"(head), "r"(batch),
      "r"(shared_address(&barrier))
      : "memory");
}

// Brings the cache line of an address to L2.
__device__ __forceinline__ void prefetch_l2(const void* gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(gmem));
}

}  // namespace sparse_attn::ptx
