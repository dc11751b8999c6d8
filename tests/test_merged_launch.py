# SPDX-License-Identifier: Apache-2.0
"""Two branches in one launch: tiles of the second wait for those of the first.

The values themselves are compared with the reference in test_attention.py and test_gpu_corners.py;
here the launch must end, and give the same bits, whatever else is on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

import sparse_attn as sa
from compare import assert_same_bits

pytestmark = pytest.mark.gpu

# Few keys for each query, and at most lengths below more than 64 rows a residue: then branches
# share a launch.
PATTERNS = {
    "strided": sa.Strided(24),
    "long-stride": sa.Strided(60),
    "chunks": sa.Chunk(70) | sa.Dilated(31),
    "both-ways": sa.Strided(29, causal=False),
}
Results = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("one launch for two branches is for compute capability 9.0")


@pytest.fixture(params=list(PATTERNS.values()), ids=list(PATTERNS))
def pattern(request: pytest.FixtureRequest) -> sa.Pattern:
    pattern: sa.Pattern = request.param
    return pattern


def inputs(seq: int, heads: int = 7, head_dim: int = 64) -> list[torch.Tensor]:
    return [
        torch.randn(2, heads, seq, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    ]


def run(tensors: list[torch.Tensor], pattern: sa.Pattern) -> Results:
    q, k, v = tensors
    out, lse = sa.attention(q, k, v, pattern, return_lse=True, backend="cuda_sm90")
    return out, lse


def assert_same(actual: Results, wanted: Results) -> None:
    assert_same_bits("out", actual[0], wanted[0])
    assert_same_bits("lse", actual[1], wanted[1])


@pytest.mark.parametrize("seq", [1, 97, 2003, 4999])
def test_same_bits_in_every_run(pattern: sa.Pattern, seq: int) -> None:
    """In whichever order the tiles of heads end."""
    tensors = inputs(seq)
    wanted = run(tensors, pattern)
    for _ in range(10):
        assert_same(run(tensors, pattern), wanted)


@pytest.mark.parametrize(
    ("head_dim", "seq", "stride"),
    [(64, 12_200, 96), (64, 4_001, 100), (32, 12_283, 100), (128, 12_283, 100)],
)
def test_same_bits_where_multiprocessors_are_busy(head_dim: int, seq: int, stride: int) -> None:
    """What the first branch left is read before the next copy takes its place, however long a read
    of shared memory takes. Short residues and head dim 32: in two launches."""
    call = partial(run, inputs(seq, heads=8, head_dim=head_dim), sa.Strided(stride))
    assert_same_where_multiprocessors_are_busy(call, repeats=40)


def assert_same_where_multiprocessors_are_busy(
    call: Callable[[], tuple[torch.Tensor, ...]], repeats: int
) -> None:
    """Beside matrix products, for which a read or a copy may take longer than ever alone."""
    wanted = call()
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for _ in range(repeats):
        results.append(call())
        with torch.cuda.stream(beside):
            busy @ busy
    torch.cuda.synchronize()
    for actual in results:
        for result, right in zip(actual, wanted, strict=True):
            assert_same_bits("result", result, right)


def test_heads_alone(pattern: sa.Pattern) -> None:
    """A head among others gets what it gets alone."""
    tensors = inputs(3001, head_dim=128)
    out, lse = run(tensors, pattern)
    for head in range(out.shape[1]):
        alone = run([x[:, head : head + 1] for x in tensors], pattern)
        assert_same((out[:, head : head + 1], lse[:, head : head + 1]), alone)


def assert_same_on_two_streams(calls: Sequence[Callable[[], tuple[torch.Tensor, ...]]]) -> None:
    """Calls that share the multiprocessors end, though each waits within itself."""
    wanted = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    gate = torch.cuda.Event()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    gate.record()
    results: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    for stream in streams:
        stream.wait_event(gate)
    for _ in range(5):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((number, calls[number]()))
    torch.cuda.synchronize()
    for number, actual in results:
        for result, right in zip(actual, wanted[number], strict=True):
            assert_same_bits(f"call {number}", result, right)


def test_forward_on_two_streams(pattern: sa.Pattern) -> None:
    calls = [partial(run, inputs(seq), pattern) for seq in (12_001, 8_000)]
    assert_same_on_two_streams(calls)


def test_graph_on_two_streams(pattern: sa.Pattern) -> None:
    """A replay starts with fresh counters, also after the same work outside of the graph."""
    tensors = inputs(5000)
    wanted = run(tensors, pattern)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(tensors, pattern)
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            beside = run(tensors, pattern)
        graph.replay()
    torch.cuda.synchronize()
    assert_same(actual, wanted)
    assert_same(beside, wanted)


def occupy(ctas: int, steps: int) -> None:
    """Starts CTAs of 1,024 threads, two of which fill a multiprocessor, for `steps` steps."""
    triton: Any = pytest.importorskip("triton")
    language: Any = pytest.importorskip("triton.language")

    @triton.jit
    def spin(values, steps, size: language.constexpr):  # type: ignore[no-untyped-def]
        at = values + language.program_id(0) * size + language.arange(0, size)
        value = language.load(at)
        for _ in range(steps):
            value = value * 1664525 + 1013904223
        language.store(at, value)

    values = torch.zeros(ctas * 1024, dtype=torch.int32, device="cuda")
    spin[(ctas,)](values, steps, 1024, num_warps=32)


@pytest.mark.parametrize("free", [1, 30])
def test_beside_a_long_kernel(free: int) -> None:
    """On the few multiprocessors that another kernel leaves, the call ends before that kernel."""
    tensors = inputs(6000)
    wanted = run(tensors, PATTERNS["strided"])
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    occupy(1, 1)  # compiles
    torch.cuda.synchronize()
    side, ended = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        occupy(2 * (multiprocessors - free), 10_000_000)
        ended.record()
    actual = run(tensors, PATTERNS["strided"])
    torch.cuda.current_stream().synchronize()
    still_running = not ended.query()
    torch.cuda.synchronize()
    assert still_running, "the other kernel ended too early to tell"
    assert_same(actual, wanted)
