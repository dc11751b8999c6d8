# SPDX-License-Identifier: Apache-2.0
"""Data sets: tiny archives in the official formats, what is refused, the batches of a step."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import shutil
import struct
import sys
import tarfile
import tracemalloc
import wave
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sparse_attn.cli import main
from sparse_attn.data import (
    KINDS,
    DataError,
    Dataset,
    Split,
    StepBatches,
    load,
    mu_law_decode,
    mu_law_encode,
    prepare,
)
from sparse_attn.data.audio import open_recording, resample
from sparse_attn.data.images import (
    Cifar10Format,
    Imagenet64Format,
    write_cifar10,
    write_imagenet64,
)
from sparse_attn.data.text import Enwik8Format, write_enwik8
from sparse_attn.data.writer import Writer, writing
from sparse_attn.train.corpus import goes_to_validation, load_corpus, split_files

Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder to prepare, alone in its parent."""
    return tmp_path / "prepared" / "out"


def prepare_by(out: Path, write: Callable[..., None], *arguments: Any) -> Dataset:
    """As `prepare`, with formats of other sizes than the official ones."""
    with writing("tiny", out) as writer:
        source, *formats = arguments
        write(source, writer, *formats)
    return load(out)


@contextmanager
def refused(out: Path, *parts: str, error: type[Exception] = DataError) -> Iterator[None]:
    """An error that says all of `parts`; nothing stays at `out` or beside it."""
    with pytest.raises(error) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)
    assert not out.parent.exists() or not any(out.parent.iterdir())


def pixels(random: np.random.Generator, count: int, size: int) -> Bytes:
    return random.integers(0, 256, (count, size, size, 3), np.uint8)


def in_planes(images: Bytes) -> Bytes:
    """(count, 3 * size * size), written out from the definition of planes."""
    return np.stack([images[..., channel].reshape(len(images), -1) for channel in range(3)], 1)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class TestEnwik8:
    FORMAT = Enwik8Format(train=1801, validation=97, test=103, sha256=None)

    @pytest.fixture
    def text(self, random: np.random.Generator) -> bytes:
        return random.bytes(1801 + 97 + 103)

    def zipped(self, path: Path, text: bytes, name: str = "enwik8") -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "of no interest")
            archive.writestr(name, text)
        return path

    @pytest.mark.parametrize("form", ["file", "zip"])
    def test_split(self, form: str, text: bytes, tmp_path: Path, out: Path) -> None:
        source = tmp_path / "enwik8"
        source.write_bytes(text)
        if form == "zip":
            source = self.zipped(tmp_path / "enwik8.zip", text)
        wanted = Enwik8Format(1801, 97, 103, sha256(text))
        dataset = prepare_by(out, write_enwik8, source, wanted)
        assert dataset.train.values.tobytes() == text[:1801]
        assert dataset.validation.values.tobytes() == text[1801:1898]
        assert dataset.test.values.tobytes() == text[1898:]
        assert dataset.example is None
        assert dataset.sample_rate is None
        assert dataset.manifest["source"] == {
            "name": source.name,
            "files": 1,
            "sha256": sha256(source.read_bytes()),
        }

    def test_official_size(self, text: bytes, tmp_path: Path, out: Path) -> None:
        (tmp_path / "enwik8").write_bytes(text)
        with refused(out, "2,001 bytes", "wanted 100,000,000"):
            prepare("enwik8", tmp_path / "enwik8", out)

    @pytest.mark.parametrize("form", ["file", "zip"])
    def test_wrong_checksum(self, form: str, text: bytes, tmp_path: Path, out: Path) -> None:
        source = tmp_path / "enwik8"
        source.write_bytes(text[::-1])
        if form == "zip":
            source = self.zipped(tmp_path / "enwik8.zip", text[::-1])
        with refused(out, "SHA-256", sha256(text), sha256(text[::-1])):
            prepare_by(out, write_enwik8, source, Enwik8Format(1801, 97, 103, sha256(text)))

    @pytest.mark.parametrize("length", [2000, 2002])
    def test_other_length(self, length: int, tmp_path: Path, out: Path) -> None:
        source = self.zipped(tmp_path / "enwik8.zip", bytes(length))
        with refused(out, f"{length:,} bytes", "wanted 2,001"):
            prepare_by(out, write_enwik8, source, self.FORMAT)

    def test_truncated_zip(self, text: bytes, tmp_path: Path, out: Path) -> None:
        source = self.zipped(tmp_path / "enwik8.zip", text)
        source.write_bytes(source.read_bytes()[:-40])
        with refused(out, "enwik8.zip", "truncated or corrupt"):
            prepare_by(out, write_enwik8, source, self.FORMAT)

    def test_zip_with_a_flipped_bit(self, text: bytes, tmp_path: Path, out: Path) -> None:
        source = self.zipped(tmp_path / "enwik8.zip", text)
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        source.write_bytes(content)
        with refused(out, "enwik8.zip", "truncated or corrupt"):
            prepare_by(out, write_enwik8, source, self.FORMAT)

    def test_zip_of_something_else(self, text: bytes, tmp_path: Path, out: Path) -> None:
        source = self.zipped(tmp_path / "enwik9.zip", text, "enwik9")
        with refused(out, "0 members enwik8"):
            prepare_by(out, write_enwik8, source, self.FORMAT)


class TestCifar10:
    RECORDS, VALIDATION = 7, 9

    @pytest.fixture
    def images(self, random: np.random.Generator) -> Bytes:
        return pixels(random, 6 * self.RECORDS, 32)

    def files(self, images: Bytes) -> dict[str, bytes]:
        """The six binary files: five to train on, one to test on."""
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        records = np.concatenate([labels[:, None], in_planes(images).reshape(-1, 3072)], 1)
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        parts = np.split(records, 6)
        return {name: part.tobytes() for name, part in zip(names, parts, strict=True)}

    def archive(self, path: Path, files: dict[str, bytes]) -> Path:
        """The official layout, with its other files and in its odd order."""
        others = {"readme.html": b"<p>", "batches.meta.txt": b"airplane\n"}
        with tarfile.open(path, "w:gz") as archive:
            for name, content in [*others.items(), *reversed(files.items())]:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    def format_of(self, path: Path) -> Cifar10Format:
        size = path.stat().st_size
        return Cifar10Format(self.RECORDS, self.VALIDATION, size, sha256(path.read_bytes()))

    def check(self, dataset: Dataset, images: Bytes) -> None:
        train, test = images[: 5 * self.RECORDS], images[5 * self.RECORDS :]
        assert dataset.example == (32, 32, 3)
        for split, wanted in (
            (dataset.train, train[: -self.VALIDATION]),
            (dataset.validation, train[-self.VALIDATION :]),
            (dataset.test, test),
        ):
            assert split.examples == len(wanted)
            np.testing.assert_array_equal(split.values.reshape(wanted.shape), wanted)

    def test_archive(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        source = self.archive(tmp_path / "cifar-10-binary.tar.gz", self.files(images))
        self.check(prepare_by(out, write_cifar10, source, self.format_of(source)), images)

    def test_folder(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        for name, content in self.files(images).items():
            (tmp_path / name).write_bytes(content)
        wanted = Cifar10Format(self.RECORDS, self.VALIDATION)
        self.check(prepare_by(out, write_cifar10, tmp_path, wanted), images)

    def test_folder_with_a_short_file(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        files = self.files(images)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content[: -3073 if name == "data_batch_4.bin" else None])
        with refused(out, "data_batch_4.bin has 18,438 bytes, wanted 21,511"):
            prepare_by(out, write_cifar10, tmp_path, Cifar10Format(self.RECORDS, self.VALIDATION))

    def test_truncated_download(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        source = self.archive(tmp_path / "cifar.tar.gz", self.files(images))
        wanted = self.format_of(source)
        source.write_bytes(source.read_bytes()[:-100])
        with refused(out, "truncated", f"wanted {wanted.archive_bytes:,}"):
            prepare_by(out, write_cifar10, source, wanted)
        with refused(out, "truncated or corrupt"):  # were its size and checksum not known
            wanted = Cifar10Format(self.RECORDS, self.VALIDATION, source.stat().st_size, None)
            prepare_by(out, write_cifar10, source, wanted)

    def test_wrong_checksum(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        source = self.archive(tmp_path / "cifar.tar.gz", self.files(images))
        wanted = Cifar10Format(
            self.RECORDS, self.VALIDATION, source.stat().st_size, sha256(b"other")
        )
        with refused(out, sha256(source.read_bytes()), sha256(b"other")):
            prepare_by(out, write_cifar10, source, wanted)

    def test_official_checksum_is_wanted(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        source = self.archive(tmp_path / "cifar.tar.gz", self.files(images))
        with refused(out, "wanted 170,052,171"):
            prepare("cifar10", source, out)

    @pytest.mark.parametrize("fault", ["missing", "short", "label", "twice", "folder"])
    def test_other_structure(self, fault: str, images: Bytes, tmp_path: Path, out: Path) -> None:
        files, part = self.files(images), ""
        if fault == "missing":
            del files["data_batch_3.bin"]
            part = "no data_batch_3.bin"
        elif fault == "short":
            files["test_batch.bin"] = files["test_batch.bin"][:-1]
            part = f"test_batch.bin in {tmp_path}"
        elif fault == "label":
            files["data_batch_2.bin"] = b"\x0a" + files["data_batch_2.bin"][1:]
            part = "label 10"
        elif fault == "twice":
            files["again/data_batch_1.bin"] = files["data_batch_1.bin"]
            part = "data_batch_1.bin twice"
        source = self.archive(tmp_path / "cifar.tar.gz", files)
        if fault == "folder":
            source, part = source.parent, "no data_batch_1.bin"
            wanted = Cifar10Format()
        else:
            wanted = self.format_of(source)
        with refused(out, part):
            prepare_by(out, write_cifar10, source, wanted)


class TestImagenet64:
    FORMAT = Imagenet64Format(batches=3, train=19, validation=5)

    @pytest.fixture
    def images(self, random: np.random.Generator) -> Bytes:
        return pixels(random, 24, 64)

    def official(self, folder: Path, images: Bytes) -> Path:
        """Two folders with three training batches, and one with the validation batch."""
        parts = np.split(images, [2, 11, 19])
        names = ("part2/train_data_batch_1", "part1/train_data_batch_2", "part1/train_data_batch_3")
        for name, part in zip((*names, "val/val_data"), parts, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            labels = np.ones(len(part), np.int64)
            data = in_planes(part).reshape(len(part), 12288)
            np.savez(folder / f"{name}.npz", data=data, labels=labels, mean=np.zeros(12288))
        return folder

    def test_official_folder(self, images: Bytes, tmp_path: Path, out: Path) -> None:
        source = self.official(tmp_path / "imagenet", images)
        dataset = prepare_by(out, write_imagenet64, source, self.FORMAT)
        assert dataset.example == (64, 64, 3)
        assert len(dataset.test) == 0
        np.testing.assert_array_equal(dataset.train.values, images[:19].ravel())
        np.testing.assert_array_equal(dataset.validation.values, images[19:].ravel())
        assert dataset.manifest["source"]["files"] == 4

    @pytest.mark.parametrize("form", ["no validation file", "one file"])
    def test_validation_out_of_train(
        self, form: str, random: np.random.Generator, tmp_path: Path, out: Path
    ) -> None:
        count = 157  # two blocks; image 39 is the first for validation
        images = pixels(random, count, 64)
        if form == "one file":
            source = tmp_path / "images.npz"
            np.savez_compressed(source, images)
        else:
            source = tmp_path
            np.savez(source / "train_data_batch_1.npz", data=in_planes(images).reshape(count, -1))
        wanted = Imagenet64Format(batches=1, train=count)
        dataset = prepare_by(out, write_imagenet64, source, wanted)
        chosen = [goes_to_validation(str(number)) for number in range(count)]
        assert 0 < sum(chosen) < 20
        np.testing.assert_array_equal(dataset.validation.values, images[chosen].ravel())
        np.testing.assert_array_equal(dataset.train.values, images[~np.array(chosen)].ravel())

    def test_no_pickle_is_read(self, tmp_path: Path, out: Path) -> None:
        source, trace = tmp_path / "evil.npz", tmp_path / "trace"
        objects = np.empty(1, object)
        objects[0] = _Evil(trace)
        np.savez(source, data=objects)
        with refused(out, "object", "wanted uint8"):
            prepare("imagenet64", source, out)
        assert not trace.exists()

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((2, 64, 64, 3), np.float32),
            np.zeros((2, 3072), np.uint8),
            np.zeros((64, 64, 3, 2), np.uint8),
            np.asfortranarray(np.zeros((2, 64, 64, 3), np.uint8)),
        ],
        ids=["float", "images-at-32", "batch-last", "column-major"],
    )
    def test_other_arrays(self, array: npt.NDArray[Any], tmp_path: Path, out: Path) -> None:
        np.savez(tmp_path / "a.npz", array)
        with refused(out, str(array.dtype), str(array.shape), "wanted uint8 (count, 12288)"):
            prepare("imagenet64", tmp_path / "a.npz", out)

    @pytest.mark.parametrize(
        "fault", ["missing", "twice", "count", "truncated", "bit", "name", "npy"]
    )
    def test_faults(self, fault: str, images: Bytes, tmp_path: Path, out: Path) -> None:
        source, wanted = self.official(tmp_path / "imagenet", images), self.FORMAT
        path = source / "part1/train_data_batch_2.npz"
        content = bytearray(path.read_bytes())
        if fault == "missing":
            path.unlink()
            part = "no train_data_batch_2"
        elif fault == "twice":
            (source / "copy").mkdir()
            (source / "copy/val_data.npz").write_bytes(content)
            part = "copy/val_data.npz and val/val_data.npz"
        elif fault == "count":
            wanted = Imagenet64Format(3, 20, 5)
            part = "19 images in train_data_batch, wanted 20"
        elif fault == "truncated":
            path.write_bytes(content[:-1000])
            part = "train_data_batch_2.npz is truncated or corrupt"
        elif fault == "bit":
            content[50_000] ^= 4
            path.write_bytes(content)
            part = "train_data_batch_2.npz is truncated or corrupt"
        elif fault == "name":
            np.savez(path, pixels=images)
            part = "wanted an array data or arr_0"
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("data.npy", b"\x93NUMPY\x01\x00 and nonsense")
            part = "no array in npy form"
        with refused(out, part):
            prepare_by(out, write_imagenet64, source, wanted)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_array_of_another_length_than_its_header(
        self, change: int, images: Bytes, tmp_path: Path, out: Path
    ) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (24, 64, 64, 3)}
        )
        content = images.tobytes()[:-1] if change < 0 else images.tobytes() + b"1"
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("data.npy", header.getvalue() + content)
        with refused(out, "data.npy"):
            prepare("imagenet64", tmp_path / "a.npz", out)


class _Evil:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class TestDamage:
    """Archives cut off or with other bytes, where no checksum of the whole is known."""

    @pytest.fixture(params=["zip", "tar", "npz"])
    def archive(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> tuple[Path, Callable[[Path, Writer], None]]:
        if request.param == "zip":
            text = b"words " * 400  # compressed, so that damage reaches the decompressor
            wanted = Enwik8Format(1800, 300, 300, None)
            path = TestEnwik8().zipped(tmp_path / "enwik8.zip", text)
            return path, lambda source, writer: write_enwik8(source, writer, wanted)
        if request.param == "tar":
            cifar = TestCifar10()
            images = np.full((6 * cifar.RECORDS, 32, 32, 3), 7, np.uint8)
            path = cifar.archive(tmp_path / "cifar.tar.gz", cifar.files(images))

            def write(source: Path, writer: Writer) -> None:
                size = source.stat().st_size
                write_cifar10(source, writer, Cifar10Format(cifar.RECORDS, 9, size, None))

            return path, write
        path = tmp_path / "images.npz"
        np.savez_compressed(path, np.zeros((50, 64, 64, 3), np.uint8))
        return path, lambda source, writer: write_imagenet64(source, writer, Imagenet64Format())

    @pytest.mark.parametrize("damage", ["cut", "bytes"])
    def test_is_noticed(
        self,
        damage: str,
        archive: tuple[Path, Callable[[Path, Writer], None]],
        random: np.random.Generator,
        out: Path,
    ) -> None:
        path, write = archive
        whole, noticed = path.read_bytes(), 0
        digest = prepare_by(out, write, path).digest
        shutil.rmtree(out)
        for number in range(60):
            content = bytearray(whole)
            position = number if number < 20 else int(random.integers(len(whole)))
            if damage == "cut":
                del content[position:]
            else:
                content[position : position + 3] = random.bytes(3)
            path.write_bytes(content)
            try:
                same = prepare_by(out, write, path).digest == digest
            except DataError as error:
                assert path.name in str(error)
                assert not any(out.parent.iterdir())
                noticed += 1
            else:
                assert same or path.suffix == ".gz"  # whose checksum is at its unread end
                shutil.rmtree(out)
        assert noticed > (50 if damage == "cut" else 10)


def write_wav(
    path: Path, samples: npt.ArrayLike, rate: int = 12_000, width: int = 2, channels: int = 1
) -> Path:
    """Samples from -1 to 1, by the standard library's writer."""
    scaled = np.round(np.asarray(samples, np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        scaled = scaled + 128
    little_endian = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(little_endian.tobytes())
    return path


def tone(frequency: float, rate: int, count: int) -> npt.NDArray[np.float64]:
    return 0.9 * np.sin(2 * math.pi * frequency * np.arange(count) / rate)


class TestMuLaw:
    def test_codes_come_back(self) -> None:
        codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
        decoded = mu_law_decode(codes)
        assert decoded.dtype == np.float32
        assert (np.diff(decoded.ravel()) > 0).all()
        np.testing.assert_array_equal(mu_law_encode(decoded), codes)
        np.testing.assert_array_equal(decoded.ravel(), -decoded.ravel()[::-1])

    def test_definition(self, random: np.random.Generator) -> None:
        for sample in random.uniform(-1, 1, 50):
            compressed = math.log(1 + 255 * abs(sample)) / math.log(256)
            exact = (math.copysign(compressed, sample) + 1) / 2 * 255
            assert abs(int(mu_law_encode(sample)) - exact) <= 0.5 + 1e-9

    def test_silence_and_clipping(self) -> None:
        assert mu_law_encode([0.0, -0.0, 7.0, -7.0]).tolist() == [128, 128, 255, 0]
        assert abs(mu_law_decode(128)) < 1e-4


class TestResample:
    RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 96_000, 12_007)

    @pytest.mark.parametrize("rate", RATES)
    def test_tones_below_the_limit_stay(self, rate: int) -> None:
        frequency = 0.88 * min(rate, 12_000) / 2
        count = rate // 4 + 3
        resampled = np.concatenate([*resample([tone(frequency, rate, count)], rate, 12_000)])
        assert len(resampled) == math.ceil(count * 12_000 / rate)
        wanted = tone(frequency, 12_000, len(resampled))
        middle = slice(200, -200)  # the filter is not cut off there
        assert np.abs(resampled - wanted)[middle].max() < 0.9 * 10 ** (-70 / 20)

    @pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 12_007])
    def test_tones_above_the_limit_go(self, rate: int) -> None:
        count = rate // 4
        for frequency in (6_010, 0.49 * rate):
            resampled = np.concatenate([*resample([tone(frequency, rate, count)], rate, 12_000)])
            assert np.abs(resampled)[200:-200].max() < 0.9 * 10 ** (-75 / 20)

    @pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
    def test_blocks_do_not_matter(self, rate: int, random: np.random.Generator) -> None:
        samples = random.uniform(-1, 1, 20_011)
        cuts = np.sort(random.integers(0, len(samples), 60))
        whole = np.concatenate([*resample([samples], rate, 12_000)])
        parts = np.concatenate([*resample(np.split(samples, cuts), rate, 12_000)])
        np.testing.assert_array_equal(whole, parts)

    def test_same_rate_is_untouched(self, random: np.random.Generator) -> None:
        samples = random.uniform(-1, 1, 50)
        (same,) = resample([samples], 12_000, 12_000)
        np.testing.assert_array_equal(same, samples)

    @pytest.mark.parametrize("count", [0, 1, 2, 30])
    def test_short(self, count: int) -> None:
        made = [*resample([np.ones(count)], 44_100, 12_000)]
        assert sum(map(len, made)) == math.ceil(count * 12_000 / 44_100)


class TestAudio:
    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_wav(
        self, width: int, channels: int, random: np.random.Generator, tmp_path: Path
    ) -> None:
        samples = random.uniform(-1, 1, (4_321, channels))  # several blocks
        path = write_wav(tmp_path / "a.wav", samples, width=width, channels=channels)
        recording = open_recording(path)
        assert (recording.rate, recording.frames) == (12_000, 4_321)
        read = np.concatenate([*recording.blocks])
        assert np.abs(read - samples.mean(1)).max() < 1.51 * 2.0 ** (1 - 8 * width)

    @pytest.mark.parametrize(
        ("coding", "width", "extensible"), [(3, 4, False), (3, 8, True), (1, 3, True)]
    )
    def test_other_headers(
        self,
        coding: int,
        width: int,
        extensible: bool,
        random: np.random.Generator,
        tmp_path: Path,
    ) -> None:
        samples = random.uniform(-1, 1, 57)
        if coding == 3:
            content = samples.astype(f"<f{width}").tobytes()
        else:
            integers = np.round(samples * (2**23 - 1)).astype("<i4")
            content = integers.reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
        path = tmp_path / "a.wav"
        path.write_bytes(riff(content, coding, width, extensible))
        (read,) = open_recording(path).blocks
        assert np.abs(read - samples).max() < 2**-22

    def test_folder(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        hashes, codes = {}, {}
        for number in range(40):
            name = f"disc {number % 3}/{number}.{'wav' if number % 2 else 'WAV'}"
            path = write_wav(tmp_path / "music" / name, random.uniform(-1, 1, 300 + number))
            hashes[name] = path.read_bytes()
            codes[name] = mu_law_encode(np.concatenate([*open_recording(path).blocks]))
        (tmp_path / "music" / "cover.jpg").write_bytes(b"no sound")
        dataset = prepare("audio", tmp_path / "music", out)
        train, validation = split_files(hashes)
        assert dataset.sample_rate == 12_000
        assert dataset.example is None
        assert dataset.train.values.tobytes() == b"".join(codes[name].tobytes() for name in train)
        assert validation
        assert dataset.validation.values.tobytes() == b"".join(
            codes[name].tobytes() for name in validation
        )

    def test_one_file_ends_in_validation(self, tmp_path: Path, out: Path) -> None:
        path = write_wav(tmp_path / "a.wav", tone(440, 44_100, 44_100), 44_100)
        dataset = prepare("audio", path, out)
        assert (len(dataset.train), len(dataset.validation)) == (11_400, 600)
        stream = np.concatenate([dataset.train.values, dataset.validation.values])
        heard = mu_law_decode(stream)[200:-200]
        assert np.abs(heard - tone(440, 12_000, 12_000)[200:-200]).max() < 0.02

    def test_a_long_file_is_not_held(self, tmp_path: Path, out: Path) -> None:
        frames = 60 * 16_000
        path = write_wav(tmp_path / "a.wav", np.zeros(2 * frames), 16_000, channels=2)
        tracemalloc.start()
        try:
            dataset = prepare("audio", path, out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (dataset.train.values == 128).all()
        assert peak < frames * 4  # what one channel takes in float32 alone is as much

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b"", "wanted a WAV file"),
            (b"ID3 and more", "wanted a WAV file"),
            (b"RIFF\0\0\0\0WAVE", "truncated"),
            (b"RIFF\0\0\0\0WAVEfmt \x04\0\0\0\1\0\1\0data\0\0\0\0", "header of 4 bytes"),
        ],
        ids=["empty", "other", "no-sound", "short-header"],
    )
    def test_broken_wav(self, content: bytes, part: str, tmp_path: Path, out: Path) -> None:
        (tmp_path / "a.wav").write_bytes(content)
        with refused(out, "a.wav", part):
            prepare("audio", tmp_path / "a.wav", out)

    def test_truncated_wav(self, tmp_path: Path, out: Path) -> None:
        path = write_wav(tmp_path / "music" / "a.wav", tone(99, 12_000, 500))
        write_wav(tmp_path / "music" / "b.wav", tone(98, 12_000, 500))
        path.write_bytes(path.read_bytes()[:-2])
        with refused(out, "998 bytes of sound", "1000", "truncated"):
            prepare("audio", tmp_path / "music", out)

    def test_unknown_coding_and_rate(self, tmp_path: Path, out: Path) -> None:
        path = tmp_path / "a.wav"
        path.write_bytes(riff(bytes(100), coding=6, width=1, extensible=False))
        with refused(out, "coding 6, 8 bits"):
            prepare("audio", path, out)
        with refused(out, "has 999 Hz"):
            prepare("audio", write_wav(path, [0.0] * 99, rate=999), out)

    def test_not_finite(self, tmp_path: Path, out: Path) -> None:
        path = tmp_path / "a.wav"
        path.write_bytes(riff(np.array([0, np.nan] * 50, "<f4").tobytes(), 3, 4, False))
        with refused(out, "not finite"):
            prepare("audio", path, out)

    def test_soundfile_is_named(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "soundfile", None)
        (tmp_path / "a.flac").write_bytes(b"fLaC")
        with refused(out, "a.flac needs soundfile", "pip install soundfile", error=ImportError):
            prepare("audio", tmp_path, out)

    def test_flac(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        samples = random.uniform(-0.9, 0.9, (30_011, 2))
        soundfile.write(tmp_path / "a.flac", samples, 32_000, "PCM_16")
        write_wav(tmp_path / "a.wav", samples * 32768 / 32767, 32_000, channels=2)
        flac = prepare("audio", tmp_path / "a.flac", out / "flac")
        wav = prepare("audio", tmp_path / "a.wav", out / "wav")
        for name in ("train", "validation"):
            pair = [mu_law_decode(getattr(d, name).values) for d in (flac, wav)]
            assert np.abs(pair[0] - pair[1]).max() < 0.05
            assert np.abs(pair[0] - pair[1]).mean() < 1e-4
        content = (tmp_path / "a.flac").read_bytes()
        (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"a\.flac"):
            prepare("audio", tmp_path / "a.flac", out / "truncated")
        assert not (out / "truncated").exists()


def riff(content: bytes, coding: int, width: int, extensible: bool) -> bytes:
    """A WAV file of one channel at 12 kHz, with a chunk of odd length before its sound."""
    tag = 0xFFFE if extensible else coding
    header = struct.pack("<HHIIHH", tag, 1, 12_000, 12_000 * width, width, 8 * width)
    if extensible:
        guid = struct.pack("<H", coding) + bytes.fromhex("000000001000800000aa00389b71")
        header += struct.pack("<HHI", 22, 8 * width, 4) + guid
    chunks = b""
    for name, chunk in ((b"LIST", b"odd"), (b"fmt ", header), (b"data", content)):
        chunks += name + struct.pack("<I", len(chunk)) + chunk + bytes(len(chunk) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


class TestImages:
    def save(self, folder: Path, images: Bytes) -> dict[str, bytes]:
        """PNG files in two folders; their content by relative path."""
        files = {}
        for number, image in enumerate(images):
            name = f"{number % 2}/{number}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
            files[name] = (folder / name).read_bytes()
        return files

    @pytest.mark.parametrize("size", [32, 64])
    def test_folder(
        self, size: int, random: np.random.Generator, tmp_path: Path, out: Path
    ) -> None:
        images = pixels(random, 40, size)
        files = self.save(tmp_path / "photos", images)
        (tmp_path / "photos" / "notes.txt").write_text("no image")
        dataset = prepare("images", tmp_path / "photos", out, size)
        by_name = {name: images[int(Path(name).stem)] for name in files}
        assert dataset.example == (size, size, 3)
        for split, names in zip(
            (dataset.train, dataset.validation), split_files(files), strict=True
        ):
            assert split.examples == len(names) > 0
            wanted = np.concatenate([by_name[name].ravel() for name in names])
            np.testing.assert_array_equal(split.values, wanted)

    def first(self, folder: Path, out: Path, image: Image.Image, name: str, **how: Any) -> Bytes:
        """What becomes of one image, in a folder with another for validation."""
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **how)
        other = next(n for n in map(str, range(999)) if goes_to_validation(f"{n}.png"))
        Image.new("RGB", (1, 1)).save(folder / f"{other}.png")
        dataset = prepare("images", folder, out)
        assert dataset.train.examples == dataset.validation.examples == 1
        return dataset.train.values.reshape(32, 32, 3)

    def test_central_square(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        wide = random.integers(0, 256, (32, 75, 3), np.uint8)
        made = self.first(tmp_path / "wide", out / "wide", Image.fromarray(wide), "wide.png")
        np.testing.assert_array_equal(made, wide[:, 21:53])
        tall = Image.fromarray(wide.transpose(1, 0, 2).copy())
        made = self.first(tmp_path / "tall", out / "tall", tall, "tall.png")
        np.testing.assert_array_equal(made, wide.transpose(1, 0, 2)[21:53])

    def test_no_aliasing(self, tmp_path: Path, out: Path) -> None:
        rows = np.arange(100)
        board = ((rows[:, None] + rows) % 2 * 255).astype(np.uint8)
        made = self.first(tmp_path / "a", out, Image.fromarray(board), "board.png")
        assert np.abs(made.astype(int) - 127.5).max() < 12

    def test_jpeg_is_turned_upright(self, tmp_path: Path, out: Path) -> None:
        lying = np.zeros((64, 64, 3), np.uint8)
        lying[:32] = 255
        exif = Image.Exif()
        exif[0x0112] = 8  # turn by 90 degrees to the left
        made = self.first(tmp_path / "a", out, Image.fromarray(lying), "a.JPG", exif=exif)
        assert made[:, :14].min() > 250
        assert made[:, 18:].max() < 5

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
    def test_modes(self, mode: str, tmp_path: Path, out: Path) -> None:
        image = Image.new("RGB", (50, 40), (255, 255, 255)).convert(mode)
        name = "a.jpg" if mode == "CMYK" else "a.png"
        assert self.first(tmp_path / "a", out, image, name).min() == 255

    def test_16_bits_are_refused(self, tmp_path: Path, out: Path) -> None:
        with refused(out, "mode I;16"):
            self.first(tmp_path / "a", out, Image.new("I;16", (9, 9)), "a.png")

    @pytest.mark.parametrize("name", ["a.png", "a.jpeg"])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
    def test_truncated(
        self, name: str, share: float, random: np.random.Generator, tmp_path: Path, out: Path
    ) -> None:
        path = tmp_path / "photos" / name
        self.save(path.parent, pixels(random, 2, 8))
        Image.fromarray(pixels(random, 1, 90)[0]).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: round(len(content) * share)])
        with refused(out, name, "truncated or corrupt"):
            prepare("images", path.parent, out)

    def test_copies_stay_together(
        self, random: np.random.Generator, tmp_path: Path, out: Path
    ) -> None:
        images = pixels(random, 60, 32)
        self.save(tmp_path / "photos", np.concatenate([images, images]))
        dataset = prepare("images", tmp_path / "photos", out)
        train, validation = (
            {image.tobytes() for image in split.values.reshape(-1, 3072)}
            for split in (dataset.train, dataset.validation)
        )
        assert train.isdisjoint(validation)
        assert len(train | validation) == 60

    def test_empty_folder(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "notes.txt").write_text("no image")
        with refused(out, "no files ending in .jpeg, .jpg, .png"):
            prepare("images", tmp_path / "photos", out)
        with refused(out, "wanted a folder", error=NotADirectoryError):
            prepare("images", tmp_path / "photos" / "notes.txt", out)

    def test_one_image(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        self.save(tmp_path / "photos", pixels(random, 1, 32))
        with refused(out, "photos", "for validation", "both need some"):
            prepare("images", tmp_path / "photos", out)

    def test_pillow_is_named(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with refused(out, "images need Pillow", "sparse-attn[plot]", error=ImportError):
            prepare("images", tmp_path, out)


class TestBytes:
    @pytest.mark.parametrize("length", [20, 1_000, 3_000_017])
    def test_file(
        self, length: int, random: np.random.Generator, tmp_path: Path, out: Path
    ) -> None:
        (tmp_path / "text").write_bytes(random.bytes(length))
        dataset, corpus = prepare("bytes", tmp_path / "text", out), load_corpus(tmp_path / "text")
        assert dataset.train.values.tobytes() == corpus.train
        assert dataset.validation.values.tobytes() == corpus.validation

    def test_folder(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        source = tmp_path / "sources"
        for number in range(200):
            path = source / ("tests" if number % 20 == 0 else f"f{number % 7}") / f"{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.bytes(number))
        (source / ".git").mkdir()
        for hidden in (".hidden", ".git/config"):
            (source / hidden).write_text("hidden")
        (source / "f0" / "copy").write_bytes((source / "f1" / "1.py").read_bytes())
        (source / "empty").touch()
        dataset, corpus = prepare("bytes", source, out), load_corpus(source)
        assert dataset.train.values.tobytes() == corpus.train
        assert dataset.validation.values.tobytes() == corpus.validation

    def test_two_files_give_one_to_validation(self, tmp_path: Path, out: Path) -> None:
        source = tmp_path / "two"
        source.mkdir()
        (source / "a").write_bytes(b"one file")
        (source / "b").write_bytes(b"another")
        dataset = prepare("bytes", source, out)
        texts = {dataset.train.values.tobytes(), dataset.validation.values.tobytes()}
        assert texts == {b"one file", b"another"}

    def test_an_empty_file_is_no_validation(self, tmp_path: Path, out: Path) -> None:
        names = [str(number) for number in range(999)]
        empty = next(name for name in names if goes_to_validation(name))
        full = [name for name in names if not goes_to_validation(name)][:3]
        (tmp_path / "folder").mkdir()
        for name in (empty, *full):
            (tmp_path / "folder" / name).write_text("" if name == empty else name)
        dataset = prepare("bytes", tmp_path / "folder", out)
        assert len(dataset.validation) > 0
        assert len(dataset.train) + len(dataset.validation) == sum(map(len, full))

    @pytest.mark.parametrize("length", [0, 1])
    def test_too_short(self, length: int, tmp_path: Path, out: Path) -> None:
        (tmp_path / "text").write_bytes(bytes(length))
        with refused(out, f"text gives {length} bytes for training and 0 for validation"):
            prepare("bytes", tmp_path / "text", out)

    def test_folder_of_nothing(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        with refused(out, "folder has no files"):
            prepare("bytes", tmp_path / "folder", out)
        (tmp_path / "folder" / "deep" / "empty").touch()
        with refused(out, "0 bytes for training"):
            prepare("bytes", tmp_path / "folder", out)


@pytest.fixture
def text(random: np.random.Generator, tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(random.bytes(5_003))
    return path


@pytest.fixture
def prepared(text: Path, out: Path) -> Dataset:
    return prepare("bytes", text, out)


class TestPrepare:
    def test_arguments(self, text: Path, out: Path) -> None:
        with refused(out, "kind is 'enwik9'", "enwik8, cifar10", error=ValueError):
            prepare("enwik9", text, out)
        with refused(out, "size is 48", "32 or 64", error=ValueError):
            prepare("images", text.parent, out, 48)
        with refused(out, "size is 32 for bytes", error=ValueError):
            prepare("bytes", text, out, 32)
        with refused(out, "no data at", "absent", error=FileNotFoundError):
            prepare("bytes", text.parent / "absent", out)

    def test_existing_out(self, text: Path, out: Path) -> None:
        out.mkdir(parents=True)
        prepare("bytes", text, out)  # an empty folder is fine
        manifest = (out / "manifest.json").read_bytes()
        with pytest.raises(FileExistsError, match=r"out exists"):
            prepare("bytes", text, out)
        assert (out / "manifest.json").read_bytes() == manifest
        with pytest.raises(FileExistsError, match=r"text exists"):
            prepare("bytes", out / "train.bin", text)
        assert len(text.read_bytes()) == 5_003

    def test_out_filled_meanwhile(self, text: Path, out: Path) -> None:
        def fill(done: int, total: int) -> None:
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("mine")

        with pytest.raises(OSError, match="out"):
            prepare("bytes", text, out, progress=fill)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert (out / "mine").read_text() == "mine"

    @pytest.mark.parametrize("when", ["writing", "renaming"])
    def test_interruption(
        self, when: str, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            assert any(out.parent.iterdir())  # something was written
            raise KeyboardInterrupt

        if when == "renaming":
            monkeypatch.setattr("os.rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare("bytes", text, out, progress=interrupt if when == "writing" else None)
        assert not any(out.parent.iterdir())
        monkeypatch.undo()
        prepare("bytes", text, out)

    def test_progress(self, random: np.random.Generator, tmp_path: Path, out: Path) -> None:
        (tmp_path / "big").write_bytes(random.bytes(3_000_000))
        seen: list[tuple[int, int]] = []
        prepare("bytes", tmp_path / "big", out, progress=lambda *step: seen.append(step))
        assert seen == sorted(seen)
        assert len(seen) > 2
        assert seen[-1] == (3_000_000, 3_000_000)

    def test_same_source_same_folder(self, text: Path, tmp_path: Path) -> None:
        first = prepare("bytes", text, tmp_path / "1")
        second = prepare("bytes", text, tmp_path / "2")
        assert first.digest == second.digest
        for path in first.folder.iterdir():
            assert path.read_bytes() == (second.folder / path.name).read_bytes()
        assert str(tmp_path) not in (first.folder / "manifest.json").read_text()
        text.write_bytes(text.read_bytes()[:-1] + b"?")
        assert prepare("bytes", text, tmp_path / "3").digest != first.digest

    def test_writer_takes_views(self, random: np.random.Generator, out: Path) -> None:
        values = random.integers(0, 256, (5, 7), np.uint8)

        def write(source: Path, writer: Writer) -> None:
            writer.describe_source(source, {"a": "b"})
            writer.write("train", values.T)
            writer.write("validation", values[:, ::2])

        dataset = prepare_by(out, write, Path("a"))
        np.testing.assert_array_equal(dataset.train.values, values.T.ravel())
        np.testing.assert_array_equal(dataset.validation.values, values[:, ::2].ravel())
        dataset.verify()


class TestLoad:
    def test_what_it_tells(self, prepared: Dataset, text: Path) -> None:
        manifest = json.loads((prepared.folder / "manifest.json").read_text())
        assert manifest == prepared.manifest
        assert prepared.kind == manifest["kind"] == "bytes"
        assert manifest["source"]["sha256"] == sha256(text.read_bytes())
        for name in ("train", "validation", "test"):
            content = (prepared.folder / f"{name}.bin").read_bytes()
            assert manifest["splits"][name] == {"bytes": len(content), "sha256": sha256(content)}
        prepared.verify()

    def test_read_only(self, prepared: Dataset) -> None:
        values = prepared.train.values
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.uint8
        assert values.shape == (len(prepared.train),)
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1

    def test_empty_split(self, prepared: Dataset) -> None:
        assert len(prepared.test) == len(prepared.test.values) == 0
        with pytest.raises(ValueError, match="length is 5, wanted 1 to 0"):
            prepared.test.batch(0, 0, 1, 5)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no manifest\.json in .*absent.*prepare"):
            load(tmp_path / "absent")

    def test_changed_length(self, prepared: Dataset) -> None:
        path = prepared.folder / "train.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"train\.bin has 4752 bytes, wanted 4753"):
            load(prepared.folder)
        path.unlink()
        with pytest.raises(DataError, match=r"train\.bin has None bytes"):
            load(prepared.folder)

    def test_changed_content(self, prepared: Dataset) -> None:
        path = prepared.folder / "validation.bin"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"validation\.bin is corrupt"):
            load(prepared.folder).verify()

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b"", "truncated or corrupt"),
            (b"[1]", "truncated or corrupt"),
            (b"{}", "format None, wanted 'sparse_attn data 1'"),
            (b'{"format": "sparse_attn data 2"}', "format 'sparse_attn data 2'"),
            (b'{"format": "sparse_attn data 1", "kind": "bytes"}', "lacks example, sample_rate"),
        ],
        ids=["empty", "list", "nothing", "version", "part"],
    )
    def test_broken_manifest(self, content: bytes, part: str, prepared: Dataset) -> None:
        (prepared.folder / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=part):
            load(prepared.folder)


@pytest.fixture
def photos(random: np.random.Generator, tmp_path: Path) -> Split:
    """A split of 23 tiny images, each of one value, its number."""
    path = tmp_path / "train.bin"
    path.write_bytes(bytes(np.repeat(np.arange(23, dtype=np.uint8), 2 * 2 * 3)))
    return Split(path, 23 * 12, (2, 2, 3))


class TestBatch:
    def test_windows(self, prepared: Dataset, text: Path) -> None:
        batches = [prepared.train.batch(3, step, 5, 17) for step in range(40)]
        content, corpus = text.read_bytes(), load_corpus(text)
        starts = {content.find(window.tobytes()) for batch in batches for window in batch}
        assert len(starts) > 150
        assert min(starts) >= 0
        assert max(starts) <= len(prepared.train) - 17
        assert batches[0].shape == (5, 17)
        assert batches[0].flags.writeable
        for step, batch in enumerate(batches):
            np.testing.assert_array_equal(batch, corpus.batch(3, step, 5, 17))

    def test_the_only_window(self, prepared: Dataset) -> None:
        length = len(prepared.train)
        np.testing.assert_array_equal(
            prepared.train.batch(0, 5, 2, length), [prepared.train.values] * 2
        )

    @pytest.mark.parametrize("batch", [1, 5, 23, 50])
    def test_every_example_once_per_epoch(self, batch: int, photos: Split) -> None:
        assert photos.examples == 23
        steps = -(-3 * 23 // batch)
        rows = np.concatenate([photos.batch(7, step, batch, 12) for step in range(steps)])
        assert (rows == rows[:, :1]).all()  # whole examples
        epochs = rows[: 3 * 23, 0].reshape(3, 23)
        np.testing.assert_array_equal(np.sort(epochs), [range(23)] * 3)
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3

    def test_a_function_of_its_arguments(self, photos: Split, random: np.random.Generator) -> None:
        calls = [(seed, step) for seed in (0, 5) for step in range(12)]
        wanted = {(seed, step): photos.batch(seed, step, 9, 12) for seed, step in calls}
        fresh = Split(photos.path, len(photos), photos.example)
        for index in [*random.permutation(24), *random.permutation(24)]:
            seed, step = calls[index]
            np.testing.assert_array_equal(fresh.batch(seed, step, 9, 12), wanted[seed, step])
        assert not np.array_equal(wanted[0, 0], wanted[5, 0])

    @pytest.mark.parametrize("arguments", [(0, 0, 0, 12), (0, -1, 1, 12), (-1, 0, 1, 12)])
    def test_ranges(self, arguments: tuple[int, int, int, int], photos: Split) -> None:
        with pytest.raises(ValueError, match="wanted batch 1 or more, the others 0 or more"):
            photos.batch(*arguments)

    def test_lengths(self, photos: Split, prepared: Dataset) -> None:
        with pytest.raises(ValueError, match=r"length is 11, wanted 12: .* \(2, 2, 3\)"):
            photos.batch(0, 0, 1, 11)
        with pytest.raises(ValueError, match=r"length is 4754, wanted 1 to 4753"):
            prepared.train.batch(0, 0, 1, 4754)
        with pytest.raises(ValueError, match="stream of bytes"):
            _ = prepared.train.examples
        with pytest.raises(ValueError, match="wanted one example or more"):
            Split(photos.path, 0, (2, 2, 3)).batch(0, 0, 1, 12)


class TestStepBatches:
    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("opened", [False, True], ids=["fresh", "opened"])
    def test_workers(self, workers: int, opened: bool, prepared: Dataset) -> None:
        wanted = [prepared.train.batch(4, 1_000 + i, 3, 33) for i in range(11)]
        split = prepared.train if opened else load(prepared.folder).train
        loader = DataLoader(
            StepBatches(split, 4, 3, 33, 1_000, 11), batch_size=None, num_workers=workers
        )
        batches = [*loader]
        assert batches[0].dtype == torch.uint8
        np.testing.assert_array_equal(torch.stack(batches), wanted)

    def test_pickle_is_small(self, prepared: Dataset) -> None:
        dataset = StepBatches(prepared.train, 4, 3, 33, 7, 2)
        wanted = dataset[1]
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 1_000 < len(prepared.train)
        assert torch.equal(pickle.loads(pickled)[1], wanted)

    def test_pickle_without_the_order(self, photos: Split) -> None:
        before = len(pickle.dumps(photos))
        photos.batch(0, 0, 60, 12)  # of three epochs
        assert len(pickle.dumps(photos)) == before

    def test_ends(self, prepared: Dataset) -> None:
        dataset = StepBatches(prepared.train, 4, 3, 33, 7, 2)
        assert len(dataset) == 2
        for index in (-1, 2):
            with pytest.raises(IndexError, match=f"index is {index}, wanted 0 to 1"):
                dataset[index]


class TestCommand:
    def test_documented_commands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("sparse-attn prepare")]
        monkeypatch.chdir(tmp_path)
        for line in lines:
            assert main(line.split()[1:]) == 2
            assert "error: no data at" in capsys.readouterr().err
        assert sorted(line.split()[2] for line in lines) == sorted(KINDS)

    def test_bytes(self, text: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prepare", "bytes", str(text), "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert "4,753 bytes" in shown
        assert f"wrote {out}" in shown
        assert load(out).train.values.tobytes() == text.read_bytes()[:4753]

    def test_images(
        self,
        random: np.random.Generator,
        tmp_path: Path,
        out: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        TestImages().save(tmp_path / "photos", pixels(random, 3, 70))
        argv = ["prepare", "images", str(tmp_path / "photos"), "--out", str(out), "--size", "64"]
        assert main(argv) == 0
        assert "2 images of 64x64" in capsys.readouterr().out

    def test_error(self, text: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prepare", "enwik8", str(text), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sparse-attn: error: ")
        assert error.count("\n") == 1
        assert not out.exists()
