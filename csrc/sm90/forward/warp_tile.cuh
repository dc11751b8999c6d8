// SPDX-License-Identifier: Apache-2.0
// How a warp sees a tile of 64 keys: which blocks of 16 columns its 16 queries attend.
#pragma once

#include "sm90/walk.cuh"

namespace sparse_attn::sm90::forward {

constexpr int kWarpRows = 16;

struct TileBits {
  uint32_t bits;

  // Some query attends some key of the block; not every query every key.
  __device__ __forceinline__ bool attends(int block) const { return bits >> block & 1; }
  __device__ __forceinline__ bool cuts(int block) const { return bits >> (4 + block) & 1; }
  __device__ __forceinline__ bool cuts_some() const { return bits & 0xf0; }
  // Some query of the warpgroup attends some key.
  __device__ __forceinline__ bool exists() const { return bits & 0x100; }
  // Tiles follow.
  __device__ __forceinline__ bool more() const { return bits & 0x200; }
  // Told to the compiler as the same in all lanes.
  __device__ __forceinline__ TileBits uniform() const { return {__shfl_sync(0xffffffff, bits, 0)}; }
};

struct alignas(16) WarpTile {
  static constexpr int kKeys = 64;
  static constexpr int kBlock = 16;

  int first_row;
  int end_row;
  int segment;
  TileBits bits;

  // As the `warp`-th of the warps that compute sees it. `keeps`: blocks do not leave the tile out
  // for its warpgroup.
  template <int kRows>
  __device__ __forceinline__ static WarpTile of(
      const KeyTile& tile, bool more, bool keeps, const QueryTile& queries, int warp,
      const Interval (&attended_smem)[kMaxSegments][kRows]) {
    const Interval* rows_smem = attended_smem[tile.segment];
    const int part_row = warp / 4 * kWarpgroupRows, row = warp * kWarpRows;
    uint32_t bits = more ? 0x200 : 0;
    if (tile.first_row >= rows_smem[queries.rows - 1].first && tile.end_row <= rows_smem[0].end &&
        tile.end_row == tile.first_row + kKeys) {  // every query attends every key
      if (keeps && part_row < queries.rows) bits |= row < queries.rows ? 0x10f : 0x100;
      return {tile.first_row, tile.end_row, tile.segment, {bits}};
    }
    if (keeps && part_row < queries.rows) {
      const int last = least(part_row + kWarpgroupRows, queries.rows) - 1;
      if (tile.end_row > rows_smem[part_row].first && tile.first_row < rows_smem[last].end) {
        bits |= 0x100;
      }
    }
    if (bits & 0x100 && row < queries.rows) {
      const Interval first = rows_smem[row], last = rows_smem[row + kWarpRows - 1];
      const auto column = [&](int key) {
        return greatest(least(key, tile.end_row) - tile.first_row, 0);
      };
      // Below: all blocks before a column.
      const auto touched = [](int column) { return (1u << (column + kBlock - 1) / kBlock) - 1; };
      const auto whole = [](int column) { return (1u << column / kBlock) - 1; };
      const uint32_t attended = touched(column(last.end)) & ~whole(column(first.first));
      const uint32_t uncut = whole(column(first.end)) & ~touched(column(last.first));
      bits |= attended | (attended & ~uncut) << 4;
    }
    return {tile.first_row, tile.end_row, tile.segment, {bits}};
  }
};

}  // namespace sparse_attn::sm90::forward
