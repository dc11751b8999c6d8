# SPDX-License-Identifier: Apache-2.0
"""The least that a pass must move and compute, and the time that takes at measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .cases import Case

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, measured in the same run."""

    copy_bytes_per_s: float  # device copy, bytes read + written
    matmul_flops_per_s: float  # 8192^3 product


@dataclass(frozen=True)
class Work:
    """Over the whole batch and all heads."""

    pairs: int  # attended (query, key) pairs
    bytes: int  # every tensor once
    flops: int  # over attended pairs alone

    def floor_ms(self, rates: Rates) -> float:
        """The longer of moving the bytes and computing the products."""
        seconds = max(self.bytes / rates.copy_bytes_per_s, self.flops / rates.matmul_flops_per_s)
        return 1e3 * seconds


def work(case: Case, direction: Direction) -> Work:
    """Pairs, bytes and flops of a pass.

    Forward reads q, k, v and writes out: two products. Backward reads q, k, v, out, dout and writes
    dq, dk, dv: five products, of which scores, dq and dk span head_dim, dv and the weights'
    gradient head_dim_v.
    """
    counts = case.pattern.keys_per_query(case.seq)
    heads = case.heads if counts.dim() == 1 else 1
    pairs = case.batch * heads * int(counts.sum())
    rows = case.batch * case.heads * case.seq
    forward_bytes = 2 * rows * (case.head_dim + case.head_dim_v) * case.dtype.itemsize
    if direction == "forward":
        return Work(pairs, forward_bytes, 2 * pairs * (case.head_dim + case.head_dim_v))
    return Work(pairs, 2 * forward_bytes, 2 * pairs * (3 * case.head_dim + 2 * case.head_dim_v))
