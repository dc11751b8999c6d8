# SPDX-License-Identifier: Apache-2.0
"""What a run shows: its description, progress, scores, and TensorBoard's scalars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..functional import which_backend
from ..model import SparseTransformer
from ..model.composition import layer_pattern
from .evaluation import Score, evaluate
from .precision import PRECISIONS, peak_memory
from .source import Source, first_values, unit
from .trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def describe(trainer: Trainer, console: Console) -> None:
    """Print the model, the training and what it runs on."""
    config, training = trainer.model.config, trainer.training
    parameters = sum(p.numel() for p in trainer.model.parameters())
    patterns = dict.fromkeys(layer_pattern(config, i).spec for i in range(config.layers))
    parts = f" in {training.accumulation} parts" if training.accumulation > 1 else ""
    console.print(
        f"model   {config.layers} layers, {config.heads} heads, width {config.width}, context "
        f"{config.context:,} bytes, {parameters / 1e6:.2f}M parameters\n"
        f"pattern {', '.join(patterns)}\n"
        f"steps   {training.steps:,} of {training.batch} contexts{parts}, learning rate "
        f"{training.learning_rate:g} after {training.warmup:,} steps of warm-up\n"
        f"device  {device_name(trainer.device)}, {training.precision}, attention backend "
        f"{backend_name(trainer)}",
        soft_wrap=True,
    )


def backend_name(trainer: Trainer) -> str:
    """The backend that the model's attention runs on."""
    config = trainer.model.config
    shape = (1, config.heads, config.context, config.qk_width // config.heads)
    dtype = PRECISIONS[trainer.training.precision] or torch.float32
    number = torch.empty((), dtype=dtype, device=trainer.device)
    q, v = number.expand(shape), number.expand(*shape[:3], config.width // config.heads)
    return which_backend(q, q, v, layer_pattern(config, 0))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def print_scores(
    model: SparseTransformer,
    source: Source,
    batch: int,
    console: Console,
    split: str = "validation",
    min_contexts: Sequence[int] | None = None,
    limit: int | None = None,
) -> None:
    """Score the first `limit` bytes of a split, with a line for each of `min_contexts`.

    They are half the context by default. Raises ValueError if one is given for independent
    examples, which are scored whole.
    """
    values = first_values(source, split, limit)
    if source.example is not None and any(min_contexts or ()):
        raise ValueError(
            f"min_context is {min_contexts}, wanted none: the examples of {source.name} are scored "
            "whole, each by itself"
        )
    if min_contexts is None:
        min_contexts = [model.config.context // 2 if source.example is None else 0]
    console.print(f"{source.name}, {split}: {len(values):,} bytes, each once", soft_wrap=True)
    for least in min_contexts:
        score = _score(model, values, batch, least, console)
        given = f"given the {least:,} or more before it: " if source.example is None else ""
        known = not math.isnan(score.standard_error)
        error = f", standard error {score.standard_error:.4f}" if known else ""
        console.print(f"{given}{score.bits:.4f} {unit(source)}{error}", soft_wrap=True)


def _score(
    model: SparseTransformer,
    values: NDArray[np.uint8],
    batch: int,
    min_context: int,
    console: Console,
) -> Score:
    """`evaluate` with a progress bar."""
    with progress_bar(console) as bar:
        task = bar.add_task("scoring", total=len(values))
        return evaluate(
            model, values, batch, min_context, lambda done: bar.update(task, completed=done)
        )


def speed_and_memory(tokens_per_second: float, device: torch.device) -> str:
    """Tokens per second, and the memory at its peak where that is known."""
    memory = peak_memory(device)
    known = f", {memory / 2**30:.1f} GiB" if memory else ""
    return f"{tokens_per_second:,.0f} tokens/s{known}"


def progress_bar(console: Console) -> Progress:
    """A rich progress bar with the time left, on a terminal only."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def make_console(stderr: bool = False) -> Console:
    """A rich console on stdout or stderr; ImportError names the extra."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('training needs rich: pip install "sparse-attn[train]"') from error
    return Console(highlight=False, stderr=stderr)


def open_board(folder: str | os.PathLike[str], first_step: int) -> Any:
    """A TensorBoard writer into `folder` that goes on at `first_step`; ImportError names it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def log_step(board: Any, trainer: Trainer, tokens_per_second: float) -> None:
    """Write what there is to know of the last step."""
    scalars = {
        "bits/training": trainer.losses[-1],
        "optimiser/learning rate": trainer.learning_rate,
        "optimiser/gradient norm": trainer.gradient_norm,
        "speed/tokens per second": tokens_per_second,
        "speed/peak memory in bytes": peak_memory(trainer.device),
    }
    if trainer.training.precision == "fp16":
        scalars["optimiser/loss scale"] = trainer.scaler.get_scale()
    for name, value in scalars.items():
        board.add_scalar(name, value, trainer.step_number)
