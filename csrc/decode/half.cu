// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp16.h>

#include "decode/launch.cuh"

namespace sparse_attn::decode {
template void launch_parts<__half>(const DecodeParams&);
template void launch_finish<__half>(const DecodeParams&);
}  // namespace sparse_attn::decode
