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

// Likewise; the L2 cache gives up these bytes first.
__device__ __forceinline__ void tma_load_last(void* smem, const CUtensorMap& map, int column,
                                              int place, int run, int head, int batch,
                                              uint64_t& barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared_address(smem)),
      "l"(&map), "r"(column), "r"(place), "r"(run), "r"(head), "r"(batch),
      "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}

// One thread starts copying neighbouring bytes, a multiple of 16, both sides on 16 bytes.
__device__ __forceinline__ void bulk_load(void* smem, const void* gmem, int bytes,
                                          uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(smem)),
      "l"(gmem), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}

// One thread starts copying shared memory to the box of a map; nothing where the tensor ends. What
// was written there by ordinary stores needs fence_async_proxy first.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* smem, int column,
                                          int place, int run, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(&map),
      "r"(shared_address(smem)), "r"(column), "r"(place), "r"(run), "r"(head), "r"(batch)
      : "memory");
}

// Likewise; the L2 cache gives up these bytes first.
__device__ __forceinline__ void tma_store_last(const CUtensorMap& map, const void* smem, int column,
                                               int place, int run, int head, int batch) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint"
      " [%0, {%2, %3, %4, %5, %6}], [%1], %7;" ::"l"(&map),
      "r"(shared_address(smem)), "r"(column), "r"(place), "r"(run), "r"(head), "r"(batch),
      "l"(policy)
      : "memory");
}

// tma_store, but adds to what is there: each sum is rounded to nearest, in L2.
__device__ __forceinline__ void tma_add(const CUtensorMap& map, const void* smem, int column,
                                        int place, int run, int head, int batch) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group"
      " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(shared_address(smem)), "r"(column), "r"(place), "r"(run), "r"(head), "r"(batch)
      : "memory");
}

// Waits until this thread's copies so far have read shared memory, but for those since the last
// kPending calls.
template <int kPending = 0>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile(
      "cp.async.bulk.commit_group;\n"
      "cp.async.bulk.wait_group.read %0;" ::"n"(kPending)
      : "memory");
}

// Waits until this thread's copies so far, up to the last tma_wait_read, have been written.
__device__ __forceinline__ void tma_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace sparse_attn::ptx
