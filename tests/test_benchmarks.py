# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: its arithmetic, its checks, its files, and that it drops no peer."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import oracle
import sparse_attn as sa
from benchmarks import __main__ as command
from benchmarks import cases, checks, floors, peers, report, results, run, timing, views
from benchmarks.cases import Case
from benchmarks.floors import Direction, Rates
from benchmarks.results import Entry, Machine, Results

RATES = Rates(copy_bytes_per_s=3.00e12, matmul_flops_per_s=752e12)
CPU = torch.device("cpu")
PATTERNS: dict[str, sa.Pattern] = {
    "dense": sa.Dense(),
    "local": sa.Local(7),
    "chunk": sa.Chunk(12),
    "dilated": sa.Dilated(8),
    "summary": sa.Summary(8, 3, 2),
    "strided": sa.Strided(8),
    "fixed": sa.Fixed(8, 2),
    "two ways": sa.Local(5, causal=False) | sa.Dilated(6, causal=False),
}
if hasattr(sa, "BlockSparse"):
    PATTERNS["blocks"] = cases.block_sparse(cases.random_layout(3, 0.7), 16)


def small(pattern: sa.Pattern, n: int = 48, dtype: torch.dtype = torch.float32) -> Case:
    return Case("d64", "small", pattern, 2, 3, n, 8, 16, dtype)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_relation_is_the_mask(name: str) -> None:
    for n in (48, 37, 1):
        if name == "blocks" and n != 48:
            continue
        token = torch.arange(n)
        seen = checks.relation(PATTERNS[name])(token[:, None], token[None])
        assert torch.equal(seen, PATTERNS[name].mask(n)), n


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_bytes_and_flops_by_counting(name: str) -> None:
    case = small(PATTERNS[name], dtype=torch.float16)
    pairs = forward_flops = backward_flops = 0
    for _ in range(case.batch * case.heads):
        seen = int(case.pattern.mask(case.seq).sum())
        pairs += seen
        # Scores and outputs; scores, dweights, dv, dq and dk.
        forward_flops += seen * 2 * 8 + seen * 2 * 16
        backward_flops += seen * 2 * 8 + 2 * (seen * 2 * 16) + 2 * (seen * 2 * 8)
    q, k, v, dout = run.Inputs.of(case, CPU, needs_grad=True).sets[0]
    out = q.new_empty(*q.shape[:3], 16)
    read_and_written = sum(x.nbytes for x in (q, k, v, out))
    assert floors.work(case, "forward") == floors.Work(pairs, read_and_written, forward_flops)
    read_and_written += sum(x.nbytes for x in (dout, q, k, v))
    assert floors.work(case, "backward") == floors.Work(pairs, read_and_written, backward_flops)


def test_the_floor_is_the_longer_of_bytes_and_flops() -> None:
    work = floors.Work(pairs=1, bytes=6_000_000, flops=20_000_000)
    assert work.floor_ms(Rates(1e9, 1e9)) == pytest.approx(20)
    assert work.floor_ms(Rates(1e8, 1e9)) == pytest.approx(60)


@pytest.mark.parametrize(
    ("table", "name", "forward", "backward"),
    [
        ("d64", "Local(128)", 0.134, 0.268),
        ("d64", "Fixed(128, 32)", 0.424, 1.06),
        ("d64", "Local(1024)", 0.263, 0.657),
        ("d64", "Dense, batch 1", 0.411, 1.03),
        ("d128", "Strided(128)", 0.358, 0.715),
        ("d128", "Dense, batch 1", 1.46, 3.66),
        ("long", "Strided(1024)", 2.19, 5.48),
    ],
)
def test_floors_worked_out_by_hand(table: str, name: str, forward: float, backward: float) -> None:
    (case,) = [x for x in cases.run_cases() if (x.table, x.name) == (table, name)]
    assert floors.work(case, "forward").floor_ms(RATES) == pytest.approx(forward, rel=0.005)
    assert floors.work(case, "backward").floor_ms(RATES) == pytest.approx(backward, rel=0.005)


@pytest.mark.parametrize("density", cases.DENSITIES)
def test_layouts_have_their_density(density: float) -> None:
    layout = cases.random_layout(96, density)[0]
    assert layout.diagonal().all() and not layout.triu(1).any()
    assert int(layout.sum()) == pytest.approx(density * 96 * 97 / 2, abs=1)


@pytest.mark.parametrize("name", PATTERNS)
def test_sampled_rows_are_those_of_the_oracle(name: str) -> None:
    case = small(PATTERNS[name], dtype=torch.float64)
    q, k, v, dout = run.Inputs.of(case, CPU, needs_grad=False).sets[0]
    reference = checks.Reference(case, q, k, v, dout)
    exact = oracle.attention(q, k, v, [case.pattern.mask(case.seq)] * 3, dout=dout)
    assert len(reference.keys) > 2 and len(reference.queries) > 20
    for key in reference.names:
        places = reference.queries if key in ("out", "dq") else reference.keys
        wanted = torch.stack([getattr(exact, key)[head][places] for head in reference.heads])
        torch.testing.assert_close(reference.exact[key], wanted, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Fake:
    """A peer that computes what it is told."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    compiles: bool = False
    has_backward: bool = True

    def serves(self, case: Case) -> bool:
        return True

    def prepare(self, case: Case, device: torch.device) -> peers.Prepared:
        return peers.Prepared(self.attend, case, has_backward=self.has_backward)


class WrongGradient(torch.autograd.Function):
    """Attention whose dk lacks one of a thousand parts."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return sa.attention(q, k, v, sa.Local(7))

    @staticmethod
    def backward(ctx: Any, *dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = sa.attention(q, k, v, sa.Local(7))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout[0])
        return dq, 0.999 * dk, dv


def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this shape\nand a long story")


def rows_of(*competitors: peers.Peer, backward: bool = True) -> dict[Direction, results.Row]:
    rows = run.run_row(
        small(sa.Local(7)),
        [peers.Ours("torch"), *competitors],
        timing.CpuClock(),
        RATES,
        run.Limits(),
        backward,
        rounds=2,
        round_ms=0.1,
    )
    return {row.direction: row for row in rows}


def entry_of(row: results.Row, peer: str) -> Entry:
    entry = row.entry(peer)
    assert entry is not None
    return entry


def test_a_wrong_peer_is_caught_and_gets_no_time() -> None:
    rows = rows_of(
        Fake("a key more", lambda q, k, v: sa.attention(q, k, v, sa.Local(8))),
        Fake("nan", lambda q, k, v: sa.attention(q, k, v, sa.Local(7)) * math.nan),
        Fake("wrong dk", lambda *x: WrongGradient.apply(*x)),  # type: ignore[no-untyped-call]
        Fake("scaled", lambda q, k, v: sa.attention(q, k, v, sa.Local(7)) * 1.001),
    )
    wrong = [("forward", "a key more"), ("forward", "nan"), ("backward", "wrong dk")]
    wrong += [("backward", "a key more"), ("forward", "scaled")]
    for direction, name in wrong:
        entry = entry_of(rows[direction], name)  # type: ignore[index]
        assert entry.status == "wrong" and entry.reason, name
        assert entry.ms is None and entry.ms_min is None, name
    assert entry_of(rows["forward"], "wrong dk").status == "ok"
    for row in rows.values():
        ours = entry_of(row, "sparse_attn")
        assert ours.status == "ok" and ours.error_share is not None and ours.error_share <= 1
        assert ours.ms is not None and ours.ms_min is not None and ours.ms_max is not None
        assert 0 < ours.ms_min <= ours.ms <= ours.ms_max


@pytest.mark.parametrize("tokens_first", [False, True])
def test_competitors_get_the_memory_of_the_case(tokens_first: bool) -> None:
    case = replace(small(sa.Local(7)), tokens_first=tokens_first)
    seen: set[bool] = set()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update(x.stride(1) < x.stride(2) for x in (q, k, v))
        return sa.attention(q, k, v, sa.Local(7))

    (row,) = run.run_row(
        case, [Fake("fake", attend)], timing.CpuClock(), RATES, run.Limits(), False, 1, 0.1
    )
    assert entry_of(row, "fake").status == "ok" and seen == {tokens_first}


def test_no_peer_is_dropped() -> None:
    absent = peers.Kernel("absent", lambda: peers._load_flash("no_such_module", False), True)
    forward_only = Fake("forward only", lambda q, k, v: sa.attention(q, k, v, sa.Local(7)))
    rows = rows_of(Fake("failing", fail), absent, replace(forward_only, has_backward=False))
    for row in rows.values():
        assert [x.peer for x in row.entries] == ["sparse_attn", "failing", "absent", "forward only"]
        failing, missing = entry_of(row, "failing"), entry_of(row, "absent")
        assert (failing.status, failing.reason) == (
            "failed",
            "RuntimeError: no kernel for this shape",
        )
        assert (missing.status, missing.reason) == ("missing", "no module no_such_module")
    assert entry_of(rows["forward"], "forward only").status == "ok"
    assert entry_of(rows["backward"], "forward only").status == "not run"
    text = shown(Results("cpu", MACHINE, RATES, list(rows.values())))
    for reason in ("no kernel for this shape", "no module no_such_module", "no backward here"):
        assert reason in text


def test_a_peer_without_time_or_memory_says_so() -> None:
    case = small(sa.Local(7))
    compiling = Fake("compiling", fail, compiles=True)
    plain = Fake("plain", fail)

    def refusal(limits: run.Limits, peer: Fake, case: Case = case) -> str:
        with pytest.raises(peers.Unavailable) as caught:
            limits.refuse(peer, case)
        return caught.value.reason

    assert "minutes were up" in refusal(run.Limits(seconds=5), compiling)
    run.Limits(seconds=5).refuse(plain, case)
    assert "minutes were up" in refusal(run.Limits(seconds=-1), plain)
    uncompiled = replace(case, without=frozenset({"compiling"}))
    assert "--peers" in refusal(run.Limits(), compiling, uncompiled)
    run.Limits(named=frozenset({"compiling"})).refuse(compiling, uncompiled)
    slow = run.Limits(call_ms=1000, last={("plain", case.table, "small"): (24, 251.0)})
    assert "about 1.0 s a call" in refusal(slow, plain)
    run.Limits(call_ms=1000, last={("plain", case.table, "small"): (24, 249.0)}).refuse(plain, case)
    large = small(sa.Local(7), n=1 << 20)
    with pytest.raises(peers.Unavailable, match="mask memory"):
        peers.Masked().prepare(large, CPU)
    with pytest.raises(peers.Unavailable, match="mask memory"):
        peers.block_mask(checks.relation(sa.Dense()), 1 << 23, 1 << 23, CPU)


def test_a_dense_peer_stands_in_for_a_merged_head() -> None:
    def load() -> peers.CausalAttend:
        return lambda q, k, v, window: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        )

    dense = peers.Kernel("dense", load)
    limits = run.Limits()
    case = small(sa.Strided(8))
    (row,) = run.run_row(
        case, [dense], timing.CpuClock(), RATES, limits, False, rounds=1, round_ms=0.1
    )
    entry = entry_of(row, "dense")
    assert (entry.status, entry.note) == ("ok", "dense, 2 x batch 1")
    assert entry.ms == pytest.approx(2 * limits.last["dense", case.table, "small"][1])
    assert not dense.serves(small(sa.Local(7)))
    for pattern in (sa.Chunk(12), sa.Dilated(8)):
        case = small(pattern)
        (row,) = run.run_row(
            case, [dense], timing.CpuClock(), RATES, limits, False, rounds=1, round_ms=0.1
        )
        assert (entry_of(row, "dense").status, entry_of(row, "dense").note) == ("ok", "view")
        with pytest.raises(peers.Unavailable, match="no view"):
            dense.prepare(replace(case, seq=50), CPU)


def test_deterministic_peers_compete_in_backward_passes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: list[dict[str, Any]] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, **given: Any) -> Tensor:
        options.append(given)
        if "window_size" in given:
            raise RuntimeError("no deterministic window")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sa.attention(q, k, v, sa.Dense()).transpose(1, 2)

    module = SimpleNamespace(flash_attn_func=flash)
    monkeypatch.setattr(peers, "_import", lambda name: module)
    (peer,) = [x for x in peers.gpu_peers() if x.name == "fa4 deterministic"]
    served = [(case.table, case.name) for case in cases.run_cases() if peer.serves(case)]
    names = ("Local(1024)", "Dense, batch 1")
    assert served == [*itertools.product(("d64", "d128"), names), ("long", "Local(1024)")]
    assert not any(peer.serves(case) for case in cases.sweep_cases())

    def entries(pattern: sa.Pattern) -> list[Entry]:
        rows = run.run_row(
            small(pattern), [peer], timing.CpuClock(), RATES, run.Limits(), rounds=1, round_ms=0.1
        )
        return [entry_of(row, peer.name) for row in rows]

    forward, backward = entries(sa.Dense())
    assert options[-1] == {"deterministic": True}
    assert (forward.status, forward.ms) == ("not run", None) and "backward" in forward.reason
    assert backward.status == "ok" and backward.ms is not None
    for entry in entries(sa.Local(1024)):
        assert (entry.status, entry.reason) == ("failed", "RuntimeError: no deterministic window")
    assert options[-1] == {"deterministic": True, "window_size": (1023, 0)}


def test_a_sweep_compiles_last() -> None:
    swept = cases.sweep_cases()
    compiles = [not case.without for case in swept]
    assert compiles == sorted(compiles) and {case.seq for case in swept[-6:]} == {8192, 131072}
    shapes = {(case.seq, case.name.split("(")[0]) for case in swept}
    names = ("Local", "Strided", "Fixed")
    assert shapes == {(1 << exponent, name) for exponent in range(11, 21) for name in names}
    others = {peer.name for peer in peers.gpu_peers() if peer.compiles}
    assert all(case.without == others for case in swept if case.without)


def test_views_copy_nothing() -> None:
    x = torch.randn(2, 48, 3, 8).transpose(1, 2)
    lse = torch.randn(2, 48, 3).transpose(1, 2)
    chunked, dilated = views.chunks(x, 12), views.residues(x, 8)
    assert chunked.shape == (8, 3, 12, 8) and dilated.shape == (2, 24, 6, 8)
    assert chunked.data_ptr() == dilated.data_ptr() == x.data_ptr()
    assert torch.equal(chunked[5, 2], x[1, 2, 12:24])
    assert torch.equal(dilated[1, 3 * 3 + 2], x[1, 2, 3::8])
    assert torch.equal(views.from_chunks(chunked, 2), x)
    assert torch.equal(views.from_residues(dilated, 8), x)
    assert views.from_residues(dilated, 8).data_ptr() == x.data_ptr()
    back = views.from_chunks(views.chunks(lse[..., None], 12)[..., 0], 2)
    assert torch.equal(back, lse)
    back = views.from_residues(views.residues(lse[..., None], 8)[..., 0], 8)
    assert torch.equal(back, lse)
    wanted = [i for i in range(48) if 2 <= i % 8 < 5]
    assert torch.equal(views.panel(x, 8, 3, 2), x[:, :, wanted])


@pytest.mark.parametrize("name", ["dense", "chunk", "strided", "fixed"])
def test_block_masks_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "STRIP", 1 << 9)  # several strips
    related, n = checks.relation(PATTERNS[name]), 90
    ours = peers.block_mask(related, n, n, CPU, block=16)
    theirs = create_block_mask(
        lambda b, h, i, j: related(i, j), None, None, n, n, device="cpu", BLOCK_SIZE=16
    )
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(theirs, f"{kind}_num_blocks")
        assert torch.equal(getattr(ours, f"{kind}_num_blocks"), counts), kind
        for block, count in enumerate(counts[0, 0]):
            indices = [getattr(x, f"{kind}_indices")[0, 0, block, :count] for x in (ours, theirs)]
            assert torch.equal(*(x.sort().values for x in indices)), kind


def flash(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: Any, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """FlashAttention's interface: (batch, seq, heads, dim), keys left of the query counted."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    left = q.shape[2] if window_size[0] is None else window_size[0]
    out, lse = sa.attention(q, k, v, sa.Local(left + 1), return_lse=True)
    return out.transpose(1, 2), lse


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_composed_forms_are_the_merged_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    monkeypatch.setattr(peers, "_import", lambda name: SimpleNamespace(flash_attn_func=flash))
    case = small(sa.Strided(8))
    q, k, v, _ = run.Inputs.of(case, CPU, needs_grad=False).tokens_first().sets[0]
    composed = peers.ComposedFlash().prepare(case, CPU).attend(q, k, v)
    torch.testing.assert_close(composed, sa.attention(q, k, v, case.pattern))

    flex = peers.ComposedFlex()
    fixed = sa.Fixed(8, 2)
    near_far = peers._merged(case.pattern), peers._merged(fixed)
    assert near_far[0] is not None and near_far[1] is not None
    parts = flex._strided(*near_far[0], case, CPU)  # type: ignore[arg-type]
    composed = sa.merge(*parts[0](q, k, v), *parts[1](q, k, v))[0]
    torch.testing.assert_close(composed, sa.attention(q, k, v, case.pattern))
    parts = flex._fixed(*near_far[1], replace(case, pattern=fixed), CPU)  # type: ignore[arg-type]
    composed = sa.merge(*parts[0](q, k, v), *parts[1](q, k, v))[0]
    torch.testing.assert_close(composed, sa.attention(q, k, v, fixed))
    with pytest.raises(peers.Unavailable, match="no lse"):
        flex.prepare(case, CPU)


class FakeClock(timing.CpuClock):
    """Calls take the milliseconds they return."""

    def times(self, call: timing.Call, repeats: int) -> list[float]:
        return [float(str(call(number))) for number in range(repeats)]


def test_competitors_take_turns() -> None:
    order: list[str] = []

    def call(name: str, ms: list[float]) -> timing.Call:
        def run(number: int) -> float:
            order.append(name)
            if name == "failing" and len(order) > 12:
                raise RuntimeError("out of memory")
            return ms[sum(x == name for x in order) - 1]

        return run

    calls = {
        "a": call("a", [1, 1, 1, 1, 5, 3, 4, 9, 1]),
        "failing": call("failing", [1] * 5),
        "b": call("b", [2] * 9),
    }
    answers = timing.interleaved(calls, FakeClock(), rounds=5, round_ms=1)
    # Four calls each to warm up, then one a round, every other round in reverse order.
    turns = "".join(name[0] for name in order[12:])
    assert turns == "afb" + "ba" + "ab" + "ba" + "ab"
    assert answers["a"] == timing.Timing(median=4, least=1, greatest=9)
    assert answers["b"] == timing.Timing(2, 2, 2)
    assert str(answers["failing"]) == "out of memory"


def test_growth_exponents() -> None:
    lengths = [2048, 4096, 8192, 16384]
    times = [3e-6 * n**1.5 for n in lengths]
    assert timing.growth_exponent(lengths, times) == pytest.approx(1.5)
    times = [3e-6 * n**2 * wobble for n, wobble in zip(lengths, (1.1, 0.9, 1, 1), strict=True)]
    assert timing.growth_exponent(lengths, times) == pytest.approx(2, abs=0.1)


MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    driver="580.1",
    torch="2.11.0",
    cuda="13.0",
    cudnn="91300",
    python="3.12.3",
    processor="a processor",
    threads=16,
    packages={"triton": "3.6.0"},
    commit="0123456789abcdef",
    date="2026-11-22T12:00:00+00:00",
)


def made_up(kind: results.Kind = "run", factor: float = 1.0) -> Results:
    """Results of two rows, with every kind of entry."""
    case = cases.run_cases()[3]
    rows = [results.row_of(case, direction, RATES) for direction in ("forward", "backward")]
    for row in rows:
        ms = factor * 2 * row.floor_ms
        row.entries += [
            Entry("sparse_attn", "ok", "", "", ms, ms * 0.9, ms * 1.1, 0.3, 0.1, None, 10**8),
            Entry("slow", "ok", "", "view", 9 * ms, 8 * ms, 10 * ms, 0.3, 12.5, 0.2, None),
            Entry("fake", "wrong", "off by 7 times what is allowed", error_share=7.0),
            Entry("fa3", "missing", "no module flash_attn_interface"),
        ]
    host = [results.HostTime("sparse_attn", "eager", 50.0)]
    return Results(kind, MACHINE, RATES, rows, host)


def shown(found: Results) -> str:
    text = io.StringIO()
    report.show(found, Console(width=250, file=text))
    return text.getvalue()


def test_host_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "ab"}
    took = timing.host_us(calls, timing.CpuClock(), rounds=2, repeats=3)
    assert "".join(order[40:]) == "aaabbb" * 2  # after the first, untimed ones
    assert set(took) == {"a", "b"} and min(took.values()) > 0


def test_results_survive_their_file(tmp_path: Path) -> None:
    found = made_up()
    found.growth.append(results.Growth("Strided", "sparse_attn", [1, 2], 1.5, "<= 1.6", True))
    path = tmp_path / found.file_name
    found.write(path)
    assert path.name == "run-nvidia-h100-80gb-hbm3.json"
    assert results.read(path) == found
    document = json.loads(path.read_text())
    assert set(document["machine"]) >= {"device", "driver", "torch", "commit", "date"}


def without_device(document: Any) -> None:
    del document["machine"]["device"]


def unknown_status(document: Any) -> None:
    document["rows"][0]["entries"][0]["status"] = "fine"


def text_for_a_time(document: Any) -> None:
    document["rows"][1]["entries"][0]["ms"] = "0.3"


def fraction_of_a_pair(document: Any) -> None:
    document["rows"][0]["pairs"] = 0.5


def another_field(document: Any) -> None:
    document["rates"]["guess"] = 1


def another_schema(document: Any) -> None:
    document["schema"] += 1


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (without_device, "machine.*device"),
        (unknown_status, r"rows\[0\].entries\[0\].status"),
        (text_for_a_time, r"rows\[1\].entries\[0\].ms"),
        (fraction_of_a_pair, r"rows\[0\].pairs"),
        (another_field, "rates.*guess"),
        (another_schema, "schema"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(
    spoil: Callable[[Any], None], where: str, tmp_path: Path
) -> None:
    path = tmp_path / "spoiled.json"
    document = dataclasses.asdict(made_up())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=where):
        results.read(path)


def test_the_readme_is_what_the_committed_results_give() -> None:
    assert report.generated_readme() == report.README.read_text()
    measured = results.latest("run") is not None
    assert (report.NOT_MEASURED in report.README.read_text()) is not measured


def test_the_readme_follows_new_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(report.with_section(report.README.read_text(), report.NOT_MEASURED))
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(
        report,
        "generated_readme",
        lambda generate=report.generated_readme: generate(readme, tmp_path),
    )
    assert command.main(["check"]) == 0
    made_up().write(tmp_path / "old.json")
    newer = made_up(factor=0.5)
    newer.machine = replace(MACHINE, date="2026-11-23T12:00:00+00:00", commit="fedcba9876543210")
    newer.write(tmp_path / "a-newer.json")
    assert command.main(["check"]) == 1
    assert command.main(["readme"]) == 0
    assert command.main(["check"]) == 0
    text = readme.read_text()
    assert report.NOT_MEASURED not in text and "fedcba9876" in text and "0123456789" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| Strided(128)")]
    assert line == (
        "| Strided(128) | **0.134** (1.00x) | 1.208 slow (view) "
        "| **0.268** (1.00x) | 2.416 slow (view) |"
    )
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"no .*speed"):
        report.generated_readme()


def test_tables_ratios_and_charts(tmp_path: Path) -> None:
    text = shown(made_up())
    for part in (
        "NVIDIA H100",
        "0.268",
        "2.00",
        "off by 7 times",
        "no module flash_attn_interface",
    ):
        assert part in text, part
    assert "Floor: the longer of moving" in text  # the method stands beside the table
    ratios = report._ratios(made_up(), made_up(factor=0.5))
    assert [(peer, after / before) for _, peer, before, after in ratios] == [
        ("sparse_attn", 0.5),
        ("slow", 0.5),
    ] * 2
    charts = [*report.draw(made_up(), tmp_path), *report.draw(made_up("sweep"), tmp_path)]
    assert len(charts) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in charts)


def test_a_run_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "measure_rates", lambda *arguments: RATES)
    arguments = ["--cpu", "--longest", "512", "--peers", "sdpa mask", "--out", str(tmp_path)]
    code = command.main(arguments)
    (path,) = tmp_path.glob("*.json")
    found = results.read(path)
    assert code == (0 if command.is_right(found) else 1)
    assert {row.seq for row in found.rows} == {64, 128, 256, 512}
    for row in found.rows:
        assert [entry.peer for entry in row.entries] == ["sparse_attn", "sdpa mask"]
        assert all(entry.ms is not None for entry in row.entries)
    assert {(line.peer, line.limit) for line in found.growth} == {
        ("sparse_attn", "<= 1.6"),
        ("sdpa mask", ">= 1.9"),
    }
    assert "growth of sparse_attn" in capsys.readouterr().out
    assert list(tmp_path.glob("*.png"))


def test_a_run_is_right_only_if_ours_is() -> None:
    found = made_up()
    assert command.is_right(found)
    found.rows[1].entries[0].status = "wrong"
    assert not command.is_right(found)
    found = made_up()
    found.growth.append(results.Growth("Strided", "sparse_attn", [1, 2], 1.7, "<= 1.6", False))
    assert not command.is_right(found)


@pytest.mark.parametrize("arguments", [["--peers", "nobody"], ["--tables", "nothing"], []])
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(arguments))
    assert command.main(arguments) == 2
    assert capsys.readouterr().out.startswith(("peers are", "no table", "no GPU"))
