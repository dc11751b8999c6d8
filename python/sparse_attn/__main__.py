# SPDX-License-Identifier: Apache-2.0
"""``python -m sparse_attn``: what is installed, what it can use here, and a self-test.

With arguments it is the `sparse-attn` command.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy
import torch

import sparse_attn as sa

from . import cli
from .backends import cuda, reference
from .dispatch import choose_backend


def describe() -> list[tuple[str, str]]:
    """(name, value) rows: location, versions, native build, GPU and driver."""
    rows = [
        ("sparse_attn", f"{sa.__version__} from {Path(sa.__file__).parent}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("numpy", numpy.__version__),
    ]
    try:
        build = cuda.native().build_info()
    except ImportError as error:
        return [*rows, ("native module", f"missing ({error})")]
    kernels = f"{build['architectures']}, nvcc {build['cuda_compiler']}"
    rows.append(("kernels", kernels if build["architectures"] else "none in this build"))
    if build["architectures"]:
        version = cuda.driver_version()
        driver = f"supports CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"
        rows.append(("driver", driver))
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        capability = f"compute capability {properties.major}.{properties.minor}"
        rows.append((f"cuda:{device}", f"{properties.name}, {capability}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch can use"))
    return rows


def self_test(device: str) -> tuple[str, bool]:
    """The backend that runs by default on a device, and whether it agrees with the reference."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    q, k, v = torch.randn(3, 1, 4, 300, 64, device=device, dtype=dtype).unbind()
    pattern = sa.PerHead([sa.Strided(32), sa.Fixed(32, 8), sa.Local(50), sa.Dilated(16)])
    backend, reason = choose_backend(q, k, v, pattern)
    out = sa.attention(q, k, v, pattern)
    expected, _ = reference.attention(q, k, v, pattern.mask(300).to(device), scale=64**-0.5)
    # Well above rounding (5e-4 in float16), well below any wrong key (weights are 1/300 or more).
    passed = bool((out - expected).abs().max() < 2e-3)
    return backend if reason is None else f"{backend} ({reason})", passed


def main() -> int:
    if sys.argv[1:]:
        return cli.main()
    for name, value in describe():
        print(f"{name:14} {value}")
    devices = ["cpu", *(f"cuda:{device}" for device in range(torch.cuda.device_count()))]
    all_passed = True
    for device in devices:
        backend, passed = self_test(device)
        all_passed &= passed
        print(f"{'self-test':14} {device}: backend {backend}: {'passed' if passed else 'FAILED'}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
