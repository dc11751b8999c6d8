// SPDX-License-Identifier: Apache-2.0
// How a warpgroup sees a tile of keys, where there are many: in 16 bytes, one read.
#pragma once

#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

struct alignas(16) PartTile {
  int first_row;
  int end_row;
  int segment;
  uint32_t bits;

  __device__ __forceinline__ static PartTile of(const SeenTile& seen, bool keeps) {
    const KeyTile& tile = seen.tile;
    const uint32_t bits = (tile.exists && keeps ? 1 : 0) | (seen.more ? 2 : 0) |
                          (tile.cut_before ? 4 : 0) | (tile.cut_after ? 8 : 0);
    return {tile.first_row, tile.end_row, tile.segment, bits};
  }

  // Some query attends some key.
  __device__ __forceinline__ bool exists() const { return bits & 1; }
  // Tiles follow.
  __device__ __forceinline__ bool more() const { return bits & 2; }

  // For the mask.
  __device__ __forceinline__ KeyTile key_tile() const {
    return {0, segment, first_row, end_row, true, (bits & 4) != 0, (bits & 8) != 0, false};
  }
};

}  // namespace sparse_attn::sm90::forward
