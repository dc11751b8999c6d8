# SPDX-License-Identifier: Apache-2.0
"""What attends to what: the pattern algebra of the Sparse Transformer.

Child et al., 2019, section 4. A pattern is a set of pairs (query i, key j) of 0-based token
positions. ``pattern.mask(n)`` is its definition, straight from the sets; ``pattern.branches(n)``
says how the backends compute it (plan.py). A test proves that the two agree. To add a pattern, add
a class here.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .plan import Branch, Part, Run, Segment, SequenceView, keys_per_query, token_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BlockSparse",
    "Chunk",
    "Dense",
    "Dilated",
    "Fixed",
    "Local",
    "Pattern",
    "PerHead",
    "Strided",
    "Summary",
    "Union",
    "parse_pattern",
]


@dataclass(frozen=True)
class Pattern:
    """A set of (query, key) pairs at any sequence length. Frozen, hashable, picklable.

    ``a | b`` is the union of two patterns under one softmax, every key counted once.
    """

    spec: str = field(init=False, repr=False, compare=False)  # ``parse_pattern(spec) == self``

    def _set_spec(self) -> None:
        object.__setattr__(self, "spec", repr(self))

    @property
    def rule(self) -> Pattern:
        """The pattern without a layout of blocks: all that its plan depends on."""
        return self

    def mask(self, n: int) -> torch.Tensor:
        """The pattern as a bool tensor ``(n, n)`` [query, key]; ``(heads, n, n)`` for `PerHead`
        and a `BlockSparse` with a layout for each head.

        >>> Local(2).mask(3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        raise NotImplementedError

    def branches(self, n: int) -> tuple[Branch, ...]:
        """How the backends compute the pattern at ``n`` >= 1 tokens."""
        raise NotImplementedError

    def keys_per_query(self, n: int) -> torch.Tensor:
        """Number of keys of each query, int64 ``(n,)``, or ``(heads, n)`` as in `mask`. Costs O(n).

        >>> Strided(2).keys_per_query(6).tolist()
        [1, 2, 3, 3, 4, 4]
        """
        return torch.from_numpy(keys_per_query(self, _check_length(n)))

    def flops(self, n: int, head_dim: int, head_dim_v: int | None = None) -> int:
        """Floating-point operations of one forward pass, for one batch entry and one head.

        ``2 * pairs * (head_dim + head_dim_v)``; the mean over the heads where they differ.
        """
        pairs = self.keys_per_query(n)
        heads = pairs.shape[0] if pairs.dim() == 2 else 1
        return 2 * int(pairs.sum()) * (head_dim + (head_dim_v or head_dim)) // heads

    def plot(self, n: int) -> Figure:
        """The pattern at ``n`` tokens, drawn by matplotlib (the extra ``plot``)."""
        from .plot import plot_pattern

        return plot_pattern(self, n)

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Union._of(self, other)


def _check_length(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {n!r}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return n


def check_size(name: str, size: int, least: int = 1) -> None:
    """TypeError unless a size is an int (and no bool), ValueError if it is too small."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")


def _check_causal(causal: bool) -> None:
    """TypeError unless ``causal`` is a bool."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")


def _positions(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query positions (n, 1) and key positions (1, n)."""
    token = torch.arange(_check_length(n))
    return token[:, None], token[None, :]


@dataclass(frozen=True, repr=False)
class _Member(Pattern):
    """A pattern that is no union and no list of heads: one rule with sizes and a direction."""

    causal: bool = field(default=True, kw_only=True)
    sizes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.sizes:
            check_size(name, getattr(self, name))
        _check_causal(self.causal)
        self._set_spec()

    def __repr__(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in (*self.sizes, "causal")]
        return f"{type(self).__name__}({', '.join(sizes)})"

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether query i and key j are related, whatever their order."""
        raise NotImplementedError

    def mask(self, n: int) -> torch.Tensor:
        i, j = _positions(n)
        related = self._related(i, j)
        return related & (j <= i) if self.causal else related.expand(n, n).clone()


@dataclass(frozen=True, repr=False)
class _Near(_Member):
    """A member whose keys are neighbours: one run of tokens around the query."""

    def _window(self, n: int) -> int:
        """Tokens of the run to each side, the query included."""
        return 1

    def _chunks(self, n: int) -> tuple[int, ...]:
        """Lengths of the chunks that the run fills."""
        return ()

    def branches(self, n: int) -> tuple[Branch, ...]:
        return _near_and_far(n, (self,), None, self.causal)


@dataclass(frozen=True, repr=False)
class _Far(_Member):
    """A member whose keys are spread over the whole sequence, dense in a view of their own."""

    def _views(self, n: int) -> tuple[SequenceView, SequenceView]:
        """Query view and key view."""
        raise NotImplementedError

    def branches(self, n: int) -> tuple[Branch, ...]:
        queries, keys = self._views(n)
        everything = Run(n, window=n, chunks=(), past=True, future=not self.causal)
        return (Branch(queries, everything, (Segment(keys, "inside"),)),)


@dataclass(frozen=True, repr=False)
class Dense(_Near):
    """Every key up to the query (all keys when not causal)."""

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= 0) & (j >= 0)

    def _window(self, n: int) -> int:
        return n


@dataclass(frozen=True, repr=False)
class Local(_Near):
    """The last ``window`` keys, the query included: j in (i - window, i]; all |i - j| < window
    if not causal.

    The first head of strided attention (paper, section 4.3; the paper's formula has one key more,
    this follows the authors' code).
    """

    window: int
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i - j).abs() < min(self.window, i.shape[0] + 1)

    def _window(self, n: int) -> int:
        return min(self.window, n)


@dataclass(frozen=True, repr=False)
class Chunk(_Near):
    """The keys of the query's own chunk of ``length`` tokens: j div length = i div length.

    The first head of fixed attention (paper, section 4.3).
    """

    length: int
    sizes: ClassVar[tuple[str, ...]] = ("length",)

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        length = min(self.length, i.shape[0] + 1)
        return i // length == j // length

    def _chunks(self, n: int) -> tuple[int, ...]:
        return (min(self.length, n),)

    def branches(self, n: int) -> tuple[Branch, ...]:
        length = min(self.length, n)
        chunk = SequenceView(n, groups=-(-n // length), max_rows=length, group_step=length)
        everything = Run(n, window=n, chunks=(), past=True, future=not self.causal)
        return (Branch(chunk, everything, (Segment(chunk, "inside"),)),)


@dataclass(frozen=True, repr=False)
class Dilated(_Far):
    """Every ``stride``-th key, counted from the query: j mod stride = i mod stride.

    The second head of strided attention (paper, section 4.3).
    """

    stride: int
    sizes: ClassVar[tuple[str, ...]] = ("stride",)

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        stride = min(self.stride, i.shape[0] + 1)
        return i % stride == j % stride

    def _views(self, n: int) -> tuple[SequenceView, SequenceView]:
        stride = min(self.stride, n)
        residue = SequenceView(
            n, groups=stride, max_rows=-(-n // stride), group_step=1, run_stride=stride
        )
        return residue, residue


@dataclass(frozen=True, repr=False)
class Summary(_Far):
    """The ``columns`` summary keys of every chunk: offset <= j mod length < offset + columns.

    The second head of fixed attention (paper, section 4.3). ``offset`` defaults to the chunk's last
    columns, ``length - columns``. A query before the first summary key has no key: output 0, lse
    -inf.
    """

    length: int
    columns: int
    offset: int = None  # type: ignore[assignment]  # an int once constructed
    sizes: ClassVar[tuple[str, ...]] = ("length", "columns", "offset")

    def __post_init__(self) -> None:
        check_size("length", self.length)
        check_size("columns", self.columns)
        if self.offset is None:
            object.__setattr__(self, "offset", max(self.length - self.columns, 0))
        check_size("offset", self.offset, least=0)
        if self.offset + self.columns > self.length:
            raise ValueError(
                "offset + columns must be at most length, got "
                f"offset {self.offset}, columns {self.columns}, length {self.length}"
            )
        _check_causal(self.causal)
        self._set_spec()

    def _sizes_within(self, n: int) -> tuple[int, int, int]:
        """Length, columns and offset with the same keys below ``n``, all at most n + 1."""
        return min(self.length, n + 1), min(self.columns, n + 1), min(self.offset, n + 1)

    def _related(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        length, columns, offset = self._sizes_within(i.shape[0])
        return (offset <= j % length) & (j % length < offset + columns) & (i >= 0)

    def _views(self, n: int) -> tuple[SequenceView, SequenceView]:
        length, columns, offset = self._sizes_within(n)
        rows = n // length * columns + min(max(n % length - offset, 0), columns)
        panel = SequenceView(
            n, groups=1, max_rows=rows, offset=offset, run=columns, run_stride=length
        )
        return token_order(n), panel


def Strided(stride: int, *, causal: bool = True) -> Pattern:
    """The merged strided head, ``Local(stride) | Dilated(stride)`` (paper, section 4.3).

    >>> Strided(128) == Dilated(128) | Local(128)
    True
    """
    return Local(stride, causal=causal) | Dilated(stride, causal=causal)


def Fixed(length: int, columns: int, offset: int | None = None, *, causal: bool = True) -> Pattern:
    """The merged fixed head, ``Chunk(length) | Summary(length, columns, offset)`` (section 4.3).

    >>> Fixed(128, 32).keys_per_query(256).max().item()
    160
    """
    summary = Summary(length, columns, offset, causal=causal)  # type: ignore[arg-type]
    return Chunk(length, causal=causal) | summary


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """Patterns under one softmax; written ``a | b``, in any order.

    Members are any number of `Dense`, `Local` and `Chunk`, and at most one `Dilated` or `Summary`.
    """

    members: tuple[_Member, ...]

    def __post_init__(self) -> None:
        self._set_spec()

    @staticmethod
    def _of(*patterns: Pattern) -> Pattern:
        members: set[_Member] = set()
        for pattern in patterns:
            if isinstance(pattern, Union):
                members.update(pattern.members)
            elif isinstance(pattern, _Member):
                members.add(pattern)
            elif isinstance(pattern, BlockSparse):
                raise NotImplementedError(
                    "BlockSparse cannot be a member of a union: set the blocks of the other "
                    "members in its layout"
                )
            else:
                raise TypeError(f"{type(pattern).__name__} cannot be a member of a union")
        if len({member.causal for member in members}) > 1:
            raise ValueError(f"members of a union must agree on causal, got {patterns}")
        far = [member for member in members if isinstance(member, _Far)]
        if len(far) > 1:
            raise NotImplementedError(
                "a union takes at most one of Dilated and Summary, "
                f"got {sorted(map(repr, far))}: express this pattern as BlockSparse"
            )
        if len(members) == 1:
            return members.pop()
        return Union(tuple(sorted(members, key=_union_order)))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.members))

    def mask(self, n: int) -> torch.Tensor:
        return torch.stack([member.mask(n) for member in self.members]).any(0)

    def branches(self, n: int) -> tuple[Branch, ...]:
        near = tuple(member for member in self.members if isinstance(member, _Near))
        far = next((member for member in self.members if isinstance(member, _Far)), None)
        return _near_and_far(n, near, far, self.members[0].causal)


def _union_order(member: _Member) -> tuple[bool, str]:
    """Near members first, as the paper names them."""
    return isinstance(member, _Far), repr(member)


def _near_and_far(
    n: int, near: Sequence[_Near], far: _Far | None, causal: bool
) -> tuple[Branch, ...]:
    """The normal form: near members are one run of tokens, the far member is cut at its ends."""
    window = max(member._window(n) for member in near)
    lengths = {length for member in near for length in member._chunks(n)}
    # A chunk inside a chunk of a multiple of its length adds nothing.
    chunks = [a for a in sorted(lengths) if not any(b % a == 0 for b in lengths - {a})]
    run = Run(n, window, tuple(chunks), past=True, future=not causal)
    tokens = token_order(n)
    near_segment = Segment(tokens, "inside")
    if far is None:
        return (Branch(tokens, run, (near_segment,)),)
    queries, keys = far._views(n)
    parts: tuple[Part, ...] = ("before",) if causal else ("before", "after")
    far_segments = tuple(Segment(keys, part) for part in parts)
    if queries == tokens:
        return (Branch(tokens, run, (near_segment, *far_segments)),)
    return (Branch(tokens, run, (near_segment,)), Branch(queries, run, far_segments))


@dataclass(frozen=True, repr=False, eq=False)
class BlockSparse(Pattern):
    """Any pattern of square blocks: query i attends key j if layout[i div block, j div block].

    Args:
        layout: bool ``(1 or heads, blocks, blocks)`` [head, query block, key block] on the device
            of the inputs, ``blocks = ceil(n / block)``: a pattern for one sequence length.
        block: 16, 32, 64 or 128 tokens.
        causal: only keys up to the query, also in the blocks on the diagonal.

    Equal to another one if they share the layout itself, not by its content. A query with no block
    has output 0, lse -inf.

    >>> blocks = torch.eye(3, dtype=torch.bool)
    >>> BlockSparse(blocks[None], 16).keys_per_query(40)[:20].tolist()
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1, 2, 3, 4]
    """

    layout: torch.Tensor
    block: int
    causal: bool = field(default=True, kw_only=True)
    blocks: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, torch.Tensor) or self.layout.dtype != torch.bool:
            kind = getattr(self.layout, "dtype", type(self.layout).__name__)
            raise TypeError(f"layout must be a bool tensor, got {kind}")
        if self.layout.layout != torch.strided:
            raise TypeError(f"layout must be a dense tensor, got {self.layout.layout}")
        shape = tuple(self.layout.shape)
        if len(shape) != 3 or shape[0] == 0 or shape[1] != shape[2]:
            raise ValueError(f"layout must be (1 or heads, blocks, blocks), got shape {shape}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        check_size("block", self.block)
        if self.block not in self.blocks:
            raise ValueError(f"block must be one of {self.blocks}, got {self.block}")
        _check_causal(self.causal)
        spec = f"BlockSparse(block={self.block}, causal={self.causal})"
        object.__setattr__(self, "spec", spec)

    @staticmethod
    def _of_sizes(*, block: int, causal: bool) -> BlockSparse:
        """The rule: no layout yet."""
        rule = object.__new__(BlockSparse)
        for name, value in (("layout", None), ("block", block), ("causal", causal)):
            object.__setattr__(rule, name, value)
        rule._check_sizes()
        return rule

    @property
    def rule(self) -> Pattern:
        return _parse(self.spec)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BlockSparse)
            and self.layout is other.layout
            and self.spec == other.spec
        )

    def __hash__(self) -> int:
        return hash((id(self.layout), self.spec))

    def __repr__(self) -> str:
        shape = "" if self.layout is None else f"layout={tuple(self.layout.shape)}, "
        return f"BlockSparse({shape}block={self.block}, causal={self.causal})"

    def check_length(self, n: int) -> None:
        """ValueError unless the layout is for ``n`` tokens."""
        blocks = -(-n // self.block)
        if self.layout.shape[1] != blocks:
            raise ValueError(
                f"a layout for {n} tokens in blocks of {self.block} has {blocks} blocks to a side, "
                f"got shape {tuple(self.layout.shape)}"
            )

    def mask(self, n: int) -> torch.Tensor:
        i, j = _positions(n)
        self.check_length(n)
        layout = self.layout.cpu()
        kept = layout[:, i // self.block, j // self.block]
        kept = kept & (j <= i) if self.causal else kept
        return kept[0] if len(kept) == 1 else kept

    def keys_per_query(self, n: int) -> torch.Tensor:
        self.check_length(_check_length(n))
        layout = self.layout.cpu()
        token = torch.arange(n)
        block = token // self.block
        if not self.causal:
            sizes = torch.bincount(block, minlength=layout.shape[2])
            counts = (layout.double() @ sizes.double()).long()[:, block]
        else:
            before = layout.tril(-1).sum(2) * self.block
            own = layout.diagonal(dim1=1, dim2=2).long()
            counts = before[:, block] + own[:, block] * (token % self.block + 1)
        return counts[0] if len(counts) == 1 else counts

    def branches(self, n: int) -> tuple[Branch, ...]:
        tokens = token_order(n)
        everything = Run(n, window=n, chunks=(), past=True, future=not self.causal)
        return (Branch(tokens, everything, (Segment(tokens, "inside"),), self.block),)


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """One pattern per query head: the paper's multi-head form and its distinct sub-blocks.

    >>> PerHead([Local(128), Dilated(128)]).mask(4).shape
    torch.Size([2, 4, 4])
    """

    patterns: tuple[Pattern, ...]

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        if isinstance(patterns, Pattern) or not isinstance(patterns, Sequence):
            raise TypeError(f"PerHead takes a list of patterns, got {patterns!r}")
        for pattern in patterns:
            if not isinstance(pattern, Pattern) or isinstance(pattern, PerHead):
                raise TypeError(f"PerHead takes a pattern for each head, got {pattern!r}")
            if isinstance(pattern, BlockSparse):
                raise TypeError(
                    "PerHead takes no BlockSparse, whose layout may differ from head to head"
                )
        if not patterns:
            raise ValueError("PerHead needs at least one pattern, got an empty list")
        object.__setattr__(self, "patterns", tuple(patterns))
        self._set_spec()

    def __repr__(self) -> str:
        return f"PerHead([{', '.join(map(repr, self.patterns))}])"

    def mask(self, n: int) -> torch.Tensor:
        return torch.stack([pattern.mask(n) for pattern in self.patterns])

    def keys_per_query(self, n: int) -> torch.Tensor:
        return torch.stack([pattern.keys_per_query(n) for pattern in self.patterns])


_NAMES: dict[str, Any] = {
    function.__name__: function
    for function in (Dense, Local, Chunk, Dilated, Summary, Strided, Fixed, PerHead)
}
_NAMES["BlockSparse"] = BlockSparse._of_sizes


def parse_pattern(spec: str) -> Pattern:
    """The pattern that a text describes: ``pattern.spec``, or short, as ``strided:128``.

    Raises:
        ValueError: the text describes no pattern.

    >>> parse_pattern("fixed:128,32") == Fixed(128, 32)
    True
    """
    if not isinstance(spec, str):
        raise TypeError(f"a pattern's spec must be a str, got {spec!r}")
    pattern = _parse(spec)
    if isinstance(pattern, BlockSparse):
        raise ValueError(f"no layout in {spec!r}: write BlockSparse(layout, block) in Python")
    return pattern


def pattern_of(spec: str, layout: torch.Tensor | None) -> Pattern:
    """The pattern of a spec and, for a `BlockSparse`, its layout."""
    pattern = _parse(spec)
    if isinstance(pattern, BlockSparse) and layout is not None:
        return BlockSparse(layout, pattern.block, causal=pattern.causal)
    if isinstance(pattern, BlockSparse) or layout is not None:
        given = "none" if layout is None else "one"
        raise ValueError(f"only a BlockSparse takes a layout, got {spec!r} with {given}")
    return pattern


@lru_cache(maxsize=1024)
def _parse(spec: str) -> Pattern:
    name, colon, sizes = spec.partition(":")
    text = f"{name.strip().capitalize()}({sizes})" if colon else spec
    try:
        pattern = _evaluate(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(pattern, Pattern):
            raise TypeError(f"{text!r} is no pattern")
    except (SyntaxError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"no pattern in {spec!r} ({error}); write for example 'strided:128', "
            f"'Local(window=128)' or 'Chunk(128) | Summary(128, 32)' with {', '.join(_NAMES)}"
        ) from error
    return pattern


def _evaluate(node: ast.expr) -> Any:
    """Patterns, unions, lists and literals; nothing else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        keywords = {word.arg: _evaluate(word.value) for word in node.keywords if word.arg}
        return _NAMES[node.func.id](*map(_evaluate, node.args), **keywords)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _evaluate(node.left) | _evaluate(node.right)
    if isinstance(node, ast.List):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.Constant):
        return node.value
    raise TypeError(f"cannot read {ast.unparse(node)!r}")
