# SPDX-License-Identifier: Apache-2.0
"""Runs `sparse-attn train` again and again, each time killed by SIGKILL, until it is done.

test_kill.py runs this in a process of its own, `python kill.py SEED FOLDER ARGUMENT...`, which
imports once and forks for every run. Prints a JSON list with an entry for each run; then trains
once without being killed.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_attn.cli import main
from sparse_attn.train import Trainer, checkpoint

# What the command imports on its way: once here, not once in every run.
USED = ("rich.progress", "safetensors.torch", "sparse_attn.train.loop", "torch._dynamo")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(module: Any, name: str, count: int, after: bool = False) -> None:
    """Make call number `count` of a function the end of the process."""
    real, calls = getattr(module, name), 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            die()
        result = real(*arguments, **options)
        if calls == count:
            die()
        return result

    setattr(module, name, dying)


class HalfWritten:
    """A file whose first write stops somewhere in the middle."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.mode = path, mode

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *error: object) -> None: ...

    def write(self, content: bytes) -> None:
        with open(self.path, self.mode) as file:
            file.write(content[: random.randrange(len(content))])
            file.flush()
            die()


FAULTS: dict[str, Callable[[], None]] = {
    "in a write": lambda: setattr(checkpoint, "open", HalfWritten),
    "before the file is synced": lambda: die_at_call(os, "fsync", 1),
    "before it is renamed": lambda: die_at_call(os, "replace", 2),
    "after it is renamed": lambda: die_at_call(os, "replace", 2, after=True),
    "before the folder is synced": lambda: die_at_call(os, "fsync", 4),
    "in a validation": lambda: die_at_call(Trainer, "validate", 2),
    "in a backward": lambda: die_at_call(torch.Tensor, "backward", 3),
}


def log_steps(path: Path) -> None:
    """Append the number of every step that is done."""
    real = Trainer.step

    def step(trainer: Trainer, done: float | None = None) -> float:
        bits = real(trainer, done)
        with open(path, "a") as file:
            file.write(f"{trainer.step_number}\n")
        return bits

    Trainer.step = step  # type: ignore[assignment, method-assign]


def run(arguments: list[str], log: Path, fault: str | float | None = None) -> int:
    """One run in a process of its own; what `os.waitpid` says of it.

    `fault` is a name in FAULTS, or how many seconds after its first step it is killed.
    """
    before = size(log)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log_steps(log)
        if isinstance(fault, str):
            FAULTS[fault]()
        os._exit(main(arguments))
    if isinstance(fault, float):
        while size(log) == before:
            time.sleep(0.01)
        time.sleep(fault)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def run_until_done(seed: int, folder: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """Runs into `folder`/killed, one for every fault, some killed at any moment, one left alone."""
    random.seed(seed)
    faults: list[str | float | None] = [*FAULTS, *(random.uniform(0, 0.2) for _ in range(3))]
    random.shuffle(faults)
    log, path = folder / "steps", folder / "killed" / "checkpoint.safetensors"
    runs = []
    for fault in [*faults, None]:
        resume = ["--resume"] if path.exists() else []
        status = run([*arguments, "--out", str(path.parent), *resume], log, fault)
        runs.append(
            {
                "fault": fault,
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "trained": int(log.read_text().split()[-1]),
                "saved": checkpoint.load(path).progress["step"] if path.exists() else 0,
            }
        )
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    for module in USED:
        importlib.import_module(module)
    seed, folder, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    print(json.dumps(run_until_done(seed, folder, arguments)))
    sys.exit(run([*arguments, "--out", str(folder / "whole")], folder / "steps"))
