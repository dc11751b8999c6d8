// SPDX-License-Identifier: Apache-2.0
// The command line of kernel_bench.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace sparse_attn::kernel_bench {

struct Options {
  std::string plan;
  int batch = 1;
  int heads = 8;
  int kv_heads = 0;  // 0: as many as heads
  int head_dim = 64;
  int head_dim_v = 0;  // 0: head_dim
  Element element = Element::bfloat16;
  std::optional<Kernels> kernels;  // left out: the fastest that can run
  bool forward = true;             // the directions to time
  bool backward = true;
  int repeats = 50;
  uint64_t seed = 0;
  bool cold = false;
  bool once = false;
  bool json = false;
  bool help = false;
};

std::string usage();

// Throws std::runtime_error, naming the argument. Sizes left out are filled in.
Options read_options(const std::vector<std::string>& arguments);

}  // namespace sparse_attn::kernel_bench
