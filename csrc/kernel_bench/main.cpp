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
#include "kernel_bench/options.h"
#include "kernel_bench/plan_file.h"
#include "kernel_bench/reference.h"
#include "kernel_bench/report.h"
#include "kernel_bench/tensors.h"
#include "kernel_bench/timing.h"
#include "sm90/backward_band/fits.h"

// cuda_profiler_api.h, which declares these, comes in a wheel of its own.
extern "C" cudaError_t cudaProfilerStart();
extern "C" cudaError_t cudaProfilerStop();

namespace sparse_attn::kernel_bench {
namespace {

// What forward and backward params share.
template <class Params>
Params params_of(const Tensors& tensors, Kernels kernels, int device) {
  Params params{};
  params.kernels = kernels;
  params.q = tensors.view(tensors.q, tensors.heads, tensors.head_dim);
  params.k = tensors.view(tensors.k, tensors.kv_heads, tensors.head_dim);
  params.v = tensors.view(tensors.v, tensors.kv_heads, tensors.head_dim_v);
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
  auto params = params_of<ForwardParams>(tensors, kernels, device);
  params.out = tensors.view(tensors.out, tensors.heads, tensors.head_dim_v);
  params.lse = tensors.lse.data();
  params.counters = tensors.counters.data();
  const std::vector<Branch>& branches = plan.branches;
  for (size_t i = 0; i < branches.size(); i += params.branch_count, params.merge = true) {
    params.branch_count = static_cast<int>(std::min<size_t>(branches.size() - i, kMaxBranches));
    std::copy_n(branches.begin() + i, params.branch_count, params.branches);
    forward(params);
  }
}

void run_row_stats(const Tensors& tensors, int device) {
  RowStatsParams params{};
  params.out = tensors.view(tensors.out, tensors.heads, tensors.head_dim_v);
  params.dout = tensors.view(tensors.dout, tensors.heads, tensors.head_dim_v);
  params.lse = tensors.lse.data();
  params.stats = tensors.stats.data();
  params.batch = tensors.batch;
  params.heads = tensors.heads;
  params.seq = tensors.seq;
  params.head_dim_v = tensors.head_dim_v;
  params.element = tensors.element;
  params.device = device;
  row_stats(params);
}

void run_backward(const PlanFile& plan, const Tensors& tensors, Kernels kernels, int device) {
  if (plan.zero_key_gradients) {
    CHECK_CUDA(cudaMemsetAsync(tensors.dk.data(), 0, tensors.dk.bytes()));
    CHECK_CUDA(cudaMemsetAsync(tensors.dv.data(), 0, tensors.dv.bytes()));
  }
  auto params = params_of<BackwardParams>(tensors, kernels, device);
  params.dout = tensors.view(tensors.dout, tensors.heads, tensors.head_dim_v);
  params.dq = tensors.view(tensors.dq, tensors.heads, tensors.head_dim);
  params.dk = tensors.view(tensors.dk, tensors.kv_heads, tensors.head_dim);
  params.dv = tensors.view(tensors.dv, tensors.kv_heads, tensors.head_dim_v);
  params.stats = tensors.stats.data();
  const bool at_once =
      kernels == Kernels::sm90 && tensors.heads == tensors.kv_heads &&
      std::max(tensors.head_dim, tensors.head_dim_v) <= sm90::backward_band::kMostHeadDim &&
      plan.branches.size() == plan.transposed.size() &&
      std::all_of(plan.transposed.begin(), plan.transposed.end(), sm90::backward_band::fits);
  if (at_once) {
    params.owner = Owner::both;
    params.heads_together = 1;
    params.out = tensors.view(tensors.out, tensors.heads, tensors.head_dim_v);
    params.lse = tensors.lse.data();
    params.finds_stats = true;
    // The last first: adding to neighbours is faster than to residues.
    for (auto branch = plan.transposed.rbegin(); branch != plan.transposed.rend(); ++branch) {
      params.branch = *branch;
      backward(params);
      params.accumulate = true;
      params.finds_stats = false;  // the first has left them
    }
    return;
  }
  run_row_stats(tensors, device);
  for (const Owner owner : {Owner::queries, Owner::keys}) {
    params.owner = owner;
    params.heads_together = owner == Owner::keys ? tensors.heads / tensors.kv_heads : 1;
    params.accumulate = false;
    for (const Branch& branch : owner == Owner::keys ? plan.transposed : plan.branches) {
      params.branch = branch;
      backward(params);
      params.accumulate = true;
    }
  }
}

PlanFile read_plan_at(const std::string& path) {
  std::ifstream input(path);
  if (!input.is_open()) throw std::runtime_error("cannot open " + path);
  return read_plan(input, path);
}

Report run(const Options& options) {
  Report report{options, read_plan_at(options.plan), {}, {}, {}};
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
  const auto call_backward = [&] { run_backward(plan, tensors, kernels, device); };
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
