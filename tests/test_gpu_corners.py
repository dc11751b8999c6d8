# SPDX-License-Identifier: Apache-2.0
"""The native kernels where things break: sizes, offsets, streams, memory that runs out."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
import sparse_attn as sa
from cases import FACTORS, KINDS, Inputs, make_tensor, to_pattern
from compare import assert_close, assert_same_bits
from sampled import assert_samples_close
from sparse_attn.dispatch import choose_backend
from test_attention import (
    KEY_CASES,
    NATIVE_DTYPES,
    NATIVE_HEAD_DIMS,
    RESULTS,
    assert_right,
    runs_natively,
)

pytestmark = pytest.mark.gpu

BOUNDARY = 2**31
RANDOM_CASES = 60


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def gpu_memory(gibibytes: float) -> Iterator[None]:
    """Much of the GPU's memory, which test processes that share the GPU take in turns."""
    import fcntl  # not on every platform that collects these tests

    path = Path(tempfile.gettempdir()) / f"sparse_attn-gpu-memory-{os.getuid()}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gibibytes:
            pytest.skip(f"{free:.1f} GiB of GPU memory are free, {gibibytes} are needed")
        try:
            yield
        finally:
            gc.collect()
            torch.cuda.empty_cache()


def random_inputs(
    q_shape: tuple[int, int, int, int],
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float16,
    sequence_major: bool = False,
) -> Inputs:
    """Fresh inputs made on the GPU, with one head dim."""
    batch, heads, n, head_dim = q_shape

    def tensor(heads: int) -> torch.Tensor:
        stored = (batch, n, heads, head_dim) if sequence_major else (batch, heads, n, head_dim)
        values = torch.randn(stored, dtype=dtype, device="cuda")
        return values.transpose(1, 2) if sequence_major else values

    kv_heads = heads if kv_heads is None else kv_heads
    dlse = torch.randn(batch, heads, n, device="cuda")
    return Inputs(tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads), dlse)


BACKEND = "cuda"


@pytest.fixture(autouse=True, params=["cuda_sm80", "cuda_sm90"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test on both kinds of kernels."""
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", request.param)


def skip_without_kernels(x: Inputs, pattern: Any) -> None:
    try:
        choose_backend(x.q, x.k, x.v, pattern, BACKEND)
    except RuntimeError as error:
        pytest.skip(str(error))


def run(x: Inputs, pattern: Any, scale: float | None = None) -> dict[str, torch.Tensor]:
    """All five results on the native kernels, in memory that held NaN, no gradient copied."""
    skip_without_kernels(x, pattern)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v))
    with poisoned_memory():
        out, lse = sa.attention(q, k, v, pattern, scale, return_lse=True, backend=BACKEND)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (x.dout, x.dlse))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def assert_written(results: Mapping[str, torch.Tensor]) -> None:
    """No NaN anywhere, found without another tensor of that size."""
    for name, tensor in results.items():
        assert tensor.detach().sum(dtype=torch.float32).isfinite(), f"{name} holds NaN or inf"


def keep_busy(stream: torch.cuda.Stream, products: int = 400) -> torch.cuda.Event:
    """Enqueues about a tenth of a second of work on a stream; returns the event of its end."""
    with torch.cuda.stream(stream):
        a = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
        b = torch.empty_like(a)
        for _ in range(products):
            torch.mm(a, a, out=b)
        end = torch.cuda.Event()
        end.record()
    return end


def assert_head_matches(
    x: Inputs,
    actual: dict[str, torch.Tensor],
    members: oracle.Members,
    batch: int,
    head: int,
) -> None:
    """All five results of one head of one batch entry, without grouped heads."""
    at = slice(batch, batch + 1), slice(head, head + 1)
    mask = oracle.mask(members, True, x.q.shape[2]).cuda()
    arguments = (x.q[at], x.k[at], x.v[at], [mask], None, x.dout[at], x.dlse[at])
    exact = oracle.attention(*arguments)
    low = oracle.attention(*arguments, rounding=x.q.dtype)
    for name in RESULTS:
        reference, rounded = getattr(exact, name), getattr(low, name)
        assert_close(f"{name} of batch {batch}, head {head}", actual[name][at], reference, rounded)


# The same bits.


MERGED: dict[str, tuple[Any, oracle.Members]] = {
    "strided": (sa.Strided(128), (("local", 128), ("dilated", 128))),
    "fixed": (sa.Fixed(128, 32), (("chunk", 128), ("summary", 128, 32, 96))),
}


@pytest.mark.parametrize("name", MERGED)
def test_same_bits_from_twenty_backward_passes(name: str) -> None:
    """While another stream works: nothing depends on which CTAs run when."""
    pattern, members = MERGED[name]
    x = random_inputs((4, 16, 12_288, 64))
    skip_without_kernels(x, pattern)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v))
    outputs = sa.attention(q, k, v, pattern, return_lse=True, backend=BACKEND)
    first: tuple[torch.Tensor, ...] = ()
    other, still_busy = torch.cuda.Stream(), 0
    for _ in range(20):
        torch.cuda.synchronize()
        end = keep_busy(other)
        with poisoned_memory():
            grads = torch.autograd.grad(outputs, (q, k, v), (x.dout, x.dlse), retain_graph=True)
        torch.cuda.current_stream().synchronize()
        still_busy += not end.query()
        first = first or grads
        for gradient, grad, wanted in zip(("dq", "dk", "dv"), grads, first, strict=True):
            assert_same_bits(gradient, grad, wanted)
    actual = dict(zip(RESULTS, (*outputs, *first), strict=True))
    assert_written(actual)
    samples = {"random": torch.randint(12_288, (64,)).cuda()}
    assert_samples_close(x, actual, members, True, samples, [(0, 0), (3, 15)])
    assert still_busy >= 10, f"the other stream outlasted only {still_busy} of 20 backward passes"


# Sizes.


FAR: dict[str, tuple[tuple[int, int, int, int], bool, torch.dtype]] = {
    # (batch, seq, heads, head_dim) in memory: the last 127 rows are past 2^31.
    "strided": ((1, 8448, 4099, 64), True, torch.float16),
    # (batch, heads, seq, head_dim) in memory: entry 31 straddles 2^31, entry 32 is past it.
    "fixed": ((33, 1024, 1031, 64), False, torch.bfloat16),
}


@pytest.mark.parametrize("name", FAR)
def test_more_than_two_to_the_31_elements(name: str) -> None:
    """Eight tensors of 4.4 GB; whole heads on both sides of the boundary are checked."""
    with gpu_memory(40):
        check_far(name)


def check_far(name: str) -> None:
    shape, sequence_major, dtype = FAR[name]
    pattern, members = MERGED[name]
    x = random_inputs(shape, dtype=dtype, sequence_major=sequence_major)
    batch_stride, head_stride, row_stride, _ = x.q.stride()
    n = shape[2]
    if sequence_major:
        assert (n - 128) * row_stride < BOUNDARY < (n - 100) * row_stride
        heads = [(0, 0), (0, 4223), (0, 8447)]
    else:
        assert 31 * batch_stride < BOUNDARY < 32 * batch_stride
        straddling = (BOUNDARY - 31 * batch_stride) // head_stride
        heads = [(0, 0), (31, straddling - 1), (31, straddling), (31, straddling + 1)]
        heads += [(32, 0), (32, shape[1] - 1)]
    actual = run(x, pattern)
    assert_written(actual)
    for batch, head in heads:
        assert_head_matches(x, actual, members, batch, head)


MILLION = 1 << 20
LONG: dict[str, Any] = {
    "strided": (sa.Strided(1024), (("local", 1024), ("dilated", 1024)), torch.float16),
    "fixed": (
        sa.Fixed(1024, 32),
        (("chunk", 1024), ("summary", 1024, 32, 992)),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_million_tokens(name: str) -> None:
    """Two heads that share keys, at sampled positions."""
    with gpu_memory(12):
        check_million(name)


def check_million(name: str) -> None:
    pattern, members, dtype = LONG[name]
    x = random_inputs((1, 2, MILLION, 64), kv_heads=1, dtype=dtype)
    chunk_end = 1024 * torch.randint(1, MILLION // 1024, (32,)) - 1 - torch.randint(32, (32,))
    samples = {
        "first": torch.arange(32),
        "random": torch.randint(MILLION, (48,)),
        "last of a chunk": chunk_end,  # summary keys of Fixed
        "last": torch.arange(MILLION - 32, MILLION),
    }
    samples = {sample: rows.cuda() for sample, rows in samples.items()}
    actual = run(x, pattern)
    assert_written(actual)
    assert_samples_close(x, actual, members, True, samples, [(0, 0), (0, 1)])


@pytest.mark.parametrize("pattern", [sa.Strided(2), sa.Fixed(3, 1)], ids=str)
@pytest.mark.parametrize("batch, heads", [(70_000, 1), (2, 35_000), (1, 70_000)])
def test_70_000_heads(batch: int, heads: int, pattern: Any) -> None:
    """More than the 65,535 of grid.y and grid.z."""
    x = random_inputs((batch, heads, 5, 64))
    members: oracle.Members = (("local", 2), ("dilated", 2))
    if pattern != sa.Strided(2):
        members = (("chunk", 3), ("summary", 3, 1, 2))
    actual = run(x, pattern)
    # The oracle takes a head as a batch entry.
    flat = Inputs(*(tensor.flatten(0, 1)[:, None] for tensor in vars(x).values()))
    flat_actual = {name: tensor.flatten(0, 1)[:, None] for name, tensor in actual.items()}
    assert_right(flat_actual, flat, [oracle.mask(members, True, 5)])


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    "pattern",
    [
        sa.Local(100),
        sa.Local(700),
        sa.Chunk(130),
        sa.Chunk(100),
        sa.Dilated(9),
        sa.Strided(33),
        sa.PerHead([sa.Fixed(128, 20), sa.Chunk(40), *4 * [sa.Dilated(21)]]),
    ],
    ids=str,
)
def test_memory_order_changes_no_bit(pattern: Any, kv_heads: int) -> None:
    """(batch, heads, seq, dim) and (batch, seq, heads, dim), where tiles of few keys go in another
    order."""
    x = random_inputs((2, 6, 1101, 64), kv_heads)
    tokens_first = Inputs(
        *(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in vars(x).values())
    )
    wanted, actual = run(x, pattern), run(tokens_first, pattern)
    assert actual["out"].stride(1) < actual["out"].stride(2)
    for name in wanted:
        assert_same_bits(name, actual[name], wanted[name])


# Short chunks and residues, several in a tile.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 256])
@pytest.mark.parametrize(
    "members",
    [
        (("dilated", 128),),  # of 9 and 8 rows
        (("dilated", 36),),
        (("dilated", 18),),
        (("dilated", 35),),  # an odd number of residues
        (("local", 96), ("dilated", 96)),
        (("chunk", 23),),
        (("chunk", 50),),
    ],
    ids=str,
)
def test_short_groups(members: oracle.Members, head_dim: int, causal: bool) -> None:
    n = 1101
    x = random_inputs((1, 2, n, head_dim))
    actual = run(x, to_pattern(members, causal))
    assert_right(actual, x, [oracle.mask(members, causal, n).cuda()] * 2)


# Scores.


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("window", [100, 1000])
def test_scores_that_rise_with_the_key(window: int, head_dim: int) -> None:
    """Relative to the maxima of earlier keys, weights would be infinite in fp16."""
    n = 1600
    x = random_inputs((1, 2, n, head_dim))
    x.k.mul_(torch.linspace(0, 8, n, dtype=torch.float16, device="cuda")[:, None])
    members = (("local", window),)
    actual = run(x, to_pattern(members, True))
    assert_right(actual, x, [oracle.mask(members, True, n).cuda()] * 2)


# Blocks.


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    "head_dims", [(32, 32), (64, 64), (64, 128), (96, 96), (128, 128), (256, 256)]
)
def test_neighbouring_blocks_attend_few_and_all(head_dims: tuple[int, int], block: int) -> None:
    """Warpgroups of one CTA pass over many tiles while others compute them."""
    n, blocks = 1600, -(-1600 // block)
    layout = torch.eye(blocks, dtype=torch.bool)
    layout[1::2] = True
    layout[:, 0] = True
    mask = layout.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n].tril().cuda()
    head_dim, head_dim_v = head_dims

    def tensor(dim: int) -> torch.Tensor:
        return torch.randn(2, 1, n, dim, dtype=torch.float16, device="cuda")

    x = Inputs(
        tensor(head_dim),
        tensor(head_dim),
        tensor(head_dim_v),
        tensor(head_dim_v),
        torch.randn(2, 1, n, device="cuda"),
    )
    actual = run(x, sa.BlockSparse(layout[None].cuda(), block))
    assert_right(actual, x, [mask])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_scattered_blocks(head_dim: int, shared_keys: bool, causal: bool, seed: int) -> None:
    """Neighbours attend none to all blocks; keys with a stride of 0 have no tensor map."""
    n = random.Random(seed).randint(1100, 2500)
    blocks = -(-n // 64)
    layout = torch.rand(2, blocks, blocks) < torch.rand(2, blocks, 1)
    layout[:, ::7] = False
    masks = layout.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :n, :n].cuda()
    x = random_inputs((1, 2, n, head_dim))
    if shared_keys:
        x = replace(x, k=x.k[:, :1].expand_as(x.k))
    actual = run(x, sa.BlockSparse(layout.cuda(), 64, causal=causal))
    assert_right(actual, x, list(masks.tril() if causal else masks))


# Streams.


def test_two_calls_at_once_on_two_streams() -> None:
    calls = list(MERGED.values())
    inputs = [random_inputs((2, 4, 2049, 64)) for _ in calls]
    alone = [run(x, pattern) for x, (pattern, _) in zip(inputs, calls, strict=True)]
    for x, (_, members), result in zip(inputs, calls, alone, strict=True):
        assert_head_matches(x, result, members, 1, 3)
    gate_stream = torch.cuda.Stream()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(5):
        torch.cuda.synchronize()
        gate = keep_busy(gate_stream)
        together = []
        for stream, x, (pattern, _) in zip(streams, inputs, calls, strict=True):
            stream.wait_event(gate)
            with torch.cuda.stream(stream):
                together.append(run(x, pattern))
        assert not gate.query(), "the first call may have ended before the second began"
        torch.cuda.synchronize()
        for result, wanted in zip(together, alone, strict=True):
            for name in RESULTS:
                assert_same_bits(name, result[name], wanted[name])


# Memory that runs out.


def test_right_after_out_of_memory() -> None:
    """In the forward and in the backward pass, at one allocation after the other."""
    members: oracle.Members = (("chunk", 64), ("summary", 64, 8, 56))
    pattern = sa.Fixed(64, 8)
    torch.cuda.empty_cache()  # the results get segments of their own
    x = random_inputs((32, 8, 1021, 64))  # 33 MB a tensor
    wanted = run(x, pattern)
    assert_right(wanted, x, [oracle.mask(members, True, 1021)] * 8)
    total = torch.cuda.mem_get_info()[1]
    step = 20 * 2**20  # the least that the allocator takes from the GPU for a large tensor
    failures = []
    for steps in range(20):
        gc.collect()
        torch.cuda.empty_cache()
        limit = (torch.cuda.memory_reserved() + steps * step) / total
        torch.cuda.set_per_process_memory_fraction(limit)
        try:
            failures.append(where_memory_ends(x, pattern))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        again = run(x, pattern)
        for name in RESULTS:
            assert_same_bits(f"{name} after no memory in {failures[-1]}", again[name], wanted[name])
        del again
        if failures[-1] == "neither":
            break
    assert failures[0] == "forward" and failures[-1] == "neither", failures
    assert "backward" in failures, failures


def where_memory_ends(x: Inputs, pattern: Any) -> str:
    """The pass that runs out of memory."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v))
    try:
        out, lse = sa.attention(q, k, v, pattern, return_lse=True, backend=BACKEND)
    except torch.cuda.OutOfMemoryError:
        return "forward"
    try:
        torch.autograd.grad((out, lse), (q, k, v), (x.dout, x.dlse))
    except torch.cuda.OutOfMemoryError:
        return "backward"
    return "neither"


# Random cases.


def draw_case(draw: random.Random) -> tuple[Inputs, Any, list[torch.Tensor], float | None, str]:
    """Inputs, pattern, oracle masks, scale, and the case in words."""
    kind = draw.choice(list(KINDS))
    n = draw.choice([draw.randint(1, 100), draw.randint(100, 600), draw.randint(600, 2500)])
    size = draw.choice([draw.randint(1, 40), draw.randint(1, n + 5), draw.choice([64, 128])])
    columns = draw.randint(1, size)
    offset = draw.randint(0, size - columns)
    causal = draw.random() < 0.5
    kv_heads = draw.randint(1, 3)
    heads = kv_heads * draw.randint(1, 4)
    most, most_v = draw.choice(NATIVE_HEAD_DIMS)
    head_dim, head_dim_v = 8 * draw.randint(1, most // 8), 8 * draw.randint(1, most_v // 8)
    layout, dtype = draw.choice(FACTORS["layout"]), draw.choice(NATIVE_DTYPES)
    # Not 0: every lse is the logarithm of a count then, and fp32 rounds a few values well by luck.
    scale = draw.choice([None, None, 1e-3, draw.uniform(-0.5, 0.5)])
    # Many rows, so that the largest rounding error is no matter of luck.
    batch = max(draw.randint(1, 3), 512 // (n * heads))

    members = [KINDS[kind][1](size, columns, offset, head) for head in range(heads)]
    patterns = [to_pattern(head_members, causal) for head_members in members]
    pattern = sa.PerHead(patterns) if kind.startswith("heads:") else patterns[0]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def tensor(heads: int, dim: int) -> torch.Tensor:
        return make_tensor((batch, heads, n, dim), layout, dtype, generator, "cuda")

    q, k, v = tensor(heads, head_dim), tensor(kv_heads, head_dim), tensor(kv_heads, head_dim_v)
    dout = tensor(heads, head_dim_v)
    dlse = torch.randn(batch, heads, n, generator=generator).cuda()
    words = (
        f"{pattern}, batch {batch}, n {n}, h{heads}kv{kv_heads} d{head_dim}v{head_dim_v}"
        f" {layout} {dtype}, scale {scale}"
    )
    return Inputs(q, k, v, dout, dlse), pattern, oracle.masks(members, causal, n), scale, words


@pytest.mark.parametrize("number", range(RANDOM_CASES))
def test_random_case(number: int, session_seed: int) -> None:
    """Drawn anew in every run; ``--seed`` with the printed number draws the same again."""
    fresh = session_seed or 1 + secrets.randbelow(2**31 - 1)
    x, pattern, masks, scale, words = draw_case(random.Random(f"{fresh}:{number}"))
    print(f"seed {fresh}: {words}")
    try:
        assert_right(run(x, pattern, scale), x, masks, scale)
    except AssertionError as error:
        again = f"repeat with --seed {fresh} -k 'test_random_case and {number}'"
        raise AssertionError(f"{words}; {again}: {error}") from error


# Machine code.

WITHOUT_JIT = """
import sys
from cases import make_inputs
from test_attention import KEY_CASES, assert_matches_oracle, runs_natively

count = 0
for case in filter(runs_natively, KEY_CASES):
    x = make_inputs(case, int(sys.argv[1]), "cuda")
    assert_matches_oracle(x, case.pattern, case.masks, "cuda_sm80")
    count += 1
print(count, "cases match")
"""


def test_machine_code_without_a_compiler_in_the_driver(seed: int) -> None:
    """With CUDA_DISABLE_PTX_JIT=1 only machine code of the GPU's own generation runs."""
    if BACKEND == "cuda_sm90":
        pytest.skip("they have no code for a compiler")
    from sparse_attn.backends.cuda import native

    real = re.findall(r"(\d+)\da?-real", native().build_info()["architectures"])
    generation = torch.cuda.get_device_capability()[0]
    if str(generation) not in real:
        pytest.skip(f"this build has no machine code for compute capability {generation}.x")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "CUDA_DISABLE_PTX_JIT": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_JIT, str(seed)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    count = int(result.stdout.split()[0])
    assert count == sum(map(runs_natively, KEY_CASES)) > 0, result.stdout
