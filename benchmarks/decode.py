"""Decode attention over a cache, bfloat16 or quantised, against the read floor; in other ways than the plain call; and
in a chain of ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import decode_launches, decode_ways, peers, shapes
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows
from benchmarks.decode_ways import CAPTURED_AT_1
from benchmarks.report import Aim, Goal
from benchmarks.shapes import Attention
from benchmarks.timing import Settings

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
UNQUANTISED = OURS + " (bfloat16 cache)"
ABOVE_FLOOR = Aim(factor=1.03, plus=1.4)
RAGGED_ABOVE_FLOOR = Aim(factor=1.10)
QUANTISED = Aim(factor=0.56, beside=UNQUANTISED)


def cases(settings: Settings, quick: bool) -> Iterator[Case]:
    if not settings.cuda:
        wanted = shapes.DECODE_CPU[1:2] if quick else shapes.DECODE_CPU
    else:
        wanted = shapes.DECODE_QUICK if quick else shapes.DECODE
    for shape in wanted:
        yield _case(shape, settings)
    for shape in shapes.DECODE_QUANTISED if settings.cuda and not quick else []:
        yield _quantised(shape, settings)
    for shape in shapes.DECODE_CHAIN if settings.cuda and not quick else []:
        yield decode_launches.chain(shape, settings)
    for shape in shapes.DECODE_HOST if settings.cuda and not quick else []:
        yield decode_launches.host(shape, settings)


def _quantised(shape: Attention, settings: Settings) -> Case:
    """The same keys and values in caches of three dtypes, which hold them exactly: eighths up to 2."""
    cache = shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim
    options = {"dtype": torch.int8, "device": settings.device}
    lengths = torch.full((shape.batch,), shape.seqlen, dtype=torch.int32, device=settings.device)

    def make() -> Inputs:
        k, v = (torch.randint(-16, 17, cache, **options) for _ in range(2))
        q = shape.batch, 1, shape.q_heads, shape.head_dim
        return {
            "q": torch.randn(q, device=settings.device, dtype=torch.bfloat16),
            "lengths": lengths,
            "scale": torch.full((1,), 0.125, device=settings.device),
            "k8": k,
            "v8": v,
            "ke": k.to(E4M3),
            "ve": v.to(E4M3),
            "k": k.to(torch.bfloat16) / 8,
            "v": v.to(torch.bfloat16) / 8,
        }

    def check(x: Inputs, out: Tensor) -> None:
        row = torch.zeros(1, dtype=torch.int64, device=settings.device)
        for b in range(shape.batch):
            part = slice(b, b + 1)
            assert_close(out[part], [attention_rows(x["q"][part], x["k"][part], x["v"][part], row, False)])

    def call(k: str, v: str) -> Callable[[Inputs], Tensor]:
        def run(x: Inputs) -> Tensor:
            scales = {} if k == "k" else {"k_scale": x["scale"], "v_scale": x["scale"]}
            out: Tensor = gqa_kernels.gqa_attention_decode(x["q"], x[k], x[v], cache_seqlens=x["lengths"], **scales)
            return out

        return run

    keys = shape.batch * shape.seqlen * shape.kv_heads * shape.head_dim
    return Case(
        group="decode",
        op="gqa_attention_decode",
        shape=shape.decode_name + " float8_e4m3fn cache",
        make=make,
        contestants=[
            Contestant(OURS, call("ke", "ve"), aim=QUANTISED),
            Contestant(OURS + " (int8 cache)", call("k8", "v8"), aim=QUANTISED, host=False),
            Contestant(UNQUANTISED, call("k", "v"), host=False),
        ],
        check=check,
        limit="read",
        traffic=2 * keys,
        flops=4.0 * keys * (shape.q_heads // shape.kv_heads),
    )


def _case(shape: Attention, settings: Settings) -> Case:
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    lengths = list(shape.lengths) or [shape.seqlen] * shape.batch
    in_ways = shape in (shapes.DECODE_WAYS if settings.cuda else shapes.DECODE_CPU_WAYS)
    shared: Inputs = {}  # what all layers of a step have in common: made once, and so not cold

    def make() -> Inputs:
        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=settings.device, dtype=dtype)

        if not shared:
            shared["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=settings.device)
            shared.update(decode_ways.shared_inputs(shape, settings.device) if in_ways else {})
        cache = shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim
        return {
            "q": randn(shape.batch, 1, shape.q_heads, shape.head_dim),
            "k": randn(*cache),
            "v": randn(*cache),
            **(decode_ways.inputs(shape, settings.device, dtype) if in_ways else {}),
            **shared,
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

    ours = [Contestant(OURS, call, aim=RAGGED_ABOVE_FLOOR if shape.lengths else ABOVE_FLOOR)]
    if settings.cuda:
        ours += decode_ways.everywhere(call)
    if in_ways:
        ours += decode_ways.ways(settings)
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
        goal_us=shapes.DECODE_GOALS.get(shape.decode_name) if settings.cuda else None,
    )
