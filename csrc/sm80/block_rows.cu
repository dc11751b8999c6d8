// SPDX-License-Identifier: Apache-2.0
// The blocks that each block attends, a bit each, from a layout of bools.
#include "check.h"
#include "sm80/block_rows.h"

namespace sparse_attn::sm80 {
namespace {

constexpr int kThreads = 256;

// A warp packs a word.
__global__ void __launch_bounds__(kThreads)
    block_rows_kernel(const __grid_constant__ BlockRowsParams params) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t head = index / params.words / params.blocks;
  if (head >= params.heads) return;
  const int row = static_cast<int>(index / params.words % params.blocks);
  const int column = static_cast<int>(index % params.words) * 32 + threadIdx.x % 32;
  const bool allowed =
      column < params.blocks && (params.past || column >= row) && (params.future || column <= row);
  const bool attends =
      allowed && params.layout[head * params.head_stride + row * params.row_stride +
                               column * params.column_stride];
  const uint32_t bits = __ballot_sync(0xffffffff, attends);
  if (threadIdx.x % 32 == 0) params.rows[index] = bits;
}

}  // namespace

void launch_block_rows(const BlockRowsParams& params) {
  const int64_t words = static_cast<int64_t>(params.heads) * params.blocks * params.words;
  const int64_t ctas = (words * 32 + kThreads - 1) / kThreads;
  REQUIRE(ctas <= 0x7fffffff, "more than 2^31 - 1 CTAs in one launch");
  block_rows_kernel<<<static_cast<unsigned>(ctas), kThreads, 0,
                      static_cast<cudaStream_t>(params.stream)>>>(params);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm80
