"""Seeded random attention calls against float64 NumPy, with poison in everything that must not be read.

One failing case runs again with: pytest "tests/test_gqa_attention_fuzz.py::test_p1_fuzz[cpu-SEED]"
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from support.attention import Case, Length, make_case, make_rotary
from support.attention_layout import build_cache, run_cached, run_prefill
from support.bounds import DTYPES
from support.guard import Guard
from support.kernels import hopper
from support.quantized import FORMATS, Quantized, place_cache, run_quantized

HEADS = [(1, 1), (2, 1), (4, 2), (6, 1), (7, 1), (9, 3), (16, 2), (12, 4)]


def random_lengths(source: random.Random, layout: str, op: str) -> list[Length]:
    batch = source.choice([1, 1, 2, 3, 5, 9])
    longest = 16 if op == "decode" else source.choice([3, 40, 90])
    shared = source.randint(1, longest)
    appends = source.random() < 0.7
    lengths = []
    for _ in range(batch):
        queries = source.randint(0, longest) if layout == "ragged" else shared
        cached = 0 if op == "no cache" else source.choice([0, 1, source.randint(0, 20), source.randint(0, 300)])
        new = queries if appends else 0
        if op == "no cache":
            new = source.randint(0, longest + 30) if layout == "ragged" else queries
        lengths.append((queries, cached, new))
    return lengths


def random_options(source: random.Random, op: str, q_heads: int, left: list[int], right: list[int]) -> dict[str, Any]:
    values: dict[str, Any] = {"causal": op == "decode" or source.random() < 0.7}
    if source.random() < 0.3:
        values["window"] = (source.choice(left), source.choice(right))
    if source.random() < 0.2:
        values["softcap"] = source.choice([0.5, 30.0])
    if source.random() < 0.2:
        values["scale"] = source.choice([-0.1, 0.0, 1.0])
    if source.random() < 0.3:
        values["sinks"] = torch.randn(q_heads)
    return values


def hopper_case(source: random.Random, op: str) -> Case:
    """What the kernels for Hopper serve: many rows, or few over keys that blocks share."""
    group = source.choice([1, 2, 3, 4, 7, 8])
    heads, head_dim = (group * 2, 2) if source.random() < 0.5 else (group, 1), source.choice([64, 96, 128, 256])
    if op == "decode":
        queries = source.randint(1, 8 // group)
        longest = source.choice([40, 300, 300, 2000])
        shared = queries if source.random() < 0.5 else 0
        lengths = [
            (queries, source.choice([0, source.randint(0, longest), source.randint(0, longest)]), shared)
            for _ in range(source.choice([1, 2, 5, 20]))
        ]
    else:
        batch, longest = source.randint(1, 5), source.choice([70, 140, 260])
        ragged = [longest, *(source.choice([0, 1, source.randint(0, longest)]) for _ in range(batch - 1))]
        appends, lengths = op.startswith("plain") or source.random() < 0.7, []
        for queries in ragged if op.endswith("ragged") else [source.randint(64, longest)] * batch:
            cached = source.choice([0, source.randint(0, 300)]) if op.startswith("cache") else 0
            lengths.append((queries, cached, queries if appends else 0))
    case = make_case(lengths, dtype=source.choice(DTYPES[1:]), heads=heads, head_dim=head_dim)
    values = random_options(source, op, heads[0], [-1, 0, 5, 100, 500], [-1, 0, 70])
    if source.random() < 0.3 and not op.startswith("plain"):
        values["leftpad"] = [source.randint(0, cached + new + 2) for _, cached, new in lengths]
    if source.random() < 0.5 and op == "decode":
        values["rotary"] = make_rotary(2 * source.randint(1, head_dim // 2), 2100, interleaved=source.random() < 0.5)
    return case.change(**values)


def random_case(source: random.Random, layout: str, op: str) -> Case:
    lengths = random_lengths(source, layout, op)
    heads, head_dim = source.choice(HEADS), 8 * source.choice([1, 2, 4, 5, 8, 8, 9, 12, 16, 16, 20, 32])
    case = make_case(lengths, dtype=source.choice(DTYPES), heads=heads, head_dim=head_dim)
    values = random_options(source, op, heads[0], [-1, 0, 5, 64, 100], [-1, 0, 3])
    if source.random() < 0.3:
        values["leftpad"] = [source.randint(0, cached + new + 2) for _, cached, new in lengths]
    same_tokens = all(new in (0, queries) for queries, _, new in lengths)
    if source.random() < 0.5 and same_tokens:
        rotary_dim = 2 * source.randint(1, head_dim // 2)
        explicit = None
        if source.random() < 0.3:
            explicit = [[source.randint(0, 511) for _ in range(queries)] for queries, _, _ in lengths]
        table = source.choice([torch.float32, case.dtype])
        values["rotary"] = make_rotary(
            rotary_dim, 512, dtype=table, interleaved=source.random() < 0.5, explicit=explicit
        )
    return case.change(**values)


@pytest.mark.parametrize("seed", range(150))
def test_p1_fuzz(guard: Guard, seed: int) -> None:
    torch.manual_seed(seed)
    source = random.Random(seed)
    op = source.choice(["no cache", "prefill", "decode"])
    layout = "dense" if op == "decode" else source.choice(["dense", "ragged"])
    case = random_case(source, layout, op)
    extra: dict[str, Any] = {}
    if source.random() < 0.3:
        extra["num_splits"] = source.randint(1, 9)
    elif source.random() < 0.3:
        extra["batch_invariant"] = True
    ragged = layout == "ragged"
    gathered = case.rotary is not None and source.random() < 0.3
    if op == "no cache":
        result = run_prefill(case, guard, ragged=ragged, gathered=gathered, **extra)
    else:
        page_size = source.choice([None, None, 1, 3, 16, 64])
        cache = build_cache(case, guard, page_size=page_size, fill=math.nan, heads_first=source.random() < 0.3)
        result = run_cached(case, guard, cache, decode=op == "decode", ragged=ragged, gathered=gathered, **extra)
    case.check(result, f"{op} {layout} {extra}")


SEEDS = [("cpu", seed) for seed in range(30)] + [("cuda", seed) for seed in range(200)]
SEEDS += [("cuda portable", seed) for seed in range(60)]


@pytest.mark.parametrize("device, seed", SEEDS, indirect=["device"])
def test_p1_fuzz_for_hopper(guard: Guard, seed: int) -> None:
    """Every call runs a Hopper kernel where there is one; caches in pages, and quantised in decoding, among them."""
    torch.manual_seed(seed)
    source = random.Random(f"hopper {seed}")
    op = source.choice(["plain dense", "plain ragged", "cache dense", "cache ragged", "decode", "decode"])
    case = hopper_case(source, op)
    decode, ragged = op == "decode", op.endswith("ragged")
    with hopper(guard.device):
        if op.startswith("plain"):
            longest = {"max_seqlen_q": 260, "max_seqlen_k": 260} if ragged else {}
            result = run_prefill(case, guard, ragged=ragged, **longest)
        else:
            page_size = source.choice([None, 16, 64, 256, *([1, 3] if decode else [48])])
            heads_first = source.random() < 0.3
            extra = {"batch_invariant": True} if decode and source.random() < 0.2 else {}
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan, heads_first=heads_first)
            if decode and source.random() < 0.4 and any(len(k) for k in case.k):
                kind = source.choice(FORMATS)
                x = Quantized.fit(case, kind, per_head=source.random() < 0.5, headroom=1.5)
                cache = place_cache(x, cache, guard, fill=0x7F)
                result = run_quantized(x, guard, cache, decode=True, **extra)
                case = x.attended(cache)
            else:
                result = run_cached(case, guard, cache, decode=decode, ragged=ragged, **extra)
    case.check(result, f"{op}")
