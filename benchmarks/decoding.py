# SPDX-License-Identifier: Apache-2.0
"""Generation: the attention of a decoding step, the bytes it reads, and whole samples of models.

`python -m benchmarks decode` measures the parts in turn; docs/experiments.md says how to read them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sparse_attn import Chunk, Dense, Dilated, Fixed, KVCache, Local, Pattern, Strided, Summary
from sparse_attn.backends import cuda, cuda_decode, torch_decode
from sparse_attn.decode_plan import decode_plan
from sparse_attn.model import SparseTransformer, SparseTransformerConfig, presets
from sparse_attn.model.generation import Decoder, sample
from sparse_attn.train.precision import pick_device

from .experiments import FOLDER, MOST_TOKEN_GROWTH, SCHEMA, lengths, music_config, read_kind, write
from .floors import Rates
from .results import OURS, ROOT, Growth, Machine, describe_machine, file_name
from .timing import (
    Call,
    Clock,
    CpuClock,
    CudaClock,
    Timing,
    free_memory,
    growth_exponent,
    input_sets,
    interleaved,
    measure_rates,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

PATTERNS: dict[str, Pattern] = {
    "Local(256)": Local(256),
    "Chunk(256)": Chunk(256),
    "Dilated(256)": Dilated(256),
    "Summary(256, 32)": Summary(256, 32),
    "Strided(256)": Strided(256),
    "Fixed(256, 32)": Fixed(256, 32),
    "Dense()": Dense(),
}
HEADS, HEAD_DIM = 8, 64
MOST_KEY_GROWTH = 1.0  # exponent of time against keys, to two decimals
LEAST_KEY_GROWTH = 2.0  # keys at the longest / at the shortest length; with less no fit
MOST_RATIO = 1.10  # time per key at any length / at the shortest, where there is no fit
MOST_CACHES = 1024  # in rotation
LEAST_CALLS = 64  # in one graph, against the time of its launch
MEMORY_SHARE = 0.8  # of what is free, for caches

ONCE_LENGTH = 65536
METRIC, KERNEL = "dram__bytes_read.sum", "parts_kernel"
MOST_READ = 1.3  # bytes read / bytes needed
NCU_SECONDS = 180

WARM_UP = 3  # steps: kernels are loaded, the graph is captured, and replayed once
MUSIC_BATCH = 1

PARTS = ("attention", "bytes", "models", "music")
PRESETS = ("cifar10", "enwik8")


# What is measured


@dataclass
class Step:
    """The attention of one decoding step: the query at the last of n positions."""

    pattern: str
    batch: int
    n: int
    keys: int  # of a query
    bytes: int  # of these keys and their values, over batch and heads
    caches: int  # read in turn
    cold: bool  # together more than three times the L2 cache, so that all comes from memory
    us: float
    us_min: float
    us_max: float

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.us / 1e3


@dataclass
class KeyGrowth:
    """time = c * keys^exponent; where keys hardly grow, the time per key instead."""

    pattern: str
    batch: int
    lengths: list[int]
    exponent: float | None
    ratio: float  # greatest time per key / that of the shortest length
    limit: str
    passed: bool


@dataclass
class Reading:
    """What one step reads from memory, as ncu counts it, from a cold L2 cache."""

    pattern: str
    keys: int
    bytes_needed: int
    bytes_read: int | None  # None if not measured

    @property
    def ratio(self) -> float | None:
        return None if self.bytes_read is None else self.bytes_read / self.bytes_needed


@dataclass
class Slice:
    """Steps of a model at neighbouring positions, the choice of each token too."""

    first: int  # position
    tokens: int
    ms: float  # a token of the whole batch

    @property
    def middle(self) -> float:
        return self.first + self.tokens / 2


@dataclass
class Sample:
    """Samples of one context of a preset, random weights."""

    preset: str
    attention: Literal["sparse", "dense"]
    pattern: str
    parameters: int
    layers: int
    context: int
    batch: int
    cache_bytes: int
    slices: list[Slice]
    estimate_s: float  # of the whole context, from the slices
    whole_s: float | None  # measured; None if it would have taken too long

    @property
    def seconds(self) -> float:
        return self.estimate_s if self.whole_s is None else self.whole_s

    @property
    def ms_per_token(self) -> float:
        return 1e3 * self.seconds / self.context

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.context / self.seconds


@dataclass
class MusicStep:
    """The last tokens of one context of the smallest music preset, batch 1."""

    context: int
    stride: int
    parameters: int
    cache_bytes: int
    last: Slice


@dataclass
class Decoding:
    machine: Machine
    dtype: str
    parts: list[str]
    heads: int = HEADS  # of attention and bytes
    head_dim: int = HEAD_DIM
    rates: Rates | None = None
    steps: list[Step] = field(default_factory=list)
    growth: list[KeyGrowth] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    readings_n: int = ONCE_LENGTH
    not_read: str = ""  # why bytes were not measured
    samples: list[Sample] = field(default_factory=list)
    music: list[MusicStep] = field(default_factory=list)
    music_growth: Growth | None = None  # of the time per token
    left_out: list[str] = field(default_factory=list)  # what the memory did not hold
    kind: Literal["decode"] = "decode"
    schema: int = SCHEMA


def read(path: Path) -> Decoding:
    """What a file holds; ValueError says where it does not keep to the schema."""
    decoding = read_kind(path, {"decode": Decoding}, "results of decode,")
    assert isinstance(decoding, Decoding)
    return decoding


# One step's attention


@dataclass(frozen=True)
class StepCase:
    """A step at the last of ``length`` positions."""

    name: str
    batch: int
    length: int

    @property
    def pattern(self) -> Pattern:
        return PATTERNS[self.name]

    @property
    def keys(self) -> int:
        return int(self.pattern.keys_per_query(self.length)[-1])

    def key_bytes(self, keys: int, dtype: torch.dtype) -> int:
        """Bytes of so many keys and values in every head."""
        return 2 * self.batch * HEADS * keys * HEAD_DIM * dtype.itemsize

    def bytes_needed(self, dtype: torch.dtype) -> int:
        return self.key_bytes(self.keys, dtype)

    def cache_bytes(self, dtype: torch.dtype) -> int:
        stores = decode_plan(self.pattern, self.length).stores
        return self.key_bytes(sum(store.slots for store in stores), dtype)

    def call(self, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
        """The step on a cache of its own, random but full. It leaves the position as it is."""
        cache = KVCache(
            self.pattern, self.batch, HEADS, self.length, HEAD_DIM, dtype=dtype, device=device
        )
        for part in cache.parts:
            for kept in (*part.k, *part.v):
                kept.normal_()
        cache.position.fill_(self.length - 1)
        shape = (3, self.batch, HEADS, 1, HEAD_DIM)
        q, k, v = torch.randn(shape, dtype=dtype, device=device).unbind()
        decode = cuda_decode.decode if device.type == "cuda" else torch_decode.decode
        return partial(decode, q, k, v, cache, HEAD_DIM**-0.5, torch.empty_like(q))


def caches_that_fit(case: StepCase, dtype: torch.dtype, device: torch.device) -> int:
    """How many caches to read in turn: enough to outgrow the L2 cache, as far as memory goes."""
    count = min(input_sets(case.bytes_needed(dtype), device), MOST_CACHES)
    if device.type != "cuda":
        return count
    free, _ = torch.cuda.mem_get_info(device)
    return min(count, int(MEMORY_SHARE * free) // case.cache_bytes(dtype))


def run_step(case: StepCase, dtype: torch.dtype, clock: Clock) -> Step | None:
    """Times a step; None if the memory does not hold its cache."""
    free_memory()
    count = caches_that_fit(case, dtype, clock.device)
    if count == 0:
        return None
    calls = [case.call(dtype, clock.device) for _ in range(count)]
    needed, cold = case.bytes_needed(dtype), False
    if clock.device.type == "cuda":
        calls *= -(-LEAST_CALLS // count)
        cold = count * needed >= 3 * _l2_bytes(clock.device)
    run = _graph(calls) if clock.device.type == "cuda" else _one_by_one(calls)
    timing = interleaved({"steps": run}, clock)["steps"]
    if not isinstance(timing, Timing):
        raise timing
    us = [1e3 * ms / len(calls) for ms in (timing.median, timing.least, timing.greatest)]
    return Step(case.name, case.batch, case.length, case.keys, needed, count, cold, *us)


def _l2_bytes(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def _graph(calls: Sequence[Callable[[], None]]) -> Call:
    """All calls as one CUDA graph."""
    calls[0]()  # loads the kernels, which a capture could not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda number: graph.replay()


def _one_by_one(calls: Sequence[Callable[[], None]]) -> Call:
    def run(number: int) -> None:
        for call in calls:
            call()

    return run


def key_growth(steps: Sequence[Step]) -> list[KeyGrowth]:
    """How the time of each pattern and batch grows with its keys."""
    found = []
    for pattern, batch in dict.fromkeys((step.pattern, step.batch) for step in steps):
        rows = [step for step in steps if (step.pattern, step.batch) == (pattern, batch)]
        if len(rows) < 2:
            continue
        keys, times = [row.keys for row in rows], [row.us for row in rows]
        per_key = [us / count for us, count in zip(times, keys, strict=True)]
        exponent, ratio = None, max(per_key) / per_key[0]
        limit, passed = f"<= {MOST_RATIO:g}x", ratio <= MOST_RATIO
        if keys[-1] >= LEAST_KEY_GROWTH * keys[0]:
            exponent = growth_exponent(keys, times)
            limit, passed = f"<= {MOST_KEY_GROWTH:g}", round(exponent, 2) <= MOST_KEY_GROWTH
        ns = [row.n for row in rows]
        found.append(KeyGrowth(pattern, batch, ns, exponent, ratio, limit, passed))
    return found


def measure_attention(
    decoding: Decoding,
    cases: Sequence[StepCase],
    dtype: torch.dtype,
    clock: Clock,
    console: Console,
) -> Iterator[None]:
    """Fills the steps, with a pause after every pattern."""
    decoding.rates = measure_rates(clock, *_rate_sizes(clock.device))
    for case in cases:
        step = run_step(case, dtype, clock)
        what = f"{case.name}, batch {case.batch}, n {case.length:,}"
        if step is None:
            decoding.left_out.append(f"{what}: the cache does not fit")
            continue
        decoding.steps.append(step)
        console.print(f"{what}: {step.us:,.2f} us, {step.gb_per_s:,.0f} GB/s")
        yield
    decoding.growth = key_growth(decoding.steps)


def _rate_sizes(device: torch.device) -> tuple[int, ...]:
    return () if device.type == "cuda" else (1 << 28, 1024)


# Bytes read


def run_once(device: torch.device, dtype: torch.dtype) -> None:
    """One step of every pattern from a cold L2 cache; prints what each needs, a line of JSON."""
    for case in once_cases():
        call = case.call(dtype, device)
        if device.type == "cuda":
            torch.empty(3 * _l2_bytes(device), dtype=torch.uint8, device=device).zero_()
            torch.cuda.synchronize(device)
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(json.dumps(dataclasses.asdict(reading_of(case, dtype, None))), flush=True)


def once_cases() -> list[StepCase]:
    return [StepCase(name, 1, ONCE_LENGTH) for name in PATTERNS]


def reading_of(case: StepCase, dtype: torch.dtype, bytes_read: int | None) -> Reading:
    return Reading(case.name, case.keys, case.bytes_needed(dtype), bytes_read)


def read_bytes(dtype: torch.dtype, device: torch.device) -> tuple[list[Reading], str]:
    """The steps of `run_once` under ncu, in a process of their own; and why not, if not."""
    cases = once_cases()
    counts, reason = _count_bytes(device)
    if not reason and len(counts) != len(cases):
        reason = f"ncu saw {len(counts)} kernels, wanted {len(cases)}"
    if reason:
        return [reading_of(case, dtype, None) for case in cases], reason
    pairs = zip(cases, counts, strict=True)
    return [reading_of(case, dtype, count) for case, count in pairs], ""


def _count_bytes(device: torch.device) -> tuple[list[int], str]:
    if device.type != "cuda":
        return [], "no GPU"
    ncu = shutil.which("ncu")
    if ncu is None:
        return [], "no ncu on the path"
    free_memory()  # the other process needs some
    try:
        done = subprocess.run(
            ncu_command(ncu), cwd=ROOT, capture_output=True, text=True, timeout=NCU_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line for line in lines if "==ERROR==" in line]
    if errors or done.returncode:
        return [], (errors or lines[-1:] or [f"ncu ended with {done.returncode}"])[0].strip()
    try:
        return parse_ncu(done.stdout), ""
    except ValueError as error:
        return [], str(error)


def ncu_command(ncu: str) -> list[str]:
    plain = ["--csv", "--print-units", "base", "--clock-control", "none"]
    wanted = ["--metrics", METRIC, "--kernel-name", f"regex:{KERNEL}"]
    this = [sys.executable, "-m", "benchmarks", "decode", "--once"]
    return [ncu, *plain, *wanted, *this]


def parse_ncu(text: str) -> list[int]:
    """The values of METRIC in the order of the kernels, out of what ncu --csv printed.

    ValueError for another unit than bytes.
    """
    table = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    values = []
    for row in table:
        if row["Metric Name"] == METRIC:
            if row["Metric Unit"] != "byte":
                raise ValueError(f"ncu gives {METRIC} in {row['Metric Unit']!r}, wanted byte")
            values.append(round(float(row["Metric Value"].replace(",", ""))))
    return values


# Models


def make_model(
    config: SparseTransformerConfig, dtype: torch.dtype, device: torch.device
) -> SparseTransformer:
    """With the weights that training begins with: every next token is equally likely."""
    with device:
        return SparseTransformer(config).to(dtype).eval()


def dense(config: SparseTransformerConfig) -> SparseTransformerConfig:
    """The same model with dense attention."""
    return replace(config, pattern="dense", composition="merged", summary_blocks=1)


def time_slice(
    model: SparseTransformer, batch: int, first: int, tokens: int, clock: Clock
) -> tuple[Slice, int]:
    """Steps after a random prompt, caches as for a whole context; and the bytes of the caches."""
    free_memory()
    config, device = model.config, clock.device
    prompt = torch.randint(config.vocab, (batch, first), device=device)
    decoder = Decoder(model, prompt, config.context - first)
    logits = decoder.logits
    for step in range(WARM_UP + tokens):
        if step == WARM_UP:
            clock.synchronize()
            begin = time.perf_counter()
        logits = decoder.step(sample(logits, 1.0, None, None, None))
    clock.synchronize()
    ms = 1e3 * (time.perf_counter() - begin) / tokens
    # The start vector has a position too.
    return Slice(1 + first + WARM_UP, tokens, ms), sum(cache.nbytes for cache in decoder.caches)


def slice_starts(context: int, tokens: int) -> list[int]:
    """Lengths of the prompts: none, half, all but what is timed. ValueError without room."""
    # The last token of a context is predicted, but not read.
    last = context - 1 - WARM_UP - tokens
    if tokens < 1 or last < 2:
        raise ValueError(
            f"tokens is {tokens}, wanted from 1 to {max(context - 3 - WARM_UP, 1)} in a context of "
            f"{context}"
        )
    return [0, last // 2, last]


def estimate(slices: Sequence[Slice], context: int) -> float:
    """Seconds of a whole context: time per token is taken as straight lines between slices."""
    middles, ms = [x.middle for x in slices], [x.ms for x in slices]
    return float(np.interp(np.arange(context) + 0.5, middles, ms).sum()) / 1e3


def run_sample(
    preset: str,
    attention: Literal["sparse", "dense"],
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    clock: Clock,
    deadline: float,
) -> Sample:
    """Slices of a preset, and a whole context if it fits before the deadline."""
    config = preset_config(preset, arguments)
    config = dense(config) if attention == "dense" else config
    batch, context = arguments.samples, config.context
    model = make_model(config, dtype, clock.device)
    timed = [
        time_slice(model, batch, start, arguments.tokens, clock)
        for start in slice_starts(context, arguments.tokens)
    ]
    slices = [x for x, _ in timed]
    estimated, whole = estimate(slices, context), None
    if time.monotonic() + estimated <= deadline:
        free_memory()
        nothing = torch.empty(batch, 0, dtype=torch.int64, device=clock.device)
        clock.synchronize()
        begin = time.perf_counter()
        model.generate(nothing, context)
        clock.synchronize()
        whole = time.perf_counter() - begin
    return Sample(
        preset,
        attention,
        config.pattern,
        _parameters(model),
        config.layers,
        context,
        batch,
        timed[0][1],
        slices,
        estimated,
        whole,
    )


def preset_config(preset: str, arguments: argparse.Namespace) -> SparseTransformerConfig:
    config: SparseTransformerConfig = getattr(presets, preset)()
    return replace(
        config,
        layers=arguments.layers or config.layers,
        context=arguments.context or config.context,
    )


def measure_models(
    decoding: Decoding,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    clock: Clock,
    console: Console,
) -> Iterator[None]:
    """Fills the samples, with a pause after each; sparse ones first, while there is time."""
    deadline = time.monotonic() + arguments.seconds
    kinds: tuple[Literal["sparse", "dense"], ...] = ("sparse", "dense")
    for attention in kinds:
        for preset in PRESETS:
            free_memory()
            try:
                row = run_sample(preset, attention, arguments, dtype, clock, deadline)
            except torch.OutOfMemoryError:
                decoding.left_out.append(f"{preset}, {attention}: out of memory")
                continue
            decoding.samples.append(row)
            how = "estimated" if row.whole_s is None else "measured"
            console.print(f"{preset}, {attention}: {row.seconds:,.1f} s ({how})")
            yield


def run_music(
    context: int, arguments: argparse.Namespace, dtype: torch.dtype, clock: Clock
) -> MusicStep:
    config = music_config(context)
    model = make_model(config, dtype, clock.device)
    last = slice_starts(context, arguments.tokens)[-1]
    timed, cache_bytes = time_slice(model, MUSIC_BATCH, last, arguments.tokens, clock)
    return MusicStep(context, config.stride, _parameters(model), cache_bytes, timed)


def music_growth(rows: Sequence[MusicStep]) -> Growth:
    """The exponent of the time per token against the context; a query has about 2 sqrt(n) keys."""
    contexts = [row.context for row in rows]
    exponent = growth_exponent(contexts, [row.last.ms for row in rows])
    limit, passed = f"<= {MOST_TOKEN_GROWTH}", exponent <= MOST_TOKEN_GROWTH
    return Growth("time per token", OURS, contexts, exponent, limit, passed)


def measure_music(
    decoding: Decoding,
    contexts: Sequence[int],
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    clock: Clock,
    console: Console,
) -> Iterator[None]:
    for context in contexts:
        row = run_music(context, arguments, dtype, clock)
        decoding.music.append(row)
        console.print(f"music, n {context:,}: {row.last.ms:.3f} ms a token")
        yield
    decoding.music_growth = music_growth(decoding.music)


def _parameters(model: SparseTransformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The command


def add_command(commands: Any) -> None:
    """Adds decode to the parser of `python -m benchmarks`."""
    decode = commands.add_parser("decode", help="generation: a step's attention, whole samples")
    add = decode.add_argument
    add("--parts", default=",".join(PARTS), help="default: %(default)s")
    add("--shortest", type=int, default=4096, help="length of attention and music")
    add("--longest", type=int, default=1 << 18, help="by factors of four up to this")
    add("--batches", default="16,1", help="of attention")
    add("--samples", type=int, default=16, help="batch of the models")
    add("--tokens", type=int, default=128, help="timed in each slice of a sample")
    add(
        "--seconds",
        type=float,
        default=120,
        help="models: whole samples are made as far as they fit",
    )
    add("--layers", type=int, help="of the models; default: the presets'")
    add("--context", type=int, help="of the models; default: the presets'")
    add("--once", action="store_true", help="one step of each pattern and no results: for ncu")
    add("--out", type=Path, default=FOLDER, help="folder of the results")
    add("--commit", help="commit to note where there is no git repository")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the command; the exit code: 0, 1 if something wanted is missed, 2 if it cannot run."""
    device, _ = pick_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if arguments.once:
        run_once(device, dtype)
        return 0
    if (reason := _no_kernels(dtype, device)) is not None:
        console.print(reason)
        return 2
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    try:
        decoding = measure(arguments, dtype, clock, console)
    except ValueError as error:
        console.print(str(error))
        return 2
    show(decoding, console)
    console.print(f"wrote {write(decoding, arguments.out)}", soft_wrap=True)
    try:
        console.print(f"wrote {draw(decoding, arguments.out)}", soft_wrap=True)
    except ImportError as error:
        console.print(f"no chart ({error}): the command show draws it where matplotlib is")
    return 0 if is_reached(decoding) else 1


def _no_kernels(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a GPU would not run the native kernels."""
    if device.type != "cuda":
        return None
    q = torch.empty(1, HEADS, 1, HEAD_DIM, dtype=dtype, device=device)
    return cuda.unsupported(q, q, q, Dense())


def measure(
    arguments: argparse.Namespace, dtype: torch.dtype, clock: Clock, console: Console
) -> Decoding:
    """All chosen parts; ValueError before anything is measured if an argument is out of range."""
    parts = [name.strip() for name in arguments.parts.split(",")]
    if not set(parts) <= set(PARTS):
        raise ValueError(f"parts are {arguments.parts!r}, wanted some of {', '.join(PARTS)}")
    ns = lengths(arguments.shortest, arguments.longest, 4)
    batches = [_positive("batches", text) for text in arguments.batches.split(",")]
    _positive("samples", arguments.samples)
    contexts = [preset_config(preset, arguments).context for preset in PRESETS]
    for context in contexts if "models" in parts else []:
        slice_starts(context, arguments.tokens)
    if "music" in parts:
        slice_starts(ns[0], arguments.tokens)
    machine = describe_machine(clock.device, arguments.commit)
    decoding = Decoding(machine, str(dtype).removeprefix("torch."), parts)
    decoding.readings_n = ONCE_LENGTH
    if "attention" in parts:
        cases = [StepCase(name, batch, n) for batch in batches for name in PATTERNS for n in ns]
        _write_each(measure_attention(decoding, cases, dtype, clock, console), decoding, arguments)
    if "bytes" in parts:
        decoding.readings, decoding.not_read = read_bytes(dtype, clock.device)
        write(decoding, arguments.out)
    if "models" in parts:
        _write_each(measure_models(decoding, arguments, dtype, clock, console), decoding, arguments)
    if "music" in parts:
        _write_each(
            measure_music(decoding, ns, arguments, dtype, clock, console), decoding, arguments
        )
    return decoding


def _write_each(rows: Iterator[None], decoding: Decoding, arguments: argparse.Namespace) -> None:
    for _ in rows:
        write(decoding, arguments.out)  # a run that is cut short leaves the rows it has


def _positive(name: str, value: str | int) -> int:
    if not str(value).strip().isdecimal() or int(value) < 1:
        raise ValueError(f"{name} has {value!r}, wanted integers from 1")
    return int(value)


def is_reached(decoding: Decoding) -> bool:
    """Whether all that is wanted of what was measured is so."""
    ratios = [x.ratio for x in decoding.readings if x.ratio is not None]
    passed = [x.passed for x in decoding.growth] + [ratio <= MOST_READ for ratio in ratios]
    return all(passed) and (decoding.music_growth is None or decoding.music_growth.passed)


# What a file says


def show(decoding: Decoding, console: Console) -> None:
    """Prints the tables."""
    machine = decoding.machine
    console.print(
        f"{machine.device} (driver {machine.driver}), torch {machine.torch}, CUDA {machine.cuda}, "
        f"{decoding.dtype}; commit {machine.commit}, {machine.date}"
    )
    _show_steps(decoding, console)
    _show_readings(decoding, console)
    _show_samples(decoding, console)
    _show_music(decoding, console)
    for line in decoding.left_out:
        console.print(f"left out: {line}", markup=False)


def _verdict(passed: bool) -> str:
    return "met" if passed else "NOT MET"


def _print_table(
    console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]], texts: int
) -> None:
    """The first columns are text, the others numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < texts else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_steps(decoding: Decoding, console: Console) -> None:
    for batch in dict.fromkeys(step.batch for step in decoding.steps):
        rows = [step for step in decoding.steps if step.batch == batch]
        title = f"a step's attention, batch {batch}, heads {decoding.heads}, "
        title += f"head dim {decoding.head_dim}"
        names = ("pattern", "n", "keys", "MB needed", "us", "least - greatest", "GB/s", "of a copy")
        _print_table(console, title, names, [_step_cells(x, decoding.rates) for x in rows], 1)
        if any(not step.cold for step in rows):
            console.print("*: caches small enough to stay in the L2 cache, or on a CPU")
        for growth in decoding.growth:
            if growth.batch == batch:
                console.print(f"{growth.pattern}: {_growth_text(growth)}", markup=False)


def _step_cells(step: Step, rates: Rates | None) -> tuple[str, ...]:
    share = "" if rates is None else f"{1e9 * step.gb_per_s / rates.copy_bytes_per_s:.2f}"
    return (
        step.pattern,
        f"{step.n:,}",
        f"{step.keys:,}",
        f"{step.bytes / 1e6:,.3f}",
        f"{step.us:,.2f}",
        f"{step.us_min:,.2f} - {step.us_max:,.2f}",
        f"{step.gb_per_s:,.0f}{'' if step.cold else '*'}",
        share,
    )


def _growth_text(growth: KeyGrowth) -> str:
    wanted = f"(wanted {growth.limit}, {_verdict(growth.passed)})"
    if growth.exponent is None:
        return f"time per key at most {growth.ratio:.2f}x that of the shortest n {wanted}"
    return f"time grows as keys^{growth.exponent:.2f} {wanted}"


def _show_readings(decoding: Decoding, console: Console) -> None:
    if not decoding.readings:
        return
    title = f"bytes read from memory by one step, batch 1, n {decoding.readings_n:,}"
    names = ("pattern", "keys", "needed", "read", "read / needed", f"wanted <= {MOST_READ:g}")
    rows = []
    for x in decoding.readings:
        measured = x.bytes_read is not None and x.ratio is not None
        row = [x.pattern, f"{x.keys:,}", f"{x.bytes_needed:,}"]
        row.append(f"{x.bytes_read:,}" if measured else "not measured")
        row += [f"{x.ratio:.2f}", _verdict((x.ratio or 0) <= MOST_READ)] if measured else ["", ""]
        rows.append(row)
    _print_table(console, title, names, rows, 1)
    if decoding.not_read:
        console.print(f"bytes read were not measured: {decoding.not_read}", markup=False)


def _show_samples(decoding: Decoding, console: Console) -> None:
    if not decoding.samples:
        return
    names = ["preset", "attention", "how", "context", "batch", "seconds", "ms a token"]
    names += ["tokens/s", "cache GB", "ms at start", "middle", "end", "estimate, s"]
    rows = []
    for x in _by_preset(decoding.samples):
        row = [x.preset, x.attention if x.attention == "dense" else x.pattern]
        row.append("estimated" if x.whole_s is None else "whole")
        row += [f"{x.context:,}", f"{x.batch}", f"{x.seconds:,.1f}", f"{x.ms_per_token:.3f}"]
        row += [f"{x.tokens_per_s:,.0f}", f"{x.cache_bytes / 1e9:.2f}"]
        row += [f"{part.ms:.3f}" for part in x.slices]
        rows.append([*row, f"{x.estimate_s:,.1f}"])
    _print_table(console, "samples, random weights", names, rows, 3)


def _by_preset(rows: Sequence[Sample]) -> list[Sample]:
    return sorted(rows, key=lambda row: row.preset)


def _show_music(decoding: Decoding, console: Console) -> None:
    if not decoding.music:
        return
    names = ("n", "stride", "ms a token", "tokens/s", "cache GB")
    rows = [
        (
            f"{x.context:,}",
            f"{x.stride:,}",
            f"{x.last.ms:.3f}",
            f"{1e3 / x.last.ms:,.0f}",
            f"{x.cache_bytes / 1e9:.3f}",
        )
        for x in decoding.music
    ]
    title = f"tokens at the end of n, 3M music preset, batch {MUSIC_BATCH}"
    _print_table(console, title, names, rows, 0)
    if (growth := decoding.music_growth) is not None:
        verdict = _verdict(growth.passed)
        console.print(f"{growth.name}: n^{growth.exponent:.2f} (wanted {growth.limit}, {verdict})")


def draw(decoding: Decoding, folder: Path) -> Path:
    """Writes the chart beside the results, as PNG: a panel for every part that was measured."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = []
    for batch in dict.fromkeys(step.batch for step in decoding.steps):
        rows = [step for step in decoding.steps if step.batch == batch]
        panels.append(partial(_steps_panel, rows=rows))
    if any(x.ratio is not None for x in decoding.readings):
        panels.append(partial(_readings_panel, decoding=decoding))
    if decoding.samples:
        panels.append(partial(_samples_panel, rows=_by_preset(decoding.samples)))
    if decoding.music:
        panels.append(partial(_music_panel, rows=decoding.music))
    columns = min(max(len(panels), 1), 3)
    rows_of_panels = -(-len(panels) // columns)
    size = (5.2 * columns, 4.2 * max(rows_of_panels, 1))
    figure = Figure(figsize=size, layout="constrained")
    for number, panel in enumerate(panels):
        panel(figure.add_subplot(rows_of_panels, columns, number + 1))
    figure.suptitle(f"{decoding.machine.device}, {decoding.dtype}")
    path = (folder / file_name(decoding.kind, decoding.machine)).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _steps_panel(axes: Axes, rows: Sequence[Step]) -> None:
    for pattern in dict.fromkeys(row.pattern for row in rows):
        found = [row for row in rows if row.pattern == pattern]
        axes.loglog([x.n for x in found], [x.us for x in found], marker="o", label=pattern)
    _length_axis(axes, sorted({row.n for row in rows}))
    axes.set_ylabel("us")
    axes.set_title(f"a step's attention, batch {rows[0].batch}", size=10)
    axes.legend(fontsize=7)


def _readings_panel(axes: Axes, decoding: Decoding) -> None:
    rows = decoding.readings
    axes.barh([x.pattern for x in rows], [x.ratio or 0 for x in rows], color="#1f77b4")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(MOST_READ, color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("bytes read / needed (dashed: wanted at most)")
    axes.set_title(f"one step from memory, n {decoding.readings_n:,}", size=10)


def _samples_panel(axes: Axes, rows: Sequence[Sample]) -> None:
    names = [f"{row.preset}\n{row.attention}" for row in rows]
    colours = ["#d62728" if row.attention == "dense" else "#1f77b4" for row in rows]
    axes.barh(names, [row.ms_per_token for row in rows], color=colours)
    for place, row in enumerate(rows):
        how = ", estimated" if row.whole_s is None else ""
        axes.text(0, place, f" {row.seconds:,.1f} s{how}", va="center", size=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms a token")
    axes.set_title(f"whole samples, batch {rows[0].batch}", size=10)


def _music_panel(axes: Axes, rows: Sequence[MusicStep]) -> None:
    contexts, first = [row.context for row in rows], rows[0]
    root = [first.last.ms * math.sqrt(n / first.context) for n in contexts]
    axes.semilogx(contexts, root, "k--", label="sqrt(n)")
    axes.semilogx(contexts, [row.last.ms for row in rows], marker="o", label="token")
    _length_axis(axes, contexts)
    axes.set_ylim(0)
    axes.set_ylabel("ms a token")
    axes.set_title(f"3M music preset, batch {MUSIC_BATCH}", size=10)
    axes.legend(fontsize=8)


def _length_axis(axes: Axes, ns: Sequence[int]) -> None:
    axes.set_xticks(ns, [f"{n:,}" for n in ns], size=7)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("n")
