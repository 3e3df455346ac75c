"""Small calls of every op, or of those named, to run under compute-sanitizer; ``--plant`` reads past its input.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py [op …]
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from support.calls import CALLS, Call, random_call
from support.contract import lacks_sm90

import gqa_kernels
from gqa_kernels._library import C

SEEDS = 6

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("ops", nargs="*", default=list(CALLS))
    given = parser.parse_args()
    plant = given.plant
    for override in () if plant else (0, 1):  # every kernel, then the portable ones alone
        C.set_kernel_override(override)
        for op in given.ops:
            if op == "decoder_step" and lacks_sm90():
                continue
            calls = [random_call(op, seed, "cuda") for seed in range(SEEDS)]
            if op in ("gqa_attention_prefill", "gqa_attention_decode", "sample"):
                dims = (64, 96, 128, 256) if op != "sample" else (0,)
                calls += [large_call(op, random.Random(d).choice([torch.float16, torch.bfloat16]), d) for d in dims]
            with gqa_kernels.record_launches() as launches:
                for args, options in calls:
                    getattr(gqa_kernels, op)(*args, **options)
            torch.cuda.synchronize()
            print(op, *sorted({launch["kernel"] for launch in launches}))
    if plant:
        gate, up = (torch.randn(1, 512).cuda() for _ in range(2))
        up.untyped_storage().resize_(1024)
        gqa_kernels.swiglu(gate, up)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
