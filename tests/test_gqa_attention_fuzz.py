"""Seeded random attention calls against float64 NumPy, with poison in everything that must not be read.

One failing case runs again with: pytest "tests/test_gqa_attention_fuzz.py::test_fuzz[cpu-SEED]"
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


def random_case(source: random.Random, layout: str, op: str) -> Case:
    lengths = random_lengths(source, layout, op)
    heads, head_dim = source.choice(HEADS), 8 * source.choice([1, 2, 4, 5, 8, 8, 9, 12, 16, 16, 20, 32])
    case = make_case(lengths, dtype=source.choice(DTYPES), heads=heads, head_dim=head_dim)
    values: dict[str, Any] = {"causal": op == "decode" or source.random() < 0.7}
    if source.random() < 0.3:
        values["window"] = (source.choice([-1, 0, 5, 64, 100]), source.choice([-1, 0, 3]))
    if source.random() < 0.2:
        values["softcap"] = source.choice([0.5, 30.0])
    if source.random() < 0.2:
        values["scale"] = source.choice([-0.1, 0.0, 1.0])
    if source.random() < 0.3:
        values["sinks"] = torch.randn(heads[0])
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
def test_fuzz(guard: Guard, seed: int) -> None:
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
