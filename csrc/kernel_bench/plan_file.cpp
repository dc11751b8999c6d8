// SPDX-License-Identifier: Apache-2.0
#include "kernel_bench/plan_file.h"

#include <charconv>
#include <sstream>
#include <stdexcept>

namespace sparse_attn::kernel_bench {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // rows and tokens are 32-bit integers
constexpr int64_t kMostSize = kMostTokens + 1;     // sizes past the end are cut to length + 1
constexpr int64_t kMostBranches = 64;

// The file, word by word; every line must hold just what is asked for.
class Reader {
 public:
  Reader(std::istream& input, const std::string& path) : input_(input), path_(path) {}

  void next_line() {
    std::string line;
    ++line_number_;
    if (!std::getline(input_, line)) fail("the file ends here, it must end with the line 'end'");
    words_.clear();
    words_.str(line);
  }

  void end_line() {
    std::string word;
    if (words_ >> word) fail("wanted the end of the line, found '" + word + "'");
  }

  void end_file() {
    std::string line;
    ++line_number_;
    if (std::getline(input_, line)) fail("wanted the end of the file, found '" + line + "'");
  }

  std::string word() {
    std::string word;
    words_ >> word;
    return word;
  }

  void expect(const std::string& wanted) {
    const std::string found = word();
    if (found != wanted) fail("wanted '" + wanted + "', found '" + found + "'");
  }

  int64_t number(const std::string& name, int64_t least, int64_t greatest) {
    const std::string text = word();
    int64_t value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (text.empty() || error != std::errc() || stop != end) {
      fail(name + " must be an integer, found '" + text + "'");
    }
    if (value < least || value > greatest) {
      fail(name + " is " + text + ", must be from " + std::to_string(least) + " to " +
           std::to_string(greatest));
    }
    return value;
  }

  int64_t field(const std::string& name, int64_t least, int64_t greatest) {
    expect(name);
    return number(name, least, greatest);
  }

  int size(const std::string& name, int64_t least) {
    return static_cast<int>(field(name, least, kMostSize));
  }

  bool flag(const std::string& name) { return field(name, 0, 1) != 0; }

  // A line that holds one field.
  int64_t line(const std::string& name, int64_t least, int64_t greatest) {
    next_line();
    const int64_t value = field(name, least, greatest);
    end_line();
    return value;
  }

  std::string rest_of_line() {
    std::string text;
    std::getline(words_ >> std::ws, text);
    return text;
  }

  [[noreturn]] void fail(const std::string& problem) const {
    throw std::runtime_error(path_ + ":" + std::to_string(line_number_) + ": " + problem);
  }

 private:
  std::istream& input_;
  std::string path_;
  int line_number_ = 0;
  std::istringstream words_;
};

SequenceView read_view(Reader& reader, int length) {
  SequenceView view{};
  view.length = length;
  view.groups = reader.size("groups", 1);
  view.max_rows = reader.size("max_rows", 0);
  view.offset = reader.size("offset", 0);
  view.group_step = reader.size("group_step", 0);
  view.run = Divisor::of(reader.size("run", 1));
  view.run_stride = Divisor::of(reader.size("run_stride", 1));
  reader.end_line();
  if (view.run.value > view.run_stride.value) reader.fail("run is longer than run_stride");
  // Whole groups of any length, the last one cut: less than two rows a token.
  if (int64_t{view.groups} * view.max_rows >= 2 * int64_t{length}) {
    reader.fail("the view has more rows than the sequence has tokens");
  }
  if (view.offset + (view.groups - int64_t{1}) * view.group_step > kMostSize) {
    reader.fail("the last group begins after the end of the sequence");
  }
  return view;
}

Run read_run(Reader& reader, int length) {
  reader.next_line();
  reader.expect("run");
  Run run{};
  run.length = length;
  run.window = static_cast<int>(reader.field("window", 1, length));
  run.past = reader.flag("past");
  run.future = reader.flag("future");
  run.chunk_count = static_cast<int>(reader.field("chunks", 0, kMaxChunks));
  for (int i = 0; i < run.chunk_count; ++i) {
    run.chunks[i] = Divisor::of(static_cast<int>(reader.number("a chunk", 1, length)));
  }
  reader.end_line();
  return run;
}

Part read_part(Reader& reader) {
  const std::string part = reader.word();
  if (part == "before") return Part::before;
  if (part == "inside") return Part::inside;
  if (part == "after") return Part::after;
  reader.fail("wanted 'before', 'inside' or 'after', found '" + part + "'");
}

Branch read_branch(Reader& reader, int length) {
  Branch branch{};
  reader.next_line();
  reader.expect("queries");
  branch.queries = read_view(reader, length);
  branch.run = read_run(reader, length);
  branch.segment_count = static_cast<int>(reader.line("segments", 1, kMaxSegments));
  for (int i = 0; i < branch.segment_count; ++i) {
    reader.next_line();
    reader.expect("keys");
    branch.segments[i].part = read_part(reader);
    branch.segments[i].keys = read_view(reader, length);
    const int groups = branch.segments[i].keys.groups;
    if (groups != branch.queries.groups && groups != 1) {
      reader.fail("a key view has the groups of its query view, or one group");
    }
  }
  return branch;
}

int64_t count_pairs(const std::vector<Branch>& branches) {
  int64_t pairs = 0;
  for (const Branch& branch : branches) {
    for (int group = 0; group < branch.queries.groups; ++group) {
      const int rows = branch.queries.rows(group);
      for (int row = 0; row < rows; ++row) {
        const int token = branch.queries.position(group, row);
        for (int i = 0; i < branch.segment_count; ++i) {
          const Interval keys = branch.segments[i].bounds(branch.run, group, token);
          pairs += greatest(keys.end - keys.first, 0);
        }
      }
    }
  }
  return pairs;
}

std::vector<Branch> read_branches(Reader& reader, int length, int64_t pairs) {
  std::vector<Branch> branches(reader.line("branches", 1, kMostBranches));
  for (Branch& branch : branches) branch = read_branch(reader, length);
  const int64_t counted = count_pairs(branches);
  if (counted != pairs) {
    reader.fail("the branches have " + std::to_string(counted) + " pairs, the line 'pairs' says " +
                std::to_string(pairs));
  }
  return branches;
}

}  // namespace

PlanFile read_plan(std::istream& input, const std::string& path) {
  Reader reader(input, path);
  PlanFile plan{};
  reader.next_line();
  if (reader.rest_of_line() != "sparse_attn plan 2") {
    reader.fail("wanted 'sparse_attn plan 2': write the file with `python -m sparse_attn plan`");
  }
  reader.next_line();
  reader.expect("name");
  plan.name = reader.rest_of_line();
  plan.length = static_cast<int>(reader.line("length", 1, kMostTokens));
  plan.pairs = reader.line("pairs", 0, int64_t{plan.length} * plan.length);
  plan.zero_key_gradients = reader.line("zero_key_gradients", 0, 1) != 0;
  plan.branches = read_branches(reader, plan.length, plan.pairs);
  reader.next_line();
  reader.expect("end");
  reader.end_line();
  reader.end_file();
  return plan;
}

}  // namespace sparse_attn::kernel_bench
