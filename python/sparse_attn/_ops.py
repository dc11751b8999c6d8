# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.sparse_attn.forward`` and ``.backward``, differentiable and traceable.

A pattern travels as its ``spec`` and the layout of a `BlockSparse`, without the sequence length, so
that ``torch.compile`` with a changing length compiles once more and not once for each length.
Inputs are checked here, once for every path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from .backends import cuda, reference
from .backends import torch as torch_backend
from .dispatch import choose_backend, warn_once
from .patterns import BlockSparse, Pattern, PerHead, pattern_of

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FORWARD: dict[str, Callable[..., None]] = {
    "cuda_sm80": partial(cuda.forward, sm90=False),
    "cuda_sm90": partial(cuda.forward, sm90=True),
    "torch": torch_backend.forward,
    "reference": reference.forward,
}
_BACKWARD: dict[str, Callable[..., None]] = {
    "cuda_sm80": partial(cuda.backward, sm90=False),
    "cuda_sm90": partial(cuda.backward, sm90=True),
    "torch": torch_backend.backward,
    "reference": reference.backward,
}
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "sparse_attn::forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? layout, str pattern, float? scale, str? backend) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "sparse_attn::backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? layout, str pattern, float? scale, str? backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> None:
    """Raises on inputs that no backend takes, before any work."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"q, k and v must have 4 dimensions (batch, heads, seq, head_dim), {shapes}"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            "q, k and v must share one dtype of float16, bfloat16, float32 and float64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise RuntimeError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, {shapes}")
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(f"q, k and v must have one sequence length, {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, {shapes}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k and v must have one number of heads, {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v, {shapes}")
    if not (1 <= q.shape[3] <= MAX_HEAD_DIM and 1 <= v.shape[3] <= MAX_HEAD_DIM):
        raise ValueError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, {shapes}")
    check_pattern(pattern, q.shape[1])
    if isinstance(pattern, BlockSparse):
        pattern.check_length(q.shape[2])
        if pattern.layout.device != q.device:
            raise RuntimeError(
                f"the layout must be on the device of q, got {pattern.layout.device} and {q.device}"
            )


def check_pattern(pattern: Pattern, heads: int | None = None) -> None:
    """Raises unless it is a pattern, and serves that many query heads if their number is given."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as Strided(128), got {pattern!r}")
    if heads and isinstance(pattern, PerHead) and len(pattern.patterns) != heads:
        raise ValueError(
            f"PerHead takes one pattern for each head, "
            f"got {len(pattern.patterns)} patterns for {heads} heads"
        )
    if heads and isinstance(pattern, BlockSparse) and len(pattern.layout) not in (1, heads):
        raise ValueError(
            f"a layout is for one head or for each head, "
            f"got shape {tuple(pattern.layout.shape)} for {heads} heads"
        )


def _empty(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """An output ``(batch, heads, seq, head_dim)`` with dense rows, in the memory order of ``x``."""
    order = sorted(range(3), key=lambda dim: -x.stride()[dim])  # outermost first
    dense = x.new_empty([*(x.shape[dim] for dim in order), head_dim])
    return dense.permute(*(order.index(dim) for dim in range(3)), 3)


def _empty_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


def _without_autocast(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast, which has chosen the dtype of the inputs, out of a backend's arithmetic."""
    return nullcontext() if name.startswith("cuda") else torch.autocast(device.type, enabled=False)


@torch.library.impl("sparse_attn::forward", "CompositeExplicitAutograd")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    parsed = pattern_of(pattern, layout)
    check(q, k, v, parsed)
    name, fallback = choose_backend(q, k, v, parsed, backend)
    if fallback is not None:
        warn_once(fallback)
    out, lse = _empty_outputs(q, v)
    if lse.numel():
        with _without_autocast(name, q.device):
            _FORWARD[name](q, k, v, parsed, _scale(scale, q), out, lse)
    return out, lse


@torch.library.register_fake("sparse_attn::forward")
def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check(q, k, v, pattern_of(pattern, layout))
    return _empty_outputs(q, v)


@torch.library.impl("sparse_attn::backward", "CompositeExplicitAutograd")
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (_empty(x, x.shape[3]) for x in (q, k, v))
    if lse.numel():
        parsed = pattern_of(pattern, layout)
        name, _ = choose_backend(q, k, v, parsed, backend)
        with _without_autocast(name, q.device):
            run = _BACKWARD[name]
            run(dout, dlse, q, k, v, out, lse, parsed, _scale(scale, q), dq, dk, dv)
    return dq, dk, dv


@torch.library.register_fake("sparse_attn::backward")
def _backward_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (_empty(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, layout, ctx.pattern, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, layout, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
    q, k, v, layout, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.sparse_attn.backward(
        dout, dlse, q, k, v, out, lse, layout, ctx.pattern, ctx.scale, ctx.backend
    )
    return *grads, None, None, None, None


def _differentiate_twice(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("sparse_attn.attention cannot be differentiated twice")


torch.library.register_autograd(
    "sparse_attn::forward", _differentiate, setup_context=_save_for_backward
)
torch.library.register_autograd("sparse_attn::backward", _differentiate_twice)
