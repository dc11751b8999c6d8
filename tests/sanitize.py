# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels under compute-sanitizer: memcheck, synccheck and racecheck.

    python tests/sanitize.py
    python tests/sanitize.py memcheck

First a planted fault for each tool, which it must report; then forward, backward and decoding with
every head-dim pair, where it must report nothing. Hopper's own kernels, where they run, are left
out of racecheck, which does not know their barriers. Needs a GPU, nvcc and compute-sanitizer.
initcheck does not know what tensor maps store: kernel_bench, which fills its outputs before, runs
under it (test_kernel_bench.py).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import sparse_attn as sa

FAULTS = Path(__file__).with_name("sanitize_faults.cu")
TOOLS = ("memcheck", "synccheck", "racecheck")
# How each tool words its fault.
REPORTS = {
    "memcheck": "Invalid __global__ write",
    "synccheck": "Barrier error detected",
    "racecheck": "Race reported between",
}
BACKENDS = dict.fromkeys(TOOLS, ("cuda_sm80", "cuda_sm90")) | {"racecheck": ("cuda_sm80",)}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ")
FOUND = 97  # exit status of a tool that reports something
LIMIT = 230.0  # seconds
WORKERS = 8  # programs at a time: a tool has more to do on the host than on the GPU

HEAD_DIMS = ((32, 32), (64, 64), (64, 128), (96, 96), (128, 128), (256, 256), (40, 72))
# Pattern, ragged n, heads and kv_heads.
Call = tuple[sa.Pattern, int, int, int]
CALLS: tuple[Call, ...] = (
    (sa.Strided(16), 131, 2, 2),
    (sa.Strided(13, causal=False), 150, 2, 1),
    (sa.Fixed(32, 8), 131, 2, 1),
    (sa.Fixed(24, 5, causal=False), 197, 2, 2),
    (sa.Summary(16, 3, causal=False), 65, 2, 2),
    (sa.Chunk(48) | sa.Local(20) | sa.Dilated(9), 133, 1, 1),
    (sa.Dense(), 129, 2, 2),
    (sa.PerHead([sa.Local(9), sa.Chunk(7)]), 71, 2, 1),
    (sa.Strided(16), 1, 1, 1),
    (sa.Strided(2), 150, 2, 2),  # two branches in one launch
    (sa.Dense(causal=False), 600, 2, 1),  # many keys a query: the large tiles
    (sa.BlockSparse(torch.rand(2, 13, 13) < 0.4, 16), 200, 2, 1),
    (sa.BlockSparse(torch.rand(1, 3, 3) < 0.6, 64, causal=False), 150, 2, 2),
)
# Long enough for all gradients of many keys in one launch, where dq is summed in turns.
LONG_CALLS: tuple[Call, ...] = (
    (sa.Dense(), 1091, 1, 1),
    (sa.Local(520), 3003, 1, 1),  # slots pass on within a head
    (sa.Fixed(64, 24), 1250, 2, 2),  # adds to what another launch left
    (sa.Strided(2), 2203, 1, 1),  # merges with what another launch left, adds to it
    (sa.BlockSparse(torch.rand(2, 9, 9) < 0.7, 128), 1100, 2, 2),
    (sa.BlockSparse(torch.rand(2, 18, 18) < 0.4, 64), 1100, 2, 2),
)


# What runs under a tool.


def tensor(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Made on the CPU: only our kernels, fills and copies run on the GPU."""
    return torch.randn(*sizes).to(dtype).cuda()


def run_calls(head_dim: int, head_dim_v: int, backends: tuple[str, ...]) -> None:
    """Forward, backward and decoding of everything; prints the number of calls."""
    count = 0
    calls = (*CALLS, *LONG_CALLS) if "cuda_sm90" in backends else CALLS
    for dtype in (torch.float16, torch.bfloat16):
        for pattern, n, heads, kv_heads in calls:
            q = tensor(1, n, heads, head_dim, dtype=dtype).transpose(1, 2)
            k = tensor(1, kv_heads, n, head_dim, dtype=dtype)
            v = tensor(1, kv_heads, n, head_dim_v, dtype=dtype)
            if isinstance(pattern, sa.BlockSparse):
                layout = pattern.layout.cuda()
                pattern = sa.BlockSparse(layout, pattern.block, causal=pattern.causal)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            fastest = sa.which_backend(q, k, v, pattern)
            for backend in {"cuda_sm80", fastest}.intersection(backends):
                results = sa.attention(q, k, v, pattern, return_lse=True, backend=backend)
                dout = tensor(1, heads, n, head_dim_v, dtype=dtype)
                dlse = tensor(1, heads, n, dtype=torch.float32)
                grads = torch.autograd.grad(results, (q, k, v), (dout, dlse))
                for x in (results[0], *grads):
                    assert x.cpu().isfinite().all(), (pattern, n, head_dim, head_dim_v, dtype)
                count += 1
        count += run_steps(head_dim, head_dim_v, dtype)
    torch.cuda.synchronize()
    print(count, "calls")


def run_steps(head_dim: int, head_dim_v: int, dtype: torch.dtype) -> int:
    """Decoding with every causal pattern, one token and several; the number of calls."""
    count = 0
    for pattern, n, heads, kv_heads in CALLS:
        if isinstance(pattern, sa.BlockSparse) or "causal=False" in pattern.spec:
            continue
        q = tensor(1, heads, n, head_dim, dtype=dtype)
        k = tensor(1, kv_heads, n, head_dim, dtype=dtype)
        v = tensor(1, kv_heads, n, head_dim_v, dtype=dtype)
        cache = sa.KVCache(pattern, 1, heads, n, head_dim, head_dim_v, kv_heads, dtype, "cuda")
        prompt = max(n - 40, 0)
        cache.prefill(k[:, :, :prompt], v[:, :, :prompt])
        for i in range(prompt, n, 10):  # 1 or 5 new tokens
            new = slice(i, min(i + (5 if i // 10 % 2 else 1), n))
            cache.position.fill_(i)
            out = sa.decode(q[:, :, new], k[:, :, new], v[:, :, new], cache, backend="cuda")
            assert out.shape[2] == new.stop - i
            count += 1
    return count


def run_fault_in_kernel() -> None:
    """The forward kernel with an lse that is 8 rows short."""
    from sparse_attn.backends import cuda
    from sparse_attn.tensor_meta import TensorMeta

    q = tensor(1, 1, 131, 64, dtype=torch.float16)
    lse = torch.empty(1, 1, 123, device="cuda")
    call = cuda.ForwardCall(sa.Dense(), 0.125, *[TensorMeta.of(q)] * 4, sm90=False)
    call(q, q, q, None, torch.empty_like(q), lse)
    torch.cuda.synchronize()


# What runs the tools.


def find_tool(name: str, *places: Path) -> str:
    for path in (shutil.which(name), *(place / name for place in places)):
        if path is not None and Path(path).is_file():
            return str(path)
    raise SystemExit(f"{name} was not found: put the CUDA toolkit on PATH")


def compile_faults(folder: str) -> tuple[str, str]:
    """Paths of compute-sanitizer and of the program with the faults."""
    nvcc = os.environ.get("CUDACXX") or find_tool("nvcc", Path("/usr/local/cuda/bin"))
    toolkit = Path(nvcc).resolve().parent
    sanitizer = find_tool(
        "compute-sanitizer",
        toolkit,
        toolkit.parent / "compute-sanitizer",
        Path("/usr/local/cuda/bin"),
    )
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    program = str(Path(folder) / "faults")
    command = [nvcc, f"-arch=sm_{capability}", "-lineinfo", "-o", program, str(FAULTS)]
    subprocess.run(command, check=True)
    return sanitizer, program


@dataclass(frozen=True)
class Report:
    """What a tool said of a program."""

    status: int
    count: int | None  # errors or hazards; None without a summary
    text: str
    seconds: float


def sanitize(sanitizer: str, tool: str, program: list[str]) -> Report:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    environment = dict(os.environ)
    if tool == "memcheck":
        # Each tensor its own allocation, with nothing right behind it. PyTorch asks the driver for
        # functions that it may lack, which is no error.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command += ["--padding", "65536", "--report-api-errors", "no"]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command + program,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it runs
            status = process.wait()
            output.write(f"\nno end after {LIMIT} s\n")
        output.seek(0)
        text = output.read()
    counts = SUMMARY.findall(text)
    count = sum(map(int, counts)) if counts else None
    return Report(status, count, text, time.monotonic() - start)


def reports_fault(tool: str, report: Report) -> bool:
    return bool(report.count) and report.status != 0 and REPORTS[tool] in report.text


def is_clean(report: Report) -> bool:
    """No error, and the calls ran to their end."""
    finished = re.search(r"^\d+ calls$", report.text, re.MULTILINE) is not None
    return report.status == 0 and report.count == 0 and finished


def main(tools: tuple[str, ...]) -> int:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU on this machine")
    this = [sys.executable, str(Path(__file__).resolve())]
    passed, rows = True, []

    def show(tool: str, program: str, wanted: str, right: bool, report: Report) -> None:
        nonlocal passed
        passed &= right
        found = "no summary" if report.count is None else f"{report.count} reported"
        verdict = "ok" if right else "WRONG"
        rows.append(
            f"{tool:<11}{program:<20}{wanted:<10}{found:<14}{report.seconds:6.0f} s  {verdict}"
        )
        print(rows[-1], flush=True)
        if not right:
            print(report.text[-20_000:], flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        sanitizer, program = compile_faults(folder)

        def start(tool: str, *program: str) -> Future[Report]:
            return pool.submit(sanitize, sanitizer, tool, list(program))

        planted = [(tool, start(tool, program, tool)) for tool in tools]
        in_kernel = start("memcheck", *this, "--fault")
        for tool, future in planted:
            report = future.result()
            show(tool, "planted fault", "a report", reports_fault(tool, report), report)
        report = in_kernel.result()
        at_kernel = re.search(r"Invalid __global__ write.*\n=+ +at .*sparse_attn", report.text)
        right = reports_fault("memcheck", report) and at_kernel is not None
        show("memcheck", "lse too short", "a report", right, report)
        if passed:
            runs = [
                (tool, dims, start(tool, *this, "--calls", *dims, *BACKENDS[tool]))
                for tool in tools
                for dims in ((str(head_dim), str(head_dim_v)) for head_dim, head_dim_v in HEAD_DIMS)
            ]
            for tool, dims, future in runs:
                report = future.result()
                show(tool, "head dims " + "/".join(dims), "nothing", is_clean(report), report)
    print("\n" + "\n".join(rows))
    print("clean" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads that wait for each other are slow where the cores are shared
    if sys.argv[1:2] == ["--calls"]:
        run_calls(int(sys.argv[2]), int(sys.argv[3]), tuple(sys.argv[4:]))
    elif sys.argv[1:] == ["--fault"]:
        run_fault_in_kernel()
    elif set(sys.argv[1:]) <= set(TOOLS):
        sys.exit(main(tuple(sys.argv[1:]) or TOOLS))
    else:
        raise SystemExit(f"usage: python {sys.argv[0]} [{'|'.join(TOOLS)}] ...")
