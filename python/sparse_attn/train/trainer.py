# SPDX-License-Identifier: Apache-2.0
"""One training run: model, averaged weights, optimiser, place in the data; steps, save, restore."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model import SparseTransformer, SparseTransformerConfig
from .checkpoint import Checkpoint, check_same, load_weights, save
from .config import TrainingConfig
from .evaluation import Score, evaluate, losses
from .precision import autocast
from .source import Source, check_trains, first_values

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
# Of the loss under fp16. Gradients that overflow without a scale do not recover.
FIRST_SCALE, SMALLEST_SCALE = 2.0**16, 1.0


class Trainer:
    """A model, its optimiser and its place in the training data.

    The batch of step s depends on the seed and s alone, so a run goes on from a checkpoint as if it
    had never stopped: on the CPU with the same losses, bit for bit.

    `averaged` is the model with exponentially averaged weights, the one to evaluate and to sample
    from; `model` itself if the configuration asks for no average.

    Raises ValueError if the data does not fit the model or is shorter than one context.
    """

    def __init__(
        self,
        model_config: SparseTransformerConfig,
        training: TrainingConfig,
        source: Source,
        device: torch.device | str = "cpu",
    ) -> None:
        check_trains(source, model_config)
        self.training = training
        self.source = source
        self.device = torch.device(device)
        torch.manual_seed(training.seed)
        model = SparseTransformer(model_config)
        if training.logits_std:
            nn.init.normal_(model.logits.weight, std=training.logits_std)
        self.model = model.to(self.device)
        self.averaged = copy.deepcopy(model).requires_grad_(False) if training.ema else self.model
        if training.compile:
            # Block by block: blocks of one pattern share their code, at any depth.
            for block in self.model.blocks:
                block.compile()
        self.optimiser = _adam(self.model, training)
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=FIRST_SCALE if training.precision == "fp16" else 1.0
        )
        self.step_number = 0
        self.losses: list[float] = []  # bits per value of every step's batch
        self.validations: list[tuple[int, float]] = []  # (steps taken, bits per value)
        self.gradient_norm = math.nan  # of the last step, before clipping
        self.learning_rate = 0.0  # of the last step

    def batch(self, step: int, done: float) -> Tensor:
        """What step number `step` trains on: (batch, context).

        (batch * context // short_window, short_window) at first, see `TrainingConfig`; independent
        examples are never cut.
        """
        context = length = self.model.config.context
        if done < self.training.short_share and self.source.example is None:
            length = min(length, self.training.short_window)
        count = self.training.batch * context // length
        values = self.source.batch(self.training.seed, step, count, length)
        return torch.from_numpy(values).to(self.device).long()

    def step(self, done: float | None = None) -> float:
        """One optimiser step; returns the loss in bits per value.

        `done` is the share of the training that is over, by default the share of steps. A
        gradient that is not finite leaves the weights as they are: under fp16 the step is skipped
        and the loss scale halved.

        Raises FloatingPointError if a loss or gradient is not finite in fp32 or bf16, or in fp16
        with no loss scale left to halve.
        """
        if done is None:
            done = self.step_number / self.training.steps
        self.learning_rate = self.training.learning_rate_at(self.step_number, done)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._backward(self.batch(self.step_number, done))
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.scaler.step(self.optimiser)  # on the device, skipped if a gradient is not finite
        self.scaler.update(None if self.training.precision == "fp16" else 1.0)
        # The first look at what the device computes: until here it never waits for the host.
        bits, self.gradient_norm = loss.item() / math.log(2), norm.item()
        self._check_finite(bits)
        self._check_scale()
        self.step_number += 1
        self._update_average()
        self.losses.append(bits)
        return bits

    def _backward(self, tokens: Tensor) -> Tensor:
        """Add the gradients of the mean loss of `tokens`, part by part; the loss in nats."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for part in tokens.tensor_split(self.training.accumulation):
            with autocast(self.device, self.training.precision):
                loss = losses(self.model, part).sum() / tokens.numel()
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _check_finite(self, bits: float) -> None:
        """Where no other loss scale will help: stop."""
        training = self.training
        if training.precision == "fp16":
            return
        for what, value in (("loss", bits), ("gradient norm", self.gradient_norm)):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {what} is {value} at step {self.step_number}: try a smaller learning "
                    f"rate than {training.learning_rate} or more steps of warm-up than "
                    f"{training.warmup}"
                )

    def _check_scale(self) -> None:
        if self.scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"the loss or gradients overflow fp16 at step {self.step_number} however small the "
                "loss scale: try bf16 or fp32, or a smaller learning rate than "
                f"{self.training.learning_rate}"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.averaged is not self.model:
            share = 1 - self.training.ema_decay_at(self.step_number)
            averages: list[Tensor] = [*self.averaged.parameters()]
            weights: list[Tensor] = [*self.model.parameters()]
            torch._foreach_lerp_(averages, weights, share)

    def validate(
        self,
        split: str = "validation",
        min_context: int = 0,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Score:
        """Score the averaged weights on the first `limit` values of a split; see `evaluate`."""
        values = first_values(self.source, split, limit)
        with autocast(self.device, self.training.precision):
            return evaluate(self.averaged, values, self.training.part, min_context, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that `restore` needs, atomically.

        Raises FloatingPointError, and leaves what was at `path`, if the weights are not finite.
        """
        norm = nn.utils.get_total_norm([*self.model.parameters(), *self.averaged.parameters()])
        if not norm.isfinite():
            raise FloatingPointError(
                f"the weights are not finite after {self.step_number} steps: not written to {path}"
            )
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.averaged is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.averaged.state_dict().items()}
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
            "data": self.source.digest,
            "scaler": self.scaler.state_dict(),
        }
        save(path, Checkpoint(self.model.config.to_dict(), progress, tensors))

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of the same model, training configuration and data.

        Raises CheckpointError, naming what differs, for any other.
        """
        progress = saved.progress
        check_same(saved, "model", saved.config, self.model.config.to_dict())
        check_same(saved, "training run", progress["training"], self.training.to_dict())
        check_same(saved, "data set", {"digest": progress["data"]}, {"digest": self.source.digest})
        load_weights(saved, self.model, "model")
        load_weights(saved, self.averaged)
        parameters = dict(self.model.named_parameters())
        for key in ADAM_STATE:
            for name, value in saved.group(f"optimiser.{key}").items():
                self.optimiser.state[parameters[name]][key] = value.to(self.device)
        torch.set_rng_state(saved.tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in saved.tensors:
            torch.cuda.set_rng_state(saved.tensors["random.cuda"], self.device)
        self.scaler.load_state_dict(progress["scaler"])
        self.losses = saved.tensors["history.losses"].tolist()
        self.validations = [
            (int(step), bits) for step, bits in saved.tensors["history.validations"].tolist()
        ]
        self.step_number = progress["step"]


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
        fused=True,  # one kernel, which skips a step without asking the host
    )
