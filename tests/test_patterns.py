# SPDX-License-Identifier: Apache-2.0
"""Patterns: masks against the oracle, the algebra, text forms, counts, refusals."""

from __future__ import annotations

import dataclasses
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch

import oracle
import sparse_attn as sa
from cases import (
    BLOCK_FACTORS,
    FACTORS,
    KINDS,
    Case,
    all_pairs_cases,
    block_cases,
    pairs_of_blocks,
    required_pairs,
    to_pattern,
)
from cases import pairs_of as case_pairs

CASES = all_pairs_cases()
BLOCK_CASES = block_cases()
SMALL_CASES = [case for case in CASES if case.n <= 257]

MEMBERS = [
    sa.Dense(),
    sa.Local(7),
    sa.Chunk(7),
    sa.Dilated(7),
    sa.Summary(7, 2),
    sa.Summary(7, 2, offset=1),
]
UNIONS = [
    sa.Strided(7),
    sa.Fixed(7, 2),
    sa.Local(4) | sa.Chunk(6),
    sa.Chunk(3) | sa.Dilated(5),
    sa.Local(3) | sa.Chunk(4) | sa.Summary(5, 2, offset=1),
]
PER_HEAD = sa.PerHead([sa.Local(3), sa.Fixed(7, 2), sa.Dilated(2)])
PATTERNS = [*MEMBERS, *UNIONS, PER_HEAD]


def bidirectional(pattern: Any) -> Any:
    return sa.parse_pattern(pattern.spec.replace("causal=True", "causal=False"))


def full_mask(case: Case) -> torch.Tensor:
    masks = case.masks
    return torch.stack(masks) if case.per_head else masks[0]


# The cases themselves.


def test_every_pair_of_values_appears_in_some_case() -> None:
    missing = set(required_pairs())
    assert len(missing) > 2000
    for case in CASES:
        missing -= case_pairs(vars(case))
    assert not missing


def test_cases_are_the_same_every_time() -> None:
    all_pairs_cases.cache_clear()
    assert all_pairs_cases() == CASES
    assert len({str(case) for case in CASES}) == len(CASES)


def test_cases_hold_the_sizes_they_name() -> None:
    assert set(FACTORS["n"]) == {1, 2, 17, 63, 64, 65, 127, 128, 129, 257, 1000, 4097}
    assert {case.kind for case in CASES} == set(KINDS)
    for case in CASES:
        size, columns, offset = case.sizes
        assert size >= 1 and 1 <= columns <= size and 0 <= offset <= size - columns
        if case.size in ("n-1", "n", "n+5"):
            assert size == max(1, {"n-1": case.n - 1, "n": case.n, "n+5": case.n + 5}[case.size])
        elif case.size is not None:
            assert size == int(case.size)


def test_every_pair_of_values_appears_in_some_block_case() -> None:
    together = set().union(*(pairs_of_blocks(vars(case)) for case in BLOCK_CASES))
    for factor, values in BLOCK_FACTORS.items():
        for other, other_values in BLOCK_FACTORS.items():
            if list(BLOCK_FACTORS).index(factor) < list(BLOCK_FACTORS).index(other):
                wanted = {((factor, a), (other, b)) for a in values for b in other_values}
                assert wanted <= together
    assert len({str(case) for case in BLOCK_CASES}) == len(BLOCK_CASES)


def test_block_cases_hold_the_corners() -> None:
    long = [case for case in BLOCK_CASES if case.count >= 3]
    some = [case for case in long if case.blocks == "gaps"]
    assert some
    for case in some:
        mask = case.masks[0]
        assert not mask.any(1).all(), "every query has a key"
        assert not mask.any(0).all(), "every key has a query"
    uneven = [case for case in long if case.blocks == "heads" and case.heads[0] > 1]
    assert any(len({int(mask.sum()) for mask in case.masks}) > 2 for case in uneven)
    assert any(case.n % case.block == 1 for case in long)
    for case in BLOCK_CASES:
        kept = torch.tensor(case.kept)
        assert case.blocks not in ("empty", "full") or (kept == (case.blocks == "full")).all()
    for words in (2, 3):  # of 32 blocks each
        assert any((words - 1) * 32 < case.count <= words * 32 for case in BLOCK_CASES)


# Masks.

PICTURES = {
    "Local(3)": "1....... 11...... 111..... .111.... ..111... ...111.. ....111. .....111",
    "Local(2, causal=False)": (
        "11...... 111..... .111.... ..111... ...111.. ....111. .....111 ......11"
    ),
    "Chunk(3)": "1....... 11...... 111..... ...1.... ...11... ...111.. ......1. ......11",
    "Chunk(3, causal=False)": (
        "111..... 111..... 111..... ...111.. ...111.. ...111.. ......11 ......11"
    ),
    "Dilated(3)": "1....... .1...... ..1..... 1..1.... .1..1... ..1..1.. 1..1..1. .1..1..1",
    "Dilated(3, causal=False)": (
        "1..1..1. .1..1..1 ..1..1.. 1..1..1. .1..1..1 ..1..1.. 1..1..1. .1..1..1"
    ),
    "Summary(3, 1)": "........ ........ ..1..... ..1..... ..1..... ..1..1.. ..1..1.. ..1..1..",
    "Summary(4, 2, 1)": "....... .1..... .11.... .11.... .11.... .11..1. .11..11",
    "Summary(4, 1, 0, causal=False)": " ".join(["1...1..."] * 8),
    "Strided(3)": "1....... 11...... 111..... 1111.... .1111... ..1111.. 1..1111. .1..1111",
    "Fixed(4, 2)": "1....... 11...... 111..... 1111.... ..111... ..1111.. ..11111. ..111111",
    "Dense()": "1... 11.. 111. 1111",
    "Dense(causal=False)": "1111 1111 1111 1111",
    "Local(2) | Chunk(3)": "1...... 11..... 111.... ..11... ...11.. ...111. .....11",
}


@pytest.mark.parametrize("spec", PICTURES)
def test_mask_is_the_picture(spec: str) -> None:
    """Drawn by hand from the definitions; the oracle's members are held to it too."""
    rows = PICTURES[spec].split()
    wanted = torch.tensor([[mark == "1" for mark in row] for row in rows])
    assert sa.parse_pattern(spec).mask(len(rows)).equal(wanted)


def test_oracle_masks_are_the_pictures() -> None:
    drawn: dict[str, tuple[oracle.Members, bool]] = {
        "Local(3)": ((("local", 3),), True),
        "Local(2, causal=False)": ((("local", 2),), False),
        "Chunk(3)": ((("chunk", 3),), True),
        "Chunk(3, causal=False)": ((("chunk", 3),), False),
        "Dilated(3)": ((("dilated", 3),), True),
        "Dilated(3, causal=False)": ((("dilated", 3),), False),
        "Summary(3, 1)": ((("summary", 3, 1, 2),), True),
        "Summary(4, 2, 1)": ((("summary", 4, 2, 1),), True),
        "Summary(4, 1, 0, causal=False)": ((("summary", 4, 1, 0),), False),
        "Strided(3)": ((("local", 3), ("dilated", 3)), True),
        "Fixed(4, 2)": ((("chunk", 4), ("summary", 4, 2, 2)), True),
        "Dense()": ((("dense",),), True),
        "Dense(causal=False)": ((("dense",),), False),
        "Local(2) | Chunk(3)": ((("local", 2), ("chunk", 3)), True),
    }
    assert drawn.keys() == PICTURES.keys()
    for spec, (members, causal) in drawn.items():
        rows = PICTURES[spec].split()
        for i, row in enumerate(rows):
            wanted = {j for j, mark in enumerate(row) if mark == "1"}
            assert oracle.keys(members, causal, len(rows), i) == wanted, (spec, i)


@pytest.mark.parametrize("case", [c for c in (*CASES, *BLOCK_CASES) if c.n <= 65], ids=str)
def test_mask_is_the_set_pair_by_pair(case: Case) -> None:
    mask = case.pattern.mask(case.n)
    for head, members in enumerate(case.head_members):
        head_mask = mask[head] if case.per_head else mask
        for i in range(case.n):
            wanted = oracle.keys(members, case.causal, case.n, i)
            assert set(head_mask[i].nonzero().flatten().tolist()) == wanted, (head, i)
        if not case.per_head:
            break


@pytest.mark.parametrize("case", [*CASES, *BLOCK_CASES], ids=str)
def test_mask_is_the_oracle_mask(case: Case) -> None:
    mask = case.pattern.mask(case.n)
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.equal(full_mask(case))


@pytest.mark.parametrize("case", [*CASES, *BLOCK_CASES], ids=str)
def test_counts_are_those_of_the_oracle_mask(case: Case) -> None:
    wanted = full_mask(case).sum(-1)
    counts = case.pattern.keys_per_query(case.n)
    assert counts.dtype == torch.int64
    assert counts.equal(wanted)
    head_dim, head_dim_v = case.head_dims
    pairs = int(wanted.sum())
    heads = case.heads[0] if case.per_head else 1  # flops are their mean
    flops = case.pattern.flops(case.n, head_dim, head_dim_v)
    assert type(flops) is int
    assert flops == 2 * pairs * (head_dim + head_dim_v) // heads
    assert case.pattern.flops(case.n, head_dim) == 4 * pairs * head_dim // heads


def test_counts_of_a_million_tokens_need_no_mask() -> None:
    n = 1 << 20
    counts = sa.Strided(1024).keys_per_query(n)
    assert counts[-1] == 1024 + n // 1024 - 1
    counts = sa.Fixed(1024, 32).keys_per_query(n)
    assert counts[-1] == 1024 + 32 * (n // 1024 - 1)
    assert sa.Dense().flops(n, 64) == 2 * (n * (n + 1) // 2) * 128


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_tokens(pattern: Any) -> None:
    heads = (3,) if pattern == PER_HEAD else ()
    assert pattern.mask(0).shape == (*heads, 0, 0)
    assert pattern.keys_per_query(0).shape == (*heads, 0)
    assert pattern.flops(0, 64) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [5, 6, 1000, 2**31, 2**40, 2**62])
def test_any_size_is_valid_also_larger_than_n(kind: str, causal: bool, size: int) -> None:
    for columns, offset in [(1, 0), (3, size - 3), (size, 0)]:
        for head in range(4):
            members = KINDS[kind][1](size, columns, offset, head)
            pattern = to_pattern(members, causal)
            for n in (1, 5, 13):
                mask = pattern.mask(n)
                for i in range(n):
                    wanted = oracle.keys(members, causal, n, i)
                    assert set(mask[i].nonzero().flatten().tolist()) == wanted
                assert pattern.keys_per_query(n).equal(mask.sum(-1))


# Equality, text forms, pickling.


def test_strided_and_fixed_are_unions() -> None:
    assert sa.Strided(128) == sa.Local(128) | sa.Dilated(128)
    assert sa.Strided(9, causal=False) == sa.Local(9, causal=False) | sa.Dilated(9, causal=False)
    assert sa.Fixed(128, 32) == sa.Chunk(128) | sa.Summary(128, 32)
    assert sa.Fixed(128, 32, 5) == sa.Chunk(128) | sa.Summary(128, 32, 5)
    assert sa.Fixed(128, columns=32, offset=96) == sa.Fixed(128, 32)
    assert sa.Fixed(9, 2, causal=False) == (
        sa.Chunk(9, causal=False) | sa.Summary(9, 2, causal=False)
    )


def test_a_union_has_no_order() -> None:
    for a in PATTERNS[:-1]:
        for b in (sa.Local(5), sa.Chunk(5), sa.Dense()):
            assert a | b == b | a
            assert hash(a | b) == hash(b | a)
            assert (a | b).spec == (b | a).spec
    a, b, c = sa.Local(3), sa.Chunk(4), sa.Dilated(5)
    assert (a | b) | c == a | (b | c) == c | b | a


def test_union_with_itself() -> None:
    for pattern in MEMBERS:
        assert (pattern | pattern).mask(20).equal(pattern.mask(20))
        assert (pattern | pattern).keys_per_query(20).equal(pattern.keys_per_query(20))


def test_different_patterns_differ() -> None:
    different = [
        *PATTERNS,
        *map(bidirectional, PATTERNS),
        sa.Local(8),
        sa.Chunk(8),
        sa.Dilated(8),
        sa.Summary(8, 2),
        sa.Summary(7, 3),
        sa.PerHead([sa.Local(3)]),
        sa.PerHead([sa.Fixed(7, 2), sa.Local(3), sa.Dilated(2)]),
    ]
    assert len(set(different)) == len(different)
    assert len({pattern.spec for pattern in different}) == len(different)
    for i, a in enumerate(different):
        for j, b in enumerate(different):
            assert (a == b) == (i == j)


def test_summary_offset_defaults_to_the_last_columns() -> None:
    assert sa.Summary(16, 3) == sa.Summary(16, 3, offset=13)
    assert sa.Summary(16, 3).offset == 13


@pytest.mark.parametrize("pattern", [*PATTERNS, *map(bidirectional, PATTERNS)], ids=str)
def test_text_pickle_and_hash(pattern: Any) -> None:
    assert sa.parse_pattern(pattern.spec) == pattern
    assert sa.parse_pattern(repr(pattern)) == pattern
    assert eval(repr(pattern), vars(sa)) == pattern
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy == pattern and hash(copy) == hash(pattern) and copy.spec == pattern.spec
    assert copy.mask(9).equal(pattern.mask(9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.causal = False


def test_spec_is_canonical() -> None:
    assert sa.Strided(128).spec == (
        "Local(window=128, causal=True) | Dilated(stride=128, causal=True)"
    )
    fixed = (
        "Chunk(length=128, causal=True) | Summary(length=128, columns=32, offset=96, causal=True)"
    )
    assert sa.Fixed(128, 32).spec == fixed


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("strided:128", sa.Strided(128)),
        ("fixed:128,32", sa.Fixed(128, 32)),
        ("Local(128)", sa.Local(128)),
        (" Local( window = 128 ) ", sa.Local(128)),
        ("Summary(8, columns=2)", sa.Summary(8, 2)),
        ("Dense(causal=False)", sa.Dense(causal=False)),
        ("Chunk(4) | Summary(4, 1)", sa.Fixed(4, 1)),
        ("PerHead([Local(3), Strided(4)])", sa.PerHead([sa.Local(3), sa.Strided(4)])),
    ],
)
def test_parse_pattern(text: str, pattern: Any) -> None:
    assert sa.parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "strided",
        "strided:",
        "strided:x",
        "strided:128,3,4,5",
        "strided:0",
        "Local",
        "Local()",
        "Local(0)",
        "Local(-1)",
        "Local(3",
        "Local(width=3)",
        "Local(3) |",
        "Local(3) & Local(4)",
        "Local(3) | 4",
        "__import__('os').getcwd()",
        "open('x')",
        "[Local(3)]",
        "3",
        "Local(2 ** 3)",
    ],
)
def test_parse_pattern_refuses(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        sa.parse_pattern(text)
    assert repr(text) in str(raised.value) or "at least 1" in str(raised.value)


@pytest.mark.parametrize("text", [None, 128, b"strided:128", ["strided:128"], sa.Local(3)])
def test_parse_pattern_wants_text(text: Any) -> None:
    with pytest.raises(TypeError, match="str"):
        sa.parse_pattern(text)


# Refusals.

CONSTRUCTORS: dict[str, Any] = {
    "Local": lambda size: sa.Local(size),
    "Chunk": lambda size: sa.Chunk(size),
    "Dilated": lambda size: sa.Dilated(size),
    "Strided": lambda size: sa.Strided(size),
    "Summary-length": lambda size: sa.Summary(size, 1),
    "Summary-columns": lambda size: sa.Summary(8, size),
    "Fixed-length": lambda size: sa.Fixed(size, 1),
    "Fixed-columns": lambda size: sa.Fixed(8, size),
}


@pytest.mark.parametrize("size", [0, -1, -128])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_size_below_one(constructor: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"(?s)(at least|>=) 1.*{size}|{size}.*(at least|>=) 1"):
        CONSTRUCTORS[constructor](size)


@pytest.mark.parametrize("size", [True, False, 1.0, 2.5, "8", None, [8], torch.tensor(8)])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_size_of_a_wrong_type(constructor: str, size: Any) -> None:
    with pytest.raises(TypeError, match="int"):
        CONSTRUCTORS[constructor](size)


@pytest.mark.parametrize("make", [sa.Summary, sa.Fixed])
def test_summary_columns_must_lie_in_the_chunk(make: Any) -> None:
    for length, columns, offset in [(8, 3, 6), (8, 9, None), (8, 9, 0), (1, 1, 1), (8, 1, 8)]:
        with pytest.raises(ValueError, match=rf"(?s)columns.*{columns}.*length.*{length}"):
            make(length, columns, offset)
    with pytest.raises(ValueError, match="-1"):
        make(8, 3, -1)
    for odd in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="int"):
            make(8, 3, odd)


@pytest.mark.parametrize("causal", [0, 1, None, "yes"])
def test_causal_is_a_bool(causal: Any) -> None:
    for make in (
        lambda: sa.Dense(causal=causal),
        lambda: sa.Local(4, causal=causal),
        lambda: sa.Chunk(4, causal=causal),
        lambda: sa.Dilated(4, causal=causal),
        lambda: sa.Summary(4, 1, causal=causal),
        lambda: sa.Strided(4, causal=causal),
        lambda: sa.Fixed(4, 1, causal=causal),
    ):
        with pytest.raises(TypeError, match="bool"):
            make()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (sa.Dilated(3), sa.Dilated(4)),
        (sa.Dilated(3), sa.Summary(4, 1)),
        (sa.Summary(4, 1), sa.Summary(4, 1, offset=0)),
        (sa.Strided(3), sa.Strided(4)),
        (sa.Strided(3), sa.Fixed(4, 1)),
        (sa.Fixed(4, 1), sa.Fixed(5, 1)),
    ],
    ids=str,
)
def test_unsupported_union_names_block_sparse(a: Any, b: Any) -> None:
    for first, second in ((a, b), (b, a)):
        with pytest.raises(NotImplementedError, match="BlockSparse"):
            first | second


def test_members_of_a_union_agree_on_causal() -> None:
    with pytest.raises(ValueError, match="causal"):
        sa.Local(3) | sa.Dilated(3, causal=False)
    with pytest.raises(ValueError, match="causal"):
        sa.Strided(3) | sa.Chunk(3, causal=False)
    with pytest.raises(ValueError, match="causal"):
        sa.Local(3) | sa.Local(3, causal=False)


def test_no_nesting_of_per_head() -> None:
    for make in (
        lambda: PER_HEAD | sa.Local(3),
        lambda: sa.Local(3) | PER_HEAD,
        lambda: sa.Strided(3) | PER_HEAD,
        lambda: PER_HEAD | PER_HEAD,
        lambda: sa.PerHead([PER_HEAD]),
    ):
        with pytest.raises((TypeError, ValueError), match="PerHead"):
            make()


@pytest.mark.parametrize(
    "patterns", [sa.Local(3), 3, None, "Local(3)", [sa.Local(3), 4], ["Local(3)"]]
)
def test_per_head_of_no_patterns(patterns: Any) -> None:
    with pytest.raises(TypeError, match="pattern"):
        sa.PerHead(patterns)


def test_per_head_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        sa.PerHead([])


@pytest.mark.parametrize("other", [3, "Local(3)", None, {sa.Local(3)}])
def test_union_with_no_pattern(other: Any) -> None:
    with pytest.raises(TypeError):
        sa.Local(3) | other
    with pytest.raises(TypeError):
        other | sa.Local(3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bad_length(pattern: Any) -> None:
    for method in (pattern.mask, pattern.keys_per_query, lambda n: pattern.flops(n, 64)):
        for n in (-1, -100):
            with pytest.raises(ValueError, match=str(n)):
                method(n)
        for odd in (True, 8.0, "8", None):
            with pytest.raises(TypeError, match="int"):
                method(odd)


# BlockSparse.


def layout_of(*rows: str) -> torch.Tensor:
    """One head, drawn: a row for each query block."""
    return torch.tensor([[[mark == "1" for mark in row] for row in rows]])


def test_block_sparse_by_hand() -> None:
    """Three blocks, the last of 2 tokens; no block above the diagonal where causal."""
    layout = layout_of("101", "000", "110")
    n = 34
    causal, both = sa.BlockSparse(layout, 16), sa.BlockSparse(layout, 16, causal=False)
    attended = {i: set(range(i + 1)) if i < 16 else set[int]() for i in range(32)}
    attended |= {i: set(range(32)) for i in (32, 33)}
    for i in range(n):
        assert set(causal.mask(n)[i].nonzero().flatten().tolist()) == attended[i]
        if i < 16:
            attended[i] = {*range(16), 32, 33}
        assert set(both.mask(n)[i].nonzero().flatten().tolist()) == attended[i]
    assert causal.keys_per_query(n).tolist() == [*range(1, 17), *[0] * 16, 32, 32]
    assert both.keys_per_query(n).tolist() == [*[18] * 16, *[0] * 16, 32, 32]
    assert causal.flops(n, 8, 3) == 2 * (136 + 64) * 11


def test_block_sparse_of_all_blocks_is_dense() -> None:
    for causal in (True, False):
        pattern = sa.BlockSparse(torch.ones(1, 4, 4, dtype=torch.bool), 32, causal=causal)
        assert pattern.mask(100).equal(sa.Dense(causal=causal).mask(100))


def test_block_sparse_of_no_tokens() -> None:
    for heads in (1, 3):
        pattern = sa.BlockSparse(torch.ones(heads, 0, 0, dtype=torch.bool), 16)
        shape = () if heads == 1 else (heads,)
        assert pattern.mask(0).shape == (*shape, 0, 0)
        assert pattern.keys_per_query(0).shape == (*shape, 0)
        assert pattern.flops(0, 64) == 0


def test_block_sparse_counts_without_a_mask() -> None:
    n, block = 1 << 17, 128
    layout = torch.zeros(1, n // block, n // block, dtype=torch.bool)
    layout[:, :, 0] = True
    counts = sa.BlockSparse(layout, block).keys_per_query(n)
    assert counts[:128].equal(torch.arange(1, 129)) and (counts[128:] == 128).all()


def test_block_sparse_is_equal_by_its_layout_itself() -> None:
    layout = layout_of("10", "11")
    pattern = sa.BlockSparse(layout, 16)
    same = sa.BlockSparse(layout, 16, causal=True)
    assert pattern == same and hash(pattern) == hash(same) and len({pattern, same}) == 1
    others = [
        sa.BlockSparse(layout.clone(), 16),
        sa.BlockSparse(layout, 32),
        sa.BlockSparse(layout, 16, causal=False),
        sa.Dense(),
    ]
    for other in others:
        assert pattern != other and other != pattern
    assert len({pattern, *others}) == 5


def test_block_sparse_in_text() -> None:
    pattern = sa.BlockSparse(layout_of("10", "11"), 64, causal=False)
    assert pattern.spec == "BlockSparse(block=64, causal=False)"
    assert repr(pattern) == "BlockSparse(layout=(1, 2, 2), block=64, causal=False)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.block = 32  # type: ignore[misc]
    for text in ("blocksparse:64", pattern.spec, repr(pattern), "BlockSparse(block=64)"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            sa.parse_pattern(text)


def test_block_sparse_pickles() -> None:
    pattern = sa.BlockSparse(layout_of("10", "11"), 16, causal=False)
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy.layout.equal(pattern.layout) and copy.spec == pattern.spec
    assert copy.mask(20).equal(pattern.mask(20))
    assert copy != pattern  # another layout of the same content


@pytest.mark.parametrize(
    "layout",
    [
        None,
        [[[True]]],
        np.ones((1, 2, 2), dtype=bool),
        torch.ones(1, 2, 2),
        torch.ones(1, 2, 2, dtype=torch.uint8),
        torch.ones(1, 2, 2, dtype=torch.int64),
    ],
    ids=lambda layout: f"{type(layout).__name__}-{getattr(layout, 'dtype', None)}",
)
def test_block_sparse_layout_of_a_wrong_type(layout: Any) -> None:
    with pytest.raises(TypeError, match=r"layout.*bool"):
        sa.BlockSparse(layout, 16)


@pytest.mark.parametrize(
    "shape", [(), (4,), (4, 4), (1, 1, 4, 4), (1, 4, 3), (2, 3, 4), (0, 4, 4)], ids=str
)
def test_block_sparse_layout_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layout.*" + re.escape(str(shape))):
        sa.BlockSparse(torch.ones(shape, dtype=torch.bool), 16)


@pytest.mark.parametrize("block", [-16, 0, 1, 8, 17, 48, 256, 2**40])
def test_block_sparse_block_of_a_wrong_size(block: int) -> None:
    with pytest.raises(ValueError, match=rf"block.*got {block}"):
        sa.BlockSparse(layout_of("1"), block)


@pytest.mark.parametrize("block", [True, 16.0, "16", None, [16], torch.tensor(16)], ids=str)
def test_block_sparse_block_of_a_wrong_type(block: Any) -> None:
    with pytest.raises(TypeError, match=r"block.*int"):
        sa.BlockSparse(layout_of("1"), block)


@pytest.mark.parametrize("causal", [0, 1, None, "yes"])
def test_block_sparse_causal_is_a_bool(causal: Any) -> None:
    with pytest.raises(TypeError, match=r"causal.*bool"):
        sa.BlockSparse(layout_of("1"), 16, causal=causal)


def test_block_sparse_only_at_the_length_of_its_layout() -> None:
    pattern: Any = sa.BlockSparse(layout_of("10", "11"), 16)
    for n in (17, 32):
        assert pattern.mask(n).shape == (n, n) and pattern.keys_per_query(n).shape == (n,)
    for method in (pattern.mask, pattern.keys_per_query, lambda n: pattern.flops(n, 64)):
        for n in (0, 1, 16, 33, 1000):
            with pytest.raises(ValueError, match=rf"\b{n} tokens.*\(1, 2, 2\)"):
                method(n)
        with pytest.raises(ValueError, match="-1"):
            method(-1)
        for odd in (True, 8.0, "8", None):
            with pytest.raises(TypeError, match="int"):
                method(odd)


def test_block_sparse_is_no_member_of_a_union() -> None:
    pattern: Any = sa.BlockSparse(layout_of("1"), 16)
    for other in (sa.Local(3), sa.Strided(3), pattern):
        for first, second in ((pattern, other), (other, pattern)):
            with pytest.raises(NotImplementedError, match=r"BlockSparse.*union"):
                first | second
    for odd in (3, None, "Local(3)"):
        with pytest.raises(TypeError):
            pattern | odd


def test_block_sparse_is_no_head_of_per_head() -> None:
    pattern = sa.BlockSparse(layout_of("1"), 16)
    for patterns in ([pattern], [sa.Local(3), pattern]):
        with pytest.raises(TypeError, match=r"PerHead.*BlockSparse"):
            sa.PerHead(patterns)
