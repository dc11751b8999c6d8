// SPDX-License-Identifier: Apache-2.0
// Host entry of the Hopper backward kernel of bands; instantiated in generated files
// (cmake/Instances.cmake).
#pragma once

#include "params.h"

namespace sparse_attn::sm90::backward_band {

// T is __half or __nv_bfloat16; params.head_dim <= kHeadDim, params.head_dim_v <= kHeadDimV.
// Writes dq, dk and dv; the branch is transposed and fits, dk and dv have a head for each query
// head.
template <class T, int kHeadDim, int kHeadDimV>
void launch(const BackwardParams& params);

}  // namespace sparse_attn::sm90::backward_band
