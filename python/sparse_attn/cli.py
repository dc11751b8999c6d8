# SPDX-License-Identifier: Apache-2.0
"""The `sparse-attn` command: demo, train, sample, plot, plan."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .model import SparseTransformer, SparseTransformerConfig
from .patterns import parse_pattern

CHECKPOINT = "checkpoint.safetensors"
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
    **overrides: Any,
) -> None:
    from .train import checkpoint, loop
    from .train.corpus import load_corpus

    console = loop.make_console()
    checkpoint.import_safetensors()
    path = out / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: go on with --resume or choose another --out")
    saved = checkpoint.load(path) if resume else None
    device, precision = loop.pick_device()
    if saved and preset is None:
        config = SparseTransformerConfig.from_dict(saved.config)
        training = loop.TrainingConfig.from_dict(saved.progress["training"])
    else:
        config, training = loop.preset(preset or "demo")
        training = replace(training, precision=precision)
    if context is not None:
        config = replace(config, context=context)
    training = replace(training, **{k: v for k, v in overrides.items() if v is not None})

    trainer = loop.Trainer(config, training, load_corpus(data), device)
    if saved:
        trainer.restore(saved)
        console.print(f"going on from step {trainer.step_number} of {path}", soft_wrap=True)
    every = max(1, min(1000, training.steps // 10))
    try:
        loop.train(
            trainer,
            console,
            validate_every=every,
            validation_bytes=16 * config.context,
            save_every=every,
            path=path,
        )
    except KeyboardInterrupt:
        if path.exists():
            console.print(f"stopped: --resume goes on from {path}", soft_wrap=True)
        raise
    min_context = config.context // 2
    bits = trainer.validate(trainer.corpus.validation, min_context)
    console.print(
        f"validation text, every byte once, given the {min_context} or more before it: "
        f"{bits:.4f} bits per byte\nwrote {path}",
        soft_wrap=True,
    )


def run_sample(
    path: Path,
    prompt: str,
    length: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
) -> None:
    from .train import loop

    model, device, precision = _load_model(path)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    start = list(prompt.encode("utf-8", "surrogateescape"))
    tokens = torch.tensor([start], dtype=torch.int64, device=device)
    console = loop.make_console(stderr=True)
    with loop.progress_bar(console) as bar, loop.autocast(device, precision):
        task = bar.add_task("sampling", total=length)
        tokens = model.generate(
            tokens,
            length,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
            progress=lambda made: bar.update(task, completed=made),
        )
    print(bytes(tokens[0].tolist()).decode("utf-8", "replace"))


def run_plot(
    what: str | None,
    out: Path,
    n: int,
    text: Path | None,
    layer: int | None,
    head: int | None,
    position: int | None,
) -> None:
    from . import plot

    plot.import_figure()
    if what is None:
        figure = plot.plot_connectivity()
    elif Path(what).is_file() or what.endswith(".safetensors"):
        model, _, _ = _load_model(Path(what))
        content = text.read_bytes() if text else Path(argparse.__file__).read_bytes()
        content = content[: model.config.context]
        figure = plot.plot_learned_attention(
            model,
            content,
            len(content) * 7 // 8 if position is None else position,
            model.config.layers - 1 if layer is None else layer,
            head,
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
    from .train import checkpoint, loop

    saved = checkpoint.load(path)
    device, precision = loop.pick_device()
    model = SparseTransformer(SparseTransformerConfig.from_dict(saved.config))
    checkpoint.load_weights(saved, model)
    return model.to(device).eval(), device, precision


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
    train.add_argument("data", type=Path, help="a file (its last 5 % validates) or a folder")
    train.add_argument("--out", type=Path, required=True, help=f"folder for {CHECKPOINT}")
    train.add_argument("--preset", choices=["demo", "enwik8"], help="model and training (demo)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument("--context", type=int, help="bytes the model reads at once")
    train.add_argument("--steps", type=int)
    train.add_argument("--batch", type=int, help="contexts per step")
    train.add_argument("--lr", type=float, dest="learning_rate", help="peak learning rate")
    train.add_argument("--seed", type=int)

    sample = commands.add_parser("sample", help="print text that a trained model writes")
    sample.set_defaults(run=run_sample)
    sample.add_argument("path", type=Path, metavar="checkpoint")
    sample.add_argument("--prompt", default="", help="text to go on from")
    sample.add_argument("--length", type=int, default=500, help="bytes to write (%(default)s)")
    sample.add_argument("--temperature", type=float, default=0.8, help="(%(default)s)")
    sample.add_argument("--top-k", type=int, help="sample among the k likeliest bytes")
    sample.add_argument("--seed", type=int, help="for the same text every time")

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
    plot.add_argument("--text", type=Path, help="file the model reads (Python's argparse.py)")
    plot.add_argument("--layer", type=int, help="from 0 (the last)")
    plot.add_argument("--head", type=int, help="from 0 (the mean of all)")
    plot.add_argument("--position", type=int, help="byte to predict (7/8 of the text)")

    plan = commands.add_parser("plan", help="print a pattern's plan, for the program kernel_bench")
    plan.set_defaults(run=run_plan)
    plan.add_argument("pattern", help='such as "strided:128", "fixed:128,32"')
    plan.add_argument("--n", type=int, required=True, help="tokens of the sequence")
    return parser


if __name__ == "__main__":
    sys.exit(main())
