// SPDX-License-Identifier: Apache-2.0
#include "kernel_bench/options.h"

#include <charconv>

namespace sparse_attn::kernel_bench {
namespace {

constexpr int kMostHeads = 65535;
constexpr int kMostHeadDim = 256;

[[noreturn]] void fail(const std::string& problem) { throw std::runtime_error(problem); }

int64_t number(const std::string& name, const std::string& text, int64_t least, int64_t greatest) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (text.empty() || error != std::errc() || stop != end || value < least || value > greatest) {
    fail(name + " must be an integer from " + std::to_string(least) + " to " +
         std::to_string(greatest) + ", found '" + text + "'");
  }
  return value;
}

void set_direction(Options& options, const std::string& text) {
  if (text != "forward" && text != "backward" && text != "both") {
    fail("--direction must be forward, backward or both, found '" + text + "'");
  }
  options.forward = text != "backward";
  options.backward = text != "forward";
}

void set_element(Options& options, const std::string& text) {
  if (text != "float16" && text != "bfloat16") {
    fail("--dtype must be float16 or bfloat16, found '" + text + "'");
  }
  options.element = text == "float16" ? Element::float16 : Element::bfloat16;
}

void set_kernels(Options& options, const std::string& text) {
  if (text != "sm80" && text != "sm90")
    fail("--kernels must be sm80 or sm90, found '" + text + "'");
  options.kernels = text == "sm80" ? Kernels::sm80 : Kernels::sm90;
}

// Whether `name` is a flag; sets it.
bool set_flag(Options& options, const std::string& name) {
  if (name == "--cold") return options.cold = true;
  if (name == "--once") return options.once = true;
  if (name == "--json") return options.json = true;
  if (name == "--help" || name == "-h") return options.help = true;
  return false;
}

void set_value(Options& options, const std::string& name, const std::string& text) {
  const auto size = [&](int greatest) { return static_cast<int>(number(name, text, 1, greatest)); };
  if (name == "--batch") {
    options.batch = size(kMostHeads);
  } else if (name == "--heads") {
    options.heads = size(kMostHeads);
  } else if (name == "--kv-heads") {
    options.kv_heads = size(kMostHeads);
  } else if (name == "--head-dim") {
    options.head_dim = size(kMostHeadDim);
  } else if (name == "--head-dim-v") {
    options.head_dim_v = size(kMostHeadDim);
  } else if (name == "--dtype") {
    set_element(options, text);
  } else if (name == "--kernels") {
    set_kernels(options, text);
  } else if (name == "--direction") {
    set_direction(options, text);
  } else if (name == "--repeats") {
    options.repeats = size(1000);
  } else if (name == "--seed") {
    options.seed = static_cast<uint64_t>(number(name, text, 0, INT64_MAX));
  } else {
    fail("no option " + name + ", see --help");
  }
}

}  // namespace

std::string usage() {
  return "usage: kernel_bench PLAN [options]\n"
         "\n"
         "Checks the kernels that the Python module would run against plain loops over the plan,\n"
         "then times them.\n"
         "PLAN is a file: python -m sparse_attn plan strided:128 --n 12288 > PLAN\n"
         "\n"
         "  --batch N         (1)\n"
         "  --heads N         (8)\n"
         "  --kv-heads N      divides heads (as many)\n"
         "  --head-dim N      a multiple of 8 (64)\n"
         "  --head-dim-v N    a multiple of 8 (head_dim)\n"
         "  --dtype NAME      float16 or bfloat16 (bfloat16)\n"
         "  --kernels NAME    sm80 or sm90 (sm90 if it can run)\n"
         "  --direction NAME  forward, backward or both (both)\n"
         "  --repeats N       timed calls (50)\n"
         "  --seed N          of the random inputs (0)\n"
         "  --cold            the L2 cache holds nothing of the tensors before each timed call\n"
         "  --once            one call instead of the timed ones, between cudaProfilerStart and\n"
         "                    cudaProfilerStop: ncu --profile-from-start off kernel_bench ...\n"
         "  --json            the report as JSON\n"
         "\n"
         "Exit status: 0, 1 if a result is wrong, 2 on an error.\n";
}

Options read_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.empty() || argument[0] != '-') {
      if (!options.plan.empty()) fail("more than one plan: " + options.plan + ", " + argument);
      options.plan = argument;
    } else if (!set_flag(options, argument)) {
      const bool has_value = i + 1 < arguments.size();
      set_value(options, argument, has_value ? arguments[++i] : "");
    }
  }
  if (options.help) return options;
  if (options.plan.empty()) fail("no plan file, see --help");
  if (options.kv_heads == 0) options.kv_heads = options.heads;
  if (options.head_dim_v == 0) options.head_dim_v = options.head_dim;
  if (options.heads % options.kv_heads != 0) fail("--kv-heads must divide --heads");
  if (options.head_dim % 8 != 0) fail("--head-dim must be a multiple of 8");
  if (options.head_dim_v % 8 != 0) fail("--head-dim-v must be a multiple of 8");
  return options;
}

}  // namespace sparse_attn::kernel_bench
