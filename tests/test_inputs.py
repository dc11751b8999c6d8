# SPDX-License-Identifier: Apache-2.0
"""Bad input: the right kind of error, what came and what is wanted, and a process that goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import oracle
import sparse_attn as sa
from compare import assert_close

PATTERN = sa.Strided(16)
BLOCKS = sa.BlockSparse(torch.ones(1, 1, 1, dtype=torch.bool), 64)
SMALL_BLOCKS = sa.BlockSparse(torch.ones(1, 3, 3, dtype=torch.bool), 16)


def tensors(
    q: tuple[int, ...] = (2, 4, 33, 64),
    k: tuple[int, ...] = (2, 2, 33, 64),
    v: tuple[int, ...] = (2, 2, 33, 64),
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(q).to(dtype), torch.randn(k).to(dtype), torch.randn(v).to(dtype)


@pytest.fixture(autouse=True)
def still_usable() -> Iterator[None]:
    """A right call after the bad one."""
    yield
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    mask = oracle.mask((("local", 3), ("dilated", 3)), True, 20)
    assert_close(
        "out", sa.attention(q, k, v, sa.Strided(3)), oracle.attention(q, k, v, [mask] * 2).out
    )


def refused(
    kind: type[BaseException],
    words: list[str],
    call: Callable[..., Any],
    *arguments: Any,
    **named: Any,
) -> None:
    """``call`` raises ``kind``, and its message holds all the words."""
    with pytest.raises(kind) as raised:
        call(*arguments, **named)
    assert raised.type is kind, f"{raised.type}, wanted {kind}"
    message = str(raised.value)
    for word in words:
        assert re.search(word, message), f"no {word!r} in: {message}"


@pytest.fixture(params=["attention", "which_backend"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Both look at the inputs in the same way."""
    return getattr(sa, request.param)


# Shapes.

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[str]]] = {
    "rank 3": ((4, 33, 64), (2, 33, 64), (2, 33, 64), ["4", r"\(4, 33, 64\)"]),
    "q of rank 3": ((4, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), ["4", r"\(4, 33, 64\)"]),
    "k of rank 3": ((2, 4, 33, 64), (2, 33, 64), (2, 2, 33, 64), ["4", r"\(2, 33, 64\)"]),
    "rank 5": ((1, 2, 4, 33, 64),) * 3 + (["4", r"\(1, 2, 4, 33, 64\)"],),
    "v of rank 5": (
        (2, 4, 33, 64),
        (2, 2, 33, 64),
        (1, 2, 2, 33, 64),
        ["4", r"\(1, 2, 2, 33, 64\)"],
    ),
    "rank 0": ((), (), (), ["4", r"\(\)"]),
    "batch": ((2, 4, 33, 64), (3, 2, 33, 64), (3, 2, 33, 64), ["batch", "2", "3"]),
    "batch of v": ((2, 4, 33, 64), (2, 2, 33, 64), (3, 2, 33, 64), ["batch", "2", "3"]),
    "batch 1 of k": ((2, 4, 33, 64), (1, 2, 33, 64), (1, 2, 33, 64), ["batch", "2", "1"]),
    "batch 1 of q": ((1, 4, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), ["batch", "2", "1"]),
    "seq": ((2, 4, 33, 64), (2, 2, 34, 64), (2, 2, 34, 64), ["seq", "33", "34"]),
    "seq of v": ((2, 4, 33, 64), (2, 2, 33, 64), (2, 2, 34, 64), ["seq", "33", "34"]),
    "seq 1 of q": ((2, 4, 1, 64), (2, 2, 33, 64), (2, 2, 33, 64), ["seq", "33", "1"]),
    "seq 1 of k": ((2, 4, 33, 64), (2, 2, 1, 64), (2, 2, 1, 64), ["seq", "33", "1"]),
    "heads of k and v": ((2, 4, 33, 64), (2, 2, 33, 64), (2, 4, 33, 64), ["heads", "2", "4"]),
    "heads 1 of v": ((2, 4, 33, 64), (2, 2, 33, 64), (2, 1, 33, 64), ["heads", "2", "1"]),
    "heads not divisible": ((2, 4, 33, 64), (2, 3, 33, 64), (2, 3, 33, 64), ["heads", "4", "3"]),
    "more kv_heads": ((2, 2, 33, 64), (2, 4, 33, 64), (2, 4, 33, 64), ["heads", "2", "4"]),
    "no kv_heads": ((2, 4, 33, 64), (2, 0, 33, 64), (2, 0, 33, 64), ["heads", "4", "0"]),
    "head_dim": ((2, 4, 33, 64), (2, 2, 33, 32), (2, 2, 33, 64), ["head_dim", "64", "32"]),
    "head_dim 1 of k": ((2, 4, 33, 64), (2, 2, 33, 1), (2, 2, 33, 64), ["head_dim", "64", "1"]),
    "head_dim over 256": ((1, 1, 33, 257),) * 3 + (["head_dim", "256", "257"],),
    "head_dim 264": ((1, 1, 33, 264), (1, 1, 33, 264), (1, 1, 33, 64), ["head_dim", "256", "264"]),
    "head_dim_v over 256": (
        (1, 1, 33, 64),
        (1, 1, 33, 64),
        (1, 1, 33, 257),
        ["head_dim", "256", "257"],
    ),
    "batch of q with n 0": ((2, 4, 0, 64), (3, 2, 0, 64), (3, 2, 0, 64), ["batch", "2", "3"]),
}


@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(shapes: str, call: Callable[..., Any]) -> None:
    q, k, v, words = SHAPES[shapes]
    refused(ValueError, words, call, *tensors(q, k, v), PATTERN)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_on_a_forced_backend(shapes: str, backend: str) -> None:
    q, k, v, words = SHAPES[shapes]
    refused(ValueError, words, sa.attention, *tensors(q, k, v), PATTERN, backend=backend)


@pytest.mark.parametrize("shapes", ["rank 3", "batch 1 of k", "seq", "heads not divisible"])
def test_shapes_under_compile(shapes: str) -> None:
    """Tracing gives the words too, and no wrong graph."""
    q, k, v, words = SHAPES[shapes]
    compiled = torch.compile(sa.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception) as raised:
        compiled(*tensors(q, k, v), PATTERN)
    for word in words:
        assert re.search(word, str(raised.value))
    torch.compiler.reset()


@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_per_head_of_the_wrong_length(heads: int, call: Callable[..., Any]) -> None:
    pattern = sa.PerHead([sa.Local(3)] * heads)
    words = ["PerHead", rf"\b{heads}\b", r"\b4\b"]
    refused(ValueError, words, call, *tensors(), pattern)


# Layouts of blocks.


def layout_of(heads: int, blocks: int) -> torch.Tensor:
    return torch.ones(heads, blocks, blocks, dtype=torch.bool)


@pytest.mark.parametrize("blocks", [0, 1, 2, 4, 33])
@pytest.mark.parametrize("heads", [1, 4])
def test_layout_for_another_length(heads: int, blocks: int, call: Callable[..., Any]) -> None:
    """33 tokens are 3 blocks of 16."""
    pattern = sa.BlockSparse(layout_of(heads, blocks), 16)
    words = ["33 tokens", "blocks of 16", r"\b3 blocks", rf"\({heads}, {blocks}, {blocks}\)"]
    refused(ValueError, words, call, *tensors(), pattern)


def test_layout_for_no_tokens(call: Callable[..., Any]) -> None:
    shape = (2, 4, 0, 64)
    words = ["0 tokens", r"\b0 blocks", r"\(1, 1, 1\)"]
    refused(
        ValueError, words, call, *tensors(shape, shape, shape), sa.BlockSparse(layout_of(1, 1), 16)
    )


@pytest.mark.parametrize("heads", [2, 3, 5, 8])
def test_layout_for_another_number_of_heads(heads: int, call: Callable[..., Any]) -> None:
    """Of the query heads, 4, not of the 2 heads of keys and values."""
    words = ["layout", rf"\({heads}, 3, 3\)", "4 heads"]
    refused(ValueError, words, call, *tensors(), sa.BlockSparse(layout_of(heads, 3), 16))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_layout_on_a_forced_backend(backend: str | None) -> None:
    pattern = sa.BlockSparse(layout_of(1, 4), 16)
    refused(ValueError, ["33 tokens"], sa.attention, *tensors(), pattern, backend=backend)
    pattern = sa.BlockSparse(layout_of(3, 3), 16)
    refused(ValueError, ["4 heads"], sa.attention, *tensors(), pattern, backend=backend)


def test_layout_on_another_device(call: Callable[..., Any]) -> None:
    pattern = sa.BlockSparse(layout_of(1, 3).to("meta"), 16)
    refused(RuntimeError, ["layout", "device", "meta", "cpu"], call, *tensors(), pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "cuda", "torch", "reference"])
def test_layout_on_the_cpu_for_cuda_inputs(backend: str | None) -> None:
    q, k, v = (x.to("cuda") for x in tensors(dtype=torch.bfloat16))
    pattern = sa.BlockSparse(layout_of(1, 3), 16)
    words = ["layout", "device", "cpu", "cuda"]
    refused(RuntimeError, words, sa.attention, q, k, v, pattern, backend=backend)


@pytest.mark.parametrize("blocks", [2, 4])
def test_layout_under_compile(blocks: int) -> None:
    compiled = torch.compile(sa.attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"33 tokens in blocks of 16"):
        compiled(*tensors(), sa.BlockSparse(layout_of(1, blocks), 16))
    torch.compiler.reset()


def test_block_sparse_that_cuda_cannot_run() -> None:
    pattern = sa.BlockSparse(layout_of(1, 3), 16)
    refused(RuntimeError, ["cuda", "cpu"], sa.attention, *tensors(), pattern, backend="cuda")


def test_module_of_a_layout_for_other_heads() -> None:
    """When it is built, not at the first call."""
    for heads in (1, 4):
        sa.SelfAttention(64, 4, sa.BlockSparse(layout_of(heads, 3), 16))
    words = [r"\(3, 3, 3\)", "4 heads"]
    refused(ValueError, words, sa.SelfAttention, 64, 4, sa.BlockSparse(layout_of(3, 3), 16))


# Types and dtypes.


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_dtypes(dtype: torch.dtype, call: Callable[..., Any]) -> None:
    words = [str(dtype).removeprefix("torch."), "float16", "bfloat16", "float32", "float64"]
    refused(TypeError, words, call, *tensors(dtype=dtype), PATTERN)


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_mixed_dtypes(odd: int, dtype: torch.dtype, call: Callable[..., Any]) -> None:
    mixed = list(tensors())
    mixed[odd] = mixed[odd].to(dtype)
    words = [str(dtype).removeprefix("torch."), "float32"]
    refused(TypeError, words, call, *mixed, PATTERN)


@pytest.mark.parametrize("odd", ["q", "k", "v"])
@pytest.mark.parametrize(
    "value", [None, 3.0, "q", np.zeros((2, 4, 33, 64), dtype=np.float32), [[1.0]]]
)
def test_not_a_tensor(odd: str, value: Any, call: Callable[..., Any]) -> None:
    arguments: dict[str, Any] = dict(zip("qkv", tensors(), strict=True))
    arguments[odd] = value
    words = [rf"\b{odd}\b", "Tensor", type(value).__name__]
    refused(TypeError, words, call, *arguments.values(), PATTERN)


@pytest.mark.parametrize("odd", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensor(odd: str, layout: torch.layout, call: Callable[..., Any]) -> None:
    parts = [torch.randn(33, 4, 64), torch.randn(20, 4, 64)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    arguments: dict[str, Any] = dict(zip("qkv", tensors(), strict=True))
    arguments.update(dict.fromkeys(odd, nested))
    refused(TypeError, ["[Nn]ested", rf"\b{odd[0]}\b"], call, *arguments.values(), PATTERN)


@pytest.mark.parametrize("odd", ["q", "k", "v", "qkv"])
def test_dtensor(odd: str, call: Callable[..., Any]) -> None:
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch.distributed is not available")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        arguments: dict[str, Any] = dict(zip("qkv", tensors(), strict=True))
        for name in odd:
            arguments[name] = distribute_tensor(arguments[name], mesh)
        refused(TypeError, ["DTensor", rf"\b{odd[0]}\b"], call, *arguments.values(), PATTERN)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "pattern", [None, "strided:128", 128, torch.ones(33, 33), sa.Local, [PATTERN]]
)
def test_not_a_pattern(pattern: Any, call: Callable[..., Any]) -> None:
    refused(TypeError, ["pattern"], call, *tensors(), pattern)


@pytest.mark.parametrize("scale", ["0.1", True, [0.1], torch.tensor(0.1), 1j])
def test_scale_of_a_wrong_type(scale: Any) -> None:
    refused(TypeError, ["scale"], sa.attention, *tensors(), PATTERN, scale=scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_not_finite(scale: float) -> None:
    refused(ValueError, ["scale", str(scale)], sa.attention, *tensors(), PATTERN, scale=scale)


# Devices and backends.


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_mixed_devices(odd: int, call: Callable[..., Any]) -> None:
    mixed = list(tensors())
    mixed[odd] = mixed[odd].to("meta")
    refused(RuntimeError, ["device", "cpu", "meta"], call, *mixed, PATTERN)


@pytest.mark.gpu
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_mixed_cuda_and_cpu(odd: int, call: Callable[..., Any]) -> None:
    mixed = list(tensors(dtype=torch.bfloat16))
    mixed[odd] = mixed[odd].to("cuda")
    refused(RuntimeError, ["device", "cpu", "cuda"], call, *mixed, PATTERN)


@pytest.mark.parametrize("backend", ["", "CUDA", "triton", "sdpa", "cuda_sm999"])
def test_no_such_backend(backend: str) -> None:
    words = ["backend", repr(backend), "cuda", "torch", "reference"]
    refused(ValueError, words, sa.attention, *tensors(), PATTERN, backend=backend)


@pytest.mark.parametrize("backend", [0, True, b"torch", torch.device("cpu")])
def test_backend_of_a_wrong_type(backend: Any) -> None:
    refused(TypeError, ["backend"], sa.attention, *tensors(), PATTERN, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [33, 0])
def test_cuda_on_cpu_tensors(dtype: torch.dtype, n: int) -> None:
    shape = (2, 4, n, 64)
    q, k, v = tensors(shape, shape, shape, dtype)
    refused(RuntimeError, ["cuda", "cpu"], sa.attention, q, k, v, PATTERN, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (torch.float32, 64, ["float32", "float16", "bfloat16"]),
        (torch.float64, 64, ["float64", "float16", "bfloat16"]),
        (torch.bfloat16, 65, ["65", "8"]),
        (torch.float16, 9, ["9", "8"]),
    ],
)
def test_cuda_cannot_run(dtype: torch.dtype, head_dim: int, words: list[str]) -> None:
    q = torch.randn(2, 4, 33, head_dim, device="cuda", dtype=dtype)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        sa.attention(q, q, q, PATTERN, backend="cuda")
    for word in words:
        assert word in str(raised.value)


def old_driver(version: int) -> Callable[[], int]:
    return lambda: version


@pytest.mark.parametrize(("version", "text"), [(12080, r"12\.8"), (12090, r"12\.9"), (0, "driver")])
def test_driver_too_old(version: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query is stubbed, and so are the tensors: no GPU is needed to meet an old driver."""
    from sparse_attn import dispatch
    from sparse_attn.backends import cuda

    built = SimpleNamespace(
        build_info=lambda: {"architectures": "80-real;90-real;80-virtual"},
        head_dims=lambda: [(64, 64)],
        max_chunks=4,
    )
    monkeypatch.setattr(cuda, "native", lambda: built)
    monkeypatch.setattr(cuda, "driver_version", old_driver(version))
    q: Any = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 4, 33, 64)
    )
    words = [text, "driver", "13.0|580"]
    refused(RuntimeError, words, dispatch.choose_backend, q, q, q, PATTERN, "cuda")
    name, reason = dispatch.choose_backend(q, q, q, PATTERN)
    assert name == "torch" and reason is not None and re.search(text, reason)


@pytest.mark.parametrize(
    ("capability", "head_dim", "pattern", "backend", "wanted"),
    [
        ((9, 0), 64, PATTERN, None, "cuda_sm90"),
        ((9, 0), 64, PATTERN, "cuda", "cuda_sm90"),
        ((9, 0), 64, PATTERN, "cuda_sm80", "cuda_sm80"),
        ((9, 0), 32, PATTERN, None, "cuda_sm80"),
        ((9, 0), 64, BLOCKS, None, "cuda_sm90"),
        ((9, 0), 64, SMALL_BLOCKS, None, "cuda_sm80"),
        ((8, 0), 64, PATTERN, "cuda", "cuda_sm80"),
        ((10, 0), 64, PATTERN, None, "cuda_sm80"),
        ((8, 9), 64, PATTERN, "cuda_sm90", r"backend='cuda_sm90'.*8\.9.*9\.0"),
        ((9, 0), 32, PATTERN, "cuda_sm90", r"backend='cuda_sm90'.*head_dim 32"),
        ((9, 0), 64, SMALL_BLOCKS, "cuda_sm90", r"backend='cuda_sm90'.*16.*64"),
        ((7, 5), 64, PATTERN, "cuda_sm80", r"backend='cuda_sm80'.*7\.5.*8\.0"),
    ],
)
def test_which_kernels(
    capability: tuple[int, int],
    head_dim: int,
    pattern: Any,
    backend: str | None,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU, the build and the tensors are stubbed."""
    from sparse_attn import dispatch
    from sparse_attn.backends import cuda

    built = SimpleNamespace(
        build_info=lambda: {"architectures": "80-real;90-real;80-virtual;90a-real"},
        head_dims=lambda: [(32, 32), (64, 64)],
        sm90_fits=lambda head_dim, head_dim_v: 32 < head_dim <= 64,
        max_chunks=4,
    )
    monkeypatch.setattr(cuda, "native", lambda: built)
    monkeypatch.setattr(cuda, "driver_version", lambda: 13000)
    monkeypatch.setattr(cuda, "_capability", lambda device: capability)
    cuda._no_kernel.cache_clear()
    q: Any = SimpleNamespace(
        is_cuda=True,
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        shape=(2, 4, 33, head_dim),
    )
    if "=" in wanted:
        with pytest.raises(RuntimeError, match=wanted):
            dispatch.choose_backend(q, q, q, pattern, backend)
    else:
        assert dispatch.choose_backend(q, q, q, pattern, backend) == (wanted, None)
    cuda._no_kernel.cache_clear()


@pytest.mark.gpu
def test_driver_too_old_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_attn import dispatch
    from sparse_attn.backends import cuda

    monkeypatch.setattr(cuda, "driver_version", old_driver(12080))
    dispatch.warn_once.cache_clear()
    q = torch.randn(2, 4, 33, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"driver.*12\.8"):
        sa.attention(q, q, q, PATTERN, backend="cuda")
    assert sa.which_backend(q, q, q, PATTERN) == "torch"
    with pytest.warns(RuntimeWarning, match=r"torch backend.*12\.8"):
        sa.attention(q, q, q, PATTERN)
    dispatch.warn_once.cache_clear()


def test_native_module_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_attn import dispatch
    from sparse_attn.backends import cuda

    def missing() -> Any:
        raise ImportError("no module named _C")

    monkeypatch.setattr(cuda, "native", missing)
    q: Any = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 4, 33, 64)
    )
    refused(RuntimeError, ["native"], dispatch.choose_backend, q, q, q, PATTERN, "cuda")
    assert dispatch.choose_backend(q, q, q, PATTERN)[0] == "torch"


# Derivatives.


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_double_backward(backend: str | None) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = sa.attention(q, k, v, PATTERN, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    refused(RuntimeError, ["twice|double backward|second"], dq.sum().backward)


def test_double_backward_of_lse() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    _, lse = sa.attention(q, k, v, PATTERN, return_lse=True)
    (dq,) = torch.autograd.grad(lse.sum(), q, create_graph=True)
    refused(RuntimeError, ["twice|double backward|second"], torch.autograd.grad, dq.sum(), k)


# merge.


def parts(**shapes: tuple[int, ...]) -> list[torch.Tensor]:
    whole = {"out1": (2, 4, 33, 64), "lse1": (2, 4, 33), "out2": (2, 4, 33, 64), "lse2": (2, 4, 33)}
    return [torch.randn(shape) for shape in {**whole, **shapes}.values()]


@pytest.mark.parametrize(
    "shapes",
    [
        {"out2": (2, 4, 33, 32)},
        {"out2": (2, 1, 33, 64)},
        {"out2": (4, 33, 64)},
        {"lse1": (2, 4, 33, 1)},
        {"lse2": (2, 4, 1)},
        {"lse1": (2, 4, 34), "lse2": (2, 4, 34)},
        {"out1": (2, 4, 33), "out2": (2, 4, 33)},
    ],
    ids=str,
)
def test_merge_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    words = [re.escape(str(shape)) for shape in shapes.values()]
    refused(ValueError, ["merge|out1", *words], sa.merge, *parts(**shapes))


@pytest.mark.parametrize("odd", range(4))
@pytest.mark.parametrize("value", [None, 3.0, [[1.0]]])
def test_merge_of_no_tensors(odd: int, value: Any) -> None:
    arguments: list[Any] = parts()
    arguments[odd] = value
    refused(TypeError, ["Tensor", type(value).__name__], sa.merge, *arguments)


@pytest.mark.parametrize("odd", range(4))
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_merge_dtypes(odd: int, dtype: torch.dtype) -> None:
    arguments = parts()
    arguments[odd] = arguments[odd].to(dtype)
    refused(TypeError, [str(dtype).removeprefix("torch.")], sa.merge, *arguments)


# Missing extras.


def in_a_process_without(modules: str, code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys; sys.modules.update(dict.fromkeys({modules.split()!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120
    )


def test_plot_without_matplotlib() -> None:
    code = """
import sparse_attn as sa
try:
    sa.Strided(4).plot(16)
except ImportError as error:
    print(error)
"""
    result = in_a_process_without("matplotlib matplotlib.pyplot matplotlib.figure", code)
    assert result.returncode == 0, result.stderr
    assert re.search(r"pip install .?sparse-attn\[plot\]", result.stdout)
