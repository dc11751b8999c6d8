# SPDX-License-Identifier: Apache-2.0
"""What a model samples, or reads, as a file: text, images, or recordings."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .model import SparseTransformerConfig
from .plot import import_figure

GAP = 2  # pixels between the images of a grid


def check_kind(config: SparseTransformerConfig, out: Path | None, prompt: str) -> None:
    """ValueError unless the model can make what the name of the file asks for.

    ImportError without what writes it.
    """
    kind = _kind(out)
    shape = config.position_shape
    if kind == "image" and (shape is None or len(shape) != 3 or shape[2] not in (1, 3)):
        raise ValueError(
            "a picture needs a model of images, with a position_shape such as (32, 32, 3), "
            f"got {shape}"
        )
    if kind == "text" and shape is not None:
        raise ValueError(
            f"the model makes images of {'x'.join(map(str, shape))}: name a file ending in .png"
        )
    if kind == "image":
        import_figure()
    if kind != "text" and prompt:
        raise ValueError(f"only text takes a prompt, got {prompt!r}")


def default_length(config: SparseTransformerConfig, out: Path | None, prompt: int) -> int:
    """Tokens to sample after a prompt of so many: an image, a whole context or 500 of text."""
    most = {"image": math.prod(config.position_shape or ()), "text": 500}
    rest = config.context - prompt
    return min(rest, most.get(_kind(out), rest))


def read(config: SparseTransformerConfig, path: Path, example: int) -> tuple[bytes, bool]:
    """At most one context for a model to read, and whether it is sound.

    From a prepared data set (its validation part), a picture of the model's size, a recording, or
    any file as bytes. ``example`` counts images, or contexts from the start.

    Raises ValueError for a picture of another size and an example that is not there.
    """
    values, sound = _values(config, path)
    start = example * config.context
    if example < 0 or start >= len(values):
        raise ValueError(
            f"example is {example}, wanted 0 to {(len(values) - 1) // config.context}, "
            f"as {path} has contexts of {config.context}"
        )
    return values[start : start + config.context].tobytes(), sound


def _values(config: SparseTransformerConfig, path: Path) -> tuple[NDArray[np.uint8], bool]:
    if (path / "manifest.json").is_file():
        from .data import load

        dataset = load(path)
        if config.position_shape is not None and dataset.example != config.position_shape:
            raise ValueError(
                f"{path} has examples of shape {dataset.example}, the model reads "
                f"{config.position_shape}"
            )
        return dataset.validation.values, dataset.sample_rate is not None
    if path.suffix.lower() == ".wav":
        from .data.audio import SAMPLE_RATE, mu_law_encode, open_recording, resample

        recording = open_recording(path)
        blocks = list(resample(recording.blocks, recording.rate, SAMPLE_RATE))
        return mu_law_encode(np.concatenate(blocks)), True
    if path.suffix.lower() == ".png" and config.position_shape is not None:
        return _read_picture(path, config.position_shape), False
    return np.frombuffer(path.read_bytes(), np.uint8), False


def _read_picture(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    import_figure()
    from matplotlib.image import imread

    picture = np.round(imread(path) * 255).astype(np.uint8)
    picture = picture[..., None] if picture.ndim == 2 else picture[..., :3]
    if picture.shape[:2] != shape[:2] or picture.shape[2] not in (1, shape[2]):
        raise ValueError(f"{path} is a picture of shape {picture.shape}, the model reads {shape}")
    return np.broadcast_to(picture, shape).reshape(-1)


def write(config: SparseTransformerConfig, samples: torch.Tensor, out: Path | None) -> list[Path]:
    """Writes samples (batch, seq), of one byte a token; the files, none for text on stdout."""
    tokens = samples.cpu().numpy().astype(np.uint8)
    if _kind(out) == "text" or out is None:
        text = text_of(tokens)
        if out is None:
            print(text)
            return []
        out.write_bytes(f"{text}\n".encode())
        return [out]
    if _kind(out) == "audio":
        return write_recordings(tokens, out)
    assert config.position_shape is not None
    from matplotlib.image import imsave

    imsave(out, image_grid(tokens, config.position_shape))
    return [out]


def text_of(tokens: NDArray[np.uint8]) -> str:
    """Texts (batch, seq), a ruled line between them."""
    return f"\n{'-' * 80}\n".join(row.tobytes().decode("utf-8", "replace") for row in tokens)


def image_grid(tokens: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Images (batch, height * width * channels) side by side: (rows, columns, 3), on white.

    What is missing of the last image is black.
    """
    height, width, channels = shape
    padded = np.zeros((len(tokens), height * width * channels), np.uint8)
    padded[:, : tokens.shape[1]] = tokens
    images = np.broadcast_to(
        padded.reshape(-1, height, width, channels), (len(tokens), height, width, 3)
    )
    across = math.ceil(math.sqrt(len(images)))
    down = -(-len(images) // across)
    size = down * (height + GAP) - GAP, across * (width + GAP) - GAP
    grid = np.full((*size, 3), 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, across)
        top, left = row * (height + GAP), column * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def write_recordings(tokens: NDArray[np.uint8], out: Path) -> list[Path]:
    """8-bit mu-law codes (batch, seq) as 16-bit WAV files; numbered if there are several."""
    from .data import SAMPLE_RATE, mu_law_decode

    names = [out]
    if len(tokens) > 1:
        names = [out.with_stem(f"{out.stem}-{number}") for number in range(1, len(tokens) + 1)]
    for name, codes in zip(names, tokens, strict=True):
        samples = np.round(mu_law_decode(codes) * 32767).astype("<i2")
        with wave.open(str(name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(samples.tobytes())
    return names


def _kind(out: Path | None) -> str:
    """By the name of the file: "image", "audio" or "text"."""
    suffix = "" if out is None else out.suffix.lower()
    return {".png": "image", ".wav": "audio"}.get(suffix, "text")
