// SPDX-License-Identifier: Apache-2.0
// Which launches sum the gradients of a call: chosen here alone, for the Python module and for
// kernel_bench. Needs no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace sparse_attn {

// Neighbouring heads of one plan.
struct HeadRange {
  BackwardParams call;           // what its launches share; heads_together: for dk and dv
  std::vector<Branch> branches;  // of the plan
};

struct GradientLaunch {
  BackwardParams params;  // complete but for addresses
  int64_t workspace;      // bytes
  bool writes_every_dq;   // else dq must be 0 before
};

// The launches of all ranges, one after another.
struct Gradients {
  std::vector<GradientLaunch> launches;
  bool stats_before;  // row_stats(params of the first launch) comes first
  bool keeps_stats;   // there must be memory for the statistics
  int64_t workspace;  // bytes, of this call alone; its launches share them

  static Gradients of(const std::vector<HeadRange>& ranges);
};

}  // namespace sparse_attn
