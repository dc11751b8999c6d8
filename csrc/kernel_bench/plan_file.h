// SPDX-License-Identifier: Apache-2.0
// A plan as text: what `python -m sparse_attn plan strided:128 --n 12288` writes.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

#include "attention/plan.h"

namespace sparse_attn::kernel_bench {

struct PlanFile {
  std::string name;  // for reports
  int length;
  int64_t pairs;  // attended (query, key) pairs of one head
  // The first key view lacks some key: dk and dv must be 0 before the first launch.
  bool zero_key_gradients;
  std::vector<Branch> branches;
};

// Throws std::runtime_error, with path and line, on anything but a whole and consistent plan.
PlanFile read_plan(std::istream& input, const std::string& path);

}  // namespace sparse_attn::kernel_bench
