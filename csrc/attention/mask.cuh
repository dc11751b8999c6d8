// SPDX-License-Identifier: Apache-2.0
// Which pairs of a tile of own rows and a tile of keys are in the pattern.
#pragma once

#include "attention/tile_copy.cuh"

namespace sparse_attn {

// The key rows that each own row attends in each segment, for the masks. The last row stands in for
// rows that do not exist.
template <int kThreads, int kRows>
__device__ __forceinline__ void find_attended(Interval (&attended_smem)[kMaxSegments][kRows],
                                              const Branch& branch, const QueryTile& own) {
#pragma unroll 1
  for (int row = threadIdx.x % kThreads; row < kRows; row += kThreads) {
    const int token = branch.queries.position(own.group, own.first_row + least(row, own.rows - 1));
#pragma unroll 1
    for (int segment = 0; segment < branch.segment_count; ++segment) {
      attended_smem[segment][row] = branch.segments[segment].bounds(branch.run, own.group, token);
    }
  }
}

// `value` where a pair of this warp's rows and a tile of others is not in the pattern. Most tiles
// are cut at one end only. `attended_smem`: the intervals of this warp's rows in the tile's
// segment.
template <class Pairs>
__device__ __forceinline__ void fill_others(Pairs& pairs, const Interval* attended_smem,
                                            const KeyTile& tile, float value) {
  const auto attended = [&](int row) -> const Interval& { return attended_smem[Pairs::row(row)]; };
  int bound[Pairs::kLaneRows];
  if (tile.cut_before) {
#pragma unroll
    for (int i = 0; i < Pairs::kLaneRows; ++i) bound[i] = attended(i).first - tile.first_row;
    pairs.for_each([&](float& pair, int row, int column) {
      if (column < bound[row]) pair = value;
    });
  }
  if (tile.cut_after) {
#pragma unroll
    for (int i = 0; i < Pairs::kLaneRows; ++i) {
      bound[i] = least(attended(i).end, tile.end_row) - tile.first_row;
    }
    pairs.for_each([&](float& pair, int row, int column) {
      if (column >= bound[row]) pair = value;
    });
  }
}

// Likewise where a pair is of different residues. The own rows of a warp start with a residue 0.
template <class Pairs>
__device__ __forceinline__ void fill_other_residues(Pairs& pairs, int residues, int first_row,
                                                    float value) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const int distance = first_row + column - row, mask = residues - 1;
  const bool others[] = {(distance & mask) != 0, (distance + 1 & mask) != 0};
  pairs.for_each([&](float& pair, int, int column) {
    if (others[column % 2]) pair = value;
  });
}

// Likewise where the blocks of a branch leave a pair out, for a tile of kRows own rows. Own rows
// are tokens in this case.
template <int kRows, class Pairs>
__device__ __forceinline__ void fill_other_blocks(Pairs& pairs, const Branch& branch,
                                                  const QueryTile& own, const KeyTile& tile,
                                                  float value) {
  const int size = branch.blocks.size;
  uint32_t kept[Pairs::kLaneRows];  // a bit for each block of the tile
#pragma unroll
  for (int i = 0; i < Pairs::kLaneRows; ++i) {
    kept[i] = 0;
    const int row = least(warp_row<kRows, Pairs::kRows>() + Pairs::row(i), own.rows - 1);
#pragma unroll 1
    for (int block = 0; tile.first_row + block * size < tile.end_row; ++block) {
      kept[i] |= branch.keeps(tile.head, own.first_row + row, tile.first_row + block * size)
                 << block;
    }
  }
  const int log2_size = lowest_bit(size);
  pairs.for_each([&](float& pair, int row, int column) {
    if (!(kept[row] >> (column >> log2_size) & 1)) pair = value;
  });
}

}  // namespace sparse_attn
