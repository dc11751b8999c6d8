# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: the one place that decides."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from .backends import cuda
from .patterns import Pattern

BACKENDS = ("cuda", "torch", "reference")


def choose_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    backend: str | None = None,
) -> tuple[str, str | None]:
    """The backend of a call, and why a CUDA call falls to torch (None if it does not).

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: ``backend="cuda"`` and the kernels cannot run these inputs.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("torch", "reference") or (backend is None and not q.is_cuda):
        return backend or "torch", None
    reason = cuda.unsupported(q, k, v, pattern)
    if reason is None:
        return "cuda", None
    if backend == "cuda":
        raise RuntimeError(f"backend='cuda' cannot run: {reason}")
    return "torch", reason


@cache
def warn_once(reason: str) -> None:
    """Says once for each reason that a CUDA call runs on the torch backend."""
    warnings.warn(f"sparse_attn runs on the torch backend: {reason}", RuntimeWarning, stacklevel=2)
