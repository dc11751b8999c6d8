# SPDX-License-Identifier: Apache-2.0
"""The oracle on sampled rows: O(samples * n) work, for sequences too long for a whole mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

import oracle
from cases import Inputs
from compare import assert_close

QUERIES_AT_ONCE = 1 << 16


def attended(
    members: oracle.Members, causal: bool, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Bool (queries, keys): which of these positions attend which, from the set definition."""
    i, j = queries[:, None], keys[None, :]
    seen = torch.zeros(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    for member in members:
        seen |= oracle.attends(member, causal, i, j)
    return seen


def query_results(
    x: Inputs,
    members: oracle.Members,
    causal: bool,
    batch: int,
    head: int,
    rows: torch.Tensor,
    scale: float | None = None,
    rounding: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """out, lse and dq of some queries of one head."""
    kv_head = head // (x.q.shape[1] // x.k.shape[1])
    keys = torch.arange(x.k.shape[2], device=rows.device)
    result = oracle.attention(
        x.q[batch, head, rows][None, None],
        x.k[batch, kv_head][None, None],
        x.v[batch, kv_head][None, None],
        [attended(members, causal, rows, keys)],
        scale,
        x.dout[batch, head, rows][None, None],
        x.dlse[batch, head, rows][None, None],
        rounding,
    )
    assert result.dq is not None
    return {"out": result.out[0, 0], "lse": result.lse[0, 0], "dq": result.dq[0, 0]}


def key_gradients(
    x: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    members: oracle.Members,
    causal: bool,
    batch: int,
    kv_head: int,
    rows: torch.Tensor,
    scale: float | None = None,
    rounding: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """dk and dv of some keys of one kv head, given out and lse of all queries."""
    work = torch.float64 if rounding is None else torch.float32

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x if rounding is None else x.to(rounding).to(work)

    heads, n, head_dim = x.q.shape[1:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    group = heads // x.k.shape[1]
    k, v = x.k[batch, kv_head, rows].to(work), x.v[batch, kv_head, rows].to(work)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for start in range(0, n, QUERIES_AT_ONCE):
            queries = torch.arange(start, min(start + QUERIES_AT_ONCE, n), device=rows.device)
            allowed = attended(members, causal, queries, rows)
            seen = allowed.any(1)
            queries, allowed = queries[seen], allowed[seen]
            q, dout = x.q[batch, head, queries].to(work), x.dout[batch, head, queries].to(work)
            delta = (dout * out[batch, head, queries].to(work)).sum(-1)
            delta -= x.dlse[batch, head, queries].to(work)
            scores = rounded(q @ k.mT * scale).masked_fill(~allowed, -math.inf)
            weights = rounded(torch.exp(scores - lse[batch, head, queries].to(work)[:, None]))
            dscores = rounded(weights * (rounded(dout @ v.mT) - delta[:, None]))
            dk += dscores.mT @ q * scale
            dv += weights.mT @ dout
    return {"dk": rounded(dk), "dv": rounded(dv)}


def assert_samples_close(
    x: Inputs,
    actual: Mapping[str, torch.Tensor | None],
    members: oracle.Members,
    causal: bool,
    samples: Mapping[str, torch.Tensor],
    heads: Sequence[tuple[int, int]],
    scale: float | None = None,
) -> None:
    """All five results at the sampled positions, each sample by itself, of some (batch, head)."""
    group = x.q.shape[1] // x.k.shape[1]
    dtype = x.q.dtype
    assert dtype in (torch.float16, torch.bfloat16, torch.float64)
    roundings = [None] if dtype == torch.float64 else [None, dtype]

    def compare(sample: str, at: tuple[int, int], results: list[dict[str, torch.Tensor]]) -> None:
        exact, low = results[0], results[1] if len(results) > 1 else {}
        batch, head = at
        for name, reference in exact.items():
            whole = actual[name]
            assert whole is not None, f"{name}: nothing came back"
            assert_close(
                f"{name} of batch {batch}, head {head}, {sample} positions",
                whole[batch, head, samples[sample]],
                reference,
                low.get(name),
            )

    for batch, head in heads:
        for sample, rows in samples.items():
            at = batch, head, rows, scale
            results = [query_results(x, members, causal, *at, rounding) for rounding in roundings]
            compare(sample, (batch, head), results)

    # A key is attended by up to n queries, and their exact out and lse would cost O(n^2): those of
    # the tested forward stand in. They come after the checks above, which hold them to the oracle
    # at the sampled queries.
    out, lse = actual["out"], actual["lse"]
    assert out is not None and lse is not None
    out, lse = out.detach(), lse.detach()
    for batch, kv_head in sorted({(batch, head // group) for batch, head in heads}):
        for sample, rows in samples.items():
            at = batch, kv_head, rows, scale
            results = [
                key_gradients(x, out, lse, members, causal, *at, rounding) for rounding in roundings
            ]
            compare(sample, (batch, kv_head), results)
