# SPDX-License-Identifier: Apache-2.0
"""What a long sequence costs on the torch backend: memory and time of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys, time
import torch
import sparse_attn as sa

torch.set_num_threads(1)  # the time of one core does not depend on the neighbours
pattern, n, heads, head_dim = sa.parse_pattern(sys.argv[1]), *map(int, sys.argv[2:])
q, k, v = (torch.randn(1, heads, n, head_dim, requires_grad=True) for _ in range(3))
start = time.monotonic()
out = sa.attention(q, k, v, pattern, backend="torch")
forward = time.monotonic() - start
out.sum().backward()
seconds = time.monotonic() - start
gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
finite = all(bool(x.grad.isfinite().all()) for x in (q, k, v))
print(json.dumps(dict(forward=forward, seconds=seconds, gibibytes=gibibytes, finite=finite)))
"""


def measure(pattern: str, n: int, heads: int, head_dim: int) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, pattern, str(n), str(heads), str(head_dim)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    measured: dict[str, float] = json.loads(result.stdout)
    print(pattern, n, measured)
    return measured


def test_strided_at_65536_tokens() -> None:
    """At most 8 GiB resident and 120 s, forward and backward."""
    measured = measure("strided:256", 65_536, heads=8, head_dim=64)
    assert measured["finite"]
    assert measured["gibibytes"] <= 8
    assert measured["seconds"] <= 120


@pytest.mark.parametrize("pattern", ["strided:64", "fixed:64,4", "Local(64)", "Dilated(64)"])
def test_memory_grows_with_n_and_not_with_its_square(pattern: str) -> None:
    short = measure(pattern, 4096, heads=1, head_dim=16)
    long = measure(pattern, 16_384, heads=1, head_dim=16)
    # The scores alone of 16,384 tokens are 1 GiB.
    assert long["gibibytes"] - short["gibibytes"] <= 0.25
