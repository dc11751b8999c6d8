# SPDX-License-Identifier: Apache-2.0
"""Merging partial attention outputs by log-sum-exp."""

from __future__ import annotations

import torch


def merge(
    out1: torch.Tensor, lse1: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    Args:
        out1, out2: partial outputs, ``(..., seq, head_dim_v)``.
        lse1, lse2: their log-sum-exp (natural logarithm), ``(..., seq)``; -inf where a part has no
            key.

    Returns:
        ``(out, lse)``: out in the dtype of ``out1``, lse in that of ``lse1``. Where both parts are
        empty, out is 0 and lse -inf. Differentiable in all four arguments.

    >>> out, lse = merge(torch.ones(1, 2), torch.zeros(1), torch.zeros(1, 2), torch.zeros(1))
    >>> out.tolist()
    [[0.5, 0.5]]
    """
    for name, x in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point torch.Tensor, got {kind}")
    if out1.shape != out2.shape or lse1.shape != lse2.shape or out1.shape[:-1] != lse1.shape:
        raise ValueError(
            "merge wants out1 and out2 of one shape (..., seq, head_dim_v) and lse1 and lse2 of "
            f"shape (..., seq), got {tuple(out1.shape)}, {tuple(out2.shape)}, "
            f"{tuple(lse1.shape)}, {tuple(lse2.shape)}"
        )
    greatest = torch.maximum(lse1, lse2).detach()
    greatest = torch.where(greatest == float("-inf"), 0.0, greatest)
    share1, share2 = torch.exp(lse1 - greatest), torch.exp(lse2 - greatest)
    total = share1 + share2
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), greatest + torch.log(total))
    out = (share1 / total)[..., None] * out1 + (share2 / total)[..., None] * out2
    return out.to(out1.dtype), lse
