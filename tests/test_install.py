# SPDX-License-Identifier: Apache-2.0
"""The installed package: what it imports, what its native module needs, what comes with it."""

from __future__ import annotations

import importlib.metadata
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_attn as sa

PACKAGE = Path(sa.__file__).parent
NATIVE = sorted(PACKAGE.glob("_C.*.so")) + sorted(PACKAGE.glob("_C.abi3.so"))
needs_native = pytest.mark.skipif(not NATIVE, reason="the native module is not built")


def python(code: str, *, env: dict[str, str] | None = None) -> str:
    """Standard output of a fresh interpreter in which every warning is an error."""
    import os

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_nothing_but_torch_and_numpy() -> None:
    code = """
import sys
import numpy, torch
before = set(sys.modules)
import sparse_attn
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names) - {"torch", "numpy"}))
"""
    assert python(code).split() == ["sparse_attn"]


def test_import_without_the_extras() -> None:
    """The core runs where matplotlib, rich and safetensors are not installed."""
    code = """
import sys
for name in ("matplotlib", "rich", "safetensors", "PIL"):
    sys.modules[name] = None
import torch
import sparse_attn as sa
q = torch.randn(1, 2, 20, 8)
print(tuple(sa.attention(q, q, q, sa.Strided(4)).shape))
sa.SelfAttention(16, 2, sa.Fixed(4, 1))(torch.randn(1, 9, 16))
"""
    assert python(code).strip() == "(1, 2, 20, 8)"


def test_import_is_quick_and_quiet() -> None:
    """No output, and little on top of torch."""
    code = """
import time
import numpy, torch
start = time.process_time()
import sparse_attn
print(time.process_time() - start)
"""
    assert float(python(code)) < 1.0


def test_import_does_not_touch_cuda() -> None:
    code = """
import torch

def refuse(*_, **__):
    raise AssertionError("CUDA was initialised")

torch.cuda._lazy_init = refuse
torch._C._cuda_getDeviceCount = refuse
import sparse_attn as sa
assert not torch.cuda.is_initialized()
q = torch.randn(1, 2, 20, 8, requires_grad=True)
sa.attention(q, q, q, sa.Strided(4)).sum().backward()
assert sa.which_backend(q, q, q, sa.Strided(4)) == "torch"
assert not torch.cuda.is_initialized()
"""
    python(code)


def test_import_with_no_gpu() -> None:
    code = """
import torch
import sparse_attn as sa
assert not torch.cuda.is_available()
q = torch.randn(1, 2, 20, 8)
assert sa.attention(q, q, q, sa.Strided(4)).isfinite().all()
"""
    python(code, env={"CUDA_VISIBLE_DEVICES": ""})


def test_import_changes_no_state() -> None:
    """No seed, no default, no environment variable, no warning filter."""
    code = """
import os, warnings
import numpy, torch
torch.manual_seed(3)

def state():
    return (
        dict(os.environ), list(warnings.filters), torch.get_default_dtype(),
        torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
    )

before = state()
import sparse_attn
assert state() == before
"""
    python(code)


FORK = """
import os
import torch
import sparse_attn as sa
{before}
child = os.fork()
if child == 0:
    {inside}
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_fork_after_import() -> None:
    inside = (
        "q = torch.randn(1, 2, 20, 8, requires_grad=True);"
        " sa.attention(q, q, q, sa.Strided(4)).sum().backward();"
        " assert q.grad.isfinite().all()"
    )
    python(FORK.format(before="", inside=inside))


@pytest.mark.gpu
def test_fork_after_import_then_cuda_in_the_child() -> None:
    inside = (
        "q = torch.randn(1, 2, 20, 64, device='cuda', dtype=torch.float16);"
        " assert sa.attention(q, q, q, sa.Strided(4), backend='cuda').isfinite().all()"
    )
    python(FORK.format(before="", inside=inside))


def test_workers_that_fork_use_it() -> None:
    """As in a DataLoader."""
    code = """
import multiprocessing
import torch
import sparse_attn as sa

def work(seed):
    torch.manual_seed(seed)
    q = torch.randn(1, 2, 20, 8)
    return sa.attention(q, q, q, sa.Fixed(4, 1)).sum().item()

with multiprocessing.get_context("fork").Pool(2) as pool:
    results = pool.map(work, range(4))
assert results == [work(seed) for seed in range(4)]
"""
    python(code)


# The native module.


def needed(path: Path) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
    (program_headers,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    loads, dynamic = [], None
    for number in range(count):
        kind, _, offset, address, _, file_size = struct.unpack_from(
            "<IIQQQQ", data, program_headers + number * size
        )
        if kind == 1:
            loads.append((address, offset, file_size))
        elif kind == 2:
            dynamic = (offset, file_size)
    assert dynamic is not None, f"{path} has no dynamic section"
    entries = list(struct.iter_unpack("<qQ", data[dynamic[0] : sum(dynamic)]))
    (strings,) = [value for tag, value in entries if tag == 5]
    (table,) = [
        offset + strings - address
        for address, offset, length in loads
        if address <= strings < address + length
    ]
    names = [table + value for tag, value in entries if tag == 1]
    return [data[name : data.index(b"\0", name)].decode() for name in names]


def test_needed_finds_torch_where_it_is_needed() -> None:
    import torch

    assert any(name.startswith("libtorch") for name in needed(Path(torch._C.__file__)))


@needs_native
def test_native_module_needs_no_torch_and_no_cuda() -> None:
    names = needed(NATIVE[0])
    system = ("c", "m", "stdc++", "gcc_s", "pthread", "rt", "dl")
    allowed = ("ld-linux", *(f"lib{name}.so" for name in system))
    assert names
    assert [name for name in names if not name.startswith(allowed)] == []


@needs_native
def test_native_module_loads_by_itself() -> None:
    """Before torch, and without the driver."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sparse_attn._C", {str(NATIVE[0])!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.build_info()["version"])
"""
    assert python(code).strip() == sa.__version__


@needs_native
def test_stub_names_what_the_native_module_has() -> None:
    import ast

    from sparse_attn import _C

    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    named = {
        node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
    } | {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    there = {name for name in dir(_C) if not name.startswith("_")}
    if not _C.build_info()["architectures"]:
        assert there <= named
    else:
        assert there == named


def test_typing_files_are_installed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_version() -> None:
    assert sa.__version__ == "0.1.0"
    try:
        installed = importlib.metadata.version("sparse-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from source, not installed")
    assert installed == sa.__version__


def test_public_names() -> None:
    wanted = {"attention", "merge", "which_backend", "parse_pattern", "SelfAttention"}
    wanted |= {"Dense", "Local", "Chunk", "Dilated", "Summary", "Strided", "Fixed", "PerHead"}
    wanted |= {"SparseTransformer", "SparseTransformerConfig", "presets"}
    assert wanted <= set(sa.__all__)
    assert all(hasattr(sa, name) for name in sa.__all__)
    assert wanted <= set(dir(sa))


def test_environment_report() -> None:
    """python -m sparse_attn: where from, versions, GPU, architectures, a self-test."""
    result = subprocess.run(
        [sys.executable, "-m", "sparse_attn"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for word in (sa.__version__, str(PACKAGE), "torch", "python", "self-test"):
        assert word in result.stdout.lower() or word in result.stdout, word
