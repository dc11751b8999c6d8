# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.sparse_attn.forward`` and ``.backward``, differentiable and traceable.

A pattern travels as its ``spec`` and the layout of a `BlockSparse`, without the sequence length, so
that ``torch.compile`` with a changing length compiles once more and not once for each length.
Inputs are checked here, once for every path. What a call needs besides its tensors' memory is
prepared once and remembered: the checks, the backend, the plan, the kernels' arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .backends import cuda, reference
from .backends import torch as torch_backend
from .dispatch import choose_backend, warn_once
from .patterns import BlockSparse, Pattern, PerHead, pattern_of
from .tensor_meta import AnyTensor, TensorMeta

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_TORCH_BACKENDS: dict[str, ModuleType] = {"torch": torch_backend, "reference": reference}
# What the dispatcher includes by itself, out of inference mode and in it; dispatch modes, traces
# and the transforms of torch.func include more.
_BACKEND_SELECT = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_KEYS_WITHOUT_MODE = (
    _BACKEND_SELECT.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr(),
    _BACKEND_SELECT.raw_repr(),
)
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


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator ``forward``, past the dispatcher where that has nothing to add to the time."""
    inputs = (q, k, v, layout, pattern, scale, backend)
    if not _is_plain(q, k, v) or not (layout is None or _is_plain(layout)):
        return torch.ops.sparse_attn.forward.default(*inputs)
    if _needs_gradients(q, k, v):
        return _apply_forward(_forward, *inputs)
    return _forward(*inputs)


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether a call on them means work on their memory: no subclass, no lazy negative, no mode."""
    if torch.compiler.is_compiling() or tensors[0].is_meta:
        return False
    for x in tensors:
        if type(x) is not torch.Tensor or x.is_neg():
            return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    watched = torch._C._is_torch_function_mode_enabled() or torch.autograd._profiler_enabled()
    return keys in _KEYS_WITHOUT_MODE and not watched


def check(
    q: AnyTensor, k: AnyTensor, v: AnyTensor, pattern: Pattern, layout: AnyTensor | None
) -> None:
    """Raises on inputs that no backend takes, before any work; ``layout`` is the pattern's."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
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
    if layout is not None and layout.device != q.device:
        raise RuntimeError(
            f"the layout must be on the device of q, got {layout.device} and {q.device}"
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


def _scale(scale: float | None, q: AnyTensor) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else scale


class _Call(NamedTuple):
    """A call prepared for inputs of some shapes, strides, dtypes and a device."""

    run: Callable[..., None] | None  # takes inputs and outputs; None if there is nothing to do
    fallback: str | None  # why a CUDA call runs on the torch backend
    outputs: tuple[TensorMeta, ...]


_Key = tuple[Any, ...]


def _key(x: torch.Tensor) -> _Key:
    """The fields of a `TensorMeta`: a plain tuple takes less time to make."""
    return x.shape, x.stride(), x.dtype, x.device


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout_key = None if layout is None else _key(layout)
    call = _prepare_forward(_key(q), _key(k), _key(v), layout_key, pattern, scale, backend)
    if call.fallback is not None:
        warn_once(call.fallback)
    out_meta, lse_meta = call.outputs
    out, lse = out_meta.empty(), lse_meta.empty()
    if call.run is not None:
        call.run(q, k, v, layout, out, lse)
    return out, lse


torch.library.impl("sparse_attn::forward", "CompositeExplicitAutograd")(_forward)


@lru_cache(maxsize=1024)
def _prepare_forward(
    q_key: _Key,
    k_key: _Key,
    v_key: _Key,
    layout_key: _Key | None,
    spec: str,
    scale: float | None,
    backend: str | None,
) -> _Call:
    q, k, v = (TensorMeta(*key) for key in (q_key, k_key, v_key))
    layout = None if layout_key is None else TensorMeta(*layout_key)
    pattern = pattern_of(spec, None if layout is None else layout.without_memory())
    check(q, k, v, pattern, layout)
    name, fallback = choose_backend(q, k, v, pattern, backend)
    out, lse = (
        TensorMeta.of(x)._replace(device=q.device)
        for x in _empty_outputs(q.without_memory(), v.without_memory())
    )
    scale = _scale(scale, q)
    run: Callable[..., None] | None = None
    if lse.shape.numel() and name in _TORCH_BACKENDS:
        run = partial(_run_forward, _TORCH_BACKENDS[name], spec, scale)
    elif lse.shape.numel():
        run = cuda.ForwardCall(pattern, scale, q, k, v, out, sm90=name == "cuda_sm90")
    return _Call(run, fallback, (out, lse))


def _run_forward(
    backend: ModuleType,
    spec: str,
    scale: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    # Autocast has chosen the dtype of the inputs; the arithmetic is the backend's.
    with torch.autocast(q.device.type, enabled=False):
        backend.forward(q, k, v, pattern_of(spec, layout), scale, out, lse)


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
    check(q, k, v, pattern_of(pattern, layout), layout)
    return _empty_outputs(q, v)


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
    layout_key = None if layout is None else _key(layout)
    keys = _key(dout), _key(q), _key(k), _key(v), _key(out)
    call = _prepare_backward(*keys, layout_key, pattern, scale, backend)
    dq_meta, dk_meta, dv_meta = call.outputs
    dq, dk, dv = dq_meta.empty(), dk_meta.empty(), dv_meta.empty()
    if call.run is not None:
        call.run(dout, dlse, q, k, v, out, lse, layout, dq, dk, dv)
    return dq, dk, dv


torch.library.impl("sparse_attn::backward", "CompositeExplicitAutograd")(_backward)


@lru_cache(maxsize=1024)
def _prepare_backward(
    dout_key: _Key,
    q_key: _Key,
    k_key: _Key,
    v_key: _Key,
    out_key: _Key,
    layout_key: _Key | None,
    spec: str,
    scale: float | None,
    backend: str | None,
) -> _Call:
    dout, q, k, v, out = (TensorMeta(*x) for x in (dout_key, q_key, k_key, v_key, out_key))
    layout = None if layout_key is None else TensorMeta(*layout_key).without_memory()
    pattern = pattern_of(spec, layout)
    name, fallback = choose_backend(q, k, v, pattern, backend)
    dq, dk, dv = (
        TensorMeta.of(_empty(x.without_memory(), x.shape[3]))._replace(device=q.device)
        for x in (q, k, v)
    )
    scale = _scale(scale, q)
    run: Callable[..., None] | None = None
    if out.shape[:3].numel() and name in _TORCH_BACKENDS:
        run = partial(_run_backward, _TORCH_BACKENDS[name], spec, scale)
    elif out.shape[:3].numel():
        metas = dout, q, k, v, out, dq, dk, dv
        run = cuda.BackwardCall(pattern, scale, *metas, sm90=name == "cuda_sm90")
    return _Call(run, fallback, (dq, dk, dv))


def _run_backward(
    backend: ModuleType,
    spec: str,
    scale: float,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    pattern = pattern_of(spec, layout)
    with torch.autocast(q.device.type, enabled=False):
        backend.backward(dout, dlse, q, k, v, out, lse, pattern, scale, dq, dk, dv)


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


# Autograd, by hand: what ``torch.library.register_autograd`` makes takes several times as long.


def _forward_below_autograd(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sparse_attn.forward.default(*inputs)


def _backward_below_autograd(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sparse_attn.backward.default(*inputs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> Any:
        q, k, v, layout, *ctx.options = inputs
        out, lse = run(*inputs)
        ctx.save_for_backward(q, k, v, layout, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        q, k, v, layout, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        inputs = (dout, dlse, q, k, v, out, lse, layout, *ctx.options)
        # Compiled autograd takes the operator whole.
        compiling = torch.compiler.is_compiling()
        run = torch.ops.sparse_attn.backward.default if compiling else _differentiable_backward
        return None, *run(*inputs), None, None, None, None


# `Function.apply` asks first whether transforms are at work: 2.3 us, and `_is_plain` has answered.
_apply_forward = super(torch.autograd.Function, _Forward).apply


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> Any:
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sparse_attn.attention cannot be differentiated twice")


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def _differentiable_forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = inputs[:3]
    run = _forward if _is_plain(*tensors) else _forward_below_autograd
    return _Forward.apply(run, *inputs) if _needs_gradients(*tensors) else run(*inputs)


def _differentiable_backward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = [x for x in inputs[:7] if x is not None]
    run = _backward if _is_plain(*tensors) else _backward_below_autograd
    return _Backward.apply(run, *inputs) if _needs_gradients(*tensors) else run(*inputs)


torch.library.impl("sparse_attn::forward", "Autograd")(_differentiable_forward)
torch.library.impl("sparse_attn::backward", "Autograd")(_differentiable_backward)
