// SPDX-License-Identifier: Apache-2.0
// Whether two branches share a launch, the second close behind the first; and what a launch counts.
#pragma once

#include <algorithm>

#include "attention/reach.h"
#include "params.h"
#include "sm90/query_tiles.h"

namespace sparse_attn::sm90::forward {

// Whether an instance can: two branches of small heads find them in L2 as two launches, too, and
// wide heads leave no room for what the first branch has left.
constexpr bool takes_two_branches(int head_dim, int head_dim_v) {
  return head_dim > 32 && head_dim + head_dim_v <= 256;
}

// Few keys are bound by bytes, which the second branch finds in L2. Many are bound by arithmetic,
// groups shorter than half a tile by latency. The first branch waits for no earlier ones.
inline bool go_together(const ForwardParams& params) {
  bool together = params.branch_count == 2 && !params.merge;
  for (int i = 0; i < params.branch_count; ++i) {
    const Branch& branch = params.branches[i];
    together =
        together && reach_of(branch) == Reach::few && branch.queries.max_rows > kWarpgroupRows;
  }
  return together;
}

// From so many queries on tiles go by tickets, even if they are alike: 3 % of a launch, where
// zeroing the counter takes 1.5 us. Tuned on an H100.
constexpr int64_t kTicketQueries = 1 << 18;

// The integers that a call of an instance counts in.
inline int counters_of(const ForwardParams& params, int head_dim, int head_dim_v) {
  if (takes_two_branches(head_dim, head_dim_v) && go_together(params)) {
    return 1 + params.batch * params.head_count;
  }
  const Branch* end = params.branches + params.branch_count;
  const int64_t queries = int64_t{params.batch} * params.head_count * params.seq_q;
  return queries >= kTicketQueries || std::any_of(params.branches, end, by_tickets) ? 1 : 0;
}

}  // namespace sparse_attn::sm90::forward
