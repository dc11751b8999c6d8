// SPDX-License-Identifier: Apache-2.0
// What a launch needs to know of its device or tell it, once: each question takes the host time.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "check.h"

namespace sparse_attn {

inline int multiprocessors(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int count = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return known[device] = count;
}

// Lets a kernel have more than 48 KB of shared memory on the current device.
inline void allow_shared_memory(const void* kernel, int bytes, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.insert({kernel, device});
}

}  // namespace sparse_attn
