"""What surrounds decode's kernel: launches that overlap in a chain of ops, and the host's time for a call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import gqa_kernels
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows
from benchmarks.graph_edges import make_ordinary
from benchmarks.report import Aim
from benchmarks.shapes import Attention
from benchmarks.timing import Settings

ORDINARY_DECODE = OURS + " (decode launched the ordinary way)"
MULTIPLY = "x.mul_(1)"


def _inputs(shape: Attention, settings: Settings, lengths: Tensor) -> Inputs:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=settings.device, dtype=torch.bfloat16)

    hidden = shape.q_heads * shape.head_dim
    return {
        "x": randn(shape.batch, hidden),
        "residual": randn(shape.batch, hidden),
        "weight": randn(hidden),
        "k": randn(shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim),
        "v": randn(shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim),
        "lengths": lengths,
    }


def _lengths(shape: Attention, settings: Settings) -> Tensor:
    return torch.full((shape.batch,), shape.seqlen, dtype=torch.int32, device=settings.device)


def _attend(x: Inputs, q: Tensor) -> Tensor:
    out: Tensor = gqa_kernels.gqa_attention_decode(q, x["k"], x["v"], cache_seqlens=x["lengths"])
    return out


def _queries(x: Inputs, rows: Tensor) -> Tensor:
    return rows.view(len(rows), 1, -1, x["k"].shape[-1])


def chain(shape: Attention, settings: Settings) -> Case:
    """add_rmsnorm, whose result is the query, decode, residual_add: what a layer runs but for its products."""

    def call(x: Inputs) -> Tensor:
        normed, residual = gqa_kernels.add_rmsnorm(x["x"], x["residual"], x["weight"])
        return gqa_kernels.residual_add(_attend(x, _queries(x, normed)).view_as(residual), residual)

    def check(x: Inputs, out: Tensor) -> None:
        total = x["x"].float() + x["residual"].float()
        normed = total * (total.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * x["weight"].float()
        row = torch.zeros(1, dtype=torch.int64, device=settings.device)
        attended = attention_rows(_queries(x, normed), x["k"], x["v"], row, False)
        assert_close(out, [attended.view_as(total) + total])

    keys = shape.batch * shape.seqlen * shape.kv_heads * shape.head_dim
    return Case(
        group="decode",
        op="add_rmsnorm, gqa_attention_decode, residual_add",
        shape=shape.decode_name,
        make=partial(_inputs, shape, settings, _lengths(shape, settings)),
        contestants=[
            Contestant(OURS, call, aim=Aim(plus=-0.2, beside=ORDINARY_DECODE)),
            Contestant(ORDINARY_DECODE, call, edit=partial(make_ordinary, kernel="decode_ring"), host=False),
            Contestant(OURS + " (all launched the ordinary way)", call, edit=make_ordinary, host=False),
        ],
        check=check,
        limit="read",
        traffic=4 * keys,
    )


def host(shape: Attention, settings: Settings) -> Case:
    """Calls in a row, whose kernels are shorter than the host's time for them."""

    def make() -> Inputs:
        x = _inputs(shape, settings, _lengths(shape, settings))
        return {"one": torch.randn(1, device=settings.device), "q": _queries(x, x["x"]), **x}

    def check(x: Inputs, out: Tensor) -> None:
        row = torch.zeros(1, dtype=torch.int64, device=settings.device)
        assert_close(out, [attention_rows(x["q"], x["k"], x["v"], row, False)])

    def multiplied(x: Inputs, out: Tensor) -> None:
        assert_close(out, [x["one"]])

    return Case(
        group="decode",
        op="host time of gqa_attention_decode",
        shape=shape.decode_name,
        make=make,
        contestants=[
            Contestant(OURS, lambda x: _attend(x, x["q"]), aim=Aim(2.0, beside=MULTIPLY)),
            Contestant(MULTIPLY, lambda x: x["one"].mul_(1), check=multiplied, is_peer=False),
        ],
        check=check,
        limit="host",
        traffic=0,
    )
