// SPDX-License-Identifier: Apache-2.0
// kernel_bench: the kernels of a plan, checked and timed, without Python. See usage() in
// options.cpp.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "gradients.h"
#include "kernel_bench/options.h"
#include "kernel_bench/plan_file.h"
#include "kernel_bench/reference.h"
#include "kernel_bench/report.h"
#include "kernel_bench/tensors.h"
#include "kernel_bench/timing.h"

// cuda_profiler_api.h, which declares these, comes in a wheel of its own.
extern "C" cudaError_t cudaProfilerStart();
extern "C" cudaError_t cudaProfilerStop();

namespace sparse_attn::kernel_bench {
namespace {

CallParams call_params(const Tensors& tensors, Kernels kernels, int device) {
  CallParams params{};
  params.kernels = kernels;
  params.q = tensors.view(tensors.q, tensors.heads, tensors.head_dim);
  params.k = tensors.view(tensors.k, tensors.kv_heads, tensors.head_dim);
  params.v = tensors.view(tensors.v, tensors.kv_heads, tensors.head_dim_v);
  params.out = tensors.view(tensors.out, tensors.heads, tensors.head_dim_v);
  params.lse = tensors.lse.data();
  params.batch = tensors.batch;
  params.heads = tensors.heads;
  params.head_count = tensors.heads;
  params.kv_heads = tensors.kv_heads;
  params.seq_q = params.seq_k = tensors.seq;
  params.head_dim = tensors.head_dim;
  params.head_dim_v = tensors.head_dim_v;
  params.scale = tensors.scale();
  params.element = tensors.element;
  params.device = device;
  return params;
}

void run_forward(const PlanFile& plan, const Tensors& tensors, Kernels kernels, int device) {
  ForwardParams params{};
  static_cast<CallParams&>(params) = call_params(tensors, kernels, device);
  const std::vector<Branch>& branches = plan.branches;
  for (size_t i = 0; i < branches.size(); i += params.branch_count, params.merge = true) {
    params.branch_count = static_cast<int>(std::min<size_t>(branches.size() - i, kMaxBranches));
    std::copy_n(branches.begin() + i, params.branch_count, params.branches);
    params.counters = forward_counters(params) > 0 ? tensors.counters.data() : nullptr;
    forward(params);
  }
}

// The launches of a backward call as the Python module makes them, and what they borrow of memory.
class Backward {
 public:
  Backward(const PlanFile& plan, const Tensors& tensors, Kernels kernels, int device)
      : tensors_(tensors),
        zero_key_gradients_(plan.zero_key_gradients),
        gradients_(gradients_of(plan, tensors, kernels, device)),
        workspace_(gradients_.workspace) {}

  void run() const {
    if (zero_key_gradients_) set_zero(tensors_.dk), set_zero(tensors_.dv);
    if (!gradients_.launches.front().writes_every_dq) set_zero(tensors_.dq);
    if (gradients_.stats_before) row_stats(gradients_.launches.front().params);
    for (const GradientLaunch& launch : gradients_.launches) {
      BackwardParams params = launch.params;
      params.workspace = launch.workspace > 0 ? workspace_.data() : nullptr;
      backward(params);
    }
  }

  // Of each launch.
  std::vector<std::string> kernels() const {
    std::vector<std::string> names;
    for (const GradientLaunch& launch : gradients_.launches) {
      const Owner owner = launch.params.owner;
      names.push_back(owner == Owner::queries ? "queries"
                      : owner == Owner::keys  ? "keys"
                      : launch.workspace > 0  ? "ordered"
                                              : "bands");
    }
    return names;
  }

 private:
  static Gradients gradients_of(const PlanFile& plan, const Tensors& tensors, Kernels kernels,
                                int device) {
    BackwardParams call{};
    static_cast<CallParams&>(call) = call_params(tensors, kernels, device);
    call.dout = tensors.view(tensors.dout, tensors.heads, tensors.head_dim_v);
    call.dq = tensors.view(tensors.dq, tensors.heads, tensors.head_dim);
    call.dk = tensors.view(tensors.dk, tensors.kv_heads, tensors.head_dim);
    call.dv = tensors.view(tensors.dv, tensors.kv_heads, tensors.head_dim_v);
    call.heads_together = tensors.heads / tensors.kv_heads;
    Gradients gradients = Gradients::of({{call, plan.branches}});
    if (gradients.keeps_stats) {
      for (GradientLaunch& launch : gradients.launches) {
        launch.params.stats = tensors.stats.data();
      }
    }
    return gradients;
  }

  template <class T>
  static void set_zero(const DeviceBuffer<T>& values) {
    CHECK_CUDA(cudaMemsetAsync(values.data(), 0, values.bytes()));
  }

  const Tensors& tensors_;
  bool zero_key_gradients_;
  Gradients gradients_;
  DeviceBuffer<char> workspace_;  // not initialized: initcheck tells what is read before
};

PlanFile read_plan_at(const std::string& path) {
  std::ifstream input(path);
  if (!input.is_open()) throw std::runtime_error("cannot open " + path);
  return read_plan(input, path);
}

Report run(const Options& options) {
  Report report{options, read_plan_at(options.plan), {}, {}, {}, {}};
  const PlanFile& plan = report.plan;
  int device = 0;
  CHECK_CUDA(cudaGetDevice(&device));
  cudaDeviceProp properties{};
  CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
  report.device = properties.name;

  const Tensors tensors(options, plan.length);
  const bool hopper = properties.major == 9 && properties.minor == 0;
  const bool sm90 = hopper && sm90_fits(options.head_dim, options.head_dim_v);
  const Kernels kernels = options.kernels.value_or(sm90 ? Kernels::sm90 : Kernels::sm80);
  report.options.kernels = kernels;
  const auto call_forward = [&] { run_forward(plan, tensors, kernels, device); };
  const Backward gradients(plan, tensors, kernels, device);
  const auto call_backward = [&] { gradients.run(); };
  if (options.backward) report.gradients = gradients.kernels();
  std::optional<CacheFlush> flush;
  if (options.cold) flush.emplace();

  // The call that is checked; with --once the one that is profiled.
  const auto call_once = [&](const auto& call, bool profiled) {
    if (flush) (*flush)();
    CHECK_CUDA(cudaDeviceSynchronize());
    if (profiled) CHECK_CUDA(cudaProfilerStart());
    call();
    CHECK_CUDA(cudaDeviceSynchronize());
    if (profiled) CHECK_CUDA(cudaProfilerStop());
  };
  call_once(call_forward, options.once && options.forward);
  if (options.backward) call_once(call_backward, options.once);
  report.checks = check(plan, tensors, sample_tokens(tensors, options.seed), options.backward);
  if (options.once || !report.correct()) return report;

  if (options.forward) {
    report.times.push_back({Direction::forward, time_calls(call_forward, options.repeats, flush)});
  }
  if (options.backward) {
    report.times.push_back(
        {Direction::backward, time_calls(call_backward, options.repeats, flush)});
  }
  return report;
}

}  // namespace
}  // namespace sparse_attn::kernel_bench

int main(int count, char** arguments) {
  using namespace sparse_attn::kernel_bench;
  try {
    const Options options = read_options({arguments + 1, arguments + count});
    if (options.help) {
      std::fputs(usage().c_str(), stdout);
      return 0;
    }
    const Report report = run(options);
    std::fputs((options.json ? to_json(report) : to_text(report)).c_str(), stdout);
    return report.correct() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_bench: error: %s\n", error.what());
    return 2;
  }
}
