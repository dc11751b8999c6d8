# SPDX-License-Identifier: Apache-2.0
"""A prepared folder: memory-mapped bytes in three splits, and the batches that training reads.

A folder holds train.bin, validation.bin, test.bin and manifest.json, which says what they are and
gives their lengths and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FORMAT = "sparse_attn data 1"
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
BLOCK = 1 << 20  # bytes read at once

Bytes = npt.NDArray[np.uint8]


class DataError(ValueError):
    """A source or a prepared folder is truncated, corrupt or not what was wanted."""


class Split:
    """The bytes of one split, mapped from its file when first read.

    Safe to pickle and to use after a fork: every process opens the file by itself.
    """

    def __init__(self, path: Path, length: int, example: tuple[int, ...] | None) -> None:
        self.path = path
        self.example = example
        self._length = length
        self._orders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Bytes."""
        return self._length

    def __repr__(self) -> str:
        return f"Split({str(self.path)!r}, {self._length:,} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_orders": {}}
        state.pop("values", None)
        return state

    @cached_property
    def values(self) -> Bytes:
        """All bytes, uint8, read-only: (len(self),)."""
        if not self._length:
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, np.uint8, "r", shape=(self._length,)).view(np.ndarray)

    @property
    def examples(self) -> int:
        """Number of whole examples. Raises ValueError for a stream, which has none."""
        if self.example is None:
            raise ValueError(f"{self.path} is a stream of bytes, wanted one of separate examples")
        return self._length // math.prod(self.example)

    def batch(self, seed: int, step: int, batch: int, length: int) -> Bytes:
        """What step number `step` trains on, uint8: (batch, length).

        From a stream: windows that start anywhere. From examples: whole ones, every example once
        per epoch, in an order that `seed` and the epoch decide; `length` is that of an example. The
        result depends on the arguments and the split's bytes alone.

        Raises ValueError for a length that the split does not have and for arguments out of range.
        """
        if batch < 1 or step < 0 or seed < 0:
            raise ValueError(
                f"batch is {batch}, step {step}, seed {seed}, wanted batch 1 or more, the others "
                "0 or more"
            )
        if self.example is None:
            starts = self._window_starts(seed, step, batch, length)
        else:
            starts = self._example_starts(seed, step, batch, length)
        out = np.empty((batch, length), np.uint8)
        for row, start in zip(out, starts, strict=True):
            row[:] = self.values[start : start + length]
        return out

    def _window_starts(
        self, seed: int, step: int, batch: int, length: int
    ) -> npt.NDArray[np.int64]:
        if not 1 <= length <= self._length:
            raise ValueError(f"length is {length}, wanted 1 to {self._length}, as {self.path} has")
        random = np.random.default_rng([seed, step])
        return random.integers(0, self._length - length + 1, batch)

    def _example_starts(
        self, seed: int, step: int, batch: int, length: int
    ) -> npt.NDArray[np.int64]:
        assert self.example is not None
        if length != math.prod(self.example):
            raise ValueError(
                f"length is {length}, wanted {math.prod(self.example)}: an example of {self.path} "
                f"is {self.example}"
            )
        if not self.examples:
            raise ValueError(f"{self.path} is empty, wanted one example or more")
        epochs, indices = np.divmod(step * batch + np.arange(batch), self.examples)
        chosen = np.empty(batch, np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            chosen[rows] = self._order(seed, int(epoch))[indices[rows]]
        return chosen * length

    def _order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The examples of one epoch, shuffled; the orders of the last two epochs are kept."""
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            random = np.random.default_rng([seed, epoch])
            self._orders[seed, epoch] = random.permutation(self.examples)
        return self._orders[seed, epoch]


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, see `load`."""

    folder: Path
    kind: str  # as given to `prepare`
    example: tuple[int, ...] | None  # (height, width, 3), or None: any window of a stream
    sample_rate: int | None  # of sound, in Hz
    train: Split
    validation: Split
    test: Split  # empty where the source has none
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """Hash of what the splits hold: a resumed run must see the same data."""
        keys = ("kind", "example", "sample_rate", "splits")
        content = json.dumps([self.manifest[key] for key in keys], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def verify(self) -> None:
        """Read all files again; raises DataError naming one that is not as it was written."""
        for name in SPLITS:
            path = self.folder / f"{name}.bin"
            found, wanted = hash_file(path), self.manifest["splits"][name]["sha256"]
            if found != wanted:
                raise DataError(f"{path} is corrupt: its SHA-256 is {found}, wanted {wanted}")


def load(folder: str | os.PathLike[str]) -> Dataset:
    """The data set that `prepare` wrote to `folder`.

    Checks the manifest and the lengths of the files; `Dataset.verify` reads their content too.
    Raises FileNotFoundError if there is no prepared folder and DataError if it is not whole.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    splits = {}
    for name in SPLITS:
        path, wanted = folder / f"{name}.bin", manifest["splits"][name]["bytes"]
        length = path.stat().st_size if path.is_file() else None
        if length != wanted:
            raise DataError(f"{path} has {length} bytes, wanted {wanted}: prepare the data again")
        splits[name] = Split(path, wanted, manifest["example"])
    return Dataset(
        folder=folder,
        kind=manifest["kind"],
        example=manifest["example"],
        sample_rate=manifest["sample_rate"],
        manifest=manifest,
        **splits,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}: make it with sparse-attn prepare")
    try:
        manifest = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is truncated or corrupt: {error}") from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} is of format {manifest.get('format')!r}, wanted {FORMAT!r}")
    missing = {"kind", "example", "sample_rate", "splits"} - manifest.keys()
    if missing:
        raise DataError(f"{path} is corrupt: it lacks {', '.join(sorted(missing))}")
    if manifest["example"] is not None:
        manifest["example"] = tuple(manifest["example"])
    return manifest


class StepBatches(torch.utils.data.Dataset[torch.Tensor]):
    """The batches of steps `first_step` to `first_step + steps - 1` for a `DataLoader`.

    Item i is `split.batch(seed, first_step + i, batch, length)` as a tensor, uint8: (batch,
    length). Give it to a `DataLoader` with `batch_size=None`: whatever its number of workers, the
    batches are the same.
    """

    def __init__(
        self, split: Split, seed: int, batch: int, length: int, first_step: int, steps: int
    ) -> None:
        self.split = split
        self.seed = seed
        self.batch = batch
        self.length = length
        self.first_step = first_step
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.steps:
            raise IndexError(f"index is {index}, wanted 0 to {self.steps - 1}")
        step = self.first_step + index
        return torch.from_numpy(self.split.batch(self.seed, step, self.batch, self.length))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
