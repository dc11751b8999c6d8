# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: the one place that decides."""

from __future__ import annotations

import warnings
from functools import cache

from .backends import cuda
from .patterns import Pattern
from .tensor_meta import AnyTensor

BACKENDS = ("cuda", "cuda_sm80", "cuda_sm90", "torch", "reference")


def choose_backend(
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    pattern: Pattern,
    backend: str | None = None,
) -> tuple[str, str | None]:
    """The backend of a call, and why a CUDA call falls to torch (None if it does not).

    "cuda" becomes the fastest kernels that can run: "cuda_sm90", Hopper's own, or "cuda_sm80".

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: ``backend`` names kernels that cannot run these inputs.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("torch", "reference") or (backend is None and not q.is_cuda):
        return backend or "torch", None
    reason = cuda.unsupported(q, k, v, pattern)
    if reason is None and backend == "cuda_sm80":
        return "cuda_sm80", None
    if reason is None:
        no_hopper = cuda.unsupported_by_sm90(q, v, pattern)
        if no_hopper is None:
            return "cuda_sm90", None
        if backend != "cuda_sm90":
            return "cuda_sm80", None
        reason = no_hopper
    if backend is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return "torch", reason


@cache
def warn_once(reason: str) -> None:
    """Says once for each reason that a CUDA call runs on the torch backend."""
    warnings.warn(f"sparse_attn runs on the torch backend: {reason}", RuntimeWarning, stacklevel=2)
