"""Training: the split of the text, baselines, checkpoints, the trainer."""

from __future__ import annotations

import errno
import io
import lzma
import math
import os
import re
import resource
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from sparse_attn.data import prepare
from sparse_attn.model import SparseTransformer, SparseTransformerConfig
from sparse_attn.train import (
    Trainer,
    TrainingConfig,
    baselines,
    checkpoint,
    corpus,
    evaluate,
    loop,
    report,
    source,
)
from sparse_attn.train.checkpoint import Checkpoint, CheckpointError
from sparse_attn.train.corpus import Corpus
from sparse_attn.train.presets import PRESETS, preset

MODEL = SparseTransformerConfig(
    vocab=256,
    context=64,
    layers=2,
    heads=2,
    width=32,
    stride=16,
    columns=4,
    dropout=0.1,
    initialisation="paper",
    recompute=False,
)
TRAINING = TrainingConfig(steps=12, batch=2, learning_rate=3e-3, warmup=3)


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def words(random: np.random.Generator, count: int) -> bytes:
    """Text of a few repeated words."""
    return b" ".join(random.choice([b"sparse", b"dense", b"local", b"chunk"], count))


def text_corpus(random: np.random.Generator, count: int = 400) -> Corpus:
    return Corpus("words", words(random, count), words(random, 60), 1, 1)


class TestCorpus:
    def test_split_is_a_partition_with_copies_on_one_side(
        self, random: np.random.Generator
    ) -> None:
        files = {f"p{i}/{random.integers(1 << 40)}.py": random.bytes(8) for i in range(2000)}
        contents = list(files.values())
        copies = {f"copy/{i}.py": contents[random.integers(2000)] for i in range(2000)}
        files |= copies | {"empty.py": b""}
        train, validation = corpus.split_files(files)
        assert sorted(train + validation) == sorted(set(files) - {"empty.py"})
        assert {files[p] for p in train}.isdisjoint(files[p] for p in validation)

    def test_side_depends_on_the_path_alone(self, random: np.random.Generator) -> None:
        files = {f"{i}.py": random.bytes(20) for i in range(1000)}
        train, validation = corpus.split_files(files)
        assert validation == sorted(p for p in files if corpus.goes_to_validation(p))
        half = dict(list(files.items())[::2])
        assert corpus.split_files(half) == (
            [p for p in train if p in half],
            [p for p in validation if p in half],
        )

    def test_share(self, random: np.random.Generator) -> None:
        paths = [f"folder/{i}-{random.integers(1 << 60)}.py" for i in range(20_000)]
        share = np.mean([corpus.goes_to_validation(path) for path in paths])
        assert abs(share - 0.05) < 0.01  # six standard deviations

    def test_folder_without_tests_packages_and_hidden_files(self, tmp_path: Path) -> None:
        kept = ["a.py", "deep/er/b.py"]
        left = [
            "test/c.py",
            "deep/tests/d.py",
            "idlelib/idle_test/e.py",
            "site-packages/f.py",
            "dist-packages/g.py",
            "__pycache__/h.py",
            ".git/i.py",
            ".j.py",
            "k.txt",
        ]
        for name in kept + left:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        assert corpus.read_folder(tmp_path, ".py") == {name: name.encode() for name in kept}
        assert "k.txt" in corpus.read_folder(tmp_path)

    def test_standard_library(self) -> None:
        library = corpus.standard_library()
        source = Path(sysconfig.get_path("stdlib"), "textwrap.py").read_bytes()
        assert (source in library.train) != (source in library.validation)
        assert 100_000 < len(library.validation) < 0.15 * len(library.train)
        assert library == corpus.standard_library()

    def test_file(self, tmp_path: Path, random: np.random.Generator) -> None:
        data = random.bytes(1000)
        (tmp_path / "data").write_bytes(data)
        loaded = corpus.load_corpus(tmp_path / "data")
        assert loaded.train + loaded.validation == data
        assert len(loaded.validation) == 50

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no data at .*absent"):
            corpus.load_corpus(tmp_path / "absent")
        (tmp_path / "only.txt").write_text("one file")
        with pytest.raises(ValueError, match="both need at least one"):
            corpus.load_corpus(tmp_path)


def witten_bell(train: bytes, context: bytes, byte: int) -> float:
    """The formula of the docstring, by dicts."""
    shorter = witten_bell(train, context[1:], byte) if context else 1 / 256
    following = Counter(
        train[i + len(context)]
        for i in range(len(train) - len(context))
        if train[i : i + len(context)] == context
    )
    total, kinds = sum(following.values()), len(following)
    return (following[byte] + kinds * shorter) / (total + kinds) if total else shorter


class TestBaselines:
    @pytest.mark.parametrize("letters", [b"ab", b"abcdef\xff\x00"])
    def test_equal_to_brute_force(self, random: np.random.Generator, letters: bytes) -> None:
        train, text = (bytes(random.choice(list(letters), size)) for size in (120, 40))
        text += b"zz"  # bytes and contexts never seen in training
        for order, got in enumerate(baselines.byte_probabilities(train, text, 3)):
            wanted = [
                witten_bell(train, text[max(0, i - order) : i], text[i]) for i in range(len(text))
            ]
            np.testing.assert_allclose(got, wanted, rtol=1e-12)

    def test_probabilities_sum_to_one(self, random: np.random.Generator) -> None:
        train = bytes(random.choice(list(b"abcd"), 300))
        for context in (b"abc", b"dda", b"xyz", b"\x00\xff\x00"):
            for order in range(4):
                total = sum(
                    baselines.byte_probabilities(train, context + bytes([byte]), order)[order][3]
                    for byte in range(256)
                )
                assert total == pytest.approx(1, abs=1e-12)

    def test_bits(self, random: np.random.Generator) -> None:
        train, text = words(random, 3000), words(random, 300)
        bits = baselines.count_model_bits(train, text)
        assert bits == sorted(bits, reverse=True)  # more context helps on words
        probability = baselines.byte_probabilities(train, text, 2)[2]
        assert bits[2] == pytest.approx(-sum(map(math.log2, probability)) / len(text))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="max_order is 4, wanted 0 to 3"):
            baselines.byte_probabilities(b"text", b"text", 4)
        with pytest.raises(ValueError, match="3 training bytes are too few for order 3"):
            baselines.byte_probabilities(b"abc", b"text", 3)

    def test_xz(self, random: np.random.Generator) -> None:
        train, new = random.bytes(200_000), random.bytes(20_000)
        # A match at the far end of the training text costs a few bytes for each 273 of text.
        assert baselines.xz_bits(train, train[:20_000]) < 0.2
        assert 8 <= baselines.xz_bits(train, new) < 8.1
        sizes = [len(lzma.compress(x)) for x in (train, train + new)]  # with a header and checksums
        assert baselines.xz_bits(train, new) == pytest.approx(
            8 * (sizes[1] - sizes[0]) / len(new), rel=0.01
        )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A checkpoint of every kind of tensor, on disk."""
    tensors = {
        "model.weight": torch.randn(3, 5),
        "model.half": torch.randn(4).to(torch.bfloat16),
        "model.empty": torch.zeros(0, 2),
        "optimiser.step": torch.tensor(7.0),
        "random.cpu": torch.get_rng_state()[:40],
        "view": torch.randn(6, 4).T,
    }
    content = Checkpoint({"width": 32}, {"step": 3, "text": "ü"}, tensors)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, content)
    return path, content


def assert_holds(path: Path, wanted: Checkpoint) -> None:
    got = checkpoint.load(path)
    assert (got.config, got.progress) == (wanted.config, wanted.progress)
    assert got.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor)


def interrupt(error: BaseException) -> Callable[..., Any]:
    def raise_error(*args: object) -> None:
        raise error

    return raise_error


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Files cannot grow past `bytes_left`: a write stops midway with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestCheckpoint:
    def test_round_trip(self, saved: tuple[Path, Checkpoint]) -> None:
        assert_holds(*saved)
        assert os.listdir(saved[0].parent) == [saved[0].name]

    def test_truncated_anywhere(self, saved: tuple[Path, Checkpoint]) -> None:
        path, _ = saved
        content = path.read_bytes()
        for size in range(len(content)):
            path.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is truncated"):
                checkpoint.load(path)
        path.write_bytes(content + b"\x00")
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            checkpoint.load(path)

    def test_flipped_byte_anywhere(
        self, saved: tuple[Path, Checkpoint], random: np.random.Generator
    ) -> None:
        path, wanted = saved
        content = path.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= int(random.integers(1, 256))
            path.write_bytes(flipped)
            try:
                checkpoint.load(path)
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                # Only the JSON's padding and letter case can differ without meaning.
                assert_holds(path, wanted)

    def test_other_files(self, tmp_path: Path) -> None:
        safetensors_torch = checkpoint.import_safetensors()[1]
        path = tmp_path / "other.safetensors"
        safetensors_torch.save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(CheckpointError, match="of format None, wanted 'sparse_attn"):
            checkpoint.load(path)
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            checkpoint.load(tmp_path / "absent")
        with pytest.raises(IsADirectoryError, match="is a folder, wanted"):
            checkpoint.load(tmp_path)

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=repr
    )
    @pytest.mark.parametrize("place", ["fsync", "replace"])
    def test_interrupted_save_keeps_the_old_one(
        self,
        saved: tuple[Path, Checkpoint],
        monkeypatch: pytest.MonkeyPatch,
        place: str,
        error: BaseException,
    ) -> None:
        path, old = saved
        new = Checkpoint({"width": 64}, {"step": 4}, {"model.weight": torch.randn(100, 100)})
        with monkeypatch.context() as patch:
            patch.setattr(os, place, interrupt(error))
            with pytest.raises(type(error)):
                checkpoint.save(path, new)
        assert os.listdir(path.parent) == [path.name]
        assert_holds(path, old)
        checkpoint.save(path, new)
        assert_holds(path, new)

    def test_disk_full_in_the_middle_of_a_write(self, saved: tuple[Path, Checkpoint]) -> None:
        path, old = saved
        new = Checkpoint({}, {}, {"model.weight": torch.randn(500, 500)})
        with full_disk(300_000), pytest.raises(OSError, match="File too large"):
            checkpoint.save(path, new)
        assert os.listdir(path.parent) == [path.name]
        assert_holds(path, old)

    def test_leftover_of_a_killed_process_goes_with_the_next_save(
        self, saved: tuple[Path, Checkpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, old = saved
        with monkeypatch.context() as patch:  # killed: nothing is tidied up
            patch.setattr(os, "replace", interrupt(SystemExit()))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(SystemExit):
                checkpoint.save(path, old)
        assert len(os.listdir(path.parent)) == 2
        checkpoint.save(path, old)
        assert os.listdir(path.parent) == [path.name]

    def test_missing_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r'pip install "sparse-attn\[train\]"'):
            checkpoint.load(tmp_path)


class Pictures:
    """Independent images of bytes as a source: (count, height, width, 3)."""

    name, digest = "pictures", "of noise"

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images
        self.example: tuple[int, ...] = images.shape[1:]

    def split(self, name: str) -> NDArray[np.uint8]:
        return self.images.reshape(-1)

    def batch(self, seed: int, step: int, count: int, length: int) -> NDArray[np.uint8]:
        assert length == math.prod(self.example)
        chosen = np.random.default_rng([seed, step]).integers(0, len(self.images), count)
        return self.images[chosen].reshape(count, length)


class TestSource:
    @pytest.fixture
    def pictures(self, random: np.random.Generator) -> Pictures:
        return Pictures(random.integers(0, 256, (5, 3, 4, 3), np.uint8))

    def test_corpus_windows_depend_on_the_arguments_alone(
        self, random: np.random.Generator
    ) -> None:
        text = text_corpus(random)
        batch = text.batch(7, 11, 3, 29)
        assert batch.shape == (3, 29)
        start = np.random.default_rng([7, 11]).integers(0, len(text.train) - 28, 3)
        assert [bytes(row) for row in batch] == [text.train[i : i + 29] for i in start]
        assert (text.batch(7, 11, 3, 29) == batch).all()
        assert (text.batch(7, 12, 3, 29) != batch).any()

    def test_corpus_splits(self, random: np.random.Generator) -> None:
        text = text_corpus(random)
        assert bytes(text.split("train")) == text.train
        assert bytes(text.split("validation")) == text.validation
        with pytest.raises(ValueError, match="words has no test part"):
            text.split("test")

    def test_prepared_folder(self, tmp_path: Path, random: np.random.Generator) -> None:
        (tmp_path / "file").write_bytes(random.bytes(5000))
        dataset = prepare("bytes", tmp_path / "file", tmp_path / "data")
        opened = source.open_source(tmp_path / "data")
        assert (opened.name, opened.digest) == (str(tmp_path / "data"), dataset.digest)
        assert opened.example is None
        assert source.unit(opened) == "bits per byte"
        for name in ("train", "validation"):
            assert bytes(opened.split(name)) == bytes(getattr(dataset, name).values)
        assert (opened.batch(3, 5, 2, 31) == dataset.train.batch(3, 5, 2, 31)).all()
        trainer = Trainer(MODEL, TRAINING, opened)
        assert bytes(trainer.batch(2, 0.0)[1].tolist()) in bytes(opened.split("train"))
        with pytest.raises(ValueError, match="data has nothing in its test part"):
            opened.split("test")
        assert isinstance(source.open_source(tmp_path / "file"), Corpus)

    def test_limit_keeps_whole_examples(self, pictures: Pictures) -> None:
        assert len(source.first_values(pictures, "test", None)) == 180
        assert len(source.first_values(pictures, "test", 107)) == 72
        with pytest.raises(ValueError, match="limit is 35, wanted 36 or more"):
            source.first_values(pictures, "test", 35)

    def test_examples_are_never_cut(self, pictures: Pictures) -> None:
        training = replace(TRAINING, short_share=0.5, short_window=9)
        trainer = Trainer(replace(MODEL, context=36), training, pictures)
        assert trainer.batch(0, 0.0).shape == (2, 36)
        assert source.unit(pictures) == "bits per dimension"

    def test_model_that_does_not_fit(self, pictures: Pictures) -> None:
        with pytest.raises(ValueError, match=r"36 values \(3, 4, 3\), the context .* is 64"):
            Trainer(MODEL, TRAINING, pictures)
        model = replace(MODEL, context=36, positions="data", position_shape=(4, 3, 3))
        with pytest.raises(ValueError, match=r"shape \(3, 4, 3\), the position_shape .* \(4, 3, 3"):
            Trainer(model, TRAINING, pictures)
        with pytest.raises(ValueError, match="vocab is 255, wanted 256 or more"):
            Trainer(replace(MODEL, vocab=255), TRAINING, pictures)


def break_weights(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.final_norm.weight.fill_(math.nan)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class TestTrainer:
    def test_same_seed_same_losses(self, random: np.random.Generator) -> None:
        data = text_corpus(random)
        first = Trainer(MODEL, TRAINING, data)
        first_losses = [first.step() for _ in range(6)]
        second = Trainer(MODEL, TRAINING, data)
        assert [second.step() for _ in range(6)] == first_losses
        other = Trainer(MODEL, replace(TRAINING, seed=1), data)
        assert [other.step() for _ in range(6)] != first_losses

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_resumed_run_equals_an_uninterrupted_one(
        self, random: np.random.Generator, tmp_path: Path, precision: str
    ) -> None:
        data = text_corpus(random)
        training = replace(TRAINING, precision=precision, accumulation=2, short_share=0.5)
        whole = Trainer(MODEL, training, data)
        whole.scaler.load_state_dict({**whole.scaler.state_dict(), "growth_interval": 4})
        whole.validations.append((5, 1.5))
        for _ in range(5):
            whole.step()
        whole.save(tmp_path / "c")
        for _ in range(5):
            whole.step()

        resumed = Trainer(MODEL, training, data)
        resumed.step()
        resumed.restore(checkpoint.load(tmp_path / "c"))
        assert resumed.step_number == 5
        for _ in range(5):
            resumed.step()
        assert resumed.losses == whole.losses
        assert resumed.scaler.state_dict() == whole.scaler.state_dict()
        assert resumed.validations == whole.validations
        assert_same_weights(weights(resumed), weights(whole))
        assert_same_weights(resumed.averaged.state_dict(), whole.averaged.state_dict())

    @pytest.mark.parametrize(
        ("model", "training", "data", "message"),
        [
            ({"layers": 3}, {}, {}, "another model: layers is 2, wanted 3"),
            ({"context": 32}, {}, {}, "another model: context is 64, wanted 32"),
            ({}, {"learning_rate": 1e-3}, {}, "learning_rate is 0.003, wanted 0.001"),
            ({}, {"seed": 9}, {}, "another training run: seed is 0, wanted 9"),
            ({}, {"ema": 0.0}, {}, r"another training run: ema is 0\.999, wanted 0\.0"),
            ({}, {}, {"train": b"x" * 100}, "another data set: digest"),
        ],
        ids=["layers", "context", "learning-rate", "seed", "ema", "data"],
    )
    def test_restore_refuses_another_run(
        self,
        random: np.random.Generator,
        tmp_path: Path,
        model: dict[str, Any],
        training: dict[str, Any],
        data: dict[str, Any],
        message: str,
    ) -> None:
        text = text_corpus(random)
        trainer = Trainer(MODEL, TRAINING, text)
        trainer.save(tmp_path / "c")
        other = Trainer(
            replace(MODEL, **model), replace(TRAINING, **training), replace(text, **data)
        )
        with pytest.raises(CheckpointError, match=message) as caught:
            other.restore(checkpoint.load(tmp_path / "c"))
        assert str(tmp_path / "c") in str(caught.value)

    @pytest.mark.parametrize("group", ["model", "average"])
    def test_weights_of_another_shape_are_refused(
        self, random: np.random.Generator, tmp_path: Path, group: str
    ) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        trainer.save(tmp_path / "c")
        saved = checkpoint.load(tmp_path / "c")
        saved.tensors[f"{group}.start"] = torch.zeros(33)
        with pytest.raises(CheckpointError, match=r"start is \(33,\), wanted \(32,\)"):
            checkpoint.load_weights(saved, trainer.model, group)
        del saved.tensors[f"{group}.start"]
        with pytest.raises(CheckpointError, match=r"start is None, wanted \(32,\)"):
            checkpoint.load_weights(saved, trainer.model, group)

    @pytest.mark.filterwarnings("ignore:sparse_attn runs on the torch backend")
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_learns(self, random: np.random.Generator, device: str, precision: str) -> None:
        training = replace(
            TRAINING, steps=40, batch=2, learning_rate=1e-2, precision=precision, warmup=5
        )
        trainer = Trainer(replace(MODEL, dropout=0.0), training, text_corpus(random), device)
        for _ in range(training.steps):
            trainer.step()
        assert trainer.losses[0] == pytest.approx(8, abs=0.01)  # logits start at zero
        assert trainer.validate().bits < 3

    def test_overflow_skips_the_step_and_halves_the_scale(
        self, random: np.random.Generator
    ) -> None:
        training = replace(TRAINING, precision="fp16")
        trainer = Trainer(MODEL, training, text_corpus(random))
        trainer.step()
        before = weights(trainer)
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**60})
        trainer.step()
        assert_same_weights(weights(trainer), before)
        assert trainer.scaler.get_scale() == 2.0**59

    def test_fp16_stops_when_no_loss_scale_helps(self, random: np.random.Generator) -> None:
        trainer = Trainer(MODEL, replace(TRAINING, precision="fp16"), text_corpus(random))
        trainer.step()
        break_weights(trainer)
        before = weights(trainer)
        for skipped in range(1, 17):  # 2^16 to 1
            assert math.isnan(trainer.step())
            assert trainer.scaler.get_scale() == 2.0 ** (16 - skipped)
        with pytest.raises(FloatingPointError, match="overflow fp16 at step 17 however small"):
            trainer.step()
        for name, value in weights(trainer).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_loss_that_is_not_finite_stops(
        self, random: np.random.Generator, precision: str
    ) -> None:
        trainer = Trainer(MODEL, replace(TRAINING, precision=precision), text_corpus(random))
        break_weights(trainer)
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0: try a smaller"):
            trainer.step()

    def test_gradient_that_is_not_finite_stops_and_changes_nothing(
        self, random: np.random.Generator
    ) -> None:
        data = text_corpus(random)
        untroubled = Trainer(MODEL, TRAINING, data)
        untroubled.step()
        trainer = Trainer(MODEL, TRAINING, data)
        before, state = weights(trainer), torch.get_rng_state()
        spike = trainer.model.start.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(FloatingPointError, match=r"gradient norm is (inf|nan) at step 0: try"):
            trainer.step()
        assert_same_weights(weights(trainer), before)
        spike.remove()
        torch.set_rng_state(state)
        trainer.step()
        assert trainer.losses == untroubled.losses
        assert_same_weights(weights(trainer), weights(untroubled))
        assert_same_weights(trainer.averaged.state_dict(), untroubled.averaged.state_dict())

    def test_weights_that_are_not_finite_are_not_saved(
        self, random: np.random.Generator, tmp_path: Path
    ) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        trainer.save(tmp_path / "c")
        before = (tmp_path / "c").read_bytes()
        break_weights(trainer)
        with pytest.raises(FloatingPointError, match="not finite after 0 steps: not written"):
            trainer.save(tmp_path / "c")
        assert (tmp_path / "c").read_bytes() == before

    def test_average_follows_the_weights(self, random: np.random.Generator) -> None:
        trainer = Trainer(MODEL, replace(TRAINING, ema=0.3), text_corpus(random))
        wanted = {k: v.double() for k, v in weights(trainer).items()}
        for step in range(1, 7):
            trainer.step()
            decay = min(0.3, (1 + step) / (10 + step))
            for name, value in weights(trainer).items():
                wanted[name] = decay * wanted[name] + (1 - decay) * value.double()
        for name, value in trainer.averaged.state_dict().items():
            torch.testing.assert_close(value, wanted[name].float())
        assert trainer.training.ema_decay_at(1) < 0.3 == trainer.training.ema_decay_at(6)

    def test_average_is_what_is_validated_and_loaded(
        self, random: np.random.Generator, tmp_path: Path
    ) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        for _ in range(3):
            trainer.step()
        values = trainer.source.split("validation")
        assert trainer.validate() == evaluate(trainer.averaged, values, 2)
        assert trainer.validate() != evaluate(trainer.model, values, 2)
        trainer.save(tmp_path / "c")
        model = SparseTransformer(MODEL)
        checkpoint.load_weights(checkpoint.load(tmp_path / "c"), model)
        assert_same_weights(model.state_dict(), trainer.averaged.state_dict())

    def test_no_average(self, random: np.random.Generator, tmp_path: Path) -> None:
        trainer = Trainer(MODEL, replace(TRAINING, ema=0.0), text_corpus(random))
        trainer.step()
        assert trainer.averaged is trainer.model
        trainer.save(tmp_path / "c")
        saved = checkpoint.load(tmp_path / "c")
        assert not saved.group("average")
        model = SparseTransformer(MODEL)
        checkpoint.load_weights(saved, model)
        assert_same_weights(model.state_dict(), weights(trainer))

    @pytest.mark.parametrize("accumulation", [2, 3, 5])
    def test_parts_of_a_batch_give_its_gradients(
        self, random: np.random.Generator, accumulation: int
    ) -> None:
        model = replace(MODEL, dropout=0.0)
        training = replace(TRAINING, batch=5, logits_std=0.3)
        data = text_corpus(random)
        whole = Trainer(model, training, data)
        parts = Trainer(model, replace(training, accumulation=accumulation), data)
        rows = []
        parts.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        assert parts.step() == pytest.approx(whole.step(), rel=1e-6)
        assert len(rows) == accumulation
        assert (sum(rows), max(rows)) == (5, parts.training.part)
        a, b = ([p.grad for p in trainer.model.parameters()] for trainer in (whole, parts))
        for one, other in zip(a, b, strict=True):
            assert one is not None
            assert other is not None
            assert (one - other).norm() < 1e-5 * one.norm()

    def test_compiled_blocks_share_their_code(
        self, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        compile_module = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend)
        )
        model = replace(MODEL, layers=4, composition="interleaved", dropout=0.0, recompute=True)
        data = text_corpus(random)
        plain = Trainer(model, TRAINING, data)
        compiled = Trainer(model, replace(TRAINING, compile=True), data)
        plain_losses, compiled_losses = ([x.step() for _ in range(2)] for x in (plain, compiled))
        assert compiled_losses == pytest.approx(plain_losses, rel=1e-5)
        assert len(graphs) == 2  # near and far blocks
        assert weights(compiled).keys() == weights(plain).keys()

    def test_cifar10_depth_trains_stably(self, random: np.random.Generator) -> None:
        model, training = preset("cifar10")
        model = replace(model, context=48, width=16, stride=12, position_shape=(4, 4, 3))
        training = replace(training, steps=5, batch=4, learning_rate=1e-2, warmup=3)
        images = random.choice(np.array([10, 20, 200, 250], np.uint8), (16, 4, 4, 3))
        trainer = Trainer(model, training, Pictures(images))
        assert len(trainer.model.blocks) == 128
        norms = []
        for _ in range(training.steps):
            trainer.step(0.0)
            norms.append(trainer.gradient_norm)
        assert trainer.losses == sorted(trainer.losses, reverse=True)
        assert trainer.losses[-1] < 7.7
        assert max(norms) < 10

    def test_batches_are_windows_of_the_training_text(self, random: np.random.Generator) -> None:
        data = text_corpus(random)
        trainer = Trainer(MODEL, TRAINING, data)
        for step in range(5):
            tokens = trainer.batch(step, 0.0)
            assert tokens.shape == (2, 64)
            assert tokens.dtype == torch.int64
            for row in tokens.tolist():
                assert bytes(row) in data.train
        exact = replace(data, train=data.train[:64])
        assert bytes(Trainer(MODEL, TRAINING, exact).batch(0, 0.0)[1].tolist()) == exact.train

    def test_short_windows_at_first(self, random: np.random.Generator) -> None:
        data = text_corpus(random)
        training = replace(TRAINING, short_share=0.5, short_window=16)
        trainer = Trainer(MODEL, training, data)
        for done, shape in ((0.0, (8, 16)), (0.49, (8, 16)), (0.5, (2, 64)), (1.0, (2, 64))):
            tokens = trainer.batch(3, done)
            assert tokens.shape == shape
            assert all(bytes(row) in data.train for row in tokens.tolist())
        longer = replace(training, short_window=1000)
        assert Trainer(MODEL, longer, data).batch(0, 0.0).shape == (2, 64)

    def test_too_little_text(self, random: np.random.Generator) -> None:
        data = replace(text_corpus(random), train=b"x" * 63)
        with pytest.raises(ValueError, match=r"63 bytes to train on .* one context is 64 bytes"):
            Trainer(MODEL, TRAINING, data)
        with pytest.raises(ValueError, match="leaves no bytes for validation"):
            Trainer(MODEL, TRAINING, replace(data, train=b"x" * 64, validation=b""))

    def test_learning_rate(self) -> None:
        training = TrainingConfig(steps=100, batch=1, learning_rate=2.0, warmup=4)
        rates = [training.learning_rate_at(step, 0.0) for step in range(6)]
        assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
        assert training.learning_rate_at(50, 0.5) == pytest.approx(1.0)
        assert training.learning_rate_at(50, 1.0) == pytest.approx(0.0)
        assert training.learning_rate_at(50, 1.5) == pytest.approx(0.0)

    def test_weight_decay_on_matrices_only(self, random: np.random.Generator) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        decay = {
            id(p): group["weight_decay"]
            for group in trainer.optimiser.param_groups
            for p in group["params"]
        }
        for parameter in trainer.model.parameters():
            assert decay.pop(id(parameter)) == (0.01 if parameter.dim() == 2 else 0.0)
        assert not decay

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps is 0, wanted more than 0"),
            ({"batch": -1}, "batch is -1, wanted more than 0"),
            ({"learning_rate": math.nan}, "learning_rate is nan"),
            ({"seed": -1}, "seed is -1, wanted 0 or more"),
            ({"short_window": 0}, "short_window is 0, wanted more than 0"),
            ({"accumulation": 0}, "accumulation is 0, wanted more than 0"),
            ({"accumulation": 3}, "accumulation is 3, wanted at most the batch of 2"),
            ({"ema": 1.0}, r"ema is 1\.0, wanted 0 or more and less than 1"),
            ({"ema": -0.1}, r"ema is -0\.1, wanted 0 or more"),
            ({"precision": "fp8"}, "precision is 'fp8', wanted one of"),
        ],
    )
    def test_bad_training_config(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TRAINING, **changes)

    def test_configs_survive_json(self) -> None:
        for name in PRESETS:
            training = preset(name)[1]
            assert TrainingConfig.from_dict(training.to_dict()) == training
        with pytest.raises(ValueError, match="preset is 'cifar', wanted one of demo, cifar10"):
            preset("cifar")

    @pytest.mark.parametrize(
        ("name", "epochs", "train_bytes"),
        [
            ("cifar10", 120, 48_000 * 3072),
            ("enwik8", 80, 90_000_000),
            ("imagenet64", 70, 1_281_149 * 12_288),
        ],
    )
    def test_presets_train_the_paper_s_epochs(
        self, name: str, epochs: int, train_bytes: int
    ) -> None:
        model, training = preset(name)
        seen = training.steps * training.batch * model.context
        assert seen == pytest.approx(epochs * train_bytes, rel=0.005)
        assert (training.warmup, training.clip, training.weight_decay) == (5000, 1.0, 0.01)


class TestLoop:
    def run(self, trainer: Trainer, **options: Any) -> None:
        defaults = {"validate_every": 5, "validation_bytes": 100}
        loop.train(trainer, report.make_console(), **{**defaults, **options})

    def test_validates_and_saves(
        self, random: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        saved = []
        monkeypatch.setattr(trainer, "save", lambda path: saved.append(trainer.step_number))
        self.run(trainer, save_every=4, path=tmp_path / "c")
        assert [step for step, _ in trainer.validations] == [5, 10, 12]
        assert saved == [4, 8, 12]

    def test_loop_trains_like_single_steps(self, random: np.random.Generator) -> None:
        data = text_corpus(random)
        looped, stepped = (Trainer(MODEL, TRAINING, data) for _ in range(2))
        torch.manual_seed(0)
        self.run(looped)
        torch.manual_seed(0)
        for _ in range(12):
            stepped.step()
        assert looped.losses == stepped.losses

    def test_time_guard(
        self, random: np.random.Generator, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        self.run(trainer, seconds=1e-9)
        assert trainer.step_number == 1
        assert "training stops at step 1 of 12" in capsys.readouterr().out
        assert [step for step, _ in trainer.validations] == [1]

    def test_progress_line(self, random: np.random.Generator) -> None:
        terminal = Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        loop.train(trainer, terminal, validate_every=5, validation_bytes=100)
        assert isinstance(terminal.file, io.StringIO)
        shown = terminal.file.getvalue()
        assert re.search(r"\d\.\d{3} bits per byte, [\d,]+ tokens/s, \d\.\d GiB .*12/12", shown)
        assert re.search(r"step +10 +training \d\.\d+ +validation \d\.\d+ bits per byte", shown)

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_tensorboard(
        self, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, precision: str
    ) -> None:
        scalars: dict[str, dict[int, float]] = defaultdict(dict)
        opened: dict[str, Any] = {}

        class Writer:
            def __init__(self, folder: str, purge_step: int) -> None:
                opened.update(folder=folder, purge_step=purge_step)

            def add_scalar(self, name: str, value: float, step: int) -> None:
                scalars[name][step] = value

        stub = ModuleType("torch.utils.tensorboard")
        stub.SummaryWriter = Writer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        trainer = Trainer(MODEL, replace(TRAINING, precision=precision), text_corpus(random))
        trainer.step()
        self.run(trainer, board=report.open_board(Path("runs") / "board", trainer.step_number))
        assert opened == {"folder": str(Path("runs", "board")), "purge_step": 2}
        steps = range(2, 13)
        assert scalars["bits/training"] == dict(zip(steps, trainer.losses[1:], strict=True))
        assert scalars["bits/validation"] == dict(trainer.validations)
        assert scalars["optimiser/learning rate"][12] == trainer.learning_rate > 0
        assert all(scalars["optimiser/gradient norm"][step] > 0 for step in steps)
        assert all(scalars["speed/tokens per second"][step] > 0 for step in steps)
        assert all(scalars["speed/peak memory in bytes"][step] > 1e7 for step in steps)
        assert scalars["optimiser/loss scale"] == (
            dict.fromkeys(steps, 2.0**16) if precision == "fp16" else {}
        )

    def test_no_tensorboard(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match="pip install tensorboard"):
            report.open_board(tmp_path, 0)

    def test_bad_intervals(self, random: np.random.Generator) -> None:
        trainer = Trainer(MODEL, TRAINING, text_corpus(random))
        with pytest.raises(ValueError, match="validate_every is 0, wanted 1 or more"):
            self.run(trainer, validate_every=0)
        with pytest.raises(ValueError, match="save_every is -1, wanted 1 or more"):
            self.run(trainer, save_every=-1)

    def test_mean_of_last(self) -> None:
        assert loop.mean_of_last([9.0, 1.0, math.nan, 3.0], count=3) == 2.0
        assert math.isnan(loop.mean_of_last([math.inf]))
