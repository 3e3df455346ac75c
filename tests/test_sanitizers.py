"""P26: compute-sanitizer finds nothing in small calls of every op, and finds a fault that is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitize import END, LEFT_OUT
from support.kernels import HOPPER

every_tool = pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
NOISE = ("COMPUTE-SANITIZER", "SUMMARY", "Host Frame", "host backtrace")
SCRIPT = Path(__file__).parent / "sanitize.py"


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool != "racecheck":  # which fails in torch's products where it follows some launches alone
        command += ["--kernel-name", "kns=gqa"]
        command += [f"--kernel-name-exclude=kns={kernel}" for kernel in LEFT_OUT.get(tool, ())]
    if tool == "initcheck":  # torch copies what its own products wrote, which the tool does not watch
        command += ["--check-api-memory-access", "no"]
    if tool == "synccheck":  # of a block at most: what the tool finds by itself is too few
        command += ["--num-cuda-barriers", "64"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*command, sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def findings(tool: str, found: subprocess.CompletedProcess[str]) -> str:
    """The first lines of what was found: what happened, where on the device, by whom; without the host's frames."""
    told: list[str] = []
    for record in found.stdout.split("========= \n"):
        if tool == "racecheck" and any(f"::{kernel}<" in record for kernel in LEFT_OUT[tool]):
            continue
        lines = [line for line in record.splitlines() if line.startswith("=========")]
        lines = [line for line in lines if not any(noise in line for noise in NOISE)]
        if "Race reported" in record and not any("gqa" in line for line in lines):  # within torch
            continue
        told += lines
    return "\n".join(told[:60])


@every_tool
def test_p26_clean(gpu: str, tool: str) -> None:
    found = sanitize(tool, "--tool", tool)
    told = findings(tool, found)
    assert not told, told + found.stderr[-1000:]
    assert END in found.stdout and " SUMMARY: " in found.stdout, found.stdout[-1000:] + found.stderr[-1000:]
    # Racecheck counts what it says of torch's kernels and those left out.
    assert found.returncode in ((0, 9) if tool == "racecheck" else (0,)), found.stderr[-1000:]
    if torch.cuda.get_device_capability() == (9, 0):
        assert all(kernel in found.stdout for kernel in (*HOPPER.values(), "linear_stream", "ffn_gate_up", "ffn_down"))


FOUND = {
    "memcheck": "Invalid __global__ read",
    "initcheck": "Uninitialized __global__ memory read",
    "synccheck": "Barrier error detected",
    "racecheck": "Race reported between",
}


@every_tool
def test_p26_planted_fault(gpu: str, tool: str) -> None:
    """What each tool is there for is caught, so that finding nothing means something."""
    found = sanitize(tool, "--plant", tool)
    told = findings(tool, found)
    assert found.returncode == 9, told + found.stdout[-1000:] + found.stderr[-1000:]
    assert FOUND[tool] in told
