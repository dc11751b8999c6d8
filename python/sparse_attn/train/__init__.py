"""Training a Sparse Transformer on bytes: text, baselines, checkpoints, the loop, the demo."""

from .checkpoint import Checkpoint, CheckpointError
from .corpus import Corpus, load_corpus, standard_library
from .loop import Trainer, TrainingConfig, bits_per_byte

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Corpus",
    "Trainer",
    "TrainingConfig",
    "bits_per_byte",
    "load_corpus",
    "standard_library",
]
