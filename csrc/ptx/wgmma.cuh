// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup (PTX: wgmma.mma_async), fp32 accumulation. They run while the
// warps go on: read or write the accumulator, and reuse the operands, only after the wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "attention/register_tile.cuh"
#include "ptx/cp_async.cuh"

namespace sparse_attn::ptx {

// Before the first wgmma after registers of the accumulator or of a were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Makes shared memory that was written by ordinary stores or cp.async visible to wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Likewise, one predicated instruction: a branch costs ptxas the knowledge that warps go together.
__device__ __forceinline__ void fence_async_proxy_if(bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %0, 0;\n"
      "@p fence.proxy.async.shared::cta;\n"
      "}" ::"r"(static_cast<int>(condition))
      : "memory");
}

// Keeps the compiler from moving reads or writes of an accumulator across this point.
template <class Tile>
__device__ __forceinline__ void pin(Tile& tile) {
  tile.for_each([](float& element, int, int) { asm volatile("" : "+f"(element)::"memory"); });
}

// An operand in shared memory, rows of 128 or 64 bytes with the swizzle of as many. `panel_bytes`:
// from the columns of a row to those that follow, for an operand read across its rows.
__device__ __forceinline__ uint64_t wgmma_operand(const void* smem, int row_bytes,
                                                  int panel_bytes) {
  const uint64_t address = shared_address(smem), swizzle = row_bytes == 128 ? 1 : 2;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         static_cast<uint64_t>(8 * row_bytes >> 4) << 32 | swizzle << 62;
}

// The operand `bytes` further on.
__device__ __forceinline__ uint64_t moved(uint64_t operand, int bytes) {
  return operand + (bytes >> 4);
}

// Accumulators of eight columns, and of all; `c`: "+f", or "=f" where they are only written.
#define SUM_8(c, j) c(sum.at[0][j][0]), c(sum.at[0][j][1]), c(sum.at[0][j][2]), c(sum.at[0][j][3])
#define SUM_32_AT(c, j) SUM_8(c, j), SUM_8(c, j + 1), SUM_8(c, j + 2), SUM_8(c, j + 3)
#define SUM_32(c) SUM_32_AT(c, 0)
#define SUM_64(c) SUM_32(c), SUM_32_AT(c, 4)
#define SUM_128(c) SUM_64(c), SUM_32_AT(c, 8), SUM_32_AT(c, 12)
#define SUM_256(c) \
  SUM_128(c), SUM_32_AT(c, 16), SUM_32_AT(c, 20), SUM_32_AT(c, 24), SUM_32_AT(c, 28)
#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_64 \
  NAMES_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_128                                                                           \
  NAMES_64                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_256                                                                           \
  NAMES_128                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "   \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "    \
  "%126, %127"

// shape: columns of b; element: f16 or bf16; add: "1" or "0"; operands: of a and b, then
// transpositions.
#define WGMMA(shape, element, add, operands)                                               \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #shape \
  "k16.f32." element "." element " {" NAMES_##shape "}, " operands ";\n}"

#define DEFINE_PRODUCT(name, shape, operands)                                                  \
  template <class T, bool kAdd>                                                                \
  __device__ __forceinline__ void name(RegisterTile<16, shape>& sum, uint64_t a, uint64_t b) { \
    if constexpr (kAdd && std::is_same_v<T, __half>) {                                         \
      asm volatile(WGMMA(shape, "f16", "1", operands) : SUM_##shape("+f") : "l"(a), "l"(b));   \
    } else if constexpr (kAdd) {                                                               \
      asm volatile(WGMMA(shape, "bf16", "1", operands) : SUM_##shape("+f") : "l"(a), "l"(b));  \
    } else if constexpr (std::is_same_v<T, __half>) {                                          \
      asm volatile(WGMMA(shape, "f16", "0", operands) : SUM_##shape("=f") : "l"(a), "l"(b));   \
    } else {                                                                                   \
      asm volatile(WGMMA(shape, "bf16", "0", operands) : SUM_##shape("=f") : "l"(a), "l"(b));  \
    }                                                                                          \
  }

#define A_AND_B(a, b) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define DEFINE_TRANSPOSED_OF_REGISTERS(shape, operands)                                      \
  template <class T, bool kAdd>                                                              \
  __device__ __forceinline__ void wgmma_transposed(RegisterTile<16, shape>& sum,             \
                                                   const uint32_t (&a)[4], uint64_t b) {     \
    if constexpr (kAdd && std::is_same_v<T, __half>) {                                       \
      asm volatile(WGMMA(shape, "f16", "1", operands) : SUM_##shape("+f") : A_AND_B(a, b));  \
    } else if constexpr (kAdd) {                                                             \
      asm volatile(WGMMA(shape, "bf16", "1", operands) : SUM_##shape("+f") : A_AND_B(a, b)); \
    } else if constexpr (std::is_same_v<T, __half>) {                                        \
      asm volatile(WGMMA(shape, "f16", "0", operands) : SUM_##shape("=f") : A_AND_B(a, b));  \
    } else {                                                                                 \
      asm volatile(WGMMA(shape, "bf16", "0", operands) : SUM_##shape("=f") : A_AND_B(a, b)); \
    }                                                                                        \
  }

#define DEFINE_ADD(shape, operands)                                                               \
  template <class T>                                                                              \
  __device__ __forceinline__ void wgmma_add(RegisterTile<16, shape>& sum, const uint32_t (&a)[4], \
                                            uint64_t b) {                                         \
    if constexpr (std::is_same_v<T, __half>) {                                                    \
      asm volatile(WGMMA(shape, "f16", "1", operands)                                             \
                   : SUM_##shape("+f")                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
    } else {                                                                                      \
      asm volatile(WGMMA(shape, "bf16", "1", operands)                                            \
                   : SUM_##shape("+f")                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
    }                                                                                             \
  }

// sum = a b^T, or sum += a b^T: 16 columns of 64 rows of a and of 32, 64 or 128 rows of b.
DEFINE_PRODUCT(wgmma_transposed, 32, "%16, %17, p, 1, 1, 0, 0")
DEFINE_PRODUCT(wgmma_transposed, 64, "%32, %33, p, 1, 1, 0, 0")
DEFINE_PRODUCT(wgmma_transposed, 128, "%64, %65, p, 1, 1, 0, 0")

// sum += a b: 16 columns of 64 rows of a, 16 rows of b of 32 to 256 columns. A warp holds its 16
// rows of a in the registers of mma_m16n8k16.
DEFINE_ADD(32, "{%16, %17, %18, %19}, %20, p, 1, 1, 1")
DEFINE_ADD(64, "{%32, %33, %34, %35}, %36, p, 1, 1, 1")
DEFINE_ADD(128, "{%64, %65, %66, %67}, %68, p, 1, 1, 1")
DEFINE_ADD(256, "{%128, %129, %130, %131}, %132, p, 1, 1, 1")

// sum = a^T b, or sum += a^T b: 16 rows of a, of 64 columns, and of b, of 32, 64 or 128.
DEFINE_PRODUCT(wgmma_across, 32, "%16, %17, p, 1, 1, 1, 1")
DEFINE_PRODUCT(wgmma_across, 64, "%32, %33, p, 1, 1, 1, 1")
DEFINE_PRODUCT(wgmma_across, 128, "%64, %65, p, 1, 1, 1, 1")

// sum = a b, or sum += a b: 16 columns of 64 rows of a, 16 rows of b of 64 or 128 columns.
DEFINE_PRODUCT(wgmma, 64, "%32, %33, p, 1, 1, 0, 1")
DEFINE_PRODUCT(wgmma, 128, "%64, %65, p, 1, 1, 0, 1")

// sum = a b^T, or sum += a b^T, with 16 columns of a in registers.
DEFINE_TRANSPOSED_OF_REGISTERS(64, "{%32, %33, %34, %35}, %36, p, 1, 1, 0")
DEFINE_TRANSPOSED_OF_REGISTERS(128, "{%64, %65, %66, %67}, %68, p, 1, 1, 0")

#undef DEFINE_ADD
#undef DEFINE_TRANSPOSED_OF_REGISTERS
#undef A_AND_B
#undef DEFINE_PRODUCT
#undef WGMMA
#undef NAMES_256
#undef NAMES_128
#undef NAMES_64
#undef NAMES_32
#undef SUM_256
#undef SUM_128
#undef SUM_64
#undef SUM_32
#undef SUM_32_AT
#undef SUM_8

}  // namespace sparse_attn::ptx
