"""Decode attention: one query token over a full cache, against the read floor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import peers, shapes
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows
from benchmarks.report import Goal
from benchmarks.shapes import Attention
from benchmarks.timing import Settings

CAPTURED_AT_1 = OURS + " (captured at 1)"  # a graph captured at length 1, replayed at the lengths of the case


@contextmanager
def _at_length_1(x: Inputs) -> Iterator[None]:
    lengths = x["lengths"].clone()
    x["lengths"].fill_(1)
    yield
    x["lengths"].copy_(lengths)


def cases(settings: Settings, quick: bool) -> Iterator[Case]:
    if not settings.cuda:
        wanted = shapes.DECODE_CPU[1:2] if quick else shapes.DECODE_CPU
    else:
        wanted = shapes.DECODE_QUICK if quick else shapes.DECODE
    for shape in wanted:
        yield _case(shape, settings)


def _case(shape: Attention, settings: Settings) -> Case:
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    lengths = list(shape.lengths) or [shape.seqlen] * shape.batch

    def make() -> Inputs:
        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=settings.device, dtype=dtype)

        cache = shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim
        return {
            "q": randn(shape.batch, 1, shape.q_heads, shape.head_dim),
            "k": randn(*cache),
            "v": randn(*cache),
            "lengths": torch.tensor(lengths, dtype=torch.int32, device=settings.device),
        }

    def check(x: Inputs, out: Tensor) -> None:
        row = torch.zeros(1, dtype=torch.int64, device=settings.device)
        for b, length in enumerate(lengths):
            part = slice(b, b + 1)
            reference = attention_rows(x["q"][part], x["k"][part, :length], x["v"][part, :length], row, False)
            assert_close(out[part], [reference])

    def call(x: Inputs) -> Tensor:
        out: Tensor = gqa_kernels.gqa_attention_decode(x["q"], x["k"], x["v"], cache_seqlens=x["lengths"])
        return out

    ours = [Contestant(OURS, call)]
    if settings.cuda:
        ours.append(Contestant(CAPTURED_AT_1, call, capturing=_at_length_1))
    keys = sum(lengths) * shape.kv_heads * shape.head_dim
    is_floor = settings.cuda and shape in shapes.DECODE_QUICK
    return Case(
        group="decode",
        op="gqa_attention_decode",
        shape=shape.decode_name,
        make=make,
        contestants=[*ours, *peers.decode(shape, settings.device)],
        check=check,
        limit="read",
        traffic=2 * keys * dtype.itemsize,
        flops=4.0 * sum(lengths) * shape.q_heads * shape.head_dim,
        goals=(Goal(share=1 / 3), Goal(at_most=(CAPTURED_AT_1, 1.1))) if is_floor else (),
    )
