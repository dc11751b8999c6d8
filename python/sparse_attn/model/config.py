# SPDX-License-Identifier: Apache-2.0
"""The numbers that make a Sparse Transformer, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from .._ops import MAX_HEAD_DIM

WORDS = {
    "pattern": ("dense", "local", "fixed", "strided"),
    "composition": ("merged", "multihead", "interleaved"),
    "positions": ("attention", "data"),
    "initialisation": ("code", "paper"),
}


@dataclass(frozen=True)
class SparseTransformerConfig:
    """Configuration of a `SparseTransformer`. Names in quotes are the words of the paper.

    Raises TypeError for a value of the wrong type, ValueError for one out of range.

    >>> config = SparseTransformerConfig(vocab=256, context=4096, layers=4, heads=4, width=128)
    >>> SparseTransformerConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab: int
    context: int  # greatest number of tokens; need not be a multiple of stride
    layers: int
    heads: int
    width: int
    pattern: str = "fixed"  # "dense" | "local" | "fixed" | "strided"
    composition: str = "merged"  # how the heads share a pattern's two members: composition.py
    stride: int = 128  # also the window of "local"
    columns: int = 32  # summary columns per stride, "fixed" only
    summary_blocks: int = 1  # distinct blocks of columns dealt over the heads, "fixed" only
    half_qk: bool = False  # queries and keys of width d/2
    half_feed_forward: bool = False  # hidden width 2d, not 4d
    dropout: float = 0.0  # at the end of each residual branch; never on attention weights
    positions: str = "attention"  # "attention": row and column at width stride | "data": its axes
    position_shape: tuple[int, ...] | None = None  # sizes of the data's axes: (32, 32, 3)
    initialisation: str = "code"  # reading of the paper's gains: transformer.py, initialise
    recompute: bool = True  # keep only block inputs for backward

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width"):
            _check_positive(name, getattr(self, name))
        for name in ("stride", "columns", "summary_blocks"):
            _check_positive(name, getattr(self, name))
        for name in ("half_qk", "half_feed_forward", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {words}, got {getattr(self, name)!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout must be a float, got {self.dropout!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        self._check_heads()
        self._check_pattern()
        self._check_positions()

    def _check_heads(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width must be divisible by heads, got width {self.width}, heads {self.heads}"
            )
        head_dim = self.width // self.heads
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"width / heads must be at most {MAX_HEAD_DIM}, got {head_dim}")
        if self.half_qk and head_dim % 2:
            raise ValueError(f"half_qk needs an even width / heads, got {head_dim}")

    def _check_pattern(self) -> None:
        two_members = self.pattern in ("fixed", "strided")
        if two_members and self.composition == "multihead" and self.heads < 2:
            raise ValueError("multihead composition needs at least 2 heads, got 1")
        if two_members and self.composition == "interleaved" and self.layers < 2:
            raise ValueError("interleaved composition needs at least 2 layers, got 1")
        if self.pattern != "fixed":
            if self.summary_blocks != 1:
                raise ValueError(
                    f"summary_blocks belongs to the fixed pattern, got {self.summary_blocks} "
                    f"with pattern {self.pattern!r}"
                )
            return
        if self.summary_blocks * self.columns > self.stride:
            raise ValueError(
                "summary_blocks * columns must be at most stride, got "
                f"{self.summary_blocks} * {self.columns} with stride {self.stride}"
            )
        summary_heads = self.heads // 2 if self.composition == "multihead" else self.heads
        if self.summary_blocks > summary_heads:
            raise ValueError(
                f"summary_blocks must be at most {summary_heads}, the number of heads that read "
                f"summaries, got {self.summary_blocks}"
            )

    def _check_positions(self) -> None:
        shape = self.position_shape
        if self.positions == "attention":
            if shape is not None:
                raise ValueError(f"position_shape needs positions='data', got {shape!r}")
            return
        if shape is None:
            raise ValueError("positions='data' needs position_shape, for example (32, 32, 3)")
        if not isinstance(shape, tuple):
            raise TypeError(f"position_shape must be a tuple of ints, got {shape!r}")
        for size in shape:
            _check_positive("each size of position_shape", size)
        if math.prod(shape) < self.context:
            raise ValueError(
                f"position_shape must hold the context of {self.context} tokens, "
                f"got {shape} with {math.prod(shape)}"
            )

    @property
    def qk_width(self) -> int:
        """Width of all queries together, and of all keys."""
        return self.width // 2 if self.half_qk else self.width

    @property
    def feed_forward_width(self) -> int:
        return self.width * (2 if self.half_feed_forward else 4)

    @property
    def position_axes(self) -> tuple[int, ...]:
        """Sizes of the axes that have an embedding each; n_emb of the paper is their number."""
        return self.position_shape or (-(-self.context // self.stride), self.stride)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values."""
        shape = self.position_shape
        return {**asdict(self), "position_shape": shape if shape is None else list(shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseTransformerConfig:
        """The configuration that `to_dict` wrote; ValueError for unknown or missing names."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a configuration must be a dict, got {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if unknown := sorted(map(str, set(values) - names)):
            raise ValueError(f"unknown names in a configuration: {', '.join(unknown)}")
        if missing := sorted(required - set(values)):
            raise ValueError(f"names missing from a configuration: {', '.join(missing)}")
        values = dict(values)
        if isinstance(shape := values.get("position_shape"), list):
            values["position_shape"] = tuple(shape)
        return cls(**values)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
