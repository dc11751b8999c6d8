# SPDX-License-Identifier: Apache-2.0
"""Build the sdist, and the wheel from it, and print what was compiled.

usage: python cmake/build_wheel.py OUTDIR

Fails on compiler warnings and on kernels that spill registers.
"""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

COMPILER = re.compile(r"CUDA compiler: (\S+ \((.+)\)), architectures: (\S+)")
FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    name: str
    target: str
    registers: int
    stack: int
    spilled: int


def build(outdir: Path) -> tuple[int, list[str], float]:
    """Run the build and echo it: exit status, lines, seconds from configure to link."""
    command = [sys.executable, "-m", "build", "--outdir", str(outdir)]
    command += ["-C", "cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    lines: list[str] = []
    start = end = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if "*** Configuring CMake" in line:
                start = time.monotonic()
            elif "*** Installing project" in line:
                end = time.monotonic()
    return process.returncode, lines, end - start


def parse_ptxas(lines: list[str]) -> list[Kernel]:
    """The kernels in the output of ``ptxas -v``."""
    found = []
    name = target = ""
    stack = spilled = 0
    for line in lines:
        if match := FUNCTION.search(line):
            name, target = match.groups()
        elif match := STACK.search(line):
            stack = int(match[1])
            spilled = int(match[2]) + int(match[3])
        elif name and (match := REGISTERS.search(line)):
            found.append(Kernel(name, target, int(match[1]), stack, spilled))
            name = ""
    names = demangle([kernel.name for kernel in found])
    return sorted(k._replace(name=name) for k, name in zip(found, names, strict=True))


def demangle(names: list[str]) -> list[str]:
    try:
        result = subprocess.run(
            ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        return names
    return [name.removeprefix("void ") for name in result.stdout.splitlines()]


def main() -> int:
    outdir = Path(sys.argv[1])
    status, lines, seconds = build(outdir)
    kernels = parse_ptxas(lines)
    compiler = next((match for line in lines if (match := COMPILER.search(line))), None)
    errors = ["the build failed, see above"] if status else []

    print("\nregisters  stack  spilled  target  kernel")
    for kernel in kernels:
        print(
            f"{kernel.registers:9} {kernel.stack:4} B {kernel.spilled:6} B"
            f"  {kernel.target:6}  {kernel.name}"
        )
        if kernel.spilled:
            errors.append(f"{kernel.name} spills {kernel.spilled} bytes on {kernel.target}")
    print(f"CUDA compiler  {compiler[1] if compiler else 'none'}")
    print(f"architectures  {compiler[3] if compiler else 'none'}")
    for wheel in outdir.glob("*.whl"):
        print(f"wheel          {wheel.name}, {wheel.stat().st_size / 2**20:.2f} MiB")
        print(f"build time     {seconds:.0f} s from configure to link, downloads aside")
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"CPU time       {usage.ru_utime + usage.ru_stime:.0f} s in all")

    if not kernels and sys.platform == "linux":
        errors.append("no kernel was compiled")
    if compiler and not os.environ.get("CUDACXX") and compiler[2] != "PyPI wheel":
        errors.append(f"CUDACXX is not set, but the compiler is {compiler[1]}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
