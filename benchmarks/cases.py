# SPDX-License-Identifier: Apache-2.0
"""What is measured: patterns at the paper's shapes, block layouts, lengths that fit no tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import sparse_attn as sa
from sparse_attn import Chunk, Dense, Dilated, Fixed, Local, Pattern, Strided

DENSITIES = (0.10, 0.25, 0.50)
FLEX = frozenset({"flex"})
COMPILED = FLEX | {"flex 128", "composed flex", "composed fa4", "fa4", "fa4 deterministic"}
LAYOUT_BLOCKS = (64, 128)


@dataclass(frozen=True)
class Case:
    """Causal self-attention over one pattern; heads and kv_heads are equal."""

    table: str
    name: str
    pattern: Pattern
    batch: int
    heads: int
    seq: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype = torch.float16
    tokens_first: bool = False  # (batch, seq, heads, dim) memory, not (batch, heads, seq, dim)
    # Peers that run here only if named: they compile for 10 s or more a row.
    without: frozenset[str] = frozenset()

    def on(self, device: torch.device) -> Case:
        """The same case with its block layout, if it has one, on a device."""
        layout = getattr(self.pattern, "layout", None)
        if layout is None:
            return self
        return replace(self, pattern=block_sparse(layout.to(device), layout_block(self.pattern)))

    def dense(self) -> Case:
        """The same shape without sparsity, at batch 1."""
        return replace(self, pattern=Dense(), batch=1)


def layout_block(pattern: Pattern) -> int:
    """Tokens in a block of a `BlockSparse`."""
    return int(getattr(pattern, "block"))  # noqa: B009  # not every version has BlockSparse


def block_sparse(layout: torch.Tensor, block: int) -> Pattern:
    """`sparse_attn.BlockSparse`, from a bool layout (1 or heads, blocks, blocks)."""
    pattern = getattr(sa, "BlockSparse")(layout, block)  # noqa: B009
    assert isinstance(pattern, Pattern)
    return pattern


def random_layout(blocks: int, density: float) -> torch.Tensor:
    """Bool (1, blocks, blocks): the diagonal, and a share of the blocks below it at random."""
    generator = torch.Generator().manual_seed(round(1000 * density) + blocks)
    below = torch.rand(blocks, blocks, generator=generator).tril(-1)
    # The diagonal counts: blocks on or below it are `density` of the triangle.
    wanted = max(round(density * blocks * (blocks + 1) / 2) - blocks, 0)
    chosen = torch.zeros(blocks * blocks, dtype=torch.bool)
    chosen[below.flatten().topk(wanted).indices] = True
    return (chosen.view(blocks, blocks) | torch.eye(blocks, dtype=torch.bool))[None]


def run_cases() -> list[Case]:
    """The rows of `python -m benchmarks`, the most telling first."""
    small = Case("d64", "", Dense(), 4, 16, 12288, 64, 64)
    large = Case("d128", "", Dense(), 4, 16, 16384, 128, 128, without=FLEX)
    far = Case("long", "", Dense(), 1, 4, 1 << 20, 64, 64, without=COMPILED)
    return [
        *_named(
            small,
            {
                "Local(128)": Local(128),
                "Chunk(128)": Chunk(128),
                "Dilated(128)": Dilated(128),
                "Strided(128)": Strided(128),
                "Fixed(128, 32)": Fixed(128, 32),
                "Local(1024)": Local(1024),
            },
        ),
        replace(small, name="Dense, batch 1", batch=1, without=FLEX),
        *_named(
            large,
            {
                "Local(128)": Local(128),
                "Chunk(128)": Chunk(128),
                "Dilated(128)": Dilated(128),
                "Strided(128)": Strided(128),
                "Fixed(128, 8)": Fixed(128, 8),
            },
        ),
        replace(large, name="Local(1024)", pattern=Local(1024), without=frozenset()),
        replace(large, name="Dense, batch 1", batch=1),
        *_layouts(replace(small, table="blocks")),
        *_tokens_first(small, large),
        *_odd_shapes(replace(small, table="other", without=COMPILED)),
        *_memory(replace(small, table="memory", batch=1)),
        *_named(far, {"Local(1024)": Local(1024), "Strided(1024)": Strided(1024)}),
    ]


def sweep_cases(first: int = 1 << 11, last: int = 1 << 20) -> list[Case]:
    """n doubling, the stride near sqrt(n) as in the paper; compiled peers at every fourth n.

    Those lengths come last: they take most of the time, and others need not wait for it.
    """
    cases = []
    for exponent in range(int(math.log2(first)), int(math.log2(last)) + 1):
        n = 1 << exponent
        stride = 1 << (exponent + 1) // 2
        without = frozenset[str]() if exponent % 4 == 1 else COMPILED
        shape = Case("sweep", "", Dense(), 1, 8, n, 64, 64, without=without)
        cases += _named(
            shape,
            {
                "Local(128)": Local(128),
                "Strided(sqrt n)": Strided(stride),
                "Fixed(sqrt n, 8)": Fixed(stride, 8),
            },
        )
    return sorted(cases, key=lambda case: not case.without)


def cpu_cases(lengths: Sequence[int] = (2048, 4096, 8192, 16384)) -> list[Case]:
    """Three octaves on a CPU, in fp32; the stride is sqrt(n)."""
    cases = []
    for n in lengths:
        stride = round(math.sqrt(n))
        shape = Case("cpu", "", Dense(), 1, 4, n, 64, 64, torch.float32)
        cases += _named(
            shape, {"Strided(sqrt n)": Strided(stride), "Fixed(sqrt n, 1)": Fixed(stride, 1)}
        )
    return cases


def _named(shape: Case, patterns: dict[str, Pattern]) -> list[Case]:
    return [replace(shape, name=name, pattern=pattern) for name, pattern in patterns.items()]


def _layouts(shape: Case) -> list[Case]:
    """Block layouts of several sizes and densities; none before `BlockSparse` exists."""
    if not hasattr(sa, "BlockSparse"):
        return []
    return [
        replace(
            shape,
            name=f"blocks of {block}, {density:.0%}",
            pattern=block_sparse(random_layout(-(-shape.seq // block), density), block),
        )
        for block in LAYOUT_BLOCKS
        for density in DENSITIES
    ]


def _tokens_first(small: Case, large: Case) -> list[Case]:
    """Rows again with tensors as the model has them, (batch, seq, heads, dim)."""
    patterns: dict[str, Pattern] = {
        "Local(128)": Local(128),
        "Chunk(128)": Chunk(128),
        "Dilated(128)": Dilated(128),
        "Strided(128)": Strided(128),
    }
    return [
        replace(case, table=f"{case.table} tokens first", tokens_first=True, without=COMPILED)
        for shape in (small, large)
        for case in _named(shape, patterns)
    ]


def _odd_shapes(shape: Case) -> list[Case]:
    """Rows that are no tile, ragged n, head dims 32 and 64/128; full tiles to compare with."""
    full = replace(shape, seq=16384)
    short = replace(shape, seq=3072, batch=16)
    ragged = replace(shape, seq=12345)
    narrow = replace(shape, head_dim=32, head_dim_v=32)
    wide = replace(shape, seq=3072, batch=32, heads=2, head_dim_v=128)
    return [
        replace(full, name="Dilated(128), 128 rows", pattern=Dilated(128)),
        replace(shape, name="Dilated(128), 96 rows", pattern=Dilated(128)),
        replace(short, name="Dilated(128), 24 rows", pattern=Dilated(128)),
        replace(ragged, name="Chunk(128), ragged n", pattern=Chunk(128)),
        replace(ragged, name="Strided(128), ragged n", pattern=Strided(128)),
        replace(narrow, name="Local(128), head dim 32", pattern=Local(128)),
        replace(narrow, name="Strided(128), head dim 32", pattern=Strided(128)),
        replace(wide, name="Strided(96), head dims 64/128", pattern=Strided(96)),
    ]


def _memory(shape: Case) -> list[Case]:
    """Lengths at which peak memory is compared; compiled peers at the shorter one."""
    return [
        replace(
            shape,
            name=f"{name}, n {n:,}",
            seq=n,
            pattern=pattern,
            without=COMPILED if n > 16384 else FLEX,
        )
        for n in (16384, 65536)
        for name, pattern in (("Strided(128)", Strided(128)), ("Fixed(128, 32)", Fixed(128, 32)))
    ]
