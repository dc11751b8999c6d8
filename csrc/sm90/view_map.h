// SPDX-License-Identifier: Apache-2.0
// A view of a tensor as the tensor memory accelerator reads it.
#pragma once

#include <cuda.h>

#include "params.h"

namespace sparse_attn::sm90 {

// Tiles of some rows and the columns of a panel, as SharedTile has them. The map has the dimensions
// (column, place in a run, run, head, batch); runs are those of the view, or the whole sequence
// where rows are neighbours.
struct ViewMap {
  CUtensorMap map;
  Divisor run;
  Divisor first;   // tiles start on a multiple of it
  int group_step;  // places between groups
  int rows;        // of every group that whole tiles may hold; -1: there is no map

  HOST_DEVICE bool holds(int first_row, int end_row) const {
    return end_row <= rows && first_row % first == 0;
  }

  // Every tile of a view; `from_first`: these start with the view's first row.
  bool holds_all(const SequenceView& view, bool from_first) const {
    return rows >= view.max_rows && (from_first || first.value == 1);
  }

  // For tiles of some type. No rows where a view is none of the kinds above, or `usable` is false.
  template <class Tile>
  static ViewMap of(const TensorView& tensor, const SequenceView& view, int head_dim, int heads,
                    int batch, Element element, bool usable) {
    return of(tensor, view, head_dim, heads, batch, Tile::kRows, Tile::kPanelColumns, element,
              usable);
  }

 private:
  static ViewMap of(const TensorView& tensor, const SequenceView& view, int head_dim, int heads,
                    int batch, int tile_rows, int panel_columns, Element element, bool usable);
};

}  // namespace sparse_attn::sm90
