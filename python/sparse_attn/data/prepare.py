# SPDX-License-Identifier: Apache-2.0
"""From the file or folder that a user has to a prepared folder."""

from __future__ import annotations

import os
from pathlib import Path

from .audio import write_audio
from .dataset import Dataset, load
from .images import Cifar10Format, Imagenet64Format, write_cifar10, write_imagenet64, write_images
from .text import Enwik8Format, write_bytes, write_enwik8
from .writer import Progress, writing

KINDS = ("enwik8", "cifar10", "imagenet64", "audio", "images", "bytes")
IMAGE_SIZES = (32, 64)


def prepare(
    kind: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    size: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Make the folder `out` from `source` and load it.

    kind          source
    "enwik8"      the file enwik8 or enwik8.zip
    "cifar10"     cifar-10-binary.tar.gz or the folder in it
    "imagenet64"  the folder of the official npz files, or one npz of images at 64
    "audio"       a recording or a folder of them
    "images"      a folder of PNG and JPEG files, brought to `size` (32 unless told, or 64)
    "bytes"       any file or folder

    `progress(done, total)` is called now and then. An error or an interruption leaves nothing at
    `out`. Raises FileNotFoundError if there is no source, FileExistsError if `out` holds anything,
    DataError if the source is not what its kind promises, ImportError naming a missing package.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, wanted one of {', '.join(KINDS)}")
    if size is not None and (kind != "images" or size not in IMAGE_SIZES):
        raise ValueError(f"size is {size} for {kind}, wanted 32 or 64, for images alone")
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"no data at {source}: give a file or a folder")
    with writing(kind, out, progress) as writer:
        if kind == "enwik8":
            write_enwik8(source, writer, Enwik8Format())
        elif kind == "cifar10":
            write_cifar10(source, writer, Cifar10Format())
        elif kind == "imagenet64":
            write_imagenet64(source, writer, Imagenet64Format())
        elif kind == "audio":
            write_audio(source, writer)
        elif kind == "images":
            write_images(source, writer, size or IMAGE_SIZES[0])
        else:
            write_bytes(source, writer)
    return load(out)
