// SPDX-License-Identifier: Apache-2.0
// Results against plain loops: each query against each key, whether the plan attends it or not, in
// fp64. Tiles, transposed branches and merging have no part in it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_bench/plan_file.h"
#include "kernel_bench/tensors.h"

namespace sparse_attn::kernel_bench {

struct Check {
  std::string tensor;
  int64_t tokens;  // compared, of every batch entry and head
  // The largest error as a share of what the tolerance rule of CONTRIBUTING.md allows; infinite
  // where NaN or an infinity is out of place.
  double error_share;
  std::string worst;  // where

  bool passed() const { return error_share <= 1; }
};

// The tokens to compare: all of a small problem, else some, with the first and the last.
std::vector<int> sample_tokens(const Tensors& tensors, uint64_t seed);

// out, lse; with `backward` also dq, dk and dv. Waits for the device.
// dk and dv take the lse and out of the queries as the kernels left them: exact ones would cost
// O(seq^2), and they were compared before.
std::vector<Check> check(const PlanFile& plan, const Tensors& tensors,
                         const std::vector<int>& tokens, bool backward);

}  // namespace sparse_attn::kernel_bench
