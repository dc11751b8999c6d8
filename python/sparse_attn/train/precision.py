# SPDX-License-Identifier: Apache-2.0
"""The device to run on and the precision to run in."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast of the named precision; nothing for "fp32"."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def pick_device() -> tuple[torch.device, str]:
    """A GPU with bf16 (fp16 on one without) if there is one, else the CPU with fp32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "fp32"
    device = torch.device("cuda", torch.cuda.current_device())
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, "bf16" if native else "fp16"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, else resident; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
