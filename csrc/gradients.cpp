// SPDX-License-Identifier: Apache-2.0
#include "gradients.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "attention/reach.h"
#include "sm90/backward_band/fits.h"
#include "sm90/backward_ordered/plan.h"

namespace sparse_attn {
namespace {

namespace band = sm90::backward_band;
namespace ordered = sm90::backward_ordered;

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

Part exchanged(Part part) {
  return part == Part::before ? Part::after : part == Part::after ? Part::before : part;
}

// Keys as queries: the queries of every key of a branch with one key view. Those whose run holds a
// key are the run around it with past and future exchanged, and those whose run begins after it
// come after that run.
Branch transposed(const Branch& branch) {
  Branch keys = branch;
  keys.queries = branch.segments[0].keys;
  keys.run.past = branch.run.future;
  keys.run.future = branch.run.past;
  for (int i = 0; i < branch.segment_count; ++i) {
    keys.segments[i] = {branch.queries, exchanged(branch.segments[i].part)};
  }
  return keys;
}

// One launch for all gradients of a branch with one key view, if a kernel takes it. finds_stats:
// whether that kernel can.
std::optional<GradientLaunch> launch_at_once(const BackwardParams& call, const Branch& branch) {
  if (call.kernels != Kernels::sm90 || call.heads_together != 1) return std::nullopt;
  GradientLaunch launch{call, 0, true};
  launch.params.owner = Owner::both;
  launch.params.branch = transposed(branch);
  if (greatest(call.head_dim, call.head_dim_v) <= band::kMostHeadDim &&
      band::fits(launch.params.branch)) {
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

// What two owners count tickets in.
int64_t ticket_bytes(const BackwardParams& params) {
  return params.kernels == Kernels::sm90 && by_tickets(params.branch) ? sizeof(int) : 0;
}

// dq of a branch; then dk and dv of each of its key views.
void add_two_owners(std::vector<GradientLaunch>& launches, const BackwardParams& call,
                    const Branch& branch, const std::vector<Branch>& parts) {
  GradientLaunch launch{call, 0, true};
  launch.params.owner = Owner::queries;
  launch.params.branch = branch;
  launch.params.heads_together = 1;
  launch.params.accumulate = !launches.empty();
  launch.workspace = ticket_bytes(launch.params);
  launches.push_back(launch);
  launch.params.owner = Owner::keys;
  launch.params.heads_together = call.heads_together;
  for (const Branch& part : parts) {
    launch.params.branch = transposed(part);
    launch.workspace = ticket_bytes(launch.params);
    launches.push_back(launch);
    launch.params.accumulate = true;
  }
}

// The key views of a branch go apart where one launch then sums all gradients of one of them.
void add_branch(std::vector<GradientLaunch>& launches, const BackwardParams& call,
                const Branch& branch) {
  const std::vector<Branch> parts = by_key_view(branch);
  std::vector<std::optional<GradientLaunch>> at_once;
  for (const Branch& part : parts) at_once.push_back(launch_at_once(call, part));
  if (std::none_of(at_once.begin(), at_once.end(), [](const auto& x) { return x.has_value(); })) {
    return add_two_owners(launches, call, branch, parts);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (at_once[i]) {
      add_at_once(launches, *at_once[i]);
    } else {
      add_two_owners(launches, call, parts[i], {parts[i]});
    }
  }
}

// finds_stats: whether the kernel of a launch can.
std::vector<GradientLaunch> launches_of(const HeadRange& range) {
  if (range.branches.empty()) throw std::invalid_argument("a plan has a branch");
  std::vector<GradientLaunch> launches;
  for (const Branch& branch : range.branches) add_branch(launches, range.call, branch);
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
