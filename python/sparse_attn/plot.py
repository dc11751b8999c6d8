# SPDX-License-Identifier: Apache-2.0
"""Pictures: patterns, learned attention, loss curves; the paper's figures 2 and 3.

Every function returns a `matplotlib.figure.Figure` and touches no global state; save it with
`figure.savefig(path)`. Needs `pip install "sparse-attn[plot]"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .patterns import (
    BlockSparse,
    Chunk,
    Dense,
    Dilated,
    Fixed,
    Local,
    Pattern,
    PerHead,
    Strided,
    Summary,
    Union,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .model import SparseTransformer

MAX_PATTERN_LENGTH = 4096
MAX_LETTERS = 4096
EMPTY, FIRST, SECOND, QUERY = "#eceff1", "#1f77b4", "#ff9e3d", "#0b2545"
INK = "#263238"


def plot_pattern(pattern: Pattern, n: int) -> Figure:
    """The pattern at `n` tokens: a matrix of queries (rows) and keys (columns), one for each head.

    A key is coloured by the first member of a union that has it. Raises TypeError if `pattern` is
    not a pattern and ValueError for `n` below 1 or above 4096.

    >>> import sparse_attn as sa
    >>> sa.Strided(8).plot(64).savefig("strided.png")  # doctest: +SKIP
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern is {type(pattern).__name__}, wanted a pattern")
    if not 1 <= n <= MAX_PATTERN_LENGTH:
        raise ValueError(f"n is {n}, wanted 1 to {MAX_PATTERN_LENGTH} tokens in a picture")
    heads = _heads(pattern)
    across = math.ceil(math.sqrt(len(heads)))
    down = math.ceil(len(heads) / across)
    figure = _figure(4.6 * across, 4.9 * down)
    for index, head in enumerate(heads):
        axes = figure.add_subplot(down, across, index + 1)
        _draw_pattern(axes, head, n)
        members = str(head.spec).replace(" | ", "\n")
        axes.set_title(f"head {index}: {members}" if len(heads) > 1 else members, fontsize=9)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    return figure


def plot_connectivity(side: int = 6) -> Figure:
    """The paper's figure 3: dense, strided and fixed attention over a `side` x `side` image.

    Above, which pixels two heads read for one output pixel; below, all outputs (rows) and their
    inputs (columns).
    """
    n = side * side
    kinds: list[tuple[str, Pattern, list[Pattern]]] = [
        ("Transformer", Dense(), [Dense()]),
        ("Sparse Transformer (strided)", Strided(side), [Local(side), Dilated(side)]),
        ("Sparse Transformer (fixed)", Fixed(side, 1), [Chunk(side), Summary(side, 1)]),
    ]
    figure = _figure(9.6, 5.2)
    query = (side * 2 // 3) * side + side // 2
    parts: Any = figure.subfigures(1, len(kinds))
    for part, (title, merged, heads) in zip(parts, kinds, strict=True):
        part.set_facecolor("white")
        part.suptitle(title, fontsize=11)
        grid = part.add_gridspec(2, 2, height_ratios=[1, 2])
        for index in range(2):
            axes = part.add_subplot(grid[0, index])
            number = min(index, len(heads) - 1)
            pixels = heads[number].mask(n)[query].numpy() * np.int64(number + 1)
            pixels[query] = 3
            _draw_cells(axes, pixels.reshape(side, side), grid_lines=True)
            axes.set_xlabel(("first head", "second head")[index], fontsize=8)
        axes = part.add_subplot(grid[1, :])
        _draw_pattern(axes, merged, n, diagonal=True)
        axes.set_xlabel("input", fontsize=8)
        axes.set_ylabel("output", fontsize=8)
    return figure


def plot_loss(
    losses: Sequence[float],
    validations: Sequence[tuple[int, float]] = (),
    baselines: Mapping[str, float] | None = None,
) -> Figure:
    """Loss curve: bits per byte of every step, validations as (steps taken, bits per byte), and a
    line for each baseline. Raises ValueError without losses.
    """
    if not len(losses):
        raise ValueError("no losses to plot, wanted at least one")
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=FIRST, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=FIRST, linewidth=1.6, label="training")
    if len(validations):
        at, bits = zip(*validations, strict=True)
        axes.plot(at, bits, "o-", color=QUERY, markersize=4, linewidth=1.2, label="validation")
    for name, bits_per_byte in (baselines or {}).items():
        axes.axhline(bits_per_byte, color="#90a4ae", linewidth=0.9, linestyle="--")
        axes.annotate(
            name,
            (1, bits_per_byte),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=8,
            color=INK,
            annotation_clip=True,
        ).set_in_layout(False)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, min(8.5, float(values.max()) + 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    return figure


def plot_attention(
    weights: torch.Tensor | NDArray[Any],
    text: bytes,
    position: int,
    row_length: int,
    title: str = "",
) -> Figure:
    """Where the query that predicts byte `position` looks, as a page of text.

    `weights` (seq,) are the softmax weights of every key; key j has read byte j - 1 of `text`, key
    0 the start of the text. The page shows one key a cell, `row_length` a row (a fixed pattern's
    length), darker for more weight and grey for none; the query's key is framed. Letters are drawn
    up to 4096 cells.

    Raises ValueError if weights and text do not fit `position`.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not 0 <= position < len(values) or len(text) < position:
        raise ValueError(
            f"weights of shape {values.shape} and {len(text)} bytes of text do not fit position "
            f"{position}"
        )
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}, wanted 1 or more")
    shown = position + 1
    rows = -(-shown // row_length)
    page = np.zeros(rows * row_length)
    page[:shown] = values[:shown]
    page = np.ma.masked_equal(page.reshape(rows, row_length), 0.0)

    figure = _figure(max(4.0, min(11.0, 0.14 * row_length + 1.5)), max(2.0, 0.2 * rows + 1.0))
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    axes.set_facecolor(EMPTY)
    norm = PowerNorm(0.4, vmin=0, vmax=max(float(values[:shown].max()), 1e-12))
    image = axes.imshow(page, cmap="YlOrRd", norm=norm, aspect="auto", interpolation="nearest")
    _frame(axes, *divmod(position, row_length), QUERY)
    if shown <= MAX_LETTERS:
        for key in range(1, shown):
            letter = chr(text[key - 1])
            if letter.isascii() and letter.isprintable() and letter != " ":
                axes.text(
                    key % row_length,
                    key // row_length,
                    letter.replace("$", r"\$"),
                    horizontalalignment="center",
                    verticalalignment="center_baseline",
                    family="monospace",
                    fontsize=6.5,
                    color="white" if norm(values[key]) > 0.65 else INK,
                )
    axes.set_xticks([])
    ticks = range(0, rows, max(1, -(-rows // 16)))
    axes.set_yticks(list(ticks), [str(tick * row_length) for tick in ticks], fontsize=7)
    axes.set_ylabel("position of the row's first key", fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def plot_image_attention(
    weights: torch.Tensor | NDArray[Any],
    image: bytes,
    position: int,
    shape: tuple[int, ...],
    title: str = "",
) -> Figure:
    """Where the query that predicts byte `position` of an image looks (the paper's figure 2).

    `weights` (seq,) are the softmax weights of every key, `shape` (height, width, channels). A key
    is drawn at its position, the channels of a pixel added up: white for the greatest weight, on
    the dimmed image, black where nothing has been read yet; the pixel to predict is framed. Beside
    it the image so far.

    Raises ValueError if weights, image and shape do not fit `position`.
    """
    values = np.asarray(weights, dtype=np.float64)
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f"shape is {shape}, wanted (height, width, 1 or 3 channels)")
    size = math.prod(shape)
    if values.ndim != 1 or not 0 <= position < len(values) <= size or len(image) < position:
        raise ValueError(
            f"weights of shape {values.shape} and {len(image)} bytes of an image of shape {shape} "
            f"do not fit position {position}"
        )
    read = np.zeros(size)
    read[:position] = np.frombuffer(image[:position], np.uint8) / 255
    picture = np.broadcast_to(read.reshape(shape), (*shape[:2], 3))
    sums = np.zeros(size)
    sums[: position + 1] = values[: position + 1]
    sums = sums.reshape(shape).sum(-1)
    grey = picture.mean(-1, keepdims=True) * 0.45
    light = (sums / max(float(sums.max()), 1e-12))[..., None] ** 0.4
    figure = _figure(8.4, 4.4)
    for index, (name, pixels) in enumerate(
        (("read so far", picture), ("attention", grey + (1 - grey) * light))
    ):
        axes = figure.add_subplot(1, 2, index + 1)
        axes.imshow(np.broadcast_to(pixels, picture.shape), interpolation="nearest")
        row, column = divmod(position // shape[2], shape[1])
        _frame(axes, row, column, "#ff9e3d")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_sound_attention(
    weights: torch.Tensor | NDArray[Any],
    codes: bytes,
    position: int,
    title: str = "",
) -> Figure:
    """Where the query that predicts sample `position` looks: the wave, and a strip below it.

    `weights` (seq,) are the softmax weights of every key; the strip adds up those of neighbouring
    keys, in at most 1000 columns. `codes` are 8-bit mu-law.

    Raises ValueError if weights and codes do not fit `position`.
    """
    from .data import SAMPLE_RATE, mu_law_decode

    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not 0 <= position < len(values) or len(codes) < position:
        raise ValueError(
            f"weights of shape {values.shape} and {len(codes)} samples do not fit position "
            f"{position}"
        )
    keys = position + 1
    columns = min(keys, 1000)
    edges = np.arange(columns) * keys // columns
    strip = np.add.reduceat(values[:keys], edges)[None]
    seconds = keys / SAMPLE_RATE
    figure = _figure(11.0, 3.4)
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 1])
    wave = figure.add_subplot(grid[0])
    samples = mu_law_decode(np.frombuffer(codes[:position], np.uint8))
    wave.plot(np.arange(position) / SAMPLE_RATE, samples, color=FIRST, linewidth=0.6)
    wave.set_ylim(-1, 1)
    wave.set_ylabel("sample", fontsize=8)
    wave.set_title(title, fontsize=9, loc="left")
    below = figure.add_subplot(grid[1], sharex=wave)
    image = below.imshow(
        np.ma.masked_equal(strip, 0.0),
        cmap="YlOrRd",
        vmin=0,
        aspect="auto",
        extent=(0, seconds, 0, 1),
        interpolation="nearest",
    )
    below.set_facecolor(EMPTY)
    below.set_yticks([])
    below.set_xlim(0, seconds)
    below.set_xlabel("seconds", fontsize=8)
    bar = figure.colorbar(image, ax=[wave, below], fraction=0.025, pad=0.01)
    bar.set_label(f"weight of {-(-keys // columns)} keys", fontsize=8)
    for axes in (wave, below, bar.ax):
        axes.tick_params(labelsize=7)
    return figure


def plot_learned_attention(
    model: SparseTransformer,
    text: bytes,
    position: int,
    layer: int,
    head: int | None = None,
    sound: bool = False,
) -> Figure:
    """What `model` looks at to predict byte `position` of `text`: one head or a layer's mean.

    As an image if the model's positions are those of one, as a wave if `text` is `sound`, else as a
    page. Reads at most one context of `text`. Raises ValueError for a position, layer or head that
    is not there.
    """
    config = model.config
    text = text[: config.context]
    if not 0 <= position < len(text):
        raise ValueError(f"position is {position}, wanted 0 to {len(text) - 1}: {len(text)} bytes")
    device = next(model.parameters()).device
    tokens = torch.tensor([list(text)], device=device)
    heads = range(config.heads) if head is None else (head,)
    weights = torch.stack([model.attention_weights(tokens, layer, h, position)[0] for h in heads])
    mean = weights.mean(0).cpu()
    which = f"mean of {config.heads} heads" if head is None else f"head {head}"
    title = f"layer {layer}, {which}: where the model looks to predict byte {position}"
    if config.position_shape is not None and len(config.position_shape) == 3:
        return plot_image_attention(mean, text, position, config.position_shape, title)
    if sound:
        return plot_sound_attention(mean, text, position, title)
    title += f", {chr(text[position])!r}"
    return plot_attention(mean, text, position, config.stride, title)


def import_figure() -> type[Figure]:
    """matplotlib's Figure; ImportError names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "sparse-attn[plot]"') from error
    return Figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure on an opaque light ground, readable on pages of any colour."""
    figure = import_figure()
    return figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


def _frame(axes: Axes, row: int, column: int, colour: str) -> None:
    """A frame around one cell of a picture."""
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=1.5)
    )


def _heads(pattern: Pattern) -> tuple[Pattern, ...]:
    """A pattern for each head, or one for all."""
    if isinstance(pattern, PerHead):
        return pattern.patterns
    if isinstance(pattern, BlockSparse):
        layouts = pattern.layout.split(1)
        return tuple(BlockSparse(x, pattern.block, causal=pattern.causal) for x in layouts)
    return (pattern,)


def _member_numbers(pattern: Pattern, n: int) -> NDArray[np.int64]:
    """(n, n): the number, from 1, of the first member that has the key; 0 where none has."""
    members = pattern.members if isinstance(pattern, Union) else (pattern,)
    numbers = np.zeros((n, n), dtype=np.int64)
    for number, member in reversed(list(enumerate(members, start=1))):
        numbers[member.mask(n).numpy()] = number
    return numbers


def _draw_pattern(axes: Axes, pattern: Pattern, n: int, diagonal: bool = False) -> None:
    cells = np.minimum(_member_numbers(pattern, n), 2)
    if diagonal:
        np.fill_diagonal(cells, 3)
    _draw_cells(axes, cells, grid_lines=n <= 64)


def _draw_cells(axes: Axes, cells: NDArray[np.int64], grid_lines: bool) -> None:
    """Cells of value 0 empty, 1 first member, 2 a later member, 3 the query itself."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([EMPTY, FIRST, SECOND, QUERY])
    axes.imshow(cells, cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest")
    if grid_lines:
        down, across = cells.shape
        axes.set_xticks(np.arange(across + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(down + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the last 2 % of the steps, at most 50."""
    width = max(1, min(50, len(values) // 50))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
