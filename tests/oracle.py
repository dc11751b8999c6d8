# SPDX-License-Identifier: Apache-2.0
"""Brute force: masks from the set definitions over (i, j), attention from the masks.

Nothing here uses sparse_attn. A pattern is a list of members such as ("local", 16) or
("summary", 64, 8, 56); a union of members is the union of their key sets. A layout of blocks is
("blocks", 16, ((True, False), (True, True))): tokens in a block, then the key blocks of each query
block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any

import numpy as np
import torch

Member = tuple[Any, ...]
Members = tuple[Member, ...]

ROWS_AT_ONCE = 512
# Sums in fp32 are taken term by term in this many orders, up to these sizes.
ORDERS = 8
MOST_TERMS = 512
MOST_PRODUCTS = 1 << 24


def attends(member: Member, causal: bool, i: Any, j: Any) -> Any:
    """Whether query i sees key j; i and j are integers, or integer arrays that broadcast."""
    kind, sizes = member[0], member[1:]
    if kind == "dense":
        seen = (i >= 0) & (j >= 0)
    elif kind == "local":
        (window,) = sizes
        seen = (i - window < j) & (j < i + window)
    elif kind == "chunk":
        (length,) = sizes
        seen = i // length == j // length
    elif kind == "dilated":
        (stride,) = sizes
        seen = (i - j) % stride == 0
    elif kind == "summary":
        length, columns, offset = sizes
        seen = (offset <= j % length) & (j % length < offset + columns) & (i >= 0)
    elif kind == "blocks":
        block, kept = sizes
        on_device = isinstance(i, torch.Tensor)
        table: Any = torch.tensor(kept, device=i.device) if on_device else np.array(kept)
        seen = table[i // block, j // block]
    else:
        raise AssertionError(f"no member kind {kind!r}")
    return seen & (j <= i) if causal else seen


def keys(members: Members, causal: bool, n: int, i: int) -> set[int]:
    """The keys of query i, one pair at a time."""
    return {j for j in range(n) if any(attends(member, causal, i, j) for member in members)}


@lru_cache(maxsize=8)
def mask(members: Members, causal: bool, n: int) -> torch.Tensor:
    """Bool (n, n): the union over the members."""
    i = np.arange(n, dtype=np.int32)[:, None]
    j = np.arange(n, dtype=np.int32)[None, :]
    seen = np.zeros((n, n), dtype=bool)
    for member in members:
        seen |= attends(member, causal, i, j)
    return torch.from_numpy(seen)


def masks(heads: Sequence[Members], causal: bool, n: int) -> list[torch.Tensor]:
    """One mask per query head; equal heads share a tensor."""
    return [mask(members, causal, n) for members in heads]


@dataclass(frozen=True)
class Result:
    """Outputs and, where dout was given, gradients."""

    out: torch.Tensor  # (batch, heads, seq, head_dim_v)
    lse: torch.Tensor  # (batch, heads, seq)
    dq: torch.Tensor | None = None  # like q
    dk: torch.Tensor | None = None  # like k
    dv: torch.Tensor | None = None  # like v


def product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, each sum the worst of some random orders of its terms."""
    terms = a.shape[-1]
    exact = a.double() @ b.double()
    term_by_term = terms * exact.numel() <= MOST_PRODUCTS and terms <= MOST_TERMS
    worst, worst_error = exact.float(), torch.full_like(exact, -1)
    for _ in range(ORDERS if term_by_term else 2):
        order = torch.randperm(terms, device=a.device)
        left, right = a[..., order], b[..., order, :]
        if term_by_term:
            total = torch.zeros_like(worst)
            for term in range(terms):
                total.addcmul_(left[..., term, None], right[..., None, term, :])
        else:
            total = left @ right
        error = (total - exact).abs()
        worst = torch.where(error > worst_error, total, worst)
        worst_error = torch.maximum(error, worst_error)
    return worst


def sum_fp32(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension in fp32, each the worst of some random orders.

    Long ones as a GPU takes them: the terms of a lane one after another, then the lanes.
    """
    terms = x.shape[-1]
    lanes = -(-terms // MOST_TERMS)
    orders = torch.stack([torch.randperm(terms) for _ in range(ORDERS)]).to(x.device)
    shuffled = torch.nn.functional.pad(x[..., orders], (0, -terms % lanes))
    lane_sums = reduce(torch.add, shuffled.unflatten(-1, (-1, lanes)).unbind(-2))
    sums = reduce(torch.add, lane_sums.unbind(-1))
    error = (sums - x.double().sum(-1, keepdim=True)).abs()
    return sums.gather(-1, error.argmax(-1, keepdim=True)).squeeze(-1)


def attention(
    q: torch.Tensor,  # (batch, heads, seq, head_dim)
    k: torch.Tensor,  # (batch, kv_heads, seq, head_dim)
    v: torch.Tensor,  # (batch, kv_heads, seq, head_dim_v)
    head_masks: Sequence[torch.Tensor],  # heads x bool (seq, seq)
    scale: float | None = None,
    dout: torch.Tensor | None = None,  # like out
    dlse: torch.Tensor | None = None,  # like lse
    rounding: torch.dtype | None = None,
) -> Result:
    """Attention with its gradients, in fp64.

    With ``rounding`` in fp32, and scores, weights and products rounded to that dtype: the error
    that the precision costs. For fp32 that is the error of the sums alone, so those are taken term
    by term: a matrix library is luckier with some shapes than with others. And the scores are taken
    anew for the gradients, since what keeps only lse must do so: then a weight is off by two errors
    of its score, where the same score twice would leave none to a query of one key. A query without
    a key has out 0, lse -inf and zero gradients.
    """
    work = torch.float64 if rounding is None else torch.float32
    product = product_fp32 if rounding == torch.float32 else torch.matmul
    total = sum_fp32 if rounding else partial(torch.sum, dim=-1)  # lse is fp32 for 16 bits too

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x if rounding is None else x.to(rounding).to(work)

    def masked_scores(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return rounded(product(q, k.mT) * factor).masked_fill(~allowed, -math.inf)

    batch, heads, seq, head_dim = q.shape
    group = heads // k.shape[1]
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    q, k, v = q.detach().to(work), k.detach().to(work), v.detach().to(work)
    out = q.new_zeros(batch, heads, seq, v.shape[-1])
    lse = q.new_full((batch, heads, seq), -math.inf)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if dout is not None:
        dout = dout.detach().to(work)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.detach().to(work)

    # Sums over pieces of the queries would be more exact than one long sum in fp32.
    step = max(seq, 1) if rounding == torch.float32 else ROWS_AT_ONCE

    for head in range(heads):
        kv_head = head // group
        head_mask = head_masks[head].to(q.device)
        for start in range(0, seq, step):
            rows = slice(start, start + step)
            seen = head_mask[rows].any(0).nonzero().squeeze(1)
            if len(seen) == 0:
                continue
            allowed = head_mask[rows][:, seen]
            q_rows, k_seen, v_seen = q[:, head, rows], k[:, kv_head, seen], v[:, kv_head, seen]
            empty = ~allowed.any(-1)
            scores = masked_scores(q_rows, k_seen, allowed)
            greatest = scores.amax(-1, keepdim=True).masked_fill(empty[:, None], 0)
            row_lse = greatest.squeeze(-1) + total(torch.exp(scores - greatest)).log()
            subtracted = row_lse.masked_fill(empty, 0)[..., None]
            weights = rounded(torch.exp(scores - subtracted))
            out_rows = rounded(product(weights, v_seen))
            out[:, head, rows], lse[:, head, rows] = out_rows, row_lse
            if dout is None:
                continue
            if rounding == torch.float32:
                weights = torch.exp(masked_scores(q_rows, k_seen, allowed) - subtracted)
            dout_rows = dout[:, head, rows]
            delta = total(dout_rows * out_rows) - dlse[:, head, rows]
            dweights = rounded(product(dout_rows, v_seen.mT))
            dscores = rounded(weights * (dweights - delta.masked_fill(empty, 0)[..., None]))
            dq[:, head, rows] = product(dscores, k_seen) * factor
            dk[:, kv_head, seen] += product(dscores.mT, q_rows) * factor
            dv[:, kv_head, seen] += product(weights.mT, dout_rows)
    if dout is None:
        return Result(out, lse)
    return Result(out, lse, rounded(dq), rounded(dk), rounded(dv))


def attention_by_autograd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_masks: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in the dtype of the inputs, written so that autograd gives the gradients."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    allowed = torch.stack(list(head_masks))
    empty = ~allowed.any(-1)
    scores = (q @ k.mT * scale).masked_fill(~allowed & ~empty[..., None], -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(empty[..., None], 0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty, -math.inf)
    return weights @ v, lse
