// SPDX-License-Identifier: Apache-2.0
// Host checks. They throw, never exit.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define SPARSE_ATTN_LOCATION (std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": ")

#define CHECK_CUDA(expression)                                             \
  do {                                                                     \
    const cudaError_t error_ = (expression);                               \
    if (error_ != cudaSuccess) {                                           \
      throw std::runtime_error(SPARSE_ATTN_LOCATION + #expression + ": " + \
                               cudaGetErrorString(error_));                \
    }                                                                      \
  } while (0)

#define REQUIRE(condition, message)                                               \
  do {                                                                            \
    if (!(condition)) throw std::runtime_error(SPARSE_ATTN_LOCATION + (message)); \
  } while (0)
