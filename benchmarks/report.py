# SPDX-License-Identifier: Apache-2.0
"""What a results file says: tables, charts, the README's rows, and ratios to older results."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .results import FOLDER, OURS, ROOT, Entry, Results, Row, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

README = ROOT / "README.md"
BEGIN, END = "<!-- speed: written by python -m benchmarks readme -->", "<!-- end of speed -->"
NOT_MEASURED = "Nothing measured yet: `make bench` on a machine with a GPU does it."
# The README's rows, and the times within which two peers tie.
README_TABLE = "d64"
README_WIDTH = 120
TIE = 1.03

METHOD = """\
Time: median of five rounds in which the competitors of a row take turns, the order reversed every
other round; a round is the median of up to 50 calls, each between two CUDA events, queued before
the GPU starts; least and greatest round beside it. Inputs are normal random data in sets that
together exceed three L2 caches. Forward is timed as in training (inputs require grad), backward
alone with its graph kept. Compilation and BlockMask are not in the times: `first call` and
`BlockMask` say what they took; BlockMasks are built in strips, which is cheaper than
create_block_mask. Tensors are in (batch, heads, seq, dim) memory; those of all competitors in
(batch, seq, heads, dim) memory where a table says 'tokens first'. 'view': the dense kernel on a
zero-copy view of chunks or residues, tokens first. 'dense, 4 x batch 1': what attention without
sparsity takes. 'deterministic': with the option that gives the same bits in every call, as ours
always does.
Floor: the longer of moving every tensor once at the copy bandwidth (bytes read + written) and of
computing the products of attended pairs alone at the rate of an 8192^3 matrix product, both
measured in the same run; backward moves twice the forward's bytes and takes 2.5 times its products.
TFLOP/s counts attended pairs alone, GB/s each tensor once. Peak: most memory held beyond what was
there before the pass, results included. Before it is timed every result is checked on sampled rows
(out, dq) and keys (dk, dv) against the pattern's definition in fp64, with the tolerance of
CONTRIBUTING.md; one that misses it is 'wrong' and gets no time. On a CPU: fp32, forward without
gradients, three rounds by the host's clock, the product 1024^3, the stride sqrt(n)."""


def show(results: Results, console: Console) -> None:
    """Prints the tables of a results file, and the method."""
    from rich.table import Table

    machine, rates = results.machine, results.rates
    console.print(
        f"{machine.device} (driver {machine.driver}), torch {machine.torch}, CUDA {machine.cuda}, "
        f"Python {machine.python}; commit {machine.commit}, {machine.date}"
    )
    console.print(
        f"copy {rates.copy_bytes_per_s / 1e12:.3g} TB/s, "
        f"matrix product {rates.matmul_flops_per_s / 1e12:.3g} TFLOP/s"
    )
    for title, rows in _tables(results.rows):
        table = Table(title=title, title_justify="left")
        for name in ("pattern", "peer", "ms", "least - greatest", "x floor", "TFLOP/s", "GB/s"):
            table.add_column(name, justify="left" if name in ("pattern", "peer") else "right")
        table.add_column("peak MB", justify="right")
        table.add_column("first call, BlockMask s", justify="right")
        table.add_column("note")
        for row in rows:
            table.add_section()
            for number, entry in enumerate(row.entries):
                name = f"{row.name} ({row.floor_ms:.3f})" if number == 0 else ""
                table.add_row(name, *_cells(row, entry))
        console.print(table)
    for host in results.host:
        took = host.reason if host.us is None else f"{host.us:.1f} us"
        console.print(f"host time of a call, {host.mode}: {host.call} {took}")
    for growth in results.growth:
        verdict = "" if not growth.limit else ", met" if growth.passed else ", NOT MET"
        limit = f" (wanted {growth.limit}{verdict})" if growth.limit else ""
        console.print(f"growth of {growth.peer}, {growth.name}: n^{growth.exponent:.2f}{limit}")
    console.print(METHOD, style="dim", highlight=False)


def _tables(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one table, direction and shape together, with a title."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        dims = f"{row.head_dim}" + (f"/{row.head_dim_v}" if row.head_dim_v != row.head_dim else "")
        title = (
            f"{row.table}, {row.direction}: batch {row.batch}, heads {row.heads}, n {row.seq:,}, "
            f"head dim {dims}, {row.dtype}; floor in ms beside the pattern"
        )
        tables.setdefault(title, []).append(row)
    return list(tables.items())


def _cells(row: Row, entry: Entry) -> list[str]:
    name = entry.peer
    peak = "" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:,.0f}"
    seconds = [f"{x:.1f}" for x in (entry.first_call_s, entry.block_mask_s) if x is not None]
    note = ", ".join(x for x in (entry.note, entry.reason) if x)
    if entry.ms is None or entry.ms_min is None or entry.ms_max is None:
        return [name, entry.status, "", "", "", "", peak, ", ".join(seconds), note]
    return [
        name,
        f"{entry.ms:.3f}",
        f"{entry.ms_min:.3f} - {entry.ms_max:.3f}",
        f"{row.times_floor(entry):.2f}",
        f"{row.flops / entry.ms / 1e9:#.3g}",
        f"{row.bytes / entry.ms / 1e6:#.3g}",
        peak,
        ", ".join(seconds),
        note,
    ]


def compare(old: Results, new: Results, console: Console) -> None:
    """Prints new / old of every time that both have."""
    from rich.table import Table

    table = Table(title="new / old: below 1 is faster", title_justify="left")
    for name in ("row", "direction", "peer", "old ms", "new ms", "ratio"):
        table.add_column(name, justify="right" if name in ("old ms", "new ms", "ratio") else "left")
    for row, peer, before, after in _ratios(old, new):
        cells = (f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}")
        table.add_row(f"{row.table} {row.name}, n {row.seq:,}", row.direction, peer, *cells)
    console.print(table)


def _ratios(old: Results, new: Results) -> list[tuple[Row, str, float, float]]:
    before = {(row.key, entry.peer): entry.ms for row in old.rows for entry in row.entries}
    found = []
    for row in new.rows:
        for entry in row.entries:
            ms = before.get((row.key, entry.peer))
            if ms is not None and entry.ms is not None:
                found.append((row, entry.peer, ms, entry.ms))
    return found


def readme_section(results: Results | None) -> str:
    """What stands between the README's markers."""
    if results is None:
        return NOT_MEASURED
    rows = {row.key: row for row in results.rows if row.table == README_TABLE}
    forwards = [row for row in rows.values() if row.direction == "forward"]
    first = forwards[0]
    head = (
        f"{results.machine.device}, torch {results.machine.torch}, {first.dtype}, batch "
        f"{first.batch}, heads {first.heads}, n {first.seq:,}, head dim {first.head_dim}: ms "
        "(times the least that its bytes and flops take), and the fastest other that was right."
    )
    lines = [
        textwrap.fill(head, README_WIDTH, break_on_hyphens=False),
        "",
        "| pattern | forward | fastest other | backward | fastest other |",
        "|---|---|---|---|---|",
    ]
    for row in forwards:
        backward = rows.get((row.table, row.name, row.seq, "backward"))
        cells = [*_readme_cells(row), *(_readme_cells(backward) if backward else ("", ""))]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    source = (
        "`make bench` measures this and more ([method](benchmarks/report.py), "
        f"[results](benchmarks/results)); commit {results.machine.commit[:10]}, "
        f"{results.machine.date[:10]}."
    )
    lines += ["", textwrap.fill(source, README_WIDTH, break_on_hyphens=False)]
    return "\n".join(lines)


def _readme_cells(row: Row) -> tuple[str, str]:
    """Ours, in bold where it wins or ties, and the fastest other."""
    ours, other = row.entry(OURS), row.fastest_peer()
    peer = "" if other is None else f"{other.ms:.3f} {other.peer}"
    if other is not None and other.note:
        peer += f" ({other.note})"
    if ours is None or ours.ms is None:
        return ("" if ours is None else ours.status), peer
    cell = f"{ours.ms:.3f}"
    if other is None or other.ms is None or ours.ms <= TIE * other.ms:
        cell = f"**{cell}**"
    return f"{cell} ({row.times_floor(ours):.2f}x)", peer


def with_section(text: str, section: str) -> str:
    """The README with a section between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN!r} and {END!r} in the README")
    return f"{before}{begin}\n{section}\n{end}{after}"


def generated_readme(readme: Path = README, folder: Path = FOLDER) -> str:
    """The README as the newest results in a folder make it."""
    return with_section(readme.read_text(), readme_section(latest("run", folder)))


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the charts of a results file beside it, as PNG."""
    stem = Path(results.file_name).stem
    if results.kind == "run":
        figures = {
            f"{stem}-{direction}": _bars(results, direction)
            for direction in ("forward", "backward")
        }
    else:
        figures = {f"{stem}-time": _lines(results)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


COLOUR_OF_OURS, OTHER = "#1f77b4", "#90a4ae"
COLOURS_OF_OTHERS = ("#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def _bars(results: Results, direction: str) -> Figure:
    """Times the floor, ours and the fastest other, a pair of bars for each row."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.direction == direction]
    figure = Figure(figsize=(9, 1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        pairs = ((row.entry(OURS), -0.2, COLOUR_OF_OURS), (row.fastest_peer(), 0.2, OTHER))
        for entry, shift, colour in pairs:
            if entry is None or entry.ms is None:
                continue
            height = entry.ms / row.floor_ms
            axes.barh(place + shift, height, 0.38, color=colour)
            axes.text(height, place + shift, f" {height:.2f} {entry.peer}", va="center", size=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row.name}, {row.table}" for row in rows], size=8)
    axes.set_xscale("log")
    axes.set_xlim(0.9, 2 * axes.get_xlim()[1])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time / floor (log scale)")
    axes.set_title(f"{direction}: sparse_attn and the fastest other; {results.machine.device}")
    return figure


def _lines(results: Results) -> Figure:
    """Time against n, log-log, with the floor; a panel for each pattern and direction."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        panels.setdefault((row.name, row.direction), []).append(row)
    across = len({name for name, _ in panels})
    down = len({direction for _, direction in panels})
    figure = Figure(figsize=(4.6 * across, 4.2 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    names = list(dict.fromkeys(name for name, _ in panels))
    directions = list(dict.fromkeys(direction for _, direction in panels))
    for (name, direction), rows in panels.items():
        _time_panel(
            grid[directions.index(direction), names.index(name)], f"{name}, {direction}", rows
        )
    figure.suptitle(results.machine.device)
    return figure


def _time_panel(axes: Axes, title: str, rows: list[Row]) -> None:
    axes.set_prop_cycle(color=COLOURS_OF_OTHERS)
    axes.loglog([row.seq for row in rows], [row.floor_ms for row in rows], "k--", label="floor")
    for peer in dict.fromkeys(entry.peer for row in rows for entry in row.entries):
        found = [(row, row.entry(peer)) for row in rows]
        points = [(row.seq, entry.ms) for row, entry in found if entry and entry.ms is not None]
        if points:
            style = {"color": COLOUR_OF_OURS, "linewidth": 2.5} if peer == OURS else {}
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=peer, **style)  # type: ignore[arg-type]
    axes.set_title(title, size=10)
    lengths = sorted({row.seq for row in rows})
    axes.set_xticks(
        lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths], size=7
    )
    axes.minorticks_off()
    axes.set_xlabel("n")
    axes.set_ylabel("ms")
    axes.legend(fontsize=7)
