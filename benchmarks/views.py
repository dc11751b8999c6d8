# SPDX-License-Identifier: Apache-2.0
"""Chunks and residues of a sequence as heads or batch entries of a smaller one, without a copy.

Zero-copy needs tensors of shape (batch, heads, seq, dim) whose memory is (batch, seq, heads, dim)
and a seq that is a multiple of the length or stride.
"""

from __future__ import annotations

from torch import Tensor


def chunks(x: Tensor, length: int) -> Tensor:
    """(batch, heads, seq, dim) as (batch * seq / length, heads, length, dim)."""
    seq = x.shape[2]
    tokens = x.transpose(1, 2).unflatten(1, (seq // length, length))
    return tokens.flatten(0, 1).transpose(1, 2)


def from_chunks(x: Tensor, batch: int) -> Tensor:
    """The inverse of `chunks`, also for (batch * seq / length, heads, length)."""
    tokens = x.transpose(1, 2).unflatten(0, (batch, x.shape[0] // batch))
    return tokens.flatten(1, 2).transpose(1, 2)


def residues(x: Tensor, stride: int) -> Tensor:
    """(batch, heads, seq, dim) as (batch, stride * heads, seq / stride, dim)."""
    seq = x.shape[2]
    tokens = x.transpose(1, 2).unflatten(1, (seq // stride, stride))
    return tokens.flatten(2, 3).transpose(1, 2)


def from_residues(x: Tensor, stride: int) -> Tensor:
    """The inverse of `residues`, also for (batch, stride * heads, seq / stride)."""
    tokens = x.transpose(1, 2).unflatten(2, (stride, x.shape[1] // stride))
    return tokens.flatten(1, 2).transpose(1, 2)


def panel(x: Tensor, length: int, columns: int, offset: int) -> Tensor:
    """The summary keys of all chunks, copied: (batch, heads, seq / length * columns, dim)."""
    tokens = x.unflatten(2, (x.shape[2] // length, length))
    return tokens[:, :, :, offset : offset + columns].flatten(2, 3)
