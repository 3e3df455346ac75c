"""Kernels that start while the one before them still runs: nothing they read or write shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract import assert_same
from torch import Tensor

from gqa_kernels import add_rmsnorm, gqa_attention_decode, residual_add, rmsnorm, rope, rope_, rope_tables, swiglu

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


class Layers:
    """Tokens through layers that each append to a cache of their own: by the time a cache is read again, all that was
    written to it is long there."""

    def __init__(self, device: str, batch: int, capacity: int, page_size: int | None, kind: torch.dtype) -> None:
        self.count, self.batch, self.pages = 3, batch, page_size
        columns = capacity // (page_size or capacity)
        shape = (self.count, 2, batch * columns, page_size or capacity, 2, 128)
        self.start = torch.randn(shape, device=device).mul_(8 if kind == torch.int8 else 1).to(kind)
        self.caches = self.start.clone()
        self.table = torch.randperm(batch * columns, device=device).int().view(batch, columns)
        self.x = torch.randn(batch, 1, 8, 128, device=device, dtype=torch.bfloat16)
        self.cos, self.sin = rope_tables(128, capacity, base=10000.0, device=device)
        self.lengths = torch.randint(1, capacity - 8, (batch,), device=device, dtype=torch.int32)
        self.scales = {} if kind == torch.bfloat16 else {name: self.cos.new_ones(2) for name in ("k_scale", "v_scale")}

    def __call__(self, between: Callable[[], None], *, appends: bool, static_prefix: bool) -> list[Tensor]:
        self.caches.copy_(self.start)
        x, lengths, outputs = self.x, self.lengths, []
        options: dict[str, Any] = {**self.scales, "static_prefix": static_prefix}
        if self.pages is not None:
            options["block_table"] = self.table
        if appends:
            options |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
        for _ in range(5):
            for cache in self.caches:
                x = residual_add(x, x)
                between()
                new = [rmsnorm(x[:, :, i : i + 2], x[0, 0, 0], 1e-5) for i in (0, 4)] if appends else []
                between()
                q = rmsnorm(x, x[0, 0, 1], 1e-5)  # written as attention starts
                between()
                x = gqa_attention_decode(q, cache[0], cache[1], *new, cache_seqlens=lengths, **options)
                between()
                outputs.append(x)
            lengths = lengths + 1
        return [torch.stack(outputs), self.caches.view(torch.uint8).clone()]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("batch, capacity", [(1, 512), (1, 8192), (9, 512), (3, 32768)])
def test_a_prefix_read_early(gpu: str, batch: int, capacity: int, page_size: int | None, kind: torch.dtype) -> None:
    layers = Layers(gpu, batch, capacity, page_size, kind)
    for appends in (False, True):
        expected = layers(torch.cuda.synchronize, appends=appends, static_prefix=False)
        for _ in range(5):
            found = layers(lambda: None, appends=appends, static_prefix=True)
            assert_same(found, expected, f"appends {appends}: output")
