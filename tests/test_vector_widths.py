"""Ops whose bytes are defined give them on every CPU: their twins, compiled here for one vector width after another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.twin import OPS

import gqa_kernels

ROOT = Path(__file__).parent.parent
TWINS = ["cpu/sample", "cpu/rotary", "cpu/kv_cache_append"]
BESIDE = ["plan/sample", "plan/kv_cache_append", "common/status", "nocuda/stubs"]
# What the package compiles these files with, but for the width, which it leaves to the loader.
EXACT = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
WIDTHS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}  # each with a flag of CPUs that have it


def compile_twins(folder: Path, *flags: str) -> Path:
    """A library with these twins, for one width alone, that stands before the installed one where it is preloaded."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    one_width = folder / "one_width.h"
    one_width.write_text('#include "cpu/types.h"\n#undef GQA_CPU_CLONES\n#define GQA_CPU_CLONES\n')
    sources = [ROOT / f"csrc/{name}.cpp" for name in TWINS + BESIDE]
    include = [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", "-include", one_width]
    library = folder / "twins.so"
    command = [compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", *flags, *include, *sources]
    done = subprocess.run([*command, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def digests(preload: Path | None = None) -> dict[str, str]:
    paths = [str(Path(gqa_kernels.__file__).parents[1]), str(ROOT / "tests"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    command = [sys.executable, "-m", "support.twin"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.keys() == OPS.keys()
    return found


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    return digests()


@pytest.mark.parametrize("width", WIDTHS)
def test_same_bytes(installed: dict[str, str], tmp_path: Path, width: str) -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or WIDTHS[width] not in cpu.read_text().split():
        pytest.skip(f"no CPU of {width}")
    assert digests(compile_twins(tmp_path, *EXACT, f"-march={width}")) == installed


def test_other_arithmetic_shows(installed: dict[str, str], tmp_path: Path) -> None:
    """Products joined with sums, as a compiler may by itself, change bytes of each op: the comparison sees them."""
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("no CPU with FMA")
    joined = digests(compile_twins(tmp_path, "-O3", "-fno-math-errno", "-ffp-contract=fast", "-march=x86-64-v3"))
    assert {op for op in OPS if joined[op] == installed[op]} == set()
