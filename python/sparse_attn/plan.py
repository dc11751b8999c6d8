# SPDX-License-Identifier: Apache-2.0
"""The plan: attention over intervals, read through strided views of the sequence.

A pattern looks irregular in token order and dense in another order. ``plan(pattern, n)`` lists, for
a sequence of ``n`` tokens, the *branches* that compute it. A branch walks the queries in the order
of one `SequenceView`; each of its *segments* is a key view and the rows of it that a query attends,
always one interval, monotone in the query. The branches of a plan partition the keys of every
query, so their outputs merge by log-sum-exp.

Nothing here, and nothing below, knows a pattern's name. The same arithmetic stands in
``csrc/attention/plan.h`` for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from .patterns import Pattern

# An integer, or an int64 array of them: the arithmetic below serves both.
Index = Any
Part = Literal["before", "inside", "after"]


@dataclass(frozen=True)
class SequenceView:
    """Tokens of a sequence listed as (group, row).

    ``position(group, row) = offset + group * group_step + row // run * run_stride + row % run``:
    runs of ``run`` neighbouring tokens, ``run_stride`` apart. Token order is one group with run and
    stride 1; a chunk or a residue modulo the stride is a group; summary columns are runs of
    ``columns``.
    """

    length: int  # tokens in the sequence
    groups: int
    max_rows: int  # rows of the longest group
    offset: int = 0
    group_step: int = 0
    run: int = 1
    run_stride: int = 1

    @property
    def lists_every_token(self) -> bool:
        return self.groups * self.max_rows >= self.length

    def position(self, group: Index, row: Index) -> Index:
        """Token at ``row`` of ``group``."""
        return (
            self.offset
            + group * self.group_step
            + row // self.run * self.run_stride
            + row % self.run
        )

    def rows_before(self, group: Index, token: Index) -> Index:
        """Number of rows of ``group`` whose token is less than ``token``."""
        distance = np.maximum(token - self.offset - group * self.group_step, 0)
        rows = distance // self.run_stride * self.run
        rows = rows + np.minimum(distance % self.run_stride, self.run)
        return np.minimum(rows, self.max_rows)

    def rows(self, group: Index) -> Index:
        """Number of rows of ``group``."""
        return self.rows_before(group, self.length)


@dataclass(frozen=True)
class Run:
    """The tokens ``[start(i), end(i))`` around token ``i``, always with ``i`` itself.

    The union of a window of ``window`` tokens to each side and of the chunks of each length in
    ``chunks``; only up to ``i`` without ``future``, only from ``i`` without ``past``.
    """

    length: int
    window: int
    chunks: tuple[int, ...]
    past: bool
    future: bool

    def start(self, token: Index) -> Index:
        if not self.past:
            return token
        start = np.maximum(token - self.window + 1, 0)
        for length in self.chunks:
            start = np.minimum(start, token - token % length)
        return start

    def end(self, token: Index) -> Index:
        if not self.future:
            return token + 1
        end = token + self.window
        for length in self.chunks:
            end = np.maximum(end, token - token % length + length)
        return np.minimum(end, self.length)


@dataclass(frozen=True)
class Segment:
    """The rows of a key view that lie before, inside or after the run of a query."""

    keys: SequenceView
    part: Part

    def bounds(self, run: Run, group: Index, token: Index) -> tuple[Index, Index]:
        """Key rows ``[first, last)`` that the query at ``token`` attends in its ``group``."""
        zero = np.zeros_like(token)
        start = zero if self.part == "before" else run.start(token)
        end = zero + run.length
        if self.part == "before":
            end = run.start(token)
        elif self.part == "inside":
            end = run.end(token)
        else:
            start = run.end(token)
        return self.keys.rows_before(group, start), self.keys.rows_before(group, end)


@dataclass(frozen=True)
class Branch:
    """Queries in the order of one view and the segments they attend.

    A key view has the groups of the query view, or a single group that all queries share.
    """

    queries: SequenceView
    run: Run
    segments: tuple[Segment, ...]
    # Tokens in a block, where a layout says which key blocks each query block attends: queries and
    # keys are in token order then. 0 without a layout.
    block: int = 0


def token_order(length: int) -> SequenceView:
    """All tokens, in their own order."""
    return SequenceView(length, groups=1, max_rows=length)


def plan(pattern: Pattern, length: int) -> tuple[Branch, ...]:
    """Branches of a pattern at ``length`` >= 1 tokens; a key of a query is in one segment."""
    return _plan(pattern.rule, length)


@lru_cache(maxsize=1024)
def _plan(rule: Pattern, length: int) -> tuple[Branch, ...]:
    return rule.branches(length)


def keys_per_query(pattern: Pattern, length: int) -> np.ndarray:
    """Number of keys that each token attends, int64 ``(length,)``, in O(length)."""
    counts = np.zeros(length, dtype=np.int64)
    for branch in plan(pattern, length) if length else ():
        view = branch.queries
        group, row = np.divmod(np.arange(view.groups * view.max_rows), view.max_rows)
        exists = row < view.rows(group)
        group, token = group[exists], view.position(group, row)[exists]
        for segment in branch.segments:
            first, last = segment.bounds(branch.run, group, token)
            counts[token] += np.maximum(last - first, 0)
    return counts
