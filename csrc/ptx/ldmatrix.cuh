// SPDX-License-Identifier: Apache-2.0
// 8x8 matrices of 16-bit elements from shared memory into mma fragments and back (PTX: ldmatrix,
// stmatrix; the latter from 9.0 on).
#pragma once

#include "ptx/cp_async.cuh"

namespace sparse_attn::ptx {

// Four matrices; lanes 8i to 8i+7 give the row addresses of matrix i, which lands in registers[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row_smem))
               : "memory");
}

// Likewise, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row_smem))
               : "memory");
}

// The inverse of ldmatrix_x4.
__device__ __forceinline__ void stmatrix_x4(void* row_smem, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row_smem)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

}  // namespace sparse_attn::ptx
