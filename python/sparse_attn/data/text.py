# SPDX-License-Identifier: Apache-2.0
"""enwik8, and any file or folder as bytes."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from .dataset import DataError, hash_file
from .files import check_hash, check_size, copy_parts, decoding, hash_files, list_files, split_names
from .writer import Writer


@dataclass(frozen=True)
class Enwik8Format:
    """The first 100 MB of the English Wikipedia of 2006-03-03, in the usual split."""

    train: int = 90_000_000
    validation: int = 5_000_000
    test: int = 5_000_000
    sha256: str | None = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def write_enwik8(source: Path, writer: Writer, wanted: Enwik8Format) -> None:
    """From the file enwik8 or from the zip that holds it."""
    if source.is_dir():
        raise IsADirectoryError(f"{source} is a folder, wanted the file enwik8 or enwik8.zip")
    parts = [(name, getattr(wanted, name)) for name in ("train", "validation", "test")]
    total = sum(length for _, length in parts)
    if source.suffix == ".zip":
        with decoding(source, "a zip that holds enwik8"), zipfile.ZipFile(source) as archive:
            members = [m for m in archive.infolist() if m.filename == "enwik8"]
            if len(members) != 1:
                raise DataError(f"{source} has {len(members)} members enwik8, wanted one")
            check_size(f"enwik8 in {source}", members[0].file_size, total)
            with archive.open(members[0]) as file:
                digest = copy_parts(file, f"enwik8 in {source}", parts, writer)
    else:
        check_size(str(source), source.stat().st_size, total)
        with source.open("rb") as file:
            digest = copy_parts(file, str(source), parts, writer)
    check_hash(f"the text of {source}", digest, wanted.sha256)
    writer.describe_source(source, {source.name: hash_file(source)})


def write_bytes(source: Path, writer: Writer) -> None:
    """A file, its last 5 % for validation, or a folder, split by a hash of the path.

    As `train.corpus.load_corpus` reads and splits them, but never held in memory.
    """
    from ..train.corpus import SKIPPED_FOLDERS, VALIDATION_SHARE

    if not source.is_dir():
        length = source.stat().st_size
        cut = round(length * VALIDATION_SHARE)
        with source.open("rb") as file:
            parts = [("train", length - cut), ("validation", cut)]
            digest = copy_parts(file, str(source), parts, writer)
        writer.describe_source(source, {source.name: digest})
        return
    hashes = hash_files(source, list_files(source, skipped=SKIPPED_FOLDERS))
    writer.describe_source(source, hashes)
    lengths = {name: (source / name).stat().st_size for name in hashes}
    train, validation = split_names({n: digest for n, digest in hashes.items() if lengths[n]})
    for split, names in (("train", train), ("validation", validation)):
        for name in names:
            path = source / name
            with path.open("rb") as file:
                copy_parts(file, str(path), [(split, lengths[name])], writer)
