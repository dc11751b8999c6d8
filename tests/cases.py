# SPDX-License-Identifier: Apache-2.0
"""Test cases in which every pair of values appears, and the tensors of a case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

import torch

import oracle
from oracle import Member, Members

# kind -> members of one head from (size, columns, offset, head); 'other' is a second size.
Build = Callable[[int, int, int, int], tuple[Member, ...]]


def shorter(size: int) -> int:
    return max(1, 2 * size // 3)


def longer(size: int) -> int:
    return size + size // 2 + 1


def _per_head_fixed(size: int, columns: int, offset: int, head: int) -> Members:
    if head % 2 == 0:
        return (("chunk", size),)
    return (("summary", size, columns, (offset + head * columns) % (size - columns + 1)),)


def _per_head_mixed(size: int, columns: int, offset: int, head: int) -> Members:
    summary = ("summary", size, columns, offset)
    return [
        (("local", size), ("dilated", size)),
        (("local", shorter(size)), summary),
        (("dense",),),
        (("chunk", longer(size)), ("local", shorter(size)), summary),
    ][head % 4]


# Which factors a kind has beside those that all have.
SIZE, COLUMNS = ("size",), ("size", "columns", "offset")
KINDS: dict[str, tuple[tuple[str, ...], Build]] = {
    "dense": ((), lambda s, c, o, h: (("dense",),)),
    "local": (SIZE, lambda s, c, o, h: (("local", s),)),
    "chunk": (SIZE, lambda s, c, o, h: (("chunk", s),)),
    "dilated": (SIZE, lambda s, c, o, h: (("dilated", s),)),
    "summary": (COLUMNS, lambda s, c, o, h: (("summary", s, c, o),)),
    "strided": (SIZE, lambda s, c, o, h: (("local", s), ("dilated", s))),
    "fixed": (COLUMNS, lambda s, c, o, h: (("chunk", s), ("summary", s, c, o))),
    "dense+dilated": (SIZE, lambda s, c, o, h: (("dense",), ("dilated", s))),
    "dense+summary": (COLUMNS, lambda s, c, o, h: (("dense",), ("summary", s, c, o))),
    "local+chunk": (SIZE, lambda s, c, o, h: (("local", s), ("chunk", longer(s)))),
    "local+local": (SIZE, lambda s, c, o, h: (("local", s), ("local", shorter(s)))),
    "chunk+chunk": (SIZE, lambda s, c, o, h: (("chunk", s), ("chunk", longer(s)))),
    "local+dilated": (SIZE, lambda s, c, o, h: (("local", longer(s)), ("dilated", s))),
    "chunk+dilated": (SIZE, lambda s, c, o, h: (("chunk", shorter(s)), ("dilated", s))),
    "local+summary": (COLUMNS, lambda s, c, o, h: (("local", shorter(s)), ("summary", s, c, o))),
    "chunk+summary": (COLUMNS, lambda s, c, o, h: (("chunk", longer(s)), ("summary", s, c, o))),
    "local+chunk+dilated": (
        SIZE,
        lambda s, c, o, h: (("local", shorter(s)), ("chunk", s), ("dilated", longer(s))),
    ),
    "local+chunk+summary": (
        COLUMNS,
        lambda s, c, o, h: (("local", longer(s)), ("chunk", shorter(s)), ("summary", s, c, o)),
    ),
    "heads:local,dilated": (SIZE, lambda s, c, o, h: (("dilated" if h % 2 else "local", s),)),
    "heads:chunk,summary": (COLUMNS, _per_head_fixed),
    "heads:mixed": (COLUMNS, _per_head_mixed),
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "n": (1, 2, 17, 63, 64, 65, 127, 128, 129, 257, 1000, 4097),
    "size": ("1", "3", "16", "64", "96", "128", "n-1", "n", "n+5"),
    "columns": ("1", "quarter", "all-1", "all"),
    "offset": ("default", "0", "middle"),
    "causal": (True, False),
    "heads": ((1, 1), (3, 3), (4, 2), (4, 1)),
    "head_dims": (
        (8, 8),
        (32, 32),
        (64, 64),
        (72, 72),
        (96, 96),
        (128, 128),
        (256, 256),
        (64, 128),
        (128, 64),
        (9, 5),
    ),
    "layout": ("head-major", "seq-major", "sliced", "misaligned", "dim-strided"),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Case:
    """One combination; size, columns and offset are None where the kind has none."""

    kind: str
    n: int
    size: str | None
    columns: str | None
    offset: str | None
    causal: bool
    heads: tuple[int, int]  # heads, kv_heads
    head_dims: tuple[int, int]  # head_dim, head_dim_v
    layout: str
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = [] if self.size is None else [f"size({self.size})"]
        if self.columns is not None:
            sizes.append(f"columns({self.columns},{self.offset})")
        heads, kv_heads = self.heads
        head_dim, head_dim_v = self.head_dims
        words = [self.kind, f"n{self.n}", *sizes, "causal" if self.causal else "both"]
        words += [f"h{heads}kv{kv_heads}", f"d{head_dim}v{head_dim_v}"]
        return "-".join([*words, self.layout, DTYPE_NAMES[self.dtype]])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(size, columns, offset) as numbers."""
        n = self.n
        in_n = {"n-1": n - 1, "n": n, "n+5": n + 5, None: 1}
        size = max(1, in_n[self.size] if self.size in in_n else int(self.size or 1))
        columns = {"quarter": size // 4, "all-1": size - 1, "all": size}.get(self.columns or "1", 1)
        columns = max(1, columns)
        offset = {"0": 0, "middle": (size - columns) // 2}.get(
            self.offset or "default", size - columns
        )
        return size, columns, offset

    @property
    def head_members(self) -> tuple[Members, ...]:
        """The members of each query head's pattern, for the oracle."""
        return tuple(KINDS[self.kind][1](*self.sizes, head) for head in range(self.heads[0]))

    @property
    def masks(self) -> list[torch.Tensor]:
        return oracle.masks(self.head_members, self.causal, self.n)

    @property
    def per_head(self) -> bool:
        return self.kind.startswith("heads:")

    @property
    def pattern(self) -> Any:
        """The same as a sparse_attn pattern, Strided and Fixed by their own names."""
        import sparse_attn as sa

        if self.per_head:
            return sa.PerHead([to_pattern(members, self.causal) for members in self.head_members])
        size, columns, offset = self.sizes
        if self.kind == "strided":
            return sa.Strided(size, causal=self.causal)
        if self.kind == "fixed":
            if self.offset == "default":
                return sa.Fixed(size, columns, causal=self.causal)
            return sa.Fixed(size, columns, offset, causal=self.causal)
        return to_pattern(self.head_members[0], self.causal)

    @property
    def batch(self) -> int:
        """Enough rows that the largest rounding error of a small case is not a matter of luck."""
        rows = 2048 if self.dtype == torch.float32 else 256
        least = 2 if self.n < 1000 else 1
        return max(least, math.ceil(rows / (self.n * self.heads[0])))

    def pattern_on(self, device: str | torch.device) -> Any:
        """The pattern for inputs on a device."""
        return self.pattern


# Blocks: which of them a layout keeps.

Kept = tuple[tuple[bool, ...], ...]  # [query block][key block]

BLOCK_LAYOUTS = ("some", "heads", "gaps", "empty", "full")
BLOCK_FACTORS: dict[str, tuple[Any, ...]] = {
    "block": (16, 32, 64, 128),
    "blocks": BLOCK_LAYOUTS,
    # One block or less; a last block of one row; more than 32 blocks of 16.
    "n": (1, 31, 64, 129, 577),
    "causal": (True, False),
    "heads": FACTORS["heads"],
    "head_dims": ((64, 64), (32, 32), (72, 72), (128, 128), (256, 256), (64, 128), (9, 5)),
    "layout": FACTORS["layout"],
    "dtype": FACTORS["dtype"],
}


@dataclass(frozen=True)
class BlockCase(Case):
    """A case of `BlockSparse`; ``blocks`` says which are kept, ``layout`` the memory layout."""

    block: int
    blocks: str

    def __str__(self) -> str:
        words = super().__str__().split("-")
        return "-".join([f"block{self.block}", self.blocks, *words[1:]])

    @property
    def count(self) -> int:
        """Blocks to a side."""
        return -(-self.n // self.block)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """The layout: one for all heads, or one for each."""
        generator = torch.Generator().manual_seed(self.count)
        heads = self.heads[0] if self.blocks == "heads" else 1
        densities = {"empty": (0.0,), "full": (1.1,), "heads": (0.1, 0.8, 0.0, 0.4)}
        density = densities.get(self.blocks, (0.5,))
        drawn = torch.rand(heads, self.count, self.count, generator=generator)
        kept = torch.stack([drawn[head] < density[head % 4] for head in range(heads)])
        if self.blocks == "gaps":  # queries without a block, and keys that no query attends
            kept[:, 1::3] = False
            kept[:, :, ::4] = False
        return tuple(tuple(map(tuple, head.tolist())) for head in kept)

    @property
    def head_members(self) -> tuple[Members, ...]:
        kept = self.kept
        return tuple(
            (("blocks", self.block, kept[head % len(kept)]),) for head in range(self.heads[0])
        )

    @property
    def per_head(self) -> bool:
        return len(self.kept) > 1

    @property
    def pattern(self) -> Any:
        return self.pattern_on("cpu")

    def pattern_on(self, device: str | torch.device) -> Any:
        import sparse_attn as sa

        layout = torch.tensor(self.kept, device=device)
        return sa.BlockSparse(layout, self.block, causal=self.causal)


USUAL: dict[str, Any] = {
    "n": 129,
    "columns": None,
    "offset": None,
    "causal": True,
    "heads": (4, 2),
    "head_dims": (64, 64),
    "layout": "head-major",
    "dtype": torch.float32,
}


def a_case(**changes: Any) -> Case:
    return Case(**{**USUAL, "kind": "strided", "size": "16", **changes})


def a_block_case(**changes: Any) -> BlockCase:
    own = {"kind": "blocks", "size": None, "block": 32, "blocks": "heads"}
    return BlockCase(**{**USUAL, **own, **changes})


def to_pattern(members: Members, causal: bool) -> Any:
    """The union of the members, or the one member of blocks, as a sparse_attn pattern."""
    import sparse_attn as sa

    constructors: dict[str, Callable[..., Any]] = {
        "dense": sa.Dense,
        "local": sa.Local,
        "chunk": sa.Chunk,
        "dilated": sa.Dilated,
        "summary": sa.Summary,
        "blocks": lambda block, kept, causal: sa.BlockSparse(
            torch.tensor(kept)[None], block, causal=causal
        ),
    }
    first, *others = (constructors[kind](*sizes, causal=causal) for kind, *sizes in members)
    for other in others:
        first = first | other
    return first


# Every pair of values.


def has_factor(kind: str, factor: str) -> bool:
    return factor not in COLUMNS or factor in KINDS[kind][0]


def required_pairs() -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two values that some case can hold together."""
    for (f, f_values), (g, g_values) in combinations(FACTORS.items(), 2):
        for a in f_values:
            for b in g_values:
                if f != "kind" or has_factor(a, g):
                    yield (f, a), (g, b)


def pairs_of(values: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of a complete or partial assignment, in the order of FACTORS."""
    held = [(f, values[f]) for f in FACTORS if values.get(f) is not None]
    return set(combinations(held, 2))


def pairs_of_blocks(values: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of an assignment of BLOCK_FACTORS."""
    return set(combinations([(f, values[f]) for f in BLOCK_FACTORS if f in values], 2))


@lru_cache(maxsize=1)
def block_cases() -> tuple[BlockCase, ...]:
    """Every pair of values of BLOCK_FACTORS: take the first missing pair, then what covers most.

    And one with more than 64 blocks.
    """
    complete = combinations(BLOCK_FACTORS.items(), 2)
    missing = dict.fromkeys(
        ((f, a), (g, b))
        for (f, f_values), (g, g_values) in complete
        for a in f_values
        for b in g_values
    )
    used: Counter[tuple[str, Any]] = Counter()
    cases = [a_block_case(n=1057, block=16, heads=(2, 1), dtype=torch.bfloat16)]

    def worth(values: dict[str, Any], factor: str, choice: Any) -> tuple[int, int, int]:
        covers = sum(pair in missing for pair in pairs_of_blocks({**values, factor: choice}))
        costly = values.get("n", 0) > 500 and factor in ("heads", "head_dims")
        return covers, -sum(choice) if costly else 0, -used[factor, choice]

    while missing:
        values: dict[str, Any] = {}
        for factor, value in next(iter(missing)):
            values[factor] = value
        for factor, choices in BLOCK_FACTORS.items():
            if factor not in values:
                values[factor] = max(choices, key=partial(worth, values, factor))
        for pair in pairs_of_blocks(values):
            missing.pop(pair, None)
        used.update(values.items())
        cases.append(a_block_case(**values))
    return tuple(sorted(cases, key=lambda case: (case.n, case.block)))


@lru_cache(maxsize=1)
def all_pairs_cases() -> tuple[Case, ...]:
    """A greedy cover: take the first missing pair, fill the rest with what covers most."""
    missing = dict.fromkeys(required_pairs())
    used: Counter[tuple[int, str, Any]] = Counter()  # at this n
    cases = []

    def worth(values: dict[str, Any], factor: str, choice: Any) -> tuple[int, int, int]:
        n = values.get("n", 0)
        covers = sum(pair in missing for pair in pairs_of({**values, factor: choice}))
        one_head = choice == (1, 1) and values["kind"].startswith("heads:")
        costly = n >= 1000 and factor in ("heads", "head_dims")
        # Enough elements for a fair largest error, few enough to be quick.
        wanted = 64 if factor == "head_dims" else 2
        dearness = 1000 if one_head else abs(sum(choice) - wanted) if costly else 0
        return covers, -dearness, -used[n, factor, choice]

    while missing:
        values: dict[str, Any] = dict(next(iter(missing)))
        for factor, choices in FACTORS.items():
            if factor in values:
                continue
            if factor == "kind":
                choices = tuple(k for k in choices if all(has_factor(k, f) for f in values))
            elif not has_factor(values["kind"], factor):
                values[factor] = None
                continue
            values[factor] = max(choices, key=partial(worth, values, factor))
        for pair in pairs_of(values):
            missing.pop(pair, None)
        used.update((values["n"], factor, value) for factor, value in values.items())
        cases.append(Case(**{factor: values[factor] for factor in FACTORS}))
    return tuple(sorted(cases, key=lambda case: (case.n, case.kind)))


# Tensors.


def make_tensor(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    around: float = math.nan,
) -> torch.Tensor:
    """Standard normal values (batch, heads, seq, dim) in a layout, ``around`` beside them."""
    batch, heads, seq, dim = shape
    values = torch.randn(batch, heads, seq, dim, generator=generator, dtype=torch.float32)
    values = values.to(device=device, dtype=dtype)

    def filled(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, around, dtype=dtype, device=device)

    if layout == "head-major":
        view = filled(batch, heads, seq, dim)
    elif layout == "seq-major":
        view = filled(batch, seq, heads, dim).transpose(1, 2)
    elif layout == "sliced":
        view = filled(batch + 1, heads + 2, seq + 5, dim + 16)[1:, 1:-1, 3:-2, 8:-8]
    elif layout == "misaligned":
        view = filled(batch, heads, seq, dim + 2)[..., 1 : dim + 1]
    elif layout == "dim-strided":
        view = filled(batch, heads, dim, seq + 1)[..., 1:].transpose(-1, -2)
    else:
        raise AssertionError(f"no layout {layout!r}")
    return view.copy_(values)


@dataclass(frozen=True)
class Inputs:
    """Leaf tensors of one call and the gradients that come in."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor


def make_inputs(
    case: Case,
    seed: int,
    device: str | torch.device = "cpu",
    around: float = math.nan,
) -> Inputs:
    """Fresh inputs of a case; the same values for the same seed whatever the layout."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads
    head_dim, head_dim_v = case.head_dims

    def tensor(heads: int, dim: int) -> torch.Tensor:
        shape = (case.batch, heads, case.n, dim)
        return make_tensor(shape, case.layout, case.dtype, generator, device, around)

    q, k, v = tensor(heads, head_dim), tensor(kv_heads, head_dim), tensor(kv_heads, head_dim_v)
    dout = tensor(heads, head_dim_v)
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    dlse = torch.randn(case.batch, heads, case.n, generator=generator, dtype=lse_dtype)
    return Inputs(q, k, v, dout, dlse.to(device))
