// SPDX-License-Identifier: Apache-2.0
// After all parts: adds them up to the output, and puts the new keys and values into the stores.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tile_copy.cuh"
#include "decode/decode_params.h"

namespace sparse_attn::decode {

constexpr int kFinishThreads = 128;
constexpr int kFinishWarps = kFinishThreads / 32;

struct FinishCounts {
  int64_t queries;  // a CTA each
  int64_t rows;     // new rows of all stores, a warp each

  static HOST_DEVICE FinishCounts of(const DecodeParams& params) {
    const int64_t batch_tokens = static_cast<int64_t>(params.batch) * params.new_tokens;
    return {batch_tokens * params.head_count,
            batch_tokens * params.kv_head_count() * params.store_count};
  }

  HOST_DEVICE int64_t ctas() const { return queries + (rows + kFinishWarps - 1) / kFinishWarps; }
};

// One query: a few neighbouring threads take the columns of a part, 4 each, and the CTA several
// parts at once.
template <class T>
__device__ __forceinline__ void add_parts(const DecodeParams& params, int query) {
  __shared__ float out_smem[kFinishThreads][4];
  __shared__ float weights_smem[kMaxParts];
  const DecodePart* parts = params.parts + static_cast<int64_t>(query) * params.part_count;
  const float* part_out =
      params.part_out + static_cast<int64_t>(query) * params.part_count * params.head_dim_v;
  // Every warp finds the maximum and the sum, a few parts a lane.
  const int lane = threadIdx.x % 32;
  float max_log2 = minus_infinity();
  for (int i = lane; i < params.part_count; i += 32) max_log2 = fmaxf(max_log2, parts[i].max_log2);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    max_log2 = fmaxf(max_log2, __shfl_xor_sync(0xffffffff, max_log2, bit));
  }
  float sum = 0.f;
  for (int i = lane; i < params.part_count; i += 32) {
    const float weight = ptx::exp2(parts[i].max_log2 - finite(max_log2));
    sum += parts[i].sum * weight;
    if (threadIdx.x < 32) weights_smem[i] = weight;
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  __syncthreads();

  const int vectors = params.head_dim_v / 4;
  const int at_once = kFinishThreads / vectors;
  const int vector = threadIdx.x % vectors, first = threadIdx.x / vectors;
  float out[4] = {};
  for (int i = first; first < at_once && i < params.part_count; i += at_once) {
    const float weight = weights_smem[i];
    const float4 part = *reinterpret_cast<const float4*>(
        part_out + static_cast<int64_t>(i) * params.head_dim_v + 4 * vector);
    out[0] = fmaf(weight, part.x, out[0]);
    out[1] = fmaf(weight, part.y, out[1]);
    out[2] = fmaf(weight, part.z, out[2]);
    out[3] = fmaf(weight, part.w, out[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out_smem[threadIdx.x][i] = out[i];
  __syncthreads();
  if (first != 0) return;
  for (int other = 1; other < at_once; ++other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] += out_smem[other * vectors + vector][i];
  }
  const float factor = sum == 0.f ? 0.f : 1.f / sum;  // a query with no key: output 0
  const int new_token = query % params.new_tokens, heads = query / params.new_tokens;
  T* out_gmem = head_gmem<T>(params.out, heads / params.head_count,
                             params.first_head + heads % params.head_count) +
                static_cast<int64_t>(new_token) * params.out.row_stride + 4 * vector;
  *reinterpret_cast<uint2*>(out_gmem) = {ptx::pack<T>(out[0] * factor, out[1] * factor),
                                         ptx::pack<T>(out[2] * factor, out[3] * factor)};
}

// One new row of one store, unless the store does not list it or a later new one takes its slot.
template <class T>
__device__ __forceinline__ void append_row(const DecodeParams& params, int row) {
  const DecodeStore& store = params.stores[row % params.store_count];
  row /= params.store_count;
  const int new_token = row % params.new_tokens;
  row /= params.new_tokens;
  const int head = row % params.kv_head_count(), batch = row / params.kv_head_count();
  const int position = static_cast<int>(*params.position);
  const int store_row = store.tokens.rows_before(0, position + new_token);
  const int newest = store.tokens.rows_before(0, position + params.new_tokens);
  if (!store.lists(position + new_token) || store_row < newest - store.slots.value) return;

  const int64_t slot = store_row % store.slots;
  const int column = threadIdx.x % 32 * 8;
  const auto copy = [&](const TensorView& from, const TensorView& to, int head_dim) {
    if (column >= head_dim) return;
    const T* source = head_gmem<const T>(from, batch, params.first_kv_head() + head) +
                      static_cast<int64_t>(new_token) * from.row_stride;
    T* target = head_gmem<T>(to, batch, head) + slot * to.row_stride;
    *reinterpret_cast<uint4*>(target + column) = *reinterpret_cast<const uint4*>(source + column);
  };
  copy(params.k_new, store.k, params.head_dim);
  copy(params.v_new, store.v, params.head_dim_v);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ DecodeParams params) {
  const FinishCounts counts = FinishCounts::of(params);
  if (blockIdx.x < counts.queries) return add_parts<T>(params, blockIdx.x);
  const int64_t row = (blockIdx.x - counts.queries) * kFinishWarps + threadIdx.x / 32;
  if (row < counts.rows) append_row<T>(params, static_cast<int>(row));
}

}  // namespace sparse_attn::decode
