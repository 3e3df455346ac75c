"""Kernels that start while the one before them still runs: nothing they read or write shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.contract import assert_same
from torch import Tensor

from gqa_kernels import add_rmsnorm, residual_add, rmsnorm, rope, rope_, rope_tables, swiglu

HEADS, DIM = 8, 64
HIDDEN = HEADS * DIM

pytestmark = pytest.mark.usefixtures("gpu")


class Step:
    """Each op reads what the one before it wrote; torch's own kernels stand between some of them."""

    def __init__(self, rows: int, device: str) -> None:
        self.x = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16)
        self.residual, self.weight = torch.randn_like(self.x), torch.randn_like(self.x[0])
        self.cos, self.sin = rope_tables(DIM, rows, base=10000.0, device=device)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.scratch = torch.empty_like(self.x)

    def __call__(self, between: Callable[[], None]) -> list[Tensor]:
        outputs = []
        x, residual = self.x, self.residual
        for i in range(6):
            x, residual = add_rmsnorm(x, residual, self.weight)
            between()
            self.weight.copy_(x[0])  # weights and tables written by the kernel just before
            between()
            y = rmsnorm(x, self.weight)
            between()
            torch.arange(i, i + len(x), out=self.ids).remainder_(len(x))
            between()
            q, k = rope(y.view(1, -1, HEADS, DIM), x.view(1, -1, HEADS, DIM), self.cos, self.sin, position_ids=self.ids)
            between()
            rope_(q, k, self.cos, self.sin)
            between()
            self.scratch.zero_()  # a memset: no kernel to wait for
            between()
            x = swiglu(q.reshape_as(x), residual_add(k.reshape_as(x), self.scratch))
            between()
            self.cos.copy_(self.sin.roll(1, 0))
            outputs += [x, residual, q, k, y]
            between()
        return outputs


@pytest.mark.parametrize("rows", [1, 16, 3000])
def test_p23_a_chain_has_the_bytes_of_one_op_at_a_time(gpu: str, rows: int) -> None:
    for seed in range(5):
        results = []
        for between in (torch.cuda.synchronize, lambda: None):
            torch.manual_seed(seed)
            results.append(Step(rows, gpu)(between))
        assert_same(results[1], results[0], f"seed {seed}: output")


@pytest.mark.parametrize("rows", [1, 16, 3000])
def test_p23_a_captured_chain_has_the_bytes_of_one_op_at_a_time(gpu: str, rows: int) -> None:
    """Fork and join inside the graph: some kernels depend on two."""
    step = Step(rows, gpu)
    start = [x.clone() for x in (step.weight, step.cos)]
    expected = step(torch.cuda.synchronize)
    branch, stream, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        step.weight.copy_(start[0])
        step.cos.copy_(start[1])
        branch.wait_stream(stream)
        outputs = step(lambda: None)
        with torch.cuda.stream(branch):
            aside = rmsnorm(step.x, step.residual[0])
        stream.wait_stream(branch)
        joined = residual_add(aside, outputs[0])
    for _ in range(20):
        graph.replay()
    assert_same(outputs, expected)
    assert_same(joined, rmsnorm(step.x, step.residual[0]) + expected[0])
