// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "check.h"
#include "decode/launch.h"
#include "sm80/backward/launch.h"
#include "sm80/block_rows.h"
#include "sm80/forward/launch.h"
#include "sm90/backward/launch.h"
#include "sm90/backward_band/launch.h"
#include "sm90/backward_ordered/launch.h"
#include "sm90/forward/launch.h"
#include "sm90/forward/together.h"

namespace sparse_attn {
namespace {

template <class Params>
struct Kernel {
  Element element;
  int head_dim;
  int head_dim_v;
  void (*launch)(const Params&);

  int size() const { return head_dim + head_dim_v; }
};

template <class T>
constexpr Element kElement = std::is_same_v<T, __half> ? Element::float16 : Element::bfloat16;

template <class Params>
using Table = std::vector<Kernel<Params>>;

const Table<ForwardParams> kForwardSm80 = {
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm80::forward::launch<T, kHeadDim, kHeadDimV>},
#include "sm80/forward/instances.inc"
#undef INSTANCE
};

const Table<BackwardParams> kBackwardSm80 = {
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm80::backward::launch<T, kHeadDim, kHeadDimV>},
#include "sm80/backward/instances.inc"
#undef INSTANCE
};

const Table<ForwardParams> kForwardSm90 = {
#if SPARSE_ATTN_SM90
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm90::forward::launch<T, kHeadDim, kHeadDimV>},
#include "sm90/forward/instances.inc"
#undef INSTANCE
#endif
};

const Table<BackwardParams> kBackwardSm90 = {
#if SPARSE_ATTN_SM90
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm90::backward::launch<T, kHeadDim, kHeadDimV>},
#include "sm90/backward/instances.inc"
#undef INSTANCE
#endif
};

const Table<BackwardParams> kBackwardBandSm90 = {
#if SPARSE_ATTN_SM90
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm90::backward_band::launch<T, kHeadDim, kHeadDimV>},
#include "sm90/backward_band/instances.inc"
#undef INSTANCE
#endif
};

const Table<BackwardParams> kBackwardOrderedSm90 = {
#if SPARSE_ATTN_SM90
#define INSTANCE(T, kHeadDim, kHeadDimV) \
  {kElement<T>, kHeadDim, kHeadDimV, sm90::backward_ordered::launch<T, kHeadDim, kHeadDimV>},
#include "sm90/backward_ordered/instances.inc"
#undef INSTANCE
#endif
};

// The smallest kernel that holds both head dims; null if there is none.
template <class Params>
const Kernel<Params>* find(const Table<Params>& table, Element element, int head_dim,
                           int head_dim_v) {
  const Kernel<Params>* smallest = nullptr;
  for (const Kernel<Params>& kernel : table) {
    const bool holds =
        kernel.element == element && kernel.head_dim >= head_dim && kernel.head_dim_v >= head_dim_v;
    if (holds && (smallest == nullptr || kernel.size() < smallest->size())) smallest = &kernel;
  }
  return smallest;
}

template <class Params>
const Kernel<Params>& choose(const Table<Params>& sm80, const Table<Params>& sm90,
                             const Params& params) {
  const Kernel<Params>* kernel = find(params.kernels == Kernels::sm90 ? sm90 : sm80, params.element,
                                      params.head_dim, params.head_dim_v);
  REQUIRE(kernel != nullptr, "no kernel holds head_dim " + std::to_string(params.head_dim) +
                                 ", head_dim_v " + std::to_string(params.head_dim_v));
  REQUIRE(
      params.seq_q == params.seq_k && params.first_position == 0 && params.cu_seqlens == nullptr,
      "queries and keys must be the same whole sequences");
  return *kernel;
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
  const Kernel<ForwardParams>& kernel = choose(kForwardSm80, kForwardSm90, params);
  const DeviceGuard guard(params.device);
  kernel.launch(params);
}

int forward_counters(const ForwardParams& params) {
  if (params.kernels != Kernels::sm90) return 0;
  const Kernel<ForwardParams>& kernel = choose(kForwardSm80, kForwardSm90, params);
  return sm90::forward::counters_of(params, kernel.head_dim, kernel.head_dim_v);
}

void row_stats(const BackwardParams& params) {
  const DeviceGuard guard(params.device);
  sm80::backward::launch_row_stats(params);
}

void backward(const BackwardParams& params) {
  const bool both = params.owner == Owner::both;
  const auto& of_both = params.workspace != nullptr ? kBackwardOrderedSm90 : kBackwardBandSm90;
  const Kernel<BackwardParams>& kernel = choose(both ? Table<BackwardParams>{} : kBackwardSm80,
                                                both ? of_both : kBackwardSm90, params);
  const DeviceGuard guard(params.device);
  kernel.launch(params);
}

void decode_parts(const DecodeParams& params) {
  const DeviceGuard guard(params.device);
  params.element == Element::float16 ? decode::launch_parts<__half>(params)
                                     : decode::launch_parts<__nv_bfloat16>(params);
}

void decode_finish(const DecodeParams& params) {
  const DeviceGuard guard(params.device);
  params.element == Element::float16 ? decode::launch_finish<__half>(params)
                                     : decode::launch_finish<__nv_bfloat16>(params);
}

std::vector<std::pair<int, int>> head_dims() {
  std::vector<std::pair<int, int>> pairs;
  for (const Kernel<ForwardParams>& kernel : kForwardSm80) {
    if (kernel.element == Element::float16) pairs.emplace_back(kernel.head_dim, kernel.head_dim_v);
  }
  return pairs;
}

bool sm90_fits(int head_dim, int head_dim_v) {
  return find(kForwardSm90, Element::float16, head_dim, head_dim_v) != nullptr;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace sparse_attn
