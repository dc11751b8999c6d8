// SPDX-License-Identifier: Apache-2.0
// One new query against a part of its keys: a CTA for each part, kv head and new token.
//
// Bound by bytes: a few neighbouring lanes hold a row of keys and of values, 16 bytes each, many
// rows in flight, no shared memory until the end. README.md in this folder has the schedule.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tile_copy.cuh"
#include "decode/config.h"

namespace sparse_attn::decode {

// Which queries and which share of their keys are mine. A part is fastest, then heads of a group.
struct Coords {
  int part;
  int first_head;  // of the queries, neighbours that share a kv head
  int head_count;
  int kv_head;
  int new_token;
  int batch;

  static HOST_DEVICE int blocks(const DecodeParams& params, int queries) {
    return (least(params.group(), params.head_count) + queries - 1) / queries;
  }

  static HOST_DEVICE int64_t count(const DecodeParams& params, int queries) {
    return static_cast<int64_t>(params.batch) * params.kv_head_count() * params.new_tokens *
           blocks(params, queries) * params.part_count;
  }

  static __device__ __forceinline__ Coords of(unsigned index, const DecodeParams& params,
                                              int queries) {
    Coords coords;
    const auto take = [&](int size) {
      const unsigned rest = index % size;
      index /= size;
      return static_cast<int>(rest);
    };
    coords.part = take(params.part_count);
    const int block = take(blocks(params, queries));
    coords.new_token = take(params.new_tokens);
    coords.kv_head = params.first_kv_head() + take(params.kv_head_count());
    coords.batch = static_cast<int>(index);
    // The launch may begin and end within a group.
    const int group_first = coords.kv_head * params.group();
    const int first = greatest(params.first_head, group_first);
    const int end = least(params.first_head + params.head_count, group_first + params.group());
    coords.first_head = first + block * queries;
    coords.head_count = least(end - coords.first_head, queries);
    return coords;
  }

  // Of a head of this launch, in params.parts.
  __device__ __forceinline__ int64_t part_index(const DecodeParams& params, int head) const {
    const int64_t query =
        (static_cast<int64_t>(batch) * params.head_count + head - params.first_head) *
            params.new_tokens +
        new_token;
    return query * params.part_count + part;
  }
};

// First elements of the rows of one head.
template <class T>
struct Rows {
  const T* k;
  const T* v;
  int k_stride;
  int v_stride;

  static __device__ __forceinline__ Rows of(const TensorView& k, const TensorView& v, int batch,
                                            int head) {
    return {head_gmem<const T>(k, batch, head), head_gmem<const T>(v, batch, head), k.row_stride,
            v.row_stride};
  }

  __device__ __forceinline__ const T* key(int row) const {
    return k + static_cast<int64_t>(row) * k_stride;
  }
  __device__ __forceinline__ const T* value(int row) const {
    return v + static_cast<int64_t>(row) * v_stride;
  }
};

// The keys of the query in one read: neighbours in a view, so `row_step` apart in the store.
template <class T>
struct Keys {
  int count;
  int first_row;  // of the store
  int row_step;
  int old_rows;  // rows of the store before the new tokens
  Divisor slots;
  Rows<T> kept;

  static __device__ __forceinline__ Keys of(const DecodeParams& params, const Coords& coords,
                                            const DecodeRead& read, int position) {
    const int token = position + coords.new_token;
    const int group = read.groups.of_token(token);
    const Interval rows = read.segment.bounds(read.run, group, token);
    const SequenceView& view = read.segment.keys;
    const DecodeStore& store = params.stores[read.store];
    return {greatest(rows.end - rows.first, 0),
            read.store_row(group, rows.first),
            view.groups == 1 ? 1 : view.run_stride.value,
            store.tokens.rows_before(0, position),
            store.slots,
            Rows<T>::of(store.k, store.v, coords.batch, coords.kv_head - params.first_kv_head())};
  }
};

// All keys of the query, those of the first read before those of the second; in shared memory, out
// of the way of the registers.
template <class T>
struct KeyList {
  Keys<T> reads[kMaxReads];
  Rows<T> fresh;  // of the new tokens
  int position;   // of the first of them

  // A thread for each read.
  __device__ __forceinline__ void find(const DecodeParams& params, const Coords& coords) {
    const int first_new = static_cast<int>(*params.position);
    if (threadIdx.x == 0) {
      position = first_new;
      fresh = Rows<T>::of(params.k_new, params.v_new, coords.batch, coords.kv_head);
    }
    const int read = threadIdx.x;
    if (read < kMaxReads) {
      reads[read].count = 0;
      if (read < params.read_count) {
        reads[read] = Keys<T>::of(params, coords, params.reads[read], first_new);
      }
    }
  }

  __device__ __forceinline__ int count() const { return reads[0].count + reads[1].count; }

  // The addresses of key number `index` and of its value: in a store, or among the new ones.
  __device__ __forceinline__ void at(const DecodeParams& params, int index, const T*& k,
                                     const T*& v) const {
    const int read = index < reads[0].count ? 0 : 1;
    const Keys<T>& from = reads[read];
    const int key = read == 0 ? index : index - reads[0].count;
    const int row = from.first_row + key * from.row_step;
    if (row < from.old_rows) {
      const int slot = row % from.slots;
      k = from.kept.key(slot);
      v = from.kept.value(slot);
    } else {
      const SequenceView& tokens = params.stores[params.reads[read].store].tokens;
      const int new_token = tokens.position(0, row) - position;
      k = fresh.key(new_token);
      v = fresh.value(new_token);
    }
  }
};

// 16 bytes that nothing writes while the kernel runs.
template <class T>
__device__ __forceinline__ uint4 load(const T* gmem) {
  return __ldg(reinterpret_cast<const uint4*>(gmem));
}

template <class T>
__device__ __forceinline__ void unpack_vector(float (&elements)[8], const uint4& vector) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::unpack<T>(pairs[i]);
    elements[2 * i] = pair.x;
    elements[2 * i + 1] = pair.y;
  }
}

// Some keys of one query: the running softmax, and this lane's 8 columns of the output.
struct Partial {
  float max_log2 = minus_infinity();
  float sum = 0.f;
  float out[8] = {};

  // Makes `new_max` the maximum; what is added next counts from the offset that comes back.
  __device__ __forceinline__ float raise(float new_max) {
    const float offset = finite(new_max);
    const float shrink = ptx::exp2(max_log2 - offset);
    max_log2 = new_max;
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] *= shrink;
    return offset;
  }

  // Adds the partial of the lane whose number differs in one bit.
  __device__ __forceinline__ void add_lane(int bit) {
    const float other_max = __shfl_xor_sync(0xffffffff, max_log2, bit);
    raise(fmaxf(max_log2, other_max));
    // Both lanes have shrunk to the same maximum.
    sum += __shfl_xor_sync(0xffffffff, sum, bit);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] += __shfl_xor_sync(0xffffffff, out[i], bit);
  }
};

// Adds kUnroll keys, `stride` apart, to the partials of the queries.
template <class Config>
__device__ __forceinline__ void add_keys(Partial (&partials)[Config::kQueries],
                                         const float (&q)[Config::kQueries][8],
                                         const uint4 (&k)[Config::kUnroll],
                                         const uint4 (&v)[Config::kUnroll], int first, int end) {
  constexpr int kQueries = Config::kQueries, kUnroll = Config::kUnroll;
  float scores[kQueries][kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    float elements[8];
    unpack_vector<typename Config::Element>(elements, k[i]);
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
      float score = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) score = fmaf(q[query][j], elements[j], score);
#pragma unroll
      for (int bit = 1; bit < Config::kLanes; bit *= 2) {
        score += __shfl_xor_sync(0xffffffff, score, bit);
      }
      scores[query][i] = first + i * Config::kRowsAtOnce < end ? score : minus_infinity();
    }
  }
#pragma unroll
  for (int query = 0; query < kQueries; ++query) {
    float new_max = partials[query].max_log2;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) new_max = fmaxf(new_max, scores[query][i]);
    const float offset = partials[query].raise(new_max);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      scores[query][i] = ptx::exp2(scores[query][i] - offset);
      partials[query].sum += scores[query][i];
    }
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    float elements[8];
    unpack_vector<typename Config::Element>(elements, v[i]);
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        partials[query].out[j] = fmaf(scores[query][i], elements[j], partials[query].out[j]);
      }
    }
  }
}

// Adds up the lanes of a warp, then the warps, and writes the part of each query.
template <class Config>
__device__ __forceinline__ void store_parts(typename Config::SharedMemory& smem,
                                            Partial (&partials)[Config::kQueries],
                                            const DecodeParams& params, const Coords& coords) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int query = 0; query < Config::kQueries; ++query) {
#pragma unroll
    for (int bit = Config::kLanes; bit < 32; bit *= 2) partials[query].add_lane(bit);
    if (lane < Config::kLanes) {
#pragma unroll
      for (int i = 0; i < 8; ++i) smem.out[warp][query][8 * lane + i] = partials[query].out[i];
    }
    if (lane == 0) {
      smem.max_log2[warp][query] = partials[query].max_log2;
      smem.sum[warp][query] = partials[query].sum;
    }
  }
  __syncthreads();
  for (int query = 0; query < coords.head_count; ++query) {
    float max_log2 = minus_infinity();
#pragma unroll
    for (int i = 0; i < Config::kWarps; ++i) max_log2 = fmaxf(max_log2, smem.max_log2[i][query]);
    float shrink[Config::kWarps], sum = 0.f;
#pragma unroll
    for (int i = 0; i < Config::kWarps; ++i) {
      shrink[i] = ptx::exp2(smem.max_log2[i][query] - finite(max_log2));
      sum += smem.sum[i][query] * shrink[i];
    }
    const int64_t index = coords.part_index(params, coords.first_head + query);
    if (threadIdx.x == 0) params.parts[index] = {max_log2, sum};
    for (int column = threadIdx.x; column < params.head_dim_v; column += Config::kThreads) {
      float out = 0.f;
#pragma unroll
      for (int i = 0; i < Config::kWarps; ++i) out += smem.out[i][query][column] * shrink[i];
      params.part_out[index * params.head_dim_v + column] = out;
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    parts_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Config::Element;
  constexpr int kUnroll = Config::kUnroll;
  __shared__ typename Config::SharedMemory smem;
  __shared__ KeyList<T> keys;
  const Coords coords = Coords::of(blockIdx.x, params, Config::kQueries);
  const int column = threadIdx.x % Config::kLanes * 8;
  keys.find(params, coords);
  float q[Config::kQueries][8];
#pragma unroll
  for (int query = 0; query < Config::kQueries; ++query) {
    uint4 vector = {};
    if (query < coords.head_count && column < params.head_dim) {
      const T* q_gmem = head_gmem<const T>(params.q, coords.batch, coords.first_head + query) +
                        static_cast<int64_t>(coords.new_token) * params.q.row_stride;
      vector = load(q_gmem + column);
    }
    unpack_vector<T>(q[query], vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[query][i] *= params.scale * kLog2E;
  }

  __syncthreads();
  // An equal share of the keys of all reads.
  const int count = keys.count();
  const int share = (count + params.part_count - 1) / params.part_count;
  const int begin = coords.part * share;
  const int end = least(begin + share, count);

  Partial partials[Config::kQueries];
  // The warp stays together for its shuffles, past the last key too.
  for (int base = begin; base < end; base += kUnroll * Config::kRowsAtOnce) {
    const int first = base + static_cast<int>(threadIdx.x) / Config::kLanes;
    uint4 k[kUnroll], v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = first + i * Config::kRowsAtOnce;
      k[i] = v[i] = uint4{};
      if (index < end) {
        const T *k_gmem, *v_gmem;
        keys.at(params, index, k_gmem, v_gmem);
        if (column < params.head_dim) k[i] = load(k_gmem + column);
        if (column < params.head_dim_v) v[i] = load(v_gmem + column);
      }
    }
    add_keys<Config>(partials, q, k, v, first, end);
  }
  store_parts<Config>(smem, partials, params, coords);
}

}  // namespace sparse_attn::decode
