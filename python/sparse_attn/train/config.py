# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: the numbers, checked on construction."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .precision import PRECISIONS


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: Adam, linear warm-up, cosine decay to zero, gradients clipped by their norm.

    Weight decay is decoupled and applies to matrices only. Weights are fp32; `precision` is that of
    autocast, fp16 with dynamic loss scaling. Raises ValueError for a value out of range.
    """

    steps: int
    batch: int  # contexts per step
    learning_rate: float
    accumulation: int = 1  # parts that a batch is computed in, one after the other
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.999  # decay of the averaged weights, which are evaluated; 0: no average
    logits_std: float = 0.0  # of the logits' first weights: the paper's 0 wants a long warm-up
    short_share: float = 0.0  # of the training, at first, on windows shorter than the context
    short_window: int = 256  # bytes of those windows; a step has as many more of them
    precision: str = "fp32"  # "fp32" | "fp16" | "bf16"
    compile: bool = False  # torch.compile of every block
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "accumulation", "clip", "short_window"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted more than 0")
        for name in ("warmup", "weight_decay", "logits_std", "short_share", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")
        if self.accumulation > self.batch:
            raise ValueError(
                f"accumulation is {self.accumulation}, wanted at most the batch of {self.batch}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, wanted 0 or more and less than 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, wanted one of {[*PRECISIONS]}")

    @property
    def part(self) -> int:
        """Contexts computed at once."""
        return -(-self.batch // self.accumulation)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The configuration that `to_dict` wrote."""
        return cls(**{**values, "betas": tuple(values["betas"])})

    def learning_rate_at(self, step: int, done: float) -> float:
        """Rate of step number `step` (from 0) once the share `done` of the training is over."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def ema_decay_at(self, step: int) -> float:
        """Decay of the average after `step` steps: less at first, to forget the first weights."""
        return min(self.ema, (1 + step) / (10 + step))
