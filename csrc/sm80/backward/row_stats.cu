// SPDX-License-Identifier: Apache-2.0
// delta = rowsum(dout * out) - dlse, and the lse in units of log 2, for every query.
#include "attention/softmax.cuh"
#include "check.h"
#include "ptx/mma_sync.cuh"
#include "sm80/backward/launch.h"

namespace sparse_attn::sm80::backward {
namespace {

constexpr int kThreads = 128;
constexpr int kLanesPerRow = 8;  // 16 bytes each: a row of 64 at a time

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_stats_kernel(const __grid_constant__ BackwardParams params) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.seq_q;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  const int64_t row = index < rows ? index : rows - 1;  // whole warps take part in the sum
  const int lane = threadIdx.x % kLanesPerRow;
  const int64_t token = row % params.seq_q;
  const int64_t head = row / params.seq_q % params.heads, batch = row / params.seq_q / params.heads;
  const auto row_gmem = [&](const TensorView& tensor) {
    return static_cast<const T*>(tensor.data) + batch * tensor.batch_stride +
           head * tensor.head_stride + token * tensor.row_stride;
  };
  const T* out_gmem = row_gmem(params.out);
  const T* dout_gmem = row_gmem(params.dout);

  float delta = 0;
  for (int column = lane * 8; column < params.head_dim_v; column += kLanesPerRow * 8) {
    const uint4 out = *reinterpret_cast<const uint4*>(out_gmem + column);
    const uint4 dout = *reinterpret_cast<const uint4*>(dout_gmem + column);
    const uint32_t out_pairs[4] = {out.x, out.y, out.z, out.w};
    const uint32_t dout_pairs[4] = {dout.x, dout.y, dout.z, dout.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = ptx::unpack<T>(out_pairs[i]), b = ptx::unpack<T>(dout_pairs[i]);
      delta += a.x * b.x + a.y * b.y;
    }
  }
#pragma unroll
  for (int step = kLanesPerRow / 2; step > 0; step /= 2) {
    delta += __shfl_xor_sync(0xffffffff, delta, step);
  }
  if (lane == 0 && index < rows) {
    const float lse = params.lse[row];
    if (params.dlse != nullptr) delta -= params.dlse[row];
    const bool empty = lse == minus_infinity();  // dlse may be anything there
    params.stats[row] = empty ? RowStats{-minus_infinity(), 0.f} : RowStats{lse * kLog2E, delta};
  }
}

}  // namespace

void launch_row_stats(const BackwardParams& params) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.seq_q;
  constexpr int kRows = kThreads / kLanesPerRow;
  const int64_t ctas = (rows + kRows - 1) / kRows;
  REQUIRE(ctas <= 0x7fffffff, "more than 2^31 - 1 CTAs in one launch");
  auto* kernel = params.element == Element::float16 ? row_stats_kernel<__half>
                                                    : row_stats_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(
      params);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace sparse_attn::sm80::backward
