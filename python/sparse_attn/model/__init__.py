# SPDX-License-Identifier: Apache-2.0
"""The Sparse Transformer (Child et al., 2019): configuration, presets, model."""

from . import presets
from .config import SparseTransformerConfig
from .transformer import SparseTransformer

__all__ = ["SparseTransformer", "SparseTransformerConfig", "presets"]
