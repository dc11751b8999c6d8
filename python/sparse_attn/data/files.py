# SPDX-License-Identifier: Apache-2.0
"""Reading sources: the files of a folder, their split, copies by blocks."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .dataset import BLOCK, DataError, hash_file
from .writer import Writer


def list_files(
    folder: Path, suffixes: Collection[str] = (), skipped: Collection[str] = ()
) -> list[str]:
    """POSIX paths relative to `folder`, sorted, of the files with one of `suffixes`.

    Hidden files and folders and the folders named in `skipped` are left out; links to folders are
    not followed. Raises NotADirectoryError and, if there is no such file, DataError.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, wanted a folder")
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        for name in names:
            path = Path(parent, name)
            wanted = not suffixes or path.suffix.lower() in suffixes
            if wanted and not name.startswith(".") and path.is_file():
                paths.append(path)
    if not paths:
        what = f"files ending in {', '.join(sorted(suffixes))}" if suffixes else "files"
        raise DataError(f"{folder} has no {what}")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def hash_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """SHA-256 by name."""
    return {name: hash_file(folder / name) for name in names}


def split_names(hashes: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names for training and for validation, as `train.corpus.split_files` splits.

    About 5 % are for validation, and at least one where there are two files of different content.
    """
    # Not at the top: the training loop imports this package.
    from ..train.corpus import VALIDATION_SHARE, split_files

    contents = {name: digest.encode() for name, digest in hashes.items()}
    share = VALIDATION_SHARE
    train, validation = split_files(contents, share)
    while not validation and share < 1:
        share *= 1.01
        train, validation = split_files(contents, share)
    return train, validation


def copy_parts(file: IO[bytes], name: str, parts: Sequence[tuple[str, int]], writer: Writer) -> str:
    """Copy `parts`, pairs of split and bytes, from an open file.

    Returns the SHA-256 of all. Raises DataError, with `name`, if the file ends too early.
    """
    digest, done, total = hashlib.sha256(), 0, sum(length for _, length in parts)
    for split, length in parts:
        left = length
        while left:
            block = file.read(min(left, BLOCK))
            if not block:
                raise DataError(f"{name} ends after {done} bytes, wanted {total}")
            writer.write(split, block)
            digest.update(block)
            left -= len(block)
            done += len(block)
            writer.progress(done, total)
    return digest.hexdigest()


def check_all_there(source: Path, wanted: Iterable[str], found: Collection[str]) -> None:
    """Raise DataError naming what of `wanted` is not in `found`."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{source} has no {', '.join(missing)}")


def check_size(name: str, found: int, wanted: int) -> None:
    """Raise DataError if a file has not the size that its format gives it."""
    if found != wanted:
        raise DataError(
            f"{name} has {found:,} bytes, wanted {wanted:,}: it is truncated or another file"
        )


def check_hash(name: str, found: str, wanted: str | None) -> None:
    """Raise DataError if a file has not the SHA-256 that is known of it, if one is."""
    if wanted is not None and found != wanted:
        raise DataError(
            f"{name} has the SHA-256 {found}, wanted {wanted}: it is corrupt or another file"
        )


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Turn what a decoder raises for bad content into a DataError that names the file."""
    try:
        yield
    except (
        EOFError,
        gzip.BadGzipFile,
        NotImplementedError,
        RuntimeError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{path} is truncated or corrupt, wanted {what}: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to where a damaged archive points
            raise
        raise DataError(f"{path} is truncated or corrupt, wanted {what}: {error}") from error


def _raise(error: OSError) -> None:
    raise error
