# SPDX-License-Identifier: Apache-2.0
"""Every model preset with its training: what `--preset` names.

Stated in the paper (section 7): epochs, 5000 steps of warm-up, clip 1.0, weight decay 0.01, cosine
decay, and CIFAR-10's rate of 0.00035. The rest is chosen here: betas and the decay of the averaged
weights as in the authors' code, and per preset what its comment says. `accumulation` makes a step
fit one GPU of 80 GB.
"""

from __future__ import annotations

from ..model import SparseTransformerConfig, presets
from .config import TrainingConfig

# Windows of 256 bytes first: many steps' worth of local statistics, for a fraction of the time.
# So short a run averages its weights over 20 steps.
DEMO = TrainingConfig(
    steps=1000,
    batch=1,
    learning_rate=2e-3,
    warmup=20,
    betas=(0.9, 0.99),
    ema=0.95,
    logits_std=0.05,
    short_share=0.8,
)
# 120 epochs of 48,000 images. Chosen: the batch, that of the authors' code on 8 GPUs.
CIFAR10 = TrainingConfig(steps=360_000, batch=16, learning_rate=3.5e-4, warmup=5000)
# 80 epochs of 90 MB. Chosen: batch and rate.
ENWIK8 = TrainingConfig(steps=73_000, batch=8, learning_rate=3.5e-4, warmup=5000)
# 70 epochs of 1,281,149 images. Chosen: the batch, one image for each of the paper's 64 GPUs, and
# the rate, which the authors' code has for a model of this size.
IMAGENET64 = TrainingConfig(
    steps=1_401_000, batch=64, learning_rate=1.5e-4, warmup=5000, accumulation=8
)
# Chosen: all of it. Every step reads 524,288 samples, or one context if that is longer.
MUSIC_65536 = TrainingConfig(
    steps=100_000, batch=8, learning_rate=1.5e-4, warmup=5000, accumulation=4
)
MUSIC_262144 = TrainingConfig(
    steps=100_000, batch=2, learning_rate=3.5e-4, warmup=5000, accumulation=2
)
MUSIC_1048576 = TrainingConfig(steps=100_000, batch=1, learning_rate=3.5e-4, warmup=5000)

PRESETS = {
    "demo": (presets.demo(), DEMO),
    "cifar10": (presets.cifar10(), CIFAR10),
    "enwik8": (presets.enwik8(), ENWIK8),
    "imagenet64": (presets.imagenet64(), IMAGENET64),
    "music-65536": (presets.music(65_536), MUSIC_65536),
    "music-262144": (presets.music(262_144), MUSIC_262144),
    "music-1048576": (presets.music(1_048_576), MUSIC_1048576),
}


def preset(name: str) -> tuple[SparseTransformerConfig, TrainingConfig]:
    """The model and training of `sparse-attn train --preset`. Raises ValueError for other names."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, wanted one of {', '.join(PRESETS)}")
    return PRESETS[name]
