# SPDX-License-Identifier: Apache-2.0
"""The measurements of generation: what is timed is what is said, and what is not measured too."""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import sparse_attn as sa
from benchmarks import __main__ as command
from benchmarks import decoding, timing
from benchmarks.decoding import (
    Decoding,
    KeyGrowth,
    MusicStep,
    Reading,
    Sample,
    Slice,
    Step,
    StepCase,
)
from benchmarks.floors import Rates
from sparse_attn.model import SparseTransformerConfig, presets
from test_experiments import MACHINE

CPU = torch.device("cpu")
PATTERNS = {
    "Local(7)": sa.Local(7),
    "Strided(8)": sa.Strided(8),
    "Fixed(9, 2)": sa.Fixed(9, 2),
    "Dense()": sa.Dense(),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short patterns, the presets' models narrow, and the CPU whatever there is."""
    monkeypatch.setattr(decoding, "PATTERNS", PATTERNS)
    monkeypatch.setattr(decoding, "ONCE_LENGTH", 70)
    for name in ("enwik8", "cifar10"):
        narrow = replace(getattr(presets, name)(), width=32)
        monkeypatch.setattr(presets, name, lambda narrow=narrow: narrow)
    music = presets.music
    monkeypatch.setattr(presets, "music", lambda n: replace(music(n), width=32))
    monkeypatch.setattr(decoding, "pick_device", lambda: (CPU, "fp32"))
    monkeypatch.setattr(decoding, "_rate_sizes", lambda device: (1 << 20, 64))
    yield


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_attends_every_key_it_needs_and_no_other(name: str) -> None:
    case = StepCase(name, 3, 61)
    step = case.call(torch.float64, CPU)
    q, k_new, v_new, cache, scale, out = step.args  # type: ignore[attr-defined]
    assert cache.position == 60 and cache.length == 61
    assert cache.nbytes == case.cache_bytes(torch.float64)
    attended = PATTERNS[name].mask(61)[-1].sum().item()
    assert case.keys == attended
    # Scores of 0: the output is the mean of the values, of which all but the new one are 1.
    for part in cache.parts:
        for kept in part.v:
            kept.fill_(1.0)
    v_new.fill_(1.0 + attended)
    q.zero_()
    for _ in range(2):  # the same again: it leaves the position as it is
        step()
        torch.testing.assert_close(out, torch.full_like(out, 2.0))
    assert cache.position == 60 and out.shape == (3, 8, 1, 64)
    assert scale == pytest.approx(1 / math.sqrt(k_new.shape[-1]))


@pytest.mark.usefixtures("small")
def test_bytes_needed_are_those_of_the_keys_and_values() -> None:
    # 61 = 6 * 9 + 7: seven keys of the own chunk, two of each of six before it.
    assert StepCase("Fixed(9, 2)", 5, 61).keys == 7 + 6 * 2
    assert StepCase("Fixed(9, 2)", 5, 61).bytes_needed(torch.float16) == 2 * 5 * 8 * 19 * 64 * 2
    assert StepCase("Dense()", 1, 61).bytes_needed(torch.float32) == 2 * 8 * 61 * 64 * 4
    assert StepCase("Local(7)", 1, 61).cache_bytes(torch.float16) == 2 * 8 * 7 * 64 * 2


class GivenTimes(timing.CpuClock):
    """Counts the calls, and says that each took 4 ms."""

    def times(self, call: timing.Call, repeats: int) -> list[float]:
        super().times(call, repeats)
        return [4.0] * repeats


@pytest.mark.usefixtures("small")
def test_a_step_is_timed_per_call() -> None:
    step = decoding.run_step(StepCase("Strided(8)", 2, 50), torch.float32, GivenTimes())
    assert step is not None
    assert (step.us, step.us_min, step.us_max) == (4000, 4000, 4000)
    assert (step.pattern, step.batch, step.n, step.caches) == ("Strided(8)", 2, 50, 1)
    assert not step.cold
    # Query 49: eight keys of its window, and 41, 33, ... 1 of its residue, of which 41 is outside.
    assert step.keys == 8 + 6
    assert step.gb_per_s == pytest.approx(step.bytes / 4e-3 / 1e9)


def steps(name: str, keys: list[int], us: list[float], batch: int = 1) -> list[Step]:
    return [
        Step(name, batch, 4096 * 4**i, keys[i], 512 * keys[i], 20, i > 0, us[i], us[i], us[i])
        for i in range(len(keys))
    ]


def test_growth_of_given_times() -> None:
    for times, passed in (([8, 8.7, 8.5], True), ([8, 8.9, 8], False), ([8, 3, 2], True)):
        (growth,) = decoding.key_growth(steps("ring", [256] * 3, [float(x) for x in times]))
        assert growth.exponent is None and growth.passed is passed
        assert growth.ratio == pytest.approx(max(times) / 8)
    for exponent, passed in ((0.5, True), (1.0, True), (1.004, True), (1.02, False)):
        keys = [100, 400, 1600]
        (growth,) = decoding.key_growth(steps("all", keys, [3 * n**exponent for n in keys]))
        assert growth.exponent == pytest.approx(exponent) and growth.passed is passed
    # Keys that grow less than twofold make no fit: twice the time for 1.5x the keys is too much.
    (growth,) = decoding.key_growth(steps("few", [100, 150], [10.0, 20.0]))
    assert growth.exponent is None and growth.ratio == pytest.approx(4 / 3) and not growth.passed
    both = steps("a", [1, 2], [1.0, 1.5]) + steps("a", [1, 2], [1.0, 3.0], 16)
    assert [(x.batch, x.passed) for x in decoding.key_growth(both)] == [(1, True), (16, False)]
    assert decoding.key_growth(both[:1]) == []


def test_lengths_are_four_times_the_one_before() -> None:
    assert decoding.lengths(4096, 262144, 4) == [4096, 16384, 65536, 262144]
    assert decoding.lengths(100, 1599, 4) == [100, 400]
    for shortest, longest in ((100, 399), (0, 100), (-1, 9)):
        with pytest.raises(ValueError, match="four times"):
            decoding.lengths(shortest, longest, 4)


def test_slices_span_the_context_and_the_estimate_its_tokens() -> None:
    assert decoding.slice_starts(3072, 128) == [0, 1470, 2940]
    # The start, a prompt of 2940, three steps untimed and 128 timed fill the context.
    assert 1 + 2940 + decoding.WARM_UP + 128 == 3072
    for tokens in (0, 95, 200):
        with pytest.raises(ValueError, match=f"tokens is {tokens}, wanted from 1 to 94"):
            decoding.slice_starts(100, tokens)
    assert len(set(decoding.slice_starts(100, 94))) == 3
    # Flat before the first middle and after the last, straight lines between.
    flat = [Slice(3, 10, 2.0), Slice(400, 10, 2.0)]
    assert decoding.estimate(flat, 1000) == pytest.approx(2.0)
    rising = [Slice(-5, 10, 0.0), Slice(995, 10, 10.0)]
    assert decoding.estimate(rising, 1000) == pytest.approx(5.0)
    assert decoding.estimate(rising, 2000) == pytest.approx(15.0)


def test_a_slice_reads_its_tokens_against_a_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseTransformerConfig(
        vocab=11, context=90, layers=2, heads=2, width=16, stride=9, columns=3
    )
    model = decoding.make_model(config, torch.float32, CPU)
    ends, made = [], []

    class Recorded(decoding.Decoder):
        def __init__(self, model: Any, prompt: torch.Tensor, length: int) -> None:
            super().__init__(model, prompt, length)
            made.append((tuple(prompt.shape), [cache.length for cache in self.caches]))

        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().step(tokens)
            ends.append(int(self.caches[0].position))
            return logits

    monkeypatch.setattr(decoding, "Decoder", Recorded)
    for first in decoding.slice_starts(90, 20):
        ends.clear()
        timed, cache_bytes = decoding.time_slice(model, 3, first, 20, timing.CpuClock())
        assert (timed.first, timed.tokens) == (first + 4, 20) and timed.ms > 0
        assert ends == list(range(first + 2, first + 25))
        assert made[-1] == ((3, first), [90, 90])
        # Nine of a chunk and three of every nine, two heads of 8 wide, keys and values, fp32.
        assert cache_bytes == 2 * 3 * 2 * (9 + 30) * 8 * 2 * 4
    assert ends[-1] == 90  # full


def test_the_dense_model_differs_in_attention_alone() -> None:
    for preset in decoding.PRESETS:
        config = getattr(presets, preset)()
        other = decoding.dense(config)
        assert other.pattern == "dense" and config.pattern != "dense"
        same = replace(other, pattern=config.pattern, composition=config.composition)
        assert replace(same, summary_blocks=config.summary_blocks) == config


NCU_TEXT = """==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "parts_kernel" - 0: 0%....50%....100% - 1 pass
{"pattern": "Local(7)", "keys": 7}
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","void parts_kernel<Config<__half, 8, 1>>(DecodeParams)","C","dram__bytes_read.sum","byte","566,016"
"0","7","void parts_kernel<Config<__half, 8, 1>>(DecodeParams)","C","dram__bytes.sum","byte","7"
"1","7","void parts_kernel<Config<__half, 8, 1>>(DecodeParams)","C","dram__bytes_read.sum","byte","1200"
"""  # noqa: E501


def test_values_are_read_out_of_what_ncu_prints() -> None:
    assert decoding.parse_ncu(NCU_TEXT) == [566016, 1200]
    assert decoding.parse_ncu("==WARNING== No kernels were profiled.\n") == []
    with pytest.raises(ValueError, match="in 'Kbyte', wanted byte"):
        decoding.parse_ncu(NCU_TEXT.replace('"byte"', '"Kbyte"'))


def fake_ncu(folder: Path, text: str, code: int = 0) -> None:
    (folder / "text").write_text(text)
    path = folder / "ncu"
    path.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/arguments\n/bin/cat {folder}/text\nexit {code}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for ncu")
@pytest.mark.usefixtures("small")
def test_bytes_read_or_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    readings, reason = decoding.read_bytes(torch.float16, CPU)
    assert reason == "no GPU" and [x.ratio for x in readings] == [None] * 4
    monkeypatch.setenv("PATH", str(tmp_path))
    readings, reason = decoding.read_bytes(torch.float16, gpu)
    assert reason == "no ncu on the path" and readings[0].bytes_needed == 2 * 8 * 7 * 64 * 2
    fake_ncu(tmp_path, NCU_TEXT)
    assert decoding.read_bytes(torch.float16, gpu)[1] == "ncu saw 2 kernels, wanted 4"
    fake_ncu(tmp_path, "==ERROR== ERR_NVGPUCTRPERM - no permission\nand so on\n")
    assert decoding.read_bytes(torch.float16, gpu)[1].startswith("==ERROR== ERR_NVGPUCTRPERM")
    fake_ncu(tmp_path, "hello\ngood bye\n", code=3)
    assert decoding.read_bytes(torch.float16, gpu)[1] == "good bye"
    fake_ncu(tmp_path, NCU_TEXT.replace('"byte"', '"Mbyte"'))
    assert "wanted byte" in decoding.read_bytes(torch.float16, gpu)[1]

    header, *rows = [line for line in NCU_TEXT.splitlines() if line.startswith('"')]
    fake_ncu(tmp_path, "\n".join([header, *[rows[0].replace("566,016", "20,000")] * 4]))
    readings, reason = decoding.read_bytes(torch.float16, gpu)
    assert reason == "" and [x.pattern for x in readings] == list(PATTERNS)
    assert readings[0].ratio == pytest.approx(20000 / 14336)
    arguments = (tmp_path / "arguments").read_text()
    assert "--metrics dram__bytes_read.sum --kernel-name regex:parts_kernel" in arguments
    assert arguments.strip().endswith("-m benchmarks decode --once")
    decoded = replace(made_up(), readings=readings)
    assert not decoding.is_reached(decoded)


@pytest.mark.usefixtures("small")
def test_once_says_what_every_pattern_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["decode", "--once", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["pattern"], x["keys"]) for x in lines] == [
        ("Local(7)", 7),
        ("Strided(8)", 8 + 8),  # query 69: its window from 62 on, and 61, 53, ... 5
        ("Fixed(9, 2)", 7 + 7 * 2),
        ("Dense()", 70),
    ]
    assert not list(tmp_path.iterdir())


def made_up() -> Decoding:
    """Times given by hand, of nothing."""
    found = steps("Local(7)", [7, 7], [8.0, 8.5]) + steps("Dense()", [100, 400], [9.0, 30.0], 16)
    parts = [Slice(3, 8, 1.0), Slice(40, 8, 1.5), Slice(80, 8, 2.0)]
    measured = Sample("enwik8", "sparse", "fixed", 10, 2, 100, 16, 10**9, parts, 0.15, 0.2)
    music = [MusicStep(n, 64, 10, 5, Slice(n - 9, 8, ms)) for n, ms in ((4096, 0.2), (65536, 0.4))]
    return Decoding(
        MACHINE,
        "float16",
        ["attention", "bytes", "models", "music"],
        rates=Rates(2e12, 5e14),
        steps=found,
        growth=decoding.key_growth(found),
        readings=[Reading("Local(7)", 7, 1000, 1250), Reading("Dense()", 70, 1000, 1000)],
        samples=[measured, replace(measured, attention="dense", pattern="dense", whole_s=None)],
        music=music,
        music_growth=decoding.music_growth(music),
        left_out=["Dense(), batch 99: the cache does not fit"],
    )


def shown(found: Decoding) -> str:
    text = io.StringIO()
    decoding.show(found, Console(width=200, file=text))
    return text.getvalue()


def test_what_is_wanted() -> None:
    good = made_up()
    assert decoding.is_reached(good)
    assert decoding.is_reached(replace(good, readings=[], music=[], music_growth=None))
    unread = [replace(x, bytes_read=None) for x in good.readings]
    assert decoding.is_reached(replace(good, readings=unread, not_read="no ncu"))
    too_many = [*good.readings, Reading("Dilated(6)", 5, 1000, 1301)]
    assert not decoding.is_reached(replace(good, readings=too_many))
    growth = KeyGrowth("Dense()", 1, [1, 4], 1.2, 1.3, "<= 1", False)
    assert not decoding.is_reached(replace(good, growth=[growth]))
    slow = [replace(good.music[0], last=Slice(1, 8, 0.05)), good.music[1]]
    assert decoding.music_growth(slow).exponent == pytest.approx(0.75)
    assert not decoding.is_reached(replace(good, music_growth=decoding.music_growth(slow)))


def test_a_sample_is_as_long_as_was_measured_or_else_estimated() -> None:
    measured, estimated = made_up().samples
    assert measured.seconds == 0.2 and measured.ms_per_token == pytest.approx(2.0)
    assert measured.tokens_per_s == pytest.approx(16 * 100 / 0.2)
    assert estimated.seconds == 0.15 and estimated.ms_per_token == pytest.approx(1.5)


def test_results_survive_their_files(tmp_path: Path) -> None:
    path = decoding.write(made_up(), tmp_path)
    assert path.name == "decode-nvidia-h100-80gb-hbm3.json"
    assert decoding.read(path) == made_up()
    text = shown(made_up())
    for piece in ("1.25", "whole", "estimated", "keys^0.87", "n^0.25", "does not fit", "H100"):
        assert piece in text, piece
    assert "not measured: no ncu" in shown(replace(made_up(), not_read="no ncu"))
    assert decoding.draw(made_up(), tmp_path).read_bytes().startswith(b"\x89PNG")
    document = json.loads(path.read_text())
    for field, value, where in (
        ("kind", "million", "schema"),
        ("schema", 99, "schema"),
        ("steps", [{}], r"steps\[0\]"),
        ("dtype", 16, "dtype"),
    ):
        path.write_text(json.dumps({**document, field: value}))
        with pytest.raises(ValueError, match=where):
            decoding.read(path)


OPTIONS = "--shortest 16 --longest 64 --batches 2,1 --samples 2 --tokens 3 --layers 2 --context 40"


@pytest.mark.usefixtures("small")
def test_decode_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", *OPTIONS.split(), "--commit", "abc", "--out", str(tmp_path)]
    code = command.main(arguments)
    (path,) = tmp_path.glob("*.json")
    found = decoding.read(path)
    assert code == (0 if decoding.is_reached(found) else 1)
    assert found.machine.commit == "abc" and found.dtype == "float32"
    assert [(x.batch, x.pattern, x.n) for x in found.steps] == [
        (batch, name, n) for batch in (2, 1) for name in PATTERNS for n in (16, 64)
    ]
    assert all(0 < x.us_min <= x.us <= x.us_max for x in found.steps)
    assert len(found.growth) == 2 * len(PATTERNS)
    assert found.not_read == "no GPU" and len(found.readings) == len(PATTERNS)
    assert [(x.attention, x.preset) for x in found.samples] == [
        (kind, preset) for kind in ("sparse", "dense") for preset in ("cifar10", "enwik8")
    ]
    for row in found.samples:
        assert (row.layers, row.context, row.batch, len(row.slices)) == (2, 40, 2, 3)
        assert row.whole_s is not None and row.whole_s > 0
    sparse, dense = (found.samples[i] for i in (1, 3))
    assert sparse.parameters == dense.parameters
    # The dense cache holds 40 tokens, 2 layers, width 32, keys and values, batch 2, fp32.
    assert dense.cache_bytes == 40 * 2 * 32 * 2 * 2 * 4
    assert [(x.context, x.stride) for x in found.music] == [(16, 4), (64, 8)]
    text = capsys.readouterr().out
    assert "not measured: no GPU" in text and "time per token: n^" in text
    chart = path.with_suffix(".png")
    chart.unlink()
    assert command.main(["show", str(path)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_parts_and_time_are_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS.split(), "--parts", "models", "--seconds", "0", "--out", str(tmp_path)]
    assert command.main(["decode", *options]) == 0
    (path,) = tmp_path.glob("*.json")
    found = decoding.read(path)
    assert not found.steps and not found.readings and not found.music
    assert [row.whole_s for row in found.samples] == [None] * 4
    assert all(row.estimate_s > 0 for row in found.samples)
    assert "estimated" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "attention,sound"], "parts are 'attention,sound'"),
        (["--shortest", "32"], "shortest is 32"),
        (["--batches", "16,0"], "batches has '0'"),
        (["--batches", "two"], "batches has 'two'"),
        (["--samples", "0"], "samples has 0"),
        (["--tokens", "40"], "tokens is 40"),
        (["--tokens", "15"], "tokens is 15, wanted from 1 to 10 in a context of 16"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS.split(), *arguments, "--out", str(tmp_path)]
    assert command.main(["decode", *options]) == 2
    assert capsys.readouterr().out.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.usefixtures("small")
def test_a_graph_of_steps_on_a_gpu() -> None:
    clock = timing.CudaClock()
    for name in PATTERNS:
        step = decoding.run_step(StepCase(name, 2, 4096), torch.float16, clock)
        assert step is not None and 0 < step.us_min <= step.us <= step.us_max < 1e5
        assert step.caches > 1 and step.cold is (step.caches < 1024)
