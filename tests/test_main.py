"""python -m gqa_kernels"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gqa_kernels
from gqa_kernels.__main__ import cflags, cuda_state, examples, libs, report, serving_arch
from gqa_kernels.explain import OPS


def run(*options: str, **environment: str) -> str:
    """Started beside the package that this process imported: a source tree may hold another copy."""
    command = [sys.executable, "-m", "gqa_kernels", *options]
    place = Path(gqa_kernels.__file__).parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=place, env=os.environ | environment)
    return done.stdout


@pytest.mark.abi
def test_report_without_a_gpu() -> None:
    text = run(CUDA_VISIBLE_DEVICES="")
    assert f"gqa_kernels {gqa_kernels.__version__}" in text and torch.__version__ in text
    assert "planned for an H200" in text
    lines = text.splitlines()
    for op in OPS:
        line = next(line for line in lines if line.startswith(op + " "))
        assert " cpu " in line and "none:" not in line, line


def test_report_names_the_gpu(gpu: str) -> None:
    text = report()
    assert torch.cuda.get_device_name() in text and "is served by" in text and "H200;" not in text


def test_examples_are_every_op() -> None:
    assert {op for _, op, _, _ in examples()} == set(OPS)


def test_flags_name_files_that_exist() -> None:
    include, folder, library, rpath = shlex.split(run("--cflags", "--libs"))
    assert (Path(include.removeprefix("-I")) / "gqa_kernels.h").is_file()
    assert (Path(folder.removeprefix("-L")) / "libgqa_kernels.so").is_file()
    assert library == "-lgqa_kernels" and rpath == "-Wl,-rpath," + folder.removeprefix("-L")
    assert [include] == shlex.split(cflags()) and [folder, library, rpath] == shlex.split(libs())


@pytest.mark.parametrize(
    "capability, archs, serves",
    [
        (90, "80 90a ptx80", "90a"),
        (86, "80 90a ptx80", "80"),
        (80, "80 90a ptx80", "80"),
        (100, "80 90a ptx80", "ptx80"),
        (120, "80 90a ptx80 ptx90", "ptx90"),
        (100, "90a", None),
        (75, "80 90a ptx80", None),
        (90, "80", None),
        (80, "86", None),
        (90, "", None),
    ],
)
def test_serving_arch(capability: int, archs: str, serves: str | None) -> None:
    assert serving_arch(capability, archs) == serves


def test_cuda_state_says_why_not() -> None:
    assert cuda_state("").startswith("not built")
    if not torch.cuda.is_available():
        assert "cannot run: " in cuda_state("80 90a ptx80")
