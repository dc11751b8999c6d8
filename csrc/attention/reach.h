// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/plan.h"

namespace sparse_attn {

// How many keys most queries attend: the few that fit a tile or two, or many. Few are bound by
// latency and bytes and want small CTAs; many by shared memory and arithmetic, and want each
// fragment of a streamed tile, once loaded, used by 32 own rows instead of 16.
enum class Reach { few, many };

// By the middle query. Queries in different blocks would share few keys.
inline Reach reach_of(const Branch& branch) {
  const int token = branch.queries.position(0, branch.queries.max_rows / 2);
  int64_t keys = 0;
  for (int segment = 0; segment < branch.segment_count; ++segment) {
    const Interval attended = branch.segments[segment].bounds(branch.run, 0, token);
    keys += attended.end - attended.first;
  }
  const bool together = branch.blocks.rows == nullptr || branch.blocks.size >= 128;
  // Tuned on an H100: many pays from 512 keys on.
  return together && keys >= 512 ? Reach::many : Reach::few;
}

}  // namespace sparse_attn
