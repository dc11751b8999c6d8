// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "check.h"
#include "decode/finish.cuh"
#include "decode/kernel.cuh"
#include "decode/launch.h"

namespace sparse_attn::decode {

// grid.x: y and z stop at 65,535.
inline unsigned grid(int64_t ctas) {
  REQUIRE(ctas <= 0x7fffffff, "more than 2^31 - 1 CTAs in one launch");
  return static_cast<unsigned>(ctas);
}

template <class T, int kLanes, int kQueries>
void launch_config(const DecodeParams& params) {
  using Config = Config<T, kLanes, kQueries>;
  parts_kernel<Config><<<grid(Coords::count(params, kQueries)), Config::kThreads, 0,
                         static_cast<cudaStream_t>(params.stream)>>>(params);
  CHECK_CUDA(cudaGetLastError());
}

template <class T, int kLanes>
void launch_queries(const DecodeParams& params) {
  const int queries = least(params.group(), params.head_count);
  if (queries == 1) return launch_config<T, kLanes, 1>(params);
  if (queries <= 4) return launch_config<T, kLanes, 4>(params);
  launch_config<T, kLanes, 8>(params);
}

template <class T>
void launch_parts(const DecodeParams& params) {
  const int head_dim = greatest(params.head_dim, params.head_dim_v);
  REQUIRE(head_dim <= 256 && params.head_dim % 8 == 0 && params.head_dim_v % 8 == 0,
          "head_dim and head_dim_v must be multiples of 8 up to 256");
  REQUIRE(params.part_count >= 1 && params.part_count <= kMaxParts, "from 1 to 256 parts");
  if (head_dim <= 32) return launch_queries<T, 4>(params);
  if (head_dim <= 64) return launch_queries<T, 8>(params);
  if (head_dim <= 128) return launch_queries<T, 16>(params);
  launch_queries<T, 32>(params);
}

template <class T>
void launch_finish(const DecodeParams& params) {
  finish_kernel<T><<<grid(FinishCounts::of(params).ctas()), kFinishThreads, 0,
                     static_cast<cudaStream_t>(params.stream)>>>(params);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::decode
