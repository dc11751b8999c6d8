"""Pictures: pixels are the mask, files are valid, pyplot is never touched."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

import sparse_attn as sa
from sparse_attn import plot
from sparse_attn.model import SparseTransformer, SparseTransformerConfig


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Importing pyplot, which holds global state, fails in this file."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    yield


def rendered(figure: Figure) -> NDArray[Any]:
    """The picture as it is saved: (height, width, 4)."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    content = file.getvalue()
    assert content.startswith(b"\x89PNG")
    return imread(io.BytesIO(content))


def cells(figure: Figure, picture: NDArray[Any], axes: int, n: int) -> NDArray[Any]:
    """Colour in the middle of every cell of a matrix: (n, n, 3)."""
    centres = np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2)  # x, y
    x, y = figure.axes[axes].transData.transform(centres).T
    rows = picture.shape[0] - 1 - np.round(y).astype(int)
    return picture[rows, np.round(x).astype(int), :3].reshape(n, n, 3)


def strip_of(figure: Figure) -> NDArray[Any]:
    """The weights below a wave."""
    strip = figure.axes[1].images[0].get_array()
    assert strip is not None
    return np.ma.filled(strip, 0.0).ravel()


PATTERNS = [
    sa.Dense(),
    sa.Dense(causal=False),
    sa.Local(5),
    sa.Chunk(7),
    sa.Dilated(6),
    sa.Summary(8, 2, 1),
    sa.Strided(9),
    sa.Strided(9, causal=False),
    sa.Fixed(8, 3),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.spec)
@pytest.mark.parametrize("n", [1, 30, 100])
def test_pattern_pixels_equal_the_mask(pattern: sa.Pattern, n: int) -> None:
    figure = pattern.plot(n)
    colours = cells(figure, rendered(figure), 0, n)
    empty = np.abs(colours - to_rgb(plot.EMPTY)).max(-1) < 0.01
    np.testing.assert_array_equal(~empty, pattern.mask(n).numpy())


def test_members_of_a_union_differ_in_colour() -> None:
    figure = sa.Fixed(8, 2).plot(40)
    colours = cells(figure, rendered(figure), 0, 40)
    first = np.abs(colours - to_rgb(plot.FIRST)).max(-1) < 0.01
    np.testing.assert_array_equal(first, sa.Chunk(8).mask(40).numpy())


def test_each_head_has_a_matrix() -> None:
    pattern = sa.PerHead([sa.Local(3), sa.Fixed(6, 1), sa.Dilated(4)])
    figure = plot.plot_pattern(pattern, 20)
    picture = rendered(figure)
    assert len(figure.axes) == 3
    for head, mask in enumerate(pattern.mask(20).numpy()):
        empty = np.abs(cells(figure, picture, head, 20) - to_rgb(plot.EMPTY)).max(-1) < 0.01
        np.testing.assert_array_equal(~empty, mask)


@pytest.mark.parametrize("heads", [1, 3])
def test_blocks_have_a_matrix_for_each_head_of_the_layout(heads: int) -> None:
    layout = torch.rand(heads, 3, 3) < 0.5
    layout[0, 2, 0] = True
    pattern = sa.BlockSparse(layout, 16)
    figure = plot.plot_pattern(pattern, 40)
    picture = rendered(figure)
    masks = pattern.mask(40).view(heads, 40, 40).numpy()
    assert len(figure.axes) == heads
    for head, mask in enumerate(masks):
        empty = np.abs(cells(figure, picture, head, 40) - to_rgb(plot.EMPTY)).max(-1) < 0.01
        np.testing.assert_array_equal(~empty, mask)


def test_pattern_refusals() -> None:
    for n in (0, -1, 4097):
        with pytest.raises(ValueError, match=f"n is {n}, wanted 1 to 4096"):
            plot.plot_pattern(sa.Dense(), n)
    with pytest.raises(TypeError, match="pattern is str, wanted a pattern"):
        plot.plot_pattern("strided", 10)  # type: ignore[arg-type]


def test_connectivity_is_figure_3() -> None:
    figure = plot.plot_connectivity()
    picture = rendered(figure)
    assert picture[..., 3].min() == 1  # opaque: readable on dark pages too
    matrices = [axes for axes in figure.axes if axes.get_ylabel() == "output"]
    merged = [sa.Dense(), sa.Strided(6), sa.Fixed(6, 1)]
    for axes, pattern in zip(matrices, merged, strict=True):
        drawn = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(drawn > 0, pattern.mask(36).numpy())
    heads = [axes for axes in figure.axes if axes.get_ylabel() != "output"]
    patterns = [
        *(sa.Dense(), sa.Dense()),
        *(sa.Local(6), sa.Dilated(6)),
        *(sa.Chunk(6), sa.Summary(6, 1)),
    ]
    for axes, pattern in zip(heads, patterns, strict=True):
        drawn = np.asarray(axes.images[0].get_array())
        query = int(np.flatnonzero(drawn == 3)[0])
        reads = pattern.mask(36)[query].numpy().reshape(6, 6)
        reads[divmod(query, 6)] = True
        np.testing.assert_array_equal(drawn > 0, reads)


def test_loss() -> None:
    losses = [8 - i / 20 for i in range(100)]
    figure = plot.plot_loss(losses, [(50, 5.5), (100, 3.0)], {"order 1": 3.5, "xz": 1.2})
    rendered(figure)
    axes = figure.axes[0]
    labels = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(labels["validation"].get_xydata(), [(50, 5.5), (100, 3.0)])
    assert axes.get_xlabel() == "step"
    assert {text.get_text() for text in axes.texts} == {"order 1", "xz"}
    rendered(plot.plot_loss([8.0]))
    with pytest.raises(ValueError, match="no losses to plot"):
        plot.plot_loss([])


def test_attention_page() -> None:
    position, row = 45, 10
    weights = torch.rand(60) * sa.Fixed(10, 2).mask(60)[position]
    text = bytes(range(256))[::-1][:60]  # letters, controls, bytes that are no text
    figure = plot.plot_attention(weights, b"$_{\\^}" + text, position, row, "title")
    rendered(figure)
    page = figure.axes[0].images[0].get_array()
    assert page is not None
    drawn = np.ma.filled(page, 0.0).ravel()
    assert drawn.shape == (50,)
    np.testing.assert_allclose(drawn[:46], weights[:46].double().numpy())
    assert (drawn[46:] == 0).all()


def test_attention_refusals() -> None:
    weights = torch.ones(10) / 10
    for position, text in ((10, b"x" * 20), (-1, b"x" * 20), (5, b"xxxx")):
        with pytest.raises(ValueError, match="do not fit position"):
            plot.plot_attention(weights, text, position, 4)
    with pytest.raises(ValueError, match="row_length is 0"):
        plot.plot_attention(weights, b"x" * 10, 3, 0)


def test_learned_attention() -> None:
    config = SparseTransformerConfig(
        vocab=256, context=64, layers=2, heads=2, width=32, stride=16, columns=4
    )
    model = SparseTransformer(config)
    text = bytes(torch.randint(256, (100,)).tolist())
    tokens = torch.tensor([list(text[:64])])
    weights = [model.attention_weights(tokens, 1, head, 50)[0] for head in range(2)]
    for head, wanted in ((0, weights[0]), (None, (weights[0] + weights[1]) / 2)):
        figure = plot.plot_learned_attention(model, text, 50, 1, head)
        page = figure.axes[0].images[0].get_array()
        assert page is not None
        np.testing.assert_allclose(
            np.ma.filled(page, 0.0).ravel()[:51], wanted[:51].numpy(), rtol=1e-6
        )
    sound = plot.plot_learned_attention(model, text, 50, 1, 0, sound=True)
    strip = strip_of(sound)
    np.testing.assert_allclose(strip, weights[0][:51].numpy(), rtol=1e-6)
    images = SparseTransformer(
        dataclasses.replace(config, context=36, positions="data", position_shape=(3, 4, 3))
    )
    figure = plot.plot_learned_attention(images, text, 30, 0)
    assert [axes.get_title() for axes in figure.axes] == ["read so far", "attention"]
    with pytest.raises(ValueError, match="position is 64, wanted 0 to 63"):
        plot.plot_learned_attention(model, text, 64, 0)
    with pytest.raises(ValueError, match="layer must be in"):
        plot.plot_learned_attention(model, text, 10, 2)


def test_image_attention_is_on_its_pixels() -> None:
    shape, position = (5, 4, 3), 38
    weights = torch.rand(50) * sa.Strided(12).mask(50)[position]
    image = bytes(torch.randint(1, 256, (60,)).tolist())
    figure = plot.plot_image_attention(weights, image, position, shape, "title")
    rendered(figure)
    read, attention = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    wanted = np.zeros(60)
    wanted[:position] = np.frombuffer(image[:position], np.uint8) / 255
    np.testing.assert_allclose(read.reshape(-1), wanted)
    sums = np.pad(weights[: position + 1].double().numpy(), (0, 60 - position - 1))
    sums = sums.reshape(shape).sum(-1)
    assert (attention == attention[..., :1]).all()  # grey
    np.testing.assert_allclose(attention[sums == sums.max()], 1.0)
    unread = np.arange(20).reshape(5, 4) > position // 3
    assert not attention[unread].any()
    dim = ~unread & (sums == 0)
    assert dim.any() and (attention[dim] <= 0.45).all()
    order = np.argsort(attention[(sums > 0) & (read.sum(-1) == 0), 0])
    assert (np.diff(sums[(sums > 0) & (read.sum(-1) == 0)][order]) >= 0).all()
    frame = figure.axes[1].patches[0]
    assert frame.get_xy() == (position // 3 % 4 - 0.5, position // 12 - 0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("position", [0, 30, 2500])
def test_sound_attention_is_a_strip_of_sums(position: int) -> None:
    weights = torch.rand(3000) * sa.Strided(50).mask(3000)[position]
    codes = bytes(torch.randint(256, (3000,)).tolist())
    figure = plot.plot_sound_attention(weights, codes, position)
    rendered(figure)
    strip = strip_of(figure)
    assert len(strip) == min(position + 1, 1000)
    columns = np.arange(position + 1) * len(strip) // (position + 1)
    np.testing.assert_allclose(strip.sum(), weights[: position + 1].sum().item(), rtol=1e-5)
    if position < 1000:
        np.testing.assert_allclose(strip, weights[: position + 1].double().numpy())
    else:
        assert 1 < np.bincount(columns).max() <= 3
        assert (strip > 0).sum() <= (weights[: position + 1] > 0).sum()
    assert np.asarray(figure.axes[0].lines[0].get_xydata()).shape == (position, 2)


def test_image_and_sound_refusals() -> None:
    weights = torch.ones(12) / 12
    for position, image in ((12, bytes(12)), (5, bytes(4)), (-1, bytes(12))):
        with pytest.raises(ValueError, match="do not fit position"):
            plot.plot_image_attention(weights, image, position, (2, 2, 3))
        with pytest.raises(ValueError, match="do not fit position"):
            plot.plot_sound_attention(weights, image, position)
    with pytest.raises(ValueError, match="do not fit position"):
        plot.plot_image_attention(weights, bytes(12), 3, (1, 3, 3))
    with pytest.raises(ValueError, match=r"shape is \(4, 3\)"):
        plot.plot_image_attention(weights, bytes(12), 3, (4, 3))


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (plot.plot_connectivity, lambda: sa.Dense().plot(4), lambda: plot.plot_loss([1])):
        with pytest.raises(ImportError, match=r'pip install "sparse-attn\[plot\]"'):
            draw()
