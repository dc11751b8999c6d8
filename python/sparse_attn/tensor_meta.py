# SPDX-License-Identifier: Apache-2.0
"""A tensor without its memory: what calls are prepared for, and remembered by."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TensorMeta(NamedTuple):
    """Shape, strides in elements, dtype and device of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: torch.Tensor) -> TensorMeta:
        return TensorMeta(x.shape, x.stride(), x.dtype, x.device)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def without_memory(self) -> torch.Tensor:
        """Such a tensor on the meta device."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def empty(self) -> torch.Tensor:
        """A new tensor of this kind, its memory not set."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


AnyTensor = torch.Tensor | TensorMeta
