// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sparse_attn::ptx {

// True in one lane of a warp. Tells ptxas that one lane does what follows: after a comparison of
// lanes it loops over them around every instruction that a warp executes once.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace sparse_attn::ptx
