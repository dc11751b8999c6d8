// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.h"
#include "device.h"

namespace sparse_attn::sm80 {

// One CTA for each tile, with the shared memory of the kernel's Config.
template <class Config, class Params>
void launch_tiles(void (*kernel)(Params), const Params& params, int64_t tiles) {
  // grid.x: y and z stop at 65,535.
  REQUIRE(tiles <= 0x7fffffff, "more than 2^31 - 1 tiles in one launch");
  if (tiles == 0) return;  // a view without rows, as the panel of a short sequence
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  if constexpr (kBytes > 48 * 1024) {  // more than a CTA gets unasked
    allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, params.device);
  }
  kernel<<<static_cast<unsigned>(tiles), Config::kThreads, kBytes,
           static_cast<cudaStream_t>(params.stream)>>>(params);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm80
