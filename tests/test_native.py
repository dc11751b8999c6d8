# SPDX-License-Identifier: Apache-2.0
"""The extension module as built: compiler, architectures, exported symbols; the build's helpers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import sparse_attn as sa

_C = pytest.importorskip("sparse_attn._C", reason="the native module is not built")

ROOT = Path(__file__).parents[1]
CMAKE = ROOT / "cmake"
WITHOUT_KERNELS = "built without kernels (SPARSE_ATTN_CUDA=OFF)"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CMAKE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit, from PyPI or from PATH."""
    for entry in sys.path:
        path = Path(entry) / "nvidia" / "cu13" / "bin" / name
        if path.is_file():
            return str(path)
    path_tool = shutil.which(name)
    if path_tool is None:
        pytest.skip(f"{name} is not installed (pip install nvidia-cuda-{name})")
    return path_tool


def test_version_is_one() -> None:
    assert _C.build_info()["version"] == sa.__version__ == importlib.metadata.version("sparse-attn")


def test_compiler_is_from_pypi() -> None:
    compiler = _C.build_info()["cuda_compiler"]
    if not compiler:
        pytest.skip(WITHOUT_KERNELS)
    match = re.fullmatch(r"(\d+\.\d+)\.\d+ \((PyPI wheel|explicit)\)", compiler)
    assert match, compiler
    if match[2] == "explicit":
        pytest.skip(f"built with an explicit CUDA compiler, {compiler}")
    assert match[1] == "13.0"


def test_every_kernel_is_built_for_every_architecture() -> None:
    architectures = _C.build_info()["architectures"]
    if not architectures:
        pytest.skip(WITHOUT_KERNELS)
    cuobjdump = find_tool("cuobjdump")

    def count(option: str, pattern: str) -> Counter[str]:
        listing = subprocess.run(
            [cuobjdump, option, _C.__file__], capture_output=True, text=True, check=True
        ).stdout
        return Counter(re.findall(pattern, listing))

    real = {f"sm_{name[:-5]}" for name in architectures.split(";") if name.endswith("-real")}
    virtual = {f"sm_{name[:-8]}" for name in architectures.split(";") if name.endswith("-virtual")}
    machine_code = count("--list-elf", r"\.(sm_\w+)\.cubin")
    ptx = count("--list-ptx", r"\.(sm_\w+)\.ptx")
    # Hopper's own kernels, of fewer head dims.
    hopper = machine_code.pop("sm_90a", 0)
    assert ("sm_90a" in real) == (hopper > 0)
    real.discard("sm_90a")
    assert real and set(machine_code) == real
    assert virtual and set(ptx) == virtual
    (files,) = {*machine_code.values(), *ptx.values()}  # one count: no file lacks a target
    assert files >= 2 * len(_C.head_dims())  # float16 and bfloat16


def test_the_cuda_runtime_is_not_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed (binutils)")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", "--format=posix", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = {line.split()[0] for line in listing.splitlines()}
    assert "PyInit__C" in symbols
    assert not [symbol for symbol in symbols if re.match(r"_*(cuda|cu[A-Z]|fatbin|nv)", symbol)]
    assert not [symbol for symbol in symbols if "sparse_attn" in symbol]


def find_pip_cuda(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the build's search for the compiler, seeing no other packages than the folder's."""
    code = (
        "import runpy, sys;"
        f"sys.path.append({str(folder)!r});"
        f"runpy.run_path({str(CMAKE / 'find_pip_cuda.py')!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)


def test_find_pip_cuda(tmp_path: Path) -> None:
    wheels: dict[str, str] = load("find_pip_cuda").WHEELS
    assert len(wheels) == 5
    nothing = find_pip_cuda(tmp_path)
    assert nothing.returncode == 1
    assert all(f"'{wheel}==13.0.*'" in nothing.stderr for wheel in wheels)
    assert "CUDACXX" in nothing.stderr

    root = tmp_path / "nvidia" / "cu13"
    for path in wheels.values():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    assert find_pip_cuda(tmp_path).stdout.strip() == str(root)

    (root / wheels["nvidia-nvvm"]).unlink()
    one_missing = find_pip_cuda(tmp_path)
    assert one_missing.returncode == 1
    assert "pip install 'nvidia-nvvm==13.0.*'\n" in one_missing.stderr


PTXAS = """\
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    80 bytes stack frame, 44 bytes spill stores, 88 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 80 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers
"""


def test_spills_are_read() -> None:
    kernels = load("build_wheel").parse_ptxas(PTXAS.splitlines(keepends=True))
    assert [tuple(kernel)[1:] for kernel in kernels] == [
        ("sm_80", 168, 80, 132),
        ("sm_90", 96, 0, 0),
    ]


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("torch.Size([1, 8, 1000, 64]) torch\n")
