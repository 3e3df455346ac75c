"""swiglu_ffn against float64 NumPy and transformers' LlamaMLP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles
from support.guard import Guard
from torch.nn.functional import linear, silu

from gqa_kernels import record_launches, swiglu_ffn


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (64,), (0, 64)])
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = guard.randn(*shape, dtype=dtype)
    w_gate, w_up = (guard.randn(176, 64, dtype=dtype, scale=0.125) for _ in range(2))
    w_down = guard.randn(48, 176, dtype=dtype, scale=0.08)
    gate, up = to_numpy(x) @ to_numpy(w_gate).T, to_numpy(x) @ to_numpy(w_up).T
    exact = gate / (1 + np.exp(-gate)) * up @ to_numpy(w_down).T
    baseline = linear(silu(linear(x, w_gate)) * linear(x, w_up), w_down)
    w_gate_up = guard.place(torch.cat([w_gate, w_up]).cpu())
    for weights in ((w_gate, w_up, w_down), (w_gate_up, w_down)):
        with record_launches() as launches:
            out = swiglu_ffn(x, *weights)
        assert_within_bound(out, exact, baseline)
        assert [launch["op"] for launch in launches] == ["swiglu"] * (x.numel() > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_llama_mlp(guard: Guard, dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, intermediate_size=176)
    with torch.no_grad():
        mlp = llama.LlamaMLP(config).to(guard.device, dtype)
        x = guard.randn(3, 7, 64, dtype=dtype)
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        exact = to_numpy(hidden) @ to_numpy(mlp.down_proj.weight).T
        out = swiglu_ffn(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        assert_within_bound(out, exact, mlp(x))


def test_p17_compile(guard: Guard) -> None:
    x, w, w_down = guard.randn(3, 64), guard.randn(88, 64), guard.randn(32, 88)
    assert_compiles(swiglu_ffn, x, w, w, w_down)
    both = guard.place(torch.cat([w, w]).cpu())
    assert_compiles(swiglu_ffn, x, both, w_down)


def test_p20_misuse(device: str) -> None:
    x, w, w_down = (torch.randn(*shape, device=device) for shape in ((3, 64), (88, 64), (32, 88)))
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x, w), "weights must be w_gate, w_up, w_down or w_gate_up, w_down, got 1 tensors"),
        ((x, w, w, w, w_down), "weights must be w_gate, w_up, w_down or w_gate_up, w_down, got 4 tensors"),
        ((x[0, 0], w, w, w_down), "x must be [..., hidden], got shape []"),
        ((x, w[:, :32], w, w_down), "w_gate must have shape [intermediate, 64] to match x, got [88, 32]"),
        ((x, w, w[0], w_down), "w_up must have shape [intermediate, 64] to match x, got [64]"),
        ((x, w, w[:80], w_down), "w_up must have the shape of w_gate [88, 64], got [80, 64]"),
        ((x, w[:87], w_down), "w_gate_up must have an even number of rows, got 87"),
        ((x, w, w_down), "w_down must have shape [any, 44], got [32, 88]"),
        ((x, w, w, w_down.T), "w_down must have shape [any, 88], got [88, 32]"),
        ((x, w.clone().requires_grad_(), w, w_down), "w_gate must not require grad, got requires_grad=True"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError) as error:
            swiglu_ffn(*args)
        assert str(error.value).startswith(f"swiglu_ffn: {message}"), error.value
