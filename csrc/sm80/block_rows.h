// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "params.h"

namespace sparse_attn::sm80 {

void launch_block_rows(const BlockRowsParams& params);

}  // namespace sparse_attn::sm80
