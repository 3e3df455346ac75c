"""Pairs of attention options as cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from support.attention import Case, Length, make_case, make_rotary
from support.pairs import pairwise

_FACTORS: dict[str, list[Any]] = {
    "causal": [True, False],
    "window": [(-1, -1), (5, -1), (30, 2), (0, 0), (-1, 4)],
    "softcap": [0.0, 2.0],
    "sinks": [None, "float32", "dtype"],
    "leftpad": [False, True],
    "rotary": [None, "half", "interleaved", "positions"],
    "scale": [None, 0.3],
}

OPTION_PAIRS = pairwise(_FACTORS)
DECODE_PAIRS = pairwise({**_FACTORS, "causal": [True]})


def name_of(combination: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in combination.items() if value != _FACTORS[name][0]) or "plain"


def option_case(
    combination: dict[str, Any],
    lengths: Sequence[Length],
    *,
    dtype: torch.dtype,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 64,
) -> Case:
    case = make_case(lengths, dtype=dtype, heads=heads, head_dim=head_dim)
    values = {name: combination[name] for name in ("causal", "window", "softcap", "scale")}
    if combination["sinks"]:
        sinks = torch.randn(heads[0]) + 1
        values["sinks"] = sinks if combination["sinks"] == "float32" else sinks.to(dtype)
    if combination["leftpad"]:
        # Some padding ends inside the cache, some inside the new keys, one past every key.
        values["leftpad"] = [
            (0, 3, cached + new // 2, cached + new)[b % 4] for b, (_, cached, new) in enumerate(lengths)
        ]
    if combination["rotary"] == "half":
        values["rotary"] = make_rotary(head_dim)
    elif combination["rotary"] == "interleaved":
        values["rotary"] = make_rotary(head_dim // 2 + 2, dtype=dtype, interleaved=True)
    elif combination["rotary"] == "positions":
        explicit = [torch.randint(0, 512, (queries,)).tolist() for queries, _, _ in lengths]
        values["rotary"] = make_rotary(head_dim, explicit=explicit)
    return case.change(**values)
