"""P26: compute-sanitizer finds nothing in small calls of every op, and finds a fault that is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sanitize.py"


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=gqa"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*command, sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_p26_clean(gpu: str, tool: str) -> None:
    found = sanitize(tool)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
    assert "gqa_attention_prefill" in found.stdout


def test_p26_planted_fault(gpu: str) -> None:
    """Reading past an allocation is caught, so that finding nothing means something."""
    found = sanitize("memcheck", "--plant")
    assert found.returncode == 9, found.stdout[-4000:] + found.stderr[-1000:]
    assert "Invalid __global__ read" in found.stdout
