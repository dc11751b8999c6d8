# SPDX-License-Identifier: Apache-2.0
"""Sparse attention of the Sparse Transformer (Child et al., 2019) for PyTorch.

>>> import torch, sparse_attn as sa
>>> q, k, v = torch.randn(3, 1, 8, 1000, 64).unbind()
>>> sa.attention(q, k, v, sa.Fixed(128, columns=32)).shape
torch.Size([1, 8, 1000, 64])
"""

from __future__ import annotations

from .decode import KVCache, decode
from .functional import attention, which_backend
from .merge import merge
from .model import SparseTransformer, SparseTransformerConfig, presets
from .nn import SelfAttention
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
    parse_pattern,
)

__version__ = "0.1.0"

__all__ = [
    "BlockSparse",
    "Chunk",
    "Dense",
    "Dilated",
    "Fixed",
    "KVCache",
    "Local",
    "Pattern",
    "PerHead",
    "SelfAttention",
    "SparseTransformer",
    "SparseTransformerConfig",
    "Strided",
    "Summary",
    "attention",
    "decode",
    "merge",
    "parse_pattern",
    "presets",
    "which_backend",
]
