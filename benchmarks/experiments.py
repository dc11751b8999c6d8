# SPDX-License-Identifier: Apache-2.0
"""Whole training steps: the paper's comparison (Table 2), and a million tokens of context.

`python -m benchmarks table2` trains one model several times, with another attention each time.
`python -m benchmarks million` takes training steps of the smallest music preset at growing context.
docs/experiments.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_attn import Dense
from sparse_attn.data import mu_law_encode
from sparse_attn.model import SparseTransformer, SparseTransformerConfig, presets
from sparse_attn.nn import SelfAttention
from sparse_attn.train import presets as training_presets
from sparse_attn.train.config import TrainingConfig
from sparse_attn.train.corpus import standard_library
from sparse_attn.train.loop import mean_of_last
from sparse_attn.train.precision import PRECISIONS, pick_device
from sparse_attn.train.source import Source, open_source
from sparse_attn.train.trainer import Trainer

from . import peers
from .cases import Case
from .checks import Reference
from .results import FOLDER as RESULTS
from .results import Growth, Machine, _build, describe_machine, file_name
from .timing import Clock, CpuClock, CudaClock, free_memory, growth_exponent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

SCHEMA = 1
FOLDER = RESULTS / "experiments"  # files of another schema than those of the folder above

# Whole iterations, dense / variant, by context.
WANTED: dict[tuple[str, int], dict[str, float]] = {
    ("text", 12288): {"fixed": 1.6, "strided": 2.1},
    ("long", 65536): {"fixed": 3.0, "strided": 5.0},
}
MOST_TOKEN_GROWTH = 0.5  # exponent of time per token

WARM_UP = 3  # steps that are not timed
CANDIDATE_STEPS = WARM_UP + 5
LONG_STEPS = WARM_UP + 10
CHECKED = 1000  # tokens
VALIDATIONS = 10
VALIDATION_CONTEXTS = 64

PartName = Literal["text", "images", "long"]
VariantName = Literal["dense", "fixed", "strided", "identity"]
PARTS: tuple[PartName, ...] = ("text", "images", "long")
VARIANTS: tuple[VariantName, ...] = ("dense", "fixed", "strided", "identity")
OURS, IDENTITY = "sparse_attn", "identity"


# What is measured


@dataclass
class Candidate:
    """A dense attention that might be the fastest, timed in the whole model."""

    part: PartName
    attention: str
    ms: float | None  # an iteration
    reason: str = ""  # why there is no time


@dataclass
class Validation:
    step: int
    bits: float  # per byte


@dataclass
class Variant:
    """One model of a part, timed, and trained unless the part is timed alone."""

    part: PartName
    name: VariantName
    attention: str  # what computed it
    context: int
    stride: int
    layers: int
    batch: int
    parameters: int
    steps: int
    ms: float  # an iteration, median
    ms_min: float
    ms_max: float
    peak_bytes: int | None
    training: list[float]  # bits per byte of every step's batch
    validation: list[Validation]
    bits: float | None = None  # per byte of the validation data, at the end
    bits_error: float | None = None  # its standard error


@dataclass
class Table2:
    machine: Machine
    data: dict[str, str]  # part -> what it read
    precision: str
    compiled: bool
    seed: int
    candidates: list[Candidate] = field(default_factory=list)
    rows: list[Variant] = field(default_factory=list)
    kind: Literal["table2"] = "table2"
    schema: int = SCHEMA


@dataclass
class Length:
    """Training steps at one context, batch 1."""

    context: int
    stride: int
    parameters: int
    steps: int
    ms: float  # a step, median
    ms_min: float
    ms_max: float
    peak_bytes: int | None  # all that was held, weights and optimiser too

    @property
    def ns_per_token(self) -> float:
        return 1e6 * self.ms / self.context

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.context / self.ms


@dataclass
class Million:
    machine: Machine
    data: str
    precision: str
    compiled: bool
    rows: list[Length] = field(default_factory=list)
    growth: Growth | None = None  # of the time per token
    kind: Literal["million"] = "million"
    schema: int = SCHEMA


Experiment = Table2 | Million
KINDS = {"table2": Table2, "million": Million}


def write(experiment: Any, folder: Path) -> Path:
    """Writes a dataclass with a `kind` and a `machine` to the file of both."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(experiment.kind, experiment.machine)
    path.write_text(json.dumps(dataclasses.asdict(experiment), indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Experiment:
    """The experiment in a file; ValueError says where it does not keep to the schema."""
    experiment = read_kind(path, KINDS, "an experiment of")
    assert isinstance(experiment, Table2 | Million)
    return experiment


def read_kind(path: Path, kinds: Mapping[str, type], what: str) -> Any:
    """What `write` wrote, of one of some kinds; ValueError as `read`, in the words of `what`."""
    document = json.loads(path.read_text())
    known = isinstance(document, dict) and document.get("kind") in kinds
    if not known or document.get("schema") != SCHEMA:
        raise ValueError(f"{path} does not hold {what} schema {SCHEMA}")
    return _build(kinds[document["kind"]], document, path.name)


# Data


@dataclass(frozen=True)
class Photographs:
    """Square patches of photographs: a `Source` of images.

    Photographs (height, width, 3) are cut into upright bands: four sides wide for training, one for
    validation, and so on. Training patches begin anywhere in a band, others lie side by side.
    """

    name: str
    photographs: tuple[NDArray[np.uint8], ...]
    side: int

    def bands(self, split: str) -> list[NDArray[np.uint8]]:
        """What a split may read, as far as it holds a patch."""
        if split not in ("train", "validation"):
            raise ValueError(f"{self.name} has no {split} part: wanted train or validation")
        side = self.side
        begin, end = (0, 4 * side) if split == "train" else (4 * side, 5 * side)
        bands = [
            photograph[:, left + begin : left + end]
            for photograph in self.photographs
            for left in range(0, photograph.shape[1], 5 * side)
        ]
        return [band for band in bands if min(band.shape[:2]) >= side]

    @property
    def example(self) -> tuple[int, ...]:
        return self.side, self.side, 3

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.split("train").tobytes(), digest_size=16).hexdigest()

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        random, side = np.random.default_rng([seed, step]), self.side
        bands = self.bands("train")
        widths = np.array([band.shape[1] for band in bands])
        patches = np.empty((count, length), np.uint8)
        for patch in patches:
            band = bands[random.choice(len(bands), p=widths / widths.sum())]
            y, x = (random.integers(size - side + 1) for size in band.shape[:2])
            patch[:] = band[y : y + side, x : x + side].ravel()
        return patches

    def split(self, name: str) -> NDArray[np.uint8]:
        side = self.side
        patches = [
            band[y : y + side, x : x + side].ravel()
            for band in self.bands(name)
            for y in range(0, band.shape[0] - side + 1, side)
            for x in range(0, band.shape[1] - side + 1, side)
        ]
        if not patches:
            raise ValueError(
                f"{self.name} has no {name} patch of side {side}: wanted a smaller one"
            )
        return np.concatenate(patches)


def photographs(side: int) -> Photographs:
    """Patches of the photograph that matplotlib ships; ImportError without matplotlib."""
    from matplotlib import cbook, image

    name = "grace_hopper.jpg"
    pixels = np.asarray(image.imread(cbook.get_sample_data(name, asfileobj=False)), np.uint8)
    return Photographs(
        f"{name} of matplotlib, {pixels.shape[1]} x {pixels.shape[0]}", (pixels,), side
    )


@dataclass(frozen=True)
class Noise:
    """Normal noise as 8-bit mu-law: a `Source` for steps that are timed alone."""

    length: int
    name: str = "normal noise as 8-bit mu-law"
    example: None = None

    @cached_property
    def values(self) -> NDArray[np.uint8]:
        return mu_law_encode(0.3 * np.random.default_rng(0).standard_normal(self.length))

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.values.tobytes(), digest_size=16).hexdigest()

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        start = np.random.default_rng([seed, step]).integers(0, self.length - length + 1, count)
        return self.values[start[:, None] + np.arange(length)]

    def split(self, name: str) -> NDArray[np.uint8]:
        return self.values


# The same model with another attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Swapped(nn.Module):
    """The projections of a `SelfAttention` around another attention: (batch, seq, width)."""

    def __init__(self, projections: SelfAttention, attend: Attend) -> None:
        super().__init__()
        self.heads, self.widths = projections.heads, projections.widths
        self.qkv, self.out = projections.qkv, projections.out
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.widths, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def swap(model: SparseTransformer, attend: Attend) -> None:
    """Every block attends by `attend` from now on; parameters stay the same tensors."""
    for block in model.attention_blocks():
        block.add_module("attention", Swapped(block.attention, attend))


def identity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values themselves: what attention that costs nothing would leave of an iteration."""
    return v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention as torch chooses it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for queries and keys narrower than values: some kernels want equal widths."""
    missing = v.shape[-1] - q.shape[-1]
    scale = q.shape[-1] ** -0.5
    q, k = (F.pad(x, (0, missing)) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def dense_candidates(part: Part, device: torch.device) -> dict[str, Callable[[], Attend | None]]:
    """By name what makes a dense attention, None for the model's own; it may raise."""
    candidates: dict[str, Callable[[], Attend | None]] = {OURS: lambda: None, "sdpa": lambda: sdpa}
    config = part.config
    if config.half_qk:
        candidates["sdpa padded"] = lambda: sdpa_padded
    if device.type != "cuda":
        return candidates

    def prepared(peer: peers.Kernel) -> Attend:
        return peer.prepare(_dense_case(part), device).attend

    for peer in peers.gpu_peers():
        if isinstance(peer, peers.Kernel) and not isinstance(peer, peers.Deterministic):
            candidates[peer.name] = partial(prepared, peer)
    return candidates


def _dense_case(part: Part) -> Case:
    config = part.config
    return Case(
        part.name,
        "dense",
        Dense(),
        part.training.batch,
        config.heads,
        config.context,
        config.qk_width // config.heads,
        config.width // config.heads,
        PRECISIONS[part.training.precision] or torch.float32,
    )


def check_dense(attend: Attend, part: Part, device: torch.device) -> None:
    """Raise RuntimeError if attention or its gradients are not dense, on random data."""
    case = replace(_dense_case(part), batch=2, seq=min(part.config.context, CHECKED))
    generator = torch.Generator(device).manual_seed(1)

    def random(head_dim: int) -> Tensor:
        shape = (case.batch, case.seq, case.heads, head_dim)
        x = torch.randn(shape, device=device, generator=generator).to(case.dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v, dout = map(random, (case.head_dim, case.head_dim, case.head_dim_v, case.head_dim_v))
    out = attend(q, k, v)
    results = (out, *torch.autograd.grad(out, (q, k, v), dout))
    reference = Reference(case, q, k, v, dout)
    share = reference.error_share(dict(zip(reference.names, results, strict=True)))
    if not share <= 1:
        raise RuntimeError(f"wrong: off by {share:.2g} times what is allowed")


# Table 2


@dataclass(frozen=True)
class Part:
    """One model on one kind of data."""

    name: PartName
    config: SparseTransformerConfig  # but for the pattern
    training: TrainingConfig
    source: Source
    trained: bool = True  # or timed alone

    def trainer(self, variant: VariantName, attend: Attend | None, device: torch.device) -> Trainer:
        """The same first weights, batches and steps for every variant."""
        if self.training.compile:
            torch.compiler.reset()  # torch compiles a block's code a few times only
        pattern = "dense" if variant == IDENTITY else variant
        config = replace(self.config, pattern=pattern)
        trainer = Trainer(config, self.training, self.source, device)
        if attend is not None:
            for model in (trainer.model, trainer.averaged):
                swap(model, attend)
        return trainer


def text_part(arguments: argparse.Namespace, source: Source, precision: str) -> Part:
    config = replace(presets.enwik8(), context=arguments.context, layers=arguments.layers or 6)
    training = _training(training_presets.ENWIK8, arguments, precision, arguments.batch or 8)
    return Part("text", config, training, source)


def long_part(arguments: argparse.Namespace, source: Source, precision: str) -> Part:
    config = replace(
        presets.enwik8(), context=arguments.longest, stride=256, layers=arguments.layers or 6
    )
    training = _training(training_presets.ENWIK8, arguments, precision, 1)
    training = replace(training, steps=min(arguments.steps, LONG_STEPS))
    return Part("long", config, training, source, trained=False)


def image_part(arguments: argparse.Namespace, source: Source, precision: str) -> Part:
    """The stride is a row of pixels, as in the preset, and a third of it is summary columns."""
    side = arguments.side
    config = replace(
        presets.cifar10(),
        context=side * side * 3,
        stride=side * 3,
        columns=side,
        position_shape=(side, side, 3),
        layers=arguments.layers or 12,
    )
    training = _training(training_presets.CIFAR10, arguments, precision, arguments.batch or 16)
    return Part("images", config, training, source)


def _training(
    preset: TrainingConfig, arguments: argparse.Namespace, precision: str, batch: int
) -> TrainingConfig:
    """A preset's training, with a tenth of the few steps as warm-up."""
    return replace(
        preset,
        steps=arguments.steps,
        warmup=arguments.steps // 10,
        batch=batch,
        precision=precision,
        compile=arguments.compile,
        seed=arguments.seed,
    )


def open_parts(arguments: argparse.Namespace, precision: str) -> list[Part]:
    """The chosen parts with their data; ValueError, ImportError or OSError if there is none."""
    chosen = [name.strip() for name in arguments.parts.split(",")]
    if not set(chosen) <= set(PARTS):
        raise ValueError(f"parts are {arguments.parts!r}, wanted some of {', '.join(PARTS)}")
    if arguments.steps < 1:
        raise ValueError(f"steps is {arguments.steps}, wanted 1 or more")
    parts = []
    if "text" in chosen or "long" in chosen:
        text = open_source(arguments.data) if arguments.data else standard_library()
        parts += [text_part(arguments, text, precision)] if "text" in chosen else []
        parts += [long_part(arguments, text, precision)] if "long" in chosen else []
    if "images" in chosen:
        side = arguments.side
        images = open_source(arguments.images) if arguments.images else photographs(side)
        parts.append(image_part(arguments, images, precision))
    return parts


def measure_table2(
    parts: Sequence[Part], table: Table2, clock: Clock, console: Console
) -> Iterator[None]:
    """Fills a table, with a pause after every variant."""
    for part in parts:
        table.candidates += time_candidates(part, clock)
        name = fastest(table.candidates, part.name)
        for variant in VARIANTS:
            attend: Attend | None = None
            attention = OURS
            if variant == IDENTITY:
                attend, attention = identity, IDENTITY
            elif variant == "dense":
                attend, attention = dense_candidates(part, clock.device)[name](), name
            table.rows.append(run_variant(part, variant, attention, attend, clock))
            console.print(f"{part.name}, {variant} ({attention}): {table.rows[-1].ms:.1f} ms")
            yield


def time_candidates(part: Part, clock: Clock) -> list[Candidate]:
    """A few iterations with every dense attention; one that fails has a reason, not a time.

    None is compiled: what surrounds attention takes the same time for all.
    """
    part = replace(part, training=replace(part.training, compile=False))
    found = []
    for name, make in dense_candidates(part, clock.device).items():
        free_memory()
        try:
            found.append(Candidate(part.name, name, _candidate_ms(part, make, clock)))
        except Exception as error:  # not installed, or no kernel for the shape
            found.append(Candidate(part.name, name, None, (str(error).splitlines() or [""])[0]))
    return found


def _candidate_ms(part: Part, make: Callable[[], Attend | None], clock: Clock) -> float:
    attend = make()
    if attend is not None:
        check_dense(attend, part, clock.device)
    trainer = part.trainer("dense", attend, clock.device)
    return median(_timed(_times(trainer, min(CANDIDATE_STEPS, part.training.steps), clock)))


def fastest(candidates: Sequence[Candidate], part: PartName) -> str:
    """The name of a part's fastest dense attention. RuntimeError if none ran."""
    times = {x.attention: x.ms for x in candidates if x.part == part and x.ms is not None}
    if not times:
        reasons = "; ".join(f"{x.attention}: {x.reason}" for x in candidates if x.part == part)
        raise RuntimeError(f"no dense attention ran: {reasons}")
    return min(times, key=lambda name: times[name])


def run_variant(
    part: Part, variant: VariantName, attention: str, attend: Attend | None, clock: Clock
) -> Variant:
    """Trains a model, validating now and then, or times a few steps of it."""
    free_memory()
    _reset_peak(clock.device)
    trainer = part.trainer(variant, attend, clock.device)
    config, steps = trainer.model.config, part.training.steps
    times: list[float] = []
    validation: list[Validation] = []
    limit = VALIDATION_CONTEXTS * config.context
    error: float | None = None
    while trainer.step_number < steps:
        chunk = -(-steps // VALIDATIONS) if part.trained else steps
        times += _times(trainer, min(chunk, steps - trainer.step_number), clock)
        if part.trained:
            score = trainer.validate(limit=limit)
            validation.append(Validation(trainer.step_number, score.bits))
            error = score.standard_error if math.isfinite(score.standard_error) else None
    timed = _timed(times)
    return Variant(
        part=part.name,
        name=variant,
        attention=attention,
        context=config.context,
        stride=config.stride,
        layers=config.layers,
        batch=part.training.batch,
        parameters=_parameters(trainer),
        steps=steps,
        ms=median(timed),
        ms_min=min(timed),
        ms_max=max(timed),
        peak_bytes=_peak(clock.device),
        training=trainer.losses if part.trained else [],
        validation=validation,
        bits=validation[-1].bits if validation else None,
        bits_error=error,
    )


def _times(trainer: Trainer, steps: int, clock: Clock) -> list[float]:
    return clock.times(lambda number: trainer.step(), steps)


def _timed(times: list[float]) -> list[float]:
    """Without the first steps, which compile, choose kernels and allocate."""
    return times[WARM_UP:] or times[-1:]


def _parameters(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.model.parameters())


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Ratio:
    """How an iteration stands to dense and to the bound."""

    row: Variant
    speedup: float | None  # dense / this; None without dense
    bound: float | None  # this / identity: 1 is attention for free
    wanted: float | None  # least speedup

    @property
    def passed(self) -> bool:
        return self.wanted is None or (self.speedup or 0) >= self.wanted


def ratios(rows: Sequence[Variant]) -> list[Ratio]:
    times = {(row.part, row.name): row.ms for row in rows}
    found: list[Ratio] = []
    for row in rows:
        dense, free = times.get((row.part, "dense")), times.get((row.part, "identity"))
        found.append(
            Ratio(
                row,
                None if dense is None else dense / row.ms,
                None if free is None else row.ms / free,
                WANTED.get((row.part, row.context), {}).get(row.name),
            )
        )
    return found


# A million


def music_config(context: int) -> SparseTransformerConfig:
    """The 3M preset at another context, its stride the power of two next to sqrt(context)."""
    stride = 2 ** math.floor(math.log2(context) / 2 + 0.5)
    return replace(presets.music(1_048_576), context=context, stride=stride)


def lengths(shortest: int, longest: int, step: Literal[2, 4] = 2) -> list[int]:
    """Each `step` times the one before. ValueError if there are not two, which a fit takes."""
    found: list[int] = []
    while shortest > 0 and shortest * step ** len(found) <= longest:
        found.append(shortest * step ** len(found))
    if len(found) < 2:
        times = {2: "twice", 4: "four times"}[step]
        raise ValueError(
            f"shortest is {shortest} and longest {longest}, wanted one above 0 and one {times} that"
        )
    return found


def run_length(
    context: int, steps: int, source: Source, training: TrainingConfig, clock: Clock
) -> Length:
    """Training steps at one context: forward, backward, optimiser and average."""
    free_memory()
    _reset_peak(clock.device)
    config = music_config(context)
    trainer = Trainer(config, training, source, clock.device)
    timed = _timed(_times(trainer, WARM_UP + steps, clock))
    return Length(
        context,
        config.stride,
        _parameters(trainer),
        steps,
        median(timed),
        min(timed),
        max(timed),
        _peak(clock.device),
    )


def token_growth(rows: Sequence[Length]) -> Growth:
    """The exponent of the time per token against the context, and whether it is sqrt or less."""
    contexts = [row.context for row in rows]
    exponent = growth_exponent(contexts, [row.ns_per_token for row in rows])
    limit = f"<= {MOST_TOKEN_GROWTH}"
    passed = exponent <= MOST_TOKEN_GROWTH
    return Growth("time per token", OURS, contexts, exponent, limit, passed)


# Commands


def add_commands(commands: Any) -> None:
    """Adds table2 and million to the parser of `python -m benchmarks`."""
    table2 = commands.add_parser("table2", help="one model dense, fixed, strided and without")
    million = commands.add_parser("million", help="training steps up to 1,048,576 tokens")
    table2.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    table2.add_argument("--data", type=Path, help="text or a prepared folder; default: Python's")
    table2.add_argument("--images", type=Path, help="a prepared folder; default: a photograph")
    table2.add_argument("--context", type=int, default=12288, help="bytes of text")
    table2.add_argument("--side", type=int, default=32, help="of an image, in pixels")
    table2.add_argument("--longest", type=int, default=65536, help="context of the part long")
    table2.add_argument("--layers", type=int, help="default: 6, images 12")
    table2.add_argument("--batch", type=int, help="contexts a step; default: 8, images 16, long 1")
    table2.add_argument("--steps", type=int, default=600, help="of text and of images")
    table2.add_argument("--seed", type=int, default=0)
    million.add_argument("--data", type=Path, help="a prepared folder; default: noise")
    million.add_argument("--shortest", type=int, default=65536)
    million.add_argument("--longest", type=int, default=1 << 20)
    million.add_argument("--steps", type=int, default=5, help="timed at each context")
    for each in (table2, million):
        each.add_argument("--compile", action="store_true", help="torch.compile of every block")
        each.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
        each.add_argument("--commit", help="commit to note where there is no git repository")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run a command; the exit code: 0, 1 if a ratio or growth is missed, 2 if it cannot run."""
    device, precision = pick_device()
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    machine = describe_machine(clock.device, arguments.commit)
    run = _run_table2 if arguments.command == "table2" else _run_million
    try:
        experiment = run(arguments, machine, precision, clock, console)
    except (ValueError, ImportError, OSError) as error:
        console.print(str(error))
        return 2
    show(experiment, console)
    console.print(f"wrote {write(experiment, arguments.out)}", soft_wrap=True)
    try:
        console.print(f"wrote {draw(experiment, arguments.out)}", soft_wrap=True)
    except ImportError as error:
        console.print(f"no chart ({error}): the command show draws it where matplotlib is")
    return 0 if is_reached(experiment) else 1


def _run_table2(
    arguments: argparse.Namespace, machine: Machine, precision: str, clock: Clock, console: Console
) -> Experiment:
    parts = open_parts(arguments, precision)
    # Of a file or folder its own name: results hold no paths of a machine.
    data: dict[str, str] = {part.name: Path(part.source.name).name for part in parts}
    table = Table2(machine, data, precision, arguments.compile, arguments.seed)
    for _ in measure_table2(parts, table, clock, console):
        write(table, arguments.out)  # a run that is cut short leaves the rows it has
    return table


def _run_million(
    arguments: argparse.Namespace, machine: Machine, precision: str, clock: Clock, console: Console
) -> Experiment:
    contexts = lengths(arguments.shortest, arguments.longest)
    if arguments.steps < 1:
        raise ValueError(f"steps is {arguments.steps}, wanted 1 or more")
    source = open_source(arguments.data) if arguments.data else Noise(2 * contexts[-1])
    training = replace(
        training_presets.MUSIC_1048576, precision=precision, compile=arguments.compile
    )
    million = Million(machine, source.name, precision, arguments.compile)
    for context in contexts:
        million.rows.append(run_length(context, arguments.steps, source, training, clock))
        console.print(f"n {context:,}: {million.rows[-1].ms:,.1f} ms a step")
        write(million, arguments.out)
    million.growth = token_growth(million.rows)
    return million


def is_reached(experiment: Experiment) -> bool:
    """Whether all that is wanted of the ratios, or of the growth, is so."""
    if isinstance(experiment, Table2):
        return all(ratio.passed for ratio in ratios(experiment.rows))
    return experiment.growth is not None and experiment.growth.passed


# What a file says


def show(experiment: Experiment, console: Console) -> None:
    """Prints the tables of an experiment."""
    machine = experiment.machine
    compiled = ", compiled" if experiment.compiled else ""
    console.print(
        f"{machine.device} (driver {machine.driver}), torch {machine.torch}, CUDA {machine.cuda}, "
        f"{experiment.precision}{compiled}; commit {machine.commit}, {machine.date}"
    )
    if isinstance(experiment, Table2):
        _show_table2(experiment, console)
    else:
        _show_million(experiment, console)


def _show_table2(table: Table2, console: Console) -> None:
    from rich.table import Table

    for part in dict.fromkeys(row.part for row in table.rows):
        found = [ratio for ratio in ratios(table.rows) if ratio.row.part == part]
        first = found[0].row
        shown = Table(
            title=f"{part}: {table.data[part]}; context {first.context:,}, batch {first.batch}, "
            f"{first.layers} layers, stride {first.stride}, {first.parameters / 1e6:.1f}M "
            f"parameters, {first.steps} steps",
            title_justify="left",
        )
        for name in ("variant", "attention"):
            shown.add_column(name)
        for name in (
            "bits per byte",
            "ms an iteration",
            "least - greatest",
            "dense / this",
            "this / identity",
            "peak GB",
            "wanted",
        ):
            shown.add_column(name, justify="right")
        for ratio in found:
            shown.add_row(*_cells(ratio))
        console.print(shown)
        for x in table.candidates:
            if x.part == part:
                took = f"{x.ms:.1f} ms an iteration" if x.ms is not None else x.reason
                console.print(f"dense by {x.attention}: {took}", markup=False)


def _cells(ratio: Ratio) -> tuple[str, ...]:
    row = ratio.row
    bits = "" if row.bits is None else f"{row.bits:.3f}"
    if row.bits is not None and row.bits_error is not None:
        bits += f" ± {row.bits_error:.3f}"
    wanted = ""
    if ratio.wanted is not None:
        wanted = f">= {ratio.wanted:g}x, {'met' if ratio.passed else 'NOT MET'}"
    return (
        row.name,
        row.attention,
        bits,
        f"{row.ms:.1f}",
        f"{row.ms_min:.1f} - {row.ms_max:.1f}",
        "" if ratio.speedup is None else f"{ratio.speedup:.2f}x",
        "" if ratio.bound is None else f"{ratio.bound:.2f}x",
        _gigabytes(row.peak_bytes),
        wanted,
    )


def _show_million(million: Million, console: Console) -> None:
    from rich.table import Table

    shown = Table(title=f"training steps, batch 1; {million.data}", title_justify="left")
    names = ("n", "stride", "ms a step", "least - greatest", "tokens/s", "ns a token", "peak GB")
    for name in names:
        shown.add_column(name, justify="right")
    for row in million.rows:
        shown.add_row(
            f"{row.context:,}",
            f"{row.stride:,}",
            f"{row.ms:,.1f}",
            f"{row.ms_min:,.1f} - {row.ms_max:,.1f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.ns_per_token:,.0f}",
            _gigabytes(row.peak_bytes),
        )
    console.print(shown)
    if (growth := million.growth) is not None:
        verdict = "met" if growth.passed else "NOT MET"
        console.print(f"{growth.name}: n^{growth.exponent:.2f} (wanted {growth.limit}, {verdict})")


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


COLOURS = {"dense": "#d62728", "fixed": "#1f77b4", "strided": "#2ca02c", "identity": "#90a4ae"}


def draw(experiment: Experiment, folder: Path) -> Path:
    """Writes the chart of an experiment beside it, as PNG."""
    figure = _curves(experiment) if isinstance(experiment, Table2) else _token_times(experiment)
    path = (folder / file_name(experiment.kind, experiment.machine)).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _curves(table: Table2) -> Figure:
    """A column for each part: loss against steps and, below, time per iteration."""
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row.part for row in table.rows))
    figure = Figure(figsize=(5 * len(parts), 7.5), layout="constrained")
    grid = figure.subplots(2, len(parts), squeeze=False)
    for (above, below), part in zip(grid.T, parts, strict=True):
        rows = [row for row in table.rows if row.part == part]
        _loss_panel(above, f"{part}, context {rows[0].context:,}", rows)
        _iteration_panel(below, [ratio for ratio in ratios(table.rows) if ratio.row.part == part])
    figure.suptitle(table.machine.device)
    return figure


def _loss_panel(axes: Axes, title: str, rows: list[Variant]) -> None:
    axes.set_title(title, size=10)
    trained = [row for row in rows if row.validation]
    if not trained:
        axes.set_axis_off()
        return
    for row in trained:
        colour = COLOURS[row.name]
        smooth = [mean_of_last(row.training[: step + 1]) for step in range(len(row.training))]
        axes.plot(range(1, len(smooth) + 1), smooth, color=colour, linewidth=0.8, alpha=0.6)
        steps, bits = zip(*((x.step, x.bits) for x in row.validation), strict=True)
        axes.plot(steps, bits, color=colour, marker="o", markersize=3, label=row.name)
    axes.set_xlabel("step (thin: training, mean of 20; dots: validation)")
    axes.set_ylabel("bits per byte")
    axes.legend(fontsize=8)


def _iteration_panel(axes: Axes, found: list[Ratio]) -> None:
    names = [ratio.row.name for ratio in found]
    axes.barh(names, [ratio.row.ms for ratio in found], color=[COLOURS[name] for name in names])
    for place, ratio in enumerate(found):
        speedup = "" if ratio.speedup is None else f", {ratio.speedup:.2f}x"
        axes.text(ratio.row.ms, place, f" {ratio.row.ms:.1f}{speedup}", va="center", size=8)
    axes.set_xlim(0, 1.3 * max(ratio.row.ms for ratio in found))
    axes.invert_yaxis()
    axes.set_xlabel("ms an iteration, dense / this")


def _token_times(million: Million) -> Figure:
    """Time per token against n, beside sqrt(n) from the first point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    first, contexts = million.rows[0], [row.context for row in million.rows]
    root = [first.ns_per_token * math.sqrt(n / first.context) for n in contexts]
    times = [row.ns_per_token for row in million.rows]
    axes.loglog(contexts, root, "k--", label="sqrt(n)")
    axes.loglog(contexts, times, color=COLOURS["fixed"], marker="o", label="training step")
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts], size=7)
    axes.minorticks_off()
    axes.set_xlabel("n")
    axes.set_ylabel("ns a token")
    axes.set_title(million.machine.device, size=10)
    axes.legend(fontsize=8)
    return figure
