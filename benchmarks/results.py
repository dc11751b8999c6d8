# SPDX-License-Identifier: Apache-2.0
"""The results file: what was measured, where and when. JSON; these classes are its schema."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from .cases import Case
from .floors import Direction, Rates, work

SCHEMA = 1
ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("sparse-attn", "triton", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu13")

Kind = Literal["run", "sweep", "cpu"]
# "wrong": missed the tolerance, not timed. "missing": not installed. "not run": reason says why.
Status = Literal["ok", "wrong", "failed", "missing", "not run"]


@dataclass
class Entry:
    """One peer in a row."""

    peer: str
    status: Status
    reason: str = ""
    note: str = ""
    ms: float | None = None  # median
    ms_min: float | None = None
    ms_max: float | None = None
    error_share: float | None = None  # of what the tolerance allows
    first_call_s: float | None = None  # with compilation, where there is one
    block_mask_s: float | None = None
    peak_bytes: int | None = None  # beyond what was held before the pass


@dataclass
class Row:
    table: str
    name: str
    pattern: str
    batch: int
    heads: int
    seq: int
    head_dim: int
    head_dim_v: int
    dtype: str
    direction: Direction
    pairs: int
    bytes: int
    flops: int
    floor_ms: float
    entries: list[Entry]

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.table, self.name, self.seq, self.direction

    def entry(self, peer: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.peer == peer), None)

    def times_floor(self, entry: Entry) -> float | None:
        return None if entry.ms is None else entry.ms / self.floor_ms

    def fastest_peer(self) -> Entry | None:
        """The fastest right result that is not ours."""
        peers = [x for x in self.entries if x.ms is not None and x.peer != OURS]
        return min(peers, key=lambda x: x.ms or 0, default=None)


OURS = "sparse_attn"


HostMode = Literal["eager", "eager, with gradients", "compiled"]


@dataclass
class HostTime:
    """Time until a call returns to the host."""

    call: str
    mode: HostMode
    us: float | None
    reason: str = ""


@dataclass
class Growth:
    """time = c * n^exponent over the rows of a name."""

    name: str
    peer: str
    lengths: list[int]
    exponent: float
    limit: str  # such as "<= 1.6"; empty if there is none
    passed: bool


@dataclass
class Machine:
    device: str
    driver: str
    torch: str
    cuda: str
    cudnn: str
    python: str
    processor: str
    threads: int
    packages: dict[str, str]
    commit: str
    date: str


@dataclass
class Results:
    kind: Kind
    machine: Machine
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    host: list[HostTime] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @property
    def file_name(self) -> str:
        return file_name(self.kind, self.machine)


def file_name(kind: str, machine: Machine) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    return f"{kind}-{device}.json"


def read(path: Path) -> Results:
    """The results in a file; ValueError says where it does not keep to the schema."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path} does not hold results of schema {SCHEMA}")
    results = _build(Results, document, path.name)
    assert isinstance(results, Results)
    return results


def _build(kind: Any, value: Any, where: str) -> Any:
    """The value as what a type annotation says; ValueError if it is something else."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {x.name for x in dataclasses.fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            got = sorted(set(value) ^ names) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: fields differ from {kind.__name__}'s: {got}")
        return kind(**{name: _build(hints[name], value[name], f"{where}.{name}") for name in names})
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _build(arguments[1], x, f"{where}.{name}") for name, x in value.items()}
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _build(next(x for x in arguments if x is not type(None)), value, where)
    fits = value in arguments if origin is Literal else _is(kind, value)
    if not fits:
        raise ValueError(f"{where}: {value!r} is no {kind}")
    return value


def _is(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def latest(kind: Kind, folder: Path = FOLDER) -> Results | None:
    """The newest results of a kind in a folder, or None."""
    found = [results for results in _all(folder) if results.kind == kind]
    return max(found, key=lambda results: results.machine.date, default=None)


def _all(folder: Path) -> Iterator[Results]:
    for path in sorted(folder.glob("*.json")):
        yield read(path)


def row_of(case: Case, direction: Direction, rates: Rates) -> Row:
    """A row with its work and floor, and no entries yet."""
    done = work(case, direction)
    return Row(
        case.table,
        case.name,
        repr(case.pattern),
        case.batch,
        case.heads,
        case.seq,
        case.head_dim,
        case.head_dim_v,
        str(case.dtype).removeprefix("torch."),
        direction,
        done.pairs,
        done.bytes,
        done.flops,
        done.floor_ms(rates),
        [],
    )


def describe_machine(device: torch.device, commit: str | None = None) -> Machine:
    """What the figures depend on."""
    is_gpu = device.type == "cuda"
    driver = "none"
    if is_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _output(query).splitlines()[0] if _output(query) else "unknown"
    return Machine(
        device=torch.cuda.get_device_name(device) if is_gpu else _processor(),
        driver=driver,
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        cudnn=str(torch.backends.cudnn.version() or "none"),
        python=platform.python_version(),
        processor=_processor(),
        threads=torch.get_num_threads(),
        packages={name: _version(name) for name in PACKAGES},
        commit=commit or _commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _commit() -> str:
    """The commit, with a + if files differ from it."""
    commit = _output(["git", "rev-parse", "HEAD"])
    # Results themselves do not count.
    changed = _output(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return (commit + ("+" if changed else "")) or "unknown"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
