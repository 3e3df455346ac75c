"""Calls of the attention ops for every pair of options and layouts: for opcheck, fakes, capture and misuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill
from support.attention import make_case, make_rotary
from support.attention_layout import arguments, build_cache
from support.guard import Guard
from support.pairs import pairwise

_COMMON: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "page_size": [None, 16],
    "new": [True, False],
    "leftpad": [False, True],
    "rotary": [None, "table", "gathered", "positions"],
    "window": [(-1, -1), (5, 2)],
    "softcap": [0.0, 3.0],
    "scale": [None, 0.5],
    "sinks": [False, True],
    "num_splits": [0, 3],
    "batch_invariant": [False, True],
    "return_lse": [True, False],
}

_PREFILL: dict[str, list[Any]] = {"cache": [True, False], "ragged": [False, True], "causal": [True, False], **_COMMON}
# What the kernels for Hopper serve; of prefill 64 queries and more.
_HOPPER: dict[str, list[Any]] = {
    "head_dim": [64, 96, 128, 256],
    "dtype": [torch.bfloat16, torch.float16],
    "num_splits": [0],
}
_TILES: dict[str, list[Any]] = {"queries": [70], "rotary": [None], "batch_invariant": [False]}

_DECODE: dict[str, list[Any]] = {**_COMMON, "static_prefix": [False, True]}

DECODE_CALLS = pairwise(_DECODE) + pairwise({**_DECODE, **_HOPPER})
PREFILL_CALLS = pairwise(_PREFILL) + pairwise({**_PREFILL, **_HOPPER, **_TILES})


FUNCTIONS: dict[str, Any] = {
    "gqa_attention_decode": gqa_attention_decode,
    "gqa_attention_prefill": gqa_attention_prefill,
}


@dataclass
class Call:
    op: str
    keywords: dict[str, Any]  # of the Python function

    def raw(self) -> dict[str, Any]:
        """Of the registered op."""
        keywords = dict(self.keywords)
        if "window_size" in keywords:
            keywords["window_left"], keywords["window_right"] = keywords.pop("window_size")
        return keywords


def name_of(call: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in call.items() if value) or "plain"


CALLS = [("gqa_attention_decode", call) for call in DECODE_CALLS]
CALLS += [("gqa_attention_prefill", call) for call in PREFILL_CALLS]
every_call = pytest.mark.parametrize("op, call", CALLS, ids=[f"{op[14:]} {name_of(call)}" for op, call in CALLS])


def make_call(
    op: str, combination: dict[str, Any], guard: Guard, *, batch: int = 2, heads: tuple[int, int] = (4, 2)
) -> Call:
    queries, head_dim = combination.get("queries", 3), combination.get("head_dim", 32)
    cached = [queries + 4 + 9 * b for b in range(batch)] if combination.get("cache", True) else [0] * batch
    new = queries if combination["new"] or not combination.get("cache", True) else 0
    lengths = [(queries, n, new) for n in cached]
    case = make_case(lengths, dtype=combination["dtype"], heads=heads, head_dim=head_dim)
    values = {name: combination[name] for name in ("window", "softcap", "scale")}
    if combination["sinks"]:
        values["sinks"] = torch.zeros(heads[0])
    if combination["leftpad"]:
        values["leftpad"] = [1] * batch
    if combination["rotary"]:
        explicit = [[5, 6, 7]] * batch if combination["rotary"] == "positions" else None
        values["rotary"] = make_rotary(head_dim, 64, explicit=explicit)
    case = case.change(**values)
    cache = build_cache(case, guard, page_size=combination["page_size"]) if combination.get("cache", True) else None
    keywords = arguments(
        case, guard, cache, ragged=combination.get("ragged", False), gathered=combination["rotary"] == "gathered"
    )
    keywords["return_lse"] = combination["return_lse"]
    for name in ("num_splits", "batch_invariant", "static_prefix"):
        if combination.get(name):
            keywords[name] = combination[name]
    if op == "gqa_attention_prefill":
        keywords["causal"] = combination["causal"]
        if combination["ragged"]:
            keywords["max_seqlen_q"] = queries
    return Call(op, keywords)
