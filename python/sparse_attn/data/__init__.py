# SPDX-License-Identifier: Apache-2.0
"""Data sets as memory-mapped bytes: prepared once, read by training at any step."""

from .audio import SAMPLE_RATE, mu_law_decode, mu_law_encode
from .dataset import DataError, Dataset, Split, StepBatches, load
from .prepare import KINDS, prepare

__all__ = [
    "KINDS",
    "SAMPLE_RATE",
    "DataError",
    "Dataset",
    "Split",
    "StepBatches",
    "load",
    "mu_law_decode",
    "mu_law_encode",
    "prepare",
]
