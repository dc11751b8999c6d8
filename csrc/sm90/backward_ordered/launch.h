// SPDX-License-Identifier: Apache-2.0
// Host entry of the ordered backward kernel; instantiated in generated files
// (cmake/Instances.cmake).
#pragma once

#include "params.h"

namespace sparse_attn::sm90::backward_ordered {

// T is __half or __nv_bfloat16; params.head_dim <= kHeadDim, params.head_dim_v <= kHeadDimV; for
// what `Plan::of` has a plan.
template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params);

}  // namespace sparse_attn::sm90::backward_ordered
