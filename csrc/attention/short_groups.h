// SPDX-License-Identifier: Apache-2.0
// Chunks and residues of few rows, listed together so that a tile holds several.
#pragma once

#include "attention/plan.h"

namespace sparse_attn {

// The same pairs, for tiles of so many rows. Short chunks become runs in token order. Of short
// residues a power of 2 of neighbours become one group: their tokens in order, so that a copy reads
// neighbouring rows; the kernels leave out the pairs of different ones (Branch::residues).
inline Branch with_short_groups_together(Branch branch, int tile_rows) {
  const SequenceView view = branch.queries;
  bool short_groups = view.groups > 1 && 2 * view.max_rows <= tile_rows;
  for (int i = 0; i < branch.segment_count; ++i) {
    short_groups = short_groups && branch.segments[i].keys.groups == view.groups;
  }
  if (!short_groups) return branch;
  SequenceView together = view;
  if (view.run_stride.value == 1) {
    branch.run = {view.length,      1, {Divisor::of(view.max_rows)}, 1, branch.run.past,
                  branch.run.future};
    together.groups = 1;
    together.max_rows = view.length;
    together.group_step = 0;
  } else {
    int residues = kMostResidues;
    while (view.groups % residues != 0 || residues * view.max_rows > tile_rows) residues /= 2;
    const int stride = view.run_stride.value;
    together.groups = view.groups / residues;
    together.max_rows = view.length / stride * residues + least(view.length % stride, residues);
    together.group_step = residues;
    together.run = Divisor::of(residues);
    branch.residues = residues;
  }
  branch.queries = together;
  for (int i = 0; i < branch.segment_count; ++i) branch.segments[i].keys = together;
  return branch;
}

}  // namespace sparse_attn
