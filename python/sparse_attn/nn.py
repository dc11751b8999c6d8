# SPDX-License-Identifier: Apache-2.0
"""Attention as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._ops import MAX_HEAD_DIM, check_pattern
from .functional import attention
from .patterns import BlockSparse, Pattern, check_size

if TYPE_CHECKING:
    from typing_extensions import Self


class SelfAttention(nn.Module):
    """Multi-head self-attention over a sparse pattern, a drop-in for dense self-attention.

    Args:
        width: features of the input and the output.
        heads: query heads; divides ``width`` and ``qk_width``.
        pattern: any pattern; a `PerHead` has ``heads`` of them. The layout of a `BlockSparse` moves
            with the module to another device and is not in its state dict.
        qk_width: features of queries, and of keys if there are as many key heads; ``width`` if
            None. The paper's image models use ``width // 2``.
        kv_heads: key and value heads; divides ``heads``, equals it if None.
        bias: whether the projections have biases.

    Input and output are ``(batch, seq, width)``. Sizes that do not fit raise ValueError, arguments
    of the wrong type TypeError.

    >>> SelfAttention(64, 4, Strided(16))(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    layout: torch.Tensor | None
    pattern: Pattern

    def __init__(
        self,
        width: int,
        heads: int,
        pattern: Pattern,
        qk_width: int | None = None,
        kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        qk_width = width if qk_width is None else qk_width
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"width": width, "heads": heads, "qk_width": qk_width, "kv_heads": kv_heads}
        for name, size in sizes.items():
            check_size(name, size)
        if width % heads or qk_width % heads:
            raise ValueError(
                "heads must divide width and qk_width, "
                f"got heads {heads}, width {width}, qk_width {qk_width}"
            )
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads {kv_heads}, heads {heads}")
        if max(width, qk_width) // heads > MAX_HEAD_DIM:
            raise ValueError(
                f"width / heads and qk_width / heads must be at most {MAX_HEAD_DIM}, "
                f"got width {width}, qk_width {qk_width}, heads {heads}"
            )
        check_pattern(pattern, heads)
        self.heads, self.kv_heads, self.pattern = heads, kv_heads, pattern
        layout = pattern.layout if isinstance(pattern, BlockSparse) else None
        self.register_buffer("layout", layout, persistent=False)
        head_dim, head_dim_v = qk_width // heads, width // heads
        self.widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim_v]
        self.qkv = nn.Linear(width, sum(self.widths), bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `half` do: the pattern's layout stays with the module."""
        super()._apply(fn, recurse)
        if isinstance(self.pattern, BlockSparse) and self.layout is not None:
            pattern = self.pattern
            self.pattern = BlockSparse(self.layout, pattern.block, causal=pattern.causal)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3 or x.shape[2] != self.qkv.in_features:
            raise ValueError(
                f"SelfAttention takes (batch, seq, width) with width {self.qkv.in_features}, "
                f"got shape {tuple(x.shape)}"
            )
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            part.unflatten(2, (count, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim), no copy
            for part, count in zip(self.qkv(x).split(self.widths, dim=2), heads, strict=True)
        )
        return self.out(attention(q, k, v, self.pattern).transpose(1, 2).flatten(2))
