"""Small libraries of kernels, one a wrapper of an instruction, built here with nvcc from tests/cuda."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
DTYPES = {torch.float16: 1, torch.bfloat16: 2}

every_half = pytest.mark.parametrize("dtype", DTYPES)


def build(name: str, factory: pytest.TempPathFactory) -> Path:
    """tests/cuda/<name>.cu as a shared library, built once for all workers of a run."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    base = factory.getbasetemp()
    folder = base.parent if base.name.startswith("popen-") else base
    library = folder / f"{name}.so"
    flags = ["-std=c++17", "-O1", "-shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_90a,code=sm_90a"]
    include = [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    sources = [ROOT / f"tests/cuda/{name}.cu", ROOT / "csrc/common/status.cpp"]
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(".part")
            done = subprocess.run([nvcc, *flags, *include, *sources, "-o", part], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            part.rename(library)
    return library


def load(library: Path) -> ctypes.CDLL:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    return ctypes.CDLL(str(library))


def fixtures(name: str) -> tuple[Any, Any]:
    """``built``, the library, which any machine with nvcc makes, and ``wrappers``, the library loaded on Hopper."""

    @pytest.fixture(scope="module")
    def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build(name, tmp_path_factory)

    @pytest.fixture
    def wrappers(gpu: str, built: Path) -> ctypes.CDLL:
        return load(built)

    return built, wrappers


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small enough that every sum of products is exact."""
    return torch.randint(-4, 5, shape).to(dtype).cuda()


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
