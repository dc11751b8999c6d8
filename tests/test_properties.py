# SPDX-License-Identifier: Apache-2.0
"""Hypothesis over the space of the cases, and derivatives by finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
import sparse_attn as sa
from cases import FACTORS, KINDS, Inputs, Kept, make_tensor, to_pattern
from compare import assert_same_bits
from test_attention import RESULTS, assert_matches_oracle, run

SIZES = st.integers(1, 40)
BACKENDS = ["torch", "reference"]


@st.composite
def layouts(draw: st.DrawFn, n: int, block: int, heads: int) -> tuple[Kept, ...]:
    """The kept blocks, of all heads or of each."""
    count = -(-n // block)
    row = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    head = st.lists(row, min_size=count, max_size=count).map(tuple)
    number = draw(st.sampled_from([1, heads]))
    return tuple(draw(st.lists(head, min_size=number, max_size=number)))


@st.composite
def calls(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FACTORS["dtype"]
) -> tuple[Inputs, Any, list[torch.Tensor], str]:
    """Inputs, pattern, oracle masks, and the call in words."""
    kind = draw(st.sampled_from([*KINDS, "blocks"]))
    n, size = draw(st.integers(1, 48)), draw(SIZES)
    columns = draw(st.integers(1, size))
    offset = draw(st.integers(0, size - columns))
    causal = draw(st.booleans())
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]))
    head_dim, head_dim_v = draw(st.sampled_from([(8, 8), (16, 24), (40, 8), (7, 3), (1, 1)]))
    layout = draw(st.sampled_from(FACTORS["layout"]))
    dtype = draw(st.sampled_from(dtypes))
    # Many rows, so that the largest rounding error is no matter of luck.
    batch = 2 if dtype == torch.float64 else max(2, 1024 // (n * heads))
    seed = draw(st.integers(0, 2**31 - 1))

    members: list[oracle.Members]
    if kind == "blocks":
        block = draw(st.sampled_from(sa.BlockSparse.blocks))
        kept = draw(layouts(n, block, heads))
        members = [(("blocks", block, kept[head % len(kept)]),) for head in range(heads)]
        pattern: Any = sa.BlockSparse(torch.tensor(kept), block, causal=causal)
    else:
        members = [KINDS[kind][1](size, columns, offset, head) for head in range(heads)]
        patterns = [to_pattern(head_members, causal) for head_members in members]
        pattern = sa.PerHead(patterns) if kind.startswith("heads:") else patterns[0]
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads: int, dim: int) -> torch.Tensor:
        return make_tensor((batch, heads, n, dim), layout, dtype, generator)

    q, k, v = tensor(heads, head_dim), tensor(kv_heads, head_dim), tensor(kv_heads, head_dim_v)
    dout = tensor(heads, head_dim_v)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(batch, heads, n, generator=generator, dtype=lse_dtype)
    words = f"{pattern}, n {n}, h{heads}kv{kv_heads} d{head_dim}v{head_dim_v} {layout} {dtype}"
    return Inputs(q, k, v, dout, dlse), pattern, oracle.masks(members, causal, n), words


ROUNDED = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,)))
def test_matches_the_oracle_in_fp64(backend: str, call: Any) -> None:
    x, pattern, masks, _ = call
    assert_matches_oracle(x, pattern, masks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(calls(dtypes=ROUNDED))
def test_matches_the_oracle_in_16_bits(backend: str, call: Any) -> None:
    x, pattern, masks, _ = call
    assert_matches_oracle(x, pattern, masks, backend)


@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,)))
def test_backends_agree(call: Any) -> None:
    x, pattern, _, _ = call
    a, b = run(x, pattern, "torch"), run(x, pattern, "reference")
    for name in RESULTS:
        left, right = a[name], b[name]
        assert left is not None and right is not None
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(calls(), st.data())
def test_a_key_changes_only_the_queries_that_see_it(call: Any, data: st.DataObject) -> None:
    """Bit for bit: through no tile, no chunk and no other batch entry."""
    x, pattern, masks, _ = call
    n, kv_heads = x.q.shape[2], x.k.shape[1]
    key = data.draw(st.integers(0, n - 1))
    kv_head = data.draw(st.integers(0, kv_heads - 1))
    k, v = x.k.clone(), x.v.clone()
    k[0, kv_head, key] += 1
    v[0, kv_head, key] -= 1
    before = sa.attention(x.q, x.k, x.v, pattern, return_lse=True, backend="torch")
    after = sa.attention(x.q, k, v, pattern, return_lse=True, backend="torch")
    group = x.q.shape[1] // kv_heads
    untouched = torch.ones(x.q.shape[:3], dtype=torch.bool)
    for head in range(kv_head * group, (kv_head + 1) * group):
        untouched[0, head] = ~masks[head][:, key]
    for name, a, b in zip(("out", "lse"), before, after, strict=True):
        assert_same_bits(name, a[untouched], b[untouched])
        assert (a[~untouched] != b[~untouched]).any() or not (~untouched).any()


@settings(max_examples=60)
@given(calls(dtypes=(torch.float64,)))
def test_batch_entries_do_not_mix(call: Any) -> None:
    x, pattern, _, _ = call
    whole = run(x, pattern, "torch")
    one = Inputs(*(tensor[1:2] for tensor in vars(x).values()))
    alone = run(one, pattern, "torch")
    for name in RESULTS:
        left, right = whole[name], alone[name]
        assert left is not None and right is not None
        torch.testing.assert_close(left[1:2], right, rtol=1e-9, atol=1e-9)


@st.composite
def unions(draw: st.DrawFn) -> tuple[Any, Any]:
    """Two patterns of any kind and one direction."""
    causal = draw(st.booleans())
    pair = []
    for _ in range(2):
        kind = draw(st.sampled_from([kind for kind in KINDS if not kind.startswith("heads:")]))
        size = draw(st.integers(1, 12))
        columns = draw(st.integers(1, size))
        offset = draw(st.integers(0, size - columns))
        pair.append(to_pattern(KINDS[kind][1](size, columns, offset, 0), causal))
    return pair[0], pair[1]


@given(unions(), st.integers(0, 30))
@example((sa.Local(3), sa.Local(3)), 9)
def test_a_union_is_the_union(pair: tuple[Any, Any], n: int) -> None:
    """In either order, or refused in both."""
    a, b = pair
    try:
        union = a | b
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match="BlockSparse"):
            b | a
        return
    assert union == b | a and hash(union) == hash(b | a)
    assert union.mask(n).equal(a.mask(n) | b.mask(n))
    assert union.keys_per_query(n).equal(union.mask(n).sum(-1))
    assert sa.parse_pattern(union.spec) == union
    assert union | a == union
    if n:
        assert union.flops(n, 8, 3) == 2 * int(union.mask(n).sum()) * 11


# Finite differences.

GRADCHECK: dict[str, list[oracle.Members]] = {
    "strided": [(("local", 3), ("dilated", 3))],
    "fixed": [(("chunk", 4), ("summary", 4, 2, 1))],
    "chunk+dilated": [(("chunk", 3), ("dilated", 2))],
    "summary, empty rows": [(("summary", 4, 1, 3),)],
    "per head": [(("local", 2),), (("summary", 4, 1, 3),), (("dense",),), (("dilated", 2),)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck_of_attention(name: str, causal: bool, backend: str) -> None:
    patterns = [to_pattern(members, causal) for members in GRADCHECK[name]]
    pattern = sa.PerHead(patterns) if len(patterns) > 1 else patterns[0]
    n = 7
    empty = torch.stack([p.mask(n).sum(-1) == 0 for p in patterns * (4 // len(patterns))])
    q = torch.randn(2, 4, n, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, n, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, n, 2, dtype=torch.float64, requires_grad=True)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = sa.attention(q, k, v, pattern, scale=0.7, return_lse=True, backend=backend)
        return out, lse.masked_fill(empty, 0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout_heads", [1, 4])
def test_gradcheck_of_blocks(layout_heads: int, causal: bool, backend: str) -> None:
    """19 tokens: the second block has three, which see no key in the first and the third head."""
    layout = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    pattern = sa.BlockSparse(layout.view(4, 2, 2)[:layout_heads], 16, causal=causal)
    empty = (pattern.mask(19).sum(-1) == 0).expand(4, 19)
    assert empty.any() and not empty.all()
    q = torch.randn(1, 4, 19, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 19, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 19, 1, dtype=torch.float64, requires_grad=True)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = sa.attention(q, k, v, pattern, scale=0.7, return_lse=True, backend=backend)
        return out, lse.masked_fill(empty, 0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)]
)
def test_gradcheck_of_some_inputs(wanted: tuple[bool, ...]) -> None:
    tensors = [
        torch.randn(1, heads, 5, 3, dtype=torch.float64, requires_grad=needs)
        for heads, needs in zip((2, 1, 1), wanted, strict=True)
    ]

    def function(*tensors: torch.Tensor) -> Any:
        return sa.attention(tensors[0], tensors[1], tensors[2], sa.Strided(2), return_lse=True)

    assert torch.autograd.gradcheck(function, tensors)


def test_gradcheck_of_merge() -> None:
    shapes = [(2, 3, 5, 4), (2, 3, 5)] * 2
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(sa.merge, parts)


def test_gradcheck_of_merge_with_empty_parts() -> None:
    """-inf is a constant there: gradcheck moves the other rows."""
    empty = torch.zeros(2, 2, 3, 5, dtype=torch.bool)
    empty[0, :, :, 0] = empty[1, :, :, 1] = empty[:, :, :, 2] = True
    shapes = [(2, 3, 5, 4), (2, 3, 5)] * 2
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(*parts: torch.Tensor) -> Any:
        out1, lse1, out2, lse2 = parts
        lse1 = lse1.masked_fill(empty[0], -torch.inf)
        lse2 = lse2.masked_fill(empty[1], -torch.inf)
        out, lse = sa.merge(out1, lse1, out2, lse2)
        return out, lse.masked_fill(empty.all(0), 0)

    assert torch.autograd.gradcheck(function, parts)


def test_gradcheck_through_attention_and_merge() -> None:
    """Two calls on disjoint keys and a merge are one call on the union."""
    q, k, v = (torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        # Chunks of 3 with no summary, and the odd columns of the sequence in another call.
        near = sa.attention(q, k, v, sa.Chunk(3), return_lse=True)
        far = sa.attention(q, k * 0.5, v, sa.Dilated(2), return_lse=True)
        return sa.merge(*near, *far)

    assert torch.autograd.gradcheck(function, (q, k, v))
