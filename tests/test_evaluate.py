# SPDX-License-Identifier: Apache-2.0
"""Evaluation: every value scored once with its context, and how sure the mean is."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparse_attn.model import SparseTransformer, SparseTransformerConfig
from sparse_attn.train.evaluation import Score, evaluate, losses

MODEL = SparseTransformerConfig(
    vocab=256,
    context=64,
    layers=2,
    heads=2,
    width=32,
    stride=16,
    columns=4,
    dropout=0.1,
    recompute=False,
)


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def model() -> SparseTransformer:
    """A model whose predictions depend on the context."""
    model = SparseTransformer(MODEL).eval()
    torch.nn.init.normal_(model.logits.weight, std=0.3)
    return model


def noise(random: np.random.Generator, length: int) -> NDArray[np.uint8]:
    return random.integers(0, 256, length, np.uint8)


def bits_of(model: SparseTransformer, window: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Bits of every value of one window, given those before it."""
    tokens = torch.from_numpy(window.astype(np.int64))[None]
    bits: NDArray[np.float64] = losses(model, tokens)[0].detach().double().numpy() / math.log(2)
    return bits


def as_score(bits: NDArray[np.float64]) -> Score:
    """The mean, and its standard error by the textbook when all blocks are whole."""
    blocks = [bits[i : i + MODEL.context].mean() for i in range(0, len(bits), MODEL.context)]
    error = np.std(blocks, ddof=1) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan
    return Score(float(bits.mean()), float(error), len(bits))


def assert_close(got: Score, wanted: Score) -> None:
    assert got.count == wanted.count
    assert got.bits == pytest.approx(wanted.bits, rel=1e-5)
    assert got.standard_error == pytest.approx(wanted.standard_error, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("min_context", [0, 20, 63])
@pytest.mark.parametrize("length", [1, 20, 63, 64, 65, 128, 200, 233])
def test_every_value_once_with_its_context(
    model: SparseTransformer, random: np.random.Generator, min_context: int, length: int
) -> None:
    values = noise(random, length)
    advance = MODEL.context - min_context
    windows = defaultdict(list)
    for i in range(length):
        start = max(0, -(-(i + 1 - MODEL.context) // advance) * advance)
        assert i - start >= min(i, min_context)
        windows[start].append(i)
    wanted = np.empty(length)
    for start, positions in windows.items():
        bits = bits_of(model, values[start : start + MODEL.context])
        wanted[positions] = bits[np.array(positions) - start]
    done: list[int] = []
    got = evaluate(model, values, 3, min_context, done.append)
    assert got.bits == pytest.approx(wanted.mean(), rel=1e-5)
    assert got.count == length == done[-1]
    assert done == sorted(done)
    if length % MODEL.context == 0:
        assert_close(got, as_score(wanted))


def test_examples_are_scored_whole_and_each_by_itself(
    model: SparseTransformer, random: np.random.Generator
) -> None:
    examples = noise(random, 7 * MODEL.context).reshape(7, MODEL.context)
    bits = np.concatenate([bits_of(model, example) for example in examples])
    assert_close(evaluate(model, examples.reshape(-1), 4), as_score(bits))


def test_standard_error_covers_the_mean(random: np.random.Generator) -> None:
    """Blocks that differ in kind: the error of 30 of them is that of means of 30 elsewhere."""
    model = SparseTransformer(replace(MODEL, layers=1, context=16)).eval()
    torch.nn.init.normal_(model.logits.weight, std=1.0)
    blocks = random.integers(0, 256, (900, 1)).astype(np.uint8).repeat(16, axis=1)
    scores = [evaluate(model, part.reshape(-1), 30) for part in blocks.reshape(30, 30, 16)]
    spread = np.std([score.bits for score in scores], ddof=1)
    assert np.mean([score.standard_error for score in scores]) == pytest.approx(spread, rel=0.5)


def test_a_short_last_block_weighs_less(
    model: SparseTransformer, random: np.random.Generator
) -> None:
    values = noise(random, 3 * MODEL.context + 1)
    whole, longer = evaluate(model, values[:-1], 2), evaluate(model, values, 2)
    assert longer.standard_error == pytest.approx(whole.standard_error, rel=0.1)


def test_mode_is_kept_and_dropout_is_off(
    model: SparseTransformer, random: np.random.Generator
) -> None:
    values = noise(random, 100)
    wanted = evaluate(model, values, 2)
    assert not model.training
    model.train()
    assert evaluate(model, values, 2) == wanted
    assert model.training


def test_refusals(model: SparseTransformer, random: np.random.Generator) -> None:
    values = noise(random, 10)
    with pytest.raises(ValueError, match="there are no values to score"):
        evaluate(model, values[:0], 1)
    for min_context in (-1, 64):
        with pytest.raises(ValueError, match=f"min_context is {min_context}, wanted 0 to 63"):
            evaluate(model, values, 1, min_context)
    with pytest.raises(ValueError, match="batch is 0, wanted 1 or more"):
        evaluate(model, values, 0)
