// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernel_bench/tensors.h"

namespace sparse_attn::kernel_bench {
namespace {

constexpr int kThreads = 256;

// SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014).
__device__ uint64_t mixed(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
  value = (value ^ value >> 27) * 0x94d049bb133111eb;
  return value ^ value >> 31;
}

// Box and Muller's method, one value of the two.
__device__ float normal(uint64_t seed, uint64_t index) {
  const uint64_t bits = mixed(mixed(seed) ^ index);
  const float radius = sqrtf(-2 * logf((static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f));
  return radius * cospif(static_cast<float>(bits & 0xffffff) * 0x1p-23f);
}

template <class T>
__global__ void fill_normal_kernel(T* values, int64_t size, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += step) {
    values[i] = static_cast<T>(normal(seed, i));
  }
}

template <class T>
void fill(const DeviceBuffer<uint16_t>& values, uint64_t seed) {
  const size_t blocks = std::min<size_t>((values.size() + kThreads - 1) / kThreads, 1 << 16);
  fill_normal_kernel<<<static_cast<unsigned>(blocks), kThreads>>>(
      reinterpret_cast<T*>(values.data()), static_cast<int64_t>(values.size()), seed);
  CHECK_CUDA(cudaGetLastError());
}

}  // namespace

void fill_normal(const DeviceBuffer<uint16_t>& values, Element element, uint64_t seed) {
  element == Element::float16 ? fill<__half>(values, seed) : fill<__nv_bfloat16>(values, seed);
}

}  // namespace sparse_attn::kernel_bench
