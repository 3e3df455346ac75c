"""Pairs of attention options where blocks share keys in decoding, and where warpgroups share rows in prefill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attention import Length, make_case
from support.attention_layout import build_cache, run_cached, run_prefill
from support.attention_options import name_of, option_case
from support.contract import assert_same
from support.guard import Guard
from support.kernels import batch_for, clusters, has_hopper_kernels, hopper
from support.pairs import pairwise
from support.quantized import FORMATS, Quantized, place_cache, run_quantized

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

HALVES = [torch.float16, torch.bfloat16]
_OPTIONS: dict[str, list[Any]] = {
    "causal": [True],
    "softcap": [0.0, 2.0],
    "sinks": [None, "float32", "dtype"],
    "leftpad": [False, True],
    "scale": [None, 0.3],
}
# Windows of a few keys, of some blocks' keys, of most.
DECODE_PAIRS = pairwise({"window": [(-1, -1), (700, -1), (40, 2), (1500, 0)], "rotary": [None], **_OPTIONS})
PREFILL_PAIRS = pairwise(
    {**_OPTIONS, "causal": [True, False], "window": [(-1, -1), (100, -1), (30, 2), (0, 0), (-1, 70)], "rotary": [None]}
)
every_width = pytest.mark.parametrize("head_dim", [64, 96, 128, 256])


def has_wider_tiles(combination: dict[str, Any], head_dim: int) -> bool:
    """Where every query sees every key of a contiguous cache, a tile has 160 of them, and of pages 128."""
    return head_dim == 128 and not combination["causal"] and combination["window"] == (-1, -1)


@every_width
@pytest.mark.parametrize("share", [4, 8, 16])
def test_p1_decode_options(guard: Guard, head_dim: int, share: int) -> None:
    """4, 8 and 16 blocks a sequence; contiguous and in pages the same bytes."""
    on_gpu = guard.device == "cuda"
    capacity = 2080 if on_gpu else 160
    heads = (4, 2) if share < 16 else (4, 1)
    batch = batch_for(share, head_dim, 2080, heads=heads, dtype=HALVES[0])
    shares = set()
    for turn, combination in enumerate(DECODE_PAIRS if on_gpu else DECODE_PAIRS[:3]):
        new = turn % 2
        whole = [capacity - new, capacity // 2, 17, capacity - 100, 3 * capacity // 4]
        lengths: list[Length] = [(1, whole[b % 5], new) for b in range(batch if on_gpu else 2)]
        case = option_case(combination, lengths, dtype=HALVES[share == 8], heads=heads, head_dim=head_dim)
        with hopper(guard.device) as launches:
            cache = build_cache(case, guard, capacity=capacity, fill=math.nan)
            result = run_cached(case, guard, cache, decode=True)
            paged = build_cache(case, guard, capacity=capacity, page_size=16, fill=math.nan)
            assert_same(run_cached(case, guard, paged, decode=True), result, "paged differs from contiguous")
        case.check(result, name_of(combination))
        shares |= clusters(launches)
    assert not has_hopper_kernels(guard.device) or share in shares, shares  # a window may do with fewer


@every_width
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_p1_quantized_decode_options(guard: Guard, kind: torch.dtype, head_dim: int) -> None:
    """The keys of a float8 or int8 cache, shared by many blocks."""
    on_gpu = guard.device == "cuda"
    capacity = 2080 if on_gpu else 160
    shares = set()
    for turn, combination in enumerate(DECODE_PAIRS if on_gpu else DECODE_PAIRS[:2]):
        new, batch, heads = turn % 2, (1, 4, 12)[turn % 3], (4, 2)
        whole = [capacity - new, capacity // 2, 17, capacity - 100]
        lengths: list[Length] = [(1, whole[b % 4], new) for b in range(batch if on_gpu else 2)]
        case = option_case(combination, lengths, dtype=HALVES[turn % 2], heads=heads, head_dim=head_dim)
        x = Quantized.fit(case, kind, per_head=True, headroom=1.5)
        page_size = (None, 16, 64)[turn % 3]
        cache = place_cache(x, build_cache(case, guard, capacity=capacity, page_size=page_size), guard, fill=0x7F)
        with hopper(guard.device) as launches:
            result = run_quantized(x, guard, cache, decode=True)
        x.attended(cache).check(result, name_of(combination))
        shares |= clusters(launches)
    assert not has_hopper_kernels(guard.device) or len(shares) > 1, shares


@every_width
def test_p1_decode_tokens(guard: Guard, head_dim: int) -> None:
    """2 to 8 query tokens, each with its own end, over keys that blocks share."""
    for queries in (2, 3, 4, 8) if guard.device == "cuda" else (4,):
        lengths = [(queries, cached, queries) for cached in (1500, 1000, 777)]
        heads = (2 * max(1, 8 // queries), 2)
        case = make_case(lengths, dtype=HALVES[queries % 2], heads=heads, head_dim=head_dim, window=(900, -1))
        for page_size in (None, 64):
            cache = build_cache(case, guard, page_size=page_size, capacity=2048, fill=math.nan)
            with hopper(guard.device):
                result = run_cached(case, guard, cache, decode=True)
            case.check(result, f"{queries} queries, pages of {page_size}")


@every_width
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_p1_prefill_options(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """Dense and ragged give the same bytes; so do a contiguous and a paged cache."""
    on_gpu = guard.device == "cuda"
    for combination in PREFILL_PAIRS if on_gpu else PREFILL_PAIRS[:2]:
        size = 200 if on_gpu else 70
        case = option_case(combination, [(size, 0, size)] * 4, dtype=dtype, head_dim=head_dim)
        with hopper(guard.device):
            dense = run_prefill(case, guard)
            ragged = run_prefill(case, guard, ragged=True, max_seqlen_q=size, max_seqlen_k=size)
        case.check(dense, f"dense {name_of(combination)}")
        assert_same(ragged, dense, "ragged differs from dense")
        chunks = [(100, cached, 100) for cached in (0, 155, 28)]
        pieces = [(70, 25, 70), (1, 60, 1), (0, 9, 0), (150, 0, 150)]
        for lengths, is_ragged in ((chunks, False), (pieces, True)):
            case = option_case(combination, lengths, dtype=dtype, head_dim=head_dim)
            with hopper(guard.device):
                result = run_cached(case, guard, build_cache(case, guard, fill=math.nan), ragged=is_ragged)
                paged = run_cached(case, guard, build_cache(case, guard, page_size=16, fill=math.nan), ragged=is_ragged)
            case.check(result, f"{lengths} {name_of(combination)}")
            if has_wider_tiles(combination, head_dim):
                case.check(paged, f"{lengths} paged {name_of(combination)}")
            else:
                assert_same(paged, result, "paged differs from contiguous")
