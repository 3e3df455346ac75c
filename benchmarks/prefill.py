"""Prefill attention, against the rate of a large matrix product. Causal counts half of the square."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import peers, prefill_options, shapes
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows, some_rows
from benchmarks.report import Goal
from benchmarks.shapes import Attention
from benchmarks.timing import Settings


def cases(settings: Settings, quick: bool) -> Iterator[Case]:
    if not settings.cuda:
        wanted = shapes.PREFILL_CPU[:1] if quick else shapes.PREFILL_CPU
    else:
        wanted = shapes.PREFILL_QUICK if quick else shapes.PREFILL
    for shape in wanted:
        yield _case(shape, settings)
    if settings.cuda and not quick:
        yield from prefill_options.cases()


def _case(shape: Attention, settings: Settings) -> Case:
    dtype = torch.bfloat16 if settings.cuda else torch.float32

    def make() -> Inputs:
        def randn(heads: int) -> Tensor:
            size = shape.batch, shape.seqlen, heads, shape.head_dim
            return torch.randn(size, device=settings.device, dtype=dtype)

        return {"q": randn(shape.q_heads), "k": randn(shape.kv_heads), "v": randn(shape.kv_heads)}

    def check(x: Inputs, out: Tensor) -> None:
        rows = some_rows(shape.seqlen, settings.device)
        if out.shape != x["q"].shape:
            raise AssertionError(f"shape {tuple(out.shape)}, not {tuple(x['q'].shape)}")
        assert_close(out[:, rows], [attention_rows(x["q"], x["k"], x["v"], rows, shape.causal)])

    ours = Contestant(OURS, lambda x: gqa_kernels.gqa_attention_prefill(x["q"], x["k"], x["v"], causal=shape.causal))
    tokens = shape.batch * shape.seqlen
    is_floor = settings.cuda and shape in shapes.PREFILL_QUICK
    return Case(
        group="prefill",
        op="gqa_attention_prefill",
        shape=shape.prefill_name,
        make=make,
        contestants=[ours, *peers.prefill(shape, settings.device)],
        check=check,
        limit="matmul",
        traffic=2 * tokens * (shape.q_heads + shape.kv_heads) * shape.head_dim * dtype.itemsize,
        flops=4.0 * tokens * shape.seqlen * shape.q_heads * shape.head_dim / (2 if shape.causal else 1),
        most_copies=4,
        goals=(Goal(peer=("SDPA flash", 0.25)),) if is_floor else (),
    )
