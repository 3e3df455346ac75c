"""Devices, guarded memory and the summary of skips, for every test."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Thousands of tiny ops: threads that spin while they wait cost ten times the work on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers share the cores; each with a thread on all of them, a product of small matrices takes ten times as long.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from support.guard import Guard
from support.kernels import force_portable

# References are large arrays by the thousand; given back and faulted in again, pages cost more than the arithmetic.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 30)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

NO_GPU = "no GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """-m gpu: what a GPU decides, for a machine that has one; every other test gives the same anywhere."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        asks = "gpu" in getattr(item, "fixturenames", ()) and "gpu" not in params
        if asks or str(params.get("device")).startswith("cuda"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same test on the CPU and, when there is one, on the GPU; "cuda portable" leaves out kernels for sm_90."""
    name, _, family = str(request.param).partition(" ")
    if name == "cuda":
        require_gpu()
    force_portable(family == "portable")
    yield name
    force_portable(False)


@pytest.fixture
def gpu() -> str:
    require_gpu()
    return "cuda"


def require_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)


@pytest.fixture
def guard(device: str) -> Iterator[Guard]:
    """Memory with canaries around it; checked when the test ends."""
    watcher = Guard(device)
    yield watcher
    watcher.check()


@pytest.fixture(autouse=True)
def _prefilled_outputs() -> Iterator[None]:
    """Every freshly allocated tensor is NaN (integers: their maximum), so an output byte left unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every reason for a skip, with how many it took: none goes unseen."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} tests skipped: {reason.removeprefix('Skipped: ')}")
