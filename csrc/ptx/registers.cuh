// SPDX-License-Identifier: Apache-2.0
// Registers handed from one warpgroup to another (PTX: setmaxnreg), and special ones.
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

// Read anew each time: nothing found from it waits in a register for its next use.
__device__ __forceinline__ int lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The same value, but not to be found anew: reading a special register takes long.
__device__ __forceinline__ int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace sparse_attn::ptx
