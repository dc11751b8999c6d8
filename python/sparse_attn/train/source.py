# SPDX-License-Identifier: Apache-2.0
"""What training needs of its data: one interface to files of text and to prepared data sets."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..model import SparseTransformerConfig
from .corpus import load_corpus

if TYPE_CHECKING:
    from ..data import Dataset


class Source(Protocol):
    """Bytes to train on, to validate on, and perhaps to test on."""

    @property
    def name(self) -> str:
        """What the data is called in messages."""

    @property
    def digest(self) -> str:
        """Hash of the training data: a resumed run must see the same."""

    @property
    def example(self) -> tuple[int, ...] | None:
        """Shape of each independent example; None for one long sequence."""

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        """What step number `step` trains on: (count, length), a function of the arguments alone."""

    def split(self, name: str) -> NDArray[np.uint8]:
        """All values of "train", "validation" or "test", 1-D; ValueError if there are none."""


class Prepared:
    """A data set that `sparse-attn prepare` wrote, as a source."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name, self.dataset = name, dataset
        self.digest: str = dataset.digest
        self.example: tuple[int, ...] | None = dataset.example

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        return self.dataset.train.batch(seed, step, count, length)

    def split(self, name: str) -> NDArray[np.uint8]:
        values: NDArray[np.uint8] = getattr(self.dataset, name).values
        if not len(values):
            raise ValueError(f"{self.name} has nothing in its {name} part")
        return values


def open_source(path: str | os.PathLike[str]) -> Source:
    """A folder made by `sparse-attn prepare`, known by its manifest, or else a corpus of text.

    Raises FileNotFoundError if there is nothing at `path` and ValueError if it holds no text.
    """
    if not Path(path, "manifest.json").is_file():
        return load_corpus(path)
    from ..data import load

    return Prepared(str(path), load(path))


def unit(source: Source) -> str:
    """What scores count, in words."""
    return "bits per byte" if source.example is None else "bits per dimension"


def first_values(source: Source, split: str, limit: int | None) -> NDArray[np.uint8]:
    """The first `limit` values of a split, whole examples only; all if `limit` is None.

    Raises ValueError if that is nothing.
    """
    values = source.split(split)
    if limit is None:
        return values
    size = math.prod(source.example or (1,))
    if limit < size:
        raise ValueError(f"limit is {limit}, wanted {size} or more, the size of one example")
    return values[: limit - limit % size]


def check_model(source: Source, config: SparseTransformerConfig) -> None:
    """Raise ValueError if a model cannot read the source's examples."""
    if config.vocab < 256:
        raise ValueError(f"vocab is {config.vocab}, wanted 256 or more for bytes")
    example = source.example
    if example is None:
        return
    if math.prod(example) != config.context:
        raise ValueError(
            f"{source.name} has examples of {math.prod(example)} values {example}, the context of "
            f"the model is {config.context}: they must be equal"
        )
    if config.positions == "data" and config.position_shape != example:
        raise ValueError(
            f"{source.name} has examples of shape {example}, the position_shape of the model is "
            f"{config.position_shape}: they must be equal"
        )


def check_trains(source: Source, config: SparseTransformerConfig) -> None:
    """Raise ValueError if a source does not fit the model, or has too little to train on."""
    check_model(source, config)
    train, validation = source.split("train"), source.split("validation")
    if len(train) < config.context:
        raise ValueError(
            f"{source.name} has {len(train)} bytes to train on ({len(validation)} are for "
            f"validation), one context is {config.context} bytes: give more text or a smaller "
            "context"
        )
