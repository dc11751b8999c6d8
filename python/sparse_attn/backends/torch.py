# SPDX-License-Identifier: Apache-2.0
"""The torch backend: the branches of the plan in PyTorch operations, on any device.

O(n * keys per query) time and O(n * head_dim) memory: queries are taken in blocks, and the backward
pass computes the weights of a block again from the saved lse. Runs in fp32, or in fp64 for fp64
inputs. Deterministic: a block adds to a row of dq, dk or dv at most once a segment, and the blocks
come in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..merge import merge
from ..patterns import BlockSparse, Pattern, PerHead
from ..plan import Branch, plan
from .reference import per_query_head

# Scores held at a time: 2**22 in fp32 are 16 MB.
_BLOCK_SCORES = 1 << 22
# Blocks much shorter than the keys of a query waste calls, much longer ones masked scores.
_LEAST_ROWS, _MOST_ROWS = 32, 256


@dataclass(frozen=True)
class _Block:
    """Some queries of a branch and all the keys that any of them attends."""

    queries: torch.Tensor  # (groups, rows) positions; n where a group has no such row
    keys: tuple[torch.Tensor, ...]  # for each segment (groups, key rows) positions, likewise
    # bool (groups, rows, key rows of all segments); of a layout (heads or 1, groups, rows, ...)
    attends: torch.Tensor


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    batch, _, n, _ = q.shape
    k, v = per_query_head(k, q), per_query_head(v, q)
    for heads, head_pattern in _heads_by_pattern(pattern, q.shape[1]):
        q_, k_, v_ = q[:, heads], k[:, heads], v[:, heads]
        total_out = _accumulator(q_, v.shape[3], lse.dtype)
        total_lse = total_out.new_full(total_out.shape[:3], float("-inf"))
        for branch in plan(head_pattern, n):
            for block in _blocks(branch, head_pattern, batch * q_.shape[1], q.device):
                scores = _scores(q_, k_, block, scale, lse.dtype)
                block_lse = torch.logsumexp(scores, -1)
                weights = torch.exp(scores - _finite(block_lse)[..., None])
                block_out = weights @ _take(v_, torch.cat(block.keys, 1)).to(lse.dtype)
                # A query is in one block of each branch; branches merge.
                merged_out, merged_lse = merge(
                    _take(total_out, block.queries),
                    _take(total_lse, block.queries),
                    block_out,
                    block_lse,
                )
                _put(total_out, block.queries, merged_out)
                _put(total_lse, block.queries, merged_lse)
        out[:, heads] = total_out[:, :, :n].to(out.dtype)
        lse[:, heads] = total_lse[:, :, :n]


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    batch, heads_count, n, _ = q.shape
    dtype, kv_heads = lse.dtype, k.shape[1]
    k, v = per_query_head(k, q), per_query_head(v, q)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    delta = torch.where(lse == float("-inf"), 0.0, delta)  # a query with no key has no gradient
    sum_dq, sum_dk, sum_dv = (_accumulator(x, x.shape[3], dtype) for x in (q, k, v))
    for heads, head_pattern in _heads_by_pattern(pattern, heads_count):
        q_, k_, v_, dout_ = q[:, heads], k[:, heads], v[:, heads], dout[:, heads]
        dq_, dk_, dv_ = sum_dq[:, heads], sum_dk[:, heads], sum_dv[:, heads]
        for branch in plan(head_pattern, n):
            for block in _blocks(branch, head_pattern, batch * q_.shape[1], q.device):
                keys = torch.cat(block.keys, 1)
                block_lse = _finite(_take(lse[:, heads], block.queries))
                weights = torch.exp(_scores(q_, k_, block, scale, dtype) - block_lse[..., None])
                block_dout = _take(dout_, block.queries).to(dtype)
                dweights = block_dout @ _take(v_, keys).to(dtype).mT
                block_delta = _take(delta[:, heads], block.queries)
                dscores = weights * (dweights - block_delta[..., None]) * scale
                _add(dq_, (block.queries,), dscores @ _take(k_, keys).to(dtype))
                _add(dk_, block.keys, dscores.mT @ _take(q_, block.queries).to(dtype))
                _add(dv_, block.keys, weights.mT @ block_dout)
        if isinstance(heads, list):  # indexing with a list made copies
            sum_dq[:, heads], sum_dk[:, heads], sum_dv[:, heads] = dq_, dk_, dv_
    dq.copy_(sum_dq[:, :, :n])
    dk.copy_(sum_dk[:, :, :n].unflatten(1, (kv_heads, -1)).sum(2))
    dv.copy_(sum_dv[:, :, :n].unflatten(1, (kv_heads, -1)).sum(2))


def _heads_by_pattern(pattern: Pattern, heads: int) -> list[tuple[slice | list[int], Pattern]]:
    """The distinct patterns, each with the heads it serves."""
    if not isinstance(pattern, PerHead):
        return [(slice(0, heads), pattern)]
    return [
        ([head for head in range(heads) if pattern.patterns[head] == distinct], distinct)
        for distinct in dict.fromkeys(pattern.patterns)
    ]


def _blocks(
    branch: Branch, pattern: Pattern, batch_heads: int, device: torch.device
) -> Iterator[_Block]:
    """The blocks of a branch, in order; a block whose queries have no key is left out."""
    if isinstance(pattern, BlockSparse):
        yield from _layout_blocks(pattern, branch.run.length, batch_heads, device)
        return
    view, n = branch.queries, branch.run.length
    last = view.position(0, view.max_rows - 1)
    bounds = [segment.bounds(branch.run, 0, last) for segment in branch.segments]
    keys_of_last = int(sum(end - first for first, end in bounds))
    rows = min(max(keys_of_last, _LEAST_ROWS), _MOST_ROWS, view.max_rows)
    while rows > _LEAST_ROWS and batch_heads * rows * (keys_of_last + rows) > _BLOCK_SCORES:
        rows //= 2
    groups = max(_BLOCK_SCORES // (batch_heads * rows * (keys_of_last + rows)), 1)
    for first_group in range(0, view.groups, groups):
        group = np.arange(first_group, min(first_group + groups, view.groups))[:, None]
        for first_row in range(0, view.max_rows, rows):
            row = np.arange(first_row, min(first_row + rows, view.max_rows))[None, :]
            exists = row < view.rows(group)
            queries = np.where(exists, view.position(group, row), n)
            keys, attends = [], []
            for segment in branch.segments:
                first, end = segment.bounds(branch.run, group, np.minimum(queries, n - 1))
                first, end = np.where(exists, first, n), np.where(exists, end, 0)
                key_row = np.arange(first.min(), max(end.max(), first.min()))
                keys.append(np.minimum(segment.keys.position(group, key_row[None, :]), n))
                attends.append((first[..., None] <= key_row) & (key_row < end[..., None]))
            if any(x.size for x in attends):
                yield _Block(
                    torch.from_numpy(queries).to(device),
                    tuple(torch.from_numpy(x).to(device) for x in keys),
                    torch.from_numpy(np.concatenate(attends, axis=2)).to(device),
                )


def _layout_blocks(
    pattern: BlockSparse, n: int, batch_heads: int, device: torch.device
) -> Iterator[_Block]:
    """Likewise for a layout: some queries of one block, with the key blocks of all heads."""
    layout = pattern.layout.cpu().numpy()
    if pattern.causal:
        layout = np.tril(layout)
    for query_block, kept in enumerate(layout.transpose(1, 0, 2)):  # kept (heads or 1, blocks)
        key_blocks = np.flatnonzero(kept.any(0))
        if not key_blocks.size:
            continue
        keys = (key_blocks[:, None] * pattern.block + np.arange(pattern.block)).flatten()
        keys = keys[keys < n]
        of_heads = kept[:, keys // pattern.block][:, None, None]  # (heads or 1, 1, 1, keys)
        rows = pattern.block
        while rows > _LEAST_ROWS and batch_heads * rows * keys.size > _BLOCK_SCORES:
            rows //= 2
        end = min((query_block + 1) * pattern.block, n)
        for first in range(query_block * pattern.block, end, rows):
            queries = np.arange(first, min(first + rows, end))
            causal = (keys <= queries[:, None]) | (not pattern.causal)
            yield _Block(
                torch.from_numpy(queries[None]).to(device),
                (torch.from_numpy(keys[None]).to(device),),
                torch.from_numpy(of_heads & causal).to(device),
            )


def _scores(
    q: torch.Tensor, k: torch.Tensor, block: _Block, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Scores ``(batch, heads, groups, rows, key rows)``, -inf where a query does not attend."""
    queries = _take(q, block.queries).to(dtype) * scale
    keys = _take(k, torch.cat(block.keys, 1)).to(dtype)
    return (queries @ keys.mT).masked_fill_(~block.attends, float("-inf"))


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Zero in place of -inf, so that the weights of a query with no key are exp(-inf) = 0."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def _accumulator(x: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros ``(batch, heads, n + 1, head_dim)``; position n takes what has no row."""
    batch, heads, n, _ = x.shape
    return x.new_zeros((batch, heads, n + 1, head_dim), dtype=dtype)


def _take(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows ``(batch, heads, *positions.shape, ...)`` of x ``(batch, heads, seq, ...)``."""
    index = positions.flatten().clamp(max=x.shape[2] - 1)
    return x.index_select(2, index).unflatten(2, positions.shape)


def _put(x: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    x.index_copy_(2, positions.flatten(), rows.flatten(2, 3))


def _add(x: torch.Tensor, positions: tuple[torch.Tensor, ...], rows: torch.Tensor) -> None:
    """Adds rows ``(batch, heads, groups, rows of all parts, dim)``; a part has a position once."""
    start = 0
    for part in positions:
        part_rows = rows[:, :, :, start : start + part.shape[1]]
        start += part.shape[1]
        _put(x, part, _take(x, part) + part_rows)
