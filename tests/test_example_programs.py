"""The C program and the Rust crate of examples/, built against the installed library and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gqa_kernels
from gqa_kernels._library import C

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(gqa_kernels.__file__).parents[1]), "PYTHON": sys.executable}
AGREES = r"largest error ([\d.e-]+), allowed ([\d.e-]+)"
ON_CUDA = torch.cuda.is_available() and C.build_info()["cuda_archs"] != ""


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def agreements(text: str, device: str) -> int:
    """Comparisons with the plain loop on this device, each within what it allows."""
    found = re.findall(rf"{device}.*: .*{AGREES}", text)
    assert all(float(error) <= float(allowed) for error, allowed in found)
    return len(found)


@pytest.mark.abi
def test_p21_c(tmp_path: Path) -> None:
    need("make", "cc")
    folder = Path(shutil.copytree(EXAMPLES / "c", tmp_path / "c", ignore=shutil.ignore_patterns("prefill_and_decode")))
    text = run("make", "--silent", "run", folder=folder)
    assert text.startswith(f"gqa_kernels {gqa_kernels.__version__}, CUDA kernels: ")
    assert agreements(text, "cpu") == 1
    assert "old struct: struct_size is not the size" in text and "over 3: a size or setting is out of range" in text
    if ON_CUDA:
        assert agreements(text, "cuda") == 1
        assert "launch gqa_attention_prefill: " in text and text.count("launch gqa_attention_decode: ") >= 5
    else:
        assert "cuda: skipped, " in text and "launch " not in text


@pytest.mark.abi
def test_p21_rust(tmp_path: Path) -> None:
    need("cargo", "rustc", "cc")
    folder = Path(shutil.copytree(EXAMPLES / "rust", tmp_path / "rust", ignore=shutil.ignore_patterns("target")))
    text = run("cargo", "test", "--offline", "--locked", "--quiet", "--", "--nocapture", folder=folder)
    assert "test result: FAILED" not in text and text.count("test result: ok. ") >= 2
    assert agreements(text, "cpu") == 4
    if ON_CUDA:
        assert agreements(text, "cuda") == 1
    else:
        assert "cuda: skipped, " in text


def test_rust_is_formatted() -> None:
    need("cargo", "rustfmt")
    run("cargo", "fmt", "--check", folder=EXAMPLES / "rust")
