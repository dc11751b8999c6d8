"""The training loop: steps, learning rate, validation, checkpoints, progress on the terminal."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import SparseTransformer, SparseTransformerConfig, presets
from .checkpoint import Checkpoint, check_same, load_weights, save
from .corpus import Corpus

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: Adam, linear warm-up, cosine decay to zero, gradients clipped by their norm.

    Weight decay is decoupled and applies to matrices only. Weights are fp32; `precision` is that of
    autocast, fp16 with dynamic loss scaling. Raises ValueError for a value out of range.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    logits_std: float = 0.0  # of the logits' first weights: the paper's 0 wants a long warm-up
    short_share: float = 0.0  # of the training, at first, on windows shorter than the context
    short_window: int = 256  # bytes of those windows; a step has as many more of them
    precision: str = "fp32"  # "fp32" | "fp16" | "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate", "clip", "short_window"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted more than 0")
        for name in ("warmup", "weight_decay", "logits_std", "short_share", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, wanted one of {[*PRECISIONS]}")

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The configuration that `to_dict` wrote."""
        return cls(**{**values, "betas": tuple(values["betas"])})

    def learning_rate_at(self, step: int, done: float) -> float:
        """Rate of step number `step` (from 0) once the share `done` of the training is over."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def preset(name: str) -> tuple[SparseTransformerConfig, TrainingConfig]:
    """The model and training of `sparse-attn train --preset`. Raises ValueError for other names."""
    if name == "demo":
        # Windows of 256 bytes first: many steps' worth of local statistics, for a fraction of the
        # time.
        return presets.demo(), TrainingConfig(
            steps=1000,
            batch=1,
            learning_rate=2e-3,
            warmup=20,
            logits_std=0.05,
            short_share=0.8,
        )
    if name == "enwik8":
        # 80 epochs of 90 MB as in the paper, which does not state batch and learning rate.
        return presets.enwik8(), TrainingConfig(
            steps=73_000, batch=8, learning_rate=3.5e-4, warmup=5000
        )
    raise ValueError(f"preset is {name!r}, wanted 'demo' or 'enwik8'")


class Trainer:
    """A model, its optimiser and its place in the training text.

    The batch of step s depends on the seed and s alone, so a run goes on from a checkpoint as if it
    had never stopped: on the CPU with the same losses, bit for bit.

    Raises ValueError if the training text is shorter than one context.
    """

    def __init__(
        self,
        model_config: SparseTransformerConfig,
        training: TrainingConfig,
        corpus: Corpus,
        device: torch.device | str = "cpu",
    ) -> None:
        if model_config.vocab < 256:
            raise ValueError(f"vocab is {model_config.vocab}, wanted 256 or more for bytes")
        check_length(corpus, model_config.context)
        self.training = training
        self.corpus = corpus
        self.device = torch.device(device)
        torch.manual_seed(training.seed)
        model = SparseTransformer(model_config)
        if training.logits_std:
            nn.init.normal_(model.logits.weight, std=training.logits_std)
        self.model = model.to(self.device)
        self.optimiser = _adam(self.model, training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.precision == "fp16")
        self.text = np.frombuffer(corpus.train, dtype=np.uint8)
        self.step_number = 0
        self.losses: list[float] = []  # bits per byte of every step's batch
        self.validations: list[tuple[int, float]] = []  # (steps taken, bits per byte)

    def batch(self, step: int, done: float) -> Tensor:
        """The windows of text that step number `step` trains on: (batch, context).

        (batch * context // short_window, short_window) at first, see `TrainingConfig`.
        """
        context = length = self.model.config.context
        if done < self.training.short_share:
            length = min(length, self.training.short_window)
        count = self.training.batch * context // length
        random = np.random.default_rng([self.training.seed, step])
        start = random.integers(0, len(self.text) - length + 1, count)
        windows = self.text[start[:, None] + np.arange(length)]
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def step(self, done: float | None = None) -> float:
        """One optimiser step; returns the loss in bits per byte.

        `done` is the share of the training that is over, by default the share of steps. Raises
        FloatingPointError if the loss is not finite.
        """
        if done is None:
            done = self.step_number / self.training.steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.learning_rate_at(self.step_number, done)
        self.model.train()
        tokens = self.batch(self.step_number, done)
        with autocast(self.device, self.training.precision):
            loss = losses(self.model, tokens).mean()
        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            raise FloatingPointError(
                f"the loss is {bits} at step {self.step_number}: try a smaller learning rate than "
                f"{self.training.learning_rate}"
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.scaler.step(self.optimiser)  # skipped if fp16 gradients overflowed
        self.scaler.update()
        self.step_number += 1
        self.losses.append(bits)
        return bits

    def validate(self, text: bytes, min_context: int = 0) -> float:
        """Bits per byte of `text`; see `bits_per_byte`."""
        with autocast(self.device, self.training.precision):
            return bits_per_byte(self.model, text, self.training.batch, min_context)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that `restore` needs, atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{key}.{name}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["history.losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["history.validations"] = torch.tensor(self.validations, dtype=torch.float64)
        progress = {
            "step": self.step_number,
            "training": self.training.to_dict(),
            "text": self.corpus.digest,
            "scaler": self.scaler.state_dict(),
        }
        save(path, Checkpoint(self.model.config.to_dict(), progress, tensors))

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of the same model, training configuration and text.

        Raises CheckpointError, naming what differs, for any other.
        """
        progress = saved.progress
        check_same(saved, "model", saved.config, self.model.config.to_dict())
        check_same(saved, "training run", progress["training"], self.training.to_dict())
        check_same(saved, "text", {"digest": progress["text"]}, {"digest": self.corpus.digest})
        load_weights(saved, self.model)
        parameters = dict(self.model.named_parameters())
        for key in ADAM_STATE:
            device = torch.device("cpu") if key == "step" else self.device
            for name, value in saved.group(f"optimiser.{key}").items():
                self.optimiser.state[parameters[name]][key] = value.to(device)
        torch.set_rng_state(saved.tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in saved.tensors:
            torch.cuda.set_rng_state(saved.tensors["random.cuda"], self.device)
        self.scaler.load_state_dict(progress["scaler"])
        self.losses = saved.tensors["history.losses"].tolist()
        self.validations = [
            (int(step), bits) for step, bits in saved.tensors["history.validations"].tolist()
        ]
        self.step_number = progress["step"]


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of every token in nats: (batch, seq) from int64 (batch, seq)."""
    logits = model(tokens).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@torch.no_grad()
def bits_per_byte(model: SparseTransformer, text: bytes, batch: int, min_context: int = 0) -> float:
    """Bits per byte of `text`, every byte scored once.

    Windows of one context each advance by `context - min_context` bytes. A window's first
    `min_context` bytes were scored by the one before it, so a byte is predicted from at least
    `min_context` bytes, or from all there are at the start of the text. Raises ValueError if `text`
    is empty or `min_context` is not less than the context.
    """
    context = model.config.context
    if not text:
        raise ValueError("the validation text is empty")
    if not 0 <= min_context < context:
        raise ValueError(f"min_context is {min_context}, wanted 0 to {context - 1}")
    device = next(model.parameters()).device
    values = np.frombuffer(text, dtype=np.uint8)
    starts = range(0, max(1, len(values) - min_context), context - min_context)
    full = [start for start in starts if start + context <= len(values)]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    groups += [[start] for start in starts if start + context > len(values)]
    was_training = model.training
    model.eval()
    nats, scored = 0.0, 0
    for group in groups:
        windows = np.stack([values[start : start + context] for start in group])
        loss = losses(model, torch.from_numpy(windows.astype(np.int64)).to(device)).double()
        for start, row in zip(group, loss, strict=True):
            new = row if start == 0 else row[min_context:]
            nats += new.sum().item()
            scored += len(new)
    model.train(was_training)
    assert scored == len(values)
    return nats / scored / math.log(2)


def check_length(corpus: Corpus, context: int) -> None:
    """Raise ValueError if `corpus` has less training text than one context."""
    if len(corpus.train) < context:
        raise ValueError(
            f"{corpus.name} has {len(corpus.train)} bytes to train on "
            f"({len(corpus.validation)} are for validation), one context is {context} bytes: "
            "give more text or a smaller context"
        )
    if not corpus.validation:
        raise ValueError(f"{corpus.name} leaves no bytes for validation: give more text")


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


def train(
    trainer: Trainer,
    console: Console,
    *,
    seconds: float | None = None,
    validate_every: int,
    validation_bytes: int,
    save_every: int | None = None,
    path: Path | None = None,
) -> None:
    """Train until the configured steps are done, with a progress bar.

    Every `validate_every` steps and at the end the first `validation_bytes` bytes of the validation
    text are scored, and every `save_every` steps and at the end a checkpoint is written to `path`.
    With `seconds`, training ends after that time and the learning rate decays by steps or by time,
    whichever is further.
    """
    steps = trainer.training.steps
    tokens_per_step = trainer.training.batch * trainer.model.config.context
    first_step, begin, paused = trainer.step_number, time.perf_counter(), 0.0

    def elapsed() -> float:
        return time.perf_counter() - begin - paused

    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps, completed=first_step)
        last = trainer.step_number >= steps
        while not last:
            done = trainer.step_number / steps
            if seconds is not None:
                done = max(done, elapsed() / seconds)
            loss = trainer.step(done)
            speed = (trainer.step_number - first_step) * tokens_per_step / elapsed()
            bar.update(
                task,
                completed=trainer.step_number,
                description=f"{loss:.3f} bits per byte, {speed:,.0f} tokens/s",
            )
            last = trainer.step_number == steps
            if not last and seconds is not None and elapsed() >= seconds:
                last = True
                console.print(
                    f"{seconds:g} seconds are over: training stops at step {trainer.step_number} "
                    f"of {steps}"
                )
            if last or trainer.step_number % validate_every == 0:
                pause = time.perf_counter()
                bits = trainer.validate(trainer.corpus.validation[:validation_bytes])
                trainer.validations.append((trainer.step_number, bits))
                console.print(
                    f"step {trainer.step_number:>6,}  training {mean_of_last(trainer.losses):.3f}  "
                    f"validation {bits:.3f} bits per byte  {speed:,.0f} tokens/s"
                )
                paused += time.perf_counter() - pause
            if path and save_every and not last and trainer.step_number % save_every == 0:
                trainer.save(path)
    if path:
        trainer.save(path)


def mean_of_last(values: list[float], count: int = 20) -> float:
    """Mean of the last `count` values."""
    return sum(values[-count:]) / len(values[-count:])


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


def _adam(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=training.betas,
    )
