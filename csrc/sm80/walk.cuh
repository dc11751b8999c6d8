// SPDX-License-Identifier: Apache-2.0
// The walk over streamed tiles, by one thread.
#pragma once

#include "attention/tiles.h"

namespace sparse_attn::sm80 {

// The next tile to stream, by the intervals that find_attended left.
template <class SharedMemory>
__device__ __forceinline__ KeyTile next_tile(SharedMemory& smem, const Branch& branch,
                                             const QueryTile& own) {
  const auto of_row = [&](int row) {
    return [&smem, row](int segment) { return smem.attended[segment][row]; };
  };
  return smem.walk.next(branch, SharedMemory::kTileRows, of_row(0), of_row(own.rows - 1));
}

}  // namespace sparse_attn::sm80
