// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "kernel_bench/reference.h"

namespace sparse_attn::kernel_bench {
namespace {

constexpr int kThreads = 256;                     // one for each column of the longest row
constexpr int64_t kMostPairs = int64_t{1} << 30;  // to look at for all tokens
constexpr int64_t kMostRows = int64_t{1} << 16;   // to compare
constexpr int64_t kSampledTokens = 64;
// Neighbours among the compared tokens share a tolerance: they have about as many keys.
constexpr int kTokensTogether = 16;

// The branches of a plan, and where each lists a token as a query.
struct Relation {
  const Branch* branches;
  int branch_count;
  const int* groups;  // (branches, seq); -1: not listed
  int seq;

  // Whether any segment of any branch holds the pair.
  __device__ bool attends(int query, int key) const {
    for (int i = 0; i < branch_count; ++i) {
      const int group = groups[static_cast<int64_t>(i) * seq + query];
      if (group < 0) continue;
      const Branch& branch = branches[i];
      for (int j = 0; j < branch.segment_count; ++j) {
        const Segment& segment = branch.segments[j];
        const int row = segment.keys.rows_before(group, key);
        const bool inside = segment.bounds(branch.run, group, query).contains(row);
        if (inside && segment.keys.position(group, row) == key) return true;
      }
    }
    return false;
  }
};

template <class T>
struct Arguments {
  Relation relation;
  const int* tokens;  // (tokens)
  const T* q;         // the tensors of Tensors
  const T* k;
  const T* v;
  const T* dout;
  const T* out;
  const float* lse;
  int batch;
  int heads;
  int kv_heads;
  int seq;
  int head_dim;
  int head_dim_v;
  double scale;
};

// Rounded to the element type, or not at all.
template <class T, bool kRounds>
__device__ double rounded(double value) {
  if constexpr (kRounds) return static_cast<float>(static_cast<T>(static_cast<float>(value)));
  return value;
}

template <class T>
__device__ double value_of(T value) {
  return static_cast<float>(value);
}

template <class T, class U>
__device__ double product(const T* a, const U* b, int size) {
  double sum = 0;
  for (int i = 0; i < size; ++i) sum += value_of(a[i]) * value_of(b[i]);
  return sum;
}

// The same value in all threads of a block.
template <class F>
__device__ double reduce(double value, F combine) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + step]);
    }
    __syncthreads();
  }
  const double result = values[0];
  __syncthreads();
  return result;
}

// A CTA: one compared token as a query of one head. Writes out (tokens, batch, heads, head_dim_v),
// lse (tokens, batch, heads) and dq (tokens, batch, heads, head_dim).
template <class T, bool kRounds>
__global__ void __launch_bounds__(kThreads)
    query_kernel(Arguments<T> args, double* out, double* lse, double* dq) {
  __shared__ double weights[kThreads], dscores[kThreads];
  const int64_t index = blockIdx.x;
  const int query = args.tokens[index / (args.batch * args.heads)];
  const int64_t head = index % (args.batch * args.heads);  // of all batch entries
  const int64_t kv_head = head / (args.heads / args.kv_heads);
  const int64_t row = head * args.seq + query, first_key_row = kv_head * args.seq;
  const T* q = args.q + row * args.head_dim;
  const T* dout = args.dout + row * args.head_dim_v;
  const auto k = [&](int key) { return args.k + (first_key_row + key) * args.head_dim; };
  const auto v = [&](int key) { return args.v + (first_key_row + key) * args.head_dim_v; };
  const int thread = threadIdx.x;
  const auto score = [&](int key) {
    return rounded<T, kRounds>(product(q, k(key), args.head_dim) * args.scale);
  };

  double maximum = -INFINITY;
  for (int key = thread; key < args.seq; key += kThreads) {
    if (args.relation.attends(query, key)) maximum = fmax(maximum, score(key));
  }
  maximum = reduce(maximum, [](double a, double b) { return fmax(a, b); });
  double sum = 0;
  for (int key = thread; key < args.seq; key += kThreads) {
    if (args.relation.attends(query, key)) sum += exp(score(key) - maximum);
  }
  sum = reduce(sum, [](double a, double b) { return a + b; });
  const bool empty = maximum == -INFINITY;
  const double row_lse = empty ? maximum : maximum + log(sum);

  // A thread has a key for the weights, then a column for the sums.
  double out_column = 0, dq_column = 0;
  const auto for_some_keys = [&](auto find, auto add) {
    for (int first = 0; first < args.seq; first += kThreads) {
      const int key = first + thread;
      const bool seen = key < args.seq && args.relation.attends(query, key);
      weights[thread] = dscores[thread] = 0;
      if (seen) find(key);
      if (__syncthreads_or(seen)) {
        for (int i = 0; i < kThreads; ++i) {
          if (weights[i] != 0 || dscores[i] != 0) add(first + i, i);
        }
      }
      __syncthreads();
    }
  };
  const auto weight = [&](int key) { return rounded<T, kRounds>(exp(score(key) - row_lse)); };
  for_some_keys([&](int key) { weights[thread] = weight(key); },
                [&](int key, int i) {
                  if (thread < args.head_dim_v) {
                    out_column += weights[i] * value_of(v(key)[thread]);
                  }
                });
  out_column = rounded<T, kRounds>(out_column);
  if (thread < args.head_dim_v) out[index * args.head_dim_v + thread] = out_column;
  if (thread == 0) lse[index] = row_lse;
  if (dq == nullptr) return;

  const double delta = reduce(thread < args.head_dim_v ? out_column * value_of(dout[thread]) : 0,
                              [](double a, double b) { return a + b; });
  for_some_keys(
      [&](int key) {
        const double dweight = rounded<T, kRounds>(product(dout, v(key), args.head_dim_v));
        dscores[thread] = rounded<T, kRounds>(weight(key) * (dweight - delta));
      },
      [&](int key, int i) {
        if (thread < args.head_dim) dq_column += dscores[i] * value_of(k(key)[thread]);
      });
  if (thread < args.head_dim) {
    dq[index * args.head_dim + thread] = rounded<T, kRounds>(dq_column * args.scale);
  }
}

// A CTA: one compared token as a key of one kv head. Writes dk (tokens, batch, kv_heads, head_dim)
// and dv (tokens, batch, kv_heads, head_dim_v).
template <class T, bool kRounds>
__global__ void __launch_bounds__(kThreads) key_kernel(Arguments<T> args, double* dk, double* dv) {
  __shared__ double weights[kThreads], dscores[kThreads];
  const int64_t index = blockIdx.x;
  const int key = args.tokens[index / (args.batch * args.kv_heads)];
  const int64_t kv_head = index % (args.batch * args.kv_heads);  // of all batch entries
  const int group = args.heads / args.kv_heads;
  const T* k = args.k + (kv_head * args.seq + key) * args.head_dim;
  const T* v = args.v + (kv_head * args.seq + key) * args.head_dim_v;
  const int thread = threadIdx.x;

  double dk_column = 0, dv_column = 0;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t first_row = head * args.seq;
    for (int first = 0; first < args.seq; first += kThreads) {
      const int query = first + thread;
      const bool seen = query < args.seq && args.relation.attends(query, key);
      weights[thread] = dscores[thread] = 0;
      if (seen) {
        const int64_t row = first_row + query;
        const T* q = args.q + row * args.head_dim;
        const T* dout = args.dout + row * args.head_dim_v;
        const double score = rounded<T, kRounds>(product(q, k, args.head_dim) * args.scale);
        const double weight = rounded<T, kRounds>(exp(score - args.lse[row]));
        const double dweight = rounded<T, kRounds>(product(dout, v, args.head_dim_v));
        const double delta = product(dout, args.out + row * args.head_dim_v, args.head_dim_v);
        weights[thread] = weight;
        dscores[thread] = rounded<T, kRounds>(weight * (dweight - delta));
      }
      if (__syncthreads_or(seen)) {
        for (int i = 0; i < kThreads; ++i) {
          if (weights[i] == 0 && dscores[i] == 0) continue;
          const int64_t row = first_row + first + i;
          if (thread < args.head_dim) {
            dk_column += dscores[i] * value_of(args.q[row * args.head_dim + thread]);
          }
          if (thread < args.head_dim_v) {
            dv_column += weights[i] * value_of(args.dout[row * args.head_dim_v + thread]);
          }
        }
      }
      __syncthreads();
    }
  }
  if (thread < args.head_dim) {
    dk[index * args.head_dim + thread] = rounded<T, kRounds>(dk_column * args.scale);
  }
  if (thread < args.head_dim_v) {
    dv[index * args.head_dim_v + thread] = rounded<T, kRounds>(dv_column);
  }
}

// The compared tokens of a tensor: rows (tokens, heads, dim) of values (heads, seq, dim).
template <class T>
__global__ void gather_kernel(const T* values, const int* tokens, int64_t heads, int seq, int dim,
                              double* rows) {
  const int64_t token = tokens[blockIdx.x / heads], head = blockIdx.x % heads;
  for (int column = threadIdx.x; column < dim; column += kThreads) {
    rows[static_cast<int64_t>(blockIdx.x) * dim + column] =
        value_of(values[(head * seq + token) * dim + column]);
  }
}

template <class T>
float stored_as(float value) {
  return static_cast<float>(static_cast<T>(value));
}

// What adding and subtracting 0.3 in the type of the result costs a value.
template <class T>
double rounding_floor(double value) {
  const float stored = stored_as<T>(static_cast<float>(value));
  return std::abs(stored_as<T>(stored_as<T>(stored + 0.3f) - 0.3f) - stored);
}

// Error as a share of what is allowed.
double share_of(double error, double allowed) {
  if (std::isnan(error)) return std::numeric_limits<double>::infinity();
  if (error == 0) return 0;
  return allowed > 0 ? error / allowed : std::numeric_limits<double>::infinity();
}

// A tensor's results at the compared tokens: (tokens, heads, dim), heads those of all batch
// entries.
struct Rows {
  DeviceBuffer<double> exact;
  DeviceBuffer<double> low;  // the same, scores, weights and products rounded
  DeviceBuffer<double> actual;
  int64_t heads;
  int dim;

  Rows(size_t tokens, int64_t heads, int dim)
      : exact(tokens * heads * dim),
        low(tokens * heads * dim),
        actual(tokens * heads * dim),
        heads(heads),
        dim(dim) {}
};

// T: the type that the tensor is stored in.
template <class T>
Check compare(const std::string& tensor, const Rows& rows, const std::vector<int>& tokens) {
  const std::vector<double> exact = rows.exact.to_host(), low = rows.low.to_host();
  const std::vector<double> actual = rows.actual.to_host();
  Check result{tensor, static_cast<int64_t>(tokens.size()), 0, ""};
  const size_t per_token = rows.heads * rows.dim;
  for (size_t first = 0; first < exact.size(); first += kTokensTogether * per_token) {
    const size_t end = std::min(first + kTokensTogether * per_token, exact.size());
    double low_error = 0, floor = 0;
    for (size_t i = first; i < end; ++i) {
      if (!std::isfinite(exact[i])) continue;
      low_error = std::max(low_error, std::abs(low[i] - exact[i]));
      floor = std::max(floor, rounding_floor<T>(exact[i]));
    }
    for (size_t i = first; i < end; ++i) {
      const double error = actual[i] == exact[i] ? 0 : std::abs(actual[i] - exact[i]);
      const double share = share_of(error, 2 * low_error + 2 * floor);
      if (share <= result.error_share) continue;
      result.error_share = share;
      char text[160];
      std::snprintf(text, sizeof(text),
                    "token %d, head %lld of all, column %lld: %.6g, wanted %.6g",
                    tokens[i / per_token], static_cast<long long>(i / rows.dim % rows.heads),
                    static_cast<long long>(i % rows.dim), actual[i], exact[i]);
      result.worst = text;
    }
  }
  return result;
}

template <class T>
void gather(const T* values, const DeviceBuffer<int>& tokens, int seq, const Rows& rows) {
  const size_t blocks = tokens.size() * rows.heads;
  gather_kernel<<<static_cast<unsigned>(blocks), kThreads>>>(values, tokens.data(), rows.heads, seq,
                                                             rows.dim, rows.actual.data());
  CHECK_CUDA(cudaGetLastError());
}

// (branches, seq): the group in which each branch lists a token as a query, or -1.
std::vector<int> query_groups(const PlanFile& plan) {
  const size_t seq = plan.length;
  std::vector<int> groups(plan.branches.size() * seq, -1);
  for (size_t i = 0; i < plan.branches.size(); ++i) {
    const SequenceView& queries = plan.branches[i].queries;
    for (int group = 0; group < queries.groups; ++group) {
      const int rows = queries.rows(group);
      for (int row = 0; row < rows; ++row) groups[i * seq + queries.position(group, row)] = group;
    }
  }
  return groups;
}

template <class T>
std::vector<Check> check_as(const PlanFile& plan, const Tensors& tensors,
                            const std::vector<int>& host_tokens, bool backward) {
  const DeviceBuffer<Branch> branches(plan.branches);
  const DeviceBuffer<int> groups(query_groups(plan)), tokens(host_tokens);
  const auto elements = [](const DeviceBuffer<uint16_t>& buffer) {
    return reinterpret_cast<const T*>(buffer.data());
  };
  Arguments<T> args{};
  args.relation = {branches.data(), static_cast<int>(plan.branches.size()), groups.data(),
                   tensors.seq};
  args.tokens = tokens.data();
  args.q = elements(tensors.q);
  args.k = elements(tensors.k);
  args.v = elements(tensors.v);
  args.dout = elements(tensors.dout);
  args.out = elements(tensors.out);
  args.lse = tensors.lse.data();
  args.batch = tensors.batch;
  args.heads = tensors.heads;
  args.kv_heads = tensors.kv_heads;
  args.seq = tensors.seq;
  args.head_dim = tensors.head_dim;
  args.head_dim_v = tensors.head_dim_v;
  args.scale = tensors.scale();

  const size_t count = host_tokens.size();
  const int64_t heads = int64_t{tensors.batch} * tensors.heads;
  const Rows out(count, heads, tensors.head_dim_v), lse(count, heads, 1);
  const Rows dq(backward ? count : 0, heads, tensors.head_dim);
  const unsigned query_blocks = static_cast<unsigned>(count * heads);
  query_kernel<T, false>
      <<<query_blocks, kThreads>>>(args, out.exact.data(), lse.exact.data(), dq.exact.data());
  CHECK_CUDA(cudaGetLastError());
  query_kernel<T, true>
      <<<query_blocks, kThreads>>>(args, out.low.data(), lse.low.data(), dq.low.data());
  CHECK_CUDA(cudaGetLastError());
  gather(args.out, tokens, args.seq, out);
  gather(args.lse, tokens, args.seq, lse);
  std::vector<Check> checks = {compare<T>("out", out, host_tokens),
                               compare<float>("lse", lse, host_tokens)};
  if (!backward) return checks;

  const int64_t kv_heads = int64_t{tensors.batch} * tensors.kv_heads;
  const Rows dk(count, kv_heads, tensors.head_dim), dv(count, kv_heads, tensors.head_dim_v);
  const unsigned key_blocks = static_cast<unsigned>(count * kv_heads);
  key_kernel<T, false><<<key_blocks, kThreads>>>(args, dk.exact.data(), dv.exact.data());
  CHECK_CUDA(cudaGetLastError());
  key_kernel<T, true><<<key_blocks, kThreads>>>(args, dk.low.data(), dv.low.data());
  CHECK_CUDA(cudaGetLastError());
  gather(elements(tensors.dq), tokens, args.seq, dq);
  gather(elements(tensors.dk), tokens, args.seq, dk);
  gather(elements(tensors.dv), tokens, args.seq, dv);
  checks.push_back(compare<T>("dq", dq, host_tokens));
  checks.push_back(compare<T>("dk", dk, host_tokens));
  checks.push_back(compare<T>("dv", dv, host_tokens));
  return checks;
}

}  // namespace

std::vector<int> sample_tokens(const Tensors& tensors, uint64_t seed) {
  const int64_t heads = int64_t{tensors.batch} * tensors.heads, seq = tensors.seq;
  std::vector<int> tokens;
  if (heads * seq <= kMostRows && heads * seq * seq <= kMostPairs) {
    for (int token = 0; token < seq; ++token) tokens.push_back(token);
    return tokens;
  }
  std::mt19937_64 random(seed);
  const int64_t count = std::max<int64_t>(std::min(kSampledTokens, kMostRows / heads), 2);
  tokens = {0, tensors.seq - 1};
  while (static_cast<int64_t>(tokens.size()) < count) {
    tokens.push_back(static_cast<int>(random() % seq));
  }
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

std::vector<Check> check(const PlanFile& plan, const Tensors& tensors,
                         const std::vector<int>& tokens, bool backward) {
  return tensors.element == Element::float16
             ? check_as<__half>(plan, tensors, tokens, backward)
             : check_as<__nv_bfloat16>(plan, tensors, tokens, backward);
}

}  // namespace sparse_attn::kernel_bench
