# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import log_step, progress_bar, speed_and_memory
from .source import unit
from .trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console


def train(
    trainer: Trainer,
    console: Console,
    *,
    seconds: float | None = None,
    validate_every: int,
    validation_bytes: int,
    save_every: int | None = None,
    path: Path | None = None,
    board: Any = None,
) -> None:
    """Train until the configured steps are done, with a progress bar.

    Every `validate_every` steps and at the end the first `validation_bytes` bytes of the validation
    data are scored, and every `save_every` steps and at the end a checkpoint is written to `path`.
    With `seconds`, training ends after that time in steps, and the learning rate decays by steps or
    by time, whichever is further. `board` is a TensorBoard writer, see `report.open_board`.

    Raises ValueError for a number of steps that is not positive.
    """
    for name, every in (("validate_every", validate_every), ("save_every", save_every)):
        if every is not None and every < 1:
            raise ValueError(f"{name} is {every}, wanted 1 or more")
    steps = trainer.training.steps
    tokens_per_step = trainer.training.batch * trainer.model.config.context
    trained, latest = 0.0, deque[float](maxlen=50)  # seconds: of all steps, of each of the latest
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps, completed=trainer.step_number)
        last = trainer.step_number >= steps
        while not last:
            done = trainer.step_number / steps
            if seconds is not None:
                done = max(done, trained / seconds)
            begin = time.perf_counter()
            bits = trainer.step(done)
            latest.append(time.perf_counter() - begin)
            trained += latest[-1]
            rate = len(latest) * tokens_per_step / sum(latest)
            speed = speed_and_memory(rate, trainer.device)
            bar.update(
                task,
                completed=trainer.step_number,
                description=f"{bits:.3f} {unit(trainer.source)}, {speed}",
            )
            if board is not None:
                log_step(board, trainer, rate)
            last = trainer.step_number == steps
            if not last and seconds is not None and trained >= seconds:
                last = True
                console.print(
                    f"{seconds:g} seconds are over: training stops at step {trainer.step_number} "
                    f"of {steps}"
                )
            if last or trainer.step_number % validate_every == 0:
                bits = validate(trainer, validation_bytes, board)
                console.print(
                    f"step {trainer.step_number:>6,}  training {mean_of_last(trainer.losses):.3f}  "
                    f"validation {bits:.3f} {unit(trainer.source)}  {speed}",
                    soft_wrap=True,
                )
            if path and save_every and not last and trainer.step_number % save_every == 0:
                trainer.save(path)
    if path:
        trainer.save(path)


def validate(trainer: Trainer, limit: int, board: Any = None) -> float:
    """Bits per value of the first `limit` values of the validation data, kept in the history."""
    bits = trainer.validate(limit=limit).bits
    trainer.validations.append((trainer.step_number, bits))
    if board is not None:
        board.add_scalar("bits/validation", bits, trainer.step_number)
    return bits


def mean_of_last(values: list[float], count: int = 20) -> float:
    """Mean of the finite ones of the last `count` values; nan if there are none."""
    finite = [value for value in values[-count:] if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
