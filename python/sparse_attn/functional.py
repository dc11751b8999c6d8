# SPDX-License-Identifier: Apache-2.0
"""The public functions."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from . import _ops
from .dispatch import choose_backend
from .patterns import BlockSparse, Pattern


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the keys that a pattern selects (Child et al., 2019, section 4).

    Args:
        q: ``(batch, heads, seq, head_dim)``, any strides; float16, bfloat16, float32 or float64.
        k: ``(batch, kv_heads, seq, head_dim)``; ``kv_heads`` divides ``heads``.
        v: ``(batch, kv_heads, seq, head_dim_v)``. head_dim and head_dim_v are at most 256.
        pattern: what attends to what, for example ``Strided(128)`` or ``Fixed(128, columns=32)``.
        scale: factor of the scores; ``1 / sqrt(head_dim)`` if None.
        return_lse: return ``(out, lse)``. lse is ``(batch, heads, seq)``, the natural logarithm of
            the sum of the exponentials of the scaled scores, fp32 (fp64 for fp64 inputs). Both are
            differentiable.
        backend: "cuda" (the native kernels; "cuda_sm80" or "cuda_sm90" for those of a compute
            capability), "torch" or "reference"; the fastest that can run if None.

    Returns:
        out ``(batch, heads, seq, head_dim_v)`` in q's dtype and memory order. A query that attends
        no key has output 0, lse -inf and gradient 0.

    Under autocast the inputs are cast to its dtype. Differentiable once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or sizes that do not fit.
        RuntimeError: mixed devices, or a forced backend that cannot run.

    >>> q, k, v = torch.randn(3, 1, 8, 1000, 64).unbind()
    >>> attention(q, k, v, Strided(32)).shape
    torch.Size([1, 8, 1000, 64])
    """
    q, k, v = _inputs(q, k, v, pattern)
    scale = checked_scale(scale)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {backend!r}")
    layout = pattern.layout if isinstance(pattern, BlockSparse) else None
    out, lse = _ops.attention(q, k, v, layout, pattern.spec, scale, backend)
    return (out, lse) if return_lse else out


def which_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> str:
    """The backend that ``attention(q, k, v, pattern)`` runs on.

    "cuda_sm90" (Hopper's own kernels), "cuda_sm80" (those for any GPU from compute capability 8.0
    on) or "torch".

    >>> which_backend(*torch.randn(3, 1, 8, 1000, 64).unbind(), Strided(32))
    'torch'
    """
    q, k, v = _inputs(q, k, v, pattern)
    _ops.check(q, k, v, pattern, pattern.layout if isinstance(pattern, BlockSparse) else None)
    return choose_backend(q, k, v, pattern)[0]


def checked_scale(scale: float | None) -> float | None:
    """The factor of the scores as a float; raises unless it is a finite number or None."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in autocast's dtype; refuses in words what the operator's schema would refuse."""
    _ops.check_pattern(pattern)
    for name, x in (("q", q), ("k", k), ("v", v)):
        # A DTensor is known by its device_mesh: importing its class would double the import time.
        if not isinstance(x, torch.Tensor) or x.is_nested or hasattr(x, "device_mesh"):
            raise TypeError(
                f"{name} must be a plain torch.Tensor (no nested tensor, no DTensor), "
                f"got {_kind(x)}"
            )
    device = q.device.type
    has_autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if has_autocast and q.is_floating_point() and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _kind(x: object) -> str:
    return "a nested tensor" if getattr(x, "is_nested", False) else type(x).__name__
