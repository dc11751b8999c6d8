# SPDX-License-Identifier: Apache-2.0
"""attention forward and backward against the oracle, on every backend."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

import oracle
import sparse_attn as sa
from cases import (
    Case,
    Inputs,
    a_block_case,
    a_case,
    all_pairs_cases,
    block_cases,
    make_inputs,
    make_tensor,
    to_pattern,
)
from compare import assert_close, assert_same_bits

CASES = all_pairs_cases()
BLOCK_CASES = block_cases()
RESULTS = ("out", "lse", "dq", "dk", "dv")

# What the native kernels must run: multiples of 8 within one of these.
NATIVE_HEAD_DIMS = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (64, 128))
NATIVE_DTYPES = (torch.float16, torch.bfloat16)

BACKENDS = [
    ("cpu", "torch"),
    ("cpu", "reference"),
    pytest.param(("cuda", "torch"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "reference"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),  # the fastest that can run
    pytest.param(("cuda", "cuda_sm80"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def device_backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend); a case that has no kernel is skipped, but where that is what is tested."""
    device, backend = request.param
    case = request.node.callspec.params.get("case")
    refusal_tested = request.function is test_matches_the_oracle
    if backend.startswith("cuda") and case and not runs_natively(case) and not refusal_tested:
        pytest.skip(f"no native kernel for {case}")
    return device, backend


@lru_cache(maxsize=1)
def expected(case: Case, seed: int, device: str) -> tuple[oracle.Result, oracle.Result | None]:
    """The oracle's results in fp64 and rounded to the dtype of the case."""
    x = make_inputs(case, seed, device)
    arguments = (x.q, x.k, x.v, case.masks, None, x.dout, x.dlse)
    exact = oracle.attention(*arguments)
    if case.dtype == torch.float64:
        return exact, None
    return exact, oracle.attention(*arguments, rounding=case.dtype)


def run(
    x: Inputs, pattern: Any, backend: str | None, scale: float | None = None
) -> dict[str, torch.Tensor | None]:
    """All five results, by autograd through the public function."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v))
    out, lse = sa.attention(q, k, v, pattern, scale=scale, return_lse=True, backend=backend)
    torch.autograd.backward((out, lse), (x.dout, x.dlse))
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def assert_all_close(
    actual: Mapping[str, torch.Tensor | None],
    exact: oracle.Result,
    low: oracle.Result | None,
) -> None:
    for name, tensor in actual.items():
        rounded = None if low is None else getattr(low, name)
        assert_close(name, tensor, getattr(exact, name), rounded)


def assert_right(
    actual: Mapping[str, torch.Tensor | None],
    x: Inputs,
    masks: list[torch.Tensor],
    scale: float | None = None,
) -> None:
    """The results of a call, by the tolerance rule."""
    arguments = (x.q, x.k, x.v, masks, scale, x.dout, x.dlse)
    exact = oracle.attention(*arguments)
    low = None
    if x.q.dtype != torch.float64:
        low = oracle.attention(*arguments, rounding=x.q.dtype)
    assert_all_close(actual, exact, low)


def assert_matches_oracle(
    x: Inputs,
    pattern: Any,
    masks: list[torch.Tensor],
    backend: str | None,
    scale: float | None = None,
) -> None:
    """One call checked on the spot."""
    assert_right(run(x, pattern, backend, scale), x, masks, scale)


def native_head_dims(head_dim: int, head_dim_v: int) -> bool:
    fits = any(head_dim <= qk and head_dim_v <= value for qk, value in NATIVE_HEAD_DIMS)
    return fits and head_dim % 8 == head_dim_v % 8 == 0


def runs_natively(case: Case) -> bool:
    return native_head_dims(*case.head_dims) and case.dtype in NATIVE_DTYPES


def fixed_case(**changes: Any) -> Case:
    return a_case(**{"kind": "fixed", "columns": "quarter", "offset": "default", **changes})


# Special inputs run on these: one branch, two branches, two segments, one head dim per path.
KEY_CASES = [
    a_case(),
    a_case(dtype=torch.bfloat16),
    fixed_case(dtype=torch.float16),
    fixed_case(causal=False, dtype=torch.float64),
    a_case(kind="chunk", causal=False, dtype=torch.bfloat16),
    a_case(kind="summary", columns="1", offset="default", dtype=torch.bfloat16),
    a_case(kind="heads:mixed", columns="quarter", offset="0", dtype=torch.float16),
]
KEY_BLOCK_CASES = [
    a_block_case(dtype=torch.bfloat16),
    a_block_case(block=16, blocks="gaps", causal=False, dtype=torch.float16),
    a_block_case(block=64, blocks="gaps", n=193, dtype=torch.float64),
]
SPECIAL_CASES = [*KEY_CASES, *KEY_BLOCK_CASES]


@pytest.mark.parametrize("case", [c for c in CASES if c.n <= 65 and c.n % 2], ids=str)
def test_oracle_gradients_are_those_of_autograd(case: Case, seed: int) -> None:
    x = make_inputs(case, seed)
    q, k, v = (t.double().detach().requires_grad_() for t in (x.q, x.k, x.v))
    scale = case.head_dims[0] ** -0.5
    out, lse = oracle.attention_by_autograd(q, k, v, case.masks, scale)
    dlse = x.dlse.double().masked_fill(lse == -math.inf, 0)
    torch.autograd.backward((out, lse), (x.dout.double(), dlse))
    exact = oracle.attention(x.q, x.k, x.v, case.masks, None, x.dout, x.dlse)
    actual = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    assert_all_close(actual, exact, None)


def test_oracle_of_one_softmax_by_hand() -> None:
    q = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 1, 2, 1)
    k = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([5.0, 7.0], dtype=torch.float64).view(1, 1, 2, 1)
    mask = torch.tensor([[False, False], [True, True]])
    result = oracle.attention(q, k, v, [mask], scale=0.5)
    weight = math.exp(4) / (math.exp(3) + math.exp(4))
    assert result.out.flatten().tolist() == pytest.approx([0, 5 + 2 * weight])
    assert result.lse.flatten().tolist() == pytest.approx(
        [-math.inf, math.log(math.exp(3) + math.exp(4))]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_comparison_fails_on_planted_errors(dtype: torch.dtype) -> None:
    reference = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    reference[0, 0, 0] = -math.inf
    low = None if dtype == torch.float64 else reference.to(dtype)
    good = reference.to(dtype)
    assert_close("good", good, reference, low)
    step = 1e-8 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps

    off = good.clone()
    off[1, 2, 49, 7] += 4 * step
    with pytest.raises(AssertionError, match=r"off: .*99\..*% of 2400 .*\(1, 2, 49, 7\)|off \("):
        assert_close("off", off, reference, low)
    for value in (math.nan, math.inf, -math.inf):
        planted = good.clone()
        planted[1, 0, 3, 2] = value
        with pytest.raises(AssertionError, match=r"other places.*\(1, 0, 3, 2\)"):
            assert_close("planted", planted, reference, low)
    filled = good.clone()
    filled[0, 0, 0] = -1e4
    with pytest.raises(AssertionError, match="-inf in other places"):
        assert_close("filled", filled, reference, low)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("short", good[:1], reference, low)
    with pytest.raises(AssertionError, match="nothing came back"):
        assert_close("none", None, reference, low)


@pytest.mark.parametrize("case", [c for c in KEY_CASES if c.dtype != torch.float64], ids=str)
def test_comparison_fails_on_small_faults(case: Case, seed: int) -> None:
    """In results that are exact but for one fault, and rounded."""
    x = make_inputs(case, seed)
    exact, low = expected(case, seed, "cpu")
    head = max(range(case.heads[0]), key=lambda head: int(case.masks[head].sum(-1).max()))
    keys = case.masks[head].sum(-1)
    query = int(keys.masked_fill(keys < 2, case.n + 1).argmin())
    one_less = [mask.clone() for mask in case.masks]
    one_less[head][query, int(one_less[head][query].nonzero()[0])] = False
    off = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[case.dtype]
    scale = (1 + off) * case.head_dims[0] ** -0.5
    faults = {
        "none": oracle.attention(x.q, x.k, x.v, case.masks, None, x.dout, x.dlse),
        "a key left out": oracle.attention(x.q, x.k, x.v, one_less, None, x.dout, x.dlse),
        "scale": oracle.attention(x.q, x.k, x.v, case.masks, scale, x.dout, x.dlse),
        "no dlse": oracle.attention(x.q, x.k, x.v, case.masks, None, x.dout),
    }
    for fault, result in faults.items():
        stored = {
            name: getattr(result, name).to(torch.float32 if name == "lse" else case.dtype)
            for name in RESULTS
        }
        with nullcontext() if fault == "none" else pytest.raises(AssertionError, match="within"):
            assert_all_close(stored, exact, low)


def test_bits_differ() -> None:
    x = torch.randn(5)
    assert_same_bits("x", x, x.clone())
    with pytest.raises(AssertionError, match="1 of 5"):
        assert_same_bits("x", x, x + torch.tensor([0, 0, 1, 0, 0]))
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_same_bits("zero", torch.zeros(1), -torch.zeros(1))


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_reference_rounding_is_the_rounded_oracle(case: Case, seed: int) -> None:
    """The reference backend with ``rounding`` makes errors like the oracle's, and none in fp64."""
    from sparse_attn.backends.reference import attention

    x = make_inputs(case, seed)
    exact, low = expected(case, seed, "cpu")
    scale = case.head_dims[0] ** -0.5
    masks = case.masks
    mask = torch.stack(masks) if case.per_head else masks[0]
    out, lse = attention(x.q, x.k, x.v, mask, scale)
    assert out.dtype == lse.dtype == torch.float64
    assert_close("out", out, exact.out)
    assert_close("lse", lse, exact.lse)
    if low is None:
        return
    out, lse = attention(x.q, x.k, x.v, mask, scale, dtype=torch.float32, rounding=case.dtype)
    assert_close("out", out.to(case.dtype), exact.out, low.out)
    error = (out.double() - exact.out).abs().max()
    assert error > (low.out.double() - exact.out).abs().max() / 8


# Every pair of values.


@pytest.mark.parametrize("case", [*CASES, *BLOCK_CASES], ids=str)
def test_matches_the_oracle(case: Case, device_backend: tuple[str, str], session_seed: int) -> None:
    device, backend = device_backend
    seed = zlib.crc32(f"{session_seed}:{case}".encode())
    x = make_inputs(case, seed, device)
    if backend.startswith("cuda") and not runs_natively(case):
        assert sa.which_backend(x.q, x.k, x.v, case.pattern_on(device)) == "torch"
        came = str(case.dtype) if case.dtype not in NATIVE_DTYPES else str(case.head_dims[0])
        with pytest.raises((RuntimeError, TypeError, ValueError), match=rf"cuda.*\b{came}\b"):
            sa.attention(x.q, x.k, x.v, case.pattern_on(device), backend="cuda")
        return
    exact, low = expected(case, seed, device)
    actual = run(x, case.pattern_on(device), backend)
    assert_all_close(actual, exact, low)
    out, lse = actual["out"], actual["lse"]
    assert out is not None and lse is not None
    assert out.dtype == case.dtype and out.device.type == device
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert [actual[name].dtype for name in ("dq", "dk", "dv")] == [case.dtype] * 3  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:sparse_attn runs on the torch backend")
@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_default_backend(case: Case, device: str, seed: int) -> None:
    x = make_inputs(case, seed, device)
    wanted = "cuda" if device == "cuda" and runs_natively(case) else "torch"
    assert sa.which_backend(x.q, x.k, x.v, case.pattern_on(device)).startswith(wanted)
    for name, tensor in run(x, case.pattern_on(device), None).items():
        assert_same_bits(name, tensor, run(x, case.pattern_on(device), wanted)[name])


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_without_lse(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    alone = sa.attention(x.q, x.k, x.v, case.pattern_on(device), backend=backend)
    assert isinstance(alone, torch.Tensor)
    out, _ = sa.attention(x.q, x.k, x.v, case.pattern_on(device), return_lse=True, backend=backend)
    assert_same_bits("out", alone, out)


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_same_bits_twice(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    first, second = (
        run(x, case.pattern_on(device), backend),
        run(x, case.pattern_on(device), backend),
    )
    for name in RESULTS:
        assert_same_bits(name, first[name], second[name])


# Special inputs.


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_gradient_of_stride_zero(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    """out.sum().backward() brings a dout whose strides are all 0."""
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out = sa.attention(q, k, v, case.pattern_on(device), backend=backend)
    out.sum().backward()
    arguments = (x.q, x.k, x.v, case.masks, None, torch.ones_like(x.dout))
    exact = oracle.attention(*arguments)
    low = None
    if case.dtype != torch.float64:
        low = oracle.attention(*arguments, rounding=case.dtype)
    actual = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    assert_all_close(actual, exact, low)


@pytest.mark.parametrize("expanded", ["heads", "batch", "seq"])
@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_expanded_keys(
    case: Case, expanded: str, device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    axis = {"batch": 0, "heads": 1, "seq": 2}[expanded]
    heads = case.heads[0]

    def expand(tensor: torch.Tensor) -> torch.Tensor:
        sizes = list(tensor.shape)
        sizes[1] = heads if axis == 1 else sizes[1]
        return tensor.narrow(axis, 0, 1).expand(sizes)

    wide = Inputs(x.q, expand(x.k), expand(x.v), x.dout, x.dlse)
    assert_matches_oracle(wide, case.pattern_on(device), case.masks, backend)


@pytest.mark.parametrize("expanded", ["dq", "dout", "all"])
def test_expanded_queries(expanded: str, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    case = fixed_case(dtype=torch.bfloat16)
    x = make_inputs(case, seed, device)
    q, dout = x.q, x.dout
    if expanded in ("dq", "all"):
        q = q[:, :1].expand_as(q)
    if expanded in ("dout", "all"):
        dout = dout[:, :, :, :1].expand_as(dout)
    assert_matches_oracle(
        Inputs(q, x.k, x.v, dout, x.dlse), case.pattern_on(device), case.masks, backend
    )


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_misaligned_slices(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    """q[..., 1:65] starts between two 16-byte words."""
    device, backend = device_backend
    x = make_inputs(case, seed, device)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.pad(tensor, (1, 7), value=math.nan)
        return wide[..., 1 : 1 + tensor.shape[-1]]

    slices = Inputs(shifted(x.q), shifted(x.k), shifted(x.v), shifted(x.dout), x.dlse)
    assert slices.q.stride(2) == 72 and slices.q.storage_offset() == 1
    assert_matches_oracle(slices, case.pattern_on(device), case.masks, backend)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize(
    "case", [KEY_CASES[0], KEY_CASES[2], KEY_CASES[5], KEY_BLOCK_CASES[0]], ids=str
)
def test_some_inputs_require_grad(
    case: Case, wanted: str, device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    whole = run(x, case.pattern_on(device), backend)
    tensors = {name: getattr(x, name).detach() for name in "qkv"}
    for name in wanted:
        tensors[name].requires_grad_()
    out, lse = sa.attention(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        case.pattern_on(device),
        return_lse=True,
        backend=backend,
    )
    torch.autograd.backward((out, lse), (x.dout, x.dlse))
    for name in "qkv":
        if name in wanted:
            assert_same_bits(f"d{name}", tensors[name].grad, whole[f"d{name}"])
        else:
            assert tensors[name].grad is None


def test_no_input_requires_grad(device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(a_case(dtype=torch.bfloat16), seed, device)
    out, lse = sa.attention(x.q, x.k, x.v, sa.Strided(16), return_lse=True, backend=backend)
    assert not out.requires_grad and not lse.requires_grad
    q = x.q.clone().requires_grad_()
    with torch.no_grad():
        assert not sa.attention(q, x.k, x.v, sa.Strided(16), backend=backend).requires_grad


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_one_output_used(case: Case, used: str, device_backend: tuple[str, str], seed: int) -> None:
    """The gradient of the other output is then absent, not zero."""
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    dout = x.dout if used == "out" else torch.zeros_like(x.dout)
    dlse = x.dlse if used == "lse" else torch.zeros_like(x.dlse)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = sa.attention(q, k, v, case.pattern_on(device), return_lse=True, backend=backend)
    if used == "out":
        out.backward(x.dout)
    else:
        lse.backward(x.dlse)
    arguments = (x.q, x.k, x.v, case.masks, None, dout, dlse)
    exact = oracle.attention(*arguments)
    low = None
    if case.dtype != torch.float64:
        low = oracle.attention(*arguments, rounding=case.dtype)
    grads = {"dq": q.grad, "dk": k.grad, "dv": v.grad}
    if used == "lse":
        if v.grad is not None:
            assert v.grad.abs().max() == 0
        del grads["dv"]
    assert_all_close(grads, exact, low)


@pytest.mark.parametrize("scale", [0, 0.0, -0.3, -1, 2.0, 1e-20])
@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_scale(case: Case, scale: float, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    assert_matches_oracle(x, case.pattern_on(device), case.masks, backend, scale)


@pytest.mark.parametrize("case", SPECIAL_CASES, ids=str)
def test_large_scores(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    """Scores of a few hundred: exp overflows unless the maximum is subtracted."""
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    assert_matches_oracle(x, case.pattern_on(device), case.masks, backend, scale=8.0)


SHAPES = {
    "batch 0": (0, 4, 2, 33, 64, 64),
    "n 0": (2, 4, 2, 0, 64, 64),
    "batch 0, n 0": (0, 4, 2, 0, 64, 64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [sa.Strided(16), sa.Fixed(16, 4), sa.Summary(16, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_size(
    pattern: Any, shape: str, dtype: torch.dtype, device_backend: tuple[str, str]
) -> None:
    device, backend = device_backend
    if backend.startswith("cuda") and dtype not in NATIVE_DTYPES:
        pytest.skip("no native kernel for fp32")
    batch, heads, kv_heads, n, head_dim, head_dim_v = SHAPES[shape]
    options: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
    q = torch.randn(batch, heads, n, head_dim, **options)
    k = torch.randn(batch, kv_heads, n, head_dim, **options)
    v = torch.randn(batch, kv_heads, n, head_dim_v, **options)
    out, lse = sa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert out.shape == (batch, heads, n, head_dim_v) and out.dtype == dtype
    assert lse.shape == (batch, heads, n) and lse.dtype == torch.float32
    (out.sum() + lse.sum()).backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_queries_without_a_key(
    n: int, dtype: torch.dtype, device_backend: tuple[str, str], seed: int
) -> None:
    """Output 0, lse -inf, zero gradients, even where dlse is NaN; the other rows are as ever."""
    device, backend = device_backend
    case = a_case(kind="summary", n=n, columns="1", offset="default", dtype=dtype)
    if backend.startswith("cuda") and not runs_natively(case):
        pytest.skip("no native kernel for this dtype")
    pattern = sa.Summary(8, 2)
    mask = oracle.mask((("summary", 8, 2, 6),), True, n)
    empty = ~mask.any(-1)
    assert empty.sum() == min(n, 6)
    x = make_inputs(case, seed, device)
    poisoned = x.dlse.clone()
    poisoned[:, :, : min(n, 6)] = math.nan
    x = Inputs(x.q, x.k, x.v, x.dout, poisoned)
    assert_matches_oracle(x, pattern, [mask] * 4, backend)
    result = run(x, pattern, backend)
    out, lse, dq = result["out"], result["lse"], result["dq"]
    assert out is not None and lse is not None and dq is not None
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -math.inf).all()
    assert (dq[:, :, empty] == 0).all()


def test_no_query_has_a_key(device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(a_case(dtype=torch.bfloat16, n=50), seed, device)
    result = run(x, sa.Summary(64, 8), backend)
    for name in ("out", "dq", "dk", "dv"):
        tensor = result[name]
        assert tensor is not None and (tensor == 0).all(), name
    assert (result["lse"] == -math.inf).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["sliced", "misaligned", "dim-strided"])
@pytest.mark.parametrize(
    "case", [*SPECIAL_CASES, *(c for c in CASES if c.layout == "sliced" and c.n <= 257)], ids=str
)
def test_neighbours_of_a_slice_change_no_bit(
    case: Case, layout: str, device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    if backend.startswith("cuda") and not runs_natively(case):
        pytest.skip("no native kernel for this case")
    case = replace(case, layout=layout)
    around_nan = run(
        make_inputs(case, seed, device, around=math.nan), case.pattern_on(device), backend
    )
    around_zero = run(make_inputs(case, seed, device, around=0.0), case.pattern_on(device), backend)
    for name in RESULTS:
        assert_same_bits(name, around_nan[name], around_zero[name])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("columns", ["1", "quarter", "all-1"])
@pytest.mark.parametrize("offset", ["default", "0", "middle"])
def test_keys_that_no_query_sees_change_no_bit(
    columns: str, offset: str, causal: bool, device_backend: tuple[str, str], seed: int
) -> None:
    """A key outside every query's set may hold NaN: a summary's other columns."""
    device, backend = device_backend
    case = a_case(
        kind="summary", columns=columns, offset=offset, causal=causal, dtype=torch.bfloat16
    )
    x = make_inputs(case, seed, device)
    unseen = ~case.masks[0].any(0).to(device)
    assert unseen.any()
    k, v = x.k.clone(), x.v.clone()
    k[:, :, unseen] = math.nan
    v[:, :, unseen] = math.nan
    clean = run(x, case.pattern_on(device), backend)
    poisoned = run(Inputs(x.q, k, v, x.dout, x.dlse), case.pattern_on(device), backend)
    for name in RESULTS:
        assert_same_bits(name, clean[name], poisoned[name])


# Layouts of blocks.


def nan_in_new_memory(backend: str) -> AbstractContextManager[None]:
    """What a kernel does not write is NaN then."""
    from test_gpu_corners import poisoned_memory

    return poisoned_memory() if backend.startswith("cuda") else nullcontext()


@pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", ["gaps", "heads"])
@pytest.mark.parametrize("block", [16, 64])
def test_queries_without_a_block(
    block: int,
    blocks: str,
    causal: bool,
    dtype: torch.dtype,
    device_backend: tuple[str, str],
    seed: int,
) -> None:
    """Output 0, lse -inf, zero gradients, even where dlse is NaN; the other rows are as ever."""
    device, backend = device_backend
    case = a_block_case(block=block, blocks=blocks, causal=causal, n=193, dtype=dtype)
    if backend.startswith("cuda") and not runs_natively(case):
        pytest.skip("no native kernel for this dtype")
    empty = ~torch.stack(case.masks).any(-1)  # (heads, seq)
    assert empty.any() and not empty.all()
    assert empty.equal(empty[:1].expand_as(empty)) == (blocks == "gaps")
    x = make_inputs(case, seed, device)
    poisoned = x.dlse.clone()
    poisoned[:, empty] = math.nan
    x = Inputs(x.q, x.k, x.v, x.dout, poisoned)
    assert_matches_oracle(x, case.pattern_on(device), case.masks, backend)
    result = run(x, case.pattern_on(device), backend)
    out, lse, dq = result["out"], result["lse"], result["dq"]
    assert out is not None and lse is not None and dq is not None
    assert (out[:, empty] == 0).all()
    assert (lse[:, empty] == -math.inf).all()
    assert (dq[:, empty] == 0).all()


@pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_blocks_that_no_query_attends_change_no_bit(
    block: int, causal: bool, dtype: torch.dtype, device_backend: tuple[str, str], seed: int
) -> None:
    """Their keys and values may hold NaN, and their gradients are 0."""
    device, backend = device_backend
    case = a_block_case(block=block, blocks="gaps", causal=causal, n=385, dtype=dtype)
    if backend.startswith("cuda") and not runs_natively(case):
        pytest.skip("no native kernel for this dtype")
    unseen = ~case.masks[0].any(0)
    assert unseen.any() and not unseen.all()
    x = make_inputs(case, seed, device)
    k, v = x.k.clone(), x.v.clone()
    k[:, :, unseen] = math.nan
    v[:, :, unseen] = math.nan
    clean = run(x, case.pattern_on(device), backend)
    with nan_in_new_memory(backend):
        poisoned = run(Inputs(x.q, k, v, x.dout, x.dlse), case.pattern_on(device), backend)
    for name in RESULTS:
        assert_same_bits(name, clean[name], poisoned[name])
    for name in ("dk", "dv"):
        gradient = poisoned[name]
        assert gradient is not None and (gradient[:, :, unseen] == 0).all(), name
        assert (gradient[:, :, ~unseen] != 0).any(), name


def test_a_block_that_one_head_attends(device_backend: tuple[str, str], seed: int) -> None:
    """Heads that share keys and values: no query of the others is changed by those blocks."""
    device, backend = device_backend
    case = a_block_case(n=200, dtype=torch.bfloat16)
    x = make_inputs(case, seed, device)
    layout = torch.eye(7, dtype=torch.bool, device=device).repeat(4, 1, 1)
    layout[1, 5, 2] = True
    pattern = sa.BlockSparse(layout, case.block)
    k = x.k.clone()
    k[:, 0, 64:96] = k[:, 0, 64:96].flip(1)
    before = sa.attention(x.q, x.k, x.v, pattern, backend=backend)
    after = sa.attention(x.q, k, x.v, pattern, backend=backend)
    changed = (before != after).any(-1).any(0).unflatten(1, (25, 8)).any(-1).cpu()
    wanted = torch.zeros(4, 25, dtype=torch.bool)
    wanted[:2, 8:12] = True  # the block itself, in both heads of its keys
    wanted[1, 20:24] = True
    assert changed.equal(wanted)


@pytest.mark.parametrize("order", ["columns", "sliced", "expanded"])
def test_memory_order_of_a_layout_changes_no_bit(
    order: str, device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    case = a_block_case(block=16, blocks="some", n=145, dtype=torch.bfloat16)
    x = make_inputs(case, seed, device)
    layout = case.pattern_on(device).layout
    if order == "columns":
        strided = layout.mT.contiguous().mT
    elif order == "sliced":
        wide = torch.ones(1, 12, 22, dtype=torch.bool, device=device)
        strided = wide[:, 1:11, 1:21:2].copy_(layout)
    else:
        strided = layout.expand(4, -1, -1)
    assert strided.stride() != layout.stride()
    wanted = run(x, case.pattern_on(device), backend)
    actual = run(x, sa.BlockSparse(strided, case.block), backend)
    for name in RESULTS:
        assert_same_bits(name, actual[name], wanted[name])


@pytest.mark.parametrize("layout_heads", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_size_of_blocks(
    shape: str, layout_heads: int, device_backend: tuple[str, str]
) -> None:
    device, backend = device_backend
    batch, heads, kv_heads, n, head_dim, head_dim_v = SHAPES[shape]
    count = -(-n // 16)
    layout = torch.ones(layout_heads, count, count, dtype=torch.bool, device=device)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    q = torch.randn(batch, heads, n, head_dim, **options)
    k = torch.randn(batch, kv_heads, n, head_dim, **options)
    v = torch.randn(batch, kv_heads, n, head_dim_v, **options)
    pattern = sa.BlockSparse(layout, 16)
    out, lse = sa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert out.shape == (batch, heads, n, head_dim_v) and lse.shape == (batch, heads, n)
    (out.sum() + lse.sum()).backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape


# Heads that share keys and values, with patterns of their own.

NEAR: oracle.Members = (("local", 20),)
FAR: oracle.Members = (("dilated", 7),)
MERGED: oracle.Members = (("chunk", 24), ("summary", 24, 5, 19))
FEW: oracle.Members = (("summary", 24, 3, 0),)  # most keys have no query
NONE: oracle.Members = (("summary", 500, 1, 499),)  # no query has a key

# The members of each head, and the number of kv heads.
SHARED_KEYS: dict[str, tuple[tuple[oracle.Members, ...], int]] = {
    "agree": ((NEAR, NEAR, MERGED, MERGED), 2),
    "agree, keys without a query": ((FEW, FEW, FAR, FAR, FEW, FEW), 3),
    "agree in groups of three": ((FAR,) * 3 + (MERGED,) * 3, 2),
    "agree in two groups at once": ((MERGED,) * 4 + (FAR,) * 2 + (NEAR,) * 2, 4),
    "all agree": ((MERGED,) * 4, 1),
    "differ": ((NEAR, FAR, NEAR, FAR), 2),
    "differ in one group": ((NEAR, NEAR, FAR, MERGED), 2),
    "differ across the groups": ((NEAR, NEAR, FAR, FAR, FAR, FAR), 2),
    "differ, keys without a query": ((FEW, NEAR, FEW, FEW), 2),
    "differ, queries without a key": ((NONE, FAR, NONE, NONE), 2),
    "all differ": ((NEAR, FAR, MERGED, FEW), 1),
}


@pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SHARED_KEYS)
def test_patterns_of_heads_that_share_keys(
    name: str, causal: bool, dtype: torch.dtype, device_backend: tuple[str, str], seed: int
) -> None:
    """Whole groups of one pattern, and groups in which the patterns differ."""
    device, backend = device_backend
    members, kv_heads = SHARED_KEYS[name]
    case = a_case(
        n=150,
        heads=(len(members), kv_heads),
        head_dims=(32, 24),
        layout="sliced",
        causal=causal,
        dtype=dtype,
    )
    if backend.startswith("cuda") and not runs_natively(case):
        pytest.skip("no native kernel for this dtype")
    pattern = sa.PerHead([to_pattern(head_members, causal) for head_members in members])
    x = make_inputs(case, seed, device)
    arguments = (x.q, x.k, x.v, oracle.masks(members, causal, case.n), None, x.dout, x.dlse)
    exact = oracle.attention(*arguments)
    low = None if dtype == torch.float64 else oracle.attention(*arguments, rounding=dtype)
    with nan_in_new_memory(backend):
        actual = run(x, pattern, backend)
    assert_all_close(actual, exact, low)


# Memory order.


def order(tensor: torch.Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


@pytest.mark.parametrize(
    "axes", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (1, 2, 0, 3), (2, 1, 0, 3)]
)
@pytest.mark.parametrize("head_dims", [(64, 64), (64, 128), (128, 64)])
def test_out_takes_the_memory_order_of_q(
    axes: tuple[int, ...], head_dims: tuple[int, int], device_backend: tuple[str, str]
) -> None:
    device, backend = device_backend
    if backend.startswith("cuda") and not native_head_dims(*head_dims):
        pytest.skip("no native kernel for these head dims")
    batch, heads, n = 2, 3, 33
    head_dim, head_dim_v = head_dims

    def permuted(*sizes: int) -> torch.Tensor:
        stored = torch.randn([sizes[axis] for axis in axes], dtype=torch.bfloat16, device=device)
        return stored.permute([axes.index(axis) for axis in range(4)])

    q, k = permuted(batch, heads, n, head_dim), torch.randn(batch, heads, n, head_dim)
    k = k.to(q)
    v = torch.randn(batch, heads, n, head_dim_v).to(q)
    out = sa.attention(q, k, v, sa.Strided(8), backend=backend)
    assert order(out) == list(axes)
    assert out.permute(axes).is_contiguous()


def test_out_of_a_slice_is_dense(device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    generator = torch.Generator().manual_seed(seed)
    q = make_tensor((2, 3, 33, 64), "sliced", torch.bfloat16, generator, device)
    out = sa.attention(q, q, q, sa.Strided(8), backend=backend)
    assert out.is_contiguous()
    packed = torch.randn(2, 33, 3, 4, 64, dtype=torch.bfloat16, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = sa.attention(q, k, v, sa.Strided(8), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


# Merging.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merge_of_two_patterns_is_their_union(dtype: torch.dtype, device: str, seed: int) -> None:
    """Disjoint key sets: the chunk, and the summaries of the chunks before."""
    case = a_case(kind="summary", columns="1", offset="default", dtype=dtype, n=70)
    x = make_inputs(case, seed, device)
    chunk = oracle.mask((("chunk", 16),), True, 70)
    summary = oracle.mask((("summary", 16, 4, 12),), True, 70) & ~chunk
    parts = [oracle.attention(x.q, x.k, x.v, [mask] * 4) for mask in (chunk, summary)]
    whole = oracle.attention(x.q, x.k, x.v, [chunk | summary] * 4)
    low = None
    if dtype != torch.float64:
        low = oracle.attention(x.q, x.k, x.v, [chunk | summary] * 4, rounding=dtype)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = ((part.out.to(dtype), part.lse.to(lse_dtype)) for part in parts)
    out, lse = sa.merge(*a, *b)
    assert out.dtype == dtype and lse.dtype == lse_dtype
    actual = {"out": out, "lse": lse}
    assert_all_close(actual, whole, low)
    swapped_out, swapped_lse = sa.merge(*b, *a)
    assert_all_close({"out": swapped_out, "lse": swapped_lse}, whole, low)


def test_merge_with_empty_rows(device: str) -> None:
    out1 = torch.randn(1, 1, 3, 4, device=device)
    out2 = torch.randn(1, 1, 3, 4, device=device)
    lse1 = torch.tensor([[[0.5, -math.inf, -math.inf]]], device=device)
    lse2 = torch.tensor([[[-math.inf, 0.25, -math.inf]]], device=device)
    out, lse = sa.merge(out1, lse1, out2, lse2)
    assert_same_bits("first alone", out[:, :, 0], out1[:, :, 0])
    assert_same_bits("second alone", out[:, :, 1], out2[:, :, 1])
    assert (out[:, :, 2] == 0).all()
    assert lse.flatten().tolist() == [0.5, 0.25, -math.inf]


def test_merge_gradients_with_empty_rows(device: str) -> None:
    tensors = [
        torch.randn(1, 1, 3, 4, device=device),
        torch.tensor([[[0.5, -math.inf, -math.inf]]]),
    ]
    tensors += [
        torch.randn(1, 1, 3, 4, device=device),
        torch.tensor([[[-math.inf, 0.25, -math.inf]]]),
    ]
    out1, lse1, out2, lse2 = (t.double().to(device).requires_grad_() for t in tensors)
    out, lse = sa.merge(out1, lse1, out2, lse2)
    dout, dlse = torch.randn_like(out), torch.full_like(lse, math.nan)
    dlse[..., :2] = torch.randn(2)
    torch.autograd.backward((out, lse), (dout, dlse))
    first, second = (torch.arange(3, device=device) == part for part in (0, 1))
    assert_close("dout1", out1.grad, dout.masked_fill(~first[:, None], 0))
    assert_close("dout2", out2.grad, dout.masked_fill(~second[:, None], 0))
    assert_close("dlse1", lse1.grad, dlse.masked_fill(~first, 0))
    assert_close("dlse2", lse2.grad, dlse.masked_fill(~second, 0))
