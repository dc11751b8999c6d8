// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention/plan.h"

namespace sparse_attn::sm90::backward_band {

constexpr int kTileRows = 128;     // of queries, and of keys
constexpr int kMostHeadDim = 128;  // of either; wider sums fit no registers

inline bool same(const SequenceView& a, const SequenceView& b) {
  return a.length == b.length && a.groups == b.groups && a.max_rows == b.max_rows &&
         a.offset == b.offset && a.group_step == b.group_step && a.run.value == b.run.value &&
         a.run_stride.value == b.run_stride.value;
}

// Whether every key of a transposed branch is attended by queries of its own tile, or by those of
// the tile after it in a sequence in token order, at most.
inline bool fits(const Branch& branch) {
  const SequenceView& view = branch.queries;
  if (branch.segment_count != 1 || branch.blocks.size != 0) return false;
  if (!same(view, branch.segments[0].keys)) return false;
  if (view.max_rows <= kTileRows) return true;
  const Run& run = branch.run;
  int reach = run.window;
  for (int i = 0; i < run.chunk_count; ++i) reach = greatest(reach, run.chunks[i].value);
  return view.groups == 1 && view.run.value == 1 && view.run_stride.value == 1 &&
         branch.segments[0].part == Part::inside && !run.past && reach <= kTileRows + 1;
}

}  // namespace sparse_attn::sm90::backward_band
