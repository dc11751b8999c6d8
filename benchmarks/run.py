# SPDX-License-Identifier: Apache-2.0
"""Runs rows: each peer is prepared, checked, and only if it is right timed against the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn as sa

from . import timing
from .cases import Case
from .checks import Reference
from .floors import Direction, Rates, work
from .peers import Peer, Prepared, Unavailable
from .results import Entry, HostMode, HostTime, Row, row_of
from .timing import Call, Clock, Timing

# A compilation of forward and backward, in seconds, when there is no time for another.
COMPILATION_S = 30.0


@dataclass
class Limits:
    """How long a run may take, and a call."""

    seconds: float = math.inf
    call_ms: float = math.inf
    named: frozenset[str] = frozenset()  # peers that run wherever they can
    begun: float = field(default_factory=time.monotonic)
    # (peer, table, row name) -> (n, ms) of the last row
    last: dict[tuple[str, str, str], tuple[int, float]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def refuse(self, peer: Peer, case: Case) -> None:
        """Raises Unavailable if there is no time for a peer."""
        if self.left < (COMPILATION_S if peer.compiles else 0):
            raise Unavailable(f"the run's {self.seconds / 60:.0f} minutes were up")
        if peer.name in case.without - self.named:
            raise Unavailable("not compiled for this row unless named by --peers")
        n, ms = self.last.get((peer.name, case.table, case.name), (case.seq, 0.0))
        self.refuse_time(ms * (case.seq / n) ** 2, "about")

    def refuse_time(self, ms: float, how_sure: str) -> None:
        if ms > self.call_ms:
            raise Unavailable(f"time: {how_sure} {ms / 1e3:.1f} s a call")

    def note_time(self, peer: str, case: Case, ms: float) -> None:
        """The longer of a row's passes foretells those at other lengths."""
        n, known = self.last.get((peer, case.table, case.name), (0, 0.0))
        self.last[peer, case.table, case.name] = case.seq, max(ms, known) if n == case.seq else ms


@dataclass
class Inputs:
    """q, k, v and dout, in sets that together exceed the L2 cache."""

    sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]

    @staticmethod
    def of(case: Case, device: torch.device, needs_grad: bool, seed: int = 0) -> Inputs:
        """Normal random data, heads first."""
        generator = torch.Generator(device).manual_seed(seed)

        def tensor(dim: int) -> Tensor:
            shape = (case.batch, case.heads, case.seq, dim)
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return x.to(case.dtype)

        d, dv = case.head_dim, case.head_dim_v
        bytes_each = case.batch * case.heads * case.seq * 2 * (d + dv) * case.dtype.itemsize
        count = timing.input_sets(bytes_each, device)
        sets = [(tensor(d), tensor(d), tensor(dv), tensor(dv)) for _ in range(count)]
        return Inputs([_leaves(*tensors, needs_grad) for tensors in sets])

    def tokens_first(self) -> Inputs:
        """The same values in (batch, seq, heads, dim) memory."""
        moved = [
            tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
            for tensors in self.sets
        ]
        needs_grad = self.sets[0][0].requires_grad
        return Inputs([_leaves(q, k, v, dout, needs_grad) for q, k, v, dout in moved])


def _leaves(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (x.requires_grad_(needs_grad) for x in (q, k, v))
    return q, k, v, dout


@dataclass
class Runner:
    """One peer in one row, ready to be timed."""

    prepared: Prepared
    inputs: Inputs
    outs: list[Tensor]  # of each input set, with the graphs of their backward passes

    def forward(self, number: int) -> object:
        q, k, v, _ = self.inputs.sets[number % len(self.inputs.sets)]
        return self.prepared.attend(q, k, v)

    def backward(self, number: int) -> object:
        chosen = number % len(self.outs)
        q, k, v, dout = self.inputs.sets[chosen]
        return torch.autograd.grad(self.outs[chosen], (q, k, v), dout, retain_graph=True)


class RowRun:
    """The inputs and references of a row, shared by its peers."""

    def __init__(self, case: Case, clock: Clock, rates: Rates, backward: bool) -> None:
        self.case, self.clock, self.rates, self.backward = case, clock, rates, backward
        self._inputs: dict[tuple[int, bool], Inputs] = {}
        self._references: dict[tuple[int, str], Reference] = {}

    def inputs(self, case: Case, tokens_first: bool) -> Inputs:
        key = (case.batch, tokens_first)
        if key not in self._inputs:
            self._inputs[key] = (
                self.inputs(case, False).tokens_first()
                if tokens_first
                else Inputs.of(case, self.clock.device, self.backward)
            )
        return self._inputs[key]

    def reference(self, case: Case) -> Reference:
        key = (case.batch, repr(case.pattern))
        if key not in self._references:
            tensors = self.inputs(case, False).sets[0]
            self._references[key] = Reference(case, *tensors, backward=self.backward)
        return self._references[key]

    def prepare(
        self, peer: Peer, limits: Limits, forward: Entry, backward: Entry | None
    ) -> Runner | None:
        """The peer, prepared and checked; None, and the reason in the entries, if it is out."""
        entries = [forward] if backward is None else [forward, backward]
        try:
            limits.refuse(peer, self.case)
            prepared = peer.prepare(self.case.on(self.clock.device), self.clock.device)
            longest: Direction = "forward" if backward is None else "backward"
            limits.refuse_time(work(prepared.case, longest).floor_ms(self.rates), "at least")
        except Unavailable as unavailable:
            for entry in entries:
                entry.status, entry.reason = unavailable.status, unavailable.reason  # type: ignore[assignment]
            return None
        except Exception as error:
            for entry in entries:
                _fail(entry, error)
            return None
        for entry in entries:
            entry.note, entry.block_mask_s = prepared.note, prepared.block_mask_s
        try:
            tokens_first = prepared.tokens_first or prepared.case.tokens_first
            runner = Runner(prepared, self.inputs(prepared.case, tokens_first), [])
            reference = self.reference(prepared.case)
            begin = time.perf_counter()
            out = runner.forward(0)
            self.clock.synchronize()
            forward.first_call_s = time.perf_counter() - begin
            assert isinstance(out, Tensor)
            _judge(forward, reference, {"out": out})
            del out
            forward.peak_bytes = self.clock.peak_bytes(lambda: runner.forward(0))
        except Exception as error:
            for entry in entries:
                _fail(entry, error)
            return None
        if forward.status != "ok":
            if backward is not None:
                backward.status, backward.reason = forward.status, forward.reason
            return None
        if not prepared.has_forward:
            forward.status, forward.reason = "not run", "only the backward pass differs"
        if backward is not None:
            self._prepare_backward(runner, reference, backward)
        return runner

    def _prepare_backward(self, runner: Runner, reference: Reference, entry: Entry) -> None:
        if not runner.prepared.has_backward:
            entry.status, entry.reason = "not run", "no backward here"
            return
        try:
            outs = [runner.forward(number) for number in range(len(runner.inputs.sets))]
            runner.outs = [out for out in outs if isinstance(out, Tensor)]
            begin = time.perf_counter()
            grads = runner.backward(0)
            self.clock.synchronize()
            entry.first_call_s = time.perf_counter() - begin
            assert isinstance(grads, tuple)
            results = dict(zip(("dq", "dk", "dv"), grads, strict=True))
            _judge(entry, reference, results)
            del grads, results
            entry.peak_bytes = self.clock.peak_bytes(lambda: runner.backward(0))
        except Exception as error:
            _fail(entry, error)


def run_row(
    case: Case,
    peers: Sequence[Peer],
    clock: Clock,
    rates: Rates,
    limits: Limits,
    backward: bool = True,
    rounds: int = timing.ROUNDS,
    round_ms: float = timing.ROUND_MS,
) -> list[Row]:
    """The forward row of a case and, if wanted, the backward row."""
    timing.free_memory()
    # Compiled functions of earlier rows are gone; so is what would count against this row's.
    torch.compiler.reset()
    rows = [row_of(case, "forward", rates)]
    if backward:
        rows.append(row_of(case, "backward", rates))
    row_run = RowRun(case, clock, rates, backward)
    runners: dict[str, Runner] = {}
    for peer in peers:
        if not peer.serves(case):
            continue
        entries = [Entry(peer.name, "ok") for _ in rows]
        for row, entry in zip(rows, entries, strict=True):
            row.entries.append(entry)
        runner = row_run.prepare(peer, limits, entries[0], entries[1] if backward else None)
        if runner is not None:
            runners[peer.name] = runner
    for row in rows:
        calls: dict[str, Call] = {
            entry.peer: getattr(runners[entry.peer], row.direction)
            for entry in row.entries
            if entry.status == "ok"
        }
        times = timing.interleaved(calls, clock, rounds, round_ms)
        for name, answer in times.items():
            _enter(row, name, answer, runners[name].prepared.times)
            if isinstance(answer, Timing):
                limits.note_time(name, case, answer.median)
    return rows


def _judge(entry: Entry, reference: Reference, results: dict[str, Tensor]) -> None:
    entry.error_share = reference.error_share(results)
    if not entry.error_share <= 1:
        entry.status = "wrong"
        if math.isfinite(entry.error_share):
            entry.reason = f"off by {entry.error_share:.3g} times what is allowed"
        else:
            entry.reason, entry.error_share = "not finite", None


def _enter(row: Row, name: str, answer: Timing | Exception, times: int) -> None:
    entry = row.entry(name)
    assert entry is not None
    if isinstance(answer, Exception):
        _fail(entry, answer)
    else:
        entry.ms = times * answer.median
        entry.ms_min, entry.ms_max = times * answer.least, times * answer.greatest


def _fail(entry: Entry, error: Exception) -> None:
    entry.status, entry.reason = "failed", _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def host_times(clock: Clock) -> list[HostTime]:
    """Ours beside SDPA, forward, at a size whose work is shorter than the call."""
    device = clock.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    inputs = [torch.randn(1, 4, 256, 64, device=device, dtype=dtype) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    pattern = sa.Strided(64)
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sparse_attn": lambda q, k, v: sa.attention(q, k, v, pattern),
        "scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ),
    }

    def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(call, fullgraph=True, dynamic=False)

    # Eager first, before a compiler has started its workers.
    modes: dict[HostMode, dict[str, Callable[[], object]]] = {
        "eager": {name: partial(call, *inputs) for name, call in calls.items()},
        "eager, with gradients": {name: partial(call, *leaves) for name, call in calls.items()},
        "compiled": {name: partial(compiled(call), *inputs) for name, call in calls.items()},
    }
    torch.compiler.reset()
    return [host for mode, timed in modes.items() for host in _host_times(mode, timed, clock)]


def _host_times(
    mode: HostMode, calls: dict[str, Callable[[], object]], clock: Clock
) -> list[HostTime]:
    try:
        took = timing.host_us(calls, clock)
    except Exception as error:
        return [HostTime(name, mode, None, _first_line(error)) for name in calls]
    return [HostTime(name, mode, us) for name, us in took.items()]
