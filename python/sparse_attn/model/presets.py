# SPDX-License-Identifier: Apache-2.0
"""Configurations with a name."""

import math

from .config import SparseTransformerConfig


def enwik8() -> SparseTransformerConfig:
    """The paper's Enwik8 model: 95M parameters, 12,288 bytes of context (section 7.2).

    The paper does not say how many distinct blocks of columns its heads used; this takes one.
    """
    return SparseTransformerConfig(
        vocab=256,
        context=12288,
        layers=30,
        heads=8,
        width=512,
        pattern="fixed",
        composition="merged",
        stride=128,
        columns=32,
        dropout=0.40,
    )


def cifar10() -> SparseTransformerConfig:
    """The paper's CIFAR-10 model: 59M parameters, 32 x 32 x 3 bytes of context (section 7.1).

    Open in the paper: the stride, one row of pixels as in the authors' code, and how the two
    members share the model, here layers in turn.
    """
    return SparseTransformerConfig(
        vocab=256,
        context=32 * 32 * 3,
        layers=128,
        heads=2,
        width=256,
        pattern="strided",
        composition="interleaved",
        stride=96,
        half_qk=True,
        half_feed_forward=True,
        dropout=0.25,
        positions="data",
        position_shape=(32, 32, 3),
    )


def imagenet64() -> SparseTransformerConfig:
    """The paper's ImageNet 64x64 model: 152M parameters, 12,288 bytes of context (section 7.3).

    Open in the paper: how the two members share the model, here layers in turn.
    """
    return SparseTransformerConfig(
        vocab=256,
        context=64 * 64 * 3,
        layers=48,
        heads=16,
        width=512,
        pattern="strided",
        composition="interleaved",
        stride=128,
        dropout=0.01,
        positions="data",
        position_shape=(64, 64, 3),
    )


# Context -> layers, heads, width. The paper states contexts and parameters alone.
_MUSIC = {65_536: (48, 16, 512), 262_144: (31, 4, 256), 1_048_576: (3, 4, 256)}


def music(context: int = 65_536) -> SparseTransformerConfig:
    """The paper's models of raw audio, 8-bit mu-law at 12 kHz (section 7.4).

    152M parameters at a context of 65,536, 25M at 262,144, 3M at 1,048,576; ValueError for others.
    The paper states no more: layers, heads and width are chosen for its counts, the stride is the
    square root of the context, the members take layers in turn, and there is no dropout.
    """
    if context not in _MUSIC:
        raise ValueError(f"context must be one of {(*_MUSIC,)}, got {context!r}")
    layers, heads, width = _MUSIC[context]
    return SparseTransformerConfig(
        vocab=256,
        context=context,
        layers=layers,
        heads=heads,
        width=width,
        pattern="strided",
        composition="interleaved",
        stride=math.isqrt(context),
    )


def demo() -> SparseTransformerConfig:
    """The model of ``sparse-attn demo``: minutes of training on two CPU cores."""
    return SparseTransformerConfig(
        vocab=256,
        context=2048,
        layers=2,
        heads=2,
        width=128,
        pattern="fixed",
        composition="merged",
        stride=64,
        columns=8,
        initialisation="paper",  # learns faster than "code" at this width
        recompute=False,  # small enough to store its activations
    )
