// SPDX-License-Identifier: Apache-2.0
// Host entries of the decoding kernels; instantiated in half.cu and bfloat16.cu.
#pragma once

#include "decode/decode_params.h"

namespace sparse_attn::decode {

// T is __half or __nv_bfloat16.
template <class T>
void launch_parts(const DecodeParams& params);

// Only after the parts of all launches that read the same stores.
template <class T>
void launch_finish(const DecodeParams& params);

}  // namespace sparse_attn::decode
