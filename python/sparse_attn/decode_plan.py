# SPDX-License-Identifier: Apache-2.0
"""What a cache keeps and what a new query reads of it, from the branches of a pattern's plan.

A *store* keeps the newest keys of a list of tokens, a ring: all that a later query may attend. A
*read* is a segment of the plan whose keys lie in a store: again one interval for each query.

| pattern               | stores at a length of n tokens      |
|-----------------------|-------------------------------------|
| near run (a window or chunk of l) | a ring of l keys        |
| summary panel         | its keys, c * (n / l)               |
| every l-th key, dense | all keys, which the near run shares |

Nothing here, and nothing below, knows a pattern's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .patterns import Pattern
from .plan import Branch, Index, Run, Segment, SequenceView, plan, token_order


@dataclass(frozen=True)
class Store:
    """The newest ``slots`` tokens of a list; row r of the list is in slot r % slots."""

    tokens: SequenceView  # one group: every token, or a panel
    slots: int


@dataclass(frozen=True)
class Read:
    """The keys of one segment, out of a store."""

    queries: SequenceView
    run: Run
    segment: Segment
    store: int  # its number
    most_keys: int  # of any query

    def store_row(self, group: Index, row: Index) -> Index:
        """Row in the store of key ``row`` of ``group``. With groups, the store has every token."""
        keys = self.segment.keys
        return row if keys.groups == 1 else keys.position(group, row)


@dataclass(frozen=True)
class DecodePlan:
    """The reads of a query partition its keys, so one softmax runs over them all."""

    stores: tuple[Store, ...]
    reads: tuple[Read, ...]

    @property
    def most_keys(self) -> int:
        """A bound on the keys of any query."""
        return sum(read.most_keys for read in self.reads)


def group_of(view: SequenceView, token: Index) -> Index:
    """The group that lists a token, for a view whose groups list every token."""
    if view.groups == 1:
        return token * 0
    distance = token - view.offset
    if view.group_step < view.run_stride:  # groups take turns
        return distance % view.run_stride // view.group_step
    return distance // view.group_step


def decode_plan(pattern: Pattern, length: int) -> DecodePlan:
    """The plan of a pattern of one head, for queries at positions below ``length``.

    Raises:
        ValueError: the pattern is not causal.
        NotImplementedError: it is a layout of blocks.
    """
    return _decode_plan(pattern.rule, length)


def attended_keys(pattern: Pattern, query: int) -> np.ndarray:
    """The keys of one query of a causal pattern of one head, in no order: O(their number)."""
    keys = []
    for read in decode_plan(pattern, query + 1).reads:
        group = group_of(read.queries, query)
        first, end = read.segment.bounds(read.run, group, query)
        keys.append(read.segment.keys.position(group, np.arange(first, end)))
    return np.concatenate([*keys, np.empty(0, np.int64)])


@lru_cache(maxsize=256)
def _decode_plan(rule: Pattern, length: int) -> DecodePlan:
    branches = plan(rule, length)
    if any(branch.run.future for branch in branches):
        raise ValueError(f"only a causal pattern can decode, got {rule}")
    if any(branch.block for branch in branches):
        raise NotImplementedError(f"a layout of blocks has no decoding cache, got {rule}")
    slots: dict[SequenceView, int] = {}  # of each list of tokens that is kept
    found: list[tuple[Branch, Segment, SequenceView, int]] = []
    for branch in branches:
        for segment in branch.segments:
            tokens, reach, most_keys = _needs(branch, segment)
            if most_keys:
                slots[tokens] = max(slots.get(tokens, 0), reach)
                found.append((branch, segment, tokens, most_keys))
    numbers = {tokens: number for number, tokens in enumerate(slots)}
    return DecodePlan(
        tuple(Store(tokens, count) for tokens, count in slots.items()),
        tuple(
            Read(branch.queries, branch.run, segment, numbers[tokens], most_keys)
            for branch, segment, tokens, most_keys in found
        ),
    )


def _needs(branch: Branch, segment: Segment) -> tuple[SequenceView, int, int]:
    """For one segment: the tokens to keep, how many of the newest, and the most keys of a query."""
    keys, length = segment.keys, branch.run.length
    tokens = token_order(length) if keys.lists_every_token else keys
    assert keys.groups == 1 or keys.lists_every_token
    query = np.arange(length)
    group = group_of(branch.queries, query)
    first, end = segment.bounds(branch.run, group, query)
    counts = end - first
    read = Read(branch.queries, branch.run, segment, 0, 0)
    reach = tokens.rows_before(0, query + 1) - read.store_row(group, first)
    return tokens, int(reach.max(where=counts > 0, initial=0)), int(counts.max(initial=0))
