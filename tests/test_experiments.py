# SPDX-License-Identifier: Apache-2.0
"""The experiments of whole training steps: what is compared is the same but for attention."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import sparse_attn as sa
from benchmarks import __main__ as command
from benchmarks import experiments, timing
from benchmarks.experiments import (
    Candidate,
    Length,
    Million,
    Part,
    Photographs,
    Table2,
    Validation,
    Variant,
)
from benchmarks.results import Machine
from sparse_attn.model import SparseTransformerConfig, presets
from sparse_attn.train.config import TrainingConfig
from sparse_attn.train.corpus import Corpus
from sparse_attn.train.source import check_trains

CPU = torch.device("cpu")
MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    driver="580.0",
    torch="2.13.0",
    cuda="13.0",
    cudnn="9.2",
    python="3.12",
    processor="some",
    threads=4,
    packages={},
    commit="0123456789abcdef",
    date="2026-11-22T12:00:00+00:00",
)


def corpus() -> Corpus:
    text = bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8))
    return Corpus("random bytes", text[:4000], text[4000:], 1, 1)


def part(**changes: Any) -> Part:
    config = SparseTransformerConfig(
        vocab=256, context=90, layers=2, heads=2, width=16, stride=9, columns=3, dropout=0.3
    )
    training = TrainingConfig(steps=3, batch=2, learning_rate=1e-2, warmup=0, logits_std=0.1)
    return Part("text", replace(config, **changes), training, corpus())


def test_identity_leaves_the_values() -> None:
    trainer = part().trainer("identity", experiments.identity, CPU)
    x = torch.randn(2, 31, 16)
    for model in (trainer.model, trainer.averaged):
        for block in model.attention_blocks():
            attention = block.attention
            v = attention.qkv(x)[..., -16:]
            torch.testing.assert_close(attention(x), attention.out(v), rtol=0, atol=0)


@pytest.mark.parametrize("half_qk", [False, True])
def test_every_dense_attention_is_the_same(half_qk: bool) -> None:
    dense = part(half_qk=half_qk, dropout=0.0)
    candidates = experiments.dense_candidates(dense, CPU)
    assert set(candidates) == {"sparse_attn", "sdpa"} | ({"sdpa padded"} if half_qk else set())
    tokens = torch.randint(256, (2, 90))
    logits, losses = {}, {}
    for name, make in candidates.items():
        trainer = dense.trainer("dense", make(), CPU)
        assert trainer.model.config.pattern == "dense"
        logits[name] = trainer.model(tokens)
        losses[name] = [trainer.step() for _ in range(3)]
    assert logits["sdpa"].abs().max() > 0.01
    for name in candidates:
        torch.testing.assert_close(logits[name], logits["sdpa"], rtol=1e-4, atol=1e-5)
        assert losses[name] == pytest.approx(losses["sdpa"], rel=1e-4)


def test_a_swapped_model_trains_the_tensors_of_the_optimiser() -> None:
    trainer = part().trainer("dense", experiments.sdpa, CPU)
    plain = part().trainer("dense", None, CPU)
    names = [name for name, _ in trainer.model.named_parameters()]
    assert names == [name for name, _ in plain.model.named_parameters()]
    optimised = {id(p) for group in trainer.optimiser.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}
    assert not optimised & {id(p) for p in trainer.averaged.parameters()}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.step()
    assert all(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_every_variant_has_the_same_weights_batches_and_steps() -> None:
    made = {}
    for name in experiments.VARIANTS:
        attend = experiments.identity if name == "identity" else None
        made[name] = part().trainer(name, attend, CPU)
    dense = made["dense"]
    for name, trainer in made.items():
        assert trainer.training == dense.training
        for (key, value), (other, wanted) in zip(
            trainer.model.named_parameters(), dense.model.named_parameters(), strict=True
        ):
            assert key == other and torch.equal(value, wanted), (name, key)
        for step in range(3):
            assert torch.equal(trainer.batch(step, 0.5), dense.batch(step, 0.5))
    patterns = {name: x.model.attention_blocks()[0] for name, x in made.items()}
    assert patterns["fixed"].attention.pattern == sa.Chunk(9) | sa.Summary(9, 3, 6)
    assert patterns["strided"].attention.pattern == sa.Local(9) | sa.Dilated(9)
    assert isinstance(patterns["identity"].attention, experiments.Swapped)


def numbered(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A photograph whose red and green tell the column and row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


def test_patches_for_training_and_validation_are_disjoint() -> None:
    source = Photographs("two", (numbered(37, 61), numbered(20, 50)), 7)
    trained = source.batch(5, 2, 200, 147).reshape(-1, 7, 7, 3)
    validated = source.split("validation").reshape(-1, 7, 7, 3)
    whole = source.split("train").reshape(-1, 7, 7, 3)
    # Bands of 28 columns for training, 7 for validation, and what is left for training.
    assert len(validated) == 5 + 2 and len(whole) == 5 * (4 + 3) + 2 * (4 + 2)
    assert set(validated[..., 0].flat) == set(range(28, 35))
    for patches in (trained, whole):
        assert not set(patches[..., 0].flat) & set(range(28, 35))
        assert patches[..., 0].max() > 35
    # Patches are whole: neighbours in the photograph are neighbours in a patch.
    for patches in (trained, validated):
        assert (np.diff(patches[..., 0].astype(int), axis=2) == 1).all()
        assert (np.diff(patches[..., 1].astype(int), axis=1) == 1).all()
    assert len(np.unique(trained[:, 0, 0], axis=0)) > 100  # not a grid
    assert (source.batch(5, 2, 200, 147) == trained.reshape(200, -1)).all()
    assert (source.batch(5, 3, 200, 147) != trained.reshape(200, -1)).any()
    with pytest.raises(ValueError, match="no validation patch of side 13"):
        Photographs("one", (numbered(37, 61), numbered(9, 99)), 13).split("validation")
    with pytest.raises(ValueError, match="no test part"):
        source.split("test")


def test_the_photograph_is_real() -> None:
    source = experiments.photographs(32)
    train, validation = source.split("train"), source.split("validation")
    assert len(train) % 3072 == 0 and len(validation) == 54 * 3072
    assert 30 < train.std() < 128 and "512 x 600" in source.name


def variant(part: experiments.PartName, name: experiments.VariantName, ms: float) -> Variant:
    context = 12288 if part == "text" else 65536
    trained = part == "text"
    return Variant(
        part=part,
        name=name,
        attention="sparse_attn",
        context=context,
        stride=128,
        layers=6,
        batch=8,
        parameters=1000,
        steps=2,
        ms=ms,
        ms_min=ms - 1,
        ms_max=ms + 1,
        peak_bytes=3_000_000_000,
        training=[7.5, 7.0] if trained else [],
        validation=[Validation(2, 7.25)] if trained else [],
        bits=7.25 if trained else None,
        bits_error=0.01 if trained else None,
    )


def made_up(fixed: float = 50.0) -> Table2:
    """Times given by hand, of nothing."""
    rows = [
        variant("text", "dense", 80),
        variant("text", "fixed", fixed),
        variant("text", "strided", 32),
        variant("text", "identity", 20),
        variant("long", "dense", 600),
        variant("long", "fixed", 200),
    ]
    candidates = [
        Candidate("text", "sparse_attn", 90.0),
        Candidate("text", "sdpa", 80.0),
        Candidate("long", "sparse_attn", 600.0),
        Candidate("text", "fa3", None, "no module [flash_attn_interface]"),
    ]
    data = {"text": "some text", "long": "some text"}
    return Table2(MACHINE, data, "bf16", False, 0, candidates, rows)


def test_ratios_of_given_times() -> None:
    found = experiments.ratios(made_up().rows)
    assert [x.speedup for x in found] == pytest.approx([1, 1.6, 2.5, 4, 1, 3])
    assert [x.bound for x in found[:4]] == pytest.approx([4, 2.5, 1.6, 1])
    assert [x.bound for x in found[4:]] == [None, None]
    assert [x.wanted for x in found] == [None, 1.6, 2.1, None, None, 3.0]
    assert experiments.is_reached(made_up())
    assert not experiments.is_reached(made_up(fixed=50.1))
    assert not experiments.is_reached(replace(made_up(), rows=made_up().rows[1:]))
    assert experiments.fastest(made_up().candidates, "text") == "sdpa"
    assert experiments.fastest(made_up().candidates, "long") == "sparse_attn"
    with pytest.raises(RuntimeError, match="no dense attention ran: fa3: no module"):
        experiments.fastest(made_up().candidates[-1:], "text")


def test_growth_of_given_times() -> None:
    def rows(exponent: float) -> list[Length]:
        return [Length(n, 256, 10, 5, n * n**exponent, 1.0, 1e9, None) for n in (1024, 2048, 4096)]

    for exponent, passed in ((0.49, True), (0.3, True), (0.51, False)):
        growth = experiments.token_growth(rows(exponent))
        assert growth.exponent == pytest.approx(exponent) and growth.passed is passed
        million = Million(MACHINE, "noise", "bf16", False, rows(exponent), growth)
        assert experiments.is_reached(million) is passed
    assert not experiments.is_reached(Million(MACHINE, "noise", "bf16", False))
    assert Length(2000, 4, 10, 5, 8.0, 8.0, 8.0, None).tokens_per_s == pytest.approx(250_000)
    assert Length(2000, 4, 10, 5, 8.0, 8.0, 8.0, None).ns_per_token == pytest.approx(4000)


class GivenTimes(timing.CpuClock):
    """Takes every step, and says it took 1000 ms, then 999, ..."""

    def times(self, call: timing.Call, repeats: int) -> list[float]:
        super().times(call, repeats)
        self.left = getattr(self, "left", 1000) - repeats
        return [float(self.left + repeats - number) for number in range(repeats)]


def test_first_steps_are_not_timed() -> None:
    row = experiments.run_variant(
        replace(part(), training=replace(part().training, steps=8)),
        "fixed",
        "ours",
        None,
        GivenTimes(),
    )
    assert (row.ms, row.ms_min, row.ms_max) == (995, 993, 997)
    (candidate,) = [
        x for x in experiments.time_candidates(part(), GivenTimes()) if x.attention == "sdpa"
    ]
    assert candidate.ms == 995  # the last of its three, after the three of ours


def test_lengths_and_strides_of_the_million() -> None:
    assert experiments.lengths(65536, 1 << 20) == [1 << e for e in range(16, 21)]
    assert [experiments.music_config(1 << e).stride for e in range(16, 21)] == [
        256,
        512,
        512,
        1024,
        1024,
    ]
    assert experiments.music_config(1 << 20) == presets.music(1 << 20)
    for shortest, longest in ((1024, 1024), (1024, 2047), (0, 9), (-1, 9)):
        with pytest.raises(ValueError, match="twice that"):
            experiments.lengths(shortest, longest)


def test_failing_candidates_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("no such module\nand a long story")

    monkeypatch.setattr(
        experiments,
        "dense_candidates",
        lambda part, device: {
            "absent": absent,
            "sdpa": lambda: experiments.sdpa,
            "a window": lambda: lambda q, k, v: sa.attention(q, k, v, sa.Local(80)),
            "no dk": lambda: lambda q, k, v: experiments.sdpa(q, k.detach() + 0 * k, v),
        },
    )
    absent_one, there, *wrong = experiments.time_candidates(part(), timing.CpuClock())
    assert absent_one == Candidate("text", "absent", None, "no such module")
    assert [x.ms for x in wrong] == [None, None]
    assert all(candidate.reason.startswith("wrong: off by") for candidate in wrong)
    assert there.attention == "sdpa" and there.ms is not None and there.ms > 0


def test_the_sizes_are_those_of_the_presets_and_the_paper() -> None:
    arguments = command._parser().parse_args(["table2", "--compile"])
    text, long, images = experiments.open_parts(arguments, "bf16")
    assert replace(text.config, layers=30) == presets.enwik8()
    assert replace(long.config, layers=30, context=12288, stride=128) == presets.enwik8()
    assert (long.config.context, long.config.stride, long.trained) == (65536, 256, False)
    assert replace(images.config, layers=128) == presets.cifar10()
    assert (text.training.batch, long.training.batch, images.training.batch) == (8, 1, 16)
    assert text.training.steps == images.training.steps == 600 > long.training.steps
    for each in (text, long, images):
        assert each.training.precision == "bf16" and each.training.compile
        check_trains(each.source, each.config)
    assert experiments.WANTED.keys() == {(x.name, x.config.context) for x in (text, long)}


def shown(experiment: experiments.Experiment) -> str:
    text = io.StringIO()
    experiments.show(experiment, Console(width=200, file=text))
    return text.getvalue()


def test_experiments_survive_their_files(tmp_path: Path) -> None:
    growth = experiments.token_growth([Length(n, 4, 10, 5, n, n, n, 9) for n in (64, 128)])
    million = Million(MACHINE, "noise", "bf16", True, [Length(64, 8, 9, 5, 1, 1, 1, 7)], growth)
    for experiment in (made_up(), million):
        path = experiments.write(experiment, tmp_path)
        assert path.name == f"{experiment.kind}-nvidia-h100-80gb-hbm3.json"
        assert experiments.read(path) == experiment
    text = shown(made_up(fixed=50.1))
    for piece in ("NOT MET", "1.60x", "2.50x", "7.250 ± 0.010", "no module [flash_attn_interface]"):
        assert piece in text, piece
    assert "n^0.00 (wanted <= 0.5, met)" in shown(million)


def another_kind(document: Any) -> None:
    document["kind"] = "table3"


def unknown_variant(document: Any) -> None:
    document["rows"][0]["name"] = "sparse"


def text_for_a_time(document: Any) -> None:
    document["rows"][1]["ms"] = "50"


def no_seed(document: Any) -> None:
    del document["seed"]


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (another_kind, "schema"),
        (unknown_variant, r"rows\[0\].name"),
        (text_for_a_time, r"rows\[1\].ms"),
        (no_seed, "seed"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(
    spoil: Callable[[Any], None], where: str, tmp_path: Path
) -> None:
    path = experiments.write(made_up(), tmp_path)
    document = json.loads(path.read_text())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=where):
        experiments.read(path)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The presets' models, but narrow, and the CPU whatever there is."""
    for name in ("enwik8", "cifar10"):
        config = getattr(presets, name)()
        narrower = replace(config, width=32)
        monkeypatch.setattr(presets, name, lambda narrower=narrower: narrower)
    music = presets.music
    monkeypatch.setattr(presets, "music", lambda n: replace(music(n), width=32))
    monkeypatch.setattr(experiments, "pick_device", lambda: (CPU, "fp32"))
    monkeypatch.setattr(experiments, "VALIDATIONS", 3)
    monkeypatch.setattr(experiments, "VALIDATION_CONTEXTS", 3)
    yield


@pytest.mark.usefixtures("narrow")
def test_table2_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--context 200 --side 5 --longest 600 --layers 2 --batch 2 --steps 6 --commit abc"
    data = tmp_path / "text.py"
    data.write_bytes(Path(experiments.__file__).read_bytes())
    arguments = ["table2", *options.split(), "--data", str(data), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    table = experiments.read(path)
    assert isinstance(table, Table2) and table.machine.commit == "abc"
    assert [(row.part, row.name) for row in table.rows] == [
        (part, name) for part in ("text", "long", "images") for name in experiments.VARIANTS
    ]
    assert {row.part: (row.context, row.stride, row.batch) for row in table.rows} == {
        "text": (200, 128, 2),
        "long": (600, 256, 1),
        "images": (75, 15, 2),
    }
    for row in table.rows:
        assert 0 < row.ms_min <= row.ms <= row.ms_max
        assert len({x.parameters for x in table.rows if x.part == row.part}) == 1
        if row.part == "long":
            assert row.bits is None and not row.training and not row.validation
            continue
        assert [x.step for x in row.validation] == [2, 4, 6]
        assert len(row.training) == 6 and row.bits == row.validation[-1].bits
        # Logits begin at 0: every byte takes 8 bits at first, whatever the attention.
        assert row.training[0] == pytest.approx(8, abs=1e-5) and 3 < row.bits < 8.2
    dense = {row.part: row.attention for row in table.rows if row.name == "dense"}
    assert all(dense[part] == experiments.fastest(table.candidates, part) for part in dense)
    learned = [tuple(row.training) for row in table.rows if row.part == "text"]
    assert len(set(learned)) == 4
    text = capsys.readouterr().out
    assert "grace_hopper" in text and "dense by sdpa" in text and "this / identity" in text
    chart = path.with_suffix(".png")
    assert chart.read_bytes().startswith(b"\x89PNG")
    chart.unlink()
    assert command.main(["show", str(path)]) == 0
    assert chart.exists()


@pytest.mark.usefixtures("narrow")
def test_million_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--shortest 128 --longest 512 --steps 2 --commit abc"
    code = command.main(["million", *options.split(), "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    million = experiments.read(path)
    assert isinstance(million, Million) and million.growth is not None
    assert code == (0 if million.growth.passed else 1)
    assert [(row.context, row.stride) for row in million.rows] == [(128, 16), (256, 16), (512, 32)]
    assert all(0 < row.ms_min <= row.ms <= row.ms_max for row in million.rows)
    assert "time per token: n^" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2", "--parts", "text,sound"], "parts are 'text,sound'"),
        (["table2", "--steps", "0"], "steps is 0"),
        (["table2", "--data", "/no/such/file"], "no data at"),
        (["million", "--shortest", "512", "--longest", "512"], "shortest is 512"),
        (["million", "--steps", "0"], "steps is 0"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith(message)
    assert not list(tmp_path.iterdir())
