// SPDX-License-Identifier: Apache-2.0
#include "gradients.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "sm90/backward_band/fits.h"
#include "sm90/backward_ordered/plan.h"

namespace sparse_attn {
namespace {

namespace band = sm90::backward_band;
namespace ordered = sm90::backward_ordered;
using Branches = std::vector<Branch>::const_iterator;

// The same pairs, one branch for each key view.
std::vector<Branch> by_key_view(const Branch& branch) {
  std::vector<Branch> parts;
  for (int i = 0; i < branch.segment_count; ++i) {
    const Segment& segment = branch.segments[i];
    auto part = std::find_if(parts.begin(), parts.end(), [&](const Branch& other) {
      return band::same(other.segments[0].keys, segment.keys);
    });
    if (part == parts.end()) {
      part = parts.insert(part, branch);
      part->segment_count = 0;
    }
    part->segments[part->segment_count++] = segment;
  }
  return parts;
}

// One launch for all gradients of a branch, transposed `keys`, if a kernel takes it. finds_stats:
// whether that kernel can.
std::optional<GradientLaunch> launch_at_once(const BackwardParams& call, const Branch& branch,
                                             const Branch& keys) {
  if (call.kernels != Kernels::sm90 || call.heads_together != 1) return std::nullopt;
  GradientLaunch launch{call, 0, true};
  launch.params.owner = Owner::both;
  launch.params.branch = keys;
  if (greatest(call.head_dim, call.head_dim_v) <= band::kMostHeadDim && band::fits(keys)) {
    launch.params.finds_stats = true;
    return launch;
  }
  const int head_dim = ordered::kernel_head_dim(call.head_dim, call.head_dim_v);
  if (head_dim == 0) return std::nullopt;
  const std::optional<ordered::Plan> plan = ordered::Plan::of(launch.params, head_dim);
  if (!plan) return std::nullopt;
  launch.workspace = plan->bytes(head_dim);
  const Segment& near = branch.segments[0];
  launch.writes_every_dq =  // each query attends itself
      band::same(near.keys, branch.queries) && near.part == Part::inside && branch.blocks.size == 0;
  return launch;
}

bool finds_stats(const GradientLaunch& launch) { return launch.params.finds_stats; }

void add_at_once(std::vector<GradientLaunch>& launches, GradientLaunch launch) {
  launch.params.accumulate = !launches.empty();
  launches.push_back(launch);
}

// dq of a branch; then dk and dv of each of its key views.
void add_two_owners(std::vector<GradientLaunch>& launches, const BackwardParams& call,
                    const Branch& branch, Branches keys, Branches end) {
  GradientLaunch launch{call, 0, true};
  launch.params.owner = Owner::queries;
  launch.params.branch = branch;
  launch.params.heads_together = 1;
  launch.params.accumulate = !launches.empty();
  launches.push_back(launch);
  launch.params.owner = Owner::keys;
  launch.params.heads_together = call.heads_together;
  for (; keys != end; ++keys, launch.params.accumulate = true) {
    launch.params.branch = *keys;
    launches.push_back(launch);
  }
}

// The key views of a branch go apart where one launch then sums all gradients of one of them.
void add_branch(std::vector<GradientLaunch>& launches, const BackwardParams& call,
                const Branch& branch, const std::vector<Branch>& parts, Branches keys) {
  std::vector<std::optional<GradientLaunch>> at_once;
  for (size_t i = 0; i < parts.size(); ++i) {
    at_once.push_back(launch_at_once(call, parts[i], keys[i]));
  }
  if (std::none_of(at_once.begin(), at_once.end(), [](const auto& x) { return x.has_value(); })) {
    return add_two_owners(launches, call, branch, keys, keys + parts.size());
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (at_once[i]) {
      add_at_once(launches, *at_once[i]);
    } else {
      add_two_owners(launches, call, parts[i], keys + i, keys + i + 1);
    }
  }
}

// finds_stats: whether the kernel of a launch can.
std::vector<GradientLaunch> launches_of(const HeadRange& range) {
  std::vector<std::vector<Branch>> parts;
  size_t key_views = 0;
  for (const Branch& branch : range.branches) {
    parts.push_back(by_key_view(branch));
    key_views += parts.back().size();
  }
  if (key_views == 0 || key_views != range.transposed.size()) {
    throw std::invalid_argument("each key view of a branch has one transposed branch");
  }
  std::vector<GradientLaunch> launches;
  Branches keys = range.transposed.begin();
  for (size_t i = 0; i < parts.size(); ++i) {
    add_branch(launches, range.call, range.branches[i], parts[i], keys);
    keys += parts[i].size();
  }
  if (std::all_of(launches.begin(), launches.end(), finds_stats)) {
    // The last first: adding to neighbours is faster than to residues.
    const std::vector<GradientLaunch> reversed(launches.rbegin(), launches.rend());
    launches.clear();
    for (const GradientLaunch& launch : reversed) add_at_once(launches, launch);
  }
  return launches;
}

}  // namespace

Gradients Gradients::of(const std::vector<HeadRange>& ranges) {
  std::vector<std::vector<GradientLaunch>> launches;
  for (const HeadRange& range : ranges) launches.push_back(launches_of(range));
  Gradients gradients{};
  // A kernel of bands finds the statistics on the way, for the launches after it too. Where each
  // range begins with one, no launch is needed for them; where there is no other, no memory.
  gradients.stats_before = std::any_of(launches.begin(), launches.end(),
                                       [](const auto& x) { return !finds_stats(x.front()); });
  gradients.keeps_stats =
      gradients.stats_before ||
      std::any_of(launches.begin(), launches.end(), [](const auto& x) { return x.size() > 1; });
  for (auto& of_range : launches) {
    for (GradientLaunch& launch : of_range) {
      const bool first = &launch == &of_range.front();
      launch.params.finds_stats = !gradients.stats_before && first;
      gradients.workspace = std::max(gradients.workspace, launch.workspace);
      gradients.launches.push_back(launch);
    }
  }
  return gradients;
}

}  // namespace sparse_attn
