# SPDX-License-Identifier: Apache-2.0
"""The reference backend: ``pattern.mask(n)`` and a plain softmax, fp64. Slow and obviously right.

Costs O(n^2) time and memory. With ``rounding`` it is also the yardstick of the tolerance rule:
the error that the number format alone makes.
"""

from __future__ import annotations

import torch

from ..patterns import Pattern


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float64,
    rounding: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a mask, in differentiable PyTorch operations.

    Args:
        q: ``(batch, heads, seq, head_dim)``; k and v ``(batch, kv_heads, seq, ...)``.
        mask: bool ``(seq, seq)`` or ``(heads, seq, seq)``, [query, key].
        dtype: the computation runs in it.
        rounding: if given, scores, weights and products are rounded to this dtype (gradients too).

    Returns:
        out ``(batch, heads, seq, head_dim_v)`` and lse ``(batch, heads, seq)``, both in ``dtype``.
        A query with no key has output 0 and lse -inf.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x if rounding is None else x.to(rounding).to(dtype)

    q = q.to(dtype)
    k, v = (_seen(per_query_head(x.to(dtype), q), mask) for x in (k, v))
    scores = rounded(rounded(q @ k.mT) * scale).masked_fill(~mask, float("-inf"))
    has_key = mask.any(-1)
    # A row of zeros keeps the softmax of an empty row finite, in both directions.
    scores = torch.where(has_key[..., None], scores, 0.0)
    lse = torch.where(has_key, torch.logsumexp(scores, -1), float("-inf"))
    weights = torch.where(has_key[..., None], rounded(torch.softmax(scores, -1)), 0.0)
    return rounded(weights @ v), lse


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    mask = pattern.mask(q.shape[2]).to(q.device)
    result, result_lse = attention(q, k, v, mask, scale)
    out.copy_(result)
    lse.copy_(result_lse)


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
    """dS = P * (dP - delta) with delta = rowsum(dout * out) - dlse, from the saved lse."""
    dtype, lse = torch.float64, lse.double()
    mask = pattern.mask(q.shape[2]).to(q.device)
    q_, dout_, out_ = q.to(dtype), dout.to(dtype), out.to(dtype)
    k_, v_ = (_seen(per_query_head(x.to(dtype), q), mask) for x in (k, v))
    weights = torch.where(mask, torch.exp(q_ @ k_.mT * scale - lse[..., None]), 0.0)
    delta = (dout_ * out_).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    delta = torch.where(lse == float("-inf"), 0.0, delta)
    dscores = weights * (dout_ @ v_.mT - delta[..., None]) * scale
    dq.copy_(dscores @ k_)
    dk.copy_((dscores.mT @ q_).unflatten(1, (k.shape[1], -1)).sum(2))
    dv.copy_((weights.mT @ dout_).unflatten(1, (k.shape[1], -1)).sum(2))


def _seen(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Keys or values, 0 where no query looks: such memory may hold NaN, and 0 * NaN is NaN."""
    return x.masked_fill(~mask.any(-2)[..., None], 0.0)


def per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Keys or values, one head for each query head: a kv head serves neighbouring query heads."""
    ratio = q.shape[1] // x.shape[1]
    return x if ratio == 1 else x.repeat_interleave(ratio, dim=1)
