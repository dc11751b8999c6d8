# SPDX-License-Identifier: Apache-2.0
"""Decoding against caches: what attention gives on the whole sequence, at every position."""

from __future__ import annotations

import doctest
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import sparse_attn as sa
from cases import Case, Inputs, a_case, all_pairs_cases, make_inputs
from compare import assert_close, assert_same_bits
from sparse_attn.backends import torch_decode
from sparse_attn.decode_plan import attended_keys, decode_plan, group_of
from test_attention import runs_natively

CASES = [case for case in all_pairs_cases() if case.causal and case.n <= 257]
LONG_CASES = [case for case in all_pairs_cases() if case.causal and case.n > 257]
DEVICES = [
    ("cpu", "torch"),
    pytest.param(("cuda", "torch"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),
]
NAN = float("nan")

# Patterns of every kind of store, none of whose sizes divides the lengths used here.
PATTERNS = {
    "dense": sa.Dense(),
    "local": sa.Local(7),
    "local-1": sa.Local(1),
    "chunk": sa.Chunk(9),
    "dilated": sa.Dilated(6),
    "summary": sa.Summary(8, 3, 2),
    "strided": sa.Strided(5),
    "fixed": sa.Fixed(10, 3),
    "fixed-1": sa.Fixed(1, 1),
    "chunks": sa.Chunk(6) | sa.Chunk(10) | sa.Local(4) | sa.Summary(7, 2),
    "per-head": sa.PerHead([sa.Local(7), sa.Fixed(10, 3), sa.Local(7), sa.Dilated(6)]),
}
HEADS = 4


@pytest.fixture(params=DEVICES, ids=lambda pair: "-".join(pair))
def device_backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend); a case that has no kernel is skipped."""
    device, backend = request.param
    case = request.node.callspec.params.get("case")
    if backend == "cuda" and case and not runs_natively(case):
        pytest.skip(f"no native kernel for {case}")
    return device, backend


def cache_for(x: Inputs, pattern: Any, length: int | None = None) -> sa.KVCache:
    """A cache whose slots hold NaN until they are written."""
    batch, heads, n, head_dim = x.q.shape
    kv_heads, head_dim_v = x.v.shape[1], x.v.shape[3]
    cache = sa.KVCache(
        pattern,
        batch,
        heads,
        n if length is None else length,
        head_dim,
        head_dim_v,
        kv_heads,
        x.q.dtype,
        x.q.device,
    )
    for part in cache.parts:
        for kept in (*part.k, *part.v):
            kept.fill_(NAN)
    return cache


def decoded(
    x: Inputs,
    cache: sa.KVCache,
    start: int,
    end: int,
    sizes: Iterator[int],
    backend: str,
    scale: float | None = None,
) -> torch.Tensor:
    """Outputs of tokens [start, end), some at a time."""
    outs = [x.q.new_empty((*x.q.shape[:2], 0, x.v.shape[3]), dtype=cache.dtype)]
    while start < end:
        tokens = slice(start, min(start + next(sizes), end))
        q, k, v = x.q[:, :, tokens], x.k[:, :, tokens], x.v[:, :, tokens]
        outs.append(sa.decode(q, k, v, cache, scale, backend))
        start = tokens.stop
    return torch.cat(outs, 2)


def assert_decodes(
    x: Inputs,
    pattern: Any,
    masks: list[torch.Tensor],
    prompt: int,
    sizes: Iterator[int],
    backend: str,
    scale: float | None = None,
) -> None:
    """Prompt by attention, the rest by decoding, against the oracle on the whole sequence."""
    q, k, v = (tensor[:, :, :prompt] for tensor in (x.q, x.k, x.v))
    first = sa.attention(q, k, v, pattern, scale, backend=backend)
    cache = cache_for(x, pattern)
    cache.prefill(k, v)
    rest = decoded(x, cache, prompt, x.q.shape[2], sizes, backend, scale)
    assert int(cache.position) == x.q.shape[2]
    exact = oracle.attention(x.q, x.k, x.v, masks, scale).out
    low = None
    if x.q.dtype != torch.float64:
        low = oracle.attention(x.q, x.k, x.v, masks, scale, rounding=x.q.dtype).out
    assert_close("out", torch.cat([first, rest], 2), exact, low)


def prompts_of(case: Case) -> int:
    """No prompt, one token, odd lengths, longer than any ring: a different one for each case."""
    lengths = [0, 1, case.n // 2 | 1, case.n - 1, case.n]
    return min(lengths[zlib.crc32(str(case).encode()) % len(lengths)], case.n)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_attention(case: Case, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    x = make_inputs(case, seed, device)
    sizes = itertools.cycle((1, 16, 3, 16, 7))
    assert_decodes(x, case.pattern, case.masks, prompts_of(case), sizes, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LONG_CASES if runs_natively(c)], ids=str)
def test_matches_attention_on_long_sequences(case: Case, seed: int) -> None:
    x = make_inputs(case, seed, "cuda")
    prompt = case.n - 150
    assert_decodes(x, case.pattern, case.masks, prompt, itertools.cycle((1, 1, 16)), "cuda")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("prompt", [0, 1, 13, 41])
def test_token_by_token(name: str, prompt: int, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    dtype = torch.float64 if backend == "torch" else torch.float16
    case = a_case(n=41, heads=(HEADS, 2), head_dims=(16, 24), dtype=dtype)
    x, pattern = make_inputs(case, seed, device), PATTERNS[name]
    masks = list(pattern.mask(41).expand(HEADS, 41, 41))
    assert_decodes(x, pattern, masks, prompt, itertools.repeat(1), backend)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scale(scale: float, device_backend: tuple[str, str], seed: int) -> None:
    device, backend = device_backend
    case = a_case(n=50, dtype=torch.bfloat16)
    x = make_inputs(case, seed, device)
    assert_decodes(x, case.pattern, case.masks, 20, itertools.cycle((1, 5)), backend, scale)


@pytest.mark.parametrize("heads", [(12, 1), (12, 2), (12, 6), (6, 1)])
def test_patterns_that_share_kv_heads(
    heads: tuple[int, int], device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    case = a_case(n=45, heads=heads, head_dims=(24, 40), dtype=torch.float16)
    order = (1, 1, 2, 1, 1, 0, 1, 3, 1, 2, 4, 1)[: heads[0]]
    some = [sa.Strided(4), sa.Local(5), sa.Fixed(6, 2), sa.Dilated(3), sa.Summary(5, 2, 1)]
    pattern = sa.PerHead([some[number] for number in order])
    x = make_inputs(case, seed, device)
    sizes = itertools.cycle((16, 2, 11))
    assert_decodes(x, pattern, list(pattern.mask(45)), 3, sizes, backend)


# The plan of a cache.


@pytest.mark.parametrize("case", [c for c in CASES if c.n <= 129 and not c.per_head], ids=str)
def test_reads_cover_the_pattern_and_stores_keep_it(case: Case) -> None:
    plan = decode_plan(case.pattern, case.n)
    for query, row_mask in enumerate(case.masks[0]):
        attended: list[int] = []
        for read in plan.reads:
            group = group_of(read.queries, query)
            first, end = map(int, read.segment.bounds(read.run, group, query))
            assert end - first <= read.most_keys
            store = plan.stores[read.store]
            rows = [read.store_row(group, row) for row in range(first, end)]
            newest = store.tokens.rows_before(0, query + 1)
            assert all(newest - store.slots <= row < newest for row in rows)
            attended += [int(store.tokens.position(0, row)) for row in rows]
        wanted = row_mask.nonzero().flatten().tolist()
        assert sorted(attended) == wanted
        assert sorted(attended_keys(case.pattern, query).tolist()) == wanted


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        (sa.Dense(), 10_000),
        (sa.Local(100), 100),
        (sa.Chunk(100), 100),
        (sa.Dilated(100), 9901),  # the first query of the last row reads the first key
        (sa.Summary(100, 8), 800),
        (sa.Strided(100), 9901),  # the window is among them
        (sa.Fixed(100, 8), 100 + 800),
        (sa.Dense() | sa.Summary(100, 8), 10_000),
        (sa.Local(30) | sa.Chunk(50), 50),
        (sa.Local(20_000), 10_000),
    ],
    ids=str,
)
def test_caches_are_bounded(pattern: sa.Pattern, rows: int) -> None:
    cache = sa.KVCache(pattern, 3, 4, 10_000, 16, 24, kv_heads=2, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 2 * rows * (16 + 24) * 2
    keys = int(pattern.keys_per_query(10_000).max())
    assert keys <= cache.parts[0].plan.most_keys <= 2 * keys


def test_heads_keep_only_what_their_pattern_reads() -> None:
    pattern = sa.PerHead([sa.Local(10), sa.Dilated(10), sa.Local(10), sa.Local(10)])
    cache = sa.KVCache(pattern, 1, 4, 1000, 8, kv_heads=2)
    # The window of both kv heads, all keys of the first.
    assert cache.nbytes == (2 * 10 + 991) * (8 + 8) * 4


# What a step is.


class Recorder(TorchDispatchMode):
    """Writes down every operation with the shapes it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((str(func), getattr(result, "shape", None)))
        return result


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("new", [1, 3])
def test_every_step_is_the_same_operations(name: str, new: int, seed: int) -> None:
    """And none of them looks at a value on the host, so a CUDA graph can hold a step."""
    x = make_inputs(a_case(n=60, heads=(HEADS, 2), dtype=torch.float16), seed)
    cache = cache_for(x, PATTERNS[name])
    steps = []
    for position in range(0, 60, new):
        q, k, v = (tensor[:, :, position : position + new] for tensor in (x.q, x.k, x.v))
        cache.position.fill_(position)
        with Recorder() as recorder:
            torch_decode.decode(q, k, v, cache, 1.0, torch.empty_like(q))
        steps.append(recorder.operations)
    assert all(step == steps[0] for step in steps)
    on_host = {"aten._local_scalar_dense.default", "aten.nonzero.default"}
    assert not on_host & {operation for operation, _ in steps[0]}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("name", PATTERNS)
def test_one_graph_replays_every_step(name: str, backend: str, seed: int) -> None:
    case = a_case(n=300, heads=(HEADS, 2), dtype=torch.float16)
    x, pattern = make_inputs(case, seed, "cuda"), PATTERNS[name]
    eager, replayed = cache_for(x, pattern), cache_for(x, pattern)
    for cache in (eager, replayed):
        cache.prefill(x.k[:, :, :100], x.v[:, :, :100])
    q, k, v = (tensor[:, :, 100:101].clone() for tensor in (x.q, x.k, x.v))
    sa.decode(q, k, v, replayed, backend=backend)  # loads the kernels
    replayed.position.fill_(100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa.decode(q, k, v, replayed, backend=backend)
    assert int(replayed.position) == 100
    for position in range(100, 300):
        for held, tensor in zip((q, k, v), (x.q, x.k, x.v), strict=True):
            held.copy_(tensor[:, :, position : position + 1])
        graph.replay()
        wanted = decoded(x, eager, position, position + 1, itertools.repeat(1), backend)
        assert_same_bits(f"position {position}", out, wanted)
    assert int(replayed.position) == 300


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [sa.Dense(), sa.Strided(256), sa.Fixed(256, 32)], ids=str)
def test_long_cache(pattern: sa.Pattern, seed: int) -> None:
    """Many parts: the last queries of 65,536 tokens, each with its own few keys."""
    n, last = 65_536, 40
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, n, 64, device="cuda").half().unbind()
    cache = sa.KVCache(pattern, 1, 2, n, 64, dtype=torch.float16, device="cuda")
    cache.prefill(k[:, :, :-last], v[:, :, :-last])
    for i in range(n - last, n):
        new = slice(i, i + 1)
        out = sa.decode(q[:, :, new], k[:, :, new], v[:, :, new], cache, backend="cuda")
        tokens = torch.arange(i + 1, device="cuda")
        attended = {
            sa.Dense(): tokens >= 0,
            sa.Fixed(256, 32): (tokens // 256 == i // 256) | (tokens % 256 >= 224),
            sa.Strided(256): (tokens > i - 256) | (tokens % 256 == i % 256),
        }
        keys = attended[pattern].nonzero().flatten()
        q_row, k_rows, v_rows = q[:, :, new], k[:, :, keys], v[:, :, keys]
        masks = [torch.ones(1, len(keys), dtype=torch.bool)] * 2
        exact = oracle.attention(q_row, k_rows, v_rows, masks).out
        low = oracle.attention(q_row, k_rows, v_rows, masks, rounding=torch.float16).out
        assert_close(f"query {i}", out, exact, low)


# Memory that nobody attends.


def test_new_keys_that_no_query_attends_may_be_nan(device_backend: tuple[str, str]) -> None:
    device, backend = device_backend
    pattern = sa.Summary(8, 2, 3)
    case = a_case(n=40, dtype=torch.float16)
    x = make_inputs(case, 1, device)
    unread = ~pattern.mask(40).any(0).to(device)
    clean = decoded(x, cache_for(x, pattern), 0, 40, itertools.cycle((5, 1)), backend)
    for tensor in (x.k, x.v):
        tensor[:, :, unread] = NAN
    poisoned = decoded(x, cache_for(x, pattern), 0, 40, itertools.cycle((5, 1)), backend)
    assert_same_bits("out", poisoned, clean)
    assert not clean[:, :, :3].any()  # no key yet


def test_heads_without_any_key() -> None:
    cache = sa.KVCache(sa.Summary(100, 2), 1, 2, 50, 8)
    assert cache.nbytes == 0
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    assert not sa.decode(q, k, v, cache).any()


# The life of a cache.


def test_prefill_starts_over_and_the_newest_token_can_be_dropped(
    device_backend: tuple[str, str], seed: int
) -> None:
    device, backend = device_backend
    for pattern in PATTERNS.values():
        case = a_case(n=33, heads=(HEADS, 2), dtype=torch.float16)
        x = make_inputs(case, seed, device)
        cache = cache_for(x, pattern)
        cache.prefill(x.k + 1, x.v + 1)
        cache.prefill(x.k[:, :, :30], x.v[:, :, :30])
        once = decoded(x, cache, 30, 31, itertools.repeat(1), backend)
        cache.position.fill_(30)
        assert_same_bits("out", decoded(x, cache, 30, 31, itertools.repeat(1), backend), once)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_longer_cache_gives_the_same(name: str, seed: int) -> None:
    x = make_inputs(a_case(n=25, heads=(HEADS, 2), dtype=torch.float64), seed)
    short, long = (
        decoded(x, cache_for(x, PATTERNS[name], length), 0, 25, itertools.repeat(1), "torch")
        for length in (25, 300)
    )
    assert_close("out", long, short)


def test_under_autocast() -> None:
    x = make_inputs(a_case(n=30, dtype=torch.float32), 3)
    cache = sa.KVCache(sa.Strided(8), x.q.shape[0], 4, 30, 64, kv_heads=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cache.prefill(x.k[:, :, :20], x.v[:, :, :20])
        out = decoded(x, cache, 20, 30, itertools.repeat(1), "torch")
        wanted = sa.attention(x.q, x.k, x.v, sa.Strided(8))
    assert out.dtype == torch.bfloat16
    masks = [sa.Strided(8).mask(30)] * 4
    q, k, v = (tensor.bfloat16() for tensor in (x.q, x.k, x.v))
    exact = oracle.attention(q, k, v, masks).out
    low = oracle.attention(q, k, v, masks, rounding=torch.bfloat16).out
    assert_close("out", torch.cat([wanted[:, :, :20], out], 2), exact, low)


# Refusals.


def a_cache(**changes: Any) -> sa.KVCache:
    sizes = {"batch": 2, "heads": 4, "length": 20, "head_dim": 8, "kv_heads": 2}
    return sa.KVCache(**{"pattern": sa.Strided(4), **sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pattern": sa.Local(4, causal=False)}, ValueError, "causal pattern can decode.*Local"),
        ({"pattern": sa.PerHead([sa.Dense()] * 3)}, ValueError, "3 patterns for 4 heads"),
        (
            {"pattern": sa.BlockSparse(torch.ones(1, 2, 2, dtype=torch.bool), 16)},
            NotImplementedError,
            "layout of blocks",
        ),
        ({"pattern": "strided:4"}, TypeError, "pattern must be a pattern"),
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"length": 2.0}, TypeError, "length must be an int"),
        ({"batch": -1}, ValueError, "batch must be at least 0"),
        ({"kv_heads": 3}, ValueError, "kv_heads must divide heads, got kv_heads 3, heads 4"),
        ({"head_dim": 257}, ValueError, "head_dim must be at most 256, got 257"),
        ({"head_dim_v": 300}, ValueError, "head_dim_v must be at most 256, got 300"),
        ({"dtype": torch.int32}, TypeError, "dtype must be.*int32"),
    ],
)
def test_refuses_bad_caches(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        a_cache(**changes)


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        ((2, 2, 21, 8), (2, 2, 21, 8), ValueError, "prompt has 21 tokens, the cache holds 20"),
        ((2, 4, 5, 8), (2, 4, 5, 8), ValueError, r"k of shape \(2, 2, seq, 8\), got \(2, 4, 5, 8"),
        ((2, 2, 5, 8), (2, 2, 5, 9), ValueError, r"v of shape \(2, 2, seq, 8\)"),
        ((2, 2, 5, 8), (2, 2, 6, 8), ValueError, "one sequence length, got 5 and 6"),
    ],
)
def test_refuses_bad_prompts(
    k: tuple[int, ...], v: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        a_cache().prefill(torch.zeros(k), torch.zeros(v))
    with pytest.raises(TypeError, match=r"holds torch.float32, got k of torch.float64"):
        a_cache().prefill(torch.zeros(k).double(), torch.zeros(v).double())


def test_refuses_bad_steps() -> None:
    def step(cache: Any = None, new: int = 1, heads: int = 4, **options: Any) -> torch.Tensor:
        q, k = torch.zeros(2, heads, new, 8), torch.zeros(2, 2, new, 8)
        return sa.decode(q, k, k, a_cache() if cache is None else cache, **options)

    assert step(new=16).shape == (2, 4, 16, 8)
    with pytest.raises(ValueError, match="from 1 to 16, got 17"):
        step(new=17)
    with pytest.raises(ValueError, match="from 1 to 16, got 0"):
        step(new=0)
    with pytest.raises(ValueError, match="for 4 heads, got 2"):
        step(heads=2)
    with pytest.raises(TypeError, match="cache must be a KVCache, got str"):
        step(cache="full")
    with pytest.raises(TypeError, match=r"holds torch.float16, got k of torch.float32"):
        step(cache=a_cache(dtype=torch.float16))
    with pytest.raises(ValueError, match="finite, got nan"):
        step(scale=math.nan)
    with pytest.raises(TypeError, match="scale must be a float"):
        step(scale="1")
    with pytest.raises(ValueError, match="got 'reference'"):
        step(backend="reference")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: the inputs are on cpu"):
        step(backend="cuda")
    cache = a_cache()
    step(cache, new=15)
    with pytest.raises(ValueError, match="holds 20 tokens, got 6 after 15"):
        step(cache, new=6)
    assert int(cache.position) == 15
    assert int(step(cache, new=5).shape[2]) == 5


def test_empty_batch() -> None:
    cache = a_cache(batch=0)
    out = sa.decode(
        torch.empty(0, 4, 3, 8), torch.empty(0, 2, 3, 8), torch.empty(0, 2, 3, 8), cache
    )
    assert out.shape == (0, 4, 3, 8)
    assert int(cache.position) == 3


@pytest.mark.parametrize("name", ["KVCache", "decode"])
def test_examples_in_the_documentation(name: str) -> None:
    names = {**vars(sa), "torch": torch}
    examples = doctest.DocTestFinder(recurse=False).find(getattr(sa, name), name, globs=names)
    assert examples and examples[0].examples
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
