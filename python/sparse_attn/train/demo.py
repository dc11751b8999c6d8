# SPDX-License-Identifier: Apache-2.0
"""`sparse-attn demo`: train a small Sparse Transformer on real text and compare it honestly."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import plot
from .baselines import count_model_bits, xz_bits
from .checkpoint import import_safetensors
from .corpus import Corpus, load_corpus, standard_library
from .loop import train
from .precision import autocast, pick_device
from .presets import preset
from .report import describe, make_console
from .trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

MODEL = "Sparse Transformer"
MUST_BEAT = "order 1"
PROMPT = b"def "
SAMPLE_LENGTH = 400
GPU_STEPS, GPU_BATCH = 2000, 16


def demo(
    out: Path,
    data: Path | None = None,
    steps: int | None = None,
    seconds: float = 180.0,
    seed: int = 0,
) -> int:
    """Train, compare, sample, draw; the exit code: 0 if the model beats the order-1 counts, else 1.

    `data` is a file or folder of text, by default the standard library's sources. Training ends
    after `steps` steps or after `seconds`, whichever is first. Writes checkpoint.safetensors,
    loss.png, connectivity.png and attention.png to `out`.
    """
    begin = time.perf_counter()
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, wanted more than 0")
    console = make_console()
    import_safetensors()
    plot.import_figure()

    corpus = load_corpus(data) if data else standard_library()
    device, precision = pick_device()
    config, training = preset("demo")
    if device.type == "cuda":
        training = replace(training, steps=GPU_STEPS, batch=GPU_BATCH)
    training = replace(training, precision=precision, seed=seed)
    if steps is not None:
        training = replace(training, steps=steps)
    trainer = Trainer(config, training, corpus, device)
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"text    {corpus.name}: {len(corpus.train):,} bytes ({corpus.train_files} files) to train "
        f"on, {len(corpus.validation):,} bytes ({corpus.validation_files} files) to validate on",
        soft_wrap=True,
    )
    describe(trainer, console)

    with console.status("counting bytes and running xz"):
        baselines = score_baselines(corpus)
    train(
        trainer,
        console,
        seconds=seconds,
        validate_every=max(1, training.steps // 5),
        validation_bytes=64 * trainer.model.config.context // 2,
        path=out / "checkpoint.safetensors",
    )
    min_context = trainer.model.config.context // 4
    with console.status("scoring the validation text"):
        bits = trainer.validate(min_context=min_context).bits
    report(bits, baselines, len(corpus.validation), min_context, console)
    print_sample(trainer, console)
    for name, figure in pictures(trainer, corpus, baselines).items():
        figure.savefig(out / name)
        console.print(f"wrote {out / name}", soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} seconds in all")
    if bits >= baselines[MUST_BEAT]:
        console.print(
            f"FAILED: {bits:.3f} bits per byte do not beat {MUST_BEAT} "
            f"({baselines[MUST_BEAT]:.3f}): {trainer.step_number} steps were too few"
        )
        return 1
    return 0


def score_baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of the validation text by name: order 0 to order 3, and xz."""
    counts = count_model_bits(corpus.train, corpus.validation)
    scores = {f"order {order}": bits for order, bits in enumerate(counts)}
    return {**scores, "xz": xz_bits(corpus.train, corpus.validation)}


def report(
    bits: float, baselines: Mapping[str, float], count: int, min_context: int, console: Console
) -> None:
    """Print the table and say in words who wins."""
    from rich.table import Table

    table = Table(title=f"bits per byte of the {count:,} bytes of validation text")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_column("how")
    how = {f"order {k}": f"counts of bytes after each {k}, with backoff" for k in range(1, 4)}
    how["order 0"] = "counts of bytes"
    how["xz"] = "what xz adds for this text after the training text"
    how[MODEL] = f"every byte once, given {min_context} or more before it"
    for name, value in {**baselines, MODEL: bits}.items():
        table.add_row(name, f"{value:.3f}", how[name])
    console.print(table)
    console.print(verdict(bits, baselines))


def verdict(bits: float, baselines: Mapping[str, float]) -> str:
    """Who wins, in words."""
    beaten = [name for name, value in baselines.items() if bits < value]
    ahead = [name for name, value in baselines.items() if bits >= value]
    wins = "wins" if len(ahead) == 1 else "win"
    return (
        f"The {MODEL} beats {_listed(beaten) or 'none of them'}; "
        f"{_listed(ahead) or 'none of them'} still {wins}."
    )


def print_sample(trainer: Trainer, console: Console) -> None:
    """Print text that the model writes after a short prompt."""
    prompt = torch.tensor([list(PROMPT)], device=trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(trainer.training.seed)
    length = min(SAMPLE_LENGTH, trainer.model.config.context - len(PROMPT))
    with console.status("sampling"), autocast(trainer.device, trainer.training.precision):
        tokens = trainer.averaged.generate(prompt, length, temperature=0.8, generator=generator)
    text = bytes(tokens[0].tolist()).decode("utf-8", "replace")
    console.rule(f"a sample, after {PROMPT.decode()!r}")
    console.out(text, highlight=False)
    console.rule()


def pictures(trainer: Trainer, corpus: Corpus, baselines: Mapping[str, float]) -> dict[str, Figure]:
    """The demo's figures by file name."""
    config = trainer.model.config
    text = corpus.validation[: config.context]
    layer = config.layers - 1
    position = len(text) * 7 // 8
    with autocast(trainer.device, trainer.training.precision):
        attention = plot.plot_learned_attention(trainer.averaged, text, position, layer)
    return {
        "loss.png": plot.plot_loss(trainer.losses, trainer.validations, baselines),
        "connectivity.png": plot.plot_connectivity(),
        "attention.png": attention,
    }


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
