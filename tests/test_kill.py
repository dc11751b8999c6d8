# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of `sparse-attn train` at any moment, also in the middle of a write, then --resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attn.train import checkpoint

STEPS, EVERY = 30, 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_and_resumed(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = tmp_path / "words"
    data.write_bytes(b" ".join(random.choice([b"sparse", b"dense", b"local"], 700)))
    train = ["train", str(data), "--steps", str(STEPS), "--every", str(EVERY)]
    train += ["--context", "96", "--batch", "2", "--accumulation", "2"]

    command = [sys.executable, str(Path(__file__).with_name("kill.py")), str(seed), str(tmp_path)]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    driven = subprocess.run([*command, *train], env=on_the_cpu, capture_output=True, text=True)
    assert driven.returncode == 0, driven.stderr

    before = 0
    for run in json.loads(driven.stdout):
        assert run["killed"] == (run["fault"] is not None), run
        assert run["saved"] % EVERY == 0, run
        assert run["saved"] >= before, run
        assert 0 <= run["trained"] - run["saved"] <= EVERY, run
        before = run["saved"]
    assert before == STEPS
    assert os.listdir(tmp_path / "killed") == ["checkpoint.safetensors"]

    killed, whole = (
        checkpoint.load(tmp_path / name / "checkpoint.safetensors") for name in ("killed", "whole")
    )
    assert killed.progress == whole.progress
    assert killed.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():  # weights, average, optimiser, losses
        assert torch.equal(killed.tensors[name], tensor), name
