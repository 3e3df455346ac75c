"""``python -m gqa_kernels``: what was built, what loaded, which GPU, which kernel each op would use.

``--cflags`` and ``--libs`` print what a C or C++ program needs to compile and link against the kernels alone.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gqa_kernels
from gqa_kernels._library import C
from gqa_kernels.explain import explain

PACKAGE = Path(__file__).resolve().parent


def cflags() -> str:
    return shlex.quote(f"-I{PACKAGE / 'include'}")


def libs() -> str:
    return " ".join(shlex.quote(flag) for flag in (f"-L{PACKAGE}", "-lgqa_kernels", f"-Wl,-rpath,{PACKAGE}"))


def serving_arch(capability: int, archs: str) -> str | None:
    """Which of the built architectures ("80 90a ptx80") runs on a GPU of this compute capability; None: none."""
    best: tuple[int, str] | None = None
    for name in archs.split():
        match = re.fullmatch(r"(ptx)?(\d+)(a?)", name)
        if match is None:
            continue
        number = int(match[2])
        if match[3]:
            serves = number == capability
        elif match[1]:
            serves = number <= capability
        else:
            serves = number <= capability and number // 10 == capability // 10
        rank = 2 * number + (not match[1])
        if serves and (best is None or rank > best[0]):
            best = rank, name
    return best[1] if best else None


def cuda_state(archs: str) -> str:
    """One line: can the CUDA kernels run here, and if not, why."""
    if not archs:
        return "not built: there was no nvcc, or GQA_KERNELS_CUDA=0; reinstall with nvcc on PATH or CUDA_HOME set"
    built = f"built for {archs}; "
    if torch.version.cuda is None:
        return built + f"cannot run: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        try:
            torch.empty(0, device="cuda")
        except (RuntimeError, AssertionError) as error:
            return built + "cannot run: " + str(error).split(". ")[0].splitlines()[0]
        return built + "cannot run: torch finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    served = serving_arch(10 * major + minor, archs)
    if served is None:
        return built + f"cannot run: none of them serves this GPU (sm_{major}{minor}), set TORCH_CUDA_ARCH_LIST"
    return built + f"sm_{major}{minor} is served by {served}"


def examples() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """(shape, op, args, kwargs) of each op in a model of Llama-3.1-8B's shape. Nothing of it is computed."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    hidden, cache = tensor(16, 4096), tensor(16, 2048, 8, 128)
    q, k, lengths = tensor(16, 1, 32, 128), tensor(16, 1, 8, 128), torch.zeros(16, dtype=torch.int32)
    prompt, keys = tensor(1, 4096, 32, 128), tensor(1, 4096, 8, 128)
    cos = tensor(4096, 64, dtype=torch.float32)
    yield "32:8 D128 B1 S4096", "gqa_attention_prefill", (prompt, keys, keys), {}
    yield "32:8 D128 B16 S2048", "gqa_attention_decode", (q, cache, cache, k, k), {"cache_seqlens": lengths}
    yield "8 D128 B16 S2048", "kv_cache_append", (k, k, cache, cache), {"cache_seqlens": lengths}
    parts, lses = tensor(4, 16, 1, 32, 128), tensor(4, 16, 32, 1, dtype=torch.float32)
    yield "4 parts, 32 D128 B16", "merge_attention_states", (parts, lses), {}
    yield "32:8 D128, 4096 tokens", "rope", (prompt, keys, cos, cos), {}
    yield "32:8 D128, 4096 tokens", "rope_", (prompt, keys, cos, cos), {}
    scale = tensor(128)
    yield "32:8 D128, 4096 tokens", "qk_rmsnorm_rope", (prompt, keys, scale, scale, cos, cos), {}
    yield "16 x 4096", "rmsnorm", (hidden, tensor(4096)), {}
    yield "16 x 4096", "add_rmsnorm", (hidden, hidden, tensor(4096)), {}
    yield "16 x 4096", "residual_add", (hidden, hidden), {}
    yield "16 x 4096, q k v", "linear", (hidden, *(tensor(rows, 4096) for rows in (4096, 1024, 1024))), {}
    yield "16 x 14336", "swiglu", (tensor(16, 14336), tensor(16, 14336)), {}
    weights = tensor(14336, 4096), tensor(14336, 4096), tensor(4096, 14336)
    yield "16 x 4096/14336", "swiglu_ffn", (hidden, *weights), {}
    wide = {size: [tensor(size, 4096)] * 32 for size in (1024, 4096, 14336)}
    caches, norms = [tensor(1, 2048, 8, 128)] * 32, [tensor(4096)] * 32
    layers = wide[4096], wide[1024], wide[1024], wide[4096], wide[14336], wide[14336], [tensor(4096, 14336)] * 32
    ends = norms, norms, tensor(4096), tensor(32000, 4096)
    at = {"cache_seqlens": lengths[:1], "eps": 1e-5}
    yield "1 row, 32 layers", "decoder_step", (hidden[:1], caches, caches, *layers, *ends), at
    yield "16 x 128256, top-p", "sample", (tensor(16, 128256),), {"top_p": 0.9}


def kernel_name(device: str, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    try:
        plan = explain(op, *args, device=device, **kwargs)
    except RuntimeError as error:
        return "none", str(error)
    return plan.kernel, plan.reason


def report() -> str:
    archs = C.build_info()["cuda_archs"]
    gpu = torch.cuda.is_available()
    lines = [
        f"gqa_kernels {gqa_kernels.__version__}",
        f"  library    {PACKAGE / 'libgqa_kernels.so'}",
        f"  extension  {C.__file__}",
        "  CPU        built, loaded",
        f"  CUDA       {cuda_state(archs)}",
        f"  torch      {torch.__version__} (Python {sys.version.split()[0]})",
        "  GPU        "
        + (
            ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
            if gpu
            else "none; the CUDA column is planned for an H200"
        ),
        "",
        f"{'op':<24}{'shape (bfloat16)':<24}{'CPU':<6}CUDA",
    ]
    for shape, op, args, kwargs in examples():
        kernel, reason = kernel_name("cuda", op, args, kwargs)
        lines.append(f"{op:<24}{shape:<24}{kernel_name('cpu', op, args, kwargs)[0]:<6}{kernel}: {reason}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m gqa_kernels", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cflags", action="store_true", help="print the compiler flags of a C program")
    parser.add_argument("--libs", action="store_true", help="print the linker flags of a C program")
    options = parser.parse_args(argv)
    if options.cflags or options.libs:
        print(" ".join(([cflags()] if options.cflags else []) + ([libs()] if options.libs else [])))
    else:
        print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
