# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10, ImageNet 64x64, and any folder of images, as bytes by row, column and channel."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from .dataset import BLOCK, Bytes, DataError, hash_file
from .files import (
    check_all_there,
    check_hash,
    check_size,
    decoding,
    hash_files,
    list_files,
    split_names,
)
from .writer import Writer

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True)
class Cifar10Format:
    """The binary version: records of one label and 32 x 32 pixels in three planes."""

    records: int = 10_000  # of a file
    validation: int = 2_000  # the last of the training records
    archive_bytes: int = 170_052_171
    sha256: str | None = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = "test_batch.bin"
CIFAR10_RECORD = 1 + 32 * 32 * 3


def write_cifar10(source: Path, writer: Writer, wanted: Cifar10Format) -> None:
    """From cifar-10-binary.tar.gz or from the folder that it unpacks to. Labels are dropped."""
    names = (*CIFAR10_TRAIN, CIFAR10_TEST)
    if source.is_dir():
        check_all_there(source, names, [name for name in names if (source / name).is_file()])
        for name in names:
            size = (source / name).stat().st_size
            check_size(str(source / name), size, wanted.records * CIFAR10_RECORD)
        hashes = hash_files(source, names)
        files = {name: (source / name).read_bytes() for name in names}
    else:
        check_size(str(source), source.stat().st_size, wanted.archive_bytes)
        hashes = {source.name: hash_file(source)}
        check_hash(str(source), hashes[source.name], wanted.sha256)
        files = _read_members(source, names, wanted.records * CIFAR10_RECORD)
    writer.describe_source(source, hashes)
    writer.example = (32, 32, 3)
    train = np.concatenate([_cifar10_images(source, name, files[name]) for name in CIFAR10_TRAIN])
    writer.write("train", train[: -wanted.validation])
    writer.write("validation", train[-wanted.validation :])
    writer.write("test", _cifar10_images(source, CIFAR10_TEST, files[CIFAR10_TEST]))


def _read_members(source: Path, names: tuple[str, ...], size: int) -> dict[str, bytes]:
    """The files of a tar archive that have one of `names`, in whatever folder, by name."""
    files: dict[str, bytes] = {}
    with (
        decoding(source, "a tar.gz archive"),
        gzip.open(source) as plain,
        tarfile.open(fileobj=plain, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name not in names:
                continue
            if name in files or not member.isfile():
                raise DataError(f"{source} has {name} twice or not as a file")
            check_size(f"{name} in {source}", member.size, size)
            file = archive.extractfile(member)
            assert file is not None
            files[name] = file.read()
    check_all_there(source, names, files)
    return files


def _cifar10_images(source: Path, name: str, content: bytes) -> Bytes:
    """Images, uint8: (records, 32, 32, 3)."""
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise DataError(f"{name} in {source} has the label {records[:, 0].max()}, wanted 0 to 9")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class Imagenet64Format:
    """Downsampled ImageNet (Chrabaszcz et al.): ten files to train on, one to validate on."""

    batches: int = 10
    train: int = 1_281_167
    validation: int = 50_000


IMAGENET64_PIXELS = 64 * 64 * 3


def write_imagenet64(source: Path, writer: Writer, wanted: Imagenet64Format) -> None:
    """From the folder of the official npz files, or from one npz of any images at 64.

    val_data.npz is for validation; where there is none, about 5 % of the images are, by a hash of
    the image's number. Labels are dropped.
    """
    writer.example = (64, 64, 3)
    if not source.is_dir():
        writer.describe_source(source, {source.name: hash_file(source)})
        _write_npz_files([source], writer, None)
        return
    names = list_files(source, {".npz"})
    train, validation = _official_names(source, names, wanted.batches)
    writer.describe_source(source, hash_files(source, names))
    paths = [source / name for name in train]
    found = _write_npz_files(paths, writer, "train" if validation else None)
    _check_images(source, "train_data_batch", found, wanted.train)
    if validation:
        found = _write_npz_files([source / validation], writer, "validation")
        _check_images(source, "val_data", found, wanted.validation)


def _official_names(source: Path, names: list[str], batches: int) -> tuple[list[str], str | None]:
    """The training files in their order, and the validation file if there is one."""
    by_stem: dict[str, str] = {}
    for name in names:
        stem = Path(name).stem
        if stem in by_stem:
            raise DataError(f"{source} has {by_stem[stem]} and {name}, wanted one of them")
        by_stem[stem] = name
    train = [f"train_data_batch_{i}" for i in range(1, batches + 1)]
    check_all_there(source, train, by_stem)
    return [by_stem[stem] for stem in train], by_stem.get("val_data")


def _check_images(source: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"{source} has {found:,} images in {what}, wanted {wanted:,}")


def _write_npz_files(paths: list[Path], writer: Writer, split: str | None) -> int:
    """Write the images of all files to a split, or to both; returns how many there are."""
    from ..train.corpus import goes_to_validation

    written = 0
    for file_number, path in enumerate(paths):
        for images in _npz_images(path):
            if split:
                writer.write(split, images)
            else:
                numbers = range(written, written + len(images))
                validation = np.array([goes_to_validation(str(number)) for number in numbers])
                writer.write("train", images[~validation])
                writer.write("validation", images[validation])
            written += len(images)
        writer.progress(file_number + 1, len(paths))
    return written


def _npz_images(path: Path) -> Iterator[Bytes]:
    """Blocks of the array `data` or `arr_0` in an npz file, uint8: (images, 64, 64, 3).

    The array is (count, 12288) in planes or (count, 64, 64, 3). It is read as plain bytes: no
    pickle, and never held whole.
    """
    with decoding(path, "an npz file"), zipfile.ZipFile(path) as archive:
        names = [name for name in ("data.npy", "arr_0.npy") if name in archive.namelist()]
        if not names:
            raise DataError(f"{path} has {archive.namelist()}, wanted an array data or arr_0")
        with archive.open(names[0]) as file:
            count, planes = _read_npy_header(path, file)
            while count:
                images = min(count, max(1, BLOCK // IMAGENET64_PIXELS))
                content = file.read(images * IMAGENET64_PIXELS)
                if len(content) != images * IMAGENET64_PIXELS:
                    raise DataError(f"{names[0]} in {path} ends {count} images too early")
                block = np.frombuffer(content, np.uint8)
                if planes:
                    yield block.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
                else:
                    yield block.reshape(-1, 64, 64, 3)
                count -= images
            if file.read(1):  # reads to the end, so that the archive's checksum is compared
                raise DataError(f"{names[0]} in {path} holds more than its header says")


def _read_npy_header(path: Path, file: IO[bytes]) -> tuple[int, bool]:
    """The number of images, and whether they are in planes."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, column_major, dtype = read[np.lib.format.read_magic(file)](file)
    except (KeyError, SyntaxError, TokenError, ValueError) as error:
        raise DataError(f"{path} holds no array in npy form: {error}") from error
    if dtype != np.uint8 or column_major or shape[1:] not in {(IMAGENET64_PIXELS,), (64, 64, 3)}:
        raise DataError(
            f"{path} holds {dtype} {shape}, wanted uint8 (count, {IMAGENET64_PIXELS}) or "
            "(count, 64, 64, 3), row-major"
        )
    return shape[0], len(shape) == 2


def write_images(source: Path, writer: Writer, size: int) -> None:
    """From any folder of PNG and JPEG files: cropped to the central square, resized, RGB.

    About 5 % are for validation, by a hash of the path.
    """
    pillow = _import_pillow()
    hashes = hash_files(source, list_files(source, IMAGE_SUFFIXES))
    writer.describe_source(source, hashes)
    writer.example = (size, size, 3)
    done = 0
    for split, names in zip(("train", "validation"), split_names(hashes), strict=True):
        for name in names:
            writer.write(split, _read_image(pillow, source / name, size))
            done += 1
            writer.progress(done, len(hashes))


def _read_image(pillow: Any, path: Path, size: int) -> Bytes:
    """An image as it is shown, uint8: (size, size, 3). Transparent parts keep their colour."""
    try:
        with pillow.open(path) as file:
            image = _upright(file)  # decodes all of it
    except (OSError, EOFError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} is truncated or corrupt, wanted an image: {error}") from error
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(f"{path} is of mode {image.mode}, wanted 8 bits per channel")
    if image.mode == "P":
        image = image.convert("RGBA")
    colour = image.convert("RGB")
    side = min(colour.size)
    left, top = (colour.width - side) // 2, (colour.height - side) // 2
    square = colour.crop((left, top, left + side, top + side))
    # Lanczos shrinks with a kernel as wide as the pixels it merges: no aliasing.
    return np.asarray(square.resize((size, size), pillow.Resampling.LANCZOS))


def _upright(image: Any) -> Any:
    """Turned as the camera's orientation tag says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _import_pillow() -> Any:
    """The module PIL.Image; ImportError names the package."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "sparse-attn[plot]"') from error
    return PIL.Image
