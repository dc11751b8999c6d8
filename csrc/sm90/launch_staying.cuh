// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.h"
#include "sm90/query_tiles.h"

namespace sparse_attn::sm90 {

// CTAs that stay, as many as the multiprocessors hold; each takes every so-many-th tile.
template <class Config, class Params, class... Arguments>
void launch_staying(void (*kernel)(Params, QueryTiles, Arguments...), const Params& params,
                    const QueryTiles& tiles, const Arguments&... arguments) {
  if (tiles.count == 0) return;
  int multiprocessors = 0;
  CHECK_CUDA(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, params.device));
  constexpr int kBytes = sizeof(typename Config::SharedMemory);
  CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const int ctas = least(tiles.count, multiprocessors * Config::kCtas);
  kernel<<<ctas, Config::kThreads, kBytes, static_cast<cudaStream_t>(params.stream)>>>(
      params, tiles, arguments...);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm90
