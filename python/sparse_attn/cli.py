# SPDX-License-Identifier: Apache-2.0
"""The `sparse-attn` command: demo, train, evaluate, sample, prepare, plot, plan."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .data import KINDS
from .model import SparseTransformer, SparseTransformerConfig
from .patterns import parse_pattern
from .train.precision import PRECISIONS
from .train.presets import PRESETS

if TYPE_CHECKING:
    from .train import Checkpoint

CHECKPOINT = "checkpoint.safetensors"
DATA = "a prepared folder, a file (its last 5 %% validates) or a folder of text"
EXPECTED = (
    OSError,
    ValueError,
    TypeError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    torch.OutOfMemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 if the demo fails, 2 on an error, 130 on Ctrl-C."""
    arguments = vars(_parser().parse_args(argv))
    run = arguments.pop("run")
    try:
        return int(run(**arguments) or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("sparse-attn: interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"sparse-attn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_demo(**options: Any) -> int:
    from .train.demo import demo

    return demo(**options)


def run_train(
    data: Path,
    out: Path,
    preset: str | None,
    resume: bool,
    context: int | None,
    every: int | None,
    tensorboard: bool,
    **overrides: Any,
) -> None:
    from .train import Trainer, TrainingConfig, checkpoint, loop, open_source, report
    from .train.precision import autocast, pick_device

    console = report.make_console()
    checkpoint.import_safetensors()
    path = out / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: go on with --resume or choose another --out")
    saved = checkpoint.load(path) if resume else None
    device, precision = pick_device()
    if saved and preset is None:
        config = SparseTransformerConfig.from_dict(saved.config)
        training = TrainingConfig.from_dict(saved.progress["training"])
    else:
        config, training = PRESETS[preset or "demo"]
        training = replace(training, precision=precision)
    if context is not None:
        config = replace(config, context=context)
    training = replace(training, **{k: v for k, v in overrides.items() if v is not None})

    trainer = Trainer(config, training, open_source(data), device)
    if saved:
        trainer.restore(saved)
        console.print(f"going on from step {trainer.step_number} of {path}", soft_wrap=True)
    report.describe(trainer, console)
    board = report.open_board(out / "tensorboard", trainer.step_number) if tensorboard else None
    out.mkdir(parents=True, exist_ok=True)
    every = max(1, min(1000, training.steps // 10)) if every is None else every
    try:
        loop.train(
            trainer,
            console,
            validate_every=every,
            validation_bytes=16 * training.batch * config.context,
            save_every=every,
            path=path,
            board=board,
        )
    except KeyboardInterrupt:
        if path.exists():
            console.print(f"stopped: --resume goes on from {path}", soft_wrap=True)
        raise
    finally:
        if board is not None:
            board.close()
    console.print(f"wrote {path}", soft_wrap=True)
    with autocast(device, training.precision):
        report.print_scores(trainer.averaged, trainer.source, training.part, console)


def run_evaluate(
    path: Path,
    data: Path,
    split: str,
    min_contexts: list[int] | None,
    limit: int | None,
    batch: int | None,
    precision: str | None,
) -> None:
    from .train import TrainingConfig, checkpoint, open_source, report
    from .train.precision import autocast, pick_device
    from .train.source import check_model

    console = report.make_console()
    saved = checkpoint.load(path)
    source = open_source(data)
    check_model(source, SparseTransformerConfig.from_dict(saved.config))
    device, usual = pick_device()
    model = _build_model(saved, device)
    if batch is None:
        batch = TrainingConfig.from_dict(saved.progress["training"]).part
    console.print(f"{path}, step {saved.progress['step']:,}", soft_wrap=True)
    with autocast(device, precision or usual):
        report.print_scores(model, source, batch, console, split, min_contexts, limit)


def run_sample(
    path: Path,
    out: Path | None,
    prompt: str,
    length: int | None,
    batch: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    from . import samples
    from .train import report
    from .train.precision import autocast

    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    model, device, precision = _load_model(path)
    samples.check_kind(model.config, out, prompt)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    start = list(prompt.encode("utf-8", "surrogateescape"))
    tokens = torch.tensor([start] * batch, dtype=torch.int64, device=device)
    if length is None:
        length = samples.default_length(model.config, out, len(start))
    console = report.make_console(stderr=True)
    with report.progress_bar(console) as bar, autocast(device, precision):
        task = bar.add_task("sampling", total=length)
        tokens = model.generate(
            tokens,
            length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            progress=lambda made: bar.update(task, completed=made),
        )
    for written in samples.write(model.config, tokens, out):
        print(f"wrote {written}")


def run_prepare(kind: str, source: Path, out: Path, size: int | None) -> None:
    from .data import prepare
    from .train import report

    with report.progress_bar(report.make_console(stderr=True)) as bar:
        task = bar.add_task("preparing", total=100)
        dataset = prepare(
            kind,
            source,
            out,
            size,
            progress=lambda done, total: bar.update(task, completed=100 * done // total),
        )
    splits = ("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test)
    for name, split in splits:
        count = f"{len(split):,} bytes"
        if dataset.example:
            count = f"{split.examples:,} images of {dataset.example[0]}x{dataset.example[1]}"
        if dataset.sample_rate:
            count += f", {len(split) / dataset.sample_rate / 60:,.1f} minutes"
        print(f"{name:<10}  {count}")
    print(f"wrote {out}")


def run_plot(
    what: str | None,
    out: Path,
    n: int,
    data: Path | None,
    example: int,
    layer: int | None,
    head: int | None,
    position: int | None,
) -> None:
    from . import plot, samples

    plot.import_figure()
    if what is None:
        figure = plot.plot_connectivity()
    elif Path(what).is_file() or what.endswith(".safetensors"):
        model, _, _ = _load_model(Path(what))
        if data is None and model.config.position_shape is not None:
            raise ValueError("an image model needs --data, a picture or a prepared data set")
        source = Path(argparse.__file__) if data is None else data
        content, sound = samples.read(model.config, source, example)
        figure = plot.plot_learned_attention(
            model,
            content,
            len(content) * 7 // 8 if position is None else position,
            model.config.layers - 1 if layer is None else layer,
            head,
            sound,
        )
    else:
        figure = plot.plot_pattern(parse_pattern(what), n)
    figure.savefig(out)
    print(f"wrote {out}")


def run_plan(pattern: str, n: int) -> None:
    from .plan_file import plan_text

    print(plan_text(parse_pattern(pattern), n), end="")


def _load_model(path: Path) -> tuple[SparseTransformer, torch.device, str]:
    """The model of a checkpoint, with the device and precision to run it in."""
    from .train import checkpoint
    from .train.precision import pick_device

    device, precision = pick_device()
    return _build_model(checkpoint.load(path), device), device, precision


def _build_model(saved: Checkpoint, device: torch.device) -> SparseTransformer:
    """The model of a checkpoint, with its averaged weights if it has them."""
    from .train import checkpoint

    model = SparseTransformer(SparseTransformerConfig.from_dict(saved.config))
    checkpoint.load_weights(saved, model)
    return model.to(device).eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparse-attn", description="Sparse Transformers: train, sample, look inside."
    )
    parser.add_argument("--version", action="version", version=f"sparse-attn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="train a small model on Python's own sources, compare it, draw it"
    )
    demo.set_defaults(run=run_demo)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for what it writes")
    demo.add_argument("--data", type=Path, help="other text to train on: a file or a folder")
    demo.add_argument("--steps", type=int, help="training steps (default: by device)")
    demo.add_argument(
        "--seconds", type=float, default=180.0, help="end training after this time (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0)

    train = commands.add_parser("train", help="train a model on the bytes of a file or folder")
    train.set_defaults(run=run_train)
    train.add_argument("data", type=Path, help=DATA)
    train.add_argument("--out", type=Path, required=True, help=f"folder for {CHECKPOINT}")
    train.add_argument("--preset", choices=PRESETS, help="model and training (demo)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument("--context", type=int, help="bytes the model reads at once")
    train.add_argument("--steps", type=int)
    train.add_argument("--batch", type=int, help="contexts per step")
    train.add_argument("--accumulation", type=int, help="parts that a batch is computed in")
    train.add_argument("--lr", type=float, dest="learning_rate", help="peak learning rate")
    train.add_argument("--warmup", type=int, help="steps until the peak learning rate")
    train.add_argument("--ema", type=float, help="decay of the averaged weights; 0: none")
    train.add_argument("--precision", choices=PRECISIONS, help="(bf16 on a GPU that has it)")
    train.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    train.add_argument("--every", type=int, help="steps between checkpoints and validations")
    train.add_argument("--tensorboard", action="store_true", help="log to --out/tensorboard")
    train.add_argument("--seed", type=int)

    evaluate = commands.add_parser(
        "evaluate",
        help="bits per byte, or per dimension of images, of a trained model",
        description="Scores every byte of a part of the data once, with the averaged weights.",
    )
    evaluate.set_defaults(run=run_evaluate)
    evaluate.add_argument("path", type=Path, metavar="checkpoint")
    evaluate.add_argument("data", type=Path, help=DATA)
    evaluate.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="validation",
        help="(%(default)s)",
    )
    evaluate.add_argument(
        "--min-context",
        type=_counts,
        dest="min_contexts",
        metavar="N,...",
        help="bytes that every byte is given at least; one score for each N (half the context)",
    )
    evaluate.add_argument("--bytes", type=int, dest="limit", help="score the first so many (all)")
    evaluate.add_argument("--batch", type=int, help="contexts at once (as in training)")
    evaluate.add_argument("--precision", choices=PRECISIONS, help="(bf16 on a GPU that has it)")

    sample = commands.add_parser(
        "sample",
        help="text, images or sound from a trained model",
        description="Prints text, or writes what the name of --out asks for: a grid of images "
        "(.png), recordings (.wav) or text (any other name).",
    )
    sample.set_defaults(run=run_sample)
    sample.add_argument("path", type=Path, metavar="checkpoint")
    sample.add_argument("--out", type=Path, help="file to write (standard output)")
    sample.add_argument("--prompt", default="", help="text to go on from")
    sample.add_argument("--length", type=int, help="bytes of each (500 of text, a whole context)")
    sample.add_argument("--batch", type=int, default=1, help="samples at once (%(default)s)")
    sample.add_argument("--temperature", type=float, default=0.8, help="(%(default)s)")
    sample.add_argument("--top-k", type=int, help="sample among the k likeliest bytes")
    sample.add_argument("--top-p", type=float, help="and the likeliest that add up to this")
    sample.add_argument("--seed", type=int, help="for the same sample every time")

    prepare = commands.add_parser(
        "prepare", help="make a data set for training from its official archive or your files"
    )
    prepare.set_defaults(run=run_prepare)
    prepare.add_argument("kind", choices=KINDS, help="what the source is")
    prepare.add_argument("source", type=Path, help="file or folder, see docs/data.md")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write")
    prepare.add_argument("--size", type=int, help="rows and columns of images: 32 (default) or 64")

    plot = commands.add_parser(
        "plot",
        help="draw a pattern, or the attention a model learned",
        description="Without a pattern or checkpoint: dense, strided and fixed attention side by "
        "side (the paper's figure 3).",
    )
    plot.set_defaults(run=run_plot)
    plot.add_argument(
        "what", nargs="?", metavar="pattern|checkpoint", help='such as "strided:16", "fixed:16,4"'
    )
    plot.add_argument("--out", type=Path, required=True, help="picture to write (.png, .svg, .pdf)")
    plot.add_argument("--n", type=int, default=64, help="tokens of a pattern (%(default)s)")
    plot.add_argument(
        "--data",
        "--text",
        type=Path,
        help="what the model reads: a file, or a prepared data set (Python's argparse.py)",
    )
    plot.add_argument("--example", type=int, default=0, help="which image or context of it (0)")
    plot.add_argument("--layer", type=int, help="from 0 (the last)")
    plot.add_argument("--head", type=int, help="from 0 (the mean of all)")
    plot.add_argument("--position", type=int, help="byte to predict (7/8 of the text)")

    plan = commands.add_parser("plan", help="print a pattern's plan, for the program kernel_bench")
    plan.set_defaults(run=run_plan)
    plan.add_argument("pattern", help='such as "strided:128", "fixed:128,32"')
    plan.add_argument("--n", type=int, required=True, help="tokens of the sequence")
    return parser


def _counts(text: str) -> list[int]:
    """The numbers of "6144,9216"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"wanted numbers such as 6144,9216, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


if __name__ == "__main__":
    sys.exit(main())
