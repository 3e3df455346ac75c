"""Prefill attention with options: few rows over a long prefix against the read floor, and the rates of ragged, chunked,
windowed and capped calls against the rate of a dense causal one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import peers
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows, some_rows
from benchmarks.report import Goal

K = 1024
DEVICE = "cuda"
HEADS = "32:8 D128"
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DENSE = 8 * K  # tokens of the call that rates are compared with
DENSE_NAME = f"{OURS} (dense causal S8k)"
FEW_ROWS, PREFIXES = (17, 32, 64, 128), (16 * K, 64 * K)
READ_BOUND = 32  # rows; with more the products take longer than the keys and values
CHUNK, PREFIX, PAGE = 512, 16 * K, 64
WINDOW, SOFTCAP = 1024, 30.0
LENGTHS = tuple(random.Random(0).randint(1, 8 * K) for _ in range(8))

Call = Callable[[Inputs], Tensor]
Check = Callable[[Inputs, Any], None]


def flops(pairs: float) -> float:
    """Of so many pairs of a query and a key."""
    return 4.0 * pairs * Q_HEADS * HEAD_DIM


def causal_pairs(queries: int, keys: int) -> float:
    return queries * (keys - queries) + queries * (queries + 1) / 2


def randn(tokens: int, heads: int) -> Tensor:
    return torch.randn(1, tokens, heads, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)


def qkv(queries: int, keys: int) -> Inputs:
    return {"q": randn(queries, Q_HEADS), "k": randn(keys, KV_HEADS), "v": randn(keys, KV_HEADS)}


def call(**options: Any) -> Call:
    def run(x: Inputs) -> Tensor:
        out: Tensor = gqa_kernels.gqa_attention_prefill(x["q"], x["k"], x["v"], **options)
        return out

    return run


def checker(causal: bool = True, **options: Any) -> Check:
    def check(x: Inputs, out: Tensor) -> None:
        rows = some_rows(x["q"].shape[1], DEVICE)
        assert_close(out[:, rows], [attention_rows(x["q"], x["k"], x["v"], rows, causal, **options)])

    return check


def dense() -> Contestant:
    """On inputs of its own, the same in every call: 100 MB of them do not stay in the L2."""
    x = qkv(DENSE, DENSE)
    run, check = call(), checker()
    return Contestant(
        DENSE_NAME,
        lambda _: run(x),
        flops=flops(causal_pairs(DENSE, DENSE)),
        check=lambda _, out: check(x, out),
        host=False,
    )


def case(shape: str, make: Callable[[], Inputs], run: Call, check: Check, pairs: float, **more: Any) -> Case:
    traffic = sum(tensor.nbytes for name, tensor in make().items() if name in ("q", "k", "v", "k_cache", "v_cache"))
    return Case(
        group="prefill",
        op="gqa_attention_prefill",
        shape=f"{HEADS} {shape}",
        make=make,
        contestants=[Contestant(OURS, run), *more.pop("others", [])],
        check=check,
        limit=more.pop("limit", "matmul"),
        traffic=traffic,
        flops=flops(pairs),
        most_copies=more.pop("most_copies", 4),
        **more,
    )


def few_rows(queries: int, keys: int) -> Case:
    return case(
        f"causal B1 S{queries} over {keys // K}k",
        lambda: qkv(queries, keys),
        call(),
        checker(),
        causal_pairs(queries, keys),
        limit="read",
        most_copies=8,
        others=peers.fa3(DEVICE, True),
        goals=(Goal(share=0.7),) if queries <= READ_BOUND else (),
    )


def rated(shape: str, make: Callable[[], Inputs], run: Call, check: Check, pairs: float, least: float) -> Case:
    return case(shape, make, run, check, pairs, others=[dense()], goals=(Goal(rate_of=(DENSE_NAME, least)),))


def ragged() -> Case:
    total = sum(LENGTHS)
    offsets = torch.tensor([sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)], dtype=torch.int32, device=DEVICE)

    def run(x: Inputs) -> Tensor:
        q, k, v = (x[name][0] for name in ("q", "k", "v"))
        longest = {"max_seqlen_q": max(LENGTHS), "max_seqlen_k": max(LENGTHS)}
        out: Tensor = gqa_kernels.gqa_attention_prefill(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, **longest)
        return out

    def check(x: Inputs, out: Tensor) -> None:
        first = 0
        for length in LENGTHS:
            part = slice(first, first + length)
            checker()({name: tensor[:, part] for name, tensor in x.items()}, out[None, part])
            first += length

    pairs = sum(causal_pairs(length, length) for length in LENGTHS)
    return rated("causal ragged B8 1 to 8192", lambda: qkv(total, total), run, check, pairs, 0.9)


def chunked(paged: bool) -> Case:
    keys = PREFIX + CHUNK

    def make() -> Inputs:
        x = qkv(CHUNK, CHUNK)
        whole = {name: randn(keys, KV_HEADS) for name in ("all_k", "all_v")}
        x["k"], x["v"] = (whole[name][:, PREFIX:].contiguous() for name in ("all_k", "all_v"))
        x["table"] = torch.randperm(keys // PAGE, device=DEVICE).int()[None]
        x["length"] = torch.full((1,), PREFIX, dtype=torch.int32, device=DEVICE)
        for name in ("k", "v"):
            cache = whole[f"all_{name}"].clone()
            if paged:  # page i of the sequence lies at table[i]
                pages = cache.view(-1, PAGE, KV_HEADS, HEAD_DIM)
                cache = torch.empty_like(pages)
                cache[x["table"][0].long()] = pages
            x[f"{name}_cache"] = cache
        return x | whole

    def run(x: Inputs) -> Tensor:
        where = {"cache_seqlens": x["length"], "block_table": x["table"] if paged else None}
        out: Tensor = gqa_kernels.gqa_attention_prefill(x["q"], x["k"], x["v"], x["k_cache"], x["v_cache"], **where)
        return out

    def check(x: Inputs, out: Tensor) -> None:
        checker()({"q": x["q"], "k": x["all_k"], "v": x["all_v"]}, out)

    name = f"causal B1 {CHUNK} over 16k, " + (f"pages of {PAGE}" if paged else "contiguous")
    return rated(name, make, run, check, causal_pairs(CHUNK, keys), 0.85)


def appended(tokens: int) -> Case:
    """The call without a cache, and beside it the one that writes k and v to it."""
    most = 1.03
    name = f"{OURS} (k and v written to a cache)"

    def make() -> Inputs:
        length = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        return qkv(tokens, tokens) | {
            "k_cache": randn(tokens, KV_HEADS),
            "v_cache": randn(tokens, KV_HEADS),
            "length": length,
        }

    def run(x: Inputs) -> Tensor:
        caches = x["k_cache"], x["v_cache"]
        out: Tensor = gqa_kernels.gqa_attention_prefill(x["q"], x["k"], x["v"], *caches, cache_seqlens=x["length"])
        return out

    return case(
        f"causal B1 S{tokens // K}k, appended",
        make,
        call(),
        checker(),
        causal_pairs(tokens, tokens),
        others=[Contestant(name, run)],
        goals=(Goal(at_most=(name, most)),),
    )


def against_full(tokens: int) -> Case:
    name = f"{OURS} (full)"
    full = Contestant(name, call(causal=False), flops=flops(tokens * tokens), check=checker(False), host=False)
    return case(
        f"causal B1 S{tokens // K}k against full",
        lambda: qkv(tokens, tokens),
        call(),
        checker(),
        tokens * tokens / 2,
        others=[full],
        goals=(Goal(rate_of=(name, 1 / 1.05)),),
    )


def sinking() -> Case:
    sinks = torch.randn(Q_HEADS, device=DEVICE)
    name, make = "causal B1 S8k, sinks", lambda: qkv(DENSE, DENSE)
    return rated(name, make, call(sinks=sinks), checker(sinks=sinks), causal_pairs(DENSE, DENSE), 0.85)


def windowed() -> Case:
    tokens = 16 * K
    pairs = tokens * (WINDOW + 1) - WINDOW * (WINDOW + 1) / 2
    run, check = call(window_size=(WINDOW, 0)), checker(window=WINDOW)
    return rated(f"window {WINDOW} B1 S16k", lambda: qkv(tokens, tokens), run, check, pairs, 0.8)


def capped() -> Case:
    name, make = f"causal B1 S8k, softcap {SOFTCAP:g}", lambda: qkv(DENSE, DENSE)
    return rated(name, make, call(softcap=SOFTCAP), checker(softcap=SOFTCAP), causal_pairs(DENSE, DENSE), 0.85)


def cases() -> Iterator[Case]:
    for keys in PREFIXES:
        for queries in FEW_ROWS:
            yield few_rows(queries, keys)
    yield against_full(8 * K)
    yield ragged()
    yield chunked(False)
    yield chunked(True)
    yield windowed()
    yield capped()
    yield sinking()
    yield appended(2 * K)
    yield appended(8 * K)
