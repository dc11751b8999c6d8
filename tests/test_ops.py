# SPDX-License-Identifier: Apache-2.0
"""The operators: opcheck, torch.compile, autocast, streams, CUDA graphs, devices, the module."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import oracle
import sparse_attn as sa
from cases import make_tensor
from compare import assert_close, assert_same_bits

LENGTHS = (100, 128, 64, 257, 50, 333, 200)
PATTERNS = [
    sa.Strided(16),
    sa.Fixed(16, 4),
    sa.Fixed(16, 4, causal=False),
    sa.Chunk(16),
    sa.Summary(16, 4),
    sa.PerHead([sa.Local(5), sa.Strided(16), sa.Dilated(7), sa.Summary(9, 2)]),
]


def block_sparse(n: int, heads: int = 4, device: str = "cpu", causal: bool = True) -> Any:
    """Random blocks of 16; queries of the last block have none."""
    count = -(-n // 16)
    layout = torch.rand(heads, count, count, device=device) < 0.5
    layout[:, -1] = False
    return sa.BlockSparse(layout, 16, causal=causal)


def pattern_at(pattern: Any, n: int, device: str = "cpu") -> Any:
    """The pattern, or a new `BlockSparse` for ``n`` tokens where None stands for it."""
    return block_sparse(n, device=device) if pattern is None else pattern


def name_of(pattern: Any) -> str:
    return "blocks" if pattern is None else str(pattern)


def inputs(
    n: int = 100,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = False,
    layout: str = "head-major",
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return [
        make_tensor((2, heads, n, 64), layout, dtype, generator, device, around=0.0)
        .detach()
        .requires_grad_(requires_grad)
        for heads in (4, 2, 2)
    ]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# opcheck.


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("layout", ["head-major", "seq-major", "sliced", "dim-strided"])
@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[1], PATTERNS[5]], ids=str)
def test_opcheck_forward(pattern: Any, layout: str, backend: str | None, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = inputs(40, dtype, device, requires_grad=True, layout=layout)
    operator = torch.ops.sparse_attn.forward.default
    torch.library.opcheck(operator, (q, k, v, None, pattern.spec, None, backend))
    torch.library.opcheck(operator, (q, k.detach(), v, None, pattern.spec, 0.1, backend))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("heads", "causal"), [(1, False), (4, True)])
def test_opcheck_forward_of_a_layout(
    heads: int, causal: bool, backend: str | None, device: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = inputs(40, dtype, device, requires_grad=True)
    pattern = block_sparse(40, heads, device, causal)
    layout = pattern.layout if causal else pattern.layout.mT
    operator = torch.ops.sparse_attn.forward.default
    torch.library.opcheck(operator, (q, k, v, layout, pattern.spec, None, backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_opcheck_dtypes(dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and dtype in (torch.float32, torch.float64):
        pytest.skip("falls to torch, with a warning")
    q, k, v = inputs(20, dtype, device, requires_grad=True)
    operator = torch.ops.sparse_attn.forward.default
    torch.library.opcheck(operator, (q, k, v, None, PATTERNS[1].spec, None, None))


@pytest.mark.parametrize("size", [(0, 4, 20, 64), (2, 4, 0, 64)], ids=str)
def test_opcheck_zero_size(size: tuple[int, ...], device: str) -> None:
    q = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    operator = torch.ops.sparse_attn.forward.default
    torch.library.opcheck(operator, (q, q, q, None, PATTERNS[0].spec, None, None))


@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("layout", ["head-major", "seq-major", "sliced", "blocks"])
def test_opcheck_backward(layout: str, with_dlse: bool, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    has_blocks = layout == "blocks"
    q, k, v = inputs(40, dtype, device, layout="head-major" if has_blocks else layout)
    pattern: Any = block_sparse(40, device=device) if has_blocks else sa.Fixed(16, 4)
    out, lse = sa.attention(q, k, v, pattern, return_lse=True)
    dlse = torch.randn_like(lse) if with_dlse else None
    blocks = pattern.layout if has_blocks else None
    arguments = (torch.randn_like(out), dlse, q, k, v, out, lse, blocks, pattern.spec, None, None)
    torch.library.opcheck(torch.ops.sparse_attn.backward.default, arguments)


@pytest.mark.parametrize("head_dim_v", [64, 24])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
def test_fake_agrees_on_memory_order(axes: tuple[int, ...], head_dim_v: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = (2, 4, 30, 64)
    stored = torch.randn([sizes[axis] for axis in axes])
    q = stored.permute([axes.index(axis) for axis in range(4)])
    v = torch.randn(2, 4, 30, head_dim_v)
    real = sa.attention(q, q, v, PATTERNS[0], return_lse=True)
    with FakeTensorMode() as mode:
        fake_q, fake_v = mode.from_tensor(q), mode.from_tensor(v)
        fake = sa.attention(fake_q, fake_q, fake_v, PATTERNS[0], return_lse=True)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        assert a.device == b.device


def test_meta_tensors() -> None:
    """Shapes without data, as when a model is built on the meta device."""
    q = torch.empty(2, 4, 30, 64, device="meta")
    out, lse = sa.attention(q, q, q, PATTERNS[0], return_lse=True)
    assert out.is_meta and out.shape == q.shape
    assert lse.is_meta and lse.shape == q.shape[:3]


# torch.compile.


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_compile_seven_lengths(pattern: Any, requires_grad: bool) -> None:
    """No graph break, and at most 2 compilations; the same bits as without."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sa.attention(q, k, v, pattern, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in LENGTHS:
        eager_inputs = inputs(n, requires_grad=requires_grad)
        compiled_inputs = [x.detach().clone().requires_grad_(requires_grad) for x in eager_inputs]
        wanted, actual = function(*eager_inputs), compiled(*compiled_inputs)
        for name, a, b in zip(("out", "lse"), actual, wanted, strict=True):
            assert_same_bits(name, a, b)
        if not requires_grad:
            continue
        dout, dlse = torch.randn_like(wanted[0]), torch.randn_like(wanted[1])
        torch.autograd.backward(wanted, (dout, dlse))
        torch.autograd.backward(actual, (dout, dlse))
        for name, compiled_x, eager_x in zip("qkv", compiled_inputs, eager_inputs, strict=True):
            assert_same_bits(f"d{name}", compiled_x.grad, eager_x.grad)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_compile_with_a_layout(causal: bool, transposed: bool, device: str) -> None:
    """No graph break; the layout is an input, whose values may change without a compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(sa.attention, fullgraph=True, backend=counter)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for _ in range(3):
        eager_inputs = inputs(100, dtype, device, requires_grad=True)
        compiled_inputs = [x.detach().clone().requires_grad_() for x in eager_inputs]
        pattern = block_sparse(100, device=device, causal=causal)
        if transposed:
            pattern = sa.BlockSparse(pattern.layout.mT, 16, causal=causal)
            assert not pattern.layout.is_contiguous()
        q, k, v = eager_inputs
        wanted = sa.attention(q, k, v, pattern, return_lse=True)
        actual = compiled(*compiled_inputs, pattern, return_lse=True)
        for name, a, b in zip(("out", "lse"), actual, wanted, strict=True):
            assert_same_bits(name, a, b)
        dout, dlse = torch.randn_like(wanted[0]), torch.randn_like(wanted[1])
        torch.autograd.backward(wanted, (dout, dlse))
        torch.autograd.backward(actual, (dout, dlse))
        for name, compiled_x, eager_x in zip("qkv", compiled_inputs, eager_inputs, strict=True):
            assert_same_bits(f"d{name}", compiled_x.grad, eager_x.grad)
    assert counter.frame_count == 1


def test_compile_seven_lengths_of_layouts() -> None:
    """At most 2 compilations, as without a layout."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sa.attention, fullgraph=True, backend=counter)
    for n in LENGTHS:
        q, k, v = inputs(n)
        pattern = block_sparse(n)
        assert_same_bits("out", compiled(q, k, v, pattern), sa.attention(q, k, v, pattern))
    assert 1 <= counter.frame_count <= 2


def test_compile_with_a_layout_made_inside() -> None:
    def function(q: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return sa.attention(q, q, q, sa.BlockSparse(scores > 0, 16))

    q, scores = inputs(100)[0], torch.randn(4, 7, 7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits("out", compiled(q, scores), function(q, scores))


def test_compile_around_other_work() -> None:
    """Inside a larger graph, with the pattern chosen by the caller."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(x: torch.Tensor, pattern: Any) -> torch.Tensor:
        q, k, v = (x * 2).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        out = sa.attention(q, k, v, pattern)
        return out.transpose(1, 2).flatten(2).relu().sum()

    for n in LENGTHS:
        x = torch.randn(2, n, 3 * 4 * 64, requires_grad=True)
        function(x, PATTERNS[0]).backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    assert counter.frame_count <= 2


def test_compiled_autograd_takes_the_operator_whole() -> None:
    compiler = torch.compile(backend="eager", fullgraph=True)
    for n in LENGTHS:
        q, k, v = (x.requires_grad_() for x in inputs(n))
        wanted = torch.autograd.grad(sa.attention(q, k, v, PATTERNS[0]).sum(), (q, k, v))
        with torch._dynamo.compiled_autograd._enable(compiler):
            sa.attention(q, k, v, PATTERNS[0]).sum().backward()
        for name, x, gradient in zip("qkv", (q, k, v), wanted, strict=True):
            assert x.grad is not None
            assert_same_bits(f"d{name}", x.grad, gradient)


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[5]], ids=str)
def test_compile_module(pattern: Any) -> None:
    module = sa.SelfAttention(128, 4, pattern)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for n in LENGTHS:
        x = torch.randn(2, n, 128)
        assert_same_bits("out", compiled(x), module(x))
        compiled(x).sum().backward()
    assert counter.frame_count <= 2


def test_compile_merge() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sa.merge, fullgraph=True, backend=counter)
    for n in LENGTHS:
        parts = [torch.randn(2, 4, n, 64), torch.randn(2, 4, n)] * 2
        for a, b in zip(compiled(*parts), sa.merge(*parts), strict=True):
            assert_same_bits("merged", a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(dtype: torch.dtype) -> None:
    q, k, v = inputs()
    compiled = torch.compile(sa.attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        out = compiled(q, k, v, PATTERNS[0])
        assert out.dtype == dtype
        assert_same_bits("out", out, sa.attention(q, k, v, PATTERNS[0]))


@pytest.mark.gpu
def test_compile_on_a_gpu() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sa.attention, fullgraph=True, backend=counter)
    for n in LENGTHS:
        q, k, v = inputs(n, torch.bfloat16, "cuda", requires_grad=True)
        out = compiled(q, k, v, PATTERNS[0])
        assert_same_bits("out", out, sa.attention(q, k, v, PATTERNS[0]))
        out.sum().backward()
    assert counter.frame_count <= 2


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return sa.attention(q, q, q, PATTERNS[0])

    q = inputs()[0]
    exported = torch.export.export(Module(), (q,)).module()
    assert_same_bits("out", exported(q), sa.attention(q, q, q, PATTERNS[0]))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_autocast(pattern: Any, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        out, lse = sa.attention(q, k, v, pattern, return_lse=True)
        assert sa.which_backend(q, k, v, pattern).startswith("cuda") == (device == "cuda")
    assert out.dtype == dtype and lse.dtype == torch.float32
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    wanted = sa.attention(low[0], low[1], low[2], pattern, return_lse=True)
    assert_same_bits("out", out, wanted[0])
    assert_same_bits("lse", lse, wanted[1])
    dout = torch.randn_like(out)
    out.backward(dout)
    wanted[0].backward(dout)
    for x, low_x in zip((q, k, v), low, strict=True):
        assert x.grad is not None and low_x.grad is not None
        assert x.grad.dtype == torch.float32
        assert_same_bits("gradient", x.grad, low_x.grad.float())


def test_autocast_casts_mixed_inputs(device: str) -> None:
    """As after a linear layer under autocast: q in 16 bits, k and v still in 32."""
    q, k, v = inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = sa.attention(q.bfloat16(), k, v, PATTERNS[0])
    assert_same_bits(
        "out", out, sa.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), PATTERNS[0])
    )


def test_autocast_disabled(device: str) -> None:
    q, k, v = inputs(dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.float16, enabled=False):
        assert sa.attention(q, k, v, PATTERNS[0]).dtype == torch.bfloat16
    with torch.autocast("cuda" if device == "cpu" else "cpu", dtype=torch.bfloat16, enabled=False):
        assert sa.attention(q, k, v, PATTERNS[0]).dtype == torch.bfloat16


def test_autocast_module(device: str) -> None:
    module = sa.SelfAttention(128, 4, PATTERNS[0]).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = module(torch.randn(2, 30, 128, device=device))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# Autograd.


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_double_backward_raises(backend: str | None, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = inputs(30, dtype, device, requires_grad=True)
    out = sa.attention(q, k, v, PATTERNS[0], backend=backend)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sparse_attn.*twice"):
        dq.sum().backward()


@pytest.mark.parametrize("changed", ["k", "layout"])
def test_saved_tensors_are_checked_for_changes(changed: str) -> None:
    q, k, v = inputs(30, requires_grad=True)
    pattern = block_sparse(30)
    out = sa.attention(q, k, v, pattern)
    with torch.no_grad():
        (k if changed == "k" else pattern.layout).fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_layout_may_change_between_calls() -> None:
    """Nothing made from its values is kept."""
    q, k, v = inputs(60)
    pattern = block_sparse(60)
    before = sa.attention(q, k, v, pattern)
    pattern.layout.logical_not_()
    after = sa.attention(q, k, v, pattern)
    wanted = sa.attention(q, k, v, sa.BlockSparse(pattern.layout.clone(), 16))
    assert_same_bits("out", after, wanted)
    assert not after.equal(before)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_nothing_keeps_a_layout(backend: str | None, device: str) -> None:
    """Patterns are in caches, layouts are not: they may be large."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = inputs(50, dtype, device, requires_grad=True)
    pattern = block_sparse(50, device=device)
    layout = weakref.ref(pattern.layout)
    pattern.mask(50)
    pattern.keys_per_query(50)
    assert hash(pattern) and repr(pattern)
    sa.which_backend(q, k, v, pattern)
    sa.attention(q, k, v, pattern, backend=backend).sum().backward()
    assert layout() is not None
    del pattern
    gc.collect()
    assert layout() is None


def test_backward_twice_with_retained_graph() -> None:
    q, k, v = inputs(30, requires_grad=True)
    out = sa.attention(q, k, v, PATTERNS[1])
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    second = torch.autograd.grad(out.sum(), q)[0]
    assert_same_bits("dq", first, second)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_recomputation_gives_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = inputs(30, requires_grad=True)
    sa.attention(q, k, v, PATTERNS[1]).square().sum().backward()
    plain = [x.grad for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    out = checkpoint(sa.attention, q, k, v, PATTERNS[1], use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    out.square().sum().backward()
    for x, wanted in zip((q, k, v), plain, strict=True):
        assert_same_bits("gradient", x.grad, wanted)


def test_from_several_threads() -> None:
    import threading

    q, k, v = inputs(60)
    wanted = [sa.attention(q, k, v, pattern) for pattern in PATTERNS]
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        results[number] = sa.attention(q, k, v, PATTERNS[number])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PATTERNS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, out in enumerate(wanted):
        assert_same_bits("out", results[number], out)


# CUDA: streams, graphs, devices, the fallback.


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PATTERNS, None], ids=name_of)
def test_side_stream(pattern: Any) -> None:
    """Inputs come late on the side stream: only that stream's order makes them right."""
    q, k, v = inputs(1000, torch.bfloat16, "cuda")
    pattern = pattern_at(pattern, 1000, "cuda")
    wanted = sa.attention(q, k, v, pattern)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, math.nan) for x in (q, k, v)]
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, (q, k, v), strict=True):
            x.copy_(y)
        late = [x.requires_grad_() for x in late]
        out = sa.attention(late[0], late[1], late[2], pattern)
        out.sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits("out", out, wanted)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in late)


@pytest.mark.gpu
def test_late_layout_on_a_side_stream() -> None:
    """The lists of blocks are made in the order of the stream."""
    q, k, v = inputs(1000, torch.bfloat16, "cuda")
    pattern = block_sparse(1000, device="cuda")
    wanted = torch.autograd.grad(
        sa.attention(q.requires_grad_(), k, v, pattern, backend="cuda").sum(), q
    )[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layout = torch.zeros_like(pattern.layout)
        torch.cuda._sleep(50_000_000)
        layout.copy_(pattern.layout)
        late = sa.BlockSparse(layout, 16)
        dq = torch.autograd.grad(sa.attention(q, k, v, late, backend="cuda").sum(), q)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits("dq", dq, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PATTERNS, None], ids=name_of)
def test_cuda_graph(pattern: Any) -> None:
    q, k, v = inputs(500, torch.bfloat16, "cuda")
    pattern = pattern_at(pattern, 500, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sa.attention(q, k, v, pattern)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sa.attention(q, k, v, pattern, return_lse=True, backend="cuda")
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = sa.attention(q, k, v, pattern, return_lse=True, backend="cuda")
        assert_same_bits("out", out, wanted[0])
        assert_same_bits("lse", lse, wanted[1])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("pattern", [PATTERNS[1], PATTERNS[5], None], ids=name_of)
def test_no_synchronisation(pattern: Any) -> None:
    q, k, v = inputs(500, torch.bfloat16, "cuda", requires_grad=True)
    pattern = pattern_at(pattern, 500, "cuda")
    dout = torch.randn_like(sa.attention(q, k, v, pattern, backend="cuda"))
    try:
        torch.cuda.set_sync_debug_mode("error")
        sa.attention(q, k, v, pattern, backend="cuda").backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.two_gpus
@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_second_device(backend: str) -> None:
    """The current device is the first; the work belongs to the second."""
    q, k, v = inputs(200, torch.bfloat16, "cuda:0")
    wanted = sa.attention(q, k, v, PATTERNS[0], return_lse=True, backend=backend)
    other = [x.to("cuda:1").requires_grad_() for x in (q, k, v)]
    assert torch.cuda.current_device() == 0
    actual = sa.attention(
        other[0], other[1], other[2], PATTERNS[0], return_lse=True, backend=backend
    )
    assert torch.cuda.current_device() == 0
    for a, b in zip(actual, wanted, strict=True):
        assert a.device == torch.device("cuda:1")
        assert_same_bits("result", a.cpu(), b.cpu())
    actual[0].sum().backward()
    assert all(x.grad is not None and x.grad.device == x.device for x in other)


@pytest.mark.gpu
def test_fall_to_torch_warns_once() -> None:
    from sparse_attn import dispatch

    dispatch.warn_once.cache_clear()
    q, k, v = inputs(dtype=torch.float32, device="cuda")
    with pytest.warns(RuntimeWarning, match=r"torch.*float32"):
        out = sa.attention(q, k, v, PATTERNS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sa.attention(q, k, v, PATTERNS[0])
        sa.attention(q, k, v, PATTERNS[1], backend="torch")
        sa.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), PATTERNS[0])
    masks = [oracle.mask((("local", 16), ("dilated", 16)), True, 100)] * 4
    exact = oracle.attention(q, k, v, masks)
    low = oracle.attention(q, k, v, masks, rounding=torch.float32)
    assert_close("out", out, exact.out, low.out)
    dispatch.warn_once.cache_clear()


def test_warn_once_for_each_reason() -> None:
    from sparse_attn import dispatch

    dispatch.warn_once.cache_clear()
    for reason in ("first reason", "second reason"):
        with pytest.warns(RuntimeWarning, match=rf"torch.*{reason}"):
            dispatch.warn_once(reason)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.warn_once(reason)
    dispatch.warn_once.cache_clear()


def test_cpu_tensors_bring_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k, v = inputs(dtype=torch.bfloat16)
        sa.attention(q, k, v, PATTERNS[0])


@pytest.mark.gpu
def test_out_of_memory_leaves_a_usable_process() -> None:
    free, _ = torch.cuda.mem_get_info()
    n = 4096
    batch = free // (n * 64 * 2 * 3) + 1
    with pytest.raises(torch.OutOfMemoryError):
        q = torch.empty(batch, 1, n, 64, device="cuda", dtype=torch.bfloat16)
        kept = [q, torch.empty_like(q)]
        sa.attention(q, q, q, PATTERNS[0])
        kept.append(torch.empty_like(q))
    q = None  # type: ignore[assignment]
    kept = []
    torch.cuda.empty_cache()
    q, k, v = inputs(100, torch.bfloat16, "cuda")
    masks = [oracle.mask((("local", 16), ("dilated", 16)), True, 100)] * 4
    exact = oracle.attention(q, k, v, masks)
    low = oracle.attention(q, k, v, masks, rounding=torch.bfloat16)
    assert_close("out", sa.attention(q, k, v, PATTERNS[0]), exact.out, low.out)


# The module.


def attention_by_hand(module: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SelfAttention from its own projections, with the softmax over a mask."""
    names = {name: p.detach().double() for name, p in module.named_parameters()}
    qkv = x.double() @ names["qkv.weight"].T + names["qkv.bias"]
    q_width, k_width, v_width = module.widths
    heads = {"q": module.heads, "k": module.kv_heads, "v": module.kv_heads}
    parts = dict(zip("qkv", qkv.split([q_width, k_width, v_width], -1), strict=True))
    q, k, v = (
        part.view(*part.shape[:2], heads[name], -1).transpose(1, 2) for name, part in parts.items()
    )
    out = oracle.attention(q, k, v, [mask] * module.heads).out
    return out.transpose(1, 2).flatten(2) @ names["out.weight"].T + names["out.bias"]


@pytest.mark.parametrize(
    "options", [{}, {"qk_width": 32}, {"kv_heads": 2}, {"kv_heads": 1}], ids=str
)
def test_module_is_attention_between_projections(options: dict[str, Any]) -> None:
    module = sa.SelfAttention(64, 4, sa.Fixed(16, 4), **options).double()
    x = torch.randn(2, 50, 64, dtype=torch.float64)
    mask = oracle.mask((("chunk", 16), ("summary", 16, 4, 12)), True, 50)
    assert_close("out", module(x), attention_by_hand(module, x, mask))
    widths = options.get("qk_width", 64), options.get("kv_heads", 4)
    assert module.widths == [widths[0], widths[0] // 4 * widths[1], 16 * widths[1]]


def test_module_options() -> None:
    module = sa.SelfAttention(64, 4, PATTERNS[0], bias=False)
    assert not [name for name, _ in module.named_parameters() if "bias" in name]
    assert module(torch.randn(3, 1, 64)).shape == (3, 1, 64)
    assert module(torch.randn(3, 0, 64)).shape == (3, 0, 64)
    assert module(torch.randn(0, 5, 64)).shape == (0, 5, 64)


def test_module_is_causal() -> None:
    module = sa.SelfAttention(64, 4, PATTERNS[0])
    x = torch.randn(1, 40, 64)
    changed = x.clone()
    changed[:, 20:] = torch.randn(1, 20, 64)
    assert_same_bits("past", module(x)[:, :20], module(changed)[:, :20])
    assert not module(x)[:, 20:].equal(module(changed)[:, 20:])


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((64, 5, sa.Local(4)), ValueError),
        ((64, 0, sa.Local(4)), ValueError),
        ((64, -4, sa.Local(4)), ValueError),
        ((0, 4, sa.Local(4)), ValueError),
        ((64, 4.0, sa.Local(4)), TypeError),
        ((64, "4", sa.Local(4)), TypeError),
        ((64, True, sa.Local(4)), TypeError),
        ((64, 4, "strided:128"), TypeError),
        ((64, 4, sa.PerHead([sa.Local(4)] * 3)), ValueError),
        ((64, 4, sa.Local(4), 30), ValueError),
        ((64, 4, sa.Local(4), 0), ValueError),
        ((64, 4, sa.Local(4), None, 3), ValueError),
        ((64, 4, sa.Local(4), None, 0), ValueError),
        ((64, 4, sa.Local(4), None, 8), ValueError),
        ((1024, 2, sa.Local(4)), ValueError),
    ],
    ids=str,
)
def test_module_refuses(arguments: tuple[Any, ...], kind: type[Exception]) -> None:
    """When it is built, not at the first call."""
    with pytest.raises(kind):
        sa.SelfAttention(*arguments)


@pytest.mark.parametrize("shape", [(50, 64), (2, 50, 63), (2, 2, 50, 64)], ids=str)
def test_module_input(shape: tuple[int, ...]) -> None:
    module = sa.SelfAttention(64, 4, PATTERNS[0])
    with pytest.raises(ValueError, match=r"\(batch, seq, (width|64)\)") as raised:
        module(torch.randn(shape))
    assert str(tuple(shape)) in str(raised.value)


def test_module_copies_and_pickles() -> None:
    module = sa.SelfAttention(64, 4, PATTERNS[1])
    x = torch.randn(2, 20, 64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits("out", other(x), module(x))
    other = sa.SelfAttention(64, 4, PATTERNS[1])
    other.load_state_dict(module.state_dict())
    assert_same_bits("out", other(x), module(x))


@pytest.mark.filterwarnings("ignore:sparse_attn runs on the torch backend")
def test_module_takes_its_layout_along(device: str) -> None:
    layout = torch.rand(4, 3, 3) < 0.5
    module = sa.SelfAttention(64, 4, sa.BlockSparse(layout, 16))
    x = torch.randn(2, 40, 64)
    expected = module(x)
    assert "layout" not in module.state_dict()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits("out", other(x), expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert_same_bits("compiled", compiled(x), expected)
    moved = copy.deepcopy(module).to(device, torch.float64)
    assert isinstance(moved.pattern, sa.BlockSparse)
    assert moved.pattern.layout.device.type == device
    assert moved.pattern.layout.dtype == torch.bool
    built = sa.SelfAttention(64, 4, sa.BlockSparse(layout.to(device), 16)).to(device, torch.float64)
    built.load_state_dict(module.state_dict())
    x = x.to(device, torch.float64)
    assert_same_bits("moved", moved(x), built(x))
    assert module.pattern.layout is layout  # type: ignore[attr-defined]
    on_meta = module.to("meta")
    assert on_meta.pattern.layout.device.type == "meta"  # type: ignore[attr-defined]


# Documentation.


@pytest.mark.parametrize("name", ["attention", "merge", "which_backend", "parse_pattern"])
def test_examples_in_the_documentation(name: str) -> None:
    import doctest

    function: Callable[..., Any] = getattr(sa, name)
    names = {**vars(sa), "torch": torch, "sa": sa}
    finder = doctest.DocTestFinder(recurse=False)
    examples = [test for test in finder.find(function, name, globs=names) if test.examples]
    assert examples, f"{name} shows no example"
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", sa.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(sa, name)
    if not isinstance(public, str):
        assert (public.__doc__ or "").strip()
