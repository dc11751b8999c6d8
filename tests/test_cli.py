"""The sparse-attn command, by its public options."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import sparse_attn as sa
from sparse_attn.cli import main
from sparse_attn.data import load, prepare
from sparse_attn.model import SparseTransformer, SparseTransformerConfig
from sparse_attn.train import Trainer, baselines, checkpoint, corpus, demo, evaluate
from sparse_attn.train.presets import PRESETS

Output = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path, seed: int) -> Path:
    """A file of words."""
    random = np.random.default_rng(seed)
    path = tmp_path / "words.txt"
    path.write_bytes(b" ".join(random.choice([b"sparse", b"dense", b"local"], 3000)))
    return path


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Path:
    """A checkpoint of three steps."""
    out = tmp_path / "run"
    assert main([*train(data, out), "--steps", "3"]) == 0
    return out / "checkpoint.safetensors"


def train(data: Path, out: Path) -> list[str]:
    return ["train", str(data), "--out", str(out), "--context", "128", "--batch", "1"]


def assert_one_line_error(argv: list[str], capsys: Output, *parts: str) -> None:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse-attn: error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


class TestTrain:
    def test_writes_a_checkpoint_and_prints_bits(
        self, data: Path, tmp_path: Path, capsys: Output
    ) -> None:
        assert main([*train(data, tmp_path / "run"), "--steps", "3", "--lr", "0.01"]) == 0
        assert "bits per byte" in capsys.readouterr().out
        saved = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
        assert saved.progress["step"] == 3
        assert saved.progress["training"]["learning_rate"] == 0.01
        assert saved.config["context"] == 128

    def test_options_are_kept(self, data: Path, tmp_path: Path) -> None:
        argv = ["train", str(data), "--out", str(tmp_path / "run"), "--context", "96"]
        argv += ["--steps", "2", "--batch", "5", "--accumulation", "3", "--ema", "0.5"]
        argv += ["--warmup", "7", "--precision", "bf16", "--seed", "3"]
        assert main(argv) == 0
        saved = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
        wanted = {"batch": 5, "accumulation": 3, "ema": 0.5, "warmup": 7, "precision": "bf16"}
        for name, value in {**wanted, "seed": 3, "compile": False}.items():
            assert saved.progress["training"][name] == value

    def test_every_preset_by_name(self, data: Path, tmp_path: Path, capsys: Output) -> None:
        for name in PRESETS:
            if name == "demo":
                continue
            argv = ["train", str(data), "--out", str(tmp_path / "run"), "--preset", name]
            argv += ["--batch", "1", "--accumulation", "1", "--context", "100000000"]
            message = "position_shape" if name in ("cifar10", "imagenet64") else "one context is"
            assert_one_line_error(argv, capsys, message)

    def test_prepared_data_and_tensorboard(
        self, data: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare("bytes", data, tmp_path / "prepared")
        argv = [*train(tmp_path / "prepared", tmp_path / "run"), "--steps", "2", "--tensorboard"]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch.utils.tensorboard", None)
            assert_one_line_error(argv, capsys, "pip install tensorboard")
        assert not (tmp_path / "run").exists()
        stub = ModuleType("torch.utils.tensorboard")
        board = MagicMock()
        stub.SummaryWriter = board  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        assert main(argv) == 0
        board.assert_called_once_with(str(tmp_path / "run" / "tensorboard"), purge_step=1)
        board().close.assert_called_once()
        assert f"{tmp_path / 'prepared'}, validation: " in capsys.readouterr().out

    def test_interrupted_and_resumed_equals_uninterrupted(
        self, data: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, part = tmp_path / "whole", tmp_path / "part"
        assert main([*train(data, whole), "--steps", "6"]) == 0
        with monkeypatch.context() as patch:
            interrupt_at(4, patch)
            assert main([*train(data, part), "--steps", "6"]) == 130
        printed = capsys.readouterr()
        assert "--resume goes on from" in printed.out
        assert printed.err == "sparse-attn: interrupted\n"
        assert main(["train", str(data), "--out", str(part), "--resume"]) == 0
        assert "going on from step 4" in capsys.readouterr().out
        a, b = (checkpoint.load(x / "checkpoint.safetensors").tensors for x in (whole, part))
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_resume_refuses_other_options(self, data: Path, trained: Path, capsys: Output) -> None:
        resume = ["train", str(data), "--out", str(trained.parent), "--resume"]
        assert main([*resume, "--steps", "3", "--batch", "1", "--context", "128"]) == 0
        assert_one_line_error(
            [*resume, "--batch", "2"], capsys, str(trained), "batch is 1, wanted 2"
        )
        assert_one_line_error([*resume, "--preset", "demo"], capsys, "context is 128")

    def test_old_checkpoint_is_not_overwritten(
        self, data: Path, trained: Path, capsys: Output
    ) -> None:
        before = trained.read_bytes()
        assert_one_line_error(train(data, trained.parent), capsys, str(trained), "--resume")
        assert trained.read_bytes() == before

    def test_data_errors(self, data: Path, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "run"
        absent = tmp_path / "absent"
        assert_one_line_error(train(absent, out), capsys, f"no data at {absent}")
        (tmp_path / "short").write_bytes(b"x" * 100)
        assert_one_line_error(
            train(tmp_path / "short", out), capsys, "short has 95 bytes", "one context is 128"
        )
        assert_one_line_error([*train(data, out), "--resume"], capsys, "no checkpoint at")
        assert_one_line_error([*train(data, out), "--steps", "0"], capsys, "steps is 0")
        assert not out.exists()

    def test_missing_extras(
        self, data: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("safetensors", "rich.console"):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                assert_one_line_error(
                    train(data, tmp_path), capsys, 'pip install "sparse-attn[train]"'
                )


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step, with a checkpoint after every step before it."""
    batch: Callable[[Trainer, int, float], torch.Tensor] = Trainer.batch

    def interrupted(trainer: Trainer, number: int, done: float) -> torch.Tensor:
        if number == step:
            raise KeyboardInterrupt
        return batch(trainer, number, done)

    patch.setattr(Trainer, "batch", interrupted)


class TestEvaluate:
    def test_scores_for_every_min_context(
        self, data: Path, trained: Path, tmp_path: Path, capsys: Output
    ) -> None:
        capsys.readouterr()
        argv = ["evaluate", str(trained), str(data), "--min-context", "0,50,127", "--bytes", "500"]
        assert main([*argv, "--precision", "fp32"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == f"{trained}, step 3"
        assert printed[1] == f"{data}, validation: 500 bytes, each once"
        saved = checkpoint.load(trained)
        model = SparseTransformer(SparseTransformerConfig.from_dict(saved.config))
        model.load_state_dict(saved.group("average"))
        values = corpus.load_corpus(data).split("validation")[:500]
        for line, least in zip(printed[2:], (0, 50, 127), strict=True):
            score = evaluate(model, values, 1, least)
            assert line == (
                f"given the {least} or more before it: {score.bits:.4f} bits per byte, "
                f"standard error {score.standard_error:.4f}"
            )

    def test_whole_split_given_half_the_context(
        self, data: Path, trained: Path, capsys: Output
    ) -> None:
        prepare("bytes", data, data.with_name("prepared"))
        capsys.readouterr()
        argv = ["evaluate", str(trained), str(data.with_name("prepared")), "--split", "train"]
        assert main(argv) == 0
        printed = capsys.readouterr().out
        length = len(load(data.with_name("prepared")).train)
        assert f"train: {length:,} bytes" in printed
        assert "given the 64 or more before it: " in printed

    def test_images(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        images = np.random.default_rng(seed).integers(0, 256, (9, 3, 5, 3), np.uint8)
        source = SimpleNamespace(
            name="pictures",
            digest="of noise",
            example=(3, 5, 3),
            split=lambda name: images.reshape(-1),
            batch=lambda seed, step, count, length: images[:count].reshape(count, length),
        )
        monkeypatch.setattr("sparse_attn.train.open_source", lambda path: source)
        out = tmp_path / "run"
        argv = ["train", "pictures", "--out", str(out), "--context", "45", "--steps", "1"]
        assert main(argv) == 0
        assert "bits per dimension" in capsys.readouterr().out
        evaluate = ["evaluate", str(out / "checkpoint.safetensors"), "pictures"]
        assert main([*evaluate, "--split", "test", "--bytes", "200", "--batch", "3"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[1] == "pictures, test: 180 bytes, each once"
        assert re.fullmatch(r"\d\.\d{4} bits per dimension, standard error \d\.\d{4}", printed[2])
        assert_one_line_error([*evaluate, "--min-context", "5"], capsys, "scored whole")
        assert_one_line_error([*evaluate, "--bytes", "44"], capsys, "limit is 44, wanted 45")
        source.example = (5, 5, 3)
        assert_one_line_error(evaluate, capsys, "examples of 75 values", "is 45")

    def test_errors(self, data: Path, trained: Path, tmp_path: Path, capsys: Output) -> None:
        evaluate = ["evaluate", str(trained), str(data)]
        assert_one_line_error([*evaluate, "--split", "test"], capsys, "no test part")
        assert_one_line_error([*evaluate, "--min-context", "128"], capsys, "wanted 0 to 127")
        assert_one_line_error([*evaluate, "--bytes", "0"], capsys, "limit is 0, wanted 1 or more")
        assert_one_line_error([*evaluate, "--batch", "0"], capsys, "batch is 0")
        absent = str(tmp_path / "no")
        assert_one_line_error(["evaluate", absent, str(data)], capsys, "no checkpoint at")
        assert_one_line_error(["evaluate", str(trained), absent], capsys, "no data at")
        with pytest.raises(SystemExit):
            main([*evaluate, "--min-context", "1,x"])
        assert "wanted numbers such as 6144,9216, got '1,x'" in capsys.readouterr().err


class TestSample:
    def test_seed_decides(self, trained: Path, capsys: Output) -> None:
        def sample(*options: str) -> str:
            capsys.readouterr()
            argv = ["sample", str(trained), "--prompt", "déf", "--length", "60", *options]
            assert main(argv) == 0
            return capsys.readouterr().out

        first = sample("--seed", "1", "--temperature", "1.0")
        assert first.startswith("déf")
        assert sample("--seed", "1", "--temperature", "1.0") == first
        assert sample("--seed", "2", "--temperature", "1.0") != first
        assert sample() != sample()
        likeliest = sample("--temperature", "0")
        assert sample("--top-k", "1") == likeliest

    def test_errors(self, trained: Path, tmp_path: Path, capsys: Output) -> None:
        sample = ["sample", str(trained)]
        assert_one_line_error([*sample, "--length", "129"], capsys, "context of 128")
        assert_one_line_error([*sample, "--top-k", "0", "--length", "5"], capsys, "top_k")
        assert_one_line_error(["sample", str(tmp_path / "no")], capsys, "no checkpoint at")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(trained.read_bytes()[:-5])
        assert_one_line_error(["sample", str(broken)], capsys, str(broken), "truncated")


class TestPlot:
    def test_pictures(self, trained: Path, data: Path, tmp_path: Path, capsys: Output) -> None:
        learned = ["--text", str(data), "--layer", "0", "--head", "1", "--position", "70"]
        cases: list[list[str]] = [
            [],
            ["strided:16"],
            ["Local(window=3) | Dilated(stride=5)", "--n", "20"],
            [str(trained)],
            [str(trained), *learned],
        ]
        for number, options in enumerate(cases):
            out = tmp_path / f"{number}.png"
            assert main(["plot", *options, "--out", str(out)]) == 0
            assert str(out) in capsys.readouterr().out
            assert min(imread(out).shape[:2]) > 100
            assert out.stat().st_size < 200_000

    def test_errors(self, trained: Path, tmp_path: Path, capsys: Output) -> None:
        out = ["--out", str(tmp_path / "x.png")]
        assert_one_line_error(["plot", "spiral:3", *out], capsys, "spiral")
        assert_one_line_error(["plot", "strided:0", *out], capsys, "stride", "0")
        assert_one_line_error(["plot", "strided:4", "--n", "0", *out], capsys, "n is 0")
        assert_one_line_error(["plot", str(tmp_path / "no.safetensors"), *out], capsys, "no.safe")
        assert_one_line_error(["plot", str(trained), "--layer", "9", *out], capsys, "layer")
        assert_one_line_error(["plot", "--out", str(tmp_path / "x.what")], capsys, "what")
        assert_one_line_error(["plot", "--out", str(tmp_path / "no" / "x.png")], capsys, "no/x.png")
        assert not (tmp_path / "x.png").exists()

    def test_missing_extra(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        argv = ["plot", "--out", str(tmp_path / "x.png")]
        assert_one_line_error(argv, capsys, 'pip install "sparse-attn[plot]"')


class TestDemo:
    @pytest.fixture(autouse=True)
    def short_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "SAMPLE_LENGTH", 20)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with a file on each side of the split."""
        folder = tmp_path / "text"
        folder.mkdir()
        for on_validation_side in (False, True):
            name = next(
                name
                for name in map(str, range(1000))
                if corpus.goes_to_validation(name) == on_validation_side
            )
            # What the counts are sure of is wrong on the validation side.
            content = bytes(range(128, 256)) * 8 if on_validation_side else b"ab" * 4000
            (folder / name).write_bytes(content)
        return folder

    def test_short_run(self, folder: Path, tmp_path: Path, capsys: Output) -> None:
        out = tmp_path / "out"
        argv = ["demo", "--data", str(folder), "--steps", "2", "--out", str(out)]
        assert main(argv) == 0
        printed = capsys.readouterr().out
        text = corpus.load_corpus(folder)
        assert f"{len(text.validation):,} bytes (1 files) to validate on" in printed
        assert "attention backend torch" in printed or torch.cuda.is_available()
        for name, bits in demo.score_baselines(text).items():
            row = next(line for line in printed.splitlines() if f" {name} " in line)
            assert f"{bits:.3f}" in row
        verdict = "beats order 0, order 1, order 2 and order 3; xz still wins."
        assert verdict in " ".join(printed.split())
        for name in ("loss.png", "connectivity.png", "attention.png"):
            assert min(imread(out / name).shape[:2]) > 100
        saved = checkpoint.load(out / "checkpoint.safetensors")
        assert saved.progress["step"] == 2
        assert len(saved.tensors["history.losses"]) == 2
        assert "a sample, after 'def '" in printed

    def test_fails_honestly(self, data: Path, tmp_path: Path, capsys: Output) -> None:
        argv = ["demo", "--data", str(data), "--steps", "1", "--out", str(tmp_path / "out")]
        assert main(argv) == 1
        printed = capsys.readouterr().out
        assert "FAILED" in printed
        assert "do not beat order 1" in printed
        assert (tmp_path / "out" / "loss.png").exists()

    def test_missing_extras_before_any_work(
        self, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module, extra in (
            ("rich.console", "train"),
            ("safetensors", "train"),
            ("matplotlib.figure", "plot"),
        ):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                argv = ["demo", "--out", str(tmp_path / "out")]
                assert_one_line_error(argv, capsys, f'pip install "sparse-attn[{extra}]"')
        assert not (tmp_path / "out").exists()

    def test_bad_options(self, data: Path, tmp_path: Path, capsys: Output) -> None:
        argv = ["demo", "--data", str(data), "--out", str(tmp_path / "out")]
        assert_one_line_error([*argv, "--steps", "0"], capsys, "steps is 0, wanted more than 0")
        assert_one_line_error([*argv, "--seconds", "0"], capsys, "seconds is 0.0, wanted more")
        assert_one_line_error([*argv, "--seed", "-1"], capsys, "seed is -1, wanted 0 or more")
        absent = tmp_path / "absent"
        assert_one_line_error(["demo", "--data", str(absent)], capsys, f"no data at {absent}")
        assert not (tmp_path / "out").exists()

    def test_verdict(self) -> None:
        scores = {"order 0": 4.8, "order 1": 3.5, "xz": 1.2}
        for bits, words in (
            (2.0, "beats order 0 and order 1; xz still wins."),
            (4.0, "beats order 0; order 1 and xz still win."),
            (1.0, "beats order 0, order 1 and xz; none of them still win."),
            (8.0, "beats none of them; order 0, order 1 and xz still win."),
        ):
            assert demo.verdict(bits, scores) == f"The Sparse Transformer {words}"

    def test_baselines_by_name(self, data: Path) -> None:
        text = corpus.load_corpus(data)
        scores = demo.score_baselines(text)
        assert list(scores) == ["order 0", "order 1", "order 2", "order 3", "xz"]
        assert scores["xz"] == baselines.xz_bits(text.train, text.validation)


def test_unknown_options(capsys: Output) -> None:
    for argv in ([], ["fly"], ["train"], ["sample"], ["plot"], ["demo", "--steps", "two"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "usage: sparse-attn" in capsys.readouterr().err


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "sparse_attn.cli"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"sparse-attn {sa.__version__}\n"
    failed = subprocess.run(
        [*command, "train", str(tmp_path / "absent"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.startswith("sparse-attn: error: no data at")
