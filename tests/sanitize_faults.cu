// SPDX-License-Identifier: Apache-2.0
// One fault for each tool of compute-sanitizer: the tool must report it. See sanitize.py.
#include <cstdio>
#include <cstring>

constexpr int kThreads = 64;

// memcheck: the last thread writes past the end of values (kThreads).
__global__ void out_of_bounds(volatile int* values) { values[threadIdx.x + 1] = 1; }

// synccheck: half of a warp reaches the barrier, the other half goes on and exits.
__global__ void divergent_barrier(volatile int* values) {
  if (threadIdx.x % 2 != 0) {
    values[threadIdx.x] *= 2;
    __syncthreads();
  } else {
    values[threadIdx.x] += 1;
  }
}

// racecheck: each thread reads what a thread of the other warp writes, with no barrier between.
__global__ void race(volatile int* values) {
  __shared__ volatile int exchanged[kThreads];
  exchanged[threadIdx.x] = threadIdx.x;
  values[threadIdx.x] = exchanged[kThreads - 1 - threadIdx.x];
}

int main(int count, char** arguments) {
  const char* tool = count == 2 ? arguments[1] : "";
  int* values = nullptr;
  if (cudaMalloc(&values, kThreads * sizeof(int)) != cudaSuccess) return 2;
  cudaMemset(values, 0, kThreads * sizeof(int));
  if (std::strcmp(tool, "memcheck") == 0) {
    out_of_bounds<<<1, kThreads>>>(values);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    divergent_barrier<<<1, kThreads>>>(values);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    race<<<1, kThreads>>>(values);
  } else {
    std::fprintf(stderr, "usage: %s memcheck|synccheck|racecheck\n", arguments[0]);
    return 2;
  }
  if (cudaGetLastError() != cudaSuccess) return 2;  // not launched
  cudaDeviceSynchronize();
  return 0;
}
