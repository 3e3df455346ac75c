"""P17 with torch.compile's own backend: the bytes of eager beside what it generates, and in its CUDA graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract import assert_same
from torch import Tensor

from gqa_kernels import add_rmsnorm, linear, rmsnorm, sample, swiglu, swiglu_ffn

WIDTH, INNER = 256, 384
Function = Callable[..., Any]


def _weights(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"norm": (WIDTH,), "w": (WIDTH, WIDTH), "b": (WIDTH,)}
    shapes |= {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {name: (torch.randn(shape) / 16).to(device, dtype) for name, shape in shapes.items()}


#: Of x and the weights: each op between what torch generates itself, in ways that round nothing, or once.
OPS: dict[str, Function] = {
    "rmsnorm": lambda x, w: rmsnorm(x * 2, w["norm"]) + 1,
    "add_rmsnorm": lambda x, w: torch.cat(add_rmsnorm(x * 2, -x, w["norm"]), dim=-1) + 1,
    "linear": lambda x, w: linear(x * 2, w["w"], w["up"], w["gate"], static_weights=True) * 2,
    "linear with bias and residual": lambda x, w: linear(x * 2, w["w"], bias=w["b"] * 2, residual=x * 2) + 1,
    "swiglu_ffn": lambda x, w: swiglu_ffn(x * 2, w["gate"], w["up"], w["down"]) + 1,
    "layer": lambda x, w: _layer(x, w),
}


def _layer(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    normed, residual = add_rmsnorm(x * 2, -x, w["norm"])
    out = linear(swiglu(linear(normed, w["gate"], w["up"])) * 2, w["down"])
    out = swiglu_ffn(rmsnorm(out, w["norm"]) * 2, w["gate"], w["up"], w["down"], residual=residual)
    return out + 1, sample(linear(out, w["up"])[:, 0] * 2, temperature=0.0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("op", OPS)
def test_p17_inductor(gpu: str, op: str, mode: str) -> None:
    check(op, gpu, torch.bfloat16, mode)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_p17_inductor_on_the_cpu() -> None:
    check("layer", "cpu", torch.float32, "default")


def check(op: str, device: str, dtype: torch.dtype, mode: str) -> None:
    weights = _weights(device, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (2, 2, 2, 5):  # as it is, recorded, replayed, and of another shape
            x = torch.randn(rows, 1, WIDTH).to(device, dtype)
            got = compiled(x, weights)
            got = got.clone() if isinstance(got, Tensor) else [part.clone() for part in got]
            assert_same(got, OPS[op](x, weights))
