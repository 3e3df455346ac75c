"""Peers that are not installed where the benchmarks run: figures of another run, to stand beside ours."""

from __future__ import annotations

FLASHINFER = "FlashInfer 0.7.2"
SOURCE = (
    f"{FLASHINFER} is not of this run: it was measured on another H200 (driver 580.159, torch 2.11.0+cu130) on "
    "2026-11-20, in CUDA graphs over at most 64 rotating buffers too; its RoPE is in place, its sampling takes "
    "float32 logits and begins with a softmax."
)
ROWS = 1, 16, 512, 8192
TIMES = {  # microseconds
    **{f"rmsnorm {n} x 4096": us for n, us in zip(ROWS, (1.53, 1.71, 4.5, 46.0))},
    **{f"add_rmsnorm {n} x 4096": us for n, us in zip(ROWS, (1.71, 1.95, 6.3, 68.7))},
    **{f"swiglu {n} x 14336": us for n, us in zip(ROWS, (2.97, 5.0, 13.1, 167.3))},
    **{f"rope_ {n} tokens 32:8 D128": us for n, us in zip(ROWS, (1.61, 1.67, 5.3, 53.5))},
    "sample 1 x 151936, top-p 0.9": 52.0,
    "sample 1 x 128256, top-p 0.9": 44.0,
    "sample 16 x 128256, top-p 0.9": 70.0,
    "sample 64 x 128256, top-p 0.9": 110.0,
}
