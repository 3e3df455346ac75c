"""One row through the ops between a layer's products, with programmatic launches and with ordinary ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import gqa_kernels
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows
from benchmarks.graph_edges import make_ordinary
from benchmarks.report import Aim
from benchmarks.shapes import Attention
from benchmarks.timing import Settings

EPS = 1e-5
ORDINARY = OURS + " (ordinary launches)"
GAIN = 0.2  # microseconds that a programmatic launch is to spare


def norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As LlamaAttention does it: x ``[1, S, H, D]``, tables ``[S, D / 2]``."""
    cos, sin = (torch.cat([t, t], -1)[None, :, None].to(x.dtype) for t in (cos, sin))
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * cos + half * sin


def ordinary(ours: Contestant, launches: int, settings: Settings) -> list[Contestant]:
    """Ours, and beside it the same without programmatic launches where there are any."""
    if not settings.cuda or torch.cuda.get_device_capability() != (9, 0):
        return [ours]
    aim = Aim(plus=-GAIN * launches, beside=ORDINARY)
    return [replace(ours, aim=aim), Contestant(ORDINARY, ours.call, edit=make_ordinary, host=False)]


def case(shape: Attention, intermediate: int, settings: Settings) -> Case:
    hidden, keys = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def make() -> Inputs:
        cache = shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim
        sizes = {"x": (1, hidden), "residual": (1, hidden), "weight": (hidden,), "k": cache, "v": cache}
        sizes |= {"gate": (1, intermediate), "up": (1, intermediate)}
        x = {name: torch.randn(size, device=settings.device, dtype=torch.bfloat16) for name, size in sizes.items()}
        angle = torch.randn(1, shape.head_dim // 2, device=settings.device)
        lengths = torch.full((1,), shape.seqlen, dtype=torch.int32, device=settings.device)
        return {**x, "cos": angle.cos(), "sin": angle.sin(), "lengths": lengths}

    def heads(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(1, 1, -1, shape.head_dim), x[:, :keys].view(1, 1, -1, shape.head_dim)

    def call(x: Inputs) -> tuple[Tensor, ...]:
        normed, residual = gqa_kernels.add_rmsnorm(x["x"], x["residual"], x["weight"], EPS)
        q, k = gqa_kernels.rope(*heads(normed), x["cos"], x["sin"])
        out = gqa_kernels.gqa_attention_decode(q, x["k"], x["v"], cache_seqlens=x["lengths"])
        return residual, k, out, gqa_kernels.swiglu(x["gate"], x["up"])

    def check(x: Inputs, out: tuple[Tensor, ...]) -> None:
        x = {name: value.float() for name, value in x.items()}
        total = x["x"] + x["residual"]
        q, k = (rotate(part, x["cos"], x["sin"]) for part in heads(norm(total, x["weight"])))
        row = torch.zeros(1, dtype=torch.int64, device=settings.device)
        attended = attention_rows(q, x["k"], x["v"], row, False)
        assert_close(out, [total, k, attended, functional.silu(x["gate"]) * x["up"]])

    return Case(
        group="ops",
        op="add_rmsnorm, rope, gqa_attention_decode, swiglu",
        shape=f"1 row, {shape.decode_name}",
        make=partial(make),
        contestants=ordinary(Contestant(OURS, call), 4, settings),
        check=check,
        limit="read",
        traffic=2 * shape.seqlen * keys * 2,
    )
