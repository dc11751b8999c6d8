# SPDX-License-Identifier: Apache-2.0
"""Plan files say what the plan says, and the C++ reader takes them; kernel_bench itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_attn as sa
from sparse_attn.cli import main
from sparse_attn.plan import Branch, Run, Segment, SequenceView, plan
from sparse_attn.plan_file import plan_text
from test_plan import head_range, kernels, needs_native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PATTERNS: dict[str, tuple[sa.Pattern, int]] = {
    "dense": (sa.Dense(), 1),
    "strided": (sa.Strided(16), 131),
    "strided, bidirectional": (sa.Strided(13, causal=False), 150),
    "fixed": (sa.Fixed(32, 8), 131),
    "fixed, bidirectional": (sa.Fixed(24, 5, offset=3, causal=False), 197),
    "summary without a key": (sa.Summary(16, 3), 12),
    "chunks": (sa.Chunk(6) | sa.Chunk(10) | sa.Local(3) | sa.Dilated(9), 133),
    "chunk": (sa.Chunk(48), 100),
    "longer than the sequence": (sa.Strided(50), 7),
}

# And the kernels of compute capability 9.0 that sum their gradients at head dim 64.
GRADIENTS: dict[str, tuple[sa.Pattern, int, list[str]]] = {
    "two owners": (sa.Local(300), 701, ["queries", "keys"]),
    "bands that add": (sa.Strided(24), 2003, ["bands", "bands"]),
    "ordered": (sa.Dense(), 1100, ["ordered"]),
    "ordered, a window": (sa.Local(520), 3100, ["ordered"]),
    "ordered, residues": (sa.Dilated(2, causal=False), 1501, ["ordered"]),
    "ordered, queries without a key": (sa.Summary(64, 24), 1301, ["ordered"]),
    "bands, then ordered ones that add": (sa.Fixed(64, 24), 1250, ["bands", "ordered"]),
    "ordered, then bands that add": (sa.Strided(700), 1500, ["ordered", "bands"]),
}

each_pattern = pytest.mark.parametrize("name", PATTERNS)


# A second reader of the format, from its description alone.


def parse(text: str) -> dict[str, Any]:
    lines: Iterator[list[str]] = (line.split(" ") for line in text.splitlines())

    def value(name: str) -> str:
        found, *words = next(lines)
        assert found == name
        return " ".join(words)

    def fields(words: list[str]) -> dict[str, int]:
        return dict(zip(words[::2], map(int, words[1::2]), strict=True))

    def view(words: list[str]) -> SequenceView:
        return SequenceView(length, **fields(words))

    def branch() -> Branch:
        queries = view(value("queries").split(" "))
        words = value("run").split(" ")
        assert words[6] == "chunks" and int(words[7]) == len(words) - 8
        run = Run(length, chunks=tuple(map(int, words[8:])), **fields(words[:6]))  # type: ignore[arg-type]
        segments = []
        for _ in range(int(value("segments"))):
            part, *words = value("keys").split(" ")
            segments.append(Segment(view(words), part))  # type: ignore[arg-type]
        return Branch(queries, run, tuple(segments))

    assert value("sparse_attn") == "plan 2"
    result: dict[str, Any] = {"name": value("name")}
    length = result["length"] = int(value("length"))
    result["pairs"] = int(value("pairs"))
    result["zero_key_gradients"] = int(value("zero_key_gradients"))
    result["branches"] = tuple(branch() for _ in range(int(value("branches"))))
    assert value("end") == "" and next(lines, None) is None
    return result


class TestText:
    @each_pattern
    def test_holds_the_plan(self, name: str) -> None:
        pattern, n = PATTERNS[name]
        parsed = parse(plan_text(pattern, n))
        branches = plan(pattern, n)
        mask = pattern.mask(n)
        assert parsed["name"] == pattern.spec
        assert parsed["length"] == n
        assert parsed["branches"] == branches
        assert parsed["pairs"] == int(mask.sum())

    @each_pattern
    def test_says_whether_every_key_is_written(self, name: str) -> None:
        pattern, n = PATTERNS[name]
        parsed = parse(plan_text(pattern, n))
        written = torch.zeros(n, dtype=torch.bool)
        # The first branch writes, the others add.
        first = parsed["branches"][0].segments[0].keys
        for group in range(first.groups):
            for row in range(int(first.rows(group))):
                written[int(first.position(group, row))] = True
        assert parsed["zero_key_gradients"] == int(not written.all())

    def test_describes_a_million_tokens_in_a_few_lines(self) -> None:
        assert len(plan_text(sa.Fixed(1024, 32), 1 << 20)) < 2000

    def test_refuses_what_has_no_single_plan(self) -> None:
        with pytest.raises(ValueError, match="PerHead"):
            plan_text(sa.PerHead([sa.Local(3)]), 10)
        layout = torch.ones(1, 2, 2, dtype=torch.bool)
        with pytest.raises(ValueError, match="layout"):
            plan_text(sa.BlockSparse(layout, 16), 32)
        with pytest.raises(ValueError, match="n must be at least 1"):
            plan_text(sa.Dense(), 0)


class TestCommand:
    def test_prints_the_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "strided:16", "--n", "131"]) == 0
        assert capsys.readouterr().out == plan_text(sa.Strided(16), 131)

    def test_names_what_is_wrong(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "striped:16", "--n", "131"]) == 2
        assert "striped" in capsys.readouterr().err
        assert main(["plan", "strided:16", "--n", "0"]) == 2
        assert "n must be at least 1" in capsys.readouterr().err

    def test_is_reached_through_the_package(self) -> None:
        command = [sys.executable, "-m", "sparse_attn", "plan", "fixed:32,8", "--n", "100"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert result.stdout == plan_text(sa.Fixed(32, 8), 100)


# Prints what it reads in another order of words, or the error.
READER = """
#include <cstdio>
#include <iostream>

#include "kernel_bench/plan_file.h"

using namespace sparse_attn;

void print(const SequenceView& view) {
  std::printf("%d %d %d %d %d %d\\n", view.groups, view.max_rows, view.offset, view.group_step,
              view.run.value, view.run_stride.value);
}

void print(const std::vector<Branch>& branches) {
  for (const Branch& branch : branches) {
    print(branch.queries);
    std::printf("%d %d %d", branch.run.window, branch.run.past, branch.run.future);
    for (int i = 0; i < branch.run.chunk_count; ++i) {
      std::printf(" %d", branch.run.chunks[i].value);
    }
    std::printf("\\n");
    for (int i = 0; i < branch.segment_count; ++i) {
      std::printf("%d\\n", static_cast<int>(branch.segments[i].part));
      print(branch.segments[i].keys);
    }
  }
}

int main() {
  try {
    const auto plan = kernel_bench::read_plan(std::cin, "plan.txt");
    std::printf("%s\\n%d %lld %d\\n", plan.name.c_str(), plan.length,
                static_cast<long long>(plan.pairs), plan.zero_key_gradients);
    print(plan.branches);
  } catch (const std::exception& error) {
    std::printf("%s\\n", error.what());
    return 2;
  }
}
"""


def printed(pattern: sa.Pattern, n: int) -> str:
    """What the reader above prints of a plan."""
    parsed = parse(plan_text(pattern, n))
    lines = [pattern.spec, f"{n} {parsed['pairs']} {parsed['zero_key_gradients']}"]

    def add(view: SequenceView) -> None:
        numbers = (view.groups, view.max_rows, view.offset, view.group_step)
        lines.append(" ".join(map(str, (*numbers, view.run, view.run_stride))))

    for branch in parsed["branches"]:
        add(branch.queries)
        run = branch.run
        lines.append(" ".join(map(str, map(int, (run.window, run.past, run.future, *run.chunks)))))
        for segment in branch.segments:
            lines.append(str(["before", "inside", "after"].index(segment.part)))
            add(segment.keys)
    return "\n".join(lines) + "\n"


Read = Callable[[str], tuple[int, str]]


def build(folder: Path, program: str, *sources: str) -> Read:
    """Compiles a program of the given text and sources; returns what calls it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "main.cpp").write_text(program)
    paths = [str(folder / "main.cpp"), *(str(CSRC / source) for source in sources)]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    path = str(folder / "program")
    subprocess.run([*compiler.split(), *flags, *paths, "-o", path], check=True)

    def call(text: str) -> tuple[int, str]:
        result = subprocess.run([path], input=text, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout

    return call


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The C++ reader: exit status and what it prints, of a text."""
    return build(tmp_path_factory.mktemp("reader"), READER, "kernel_bench/plan_file.cpp")


class TestReader:
    @each_pattern
    def test_reads_what_python_writes(self, name: str, read: Read) -> None:
        pattern, n = PATTERNS[name]
        assert read(plan_text(pattern, n)) == (0, printed(pattern, n))

    @pytest.mark.parametrize(
        ("old", "new", "error"),
        [
            ("plan 2\n", "plan 1\n", "plan.txt:1: wanted 'sparse_attn plan 2'"),
            ("length 131", "length 0", "plan.txt:3: length is 0, must be from 1 to 1073741824"),
            ("length 131", "length", "plan.txt:3: length must be an integer, found ''"),
            ("length 131", "length 131 7", "plan.txt:3: wanted the end of the line, found '7'"),
            ("length 131", "length 13x", "plan.txt:3: length must be an integer, found '13x'"),
            ("branches 2", "branch 2", "plan.txt:6: wanted 'branches', found 'branch'"),
            ("groups 1 max", "groups 0 max", "plan.txt:7: groups is 0, must be from 1"),
            ("groups 1 max", "groups 3 max", "plan.txt:7: the view has more rows than"),
            ("run_stride 1\n", "run_stride 0\n", "plan.txt:7: run_stride is 0, must be from 1"),
            ("run 1 run_stride", "run 2 run_stride", "plan.txt:7: run is longer than run_stride"),
            ("chunks 0", "chunks 5 1 2 3 4 5", "plan.txt:8: chunks is 5, must be from 0 to 4"),
            ("past 1", "past 2", "plan.txt:8: past is 2, must be from 0 to 1"),
            ("keys inside", "keys around", "plan.txt:10: wanted 'before', 'inside' or 'after'"),
            ("window 16", "window 15", "plan.txt:14: the branches have "),
            ("end\n", "", "the file ends here"),
            ("end\n", "end\nend\n", "wanted the end of the file, found 'end'"),
        ],
    )
    def test_names_line_and_problem(self, old: str, new: str, error: str, read: Read) -> None:
        text = plan_text(sa.Strided(16), 131)
        assert old in text
        status, message = read(text.replace(old, new, 1))
        assert status == 2
        assert error in message and message.startswith("plan.txt:")


# Prints the backward launches of the plan that it reads.
CHOOSER = """
#include <cstdio>
#include <iostream>

#include "gradients.h"
#include "kernel_bench/plan_file.h"

using namespace sparse_attn;

int main() {
  const auto plan = kernel_bench::read_plan(std::cin, "plan.txt");
  BackwardParams call{};
  call.batch = 2;
  call.heads = call.head_count = call.kv_heads = 6;
  call.heads_together = 1;
  call.seq_q = call.seq_k = plan.length;
  call.head_dim = call.head_dim_v = 64;
  call.kernels = Kernels::sm90;
  const Gradients gradients = Gradients::of({{call, plan.branches}});
  for (const GradientLaunch& launch : gradients.launches) {
    std::printf("%d %d %d %lld %d\\n", static_cast<int>(launch.params.owner),
                launch.params.accumulate, launch.params.finds_stats,
                static_cast<long long>(launch.workspace), launch.writes_every_dq);
  }
}
"""


@needs_native
def test_chooses_the_kernels_of_the_extension(tmp_path: Path) -> None:
    from sparse_attn import _C

    choose = build(tmp_path, CHOOSER, "gradients.cpp", "kernel_bench/plan_file.cpp")
    for pattern, n, names in GRADIENTS.values():
        gradients = _C.Gradients([head_range(plan(pattern, n), n)])
        assert kernels(gradients) == names
        wanted = [
            (x.owner, x.accumulate, x.finds_stats, x.workspace, x.writes_every_dq)
            for x in gradients.launches
        ]
        status, text = choose(plan_text(pattern, n))
        assert status == 0
        assert [tuple(map(int, line.split())) for line in text.splitlines()] == wanted


@pytest.fixture(scope="module")
def kernel_bench(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, built for the GPU of this machine."""
    pybind11 = pytest.importorskip("pybind11", reason="CMakeLists.txt needs pybind11")
    cmake, nvcc = shutil.which("cmake"), os.environ.get("CUDACXX") or shutil.which("nvcc")
    if cmake is None or nvcc is None:
        pytest.skip("needs cmake and nvcc")
    import fcntl  # not on every platform that collects these tests

    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share one build
        folder = tmp_path_factory.getbasetemp().parent / "kernel_bench"
        folder.mkdir(exist_ok=True)
    else:
        folder = tmp_path_factory.mktemp("kernel_bench")
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder)),
        "-DSPARSE_ATTN_KERNEL_BENCH=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    jobs = str(len(os.sched_getaffinity(0)))
    build = [cmake, "--build", str(folder), "--target", "kernel_bench", "--parallel", jobs]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, build):
            result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
            assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return str(folder / "kernel_bench")


def run(program: str, path: Path, text: str, *options: str) -> tuple[int, dict[str, Any]]:
    path.write_text(text)
    command = [program, str(path), "--json", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode, json.loads(result.stdout)


def wrong_tensors(report: dict[str, Any]) -> set[str]:
    return {check["tensor"] for check in report["checks"] if not check["passed"]}


@pytest.mark.gpu
class TestProgram:
    @each_pattern
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_finds_the_kernels_right(
        self, name: str, dtype: str, kernel_bench: str, tmp_path: Path
    ) -> None:
        pattern, n = PATTERNS[name]
        sizes = ("--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim-v", "128")
        options = (*sizes, "--dtype", dtype, "--once", "--cold")
        status, report = run(kernel_bench, tmp_path / "plan", plan_text(pattern, n), *options)
        assert status == 0 and report["correct"], report["checks"]
        assert [check["tensor"] for check in report["checks"]] == ["out", "lse", "dq", "dk", "dv"]
        assert all(check["tokens"] == n for check in report["checks"])
        assert not report["times"]

    @pytest.mark.parametrize("name", GRADIENTS)
    @pytest.mark.parametrize("head_dims", [(64, 64), (64, 128), (128, 128)], ids=str)
    def test_runs_the_kernels_of_the_extension(
        self, name: str, head_dims: tuple[int, int], kernel_bench: str, tmp_path: Path
    ) -> None:
        pattern, n, names = GRADIENTS[name]
        sizes = ("--head-dim", str(head_dims[0]), "--head-dim-v", str(head_dims[1]))
        options = ("--heads", "3", *sizes, "--once")
        status, report = run(kernel_bench, tmp_path / "plan", plan_text(pattern, n), *options)
        assert status == 0 and report["correct"], report["checks"]
        if torch.cuda.get_device_capability() == (9, 0):
            assert report["gradients"] == names

    def test_times_both_directions(self, kernel_bench: str, tmp_path: Path) -> None:
        pattern, n = sa.Strided(128), 12288
        status, report = run(kernel_bench, tmp_path / "plan", plan_text(pattern, n))
        assert status == 0 and report["correct"], report["checks"]
        assert report["pairs"] == int(pattern.keys_per_query(n).sum())
        forward, backward = report["times"]
        assert (forward["direction"], backward["direction"]) == ("forward", "backward")
        assert forward["flops"] == 8 * pattern.flops(n, 64)
        assert 0 < forward["ms"]["min"] <= forward["ms"]["median"] <= forward["ms"]["max"]
        seconds = 1e-3 * backward["ms"]["median"]
        assert backward["gb_per_s"] == pytest.approx(1e-9 * backward["bytes"] / seconds, rel=1e-4)

    def test_finds_wrong_gradients(self, kernel_bench: str, tmp_path: Path) -> None:
        text = plan_text(sa.Summary(16, 3), 131)
        # What no launch writes holds NaN.
        wrong = text.replace("zero_key_gradients 1", "zero_key_gradients 0")
        assert wrong != text
        status, report = run(kernel_bench, tmp_path / "plan", wrong, "--dtype", "float16")
        assert status == 1 and not report["correct"] and not report["times"]
        assert wrong_tensors(report) == {"dk", "dv"}

    def test_finds_a_key_that_counts_twice(self, kernel_bench: str, tmp_path: Path) -> None:
        n = 131
        pairs = {
            name: int(pattern.mask(n).sum())
            for name, pattern in {
                "right": sa.Strided(16),
                "near": sa.Local(16),
                "longer": sa.Local(24),
            }.items()
        }
        text = plan_text(sa.Strided(16), n).replace("window 16", "window 24", 1)
        both = pairs["right"] - pairs["near"] + pairs["longer"]
        text = text.replace(f"pairs {pairs['right']}", f"pairs {both}")
        status, report = run(kernel_bench, tmp_path / "plan", text, "--dtype", "float16")
        assert status == 1 and not report["correct"]
        assert wrong_tensors(report) == {"out", "lse", "dq", "dk", "dv"}

    @pytest.mark.parametrize("name", GRADIENTS)
    def test_reads_no_uninitialised_memory(
        self, name: str, kernel_bench: str, tmp_path: Path
    ) -> None:
        """What a kernel borrows of memory holds nothing before."""
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            pytest.skip("needs compute-sanitizer")
        pattern, n, _ = GRADIENTS[name]
        path = tmp_path / "plan"
        path.write_text(plan_text(pattern, n))
        tool = [sanitizer, "--tool", "initcheck", "--error-exitcode", "97"]
        command = [*tool, kernel_bench, str(path), "--heads", "2", "--once", "--cold"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-5000:]
        assert "ERROR SUMMARY: 0 errors" in result.stdout

    def test_names_what_it_cannot_run(self, kernel_bench: str, tmp_path: Path) -> None:
        path = tmp_path / "plan"
        path.write_text(plan_text(sa.Dense(), 64))
        for options, error in (
            (["--head-dim", "60"], "--head-dim must be a multiple of 8"),
            (["--heads", "3", "--kv-heads", "2"], "--kv-heads must divide --heads"),
            (["--dtype", "float32"], "found 'float32'"),
            (["--fast"], "no option --fast"),
            (["--batch"], "--batch must be an integer"),
        ):
            command = [kernel_bench, str(path), *options]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert result.returncode == 2 and error in result.stderr, result.stderr
