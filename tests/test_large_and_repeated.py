"""Ops other than attention: more than 2^31 elements (P7), and a thousand runs beside busy memory (P14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bounds import assert_within_bound, to_numpy
from support.contract import flat
from support.guard import same_bytes
from torch import Tensor

import gqa_kernels
from gqa_kernels import (
    add_rmsnorm,
    linear,
    merge_attention_states,
    qk_rmsnorm_rope,
    rmsnorm,
    rope,
    sample,
    swiglu,
    swiglu_ffn,
)

EPS = 1e-6
LIMIT = 2**31
RUNS = 1000


def some_of(rows: int, device: str) -> Tensor:
    return torch.tensor([0, 1, rows // 2, rows - 3, rows - 2, rows - 1], device=device)


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()


def test_p7_norms(gpu: str) -> None:
    rows, hidden = LIMIT // 4096 + 3, 4096
    x, weight, some = normal(rows, hidden), normal(hidden), some_of(rows, gpu)
    assert same_bytes(rmsnorm(x, weight, EPS)[some], rmsnorm(x[some], weight, EPS))
    expected = add_rmsnorm(x[some], x[some], weight, EPS)
    assert all(same_bytes(a[some], b) for a, b in zip(add_rmsnorm(x, x, weight, EPS), expected))
    wide = x.flatten().as_strided((3, 64), (2**30, 1))
    assert same_bytes(rmsnorm(wide, weight[:64], EPS), rmsnorm(wide.contiguous(), weight[:64], EPS))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.01}])
def test_p7_sample(gpu: str, settings: dict[str, Any]) -> None:
    """A row's token does not depend on the batch, so the last rows say whether their places were found."""
    rows, vocabulary = LIMIT // 128256 + 5, 128256
    logits, some = normal(rows, vocabulary), some_of(rows, gpu)
    stream = {"seed": torch.arange(rows, device=gpu), "offset": torch.full((rows,), 7, device=gpu)}
    ids = sample(logits, **stream, **settings)
    expected = sample(logits[some], **{name: value[some] for name, value in stream.items()}, **settings)
    assert torch.equal(ids[some], expected)


def test_p7_linear(gpu: str) -> None:
    outputs, columns = LIMIT // 4096 + 3, 4096
    x, weight, some = normal(2, columns), normal(outputs, columns), some_of(outputs, gpu)
    exact = to_numpy(x) @ to_numpy(weight[some]).T
    assert_within_bound(linear(x, weight)[:, some], exact, x @ weight[some].T)


def test_p7_swiglu_ffn(gpu: str) -> None:
    """Gate and up of 2^31 elements each, over which one output tells."""
    columns, inner = 4096, LIMIT // 4096 + 8
    x, gate, down = normal(1, columns), normal(inner, columns), torch.zeros(8, inner, device=gpu, dtype=torch.bfloat16)
    some = some_of(inner, gpu)
    down[torch.arange(6, device=gpu), some] = 1.0
    out = swiglu_ffn(x, gate, gate, down)
    product = to_numpy(x) @ to_numpy(gate[some]).T
    exact = product / (1 + torch.from_numpy(-product).exp().numpy()) * product
    eager = torch.nn.functional.silu(x @ gate[some].T) * (x @ gate[some].T)
    assert_within_bound(out[:, :6], exact, eager)


def calls() -> dict[str, Callable[[], Any]]:
    x, weight, wide = normal(64, 4096), normal(4096), normal(64, 14336)
    q, k = normal(1, 64, 32, 128), normal(1, 64, 8, 128)
    cos, sin = gqa_kernels.rope_tables(128, 64, base=10000.0, device="cuda")
    heads, logits, products = normal(128), normal(16, 128256), normal(6144, 4096)
    gate, up, down, few = normal(4864, 896), normal(4864, 896), normal(896, 4864), normal(3, 896)
    parts, lses = normal(2, 64, 32, 128), torch.randn(2, 32, 64, device="cuda")
    return {
        "rmsnorm": lambda: rmsnorm(x, weight, EPS),
        "add_rmsnorm": lambda: add_rmsnorm(x, x, weight, EPS),
        "swiglu": lambda: swiglu(wide, wide),
        "rope": lambda: rope(q, k, cos, sin),
        "qk_rmsnorm_rope": lambda: qk_rmsnorm_rope(q, k, heads, heads, cos, sin, eps=EPS),
        "merge_attention_states": lambda: merge_attention_states(parts, lses),
        "linear": lambda: linear(x[:3], products),
        "swiglu_ffn": lambda: swiglu_ffn(few, gate, up, down),
        "sample greedy": lambda: sample(logits, temperature=0.0),
        "sample top-p": lambda: sample(logits, top_p=0.9, seed=3, return_logprob=True),
        "sample top-k": lambda: sample(logits, top_k=50, min_p=0.01, seed=3, return_logprob=True),
    }


@pytest.mark.usefixtures("gpu")
def test_p14_repeatable_beside_traffic() -> None:
    """The same bytes a thousand times while another stream keeps the memory busy."""
    stream, chunks = torch.cuda.Stream(), torch.zeros(2, 1 << 27, dtype=torch.uint8, device="cuda")
    for name, call in calls().items():
        expected = [part.clone() for part in flat(call())]
        differs = torch.zeros((), dtype=torch.bool, device="cuda")
        torch.cuda.synchronize()
        for run in range(RUNS):
            if run % 4 == 0:
                with torch.cuda.stream(stream):
                    chunks[0].copy_(chunks[1])
            for part, other in zip(flat(call()), expected):
                differs |= (part.view(torch.uint8) != other.view(torch.uint8)).any()
        assert not bool(differs), name
