# SPDX-License-Identifier: Apache-2.0
"""Text to train on: a file, a folder, or the sources of the running Python's standard library."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on, with where they came from: a `Source` of text."""

    name: str
    train: bytes
    validation: bytes
    train_files: int
    validation_files: int

    @cached_property
    def digest(self) -> str:
        """Hash of the training bytes: a resumed run must see the same text."""
        return hashlib.blake2b(self.train, digest_size=16).hexdigest()

    @property
    def example(self) -> None:
        """Text is one long sequence."""
        return None

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        """Windows of the training text that begin anywhere: (count, length)."""
        text = np.frombuffer(self.train, dtype=np.uint8)
        start = np.random.default_rng([seed, step]).integers(0, len(text) - length + 1, count)
        return text[start[:, None] + np.arange(length)]

    def split(self, name: str) -> NDArray[np.uint8]:
        """The bytes of "train" or "validation"; ValueError for others, or if there are none."""
        parts = {"train": self.train, "validation": self.validation}
        if name not in parts:
            raise ValueError(
                f"{self.name} has no {name} part: it is split in train and validation alone"
            )
        if not parts[name]:
            raise ValueError(f"{self.name} leaves no bytes for {name}: give more text")
        return np.frombuffer(parts[name], dtype=np.uint8)


def goes_to_validation(relative_path: str, share: float = VALIDATION_SHARE) -> bool:
    """True for about `share` of all paths, decided by a hash of the path alone."""
    name = relative_path.encode("utf-8", "surrogateescape")
    hashed = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(hashed, "big") < share * 2**64


def split_files(
    files: Mapping[str, bytes], share: float = VALIDATION_SHARE
) -> tuple[list[str], list[str]]:
    """Sorted paths for training and for validation.

    Files of identical content share a side: that of the group's first path. Empty files are left
    out.
    """
    groups: dict[bytes, list[str]] = {}
    for path in sorted(files):
        if files[path]:
            groups.setdefault(hashlib.blake2b(files[path]).digest(), []).append(path)
    train: list[str] = []
    validation: list[str] = []
    for paths in groups.values():
        (validation if goes_to_validation(paths[0], share) else train).extend(paths)
    return sorted(train), sorted(validation)


def read_folder(folder: Path, suffix: str = "") -> dict[str, bytes]:
    """Every file under `folder` whose name ends in `suffix`: relative POSIX path to content.

    Hidden files and folders, tests and installed packages are skipped; links to folders are not
    followed.
    """
    files: dict[str, bytes] = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def load_corpus(path: str | os.PathLike[str]) -> Corpus:
    """A file (its last 5 % is for validation) or a folder (split by a hash of the path).

    Raises FileNotFoundError if there is nothing at `path` and ValueError if it holds no text.
    """
    path = Path(path)
    if path.is_dir():
        return _from_files(str(path), read_folder(path))
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: give a file or a folder of files")
    text = path.read_bytes()
    cut = len(text) - round(len(text) * VALIDATION_SHARE)
    return Corpus(str(path), text[:cut], text[cut:], 1, 1)


def standard_library() -> Corpus:
    """The .py files of the running Python's standard library, without tests and packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    name = f"the standard library of Python {platform.python_version()}"
    return _from_files(name, read_folder(folder, ".py"))


def _from_files(name: str, files: Mapping[str, bytes]) -> Corpus:
    train, validation = split_files(files)
    if not train or not validation:
        raise ValueError(
            f"{name} has {len(train)} files of text for training and {len(validation)} for "
            "validation: both need at least one"
        )
    return Corpus(
        name,
        b"".join(files[path] for path in train),
        b"".join(files[path] for path in validation),
        len(train),
        len(validation),
    )


def _raise(error: OSError) -> None:
    raise error
