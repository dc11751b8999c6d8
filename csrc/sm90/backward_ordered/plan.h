// SPDX-License-Identifier: Apache-2.0
// The order of the items of a launch, and the slots that dq is summed in.
#pragma once

#include <algorithm>
#include <optional>

#include "attention/reach.h"
#include "attention/tiles.h"
#include "params.h"

namespace sparse_attn::sm90::backward_ordered {

constexpr int kTileKeys = 128;
constexpr int kLeastBlock = 64;     // keys of a warpgroup, queries of a tile
constexpr int kLeastQueries = 448;  // that attend the middle key
constexpr int kInFlight = 2 * 132;  // items: each multiprocessor of an H100 computes one, loads one

// The head dim of the kernel that holds both; 0: none, since wider sums fit no registers, and the
// narrower kernel of two owners is faster than a wide one here.
constexpr int kernel_head_dim(int head_dim, int head_dim_v) {
  const int wider = head_dim < head_dim_v ? head_dim_v : head_dim;
  return wider <= 32 || wider > 128 ? 0 : head_dim <= 64 ? 64 : 128;
}

// The queries of a tile: as many as registers hold the scores of, and no more than a block.
constexpr int queries_of_tile(int head_dim, int head_dim_v, int block) {
  return head_dim > 64 || head_dim_v > 64 || block == 64 ? 64 : 128;
}

// A tile of keys. No row if the group is short, or there is no such unit.
struct Item {
  QueryTile keys;
  int unit;
};

// The keys of a unit, a (batch, head, group), add to the dq of its queries. Items are handed out in
// order, some units together, and of each unit the first keys first: so each item comes after those
// that add to a dq before it.
struct Plan {
  int count;  // items
  int units;
  int first_head;
  int tile_queries;
  Divisor together;   // units
  Divisor key_tiles;  // of a unit
  Divisor groups;
  Divisor heads;
  Divisor query_tiles;  // of a unit
  Divisor slots;
  // Slots pass from all query tiles of a unit to those of a later one, when all its items are done.
  // Else from a query tile to a later one of the same unit, or another, of which every item comes
  // after all of its own.
  bool by_unit;

  HOST_DEVICE Item at(int ticket, const SequenceView& keys) const {
    const int rest = ticket / together;
    const int unit = rest / key_tiles * together.value + ticket % together;
    const int pair = unit / groups;
    QueryTile tile;
    tile.batch = pair / heads;
    tile.head = first_head + pair % heads;
    tile.group = unit % groups;
    tile.first_row = rest % key_tiles * kTileKeys;
    const int rows = least(keys.rows(tile.group) - tile.first_row, kTileKeys);
    tile.rows = unit < units ? greatest(rows, 0) : 0;
    return {tile, unit};
  }

  // Where dq of a query tile is summed. By unit; or in the order of the items.
  HOST_DEVICE int slot_of(int unit, int query_tile) const {
    return (by_unit ? unit * query_tiles.value + query_tile : place_of(unit, query_tile)) % slots;
  }

  // The query tile that had the slot before, of all of the launch; negative: none. Of a later unit
  // that is the same one of an earlier unit.
  HOST_DEVICE int earlier(int unit, int query_tile) const {
    if (by_unit) return unit * query_tiles.value + query_tile - slots.value;
    const int place = place_of(unit, query_tile) - slots.value;
    if (place < 0) return -1;
    const int row = place / together;
    return (row / query_tiles * together.value + place % together) * query_tiles.value +
           row % query_tiles;
  }

  // Counters, zero before the launch: the ticket, items done by unit, turns by query tile.
  int64_t counters() const { return 1 + units + int64_t{units} * query_tiles.value; }
  // The slots follow them.
  int64_t slots_at() const { return (4 * counters() + 127) / 128 * 128; }
  int64_t bytes(int head_dim) const {
    return slots_at() + int64_t{slots.value} * tile_queries * head_dim * 4;
  }

  // For a transposed branch and a kernel of some head dim. None if the kernel is not made for it,
  // or 64 MB of slots are too few.
  static std::optional<Plan> of(const BackwardParams& params, int head_dim) {
    const Branch& branch = params.branch;
    const SequenceView& keys = branch.queries;
    const SequenceView& queries = branch.segments[0].keys;
    if (!fits(branch)) return std::nullopt;
    const int tile_queries =
        queries_of_tile(params.head_dim, params.head_dim_v, branch.blocks.size);
    const int key_tiles = tiles(keys.max_rows, kTileKeys);
    const int query_tiles = tiles(queries.max_rows, tile_queries);
    const int64_t units = int64_t{params.batch} * params.head_count * keys.groups;
    if (units == 0 || (units + 16) * greatest(key_tiles, query_tiles) > 1 << 30)
      return std::nullopt;

    Plan plan{};
    plan.units = static_cast<int>(units);
    plan.first_head = params.first_head;
    plan.tile_queries = tile_queries;
    plan.key_tiles = Divisor::of(key_tiles);
    plan.groups = Divisor::of(keys.groups);
    plan.heads = Divisor::of(params.head_count);
    plan.query_tiles = Divisor::of(query_tiles);

    const int64_t most_slots = (int64_t{64} << 20) / (tile_queries * head_dim * 4);
    const int reach = most_reached(branch, key_tiles, tile_queries);
    // In a window every query tile has keys, and these follow each other.
    plan.by_unit = branch.blocks.size != 0 || branch.segments[0].part != Part::inside ||
                   keys.groups > 1 || 4 * reach > query_tiles;
    const int64_t most_units = std::min(units, most_slots / query_tiles);
    // Waits for turns are short if items of the same unit do not begin one right after the other.
    // But of wide heads few stay in L2, and their windows have long steps, and so short waits; and
    // where units are soon done, the next ones wait for their slots.
    int most_together = 16;
    if (branch.blocks.size == 0) {
      const bool waits = most_units < units && most_together * key_tiles < 4 * kInFlight;
      if (plan.by_unit && (head_dim > 64 || waits)) most_together = 8;
      if (!plan.by_unit && head_dim > 64) most_together = 1;
      // A CTA takes a ticket some steps before it begins the item: many of a short unit's.
      if (plan.by_unit && key_tiles < 16) most_together = 3 * kInFlight / 2 / key_tiles;
    }
    int64_t together = std::min<int64_t>(units, most_together);
    int64_t slots;
    if (plan.by_unit) {
      // Too few items would be in flight: the first keys of a unit may wait for its last.
      if (most_units < units && most_units * key_tiles < kInFlight / 2) return std::nullopt;
      together = std::min(together, most_units);
      const int64_t sections = kInFlight / (together * key_tiles) + 2;
      slots = std::min(most_units, sections * together) * query_tiles;
    } else {
      const auto slots_of = [&](int64_t together) {
        return (kInFlight / together + 1 + 2 * reach) * query_tiles / key_tiles * together;
      };
      while (together > 1 && slots_of(together) > most_slots) together /= 2;
      slots = slots_of(together);
      if (slots > most_slots) return std::nullopt;
    }
    const int64_t padded = (units + together - 1) / together * together;
    plan.slots = Divisor::of(static_cast<int>(std::min(slots, padded * query_tiles)));
    plan.together = Divisor::of(static_cast<int>(together));
    plan.count = static_cast<int>(padded * key_tiles);
    return plan;
  }

 private:
  HOST_DEVICE int place_of(int unit, int query_tile) const {
    return (unit / together * query_tiles.value + query_tile) * together.value + unit % together;
  }

  static int tiles(int rows, int tile_rows) { return (rows + tile_rows - 1) / tile_rows; }

  // Many keys, of each head in one walk over queries of one view.
  static bool fits(const Branch& branch) {
    const SequenceView& keys = branch.queries;
    const SequenceView& queries = branch.segments[0].keys;
    if (branch.segment_count != 1 || queries.groups != keys.groups) return false;
    if (keys.max_rows == 0 || queries.max_rows == 0) return false;
    return branch.blocks.size != 0 ? branch.blocks.size >= kLeastBlock
                                   : keys_of_middle(branch) >= kLeastQueries;
  }

  // The most query tiles that a key tile reaches, but for a tile or two.
  static int most_reached(const Branch& branch, int key_tiles, int tile_queries) {
    const SequenceView& keys = branch.queries;
    const auto bounds = [&](int row) {
      return branch.segments[0].bounds(branch.run, 0, keys.position(0, row));
    };
    int most = 1;
    for (int key_tile = 0; key_tile < key_tiles; key_tile += key_tiles / 64 + 1) {
      const int first_row = key_tile * kTileKeys;
      const int last_row = least(first_row + kTileKeys, keys.max_rows) - 1;
      most = greatest(
          most, tiles(bounds(last_row).end, tile_queries) - bounds(first_row).first / tile_queries);
    }
    return most;
  }
};

}  // namespace sparse_attn::sm90::backward_ordered
