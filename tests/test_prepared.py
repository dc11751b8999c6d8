# SPDX-License-Identifier: Apache-2.0
"""Calls that are prepared once and remembered: none is taken for another, nothing is kept alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import oracle
import sparse_attn as sa
from compare import assert_close, assert_same_bits
from sparse_attn import _ops
from sparse_attn.backends import cuda
from sparse_attn.tensor_meta import TensorMeta

CACHES = (_ops._prepare_forward, _ops._prepare_backward)


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def tensors(
    shape: tuple[int, ...] = (2, 4, 37, 24), dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def seq_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """Every other row, head and column of a larger tensor."""
    larger = torch.full([2 * size for size in x.shape], float("nan"), dtype=x.dtype)
    view = larger[::2, ::2, ::2, ::2]
    return view.copy_(x)


BASE: dict[str, Any] = {"pattern": sa.Strided(7), "scale": None, "backend": None}
OTHERS: dict[str, dict[str, Any]] = {
    "strides of q": {"q": seq_major},
    "strides of k": {"k": every_other},
    "strides of v": {"v": seq_major},
    "head_dim_v": {"v": lambda v: v[..., :9]},
    "kv_heads": {"k": lambda k: k[:, :2], "v": lambda v: v[:, :2]},
    "batch": {name: lambda x: x[:1] for name in "qkv"},
    "seq": {name: lambda x: x[:, :, :31] for name in "qkv"},
    "dtype": {name: lambda x: x.to(torch.float64) for name in "qkv"},
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0},
    "scale 1": {"scale": 1},
    "pattern of the same sizes": {"pattern": sa.Local(7) | sa.Chunk(7)},
    "causal": {"pattern": sa.Strided(7, causal=False)},
    "heads": {"pattern": sa.PerHead([sa.Local(7), sa.Dilated(7)] * 2)},
    "backend": {"backend": "reference"},
}


def call(change: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    torch.manual_seed(5)
    inputs = [change.get(name, torch.clone)(x) for name, x in zip("qkv", tensors(), strict=True)]
    return inputs, {**BASE, **{name: change[name] for name in BASE if name in change}}


def results(change: dict[str, Any]) -> list[torch.Tensor]:
    """out, lse and the gradients, the gradient of out with strides of its own."""
    inputs, options = call(change)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = sa.attention(leaves[0], leaves[1], leaves[2], return_lse=True, **options)
    dout = change.get("q", torch.clone)(torch.randn(out.shape, dtype=out.dtype))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, lse))]


@pytest.mark.parametrize("name", OTHERS)
def test_a_remembered_call_is_not_taken_for_another(name: str) -> None:
    """Each after the other gives what it gives with nothing remembered."""
    changes: list[dict[str, Any]] = [{}, OTHERS[name]]
    wanted = []
    for change in changes:
        for cache in CACHES:
            cache.cache_clear()
        wanted.append(results(change))
    for order in ((0, 1), (1, 0), (0, 1)):
        for number in order:
            for x, y in zip(results(changes[number]), wanted[number], strict=True):
                assert x.stride() == y.stride()
                assert_same_bits(name, x, y)
    assert all(cache.cache_info().hits > 0 for cache in CACHES)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_layouts_of_one_shape(backend: str | None) -> None:
    """Other values, other strides, one layout for all heads: prepared alike or not, never mixed."""
    q, k, v = tensors(dtype=torch.float64)
    layout = torch.rand(4, 3, 3) < 0.5
    layouts = [layout, ~layout, layout.mT, layout[:1], layout.clone()]
    for blocks in (*layouts, *reversed(layouts)):
        pattern = sa.BlockSparse(blocks, 16)
        wanted = oracle.attention(q, k, v, list(pattern.mask(37).expand(4, 37, 37))).out
        assert_close("out", sa.attention(q, k, v, pattern, backend=backend), wanted)
    assert _ops._prepare_forward.cache_info().misses == 3


def test_requires_grad_may_change() -> None:
    q, k, v = tensors()
    wanted = sa.attention(q, k, v, sa.Strided(7))
    for wants in ((True, False), (False, False), (False, True), (True, True)):
        q, v = q.detach().requires_grad_(wants[0]), v.detach().requires_grad_(wants[1])
        out = sa.attention(q, k, v, sa.Strided(7))
        assert out.requires_grad == any(wants)
        assert_same_bits("out", out.detach(), wanted)
        with torch.no_grad():
            assert not sa.attention(q, k, v, sa.Strided(7)).requires_grad
        if any(wants):
            out.sum().backward()
            assert (q.grad is not None, v.grad is not None) == wants
    assert _ops._prepare_forward.cache_info().misses == 1


def test_the_operator_and_the_function_have_the_same_gradients() -> None:
    """The function takes a shorter way through autograd."""
    leaves = [x.requires_grad_() for x in tensors()]
    q, k, v = leaves
    pattern = sa.Fixed(7, 2)
    short = sa.attention(q, k, v, pattern, return_lse=True)
    long = torch.ops.sparse_attn.forward(q, k, v, None, pattern.spec, None, None)
    douts = [torch.randn_like(x) for x in short]
    for a, b in zip(short, long, strict=True):
        assert_same_bits("output", a.detach(), b.detach())
    for a, b in zip(
        torch.autograd.grad(short, leaves, douts),
        torch.autograd.grad(long, leaves, douts),
        strict=True,
    ):
        assert_same_bits("gradient", a, b)


def test_errors_come_again() -> None:
    q, k, v = tensors()
    for _ in range(2):
        with pytest.raises(ValueError, match="PerHead"):
            sa.attention(q, k, v, sa.PerHead([sa.Local(3)] * 3))
        with pytest.raises(RuntimeError, match="cuda"):
            sa.attention(q, k, v, sa.Local(3), backend="cuda")
    sa.attention(q, k, v, sa.Local(3))


# The dispatcher is passed by only where it has nothing to do.


def test_a_dispatch_mode_sees_the_call() -> None:
    seen: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = tensors()
    with Spy():
        sa.attention(q, k, v, sa.Local(3))
        sa.attention(q.requires_grad_(), k, v, sa.Local(3)).sum().backward()
    assert seen.count("sparse_attn.forward.default") == 2
    assert seen.count("sparse_attn.backward.default") == 1


def test_a_mode_of_the_backward_pass_alone() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = sa.attention(q, k, v, sa.Local(3))
    with FlopCounterMode(display=False):
        out.sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = sa.attention(q, k, v, sa.Local(3))
    assert isinstance(fake, FakeTensor)


def test_a_trace_records_the_operator() -> None:
    q, k, v = tensors()

    def function(q: torch.Tensor) -> torch.Tensor:
        return sa.attention(q, k, v, sa.Local(3))

    for pre_dispatch in (False, True):
        graph = make_fx(function, pre_dispatch=pre_dispatch)(q).graph
        targets = [str(node.target) for node in graph.nodes]
        assert "sparse_attn.forward.default" in targets
    many = torch.func.vmap(function)(torch.stack((q, -q)))
    assert_same_bits("vmap", many[1], function(-q))


def test_a_subclass_sees_the_call() -> None:
    seen: list[str] = []

    class Spy(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = tensors()
    out = sa.attention(q, k.as_subclass(Spy), v, sa.Local(3))
    assert "sparse_attn.forward.default" in seen
    assert_same_bits("out", out.as_subclass(torch.Tensor), sa.attention(q, k, v, sa.Local(3)))


def test_a_profile_shows_the_operators() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.autograd.profiler.profile() as profile:
        sa.attention(q, k, v, sa.Local(3)).sum().backward()
    names = {event.name for event in profile.function_events or ()}
    assert {"sparse_attn::forward", "sparse_attn::backward"} <= names


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode: Any) -> None:
    q, k, v = tensors()
    wanted = sa.attention(q, k, v, sa.Strided(7))
    with mode():
        out = sa.attention(q.requires_grad_(), k, v, sa.Strided(7))
    assert not out.requires_grad and out.is_inference() == (mode is torch.inference_mode)
    assert_same_bits("out", out, wanted)


def test_lazy_negatives() -> None:
    """Views that stand for the negative of their memory, of an input and of a gradient."""
    q, k, v = tensors()
    lazy = torch.complex(q, q).conj().imag
    assert lazy.is_neg()
    wanted = sa.attention(-q, k, v.requires_grad_(), sa.Local(3))
    assert_same_bits("out", sa.attention(lazy, k, v, sa.Local(3)), wanted)
    for dout in (lazy, -q):
        (dv,) = torch.autograd.grad(wanted, v, dout, retain_graph=True)
        assert_same_bits("dv", dv, torch.autograd.grad(wanted, v, -q, retain_graph=True)[0])


def test_memory_is_bounded() -> None:
    q, k, v = tensors((1, 1, 3, 8))
    for number in range(1100):
        sa.attention(q, k, v, sa.Local(2), scale=1 / (number + 1))
    info = _ops._prepare_forward.cache_info()
    assert info.misses == 1100 and info.maxsize is not None and info.currsize <= info.maxsize
    for cache in (_ops._prepare_backward, cuda._forward_launches, cuda._backward_launches):
        assert cache.cache_info().maxsize is not None


def test_nothing_keeps_a_tensor() -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    out, lse = sa.attention(leaves[0], leaves[1], leaves[2], sa.Strided(7), return_lse=True)
    out.sum().backward()
    kept = [weakref.ref(x) for x in (*leaves, *(x.grad for x in leaves), out, lse)]
    del leaves, out, lse
    gc.collect()
    assert [x() for x in kept] == [None] * len(kept)


# What the native module is told, without a GPU.


@dataclass
class RecordedCall:
    launches: list[dict[str, Any]]
    calls: list[tuple[list[Any], tuple[int, ...]]]
    counters: int = 3

    def __call__(self, *addresses: int) -> None:
        self.calls.append((self.launches, addresses))


class Recorder:
    """Stands for the native module: launches are dicts, calls are noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], tuple[int, ...]]] = []

    def CallParams(self, **params: Any) -> dict[str, Any]:
        return params

    BlockRowsParams = CallParams

    def ForwardParams(self, call: dict[str, Any], branches: Any) -> dict[str, Any]:
        return {**call, "branches": branches}

    def BackwardParams(self, call: dict[str, Any], **params: Any) -> dict[str, Any]:
        return {**call, **params}

    def ForwardCall(self, launches: list[dict[str, Any]]) -> Any:
        return RecordedCall(launches, self.calls)

    def Gradients(self, ranges: list[tuple[dict[str, Any], Any]]) -> Any:
        return SimpleNamespace(ranges=ranges, launches=[], keeps_stats=True, workspace=0)

    def BackwardCall(self, gradients: Any) -> Any:
        return lambda *addresses: self.calls.append((gradients.ranges, addresses))

    def SequenceView(self, **view: Any) -> Any:
        return view

    Run = SequenceView

    def Branch(self, *parts: Any) -> Any:
        def with_blocks(**sizes: Any) -> Any:
            return SimpleNamespace(parts=parts, sizes=sizes)

        return SimpleNamespace(parts=parts, sizes={}, with_blocks=with_blocks)

    def block_rows(self, params: dict[str, Any]) -> None:
        self.calls.append(([params], (params["layout"][0], params["rows"])))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    caches = (cuda._forward_launches, cuda._backward_launches, cuda._native_plan)
    made = Recorder()
    monkeypatch.setattr(cuda, "native", lambda: made)
    monkeypatch.setattr(cuda, "_stream", lambda device: 77)
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


def forward(
    inputs: list[torch.Tensor], pattern: Any, scale: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = inputs
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), torch.empty(q.shape[:3])
    metas = (TensorMeta.of(x) for x in (q, k, v, out))
    layout = pattern.layout if isinstance(pattern, sa.BlockSparse) else None
    cuda.ForwardCall(pattern, scale, *metas, sm90=True)(q, k, v, layout, out, lse)
    return out, lse


def test_one_native_call_for_all_branches_and_heads(recorder: Recorder) -> None:
    inputs = tensors(dtype=torch.float16)
    pattern = sa.PerHead([sa.Strided(7), sa.Strided(7), sa.Local(5), sa.Summary(5, 2)])
    out, lse = forward(inputs, pattern)
    ((launches, addresses),) = recorder.calls
    *given, blocks, counters, stream = addresses
    assert given == [x.data_ptr() for x in (*inputs, out, lse)]
    assert blocks == 0 and counters != 0 and stream == 77
    ranges = [(x["first_head"], x["head_count"], len(x["branches"])) for x in launches]
    assert ranges == [(0, 2, 2), (2, 1, 1), (3, 1, 1)]
    assert all(x["sm90"] and x["scale"] == 0.5 and not x["bfloat16"] for x in launches)


def test_what_is_not_aligned_is_copied(recorder: Recorder) -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    strided = every_other(k)
    forward([q, k, v], sa.Local(5))
    forward([shifted, strided, seq_major(v)], sa.Local(5))
    (_, straight), (launches, copied) = recorder.calls
    assert straight[:3] == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert all(address % 16 == 0 for address in copied[:5])
    assert shifted.data_ptr() != copied[0] and strided.data_ptr() != copied[1]
    contiguous = q.stride()[:3]
    assert [launches[0][name] for name in "qkv"] == [contiguous, contiguous, (3552, 24, 96)]


def test_other_strides_are_other_launches(recorder: Recorder) -> None:
    inputs = tensors(dtype=torch.float16)
    forward(inputs, sa.Local(5))
    forward([seq_major(x) for x in inputs], sa.Local(5))
    forward(inputs, sa.Local(5))
    first, second, third = (launches for launches, _ in recorder.calls)
    assert first is third and first[0]["q"] != second[0]["q"]


@pytest.mark.parametrize("heads", [1, 4])
def test_a_layout_is_read_anew_by_every_call(recorder: Recorder, heads: int) -> None:
    inputs = tensors(dtype=torch.float16)
    for _ in range(2):
        pattern = sa.BlockSparse(torch.ones(heads, 3, 3, dtype=torch.bool), 16)
        forward(inputs, pattern)
        (_, (layout, rows)), (launches, addresses) = recorder.calls[-2:]
        assert layout == pattern.layout.data_ptr() and addresses[5] == rows != 0
        stride = 3 if heads == 4 else 0
        assert launches[0]["branches"][0].sizes == {"rows": 0, "words": 1, "head_stride": stride}
    layout_kept = weakref.ref(pattern.layout)
    del pattern
    gc.collect()
    assert layout_kept() is None


def test_one_native_call_for_a_backward_pass(recorder: Recorder) -> None:
    """Head 1 differs from head 0, which shares its keys: gradients of their own, then the sum."""
    q, k, v = tensors(dtype=torch.float16)
    k, v = k[:, :2], v[:, :2]
    pattern = sa.PerHead([sa.Local(5), sa.Summary(5, 2), sa.Local(5), sa.Local(5)])
    out, lse = q.clone(), torch.randn(q.shape[:3])
    dq, dk, dv = (torch.full_like(x, 9.0) for x in (q, k, v))
    dlse = torch.randn(2, 37, 4).transpose(1, 2)
    dout = torch.ones(()).half().expand(q.shape)  # as from sum().backward()
    metas = (TensorMeta.of(x) for x in (dout, q, k, v, out, dq, dk, dv))
    call = cuda.BackwardCall(pattern, 0.5, *metas, sm90=False)
    for _ in range(2):
        call(dout, dlse, q, k, v, out, lse, None, dq, dk, dv)
    (ranges, addresses), (again, _) = recorder.calls
    assert ranges == again
    assert all(x["dout"] == q.stride()[:3] for x, _ in ranges) and addresses[0] != dout.data_ptr()
    assert addresses[1:6] == tuple(x.data_ptr() for x in (q, k, v, out, lse))
    assert addresses[8] == dq.data_ptr() and addresses[9] != dk.data_ptr()
    assert addresses[11:] == (0, 0, 0, 77)
    assert [(x["first_head"], x["head_count"]) for x, _ in ranges] == [(0, 1), (1, 1), (2, 2)]
    assert all(x["heads_together"] == 1 for x, _ in ranges)
    for head, (_, branches) in enumerate(ranges):
        assert branches == cuda.native_plan(pattern.patterns[head], 37)
