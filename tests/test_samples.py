# SPDX-License-Identifier: Apache-2.0
"""Samples as files: pixels, sound and text are the tokens."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave

from sparse_attn import samples
from sparse_attn.cli import main
from sparse_attn.data import SAMPLE_RATE, load, mu_law_decode, prepare
from sparse_attn.model import SparseTransformer, SparseTransformerConfig
from sparse_attn.train import checkpoint

Output = pytest.CaptureFixture[str]


def saved_model(path: Path, **changes: Any) -> Path:
    """The checkpoint of a small model whose parameters are random."""
    small = {"vocab": 256, "context": 60, "layers": 2, "heads": 2, "width": 16, "stride": 6}
    config = SparseTransformerConfig(**{**small, "columns": 2, **changes})
    model = SparseTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(path, checkpoint.Checkpoint(config.to_dict(), {"step": 1}, tensors))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A model of images of 5 x 4 pixels."""
    return saved_model(
        tmp_path / "images.safetensors",
        pattern="strided",
        positions="data",
        position_shape=(5, 4, 3),
    )


@pytest.fixture
def bytes_model(tmp_path: Path) -> Path:
    return saved_model(tmp_path / "bytes.safetensors")


def pixels(path: Path, count: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """The images of a grid, two pixels apart: (count, height, width, 3)."""
    picture = np.round(imread(path)[..., :3] * 255).astype(np.uint8)
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    assert picture.shape[:2] == (down * (height + 2) - 2, across * (width + 2) - 2)
    corners = [divmod(number, across) for number in range(count)]
    return np.stack(
        [
            picture[row * (height + 2) :, column * (width + 2) :][:height, :width]
            for row, column in corners
        ]
    )


def test_grid_holds_every_pixel(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    for count, shape in ((1, (7, 5, 3)), (5, (3, 4, 3)), (7, (2, 6, 1))):
        tokens = random.integers(0, 256, (count, int(np.prod(shape))), dtype=np.uint8)
        config = SparseTransformerConfig(
            vocab=256,
            context=tokens.shape[1],
            layers=1,
            heads=1,
            width=8,
            positions="data",
            position_shape=shape,
        )
        out = tmp_path / "grid.png"
        samples.write(config, torch.from_numpy(tokens), out)
        wanted = np.broadcast_to(tokens.reshape(count, *shape), (count, *shape[:2], 3))
        np.testing.assert_array_equal(pixels(out, count, *shape[:2]), wanted)


def test_image_cut_short_ends_in_black() -> None:
    grid = samples.image_grid(np.full((1, 7), 9, np.uint8), (2, 3, 3))
    assert grid.reshape(-1).tolist() == [9] * 7 + [0] * 11


def test_recordings_hold_every_sample(tmp_path: Path) -> None:
    tokens = np.stack([np.arange(256), np.arange(256)[::-1]]).astype(np.uint8)
    paths = samples.write_recordings(tokens, tmp_path / "tune.wav")
    assert [path.name for path in paths] == ["tune-1.wav", "tune-2.wav"]
    for path, codes in zip(paths, tokens, strict=True):
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, SAMPLE_RATE, 256)
            heard = np.frombuffer(file.readframes(256), "<i2")
        np.testing.assert_allclose(heard / 32767, mu_law_decode(codes), atol=1 / 65534)
    assert heard.min() == -32767 and heard.max() == 32767


def sample(path: Path, *options: str) -> int:
    return main(["sample", str(path), "--seed", "5", *options])


def test_command_writes_images(images: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "grid.png"
    assert sample(images, "--batch", "3", "--out", str(out)) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    first = pixels(out, 3, 5, 4)
    assert len(np.unique(first.reshape(3, -1), axis=0)) == 3  # each its own
    assert sample(images, "--batch", "3", "--out", str(out)) == 0
    np.testing.assert_array_equal(pixels(out, 3, 5, 4), first)
    model = SparseTransformer(SparseTransformerConfig.from_dict(checkpoint.load(images).config))
    checkpoint.load_weights(checkpoint.load(images), model)
    tokens = model.generate(
        torch.empty(3, 0, dtype=torch.int64),
        60,
        temperature=0.8,
        generator=torch.Generator().manual_seed(5),
    )
    np.testing.assert_array_equal(first.reshape(3, -1), tokens.numpy())


def test_command_writes_sound(bytes_model: Path, tmp_path: Path, capsys: Output) -> None:
    for batch, names in (("1", ["a.wav"]), ("2", ["a-1.wav", "a-2.wav"])):
        assert sample(bytes_model, "--batch", batch, "--out", str(tmp_path / "a.wav")) == 0
        assert capsys.readouterr().out == "".join(f"wrote {tmp_path / name}\n" for name in names)
        for name in names:
            with wave.open(str(tmp_path / name)) as file:
                assert file.getnframes() == 60


def test_command_writes_text(bytes_model: Path, tmp_path: Path, capsys: Output) -> None:
    options = ["--prompt", "ab", "--batch", "2", "--length", "30", "--top-p", "0.9"]
    assert sample(bytes_model, *options) == 0
    printed = capsys.readouterr().out
    first, second = printed.removesuffix("\n").split(f"\n{'-' * 80}\n")
    assert first.startswith("ab") and second.startswith("ab") and first != second
    out = tmp_path / "samples.txt"
    assert sample(bytes_model, *options, "--out", str(out)) == 0
    assert out.read_bytes().decode() == printed
    assert sample(bytes_model, *options[:-1], "1e-9") == 0
    first, second = capsys.readouterr().out.split("\n", 1)[1].split(f"\n{'-' * 80}\n")
    assert first == second.removesuffix("\n")  # the likeliest byte alone


def test_refusals(images: Path, bytes_model: Path, tmp_path: Path, capsys: Output) -> None:
    png, wav = ["--out", str(tmp_path / "x.png")], ["--out", str(tmp_path / "x.wav")]
    cases = [
        (bytes_model, png, "needs a model of images"),
        (images, [], "images of 5x4x3: name a file ending in .png"),
        (images, [*png, "--prompt", "a"], "only text takes a prompt, got 'a'"),
        (bytes_model, [*wav, "--prompt", "a"], "only text takes a prompt"),
        (bytes_model, ["--batch", "0"], "batch must be at least 1, got 0"),
        (bytes_model, ["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (bytes_model, ["--length", "61"], "context of 60"),
    ]
    for path, options, message in cases:
        assert sample(path, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("sparse-attn: error: ") and message in error
    assert list(tmp_path.glob("x*")) == []


def plot(path: Path, *options: str) -> int:
    return main(["plot", str(path), *options])


def test_plot_reads_pictures(images: Path, tmp_path: Path, capsys: Output, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    imsave(tmp_path / "picture.png", picture)
    config = SparseTransformerConfig.from_dict(checkpoint.load(images).config)
    values, sound = samples.read(config, tmp_path / "picture.png", 0)
    assert values == picture.tobytes() and not sound
    out = ["--out", str(tmp_path / "plot.png")]
    assert plot(images, "--data", str(tmp_path / "picture.png"), "--head", "1", *out) == 0
    assert min(imread(tmp_path / "plot.png").shape[:2]) > 100
    assert plot(images, *out) == 2
    assert "an image model needs --data" in capsys.readouterr().err
    imsave(tmp_path / "picture.png", picture[:4])
    assert plot(images, "--data", str(tmp_path / "picture.png"), *out) == 2
    assert "shape (4, 4, 3), the model reads (5, 4, 3)" in capsys.readouterr().err


def test_plot_reads_recordings_and_prepared_data(
    bytes_model: Path, tmp_path: Path, capsys: Output, seed: int
) -> None:
    config = SparseTransformerConfig.from_dict(checkpoint.load(bytes_model).config)
    codes = np.random.default_rng(seed).integers(1, 255, (1, 4000), dtype=np.uint8)
    samples.write_recordings(codes, tmp_path / "tune.wav")
    values, sound = samples.read(config, tmp_path / "tune.wav", 2)
    assert values == codes[0, 120:180].tobytes() and sound
    prepare("audio", tmp_path / "tune.wav", tmp_path / "prepared")
    values, sound = samples.read(config, tmp_path / "prepared", 1)
    assert values == load(tmp_path / "prepared").validation.values[60:120].tobytes() and sound
    out = ["--out", str(tmp_path / "plot.png")]
    for data in ("tune.wav", "prepared"):
        assert plot(bytes_model, "--data", str(tmp_path / data), *out) == 0
    capsys.readouterr()
    assert plot(bytes_model, "--data", str(tmp_path / "tune.wav"), "--example", "67", *out) == 2
    assert "example is 67, wanted 0 to 66" in capsys.readouterr().err


def test_missing_extra(
    images: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before the sampling."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(SparseTransformer, "generate", None)
    assert sample(images, "--out", str(tmp_path / "x.png")) == 2
    assert 'pip install "sparse-attn[plot]"' in capsys.readouterr().err
