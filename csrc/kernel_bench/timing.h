// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <optional>

#include "kernel_bench/device_buffer.h"

namespace sparse_attn::kernel_bench {

struct Milliseconds {
  float median;
  float least;
  float greatest;
};

// Reads more than the L2 cache of the current device holds. Reads, since written lines would still
// be on their way to memory during the call that follows.
class CacheFlush {
 public:
  CacheFlush();
  void operator()() const;

 private:
  DeviceBuffer<uint4> data_;
};

// The times of calls that queue work on stream 0, between CUDA events. The device waits until the
// calls are queued, so the host's time is not in them. Without `flush`, the L2 cache holds what the
// call before left.
Milliseconds time_calls(const std::function<void()>& call, int repeats,
                        const std::optional<CacheFlush>& flush);

}  // namespace sparse_attn::kernel_bench
