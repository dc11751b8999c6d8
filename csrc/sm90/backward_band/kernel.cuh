// SPDX-License-Identifier: Apache-2.0
// The Hopper backward kernel of bands: one branch whose queries attend keys of their own tile of
// 128 rows and of the one before, at most. All gradients at once, every tensor read once.
//
// A CTA takes tiles one after another: those of groups that fit one, or a run of neighbours. Two
// warps load, two find delta; two warpgroups own 64 keys of a tile each, whose dk and dv they sum
// in registers, and sum dq of 64 queries each. README.md in this folder has the schedule and the
// counts.
#pragma once

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/registers.cuh"
#include "sm90/backward_band/config.h"
#include "sm90/backward_band/earlier.cuh"
#include "sm90/load_rows.cuh"
#include "sm90/multiply.cuh"
#include "sm90/query_tiles.h"
#include "sm90/store_sum.cuh"

namespace sparse_attn::sm90::backward_band {

struct Maps {
  ViewMap q, k, v, dout, out;
  ViewMap dq, dk, dv;  // of 16 rows
};

__device__ __forceinline__ QueryTile tile_before(const QueryTile& tile) {
  return {tile.batch, tile.head, tile.group, tile.first_row - kTileRows, kTileRows};
}

// Of at most 64 rows.
__device__ __forceinline__ int parts_of(const QueryTile& tile) {
  return tile.rows > kWarpgroupRows ? 2 : 1;
}

// The sum of the products of eight elements.
template <class T>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = ptx::unpack<T>(xs[i]), b = ptx::unpack<T>(ys[i]);
    sum += a.x * b.x + a.y * b.y;
  }
  return sum;
}

// The steps of a CTA: every so-many-th tile, or neighbours where queries attend the tile before.
struct Steps {
  const QueryTiles& tiles;
  const bool walks;
  int index, end;
  bool keeps_own = false;  // of the step before
  bool first = true;

  __device__ __forceinline__ explicit Steps(const QueryTiles& tiles)
      : tiles(tiles), walks(tiles.tiles.value > 1) {
    const auto cut = [&](int cta) {
      return static_cast<int>(static_cast<int64_t>(tiles.count) * cta / gridDim.x);
    };
    index = walks ? cut(blockIdx.x) : blockIdx.x;
    end = walks ? cut(blockIdx.x + 1) : tiles.count;
  }

  // No row in the tile: there is no other.
  __device__ __forceinline__ Step next(const SequenceView& view) {
    const bool own = index < end;  // else queries of the next CTA, which attend keys of this one
#pragma unroll 1
    while (index < end || keeps_own) {
      const QueryTile tile = tiles.at(index, view);
      index += walks ? 1 : gridDim.x;
      if (tile.rows == 0) continue;
      const bool back = tile.first_row > 0, begins = first;
      first = false;
      keeps_own = own && walks && tile.first_row + kTileRows < view.max_rows;
      const uint32_t parts = parts_of(tile);
      return {tile, {parts, back, back && begins, own, keeps_own}};
    }
    return {};
  }
};

// All copies of this warp so far have landed, for wgmma too, or count on the barrier.
__device__ __forceinline__ void arrive_loaded(uint64_t& full) {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_async_proxy();
  ptx::mbarrier_arrive(full);
}

// Starts copying 64 rows of a head.
template <class T, class Tile>
__device__ __forceinline__ void load_part(Tile& part_smem, uint64_t& full, const ViewMap& map,
                                          const SequenceView& view, const TensorView& tensor,
                                          int head_dim, int head, const QueryTile& part) {
  Rows<T>(map, view, tensor, head_dim, part.batch, head)
      .template load<32>(part_smem, full, part.group, part.first_row, part.first_row + part.rows);
}

// The warp that loads queries, and finds the steps.
template <class Config, bool kAdds, class SharedMemory>
__device__ __forceinline__ void load_queries(SharedMemory& smem, const BackwardParams& params,
                                             const QueryTiles& tiles, const Maps& maps) {
  using T = typename Config::Element;
  const SequenceView& view = params.branch.queries;
  Place<Config::kQueryStages> place;
  Place<Config::kOutStages> out_place;
  Place<Config::kStepStages> step_place;
  Steps steps(tiles);
  while (true) {
    step_place.wait_empty(smem.step_ring);
    const Step& step = smem.step[step_place.stage];  // read when needed: registers are scarce
    const Step next = steps.next(view);
    if (threadIdx.x == 0) smem.step[step_place.stage] = next;
    step_place.arrive_full(smem.step_ring);
    __syncwarp();
    if (step.tile.rows == 0) break;
#pragma unroll 1
    for (int number = 0; number < step.kind.parts; ++number) {
      const QueryTile part = part_of(step.tile, number);
      uint64_t& full = smem.query_ring.full[place.stage];
      place.wait_empty(smem.query_ring);
      load_part<T>(smem.q[place.stage], full, maps.q, view, params.q, params.head_dim, part.head,
                   part);
      load_part<T>(smem.dout[place.stage], full, maps.dout, view, params.dout, params.head_dim_v,
                   part.head, part);
      arrive_loaded(full);
      place.advance();
      if (!kAdds && params.finds_stats) {
        uint64_t& out_full = smem.out_ring.full[out_place.stage];
        out_place.wait_empty(smem.out_ring);
        load_part<T>(smem.out[out_place.stage], out_full, maps.out, view, params.out,
                     params.head_dim_v, part.head, part);
        arrive_loaded(out_full);
        out_place.advance();
      }
    }
    step_place.advance();
  }
}

// Band::seen, by a warp.
__device__ __forceinline__ uint32_t seen_parts(const Band& band, int rows) {
  const int lane = threadIdx.x % 8;
  const int first_key = lane / 4 * kWarpgroupRows, first = lane % 4 * kWarpgroupRows;
  const int keys = least(rows - first_key, kWarpgroupRows), last_key = first_key + keys - 1;
  const int last = first + kWarpgroupRows;
  const bool exists = keys > 0;
  const auto bits = [](bool bit) { return __ballot_sync(0xffffffff, bit) & 0xff; };
  return bits(exists && band.first[first_key] < last && band.end[last_key] > first) |
         bits(exists && (first < band.first[last_key] || keys < kWarpgroupRows)) << 8 |
         bits(exists && last > band.end[first_key]) << 16;
}

// The warp that loads keys and values, and finds which queries attend them.
template <class Config, class SharedMemory>
__device__ __forceinline__ void load_keys(SharedMemory& smem, const BackwardParams& params,
                                          const Maps& maps) {
  using T = typename Config::Element;
  const Branch& branch = params.branch;
  const SequenceView& view = branch.queries;
  const int lane = threadIdx.x % 32;
  Place<Config::kKeyStages> place;
  Place<Config::kValueStages> value_place;
  Place<Config::kStepStages> step_place;
  while (true) {
    step_place.wait_full(smem.step_ring);
    const Step& step = smem.step[step_place.stage];
    if (step.tile.rows == 0) break;
#pragma unroll 1
    for (int before = step.kind.loads_back; before >= 0 && step.kind.own; --before) {
      const QueryTile tile = before ? tile_before(step.tile) : step.tile;
      const int kv_head = kv_head_of(params, tile.head);
      const auto load_values = [&](int number) {
        uint64_t& full = smem.v_ring.full[value_place.stage];
        value_place.wait_empty(smem.v_ring);
        if (number < parts_of(tile)) {
          load_part<T>(smem.v[value_place.stage], full, maps.v, view, params.v, params.head_dim_v,
                       kv_head, part_of(tile, number));
        }
        arrive_loaded(full);
        value_place.advance();
      };
      int values = 0;
#pragma unroll 1
      for (; values < Config::kValuesFirst; ++values) load_values(values);
      uint64_t& k_full = smem.k_ring.full[place.stage];
      Band& band = smem.band[place.stage];
      const int query_rows = view.rows(tile.group);
      place.wait_empty(smem.k_ring);
#pragma unroll 1
      for (int number = 0; number < parts_of(tile); ++number) {
        load_part<T>(smem.k[place.stage][number], k_full, maps.k, view, params.k, params.head_dim,
                     kv_head, part_of(tile, number));
      }
#pragma unroll 1
      for (int row = lane; row < kTileRows; row += 32) {
        const int token = view.position(tile.group, tile.first_row + row);
        Interval queries = {tile.first_row + kFar, tile.first_row + kFar};
        if (row < tile.rows) queries = branch.segments[0].bounds(branch.run, tile.group, token);
        if (queries.end == query_rows) queries.end = tile.first_row + kFar;
        band.first[row] = static_cast<int16_t>(queries.first - tile.first_row);
        band.end[row] = static_cast<int16_t>(queries.end - tile.first_row);
      }
      __syncwarp();
      band.seen = seen_parts(band, tile.rows);
      arrive_loaded(k_full);
#pragma unroll 1
      for (; values < kParts; ++values) load_values(values);
      place.advance();
    }
    step_place.arrive_empty(smem.step_ring);
    step_place.advance();
  }
}

// The warps that find delta = rowsum(dout * out) - dlse and the lse in units of log 2, a query a
// lane, or copy what was found before.
template <class Config, bool kAdds, class SharedMemory>
__device__ __forceinline__ void find_stats(SharedMemory& smem, const BackwardParams& params,
                                           int warp) {
  using T = typename Config::Element;
  static_assert(kStatsWarps * 32 == kWarpgroupRows);
  const SequenceView& view = params.branch.queries;
  const int row = warp * 32 + threadIdx.x % 32;
  const bool finds = !kAdds && params.finds_stats;
  Place<Config::kQueryStages> place;
  Place<Config::kOutStages> out_place;
  Place<Config::kStepStages> step_place;
  while (true) {
    step_place.wait_full(smem.step_ring);
    const Step& step = smem.step[step_place.stage];
    if (step.tile.rows == 0) break;
#pragma unroll 1
    for (int number = 0; number < step.kind.parts; ++number) {
      const QueryTile part = part_of(step.tile, number);
      const bool exists = row < part.rows;
      const int64_t head = static_cast<int64_t>(part.batch) * params.heads + part.head;
      const int64_t index = head * params.seq_q + view.position(part.group, part.first_row + row);
      RowStats found = {-minus_infinity(), 0.f};  // where there is no query, no weight
      if (exists && finds) {
        found.lse_log2 = params.lse[index] * kLog2E;
        if (params.dlse != nullptr) found.delta = -params.dlse[index];
      } else if (exists) {
        found = params.stats[index];
      }
      place.wait_full(smem.query_ring);
      if (finds) {
        out_place.wait_full(smem.out_ring);
#pragma unroll 2
        for (int vector = 0; vector < Config::kHeadDimV / 8; ++vector) {
          const auto read = [&](auto& tile_smem) {
            return *reinterpret_cast<const uint4*>(tile_smem.at(row, vector));
          };
          found.delta += dot<T>(read(smem.out[out_place.stage]), read(smem.dout[place.stage]));
        }
        out_place.arrive_empty(smem.out_ring);
        out_place.advance();
        // A query with no key, whose dlse may be anything.
        if (found.lse_log2 == minus_infinity()) found = {-minus_infinity(), 0.f};
        if (exists && params.stats != nullptr) params.stats[index] = found;
      }
      smem.stats[place.stage].lse_log2[row] = found.lse_log2;
      smem.stats[place.stage].delta[row] = found.delta;
      place.arrive_full(smem.stats_ring);
      place.arrive_empty(smem.query_ring);
      place.advance();
    }
    step_place.arrive_empty(smem.step_ring);
    step_place.advance();
  }
}

// Where dS of a part of queries and a part of keys is: keys of the tile before are 0 and 1, its own
// 2 and 3. With keys of the tile before, the first queries do not attend 3, the others not 0: no
// two pairs of a step meet in a slot before its first dq. A slot has one writer.
__device__ __forceinline__ int slot_of(int part, int keys) {
  return part == 0 ? keys : (keys + 2) % 4;
}

// A warpgroup that computes the `number`-th 64 keys of every tile.
template <class Config, bool kAdds, class SharedMemory>
__device__ __forceinline__ void compute(SharedMemory& smem, const BackwardParams& params,
                                        const Maps& maps, int number) {
  using T = typename Config::Element;
  using Scores = typename Config::Scores;
  constexpr int kLaneRows = Scores::kLaneRows;
  const Branch& branch = params.branch;
  const float scale_log2 = params.scale * kLog2E;
  const int warp_row = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4 * 16, 0);  // of a part
  const auto sync = [&] { ptx::named_barrier(1 + number, 128); };
  Place<Config::kQueryStages> query_place;
  Place<Config::kKeyStages> own_key_place;
  Place<Config::kValueStages> own_value_place = {number, 0};
  Place<Config::kStepStages> step_place;
  Place<1> dscores_place;  // filled for every part of queries
  // Of keys of the tile, or of the tile before.
  const auto key_place_of = [&](bool own) { return own ? own_key_place : own_key_place.before(1); };
  const auto value_place_of = [&](bool own) {
    return own ? own_value_place : own_value_place.before(kParts);
  };
  const auto advance_keys = [&] {
    own_key_place.advance();
    own_value_place.advance_by(kParts);
  };
  uint32_t back_seen = 0, own_seen = 0;   // Band::seen of these keys
  bool values_loaded;                     // who has waited for them need not again
  typename Config::GradientK gradient_k;  // over scale
  typename Config::GradientV gradient_v;

  // The barrier of the shared memory through which a sum leaves: free when the copy has read it,
  // for which nobody waits at once where there is more.
  uint64_t* leaving = nullptr;
  const auto let_go = [&] {
    if (leaving == nullptr) return;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ptx::tma_wait_read();
      ptx::mbarrier_arrive(*leaving);
    }
    leaving = nullptr;
  };
  const auto leave_through = [&](uint64_t& empty) {
    leaving = &empty;
    if (Config::kScarce) let_go();
  };

  // What is there of a sum comes to the shared memory through which the sum leaves. Or it comes
  // sooner: for dk likewise, for dq and then dv to that of out, which a launch that adds does not
  // read.
  constexpr bool kFetches = kAdds && Config::kFetches;
  constexpr bool kSooner = kFetches && Config::kDkBesideDv;
  const int warp = 4 * number + warp_row / 16;
  Earlier earlier = {smem.earlier_full[0][warp]}, earlier_k = {smem.earlier_full[1][warp]};
  bool keys_fetched = false;
  const auto target_of = [&](const TensorView& tensor, const ViewMap& map, int head_dim,
                             const QueryTile& tile) -> Target {
    const int row = number * kWarpgroupRows + warp_row;
    return {tensor, map, branch.queries, tile, row, head_dim, kAdds};
  };
  // Stores factor * sum, added to what is there.
  const auto leave = [&](auto& sum, float factor, auto& tile_smem, Target target, Earlier& earlier,
                         auto& there_smem, bool fetched = true) {
    if constexpr (kFetches) {
      target.adds = !(fetched && earlier.take());
      store_sum<T, true>(sum, factor, tile_smem, warp_row, target, &there_smem);
    } else {
      store_sum<T>(sum, factor, tile_smem, warp_row, target);
    }
  };

  const auto fetch_queries_sooner = [&](const QueryTile& tile) {
    if constexpr (kSooner) {
      const Target target = target_of(params.dq, maps.dq, params.head_dim, tile);
      earlier.template fetch<T>(smem.out[number], warp_row, target);
    }
  };
  // For dk and dv that leave in the next step.
  const auto fetch_keys_sooner = [&](const QueryTile& tile) {
    if constexpr (kSooner) {
      const Target target_k = target_of(params.dk, maps.dk, params.head_dim, tile);
      const Target target_v = target_of(params.dv, maps.dv, params.head_dim_v, tile);
      earlier_k.template fetch<T>(smem.dk[number], warp_row, target_k);
      earlier.template fetch<T>(smem.out[number], warp_row, target_v);
      keys_fetched = true;
    }
  };
  const auto fetch = [&](auto& tile_smem, const Target& target) {
    if constexpr (kFetches && !kSooner) earlier.template fetch<T>(tile_smem, warp_row, target);
  };

  // Sums this warpgroup's keys over one part of queries.
  const auto sum_part = [&](int key_stage, const Place<Config::kValueStages>& value_place,
                            uint32_t seen, int first, int slot) {
    const auto& k_smem = smem.k[key_stage][number];
    const auto& v_smem = smem.v[value_place.stage];
    const auto& q_smem = smem.q[query_place.stage];
    const auto& dout_smem = smem.dout[query_place.stage];
    const Stats& stats = smem.stats[query_place.stage];
    const Band& band = smem.band[key_stage];
    const int first_key = number * kWarpgroupRows + warp_row;
#pragma unroll
    for (int query = 0; query < kWarpgroupRows; query += Scores::kColumns) {
      const bool begins = query == 0, ends = query + Scores::kColumns == kWarpgroupRows;
      const int first_query = first + query;
      Scores weights, dscores;
      ptx::wgmma_fence();
      start_multiply_transposed<T>(weights, k_smem, q_smem, query);
      if (begins && !values_loaded) value_place.wait_full(smem.v_ring), values_loaded = true;
      ptx::wgmma_fence();
      start_multiply_transposed<T>(dscores, v_smem, dout_smem, query);
      if (begins) query_place.wait_full(smem.stats_ring);
      ptx::wgmma_wait<1>();
      ptx::pin(weights);
      weights.for_each([&](float& weight, int, int column) {
        weight = ptx::exp2(weight * scale_log2 - stats.lse_log2[query + column]);
      });
      // Most are cut at one end only. Columns count from this lane's first: they are constants.
      const int lane_column = threadIdx.x % 4 * 2;
      int bound[kLaneRows];
      if (seen >> 8 & 1) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          bound[i] = band.first[first_key + Scores::row(i)] - first_query - lane_column;
        }
        weights.for_each([&](float& weight, int row, int column) {
          if (column - lane_column < bound[row]) weight = 0.f;
        });
      }
      if (seen >> 16 & 1) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          bound[i] = band.end[first_key + Scores::row(i)] - first_query - lane_column;
        }
        weights.for_each([&](float& weight, int row, int column) {
          if (column - lane_column >= bound[row]) weight = 0.f;
        });
      }
      if (begins) let_go();
      if (branch.residues > 1) fill_other_residues(weights, branch.residues, first_query, 0.f);
      Rounded<T, Scores> rounded_weights(weights);
      ptx::wgmma_fence();
      start_multiply_add<T>(gradient_v, rounded_weights, dout_smem, query);
      ptx::wgmma_wait<1>();
      ptx::pin(dscores);
      dscores.for_each(weights, [&](float& dscore, float weight, int, int column) {
        dscore = weight * (dscore - stats.delta[query + column]);
      });
      Rounded<T, Scores> rounded_dscores(dscores);
      if (begins) dscores_place.wait_empty(smem.dscores_ring);
      auto& dscores_smem = smem.dscores[slot];
      const int lane = ptx::lane();
#pragma unroll
      for (int i = 0; i < Scores::kColumns / 16; ++i) {
        const int vector = query / 8 + 2 * i + lane / 16;
        ptx::stmatrix_x4(dscores_smem.at(warp_row + lane % 16, vector), rounded_dscores.at[i]);
      }
      if (ends) ptx::fence_async_proxy();  // between these stores and wgmma
      ptx::wgmma_fence();
      start_multiply_add<T>(gradient_k, rounded_dscores, q_smem, query);
      ptx::wgmma_wait<0>();
      ptx::pin(gradient_v);
      ptx::pin(gradient_k);
      keep(rounded_weights);
      keep(rounded_dscores);
    }
  };

  // dq of a part of queries, over all keys.
  const auto sum_queries = [&](const QueryTile& tile, int part) {
    typename Config::GradientQ gradient_q;
    gradient_q.clear();
    const int back_stage = key_place_of(false).stage, own_stage = own_key_place.stage;
    auto& dout_smem = smem.dout[query_place.stage];
    const Target target = target_of(params.dq, maps.dq, params.head_dim, tile);
    dscores_place.wait_full(smem.dscores_ring);
    fetch(dout_smem, target);  // no product reads dout any more
    // Elsewhere code, or registers, are scarce.
    constexpr int kUnrolled = Config::kColumns == 128 && !kAdds ? 4 : 1;
#pragma unroll(kUnrolled)
    for (int keys = 0; keys < 4; ++keys) {
      const bool own = keys >= 2;
      const uint32_t seen = own ? own_seen : back_seen;
      if (seen >> (4 * (keys % 2) + (own ? 0 : kParts) + part) & 1) {
        ptx::wgmma_fence();
        start_multiply_add_across<T>(gradient_q, smem.dscores[slot_of(part, keys)],
                                     smem.k[own ? own_stage : back_stage][keys % 2]);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::pin(gradient_q);
    dscores_place.arrive_empty(smem.dscores_ring);
    // Where no pair has waited: dout is read no more.
    if (!(own_seen >> (4 * number + part) & 1)) query_place.wait_full(smem.stats_ring);
    let_go();
    if constexpr (kSooner) {
      leave(gradient_q, params.scale, dout_smem, target, earlier, smem.out[number]);
    } else {
      leave(gradient_q, params.scale, dout_smem, target, earlier, dout_smem);
    }
    leave_through(smem.query_ring.empty[query_place.stage]);
  };

  while (true) {
    step_place.wait_full(smem.step_ring);
    const Step& step = smem.step[step_place.stage];  // read when needed: registers are scarce
    if (step.tile.rows == 0) break;
    const Step::Kind kind = step.kind;
    if (kind.loads_back) advance_keys();
    const auto first_query_place = query_place;
    back_seen = kind.back ? own_seen : 0;
#pragma unroll 1
    for (int own = kind.back ? 0 : 1; own < (kind.own ? 2 : 1); ++own) {
      const bool last = own == (kind.own ? 1 : 0);
      const auto key_place = key_place_of(own);
      const auto value_place = value_place_of(own);
      if (own || kind.loads_back) {
        key_place.wait_full(smem.k_ring);
        (own ? own_seen : back_seen) = smem.band[key_place.stage].seen;
        gradient_k.clear();
        gradient_v.clear();
      }
      if (own && number < kind.parts) fetch_queries_sooner(step.tile);
      const uint32_t keys_seen = own ? own_seen : back_seen;
      values_loaded = false;
      query_place = first_query_place;
#pragma unroll 1
      for (int part = 0; part < kind.parts; ++part) {
        if (!own || !kind.back) query_place.wait_full(smem.query_ring);
        const int queries = (own ? 0 : kParts) + part;  // from the keys' tile on
        const uint32_t seen = keys_seen >> (4 * number + queries);
        if (seen & 1) {
          sum_part(key_place.stage, value_place, seen, queries * kWarpgroupRows,
                   slot_of(part, 2 * own + number));
        } else {
          let_go();
          // After the dq before, lest the arrival count for that part.
          if (own) dscores_place.wait_empty(smem.dscores_ring);
        }
        if (own) dscores_place.arrive_full(smem.dscores_ring);
        if (own && part == number) {
          sum_queries(step.tile, part);
          if (kind.keeps_own) fetch_keys_sooner(step.tile);
        } else if (last) {
          query_place.arrive_empty(smem.query_ring);
        }
        if (own) dscores_place.advance();
        query_place.advance();
      }
      if (last && kind.back) key_place_of(false).arrive_empty(smem.k_ring);
      if (own && !kind.keeps_own) own_key_place.arrive_empty(smem.k_ring);
      if (own && kind.keeps_own) continue;
      if (!values_loaded) value_place.wait_full(smem.v_ring);
      if (own || !kind.loads_back) {
        const QueryTile tile = own ? step.tile : tile_before(step.tile);
        const Target target_k = target_of(params.dk, maps.dk, params.head_dim, tile);
        const Target target_v = target_of(params.dv, maps.dv, params.head_dim_v, tile);
        auto& v_smem = smem.v[value_place.stage];
        let_go();
        sync();  // no warp's wgmma reads these values any more
        if constexpr (Config::kDkBesideDv) {
          auto& dk_smem = smem.dk[number];
          leave(gradient_k, params.scale, dk_smem, target_k, earlier_k, dk_smem, keys_fetched);
          leave(gradient_v, 1.f, v_smem, target_v, earlier, smem.out[number], keys_fetched);
          keys_fetched = false;
        } else {
          fetch(v_smem, target_k);
          leave(gradient_k, params.scale, v_smem, target_k, earlier, v_smem);
          __syncwarp();
          if (threadIdx.x % 32 == 0) ptx::tma_wait_read();
          __syncwarp();
          fetch(v_smem, target_v);
          leave(gradient_v, 1.f, v_smem, target_v, earlier, v_smem);
        }
        leave_through(smem.v_ring.empty[value_place.stage]);
      } else {
        value_place.arrive_empty(smem.v_ring);
      }
    }
    if (kind.own) advance_keys();
    step_place.arrive_empty(smem.step_ring);
    step_place.advance();
  }
  let_go();
}

// kAdds: to what earlier branches left; then the statistics are there. Two kernels, because the
// instruction cache holds neither with what only the other one does.
template <class Config, bool kAdds>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    backward_band_kernel(const __grid_constant__ BackwardParams params,
                         const __grid_constant__ QueryTiles tiles,
                         const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedMemory*>(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * kConsumers;
    smem.k_ring.init(32, kWarps);
    smem.v_ring.init(32, 4);  // one warpgroup reads them
    smem.query_ring.init(32, kWarps + kStatsWarps);
    smem.stats_ring.init(kStatsWarps, 1);  // emptied with the queries
    smem.out_ring.init(32, kStatsWarps);
    smem.step_ring.init(1, kWarps + kStatsWarps + 1);
    smem.dscores_ring.init(kWarps, 4);  // one warpgroup sums dq
    for (int i = 0; i < 2 * kWarps; ++i) {
      ptx::mbarrier_init(smem.earlier_full[i / kWarps][i % kWarps], 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kLoadRegisters>();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    if (warp == 0) {
      load_queries<Config, kAdds>(smem, params, tiles, maps);
    } else if (warp == 1) {
      load_keys<Config>(smem, params, maps);
    } else {
      find_stats<Config, kAdds>(smem, params, warp - 2);
    }
  } else {
    ptx::take_registers<Config::kComputeRegisters>();
    compute<Config, kAdds>(smem, params, maps, warpgroup - 1);
  }
}

}  // namespace sparse_attn::sm90::backward_band
