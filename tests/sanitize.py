"""Small calls of every op, or of those named, to run under compute-sanitizer; ``--plant`` commits what a tool finds.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py [op …]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from support.calls import CALLS, Call, random_call
from support.contract import lacks_sm90

import gqa_kernels
from gqa_kernels._library import C

SEEDS = 6
END = "every call ran to its end"

# Kernels that a tool is not to judge, by name, and why. Racecheck follows them all the same, as it fails where it
# follows some launches alone; what it says of them is left out.
LEFT_OUT = {
    "initcheck": {
        "combine_splits": "reads, beside the sums of a split without keys, its row that nobody wrote, and drops it",
        "swiglu_rows": "of swiglu_ffn reads what torch's products wrote, which the tool does not watch",
    },
    "racecheck": {
        "decode_ring": "thread 0 initialises an mbarrier and arrives; the tool takes the first for 32 lanes'",
        "sample_greedy": "the same",
        "decoder_step": "warps that copy and warps that compute meet at mbarriers alone, those at a named barrier",
        "sample_cluster": "what some warps write before a named barrier others read after it",
    },
}


def large_call(op: str, dtype: torch.dtype, head_dim: int) -> Call:
    """Shapes that reach the kernels for large problems. Drawn on the CPU: a copy counts as initialised memory."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).cuda()

    if op == "gqa_attention_prefill":
        return (make(1, 300, 4, head_dim), make(1, 300, 2, head_dim), make(1, 300, 2, head_dim)), {}
    if op == "gqa_attention_decode":
        caches = (make(2, 1500, 2, head_dim), make(2, 1500, 2, head_dim))
        new = (make(2, 1, 2, head_dim), make(2, 1, 2, head_dim))
        return (make(2, 1, 8, head_dim), *caches, *new), {"cache_seqlens": torch.tensor([1400, 3]).cuda()}
    return (make(2, 128256),), {"top_k": 50, "top_p": 0.9, "min_p": 0.01}


def hopper_calls(op: str, tool: str) -> list[Call]:
    """What else the kernels for Hopper have: ragged, cached and paged prompts, every tile, keys of 16 blocks, weights
    of every kind and as many tokens as the streaming kernel has instances for."""
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).cuda()

    def ints(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).cuda()

    if op == "gqa_attention_decode":
        pages = {"cache_seqlens": ints(2000), "block_table": ints(*range(33)).view(1, -1), "window_size": (1500, 0)}
        return [((make(1, 2, 4, dim), make(33, 64, 1, dim), make(33, 64, 1, dim)), pages) for dim in (64, 128)]
    if op in ("linear", "swiglu_ffn"):
        return [streaming_call(op, tokens, e4m3, make) for tokens in (1, 3, 8, 12) for e4m3 in (False, True)]
    if op != "gqa_attention_prefill":
        return []
    ends = {"cu_seqlens_q": ints(0, 130, 200), "cu_seqlens_k": ints(0, 130, 200), "max_seqlen_q": 130}
    new = make(2, 70, 2, 128), make(2, 70, 2, 128)
    cached = {"cache_seqlens": ints(60, 3), "sinks": torch.zeros(4).cuda(), "return_lse": True}
    paged = {"cache_seqlens": ints(160, 70), "block_table": ints(4, 1, 0, 2, 3, 5).view(2, 3)}
    calls = [
        ((make(2, 70, 4, 128), *new, make(2, 140, 2, 128), make(2, 140, 2, 128)), cached),
        ((make(2, 70, 4, 96), None, None, make(6, 64, 2, 96), make(6, 64, 2, 96)), paged),
        ((make(1, 130, 4, 128), make(1, 330, 2, 128), make(1, 330, 2, 128)), {"causal": False}),
    ]
    # Racecheck does not see that an mbarrier, at which one lane arrives for its warp, hands further tiles of a block
    # over; and warns of lanes that write what they have read from one place in the search for ragged ones.
    if tool != "racecheck":
        ragged = make(200, 4, 64), make(200, 2, 64), make(200, 2, 64)
        calls += [
            (ragged, {**ends, "window_size": (50, 0), "softcap": 20.0}),
            ((make(7, 64, 40, 64), make(7, 64, 8, 64), make(7, 64, 8, 64)), {}),
        ]
    return calls


def streaming_call(op: str, tokens: int, e4m3: bool, make: Callable[..., Tensor]) -> Call:
    """Outputs and columns that end within a tile, weights that may be read early; a few rows a block, and many."""
    columns, outputs = (272, 9000) if tokens == 3 else (528, 200)

    def weight(*shape: int) -> Tensor:  # rounded on the CPU, as initcheck does not watch torch's kernels
        return make(*shape).cpu().to(torch.float8_e4m3fn).cuda() if e4m3 else make(*shape)

    options: dict[str, Any] = {"residual": make(tokens, outputs), "static_weights": tokens != 8}
    scale = torch.ones(2 * 304 if op == "swiglu_ffn" else outputs).cuda()
    if op == "linear":
        weights = [weight(outputs - 40, columns), weight(40, columns)]
        return (make(tokens, columns), *weights), options | ({"weight_scale": scale} if e4m3 else {})
    weights = [weight(304, columns), weight(304, columns), weight(outputs, 304)]
    scales = {"gate_up_scale": scale, "down_scale": torch.ones(outputs).cuda()}
    return (make(tokens, columns), *weights), options | (scales if e4m3 else {})


FAULTY = {
    "synccheck": "if (threadIdx.x < 16) __syncthreads(); out[threadIdx.x] = 1;",
    "racecheck": "__shared__ int x[64]; x[threadIdx.x] = 1; out[threadIdx.x] = x[63 - threadIdx.x];",
}


def plant(tool: str) -> None:
    """A fault of the kind that the tool is there for, in a kernel of this library or in one of that name."""
    if tool == "memcheck":
        gate, up = (torch.randn(1, 512).cuda() for _ in range(2))
        up.untyped_storage().resize_(1024)
        gqa_kernels.swiglu(gate, up)
    elif tool == "initcheck":
        gqa_kernels.residual_add(torch.empty(1, 512).cuda(), torch.empty(1, 512, device="cuda"))
    else:
        source = f'extern "C" __global__ void gqa_plant(int *out) {{ {FAULTY[tool]} }}'
        kernel = torch.cuda._compile_kernel(source, "gqa_plant")
        kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[torch.zeros(64, dtype=torch.int32).cuda()])
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plant", choices=["memcheck", "initcheck", *FAULTY])
    parser.add_argument("--tool", default="memcheck", help="that this runs under")
    parser.add_argument("ops", nargs="*", default=list(CALLS))
    given = parser.parse_args()
    if given.plant:
        plant(given.plant)
        return
    for override in (0, 1):  # every kernel, then the portable ones alone
        C.set_kernel_override(override)
        for op in given.ops:
            if op == "decoder_step" and lacks_sm90():
                continue
            calls = [random_call(op, seed, "cuda") for seed in range(SEEDS)]
            if op in ("gqa_attention_prefill", "gqa_attention_decode", "sample"):
                dims = (64, 96, 128, 256) if op != "sample" else (0,)
                calls += [large_call(op, random.Random(d).choice([torch.float16, torch.bfloat16]), d) for d in dims]
            if override == 0:
                calls += hopper_calls(op, given.tool)
            with gqa_kernels.record_launches() as launches:
                for args, options in calls:
                    getattr(gqa_kernels, op)(*args, **options)
            torch.cuda.synchronize()
            print(op, *sorted({launch["kernel"] for launch in launches}))
    print(END)


if __name__ == "__main__":
    main()
