# SPDX-License-Identifier: Apache-2.0
"""Clocks: times of calls on a GPU or a CPU, host time, peak memory, and the machine's rates."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from .floors import Rates

# Runs one pass on input set `number % sets`.
Call = Callable[[int], object]

ROUNDS = 5
ROUND_MS = 20.0
MOST_REPEATS = 50


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median over the rounds, each the median of its calls."""

    median: float
    least: float
    greatest: float


class Clock(Protocol):
    device: torch.device

    def times(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` calls."""
        ...

    def synchronize(self) -> None: ...

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory that a call held beyond what was there before it; None if not known."""
        ...


class CpuClock:
    device = torch.device("cpu")

    def times(self, call: Call, repeats: int) -> list[float]:
        times = []
        for number in range(repeats):
            begin = time.perf_counter()
            call(number)
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return None


class CudaClock:
    """CUDA events around each call; the GPU waits until the calls are queued."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._wait_s = 1e-3

    def times(self, call: Call, repeats: int) -> list[float]:
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        self.synchronize()
        # Cycles at up to 2 GHz; a wait that the host has outrun costs nothing but time.
        torch.cuda._sleep(int(2e9 * min(self._wait_s * repeats, 0.05)))  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            begin.record()
            call(number)
            end.record()
        self._wait_s = 1.5 * (time.perf_counter() - start) / repeats
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return peak


def interleaved(
    calls: Mapping[str, Call], clock: Clock, rounds: int = ROUNDS, round_ms: float = ROUND_MS
) -> dict[str, Timing | Exception]:
    """Times of competitors that take turns, every other round in reverse order.

    A competitor that raises is out, with its exception as the answer.
    """
    repeats: dict[str, int] = {}
    medians: dict[str, list[float]] = {}
    answers: dict[str, Timing | Exception] = {}
    for number in range(-1, rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            if name in answers:
                continue
            try:
                if number < 0:  # warm up, and see how long a call takes
                    pilot = clock.times(calls[name], 1)[0]
                    if pilot < 10 * round_ms:
                        pilot = min(clock.times(calls[name], 3))
                    repeats[name] = min(max(round(round_ms / max(pilot, 1e-6)), 1), MOST_REPEATS)
                    medians[name] = []
                else:
                    medians[name].append(median(clock.times(calls[name], repeats[name])))
            except Exception as error:
                answers[name] = error
    for name in calls:
        if name not in answers:
            runs = medians[name]
            answers[name] = Timing(median(runs), min(runs), max(runs))
    return answers


def host_us(
    calls: Mapping[str, Callable[[], object]], clock: Clock, rounds: int = 9, repeats: int = 60
) -> dict[str, float]:
    """Microseconds until a call returns to the host, the work small enough not to fill a queue.

    The calls take turns, since whatever else a host does slows them by up to two times; the median
    over the rounds.
    """
    for call in calls.values():
        for _ in range(20):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            clock.synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            samples[name].append((time.perf_counter() - begin) / repeats)
    clock.synchronize()
    return {name: 1e6 * median(times) for name, times in samples.items()}


def measure_rates(clock: Clock, copy_bytes: int = 1 << 30, side: int = 8192) -> Rates:
    """Copy bandwidth and the rate of a matrix product, bf16 on a GPU and fp32 on a CPU."""
    device = clock.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    product = torch.empty_like(a)
    calls: dict[str, Call] = {
        "copy": lambda number: target.copy_(source),
        "product": lambda number: torch.mm(a, b, out=product),
    }
    ms = interleaved(calls, clock)
    times = [x.median for x in (ms["copy"], ms["product"]) if isinstance(x, Timing)]
    return Rates(2e3 * copy_bytes / times[0], 2e3 * side**3 / times[1])


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets to rotate so that none is in the L2 cache when its turn comes."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(3 * l2 / bytes_each))


def growth_exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """The exponent e of time = c * length^e that fits best in logarithms."""
    x = [math.log(length) for length in lengths]
    y = [math.log(value) for value in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def free_memory() -> None:
    """Gives back what earlier rows held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
