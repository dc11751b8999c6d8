// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.h"
#include "device.h"
#include "sm90/query_tiles.h"

namespace sparse_attn::sm90 {

// CTAs that a GPU holds.
template <class Config>
int ctas_of(int device) {
  return multiprocessors(device) * Config::kCtas;
}

// Zeroes the first counters of a launch.
template <class Params>
void zero_counters(const Params& params, void* counters, int64_t count) {
  REQUIRE(counters != nullptr, "a launch that hands out tickets needs counters");
  CHECK_CUDA(
      cudaMemsetAsync(counters, 0, sizeof(int) * count, static_cast<cudaStream_t>(params.stream)));
}

// CTAs that stay, as many as the GPU holds; each takes one of the tiles after another.
template <class Config, class Params, class Tiles, class... Arguments>
void launch_staying(void (*kernel)(Params, Tiles, Arguments...), const Params& params,
                    const Tiles& tiles, const Arguments&... arguments) {
  if (tiles.count == 0) return;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, params.device);
  const int ctas = least(tiles.count, ctas_of<Config>(params.device));
  kernel<<<ctas, Config::kThreads, kBytes, static_cast<cudaStream_t>(params.stream)>>>(
      params, tiles, arguments...);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90
