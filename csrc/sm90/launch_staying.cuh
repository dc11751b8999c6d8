// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.h"
#include "device.h"
#include "sm90/query_tiles.h"

namespace sparse_attn::sm90 {

// CTAs that stay, as many as the multiprocessors hold; each takes every so-many-th tile.
template <class Config, class Params, class... Arguments>
void launch_staying(void (*kernel)(Params, QueryTiles, Arguments...), const Params& params,
                    const QueryTiles& tiles, const Arguments&... arguments) {
  if (tiles.count == 0) return;
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), kBytes, params.device);
  const int ctas = least(tiles.count, multiprocessors(params.device) * Config::kCtas);
  kernel<<<ctas, Config::kThreads, kBytes, static_cast<cudaStream_t>(params.stream)>>>(
      params, tiles, arguments...);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90
