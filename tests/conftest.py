# SPDX-License-Identifier: Apache-2.0
"""Options, markers and fixtures: the seed, the device, what needs a GPU."""

from __future__ import annotations

import secrets
import zlib

import hypothesis
import pytest
import torch

NO_GPU = "no CUDA GPU on this machine"

hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default="0",
        help="seed of the random data and of hypothesis, or 'fresh' for new ones (default: 0)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, skipped without one")
    config.addinivalue_line("markers", "two_gpus: needs two CUDA GPUs, skipped without them")
    fresh = config.getoption("--seed") == "fresh"
    if fresh:
        config.option.seed = secrets.randbelow(2**31)
    hypothesis.settings.load_profile("fresh" if fresh else "fixed")
    # Threads that wait for each other make small cases slow wherever the cores are shared.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        f"seed: {config.getoption('--seed')} (repeat with --seed)",
        f"torch {torch.__version__}, GPUs: {', '.join(gpus) or 'none, GPU tests are skipped'}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") and gpus == 0:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if item.get_closest_marker("two_gpus") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, found {gpus}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: {NO_GPU}", yellow=True)


@pytest.fixture(scope="session")
def session_seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--seed"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest, session_seed: int) -> int:
    """The seed of this test, from the session's and the test's name; torch is seeded with it."""
    value = zlib.crc32(f"{session_seed}:{request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)
