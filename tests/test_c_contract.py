"""P21: the C interface, called by C programs built here without torch and without Python."""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from support.guard import raw_bytes
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill, record_launches

SOURCES = Path(__file__).parent / "c"
HEADER = Path(__file__).parent.parent / "csrc/include/gqa_kernels.h"
STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

pytestmark = pytest.mark.gpu


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler")
    return found


@cache
def flags(option: str) -> list[str]:
    command = [sys.executable, "-m", "gqa_kernels", option]
    return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, name: str, *extra: str) -> Path:
    program = folder / name
    source = SOURCES / f"{name}.c"
    run(compiler(), *STRICT, *flags("--cflags"), source, "-o", program, *flags("--libs"), *extra)
    return program


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With CUDA where there is a GPU: the CUDA runtime is the program's own, linked beside the library."""
    folder = tmp_path_factory.mktemp("c")
    if not torch.cuda.is_available():
        return build(folder, "attention")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: nothing to compile a CUDA host program with")
    toolkit = Path(nvcc).resolve().parents[1]
    cuda = [f"-isystem{toolkit}/include", "-DGQA_TEST_CUDA", f"-L{toolkit}/lib64", "-lcudart_static"]
    return build(folder, "attention", *cuda, "-ldl", "-lrt", "-lpthread")


@pytest.mark.abi
def test_the_header_is_c99(tmp_path: Path) -> None:
    source = tmp_path / "only.c"
    source.write_text('#include "gqa_kernels.h"\nint main(void) { return (int)sizeof(gqa_plan) * 0; }\n')
    run(compiler(), *STRICT, "-fsyntax-only", f"-I{HEADER.parent}", source)
    installed = Path(flags("--cflags")[0].removeprefix("-I")) / "gqa_kernels.h"
    assert installed.read_bytes() == HEADER.read_bytes()


def test_the_library_needs_no_torch_and_no_python() -> None:
    library = Path(flags("--libs")[0].removeprefix("-L")) / "libgqa_kernels.so"
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = run("ldd", library)
    assert "torch" not in needed and "libpython" not in needed and "not found" not in needed, needed


@pytest.mark.abi
def test_p21_every_op_refuses_with_the_right_status(tmp_path: Path) -> None:
    text = run(build(tmp_path, "contract"))
    checks, failures = (int(word) for word in text.split()[-4::2])
    assert checks > 200 and failures == 0, text


def call(
    program: Path, folder: Path, decode: bool, x: dict[str, Tensor], *, causal: bool, num_splits: int, softcap: float
) -> tuple[list[str], list[bytes]]:
    """Launches, and the bytes of out, lse and the caches."""
    q, k = x["q"], x["k"]
    capacity = x["k_cache"].shape[1] if "k_cache" in x else 0
    sizes = [decode, DTYPES[q.dtype], q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], capacity, causal]
    header = struct.pack("=10i2f", *sizes, num_splits, q.shape[3] ** -0.5, softcap)
    names = ["q", "k", "v"] + (["k_cache", "v_cache", "cache_seqlens"] if capacity else [])
    given, taken = folder / "input", folder / "output"
    given.write_bytes(header + b"".join(raw_bytes(x[name].cpu()).numpy().tobytes() for name in names))
    lines = run(program, given, taken, q.device.type).splitlines()
    cache = x["k_cache"].nbytes if capacity else 0
    data, parts = taken.read_bytes(), []
    for size in (q.nbytes, 4 * q.shape[0] * q.shape[2] * q.shape[1], cache, cache):
        parts.append(data[:size])
        data = data[size:]
    assert data == b""
    return lines, parts


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(raw_bytes(tensor.cpu()).numpy().tobytes())


def assert_same_launches(lines: list[str], launches: list[dict[str, object]], device: str) -> None:
    """The library reports CUDA launches; spreading a CPU twin's rows is the caller's, and so is reporting it."""
    wanted = ["{op} {kernel} {dtype} {num_splits}".format(**launch) for launch in launches]
    assert lines == (wanted if device == "cuda" else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (6, 3), (2, 2)])
def test_p21_prefill_gives_the_bytes_of_the_op(
    attention: Path, tmp_path: Path, device: str, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    for batch, seqlen, causal, softcap in ((1, 70, True, 0.0), (2, 33, False, 30.0), (3, 1, True, 0.0)):
        x = {
            "q": torch.randn(batch, seqlen, heads[0], 64).to(device, dtype),
            "k": torch.randn(batch, seqlen, heads[1], 64).to(device, dtype),
            "v": torch.randn(batch, seqlen, heads[1], 64).to(device, dtype),
        }
        with record_launches() as launches:
            out, lse = gqa_attention_prefill(x["q"], x["k"], x["v"], causal=causal, softcap=softcap, return_lse=True)
        lines, parts = call(attention, tmp_path, False, x, causal=causal, num_splits=0, softcap=softcap)
        assert parts[:2] == [as_bytes(out), as_bytes(lse)]
        assert_same_launches(lines, launches, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (14, 2), (2, 2)])
def test_p21_decode_gives_the_bytes_of_the_op(
    attention: Path, tmp_path: Path, device: str, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    for batch, seqlen, capacity, num_splits in ((1, 1, 1024, 0), (3, 2, 100, 0), (2, 1, 300, 4)):
        x = {
            "q": torch.randn(batch, seqlen, heads[0], 64).to(device, dtype),
            "k": torch.randn(batch, seqlen, heads[1], 64).to(device, dtype),
            "v": torch.randn(batch, seqlen, heads[1], 64).to(device, dtype),
            "k_cache": torch.randn(batch, capacity, heads[1], 64).to(device, dtype),
            "v_cache": torch.randn(batch, capacity, heads[1], 64).to(device, dtype),
            "cache_seqlens": torch.randint(0, capacity - seqlen, (batch,), dtype=torch.int32).to(device),
        }
        lines, parts = call(attention, tmp_path, True, x, causal=True, num_splits=num_splits, softcap=0.0)
        with record_launches() as launches:
            out, lse = gqa_attention_decode(
                x["q"],
                x["k_cache"],
                x["v_cache"],
                x["k"],
                x["v"],
                cache_seqlens=x["cache_seqlens"],
                num_splits=num_splits,
                return_lse=True,
            )
        assert parts == [as_bytes(out), as_bytes(lse), as_bytes(x["k_cache"]), as_bytes(x["v_cache"])]
        assert_same_launches(lines, launches, device)
