# SPDX-License-Identifier: Apache-2.0
"""What a model makes of bytes it has not seen: bits per byte, or per dimension of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..model import SparseTransformer


@dataclass(frozen=True)
class Score:
    """Mean bits per value and how sure it is."""

    bits: float
    standard_error: float  # of the mean, over blocks of one context; nan if there are not two
    count: int  # values scored


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of every token in nats: (batch, seq) from int64 (batch, seq)."""
    logits = model(tokens).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@torch.no_grad()
def evaluate(
    model: SparseTransformer,
    values: NDArray[np.uint8],
    batch: int,
    min_context: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score `values` (1-D), every value once, with `batch` windows at a time (paper, Table 3).

    Windows of one context each advance by `context - min_context` values. A window's first
    `min_context` values were scored by the one before it, so a value is predicted from at least
    `min_context` values, or from all there are at the start. Independent examples of one context
    each are scored whole with `min_context` 0.

    The standard error takes blocks of one context as independent. `progress` is called with the
    number of values scored so far. Raises ValueError if there are no values or if `min_context` is
    not less than the context.
    """
    context = model.config.context
    if batch < 1:
        raise ValueError(f"batch is {batch}, wanted 1 or more")
    if not len(values):
        raise ValueError("there are no values to score")
    if not 0 <= min_context < context:
        raise ValueError(f"min_context is {min_context}, wanted 0 to {context - 1}")
    device = next(model.parameters()).device
    nats = np.zeros(-(-len(values) // context))  # of each block
    scored = 0
    was_training = model.training
    model.eval()
    for starts in _groups(len(values), context, min_context, batch):
        windows = np.stack([values[start : start + context] for start in starts])
        loss = losses(model, torch.from_numpy(windows).to(device).long()).cpu().numpy()
        for start, row in zip(starts, loss, strict=True):
            first = min_context if start else 0
            blocks = np.arange(start + first, start + len(row)) // context
            np.add.at(nats, blocks, row[first:].astype(np.float64))
            scored += len(row) - first
        if progress is not None:
            progress(scored)
    model.train(was_training)
    assert scored == len(values)
    return _score(nats / math.log(2), len(values), context)


def _groups(length: int, context: int, min_context: int, batch: int) -> Iterator[list[int]]:
    """Where the windows start, `batch` full ones at a time; a shorter last one is alone."""
    starts = range(0, max(1, length - min_context), context - min_context)
    full = [start for start in starts if start + context <= length]
    for i in range(0, len(full), batch):
        yield full[i : i + batch]
    yield from ([start] for start in starts[len(full) :])


def _score(bits: NDArray[np.float64], count: int, context: int) -> Score:
    """The mean of `count` values from the bits of each block; the last block may be shorter."""
    mean = bits.sum() / count
    sizes = np.full(len(bits), context)
    sizes[-1] = count - context * (len(bits) - 1)
    blocks = len(bits)
    error = math.nan
    if blocks > 1:  # of a ratio of sums
        square = ((bits - mean * sizes) ** 2).sum() * blocks / (blocks - 1)
        error = math.sqrt(square) / count
    return Score(float(mean), error, count)
