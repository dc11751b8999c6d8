// SPDX-License-Identifier: Apache-2.0
// Host entries of the portable backward kernels.
#pragma once

#include "params.h"

namespace sparse_attn::sm80::backward {

// The statistics of every query, once before the gradients.
void launch_row_stats(const BackwardParams& params);

// T is __half or __nv_bfloat16; params.head_dim <= kHeadDim, params.head_dim_v <= kHeadDimV.
// Instantiated in generated files (cmake/Instances.cmake).
template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params);

}  // namespace sparse_attn::sm80::backward
