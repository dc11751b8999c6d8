// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernel_bench/timing.h"

namespace sparse_attn::kernel_bench {
namespace {

constexpr int kWarmUps = 3;
constexpr int64_t kWaitNanoseconds = 50'000;  // for the host, per call
constexpr int64_t kMostNanoseconds = 10'000'000;
constexpr int kThreads = 256;

__global__ void wait_kernel(int64_t nanoseconds) {
  int64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

// The store never happens: all words are 0.
__global__ void read_kernel(uint4* data, size_t size) {
  uint32_t bits = 0;
  for (size_t i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
    const uint4 words = data[i];
    bits |= words.x | words.y | words.z | words.w;
  }
  if (bits != 0) data[0].x = bits;
}

int l2_bytes() {
  int device = 0, bytes = 0;
  CHECK_CUDA(cudaGetDevice(&device));
  CHECK_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

// A CUDA event, destroyed with the object.
class Event {
 public:
  Event() { CHECK_CUDA(cudaEventCreate(&event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }

  void record() const { CHECK_CUDA(cudaEventRecord(event_)); }
  float since(const Event& begin) const {
    float milliseconds = 0;
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin.event_, event_));
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

CacheFlush::CacheFlush() : data_(3 * static_cast<size_t>(l2_bytes()) / sizeof(uint4) + 1) {
  CHECK_CUDA(cudaMemset(data_.data(), 0, data_.bytes()));
}

void CacheFlush::operator()() const {
  read_kernel<<<1024, kThreads>>>(data_.data(), data_.size());
  CHECK_CUDA(cudaGetLastError());
}

Milliseconds time_calls(const std::function<void()>& call, int repeats,
                        const std::optional<CacheFlush>& flush) {
  for (int i = 0; i < kWarmUps; ++i) call();
  std::vector<Event> begins(repeats), ends(repeats);
  wait_kernel<<<1, 1>>>(std::min(repeats * kWaitNanoseconds, kMostNanoseconds));
  CHECK_CUDA(cudaGetLastError());
  for (int i = 0; i < repeats; ++i) {
    if (flush) (*flush)();
    begins[i].record();
    call();
    ends[i].record();
  }
  CHECK_CUDA(cudaDeviceSynchronize());

  std::vector<float> times(repeats);
  for (int i = 0; i < repeats; ++i) times[i] = ends[i].since(begins[i]);
  std::sort(times.begin(), times.end());
  const float median = (times[(repeats - 1) / 2] + times[repeats / 2]) / 2;
  return {median, times.front(), times.back()};
}

}  // namespace sparse_attn::kernel_bench
