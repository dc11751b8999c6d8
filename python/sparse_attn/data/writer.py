# SPDX-License-Identifier: Apache-2.0
"""Writing a prepared folder: all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from .dataset import FORMAT, MANIFEST, SPLITS, Bytes, DataError

Progress = Callable[[int, int], None]  # (done, total), in whatever unit


class Writer:
    """Takes the bytes of the splits, then writes the manifest."""

    example: tuple[int, ...] | None = None
    sample_rate: int | None = None

    def __init__(self, folder: Path, progress: Progress | None, stack: ExitStack) -> None:
        self.progress = progress or (lambda done, total: None)
        self._folder = folder
        self._files = {
            name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in SPLITS
        }
        self._hashes = {name: hashlib.sha256() for name in SPLITS}
        self._source: dict[str, object] = {}

    def write(self, split: str, values: bytes | Bytes) -> None:
        """Append to a split."""
        content = values if isinstance(values, bytes) else np.ascontiguousarray(values).data
        self._files[split].write(content)
        self._hashes[split].update(content)

    def describe_source(self, source: Path, hashes: Mapping[str, str]) -> None:
        """Note in the manifest what was read: the SHA-256 of every file by its name.

        One file is noted by its own SHA-256, several by that of all names and SHA-256s.
        """
        digest = next(iter(hashes.values()))
        if source.is_dir():
            names = json.dumps(sorted(hashes.items()))
            digest = hashlib.sha256(names.encode()).hexdigest()
        self._source = {"name": source.resolve().name, "files": len(hashes), "sha256": digest}

    def finish(self, kind: str) -> None:
        """Write the manifest and flush all to the disk. Raises DataError for an empty split."""
        lengths = {name: file.tell() for name, file in self._files.items()}
        if not lengths["train"] or not lengths["validation"]:
            raise DataError(
                f"{self._source['name']} gives {lengths['train']} bytes for training and "
                f"{lengths['validation']} for validation: both need some, give more files"
            )
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "example": self.example,
            "sample_rate": self.sample_rate,
            "source": self._source,
            "splits": {
                name: {"bytes": lengths[name], "sha256": self._hashes[name].hexdigest()}
                for name in SPLITS
            },
        }
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        with (self._folder / MANIFEST).open("w", encoding="utf-8") as text:
            json.dump(manifest, text, indent=2)
            text.write("\n")
            text.flush()
            os.fsync(text.fileno())


@contextmanager
def writing(kind: str, out: Path, progress: Progress | None = None) -> Iterator[Writer]:
    """A writer of the folder `out`, which comes to be once the block ends without an error.

    Until then all is in a hidden folder beside it. Raises FileExistsError if `out` exists and is
    not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists: choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished-{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        with ExitStack() as stack:
            writer = Writer(unfinished, progress, stack)
            yield writer
            writer.finish(kind)
        sync_folder(unfinished)
        os.rename(unfinished, out)  # fails if there is more than an empty folder by now
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in it durable, where folders can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
