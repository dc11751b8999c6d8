# SPDX-License-Identifier: Apache-2.0
"""Configurations with a name."""

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
