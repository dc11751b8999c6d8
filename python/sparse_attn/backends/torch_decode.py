# SPDX-License-Identifier: Apache-2.0
"""Decoding in PyTorch operations, on any device, in any dtype.

Every step runs the same operations on tensors of the same shapes, whatever the position, which
stays on the device: a step can be captured in a CUDA graph. A query reads as many slots as the
greatest number of its keys, and selects among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..decode_plan import Read, Store, group_of
from ..plan import Run, SequenceView

if TYPE_CHECKING:
    from ..decode import CachedHeads, KVCache


def decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KVCache,
    scale: float,
    out: torch.Tensor,
) -> None:
    tokens = cache.position + torch.arange(q.shape[2], device=q.device)
    for part in cache.parts:
        out.index_copy_(1, part.heads, _attend(q, k_new, v_new, part, tokens, scale))
        # Only now: a new token may take the place of one that the first of the new queries reads.
        _append(k_new, v_new, part, tokens)


def _attend(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    part: CachedHeads,
    tokens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Outputs ``(batch, heads of the part, new, head_dim_v)``."""
    queries = _work(q.index_select(1, part.heads)) * scale
    k_new, v_new = (_per_query_head(x.index_select(1, part.kv_heads), part) for x in (k_new, v_new))
    new = tokens.shape[0]
    sees_new = torch.zeros(new, new, dtype=torch.bool, device=q.device)  # [query, key]
    scores, values = [], []
    for read in part.plan.reads:
        group = group_of(read.queries, tokens)
        first, end = _bounds(read, group, tokens)
        sees_new |= _sees(read.segment.keys, group, first, end, tokens)
        store = part.plan.stores[read.store]
        slots, attends = _slots(read, store, group, first, end, tokens)  # (new, most keys)
        keys = _per_query_head(_take(part.k[read.store], slots), part)
        score = (queries[..., None, :] @ keys.mT).squeeze(-2)
        scores.append(score.masked_fill(~attends, float("-inf")))
        kept_values = _per_query_head(_take(part.v[read.store], slots), part)
        values.append(kept_values.masked_fill(~attends[..., None], 0.0))
    scores.append((queries @ k_new.mT).masked_fill(~sees_new, float("-inf")))
    v_new = v_new.masked_fill(~sees_new.any(0)[:, None], 0.0)
    all_scores = torch.cat(scores, -1)
    lse = torch.logsumexp(all_scores, -1, keepdim=True)
    weights = torch.exp(all_scores - torch.where(lse == float("-inf"), 0.0, lse))
    *old_weights, new_weights = weights.split([score.shape[-1] for score in scores], -1)
    out = new_weights @ v_new
    for weight, value in zip(old_weights, values, strict=True):
        out = out + (weight[..., None, :] @ value).squeeze(-2)
    return out.to(q.dtype)


def _append(
    k_new: torch.Tensor, v_new: torch.Tensor, part: CachedHeads, tokens: torch.Tensor
) -> None:
    """Puts new keys and values ``(batch, kv_heads, new, _)`` into the stores that list them."""
    k_new, v_new = (x.index_select(1, part.kv_heads) for x in (k_new, v_new))
    for store, k, v in zip(part.plan.stores, part.k, part.v, strict=True):
        row = _rows_before(store.tokens, 0, tokens)
        listed = _rows_before(store.tokens, 0, tokens + 1) > row
        slots = row % store.slots
        for new in range(tokens.shape[0]):  # in order: a short ring keeps the last
            at = slice(new, new + 1)
            for kept, x in ((k, k_new), (v, v_new)):
                value = torch.where(listed[at], x[:, :, at], kept.index_select(2, slots[at]))
                kept.index_copy_(2, slots[at], value)


def _slots(
    read: Read,
    store: Store,
    group: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the keys of each query lie, and which of these slots it attends; (new, most keys)."""
    row = first[:, None] + torch.arange(read.most_keys, device=tokens.device)
    store_row = read.store_row(group[:, None], row)
    old = store_row < _rows_before(store.tokens, 0, tokens[:1])
    return store_row % store.slots, (row < end[:, None]) & old


def _sees(
    keys: SequenceView,
    group: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Which of the new tokens each new query attends through one read: bool (new, new)."""
    row = _rows_before(keys, group[:, None], tokens)
    listed = _rows_before(keys, group[:, None], tokens + 1) > row
    return listed & (first[:, None] <= row) & (row < end[:, None])


def _take(kept: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``(batch, heads, new, most keys, dim)``."""
    return kept.index_select(2, slots.flatten()).unflatten(2, slots.shape)


def _per_query_head(x: torch.Tensor, part: CachedHeads) -> torch.Tensor:
    """Rows of the part's kv heads, for each of its query heads."""
    same = len(part.heads) == len(part.kv_heads)
    return _work(x if same else x.index_select(1, part.kv_of))


def _work(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# The arithmetic of plan.py, on tensors.


def _bounds(
    read: Read, group: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key rows [first, end) of the queries: `Segment.bounds` for a causal pattern."""
    start = _start(read.run, token)
    first, end = (token * 0, start) if read.segment.part == "before" else (start, token + 1)
    keys = read.segment.keys
    return _rows_before(keys, group, first), _rows_before(keys, group, end)


def _start(run: Run, token: torch.Tensor) -> torch.Tensor:
    start = (token - run.window + 1).clamp(min=0)
    for length in run.chunks:
        start = torch.minimum(start, token - token % length)
    return start


def _rows_before(
    view: SequenceView, group: torch.Tensor | int, token: torch.Tensor
) -> torch.Tensor:
    distance = (token - view.offset - group * view.group_step).clamp(min=0)
    rows = distance // view.run_stride * view.run
    rows = rows + (distance % view.run_stride).clamp(max=view.run)
    return rows.clamp(max=view.max_rows)
