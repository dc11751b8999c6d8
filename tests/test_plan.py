# SPDX-License-Identifier: Apache-2.0
"""The plan covers exactly the mask, each key once; so does the kernels' index arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import sanitize
import sparse_attn as sa
from cases import KINDS, BlockCase, Case, all_pairs_cases, block_cases, has_factor, to_pattern
from sparse_attn.plan import Branch, plan

try:
    from sparse_attn import _C

    NATIVE = True
except ImportError:
    NATIVE = False

needs_native = pytest.mark.skipif(not NATIVE, reason="the native module is not built")

CASES = all_pairs_cases()
BLOCK_CASES = block_cases()
TILES = [(64, 64), (128, 64), (64, 128), (16, 8), (1, 1), (7, 5), (5, 300)]


def walk(branches: tuple[Branch, ...], n: int) -> np.ndarray:
    """How often each (query, key) is attended, int (n, n), one query at a time."""
    counts = np.zeros((n, n), dtype=np.int64)
    for branch in branches:
        view = branch.queries
        listed = np.zeros(n, dtype=np.int64)
        most_rows = 0
        for group in range(view.groups):
            rows = int(view.rows(group))
            most_rows = max(most_rows, rows)
            assert 0 <= rows <= view.max_rows
            before = [(0, 0)] * len(branch.segments)
            for row in range(rows):
                query = int(view.position(group, row))
                assert 0 <= query < n
                listed[query] += 1
                for number, segment in enumerate(branch.segments):
                    keys = segment.keys
                    assert keys.groups in (1, view.groups)
                    first, last = (int(x) for x in segment.bounds(branch.run, group, query))
                    assert first >= 0 and last <= int(keys.rows(group))
                    # Both ends grow with the query: its first and last query bound a tile.
                    assert first >= before[number][0] and last >= before[number][1]
                    before[number] = (first, last)
                    if first < last:
                        positions = keys.position(group, np.arange(first, last))
                        assert positions.min() >= 0 and positions.max() < n
                        np.add.at(counts[query], positions, 1)
        assert view.max_rows == most_rows
        assert listed.max() <= 1, "a branch lists a query twice"
    return counts


def assert_covers(branches: tuple[Branch, ...], mask: torch.Tensor) -> None:
    counts = walk(branches, mask.shape[0])
    wrong = np.argwhere(counts != mask.numpy())
    assert not len(wrong), (
        f"{len(wrong)} pairs; first (query, key) {tuple(wrong[0])} is attended "
        f"{counts[tuple(wrong[0])]} times, wanted {int(mask[tuple(wrong[0])])}"
    )


def head_patterns(case: Case) -> list[tuple[Any, torch.Tensor]]:
    """The distinct patterns of a case, each with its oracle mask."""
    distinct = dict.fromkeys(case.head_members)
    return [
        (to_pattern(members, case.causal), oracle.mask(members, case.causal, case.n))
        for members in distinct
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_covers_the_mask(case: Case) -> None:
    for pattern, mask in head_patterns(case):
        assert_covers(plan(pattern, case.n), mask)


def test_walk_fails_on_planted_errors() -> None:
    pattern, n = sa.Strided(5), 23
    mask = oracle.mask((("local", 5), ("dilated", 5)), True, n)
    assert_covers(plan(pattern, n), mask)
    with pytest.raises(AssertionError, match="wanted 1"):
        assert_covers(plan(pattern, n)[:1], mask)
    with pytest.raises(AssertionError, match="attended 2 times"):
        assert_covers(plan(pattern, n) * 2, mask)
    with pytest.raises(AssertionError, match="wanted 0"):
        assert_covers(plan(sa.Strided(6), n), mask)


def test_per_head_has_no_plan_of_its_own_but_its_heads_have() -> None:
    pattern = sa.PerHead([sa.Local(3), sa.Dilated(3)])
    for head, members in zip(pattern.patterns, [("local", 3), ("dilated", 3)], strict=True):
        assert_covers(plan(head, 20), oracle.mask((members,), True, 20))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, 128])
def test_plan_of_blocks_is_all_pairs_until_it_gets_a_layout(block: int, causal: bool) -> None:
    n = 70
    count = -(-n // block)
    pattern = sa.BlockSparse(torch.zeros(3, count, count, dtype=torch.bool), block, causal=causal)
    branches = plan(pattern, n)
    assert_covers(branches, oracle.mask((("dense",),), causal, n))
    assert [branch.block for branch in branches] == [block]
    assert all(branch.block == 0 for branch in plan(sa.Strided(16), n))


def test_layouts_share_a_plan() -> None:
    """A plan is of the blocks and the direction: the caches hold no layout."""
    first, second = (
        sa.BlockSparse(torch.rand(heads, 4, 4) < 0.5, 16, causal=False) for heads in (1, 3)
    )
    assert first != second and plan(first, 60) is plan(second, 60)
    assert first.rule == second.rule and first.rule != sa.BlockSparse(first.layout, 16).rule


SIZES = st.integers(1, 40)


@st.composite
def members_of_a_kind(draw: st.DrawFn) -> tuple[oracle.Members, bool, int]:
    """Any members of a supported union, beyond those that the cases pair up."""
    n = draw(st.integers(1, 64))
    near = st.one_of(
        st.just(("dense",)),
        st.tuples(st.just("local"), SIZES),
        st.tuples(st.just("chunk"), SIZES),
    )
    members: list[oracle.Member] = draw(st.lists(near, max_size=4))
    far = draw(
        st.sampled_from(["none", "dilated", "summary"] if members else ["dilated", "summary"])
    )
    if far == "dilated":
        members.append(("dilated", draw(SIZES)))
    elif far == "summary":
        length = draw(SIZES)
        columns = draw(st.integers(1, length))
        members.append(("summary", length, columns, draw(st.integers(0, length - columns))))
    return tuple(members), draw(st.booleans()), n


@given(members_of_a_kind())
def test_plan_covers_any_union(drawn: tuple[oracle.Members, bool, int]) -> None:
    members, causal, n = drawn
    pattern, mask = to_pattern(members, causal), oracle.mask(members, causal, n)
    assert pattern.mask(n).equal(mask)
    assert_covers(plan(pattern, n), mask)
    assert pattern.keys_per_query(n).equal(mask.sum(-1))


def test_plans_at_a_million_tokens_are_a_few_integers() -> None:
    for pattern in (sa.Strided(1024), sa.Fixed(1024, 32), sa.Dense()):
        branches = plan(pattern, 1 << 20)
        assert len(branches) <= 2
        assert all(len(branch.segments) <= 3 for branch in branches)


# The native twins.


def native_cover(branches: Any, n: int, tiles: tuple[int, int]) -> np.ndarray:
    counts = _C.cover(list(branches), n, *tiles)
    return np.frombuffer(counts, dtype=np.uint8).reshape(n, n)


def packed_rows(kept: torch.Tensor, past: bool, future: bool) -> np.ndarray:
    """uint32 (heads, blocks, words) of bool (heads, blocks, blocks): bit b of word w is block
    32 w + b. Without past none before the diagonal, without future none after it."""
    heads, count, _ = kept.shape
    words = -(-count // 32)
    rows = np.zeros((heads, count, words), dtype=np.uint32)
    for head, row, column in kept.nonzero().tolist():
        if (past or column >= row) and (future or column <= row):
            rows[head, row, column // 32] |= np.uint32(1 << column % 32)
    return rows


def assert_native_covers(
    pattern: Any, mask: torch.Tensor, tiles: tuple[int, int], kept: torch.Tensor | None = None
) -> None:
    """The plan, and the branches of the launches that sum dk and dv, where keys are the queries.

    ``kept``: bool (blocks, blocks) of a layout, which the kernels read packed.
    """
    from sparse_attn.backends.cuda import native_plan

    n = mask.shape[0]
    launches = _C.Gradients([head_range(plan(pattern, n), n, sm90=False)]).launches
    keys = tuple(launch.branch for launch in launches if launch.owner == KEYS)
    for branches, is_transposed, wanted in (
        (native_plan(pattern, n), False, mask),
        (keys, True, mask.T),
    ):
        if kept is not None:
            past, future = (not pattern.causal or is_transposed == later for later in (False, True))
            rows = packed_rows((kept.T if is_transposed else kept)[None], past, future)
            branches = tuple(
                branch.with_blocks(rows=rows.ctypes.data, words=rows.shape[2], head_stride=0)
                for branch in branches
            )
        together = [branch.with_short_groups_together(tiles[0]) for branch in branches]
        for listed in (branches, together):
            counts = native_cover(listed, n, tiles)
            wrong = np.argwhere(counts != wanted.numpy())
            assert not len(wrong), (
                f"tiles {tiles}, transposed {is_transposed}, together {listed is together}: "
                f"{len(wrong)} pairs; first {tuple(wrong[0])} is attended "
                f"{counts[tuple(wrong[0])]} times"
            )


@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_plan_covers_the_mask(case: Case) -> None:
    tiles = TILES if case.n <= 257 else TILES[:2] if case.n <= 1000 else TILES[1:2]
    for pattern, mask in head_patterns(case):
        for tile in tiles:
            assert_native_covers(pattern, mask, tile)


@needs_native
@given(members_of_a_kind(), st.integers(1, 20), st.integers(1, 20))
def test_native_plan_covers_any_union(
    drawn: tuple[oracle.Members, bool, int], tile_queries: int, tile_keys: int
) -> None:
    members, causal, n = drawn
    pattern, mask = to_pattern(members, causal), oracle.mask(members, causal, n)
    assert_native_covers(pattern, mask, (tile_queries, tile_keys))


@needs_native
@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_factor(kind, "size")])
@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**40])
def test_native_sizes_beyond_32_bits(kind: str, size: int) -> None:
    for head in range(4):
        members = KINDS[kind][1](size, 3, size - 3, head)
        for causal in (True, False):
            mask = torch.tensor(
                [[j in oracle.keys(members, causal, 9, i) for j in range(9)] for i in range(9)]
            )
            assert_native_covers(to_pattern(members, causal), mask, (4, 4))


QUERIES, KEYS, ALL = range(3)  # whose gradients a launch sums


def call_params(
    n: int, head_dims: tuple[int, int], sm90: bool = True, kv_heads: int = 6, head_count: int = 6
) -> Any:
    return _C.CallParams(
        **dict.fromkeys(("q", "k", "v", "out"), (0, 0, 0)),
        batch=2,
        heads=head_count,
        first_head=0,
        head_count=head_count,
        kv_heads=kv_heads,
        seq=n,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        scale=1.0,
        bfloat16=False,
        sm90=sm90,
        device=0,
    )


def head_range(
    branches: tuple[Branch, ...],
    n: int,
    head_dims: tuple[int, int] = (64, 64),
    sm90: bool = True,
    heads_together: int = 1,
    head_count: int = 6,
) -> Any:
    """Some heads, and branches of their plan."""
    from sparse_attn.backends.cuda import _native_branch

    call = call_params(n, head_dims, sm90, head_count // heads_together, head_count)
    strides = dict.fromkeys(("dout", "dq", "dk", "dv"), (0, 0, 0))
    params = _C.BackwardParams(call, **strides, heads_together=heads_together)
    return params, tuple(map(_native_branch, branches))


def kernels(gradients: Any) -> list[str]:
    return [
        ("queries", "keys", "ordered" if launch.workspace else "bands")[launch.owner]
        for launch in gradients.launches
    ]


@needs_native
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (sa.Dense(), "ordered"),
        (sa.Local(300, causal=False), "ordered"),
        (sa.Local(300), "queries keys"),
        (sa.Chunk(128), "bands"),
        (sa.Summary(64, 24), "ordered"),
        (sa.Fixed(64, 24), "bands ordered"),  # key views go apart
        (sa.Fixed(64, 24, causal=False), "queries keys keys"),
        (sa.Strided(700), "ordered bands"),
        (sa.Strided(40), "bands bands"),
        (sa.Strided(40, causal=False), "queries keys queries keys"),
    ],
    ids=str,
)
def test_launches_sum_the_gradients_of_each_pair_once(pattern: Any, names: str) -> None:
    n = 1300
    mask = pattern.mask(n).numpy()
    for sm90, heads_together in ((True, 1), (True, 2), (False, 1)):
        found = _C.Gradients(
            [head_range(plan(pattern, n), n, sm90=sm90, heads_together=heads_together)]
        )
        if sm90 and heads_together == 1:
            assert " ".join(kernels(found)) == names
        else:
            assert set(kernels(found)) == {"queries", "keys"}
        sums = {owner: np.zeros((n, n), dtype=np.int64) for owner in (QUERIES, KEYS)}
        for launch in found.launches:
            owners = (QUERIES, KEYS) if launch.owner == ALL else (launch.owner,)
            counts = native_cover([launch.branch], n, (128, 64))
            for owner in owners:
                assert launch.accumulate == sums[owner].any()
                sums[owner] += counts if owner == KEYS or launch.owner == QUERIES else counts.T
        assert (sums[QUERIES] == mask).all() and (sums[KEYS] == mask.T).all()
        first = found.launches[0]
        if kernels(found)[0] == "ordered":  # writes the queries that have a key
            counts = native_cover([first.branch], n, (128, 64))
            assert first.writes_every_dq == counts.any(axis=0).all()


@needs_native
def test_launches_that_find_the_statistics() -> None:
    n = 500

    def found(*patterns: Any) -> tuple[list[bool], bool, bool]:
        gradients = _C.Gradients([head_range(plan(pattern, n), n) for pattern in patterns])
        finds = [launch.finds_stats for launch in gradients.launches]
        return finds, gradients.stats_before, gradients.keeps_stats

    assert found(sa.Local(9)) == ([True], False, False)
    assert found(sa.Local(9), sa.Chunk(7)) == ([True, True], False, False)
    assert found(sa.Local(9), sa.Strided(7)) == ([True, True, False], False, True)
    assert found(sa.Local(9), sa.Local(300)) == ([False, False, False], True, True)


@needs_native
def test_bands_add_to_neighbours() -> None:
    """Residues first: adding to them is slower."""
    n = 500
    launches = _C.Gradients([head_range(plan(sa.Strided(7), n), n)]).launches
    for launch, distance in zip(launches, (14, 1), strict=True):
        assert native_cover([launch.branch], n, (128, 64))[100, 100 + distance] == 1


@needs_native
def test_a_plan_without_a_branch_has_no_launches() -> None:
    with pytest.raises(ValueError, match="a plan has a branch"):
        _C.Gradients([head_range((), 200)])


@needs_native
def test_sanitize_reaches_every_backward_kernel() -> None:
    reached = set()
    for pattern, n, heads, kv_heads in (*sanitize.CALLS, *sanitize.LONG_CALLS):
        if isinstance(pattern, (sa.PerHead, sa.BlockSparse)):
            continue
        call = head_range(plan(pattern, n), n, heads_together=heads // kv_heads)
        found = _C.Gradients([call])
        adds = [launch.accumulate for launch in found.launches]
        reached |= set(zip(kernels(found), adds, strict=True))
    every = ("queries", "keys", "bands", "ordered")
    assert reached == {(kernel, adds) for kernel in every for adds in (False, True)}


def summed_at_once(pattern: Any, n: int) -> list[bool]:
    """Which branches one kernel sums; of these every pair is in a tile of 128 rows or two."""
    at_once = []
    for branch in plan(pattern, n):
        launches = _C.Gradients([head_range((branch,), n)]).launches
        at_once.append(len(launches) == 1 and not launches[0].workspace)
        if not at_once[-1]:
            continue
        view, (segment,) = branch.queries, branch.segments
        assert segment.keys == view
        before = 0 if view.max_rows <= 128 else 128
        for group in range(view.groups):
            rows = np.arange(int(view.rows(group)))
            first, end = segment.bounds(branch.run, group, view.position(group, rows))
            own = rows // 128 * 128
            assert ((first >= end) | (first >= own - before) & (end <= own + 128)).all()
    return at_once


def bytes_for_dq(
    pattern: Any, n: int, head_dim: int, head_dim_v: int, head_count: int = 3
) -> list[int]:
    """What the launches that sum dq borrow to do so in turns; 0: other kernels run."""
    heads = head_range(plan(pattern, n), n, (head_dim, head_dim_v), head_count=head_count)
    launches = [x for x in _C.Gradients([heads]).launches if x.owner != KEYS]
    return [0 if launch.owner == QUERIES else launch.workspace for launch in launches]


@needs_native
@pytest.mark.parametrize("n", [1, 700, 3001, 2**15, 2**18 + 77, 2**20, 2**24 + 1])
def test_memory_for_dq_is_bounded(n: int) -> None:
    """Sums in proportion to what is computed at a time, a number for each tile of queries."""
    patterns: list[Any] = [sa.Dense(), sa.Local(1024), sa.Local(1024, causal=False)]
    patterns += [sa.Strided(2048), sa.Dilated(3), sa.Fixed(128, 32), sa.Chunk(3000) | sa.Local(999)]
    for pattern in patterns:
        for head_dims in ((64, 64), (40, 96), (128, 128)):
            counters = 4 * 2 * 3 * (n / 64 + 2 * 3000)
            assert max(bytes_for_dq(pattern, n, *head_dims)) <= 2**26 + counters
    windows = [bytes_for_dq(sa.Local(1024), n, dim, dim)[0] for dim in (32, 64, 128, 136)]
    assert [size > 0 for size in windows] == [False, n > 1000, n > 1000, False]
    assert bytes_for_dq(sa.Local(300), n, 64, 64) == [0]


@needs_native
@pytest.mark.parametrize(
    ("pattern", "n", "counters"),
    [
        (sa.Local(128), 9000, 0),
        (sa.Local(128), 1 << 18, 1),  # so many that tickets pay
        (sa.Local(1024), 1025, 1),
        (sa.Dense(), 1025, 1),
        (sa.Strided(128), 9000, 1 + 2 * 6),  # a count for each head of both sequences
        (sa.Strided(1024), 9000, 1),
        (sa.Fixed(32, 4), 700, 0),
    ],
    ids=str,
)
def test_forward_counters(pattern: Any, n: int, counters: int) -> None:
    from sparse_attn.backends.cuda import _native_branch

    def counted(sm90: bool) -> int:
        branches = tuple(map(_native_branch, plan(pattern, n)))
        params = _C.ForwardParams(call_params(n, (64, 64), sm90), branches)
        return int(_C.ForwardCall([params]).counters)

    if not hasattr(_C, "ForwardCall") or not _C.sm90_fits(64, 64):
        pytest.skip("needs a build with Hopper kernels")
    assert (counted(sm90=True), counted(sm90=False)) == (counters, 0)


@needs_native
@pytest.mark.parametrize(
    ("pattern", "borrowed"),
    [(sa.Local(1024), 4), (sa.Dense(), 4), (sa.Local(256), 0), (sa.Dilated(64), 0)],
    ids=str,
)
def test_two_owners_of_many_keys_borrow_a_ticket(pattern: Any, borrowed: int) -> None:
    """At head dim 256, where dq, dk and dv have owners of their own."""
    launches = _C.Gradients([head_range(plan(pattern, 9000), 9000, (256, 256))]).launches
    assert {launch.owner for launch in launches} == {QUERIES, KEYS}
    assert {launch.workspace for launch in launches} == {borrowed}


@needs_native
def test_where_dq_is_summed_in_turns() -> None:
    """Where keys are many, near or not; each key view on its own."""
    (panel,) = (part for part in bytes_for_dq(sa.Fixed(64, 16), 9000, 64, 64) if part)
    assert panel > 9000 * 64 * 4
    assert bytes_for_dq(sa.Dilated(100), 9000, 64, 64) == [0]
    assert all(bytes_for_dq(sa.Dilated(5), 9000, 64, 64))
    # From 448 queries of the middle key on: of far residues of 1,024 rows it has 511.
    assert bytes_for_dq(sa.Strided(9), 9 * 1024, 64, 64)[-1] > 0
    assert bytes_for_dq(sa.Local(447), 9000, 64, 64) == [0]
    assert bytes_for_dq(sa.Local(448), 9000, 64, 64)[0] > 0


@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_branches_summed_at_once_are_bands(case: Case) -> None:
    for pattern, _ in head_patterns(case):
        summed_at_once(pattern, case.n)


@needs_native
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [100, 128, 200, 1111])
def test_which_branches_are_summed_at_once(n: int, causal: bool) -> None:
    one_tile = n <= 128
    for window in (1, 128, 129, 130):
        near = one_tile or (causal and window <= 129)
        assert summed_at_once(sa.Local(window, causal=causal), n) == [near]
        near = one_tile or (causal and window + 50 <= 129)
        union = sa.Local(window, causal=causal) | sa.Chunk(window + 50, causal=causal)
        assert summed_at_once(union, n) == [near]
    for length in (1, 128, 129, 2000):
        fits = one_tile or length <= 128
        assert summed_at_once(sa.Chunk(length, causal=causal), n) == [fits]
    for stride in (1, 7, 9, 128):
        fits = -(-n // stride) <= 128
        assert summed_at_once(sa.Dilated(stride, causal=causal), n) == [fits]
    if causal:
        assert summed_at_once(sa.Strided(100, causal=True), n) == [True, True]
        assert summed_at_once(sa.Strided(8, causal=True), n)[0]
    assert summed_at_once(sa.Fixed(100, 10, causal=causal), n) == [False]
    assert summed_at_once(sa.BlockSparse(torch.ones(1, 9, 9).bool(), 128, causal=causal), 1111) == [
        False
    ]


BLOCK_TILES = [(64, 64), (64, 32), (32, 16)]  # of the kernels


@needs_native
@pytest.mark.parametrize("tiles", BLOCK_TILES, ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_native_plan_of_blocks_covers_the_mask(case: BlockCase, tiles: tuple[int, int]) -> None:
    heads = dict(zip(case.kept, case.masks, strict=False))  # one layout serves all heads, or one
    for kept, mask in heads.items():
        assert_native_covers(case.pattern, mask, tiles, torch.tensor(kept))


@needs_native
@given(
    st.sampled_from(BLOCK_TILES),
    st.sampled_from(sa.BlockSparse.blocks),
    st.integers(1, 200),
    st.booleans(),
    st.data(),
)
def test_native_plan_covers_any_blocks(
    tiles: tuple[int, int], block: int, n: int, causal: bool, data: st.DataObject
) -> None:
    count = -(-n // block)
    row = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    kept = tuple(data.draw(st.lists(row, min_size=count, max_size=count)))
    members = (("blocks", block, kept),)
    mask = oracle.mask(members, causal, n)
    assert_native_covers(to_pattern(members, causal), mask, tiles, torch.tensor(kept))


@needs_native
def test_native_cover_sees_a_planted_block() -> None:
    layout = torch.eye(5, dtype=torch.bool)
    pattern = sa.BlockSparse(layout[None], 16)
    members = (("blocks", 16, tuple(map(tuple, layout.tolist()))),)
    mask = oracle.mask(members, True, 70)
    assert_native_covers(pattern, mask, (64, 64), layout)
    for row, column in [(4, 0), (2, 2)]:
        planted = layout.clone()
        planted[row, column] ^= True
        with pytest.raises(AssertionError, match="pairs"):
            assert_native_covers(pattern, mask, (64, 64), planted)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["rows", "columns", "sliced", "expanded"])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 70, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys_own", [False, True])
def test_block_rows_are_the_packed_layout(
    keys_own: bool, causal: bool, count: int, order: str
) -> None:
    from sparse_attn.backends.cuda import _block_rows

    layout = torch.rand(3, count, count, device="cuda") < 0.5
    if order == "columns":
        layout = layout.mT
    elif order == "sliced":
        wide = torch.ones(6, count + 2, 2 * count, dtype=torch.bool, device="cuda")
        layout = wide[::2, 1:-1, ::2].copy_(layout)
    elif order == "expanded":
        layout = layout[:1].expand(3, -1, -1)
    pattern = sa.BlockSparse(layout, 16, causal=causal)
    rows = _block_rows(pattern, layout, keys_own)
    assert rows is not None
    past, future = (not causal or keys_own == later for later in (False, True))
    wanted = packed_rows((layout.mT if keys_own else layout).cpu(), past, future)
    assert rows.cpu().numpy().view(np.uint32).tolist() == wanted.tolist()
