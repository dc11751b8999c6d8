// SPDX-License-Identifier: Apache-2.0
// What kernel_bench prints.
#pragma once

#include <string>
#include <vector>

#include "kernel_bench/options.h"
#include "kernel_bench/plan_file.h"
#include "kernel_bench/reference.h"
#include "kernel_bench/timing.h"

namespace sparse_attn::kernel_bench {

enum class Direction { forward, backward };

struct DirectionTime {
  Direction direction;
  Milliseconds ms;
};

struct Report {
  Options options;
  PlanFile plan;
  std::string device;
  std::vector<std::string> gradients;  // the kernel of each backward launch
  std::vector<Check> checks;
  std::vector<DirectionTime> times;  // none if a check failed

  bool correct() const;
};

// Over the whole batch and all heads.
struct Work {
  double bytes;  // every tensor once: q, k, v, out; backward also dout, dq, dk, dv
  double flops;  // over attended pairs alone: two products forward, five backward
};

Work work(const Report& report, Direction direction);

std::string to_text(const Report& report);
std::string to_json(const Report& report);

}  // namespace sparse_attn::kernel_bench
