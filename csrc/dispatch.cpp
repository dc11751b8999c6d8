// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "check.h"
#include "sm80/backward/launch.h"
#include "sm80/block_rows.h"
#include "sm80/forward/launch.h"

namespace sparse_attn {
namespace {

template <class Params>
struct Kernel {
  Element element;
  int head_dim;
  int head_dim_v;
  void (*launch)(const Params&);
};

template <class T>
constexpr Element kElement = std::is_same_v<T, __half> ? Element::float16 : Element::bfloat16;

const Kernel<ForwardParams> kForwardKernels[] = {
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm80::forward::launch<T, kHeadDim, kHeadDimV>},
#include "sm80/forward/instances.inc"
#undef INSTANCE
};

const Kernel<BackwardParams> kBackwardKernels[] = {
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm80::backward::launch<T, kHeadDim, kHeadDimV>},
#include "sm80/backward/instances.inc"
#undef INSTANCE
};

// The smallest kernel that holds both head dims.
template <class Params, size_t kCount>
const Kernel<Params>& choose(const Kernel<Params> (&kernels)[kCount], const Params& params) {
  const Kernel<Params>* smallest = nullptr;
  for (const Kernel<Params>& kernel : kernels) {
    const bool holds = kernel.element == params.element && kernel.head_dim >= params.head_dim &&
                       kernel.head_dim_v >= params.head_dim_v;
    if (holds && (smallest == nullptr || kernel.head_dim + kernel.head_dim_v <
                                             smallest->head_dim + smallest->head_dim_v)) {
      smallest = &kernel;
    }
  }
  REQUIRE(smallest != nullptr, "no kernel holds head_dim " + std::to_string(params.head_dim) +
                                   ", head_dim_v " + std::to_string(params.head_dim_v));
  REQUIRE(
      params.seq_q == params.seq_k && params.first_position == 0 && params.cu_seqlens == nullptr,
      "queries and keys must be the same whole sequences");
  return *smallest;
}

// Makes a device current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    CHECK_CUDA(cudaGetDevice(&previous_));
    if (device != previous_) CHECK_CUDA(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace

void block_rows(const BlockRowsParams& params) {
  const DeviceGuard guard(params.device);
  sm80::launch_block_rows(params);
}

void forward(const ForwardParams& params) {
  const Kernel<ForwardParams>& kernel = choose(kForwardKernels, params);
  const DeviceGuard guard(params.device);
  kernel.launch(params);
}

void row_stats(const RowStatsParams& params) {
  const DeviceGuard guard(params.device);
  sm80::backward::launch_row_stats(params);
}

void backward(const BackwardParams& params) {
  const Kernel<BackwardParams>& kernel = choose(kBackwardKernels, params);
  const DeviceGuard guard(params.device);
  kernel.launch(params);
}

std::vector<std::pair<int, int>> head_dims() {
  std::vector<std::pair<int, int>> pairs;
  for (const Kernel<ForwardParams>& kernel : kForwardKernels) {
    if (kernel.element == Element::float16) pairs.emplace_back(kernel.head_dim, kernel.head_dim_v);
  }
  return pairs;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace sparse_attn
