# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: measure, compare, draw; `--help` lists what there is."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch._functorch import config as functorch_config

from . import cases, decoding, experiments, peers, report, run, timing
from .results import FOLDER, OURS, Growth, Kind, Results, describe_machine, read

# The most that strided and fixed may grow at a stride of sqrt(n), and the least of dense.
MOST_GROWTH, LEAST_DENSE_GROWTH = 1.6, 1.9
DENSE = "sdpa mask"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 if something measured is not as it should be."""
    arguments = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.command == "compare":
        report.compare(read(arguments.old), read(arguments.new), console)
        return 0
    if arguments.command in experiments.KINDS:
        return experiments.main(arguments, console)
    if arguments.command == "decode":
        return decoding.main(arguments, console)
    if arguments.command == "show" and arguments.file.name.startswith("decode-"):
        found = decoding.read(arguments.file)
        decoding.show(found, console)
        console.print(f"wrote {decoding.draw(found, arguments.file.parent)}")
        return 0
    if arguments.command == "show" and arguments.file.name.startswith(tuple(experiments.KINDS)):
        experiment = experiments.read(arguments.file)
        experiments.show(experiment, console)
        console.print(f"wrote {experiments.draw(experiment, arguments.file.parent)}")
        return 0
    if arguments.command == "show":
        results = read(arguments.file)
        report.show(results, console)
        _draw(results, arguments.file.parent, console)
        return 0
    if arguments.command in ("readme", "check"):
        return _readme(arguments.command == "check", console)
    return _measure(arguments, console)


def _readme(only_check: bool, console: Console) -> int:
    text = report.generated_readme()
    if text == report.README.read_text():
        return 0
    if only_check:
        console.print("README.md's speed rows are not those of the results: run the command readme")
        return 1
    report.README.write_text(text)
    return 0


def _measure(arguments: argparse.Namespace, console: Console) -> int:
    kind: Kind = "cpu" if arguments.cpu else arguments.command or "run"
    if kind != "cpu" and not torch.cuda.is_available():
        console.print("no GPU that torch can use; --cpu measures the torch backend")
        return 2
    try:
        chosen = _cases(kind, arguments.longest, _names(arguments.tables))
        named = _names(arguments.peers)
        competitors = _peers(kind, named)
    except ValueError as error:
        console.print(str(error))
        return 2
    # Backward passes run many times on one graph, whose tensors they must not reuse.
    functorch_config.donated_buffer = False
    # Interpreter, rates, tables and charts take the rest of the minutes.
    cap_ms = arguments.cap_ms or (math.inf if kind == "cpu" else 1000)
    limits = run.Limits(60 * arguments.minutes - 20, cap_ms, named)
    clock: timing.Clock = timing.CpuClock() if kind == "cpu" else timing.CudaClock()
    rates = timing.measure_rates(clock, *((1 << 28, 1024) if kind == "cpu" else ()))
    results = Results(kind, describe_machine(clock.device, arguments.commit), rates)
    path = arguments.out / results.file_name
    if kind == "run":
        results.host = run.host_times(clock)
    for case in chosen:
        begun = time.monotonic()
        backward, rounds = (False, 3) if kind == "cpu" else (True, timing.ROUNDS)
        results.rows += run.run_row(case, competitors, clock, rates, limits, backward, rounds)
        if kind == "sweep":  # measured in another order
            results.rows.sort(key=lambda row: row.seq)
        seconds = time.monotonic() - begun
        console.print(f"{case.table} {case.name}, n {case.seq:,}: measured in {seconds:.1f} s")
        # A run that is cut short leaves the rows it has.
        results.write(path)
    if kind == "cpu":
        results.growth = growth(results)
        results.write(path)
    report.show(results, console)
    console.print(f"wrote {path}")
    _draw(results, arguments.out, console)
    return 0 if is_right(results) else 1


def _draw(results: Results, folder: Path, console: Console) -> None:
    try:
        paths = report.draw(results, folder)
    except ImportError as error:
        console.print(f"no charts ({error}): the command show draws them where matplotlib is")
        return
    for path in paths:
        console.print(f"wrote {path}")


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _cases(kind: Kind, longest: int | None, tables: frozenset[str]) -> list[cases.Case]:
    """The rows of a kind of run, those of some tables if any are named."""
    if kind == "sweep":
        return cases.sweep_cases(last=longest or 1 << 20)
    if kind == "cpu":
        last = longest or 16384
        return cases.cpu_cases([last >> octave for octave in (3, 2, 1, 0)])
    every = cases.run_cases()
    unknown = tables - {case.table for case in every}
    if unknown:
        raise ValueError(f"no table {', '.join(unknown)}")
    return [case for case in every if not tables or case.table in tables]


def _peers(kind: Kind, named: frozenset[str]) -> list[peers.Peer]:
    """Ours and all others, or those named."""
    every = peers.cpu_peers() if kind == "cpu" else peers.gpu_peers()
    if kind == "sweep":
        every.append(peers.Masked())
    if not named <= {peer.name for peer in every}:
        raise ValueError(f"peers are: {', '.join(peer.name for peer in every)}")
    return [peer for peer in every if not named or peer.name in named | {OURS}]


def growth(results: Results) -> list[Growth]:
    """The growth exponent of each peer and pattern, and whether it is as the paper promises."""
    found = []
    for name in dict.fromkeys(row.name for row in results.rows):
        rows = [row for row in results.rows if row.name == name and row.direction == "forward"]
        for peer in dict.fromkeys(entry.peer for row in rows for entry in row.entries):
            times = {row.seq: entry.ms for row in rows if (entry := row.entry(peer))}
            points = {n: ms for n, ms in times.items() if ms is not None}
            if len(points) < 2:
                continue
            exponent = timing.growth_exponent(list(points), list(points.values()))
            passed, limit = True, ""
            if peer == OURS:
                passed, limit = exponent <= MOST_GROWTH, f"<= {MOST_GROWTH}"
            elif peer == DENSE:
                passed, limit = exponent >= LEAST_DENSE_GROWTH, f">= {LEAST_DENSE_GROWTH}"
            found.append(Growth(name, peer, list(points), exponent, limit, passed))
    return found


def is_right(results: Results) -> bool:
    """Whether ours ran everywhere and was right, and grew as promised."""
    ours = [row.entry(OURS) for row in results.rows]
    all_ran = all(entry is not None and entry.status in ("ok", "not run") for entry in ours)
    return all_ran and all(line.passed for line in results.growth)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="n from 2,048 to 1,048,576")
    for each in (parser, sweep):
        each.add_argument("--minutes", type=float, default=8, help="then no row is begun")
        each.add_argument("--peers", default="", help="names, separated by commas; default: all")
        each.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
        each.add_argument("--commit", help="commit to note where there is no git repository")
        each.add_argument("--longest", type=int, help="the largest n of a sweep or of --cpu")
        each.add_argument("--cap-ms", type=float, help="longest call to begin (GPU: 1000)")
    parser.add_argument("--cpu", action="store_true", help="the torch backend, on this machine")
    tables = "d64, d128, blocks, d64 tokens first, d128 tokens first, other, memory, long"
    parser.add_argument("--tables", default="", help=tables)
    sweep.set_defaults(cpu=False, tables="")
    experiments.add_commands(commands)
    decoding.add_command(commands)
    comparison = commands.add_parser("compare", help="ratios of two results files")
    comparison.add_argument("old", type=Path)
    comparison.add_argument("new", type=Path)
    commands.add_parser("show", help="tables and charts of a results file").add_argument(
        "file", type=Path
    )
    commands.add_parser("readme", help="write the README's speed rows from the newest results")
    commands.add_parser("check", help="fail unless the README's speed rows are current")
    return parser


if __name__ == "__main__":
    sys.exit(main())
