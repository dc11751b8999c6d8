// SPDX-License-Identifier: Apache-2.0
#include "kernel_bench/report.h"

#include <cmath>
#include <cstdio>

namespace sparse_attn::kernel_bench {
namespace {

template <class... Values>
std::string formatted(const char* format, Values... values) {
  std::string text(std::snprintf(nullptr, 0, format, values...), '\0');
  std::snprintf(text.data(), text.size() + 1, format, values...);
  return text;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char character : text) {
    if (static_cast<unsigned char>(character) < 0x20) {
      result += formatted("\\u%04x", static_cast<unsigned>(character));
    } else {
      if (character == '"' || character == '\\') result += '\\';
      result += character;
    }
  }
  return result + '"';
}

// JSON has no infinity.
std::string finite(double value) {
  return std::isfinite(value) ? formatted("%.6g", value) : "null";
}

const char* flag(bool value) { return value ? "true" : "false"; }

const char* name(Direction direction) {
  return direction == Direction::forward ? "forward" : "backward";
}

const char* name(Element element) { return element == Element::float16 ? "float16" : "bfloat16"; }

const char* name(Kernels kernels) { return kernels == Kernels::sm90 ? "sm90" : "sm80"; }

struct Rates {
  double gb_per_s;
  double tflop_per_s;
};

Rates rates(const Report& report, const DirectionTime& time) {
  const Work done = work(report, time.direction);
  const double seconds = 1e-3 * time.ms.median;
  return {1e-9 * done.bytes / seconds, 1e-12 * done.flops / seconds};
}

std::string joined(const std::vector<std::string>& texts) {
  std::string text;
  for (const std::string& next : texts) text += (text.empty() ? "" : ", ") + next;
  return text;
}

// Objects as a JSON list, one a line.
std::string json_list(const std::vector<std::string>& objects) {
  std::string text = "[";
  for (size_t i = 0; i < objects.size(); ++i) text += (i ? ",\n    " : "\n    ") + objects[i];
  return text + (objects.empty() ? "]" : "\n  ]");
}

std::string json_field(const char* name, const std::string& value) {
  return formatted("  \"%s\": ", name) + value + ",\n";
}

}  // namespace

bool Report::correct() const {
  for (const Check& check : checks) {
    if (!check.passed()) return false;
  }
  return true;
}

Work work(const Report& report, Direction direction) {
  const Options& options = report.options;
  const double rows = 1.0 * options.batch * (options.heads + options.kv_heads) * report.plan.length;
  const double bytes = 2 * rows * (options.head_dim + options.head_dim_v);
  const double pairs = 1.0 * options.batch * options.heads * report.plan.pairs;
  if (direction == Direction::forward) {
    return {bytes, 2 * pairs * (options.head_dim + options.head_dim_v)};
  }
  return {2 * bytes, 2 * pairs * (3 * options.head_dim + 2 * options.head_dim_v)};
}

std::string to_text(const Report& report) {
  const Options& options = report.options;
  std::string text = report.device + "\n" + report.plan.name + "\n";
  text += formatted(
      "n %d, batch %d, heads %d, kv_heads %d, head_dim %d, head_dim_v %d, %s, %s, L2 %s\n\n",
      report.plan.length, options.batch, options.heads, options.kv_heads, options.head_dim,
      options.head_dim_v, name(options.element), name(*options.kernels),
      options.cold ? "flushed" : "not flushed");
  if (!report.gradients.empty()) text += "gradients by " + joined(report.gradients) + "\n\n";
  text += "tensor    tokens  error, share of allowed\n";
  for (const Check& check : report.checks) {
    text += formatted("%-6s %9lld  %.3g", check.tensor.c_str(),
                      static_cast<long long>(check.tokens), check.error_share);
    text += check.passed() ? "\n" : "  WRONG at " + check.worst + "\n";
  }
  if (!report.times.empty()) {
    text += "\ndirection   median ms       min       max     GB/s   TFLOP/s\n";
  }
  for (const DirectionTime& time : report.times) {
    const Rates rate = rates(report, time);
    text += formatted("%-9s %11.4f %9.4f %9.4f %8.0f %9.1f\n", name(time.direction), time.ms.median,
                      time.ms.least, time.ms.greatest, rate.gb_per_s, rate.tflop_per_s);
  }
  return text;
}

std::string to_json(const Report& report) {
  const Options& options = report.options;
  std::vector<std::string> gradients, checks, times;
  for (const std::string& kernel : report.gradients) gradients.push_back(quoted(kernel));
  for (const Check& check : report.checks) {
    checks.push_back(formatted(
        "{\"tensor\": %s, \"tokens\": %lld, \"error_share\": %s, "
        "\"passed\": %s, \"worst\": %s}",
        quoted(check.tensor).c_str(), static_cast<long long>(check.tokens),
        finite(check.error_share).c_str(), flag(check.passed()), quoted(check.worst).c_str()));
  }
  for (const DirectionTime& time : report.times) {
    const Work done = work(report, time.direction);
    const Rates rate = rates(report, time);
    times.push_back(
        formatted("{\"direction\": \"%s\", \"ms\": {\"median\": %.6g, \"min\": %.6g, "
                  "\"max\": %.6g}, \"bytes\": %.0f, \"flops\": %.0f, \"gb_per_s\": %.6g, "
                  "\"tflop_per_s\": %.6g}",
                  name(time.direction), time.ms.median, time.ms.least, time.ms.greatest, done.bytes,
                  done.flops, rate.gb_per_s, rate.tflop_per_s));
  }
  std::string text = "{\n";
  text += json_field("device", quoted(report.device));
  text += json_field("plan", quoted(report.plan.name));
  text += json_field("seq", std::to_string(report.plan.length));
  text += json_field("pairs", std::to_string(report.plan.pairs));
  text += json_field("batch", std::to_string(options.batch));
  text += json_field("heads", std::to_string(options.heads));
  text += json_field("kv_heads", std::to_string(options.kv_heads));
  text += json_field("head_dim", std::to_string(options.head_dim));
  text += json_field("head_dim_v", std::to_string(options.head_dim_v));
  text += json_field("dtype", quoted(name(options.element)));
  text += json_field("kernels", quoted(name(*options.kernels)));
  text += json_field("gradients", "[" + joined(gradients) + "]");
  text += json_field("seed", std::to_string(options.seed));
  text += json_field("cold", flag(options.cold));
  text += json_field("repeats", std::to_string(options.once ? 1 : options.repeats));
  text += json_field("checks", json_list(checks));
  text += json_field("times", json_list(times));
  return text + formatted("  \"correct\": %s\n}\n", flag(report.correct()));
}

}  // namespace sparse_attn::kernel_bench
