// SPDX-License-Identifier: Apache-2.0
// Keys that a warpgroup attends, where they are scattered in blocks of 64: two blocks from
// anywhere, in 16 bytes, one read.
#pragma once

#include <cstdint>

namespace sparse_attn::sm90::forward {

// In a list for each warpgroup. Of those not read yet each holds a stage of keys, but for two that
// end a tile of queries.
constexpr int kPairs = 16;

struct alignas(16) KeyPair {
  int first_row[2];
  uint16_t place[2];
  uint32_t bits;

  // Adds a block, of which every query attends every key unless it is cut.
  __device__ __forceinline__ static uint32_t added(uint32_t bits, bool cut) {
    return bits + 1 + (cut ? 4 << (bits & 3) : 0);
  }

  // Of blocks; none: the end of these queries.
  __device__ __forceinline__ int count() const { return bits & 3; }
  __device__ __forceinline__ bool cut(int i) const { return bits >> (2 + i) & 1; }
  // Where the keys and values are, and the parity of the times that they are there.
  __device__ __forceinline__ int stage(int i) const { return place[i] >> 1; }
  __device__ __forceinline__ int round(int i) const { return place[i] & 1; }
};

}  // namespace sparse_attn::sm90::forward
