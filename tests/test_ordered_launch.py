# SPDX-License-Identifier: Apache-2.0
"""Backward launches whose CTAs take turns to add to dq.

They must end, and give the same bits, whatever else is on the GPU (so must all other backward
launches); and the gradients must be right for more query tiles than are summed at a time, which the
other tests do not have.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import oracle
import sparse_attn as sa
from compare import assert_close, assert_same_bits
from test_merged_launch import (
    assert_same_on_two_streams,
    assert_same_where_multiprocessors_are_busy,
    occupy,
)

pytestmark = pytest.mark.gpu

Grads = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these launches are for compute capability 9.0")


def blocks(block: int, n: int) -> sa.BlockSparse:
    """Half of the blocks; queries without a key, keys without a query."""
    count = -(-n // block)
    generator = torch.Generator().manual_seed(count)
    layout = torch.rand(3, count, count, generator=generator) < 0.5
    layout[:, count // 2] = False
    layout[:, :, count // 3] = False
    return sa.BlockSparse(layout.cuda(), block)


def pattern_of(name: str, n: int) -> sa.Pattern:
    patterns: dict[str, Any] = {
        "dense": sa.Dense,
        "dense-both-ways": lambda: sa.Dense(causal=False),
        "window": lambda: sa.Local(600),
        "window-both-ways": lambda: sa.Local(400, causal=False),
        "chunk": lambda: sa.Chunk(1500),
        "residue": lambda: sa.Dilated(2),
        "columns": lambda: sa.Summary(64, 24),
        "fixed": lambda: sa.Fixed(64, 24),
        "strided": lambda: sa.Strided(700),
        "bands": lambda: sa.Strided(100),
        "blocks-128": lambda: blocks(128, n),
        "blocks-64": lambda: blocks(64, n),
    }
    pattern: sa.Pattern = patterns[name]()
    return pattern


NAMES = (
    "dense",
    "dense-both-ways",
    "window",
    "window-both-ways",
    "chunk",
    "residue",
    "columns",
    "fixed",
    "strided",
    "blocks-128",
    "blocks-64",
)


def inputs(
    seq: int, heads: int = 3, head_dims: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.half
) -> list[torch.Tensor]:
    """q, k, v, dout."""
    head_dim, head_dim_v = head_dims
    return [
        torch.randn(2, heads, seq, dim, device="cuda", dtype=dtype)
        for dim in (head_dim, head_dim, head_dim_v, head_dim_v)
    ]


def grads(tensors: list[torch.Tensor], pattern: sa.Pattern) -> Grads:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = sa.attention(q, k, v, pattern, backend="cuda_sm90")
    return torch.autograd.grad(out, (q, k, v), tensors[3])


def assert_same(actual: Grads, wanted: Grads) -> None:
    for name, x, y in zip(("dq", "dk", "dv"), actual, wanted, strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("seq", "head_dims", "dtype"),
    [
        (2100, (64, 64), torch.half),
        (3333, (40, 64), torch.bfloat16),
        (2047, (64, 128), torch.half),
        (2500, (128, 104), torch.bfloat16),
    ],
    ids=str,
)
def test_gradients(name: str, seq: int, head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = inputs(seq, head_dims=head_dims, dtype=dtype)
    pattern = pattern_of(name, seq)
    q, k, v, dout = tensors
    masks = list(pattern.mask(seq).cuda().expand(3, seq, seq))
    exact = oracle.attention(q, k, v, masks, None, dout)
    low = oracle.attention(q, k, v, masks, None, dout, rounding=dtype)
    for name, actual in zip(("dq", "dk", "dv"), grads(tensors, pattern), strict=True):
        assert_close(name, actual, getattr(exact, name), getattr(low, name))


def test_weights_of_very_many_keys() -> None:
    """Some 1 / n, where fp16 has no normal numbers; dout as with loss scaling, of late queries."""
    n = 1 << 17
    q, k, v, dout = (x[:1] for x in inputs(n, heads=2))
    late = slice(n // 2, n)
    dout = torch.where(torch.arange(n, device="cuda")[:, None] >= late.start, 1000 * dout, 0)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    out, lse = sa.attention(q, k, v, sa.Dense(), return_lse=True, backend="cuda_sm90")
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    q, k, v, dout, out, lse = (x[0, 1].detach().double() for x in (q, k, v, dout, out, lse))
    delta = (dout * out).sum(-1)

    def gradients_of_scores(rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q[rows] @ k[columns].T / 8 - lse[rows, None]).exp()
        return weights, weights * (dout[rows] @ v[columns].T - delta[rows, None])

    # The last query attends every key, every late query the first keys.
    last, first = slice(n - 1, n), slice(0, 4)
    wanted = gradients_of_scores(last, slice(0, n))[1] @ k / 8
    assert_near("dq", dq[0, 1, last], wanted)
    weights, dscores = gradients_of_scores(late, first)
    assert_near("dk", dk[0, 1, first], dscores.T @ q[late] / 8)
    assert_near("dv", dv[0, 1, first], weights.T @ dout[late])


def assert_near(name: str, actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Roundings to 11 bits give some .0004; weights in steps of 2^-24, at 1 / n, .0012."""
    error = float((actual - wanted).norm() / wanted.norm())
    assert error < 0.0008, f"{name} is off by {error:.2g}"


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_in_every_run(name: str) -> None:
    """In whichever order CTAs come to their turns; and a head among others as alone."""
    tensors = inputs(5003, heads=3)
    pattern = pattern_of(name, 5003)
    wanted = grads(tensors, pattern)
    for _ in range(5):
        assert_same(grads(tensors, pattern), wanted)
    if isinstance(pattern, sa.BlockSparse):
        return
    for head in range(3):
        alone = grads([x[:, head : head + 1] for x in tensors], pattern)
        assert_same(tuple(x[:, head : head + 1] for x in wanted), alone)


@pytest.mark.parametrize("name", [*NAMES, "bands"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_same_bits_where_multiprocessors_are_busy(name: str, head_dim: int) -> None:
    tensors = inputs(4001, heads=8, head_dims=(head_dim, head_dim))
    pattern = pattern_of(name, 4001)
    if isinstance(pattern, sa.BlockSparse):
        pattern = sa.BlockSparse(pattern.layout[:1], pattern.block)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = sa.attention(q, k, v, pattern, backend="cuda_sm90")
    call = partial(torch.autograd.grad, out, (q, k, v), tensors[3], retain_graph=True)
    assert_same_where_multiprocessors_are_busy(call, repeats=12)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_slots_pass_on_in_a_head(head_dim: int) -> None:
    """A long window has fewer slots than queries; its end alone, of one head, has enough."""
    tensors = inputs(50_000, heads=4, head_dims=(head_dim, head_dim))
    pattern = sa.Local(600)
    together = grads(tensors, pattern)
    start = 96 * 384  # tiles of 128 keys and of 192 queries begin there
    alone = grads([x[:, 1:2, start:].contiguous() for x in tensors], pattern)
    same = 10 * 128  # from there on no query, and no key's query, attends a token before the start
    assert_same(
        tuple(x[:, 1:2, start + same :] for x in together), tuple(x[:, :, same:] for x in alone)
    )


@pytest.mark.parametrize("name", ["dense", "window", "fixed", "blocks-64"])
def test_slots_pass_on(name: str) -> None:
    """Many heads: a slot has one query tile after another. Each head gets what it gets alone."""
    tensors = [x.expand(2, 3, -1, -1).repeat(8, 16, 1, 1) for x in inputs(6000, heads=1)]
    pattern = pattern_of(name, 6000)
    if isinstance(pattern, sa.BlockSparse):
        pattern = sa.BlockSparse(pattern.layout[:1], pattern.block)
    alone = grads([x[:2, :1] for x in tensors], pattern)
    for x, y in zip(grads(tensors, pattern), alone, strict=True):
        assert_same_bits("gradient", x, y.repeat(8, 48, 1, 1))


@pytest.mark.parametrize("name", ["dense", "window", "blocks-128"])
def test_backward_on_two_streams(name: str) -> None:
    calls = [partial(grads, inputs(seq), pattern_of(name, seq)) for seq in (9001, 7000)]
    assert_same_on_two_streams(calls)


@pytest.mark.parametrize("free", [1, 30])
@pytest.mark.parametrize("name", ["dense", "window", "fixed"])
def test_beside_a_long_kernel(name: str, free: int) -> None:
    """On the few multiprocessors that another kernel leaves, the call ends before that kernel."""
    tensors = inputs(3000)
    pattern = pattern_of(name, 3000)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = sa.attention(q, k, v, pattern, backend="cuda_sm90")
    wanted = torch.autograd.grad(out, (q, k, v), tensors[3], retain_graph=True)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    occupy(1, 1)  # compiles
    torch.cuda.synchronize()
    side, ended = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        occupy(2 * (multiprocessors - free), 10_000_000)
        ended.record()
    actual = torch.autograd.grad(out, (q, k, v), tensors[3])
    torch.cuda.current_stream().synchronize()
    still_running = not ended.query()
    torch.cuda.synchronize()
    assert still_running, "the other kernel ended too early to tell"
    assert_same(actual, wanted)
