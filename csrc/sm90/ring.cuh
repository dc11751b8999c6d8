// SPDX-License-Identifier: Apache-2.0
// A ring of buffers in shared memory, which one side fills and the other empties.
#pragma once

#include "ptx/mbarrier.cuh"

namespace sparse_attn::sm90 {

template <int kStages>
struct RingBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // By one thread, before the barriers are used. Arrivals that fill and that empty a stage.
  __device__ __forceinline__ void init(int filling, int emptying) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full[stage], filling);
      ptx::mbarrier_init(empty[stage], emptying);
    }
  }
};

// Where one side is in a ring; both sides start at stage 0.
template <int kStages>
struct Place {
  int stage = 0;
  int round = 0;  // parity of the times around

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, round ^= 1;
  }
  // The stage in a ring of twice as many.
  __device__ __forceinline__ int twice() const { return round * kStages + stage; }
  // So many stages on, not more than there are; and so many before.
  __device__ __forceinline__ void advance_by(int stages) {
    stage += stages;
    if (stage >= kStages) stage -= kStages, round ^= 1;
  }
  __device__ __forceinline__ Place before(int stages) const {
    return stage < stages ? Place{stage - stages + kStages, round ^ 1}
                          : Place{stage - stages, round};
  }
  __device__ __forceinline__ void wait_full(RingBarriers<kStages>& ring) const {
    ptx::mbarrier_wait(ring.full[stage], round);
  }
  __device__ __forceinline__ void wait_empty(RingBarriers<kStages>& ring) const {
    ptx::mbarrier_wait(ring.empty[stage], round ^ 1);
  }
  // One arrival of a warp.
  __device__ __forceinline__ void arrive_full(RingBarriers<kStages>& ring) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.full[stage]);
  }
  __device__ __forceinline__ void arrive_empty(RingBarriers<kStages>& ring) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty[stage]);
  }
};

}  // namespace sparse_attn::sm90
