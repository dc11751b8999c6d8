// SPDX-License-Identifier: Apache-2.0
// Constants and shared memory of the decoding kernels.
#pragma once

#include "decode/decode_params.h"

namespace sparse_attn::decode {

// A key row takes kLanes lanes of 8 elements; kQueries heads of a kv head share it.
template <class T, int kLanes_, int kQueries_>
struct Config {
  using Element = T;
  static constexpr int kLanes = kLanes_;
  static constexpr int kQueries = kQueries_;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRowsAtOnce = kThreads / kLanes;
  // Rows whose keys and values a lane has in flight: what its registers hold.
  static constexpr int kUnroll = kQueries == 1 ? 8 : kQueries == 4 ? 4 : 2;
  static constexpr int kMaxDim = 8 * kLanes;

  struct SharedMemory {
    float max_log2[kWarps][kQueries];
    float sum[kWarps][kQueries];
    float out[kWarps][kQueries][kMaxDim];
  };
  static_assert(sizeof(SharedMemory) <= 48 * 1024, "static shared memory of a CTA");
};

}  // namespace sparse_attn::decode
