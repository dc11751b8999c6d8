// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/plan.h"

namespace sparse_attn {

// How many keys most queries attend: the few that fit a tile or two, or many. Few are bound by
// latency and bytes and want small CTAs; many by shared memory and arithmetic, and want each
// fragment of a streamed tile, once loaded, used by 32 own rows instead of 16. Scattered are many
// in blocks of 64: neighbouring queries share some of them.
enum class Reach { few, many, scattered };

// The keys that the middle query attends.
inline int64_t keys_of_middle(const Branch& branch) {
  const int token = branch.queries.position(0, branch.queries.max_rows / 2);
  int64_t keys = 0;
  for (int segment = 0; segment < branch.segment_count; ++segment) {
    const Interval attended = branch.segments[segment].bounds(branch.run, 0, token);
    keys += attended.end - attended.first;
  }
  return keys;
}

// Queries in different blocks of less than 64 would share few keys.
inline Reach reach_of(const Branch& branch) {
  const int64_t keys = keys_of_middle(branch);
  // Tuned on an H100: many pays from 512 keys on.
  if (keys < 512) return Reach::few;
  if (branch.blocks.size == 0 || branch.blocks.size >= 128) return Reach::many;
  return branch.blocks.size == 64 ? Reach::scattered : Reach::few;
}

// Whether tiles differ in length: keys are many, or in blocks. Then the longest go first, and CTAs
// that stay take one by ticket when they are done with another.
inline bool by_tickets(const Branch& branch) {
  return reach_of(branch) != Reach::few || branch.blocks.size != 0;
}

}  // namespace sparse_attn
