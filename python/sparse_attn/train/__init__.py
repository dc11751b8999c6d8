# SPDX-License-Identifier: Apache-2.0
"""Training a Sparse Transformer on bytes: data, checkpoints, the trainer, its loop, evaluation."""

from .checkpoint import Checkpoint, CheckpointError
from .config import TrainingConfig
from .corpus import Corpus, load_corpus, standard_library
from .evaluation import Score, evaluate
from .presets import preset
from .source import Source, open_source
from .trainer import Trainer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Corpus",
    "Score",
    "Source",
    "Trainer",
    "TrainingConfig",
    "evaluate",
    "load_corpus",
    "open_source",
    "preset",
    "standard_library",
]
