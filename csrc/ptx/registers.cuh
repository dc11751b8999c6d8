// SPDX-License-Identifier: Apache-2.0
// Registers handed from one warpgroup to another (PTX: setmaxnreg).
#pragma once

namespace sparse_attn::ptx {

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sparse_attn::ptx
