// SPDX-License-Identifier: Apache-2.0
// The tensors of one call, contiguous on the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernel_bench/device_buffer.h"
#include "kernel_bench/options.h"
#include "params.h"

namespace sparse_attn::kernel_bench {

// Standard normal values, the same for the same seed on every device.
void fill_normal(const DeviceBuffer<uint16_t>& values, Element element, uint64_t seed);

struct Tensors {
  Tensors(const Options& options, int seq)
      : batch(options.batch),
        heads(options.heads),
        kv_heads(options.kv_heads),
        seq(seq),
        head_dim(options.head_dim),
        head_dim_v(options.head_dim_v),
        element(options.element),
        q(elements(heads, head_dim)),
        k(elements(kv_heads, head_dim)),
        v(elements(kv_heads, head_dim_v)),
        dout(elements(heads, head_dim_v)),
        out(elements(heads, head_dim_v)),
        lse(elements(heads, 1)),
        counters(1 + static_cast<size_t>(batch) * heads),
        stats(elements(heads, 1)),
        dq(elements(heads, head_dim)),
        dk(elements(kv_heads, head_dim)),
        dv(elements(kv_heads, head_dim_v)) {
    const DeviceBuffer<uint16_t>* inputs[] = {&q, &k, &v, &dout};
    for (uint64_t i = 0; i < 4; ++i) fill_normal(*inputs[i], element, 4 * options.seed + i);
    // What the kernels leave unwritten shows.
    for (const auto* results : {&out, &dq, &dk, &dv}) results->poison();
    lse.poison();
    counters.poison();
    stats.poison();
  }

  size_t elements(int head_count, int dim) const {
    return static_cast<size_t>(batch) * head_count * seq * dim;
  }

  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }

  // (batch, head_count, seq, dim)
  TensorView view(const DeviceBuffer<uint16_t>& buffer, int head_count, int dim) const {
    const int64_t head_stride = static_cast<int64_t>(seq) * dim;
    return {buffer.data(), head_count * head_stride, head_stride, dim};
  }

  int batch;
  int heads;
  int kv_heads;
  int seq;
  int head_dim;
  int head_dim_v;
  Element element;

  // 16-bit elements of either type.
  DeviceBuffer<uint16_t> q;      // (batch, heads, seq, head_dim)
  DeviceBuffer<uint16_t> k;      // (batch, kv_heads, seq, head_dim)
  DeviceBuffer<uint16_t> v;      // (batch, kv_heads, seq, head_dim_v)
  DeviceBuffer<uint16_t> dout;   // (batch, heads, seq, head_dim_v)
  DeviceBuffer<uint16_t> out;    // likewise
  DeviceBuffer<float> lse;       // (batch, heads, seq)
  DeviceBuffer<int> counters;    // (1 + batch * heads)
  DeviceBuffer<RowStats> stats;  // (batch, heads, seq)
  DeviceBuffer<uint16_t> dq;     // as q, k and v
  DeviceBuffer<uint16_t> dk;
  DeviceBuffer<uint16_t> dv;
};

}  // namespace sparse_attn::kernel_bench
