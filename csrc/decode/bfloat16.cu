// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>

#include "decode/launch.cuh"

namespace sparse_attn::decode {
template void launch_parts<__nv_bfloat16>(const DecodeParams&);
template void launch_finish<__nv_bfloat16>(const DecodeParams&);
}  // namespace sparse_attn::decode
