# SPDX-License-Identifier: Apache-2.0
"""Recordings as a stream of bytes: one channel, 12 kHz, 8-bit mu-law, as the paper's music."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .dataset import Bytes, DataError, hash_file
from .files import hash_files, list_files, split_names
from .writer import Writer

SAMPLE_RATE = 12_000
MU = 255
OTHER_SUFFIXES = frozenset({".flac", ".mp3", ".ogg"})
BLOCK_FRAMES = 1 << 10  # the windows of a block stay in the cache
RATES = (1_000, 384_000)  # Hz, least and greatest
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # codings of WAV files

# Of the resampling filter: half its length, its attenuation (80 dB) and, as a share of the lower
# Nyquist frequency, where it is 6 dB down.
ZERO_CROSSINGS = 48
KAISER_BETA = 7.857
ROLLOFF = 0.945

Samples = npt.NDArray[np.float64]


def mu_law_encode(samples: npt.ArrayLike) -> Bytes:
    """Samples from -1 to 1 (beyond, they are clipped) to 8-bit mu-law, uint8 of the same shape.

    >>> mu_law_encode([-1.0, 0.0, 1.0]).tolist()
    [0, 128, 255]
    """
    clipped = np.clip(np.asarray(samples, np.float64), -1, 1)
    compressed = np.copysign(np.log1p(MU * np.abs(clipped)) / np.log1p(MU), clipped)
    return np.floor((compressed + 1) / 2 * MU + 0.5).astype(np.uint8)


def mu_law_decode(codes: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """8-bit mu-law to samples from -1 to 1, float32 of the same shape."""
    compressed = np.asarray(codes, np.float64) / MU * 2 - 1
    samples = np.copysign(np.expm1(np.abs(compressed) * np.log1p(MU)) / MU, compressed)
    return samples.astype(np.float32)


def write_audio(source: Path, writer: Writer) -> None:
    """From a recording, its last 5 % for validation, or a folder, split by a hash of the path.

    WAV files are read as they are; FLAC, MP3 and OGG need the package soundfile.
    """
    from ..train.corpus import VALIDATION_SHARE

    writer.sample_rate = SAMPLE_RATE
    if not source.is_dir():
        recording = open_recording(source)
        writer.describe_source(source, {source.name: hash_file(source)})
        cut, done = recording.samples - round(recording.samples * VALIDATION_SHARE), 0
        for codes in recording.mu_law():
            left = max(0, cut - done)
            writer.write("train", codes[:left])
            writer.write("validation", codes[left:])
            done += len(codes)
            writer.progress(done, recording.samples)
        return
    names = list_files(source, {".wav", *OTHER_SUFFIXES})
    recordings = {name: open_recording(source / name) for name in names}
    hashes = hash_files(source, names)
    writer.describe_source(source, hashes)
    total, done = sum(recording.samples for recording in recordings.values()), 0
    for split, chosen in zip(("train", "validation"), split_names(hashes), strict=True):
        for name in chosen:
            for codes in recordings[name].mu_law():
                writer.write(split, codes)
                done += len(codes)
                writer.progress(done, total)


@dataclass(frozen=True)
class Recording:
    """A recording whose header was read; its sound is read once, by blocks."""

    rate: int
    frames: int
    blocks: Iterator[Samples]  # the mean of the channels

    @property
    def samples(self) -> int:
        """How many there are at `SAMPLE_RATE`."""
        return math.ceil(self.frames * SAMPLE_RATE / self.rate)

    def mu_law(self) -> Iterator[Bytes]:
        """Blocks of 8-bit mu-law at `SAMPLE_RATE`."""
        return map(mu_law_encode, resample(self.blocks, self.rate, SAMPLE_RATE))


def open_recording(path: Path) -> Recording:
    """A WAV, FLAC, MP3 or OGG file.

    Raises DataError if it is none, truncated or of an odd rate, ImportError if soundfile is wanted.
    """
    recording = _open_wav(path) if path.suffix.lower() == ".wav" else _open_other(path)
    if not RATES[0] <= recording.rate <= RATES[1]:
        raise DataError(f"{path} has {recording.rate} Hz, wanted {RATES[0]} to {RATES[1]}")
    return recording


def resample(blocks: Iterable[Samples], rate: int, wanted: int) -> Iterator[Samples]:
    """Blocks of samples at `rate` Hz to blocks at `wanted` Hz, of n to ceil(n * wanted / rate).

    Sample i is the signal at i / wanted seconds after a low-pass filter, a Kaiser-windowed sinc:
    flat up to 89 % of the lower Nyquist frequency, 80 dB down above it. The same samples give the
    same result in blocks of any size.
    """
    if rate == wanted:
        yield from blocks
        return
    up, down = wanted // math.gcd(rate, wanted), rate // math.gcd(rate, wanted)
    filters = _filters(up, down)
    half = filters.shape[1] // 2
    held, first = np.zeros(half - 1), 1 - half  # samples still needed, the position of the first
    read = made = 0
    for block in chain(blocks, [None]):
        if block is not None:
            read += len(block)
            held = np.concatenate([held, block])
            ready = -((first + len(held) - half) * up // -down)  # outputs whose samples are held
        else:
            held = np.concatenate([held, np.zeros(half)])
            ready = -(read * up // -down)
        if ready <= made:
            continue
        positions = np.arange(made, ready) * down  # in 1 / up of an input sample
        starts = positions // up - (half - 1) - first
        windows = np.lib.stride_tricks.sliding_window_view(held, 2 * half)[starts]
        # float64: the byte that it becomes must not depend on the order of a CPU's sums.
        yield np.einsum("ij,ij->i", windows, filters[positions % up])
        made = ready
        unneeded = min(made * down // up - (half - 1) - first, len(held))
        held, first = held[unneeded:], first + unneeded


def _filters(up: int, down: int) -> Samples:
    """Taps for every fraction i / up between two input samples: (up, taps), each row of sum 1."""
    cutoff = ROLLOFF * min(1.0, up / down)  # 1 is the input's Nyquist frequency
    reach = ZERO_CROSSINGS / cutoff
    half = math.ceil(reach)
    distance = np.arange(1 - half, half + 1) - np.arange(up)[:, None] / up
    inside = np.sqrt(np.maximum(0, 1 - (distance / reach) ** 2))
    taps = np.sinc(cutoff * distance) * np.i0(KAISER_BETA * inside) * (np.abs(distance) < reach)
    return taps / taps.sum(axis=1, keepdims=True)


def _open_wav(path: Path) -> Recording:
    """PCM of 8, 16, 24 or 32 bits, or floating point of 32 or 64.

    The standard library's module wave reads neither floating point nor, before Python 3.12, the
    extensible header that 24-bit files have.
    """
    with path.open("rb") as file:
        coding, channels, rate, width, size = _read_wav_header(path, file)
        start = file.tell()
    if start + size > path.stat().st_size:
        raise DataError(
            f"{path} has {path.stat().st_size - start} bytes of sound, its header says {size}: it "
            "is truncated"
        )
    frames = size // (channels * width)

    def blocks() -> Iterator[Samples]:
        with path.open("rb") as file:
            file.seek(start)
            for done in range(0, frames, BLOCK_FRAMES):
                content = file.read(min(BLOCK_FRAMES, frames - done) * channels * width)
                samples = _decode_samples(content, coding, width)
                yield _mean_channel(path, samples.reshape(-1, channels))

    return Recording(rate, frames, blocks())


def _mean_channel(path: Path, samples: Samples) -> Samples:
    """(frames,) from (frames, channels)."""
    if not np.isfinite(samples).all():
        raise DataError(f"{path} holds samples that are not finite")
    return samples.mean(axis=1)


def _read_wav_header(path: Path, file: IO[bytes]) -> tuple[int, int, int, int, int]:
    """Coding, channels, rate, bytes per sample, bytes of sound; leaves `file` at the sound."""
    riff = file.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise DataError(f"{path} begins with {riff[:4]!r}, wanted a WAV file")
    header = b""
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            break
        if name == b"fmt ":
            header = file.read(size)
        else:
            file.seek(size, os.SEEK_CUR)
        file.seek(size % 2, os.SEEK_CUR)  # chunks begin at even positions
    else:
        raise DataError(f"{path} ends before its sound: it is truncated")
    if len(header) < 16:
        raise DataError(f"{path} has a header of {len(header)} bytes, wanted 16 or more")
    coding, channels, rate, _, align, bits = struct.unpack("<HHIIHH", header[:16])
    if coding == EXTENSIBLE and len(header) >= 26:
        (coding,) = struct.unpack("<H", header[24:26])
    known = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}.get(coding, ())
    if bits not in known or not channels or align != channels * bits // 8:
        raise DataError(
            f"{path} has coding {coding}, {bits} bits, {channels} channels, {align} bytes a frame, "
            "wanted PCM of 8, 16, 24 or 32 bits or floating point of 32 or 64"
        )
    return coding, channels, rate, bits // 8, size


def _decode_samples(content: bytes, coding: int, width: int) -> Samples:
    """From -1 to 1, float64, all channels in turn."""
    if coding == FLOAT:
        with np.errstate(invalid="ignore"):  # signalling NaNs; they are refused later
            return np.frombuffer(content, f"<f{width}").astype(np.float64)
    if width == 1:
        return (np.frombuffer(content, np.uint8) - 128.0) / 128
    if width == 3:
        padded = np.zeros((len(content) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        content, width = padded.tobytes(), 4
    return np.frombuffer(content, f"<i{width}") / 2.0 ** (8 * width - 1)


def _open_other(path: Path) -> Recording:
    soundfile = _import_soundfile(path)
    try:
        info = soundfile.info(path)
    except soundfile.SoundFileError as error:
        raise DataError(f"{path} is truncated or corrupt, wanted sound: {error}") from error

    def blocks() -> Iterator[Samples]:
        read = 0
        try:
            for block in soundfile.blocks(path, BLOCK_FRAMES, dtype="float64", always_2d=True):
                read += len(block)
                yield _mean_channel(path, block)
        except soundfile.SoundFileError as error:
            raise DataError(f"{path} is truncated or corrupt, wanted sound: {error}") from error
        if read != info.frames:
            raise DataError(f"{path} ends after {read} frames, wanted {info.frames}")

    return Recording(info.samplerate, info.frames, blocks())


def _import_soundfile(path: Path) -> Any:
    try:
        return import_module("soundfile")  # not a dependency, so not known to type checkers
    except ImportError as error:
        raise ImportError(f"{path} needs soundfile: pip install soundfile") from error
