"""Attention at every short length, about every tile edge and to 131072 keys, on the kernels for Hopper and without."""

from __future__ import annotations

import math

import pytest
import torch
from support.attention import Case, Length, Result, make_case
from support.attention_layout import build_cache, run_cached, run_prefill
from support.guard import Guard
from support.kernels import batch_for, clusters, has_hopper_kernels, hopper
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill

HALVES = [torch.float16, torch.bfloat16]
BOTH = ["cpu", "cuda", "cuda portable"]
TILES = (64, 80, 96, 128, 160)  # rows or keys of a tile, of any kernel

every_half = pytest.mark.parametrize("dtype", HALVES)
every_width = pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
every_mask = pytest.mark.parametrize("causal", [True, False])
both_kernels = pytest.mark.parametrize("device", BOTH, indirect=True)


def edges(tile: int, last: int) -> list[int]:
    return [edge + i for edge in range(tile, last + 1, tile) for i in (-1, 0, 1)]


def ragged(case: Case, guard: Guard, what: str) -> None:
    with hopper(guard.device):
        result = run_prefill(case, guard, ragged=True)
    case.check(result, what)


@both_kernels
@every_half
@every_width
def test_p1_every_length(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """As many queries as keys, and fewer: every number of queries from 1 to 257."""
    on_gpu = guard.device == "cuda"
    counts = range(1, 258) if on_gpu else (1, 63, 64, 65, 128, 129, 257)
    square = [(n, 0, n) for n in counts]
    longer = [(n, 0, n + 1 + 37 * n % 200) for n in counts]
    for lengths, causal, heads in (
        (square, True, (1, 1)),
        (square, False, (2, 1)),
        (longer, True, (2, 1)),
        (longer, False, (1, 1)),
    ):
        case = make_case(lengths, dtype=dtype, heads=heads, head_dim=head_dim, causal=causal, device=guard.device)
        ragged(case, guard, f"{'as many' if lengths is square else 'more'} keys, causal {causal}")


@both_kernels
@every_width
@pytest.mark.parametrize("page_size", [None, 64])
def test_p1_prefixes(guard: Guard, head_dim: int, page_size: int | None) -> None:
    """70 queries over prefixes that end, or make them end, about every multiple of 16 keys up to 256."""
    prefixes = [0, *edges(16, 256), *(n - 70 for n in edges(64, 256)[3:])] if guard.device == "cuda" else (0, 1, 57, 58)
    for new in (70, 0):
        lengths = [(70, n if new else n + 1, new) for n in prefixes]
        case = make_case(lengths, dtype=HALVES[new > 0], heads=(2, 1), head_dim=head_dim, device=guard.device)
        cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
        with hopper(guard.device):
            result = run_cached(case, guard, cache)
        case.check(result, f"{new} new")


@both_kernels
@every_width
@every_mask
def test_p1_about_tile_edges(guard: Guard, head_dim: int, causal: bool) -> None:
    """One row or key less than whole tiles, just as many, one more: up to 2048."""
    last = 2048 if guard.device == "cuda" else 160
    dtype = HALVES[causal]
    rows = edges(64, last)
    keys = sorted({n for tile in TILES for n in edges(tile, last)})
    square, few = [(n, 0, n) for n in rows], [(64 + n % 3, 0, n) for n in keys]
    for lengths in (square, few):
        case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=head_dim, causal=causal, device=guard.device)
        ragged(case, guard, "about edges of rows" if lengths is square else "about edges of keys")


def last_rows(case: Case, result: Result, count: int = 129) -> tuple[Case, Result]:
    """The last queries of each sequence; the keys that they see are the same, as counting starts from the end."""
    ends = torch.tensor([len(q) for q in case.q]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(max(end - count, end - len(q)), end) for end, q in zip(ends, case.q)])
    rows = rows.to(result[0].device)
    return case.change(q=[q[-count:] for q in case.q]), (result[0][rows], result[1][:, rows])


@both_kernels
@every_width
@every_mask
def test_p1_powers_of_two(guard: Guard, head_dim: int, causal: bool) -> None:
    """About each power of two up to 131072 queries and as many keys: the last 129 rows."""
    last = 18 if has_hopper_kernels(guard.device) else (15 if guard.device == "cuda" else 9)
    for power in range(8, last):
        lengths = [(2**power + i, 0, 2**power + i) for i in (-1, 0, 1)]
        heads = (8, 1) if power < 14 else (2, 1)
        case = make_case(
            lengths, dtype=HALVES[power % 2], heads=heads, head_dim=head_dim, causal=causal, device=guard.device
        )
        with hopper(guard.device):
            result = run_prefill(case, guard, ragged=True)
        part, rows = last_rows(case, result)
        part.check(rows, f"2^{power}")


@both_kernels
@every_width
@pytest.mark.parametrize("page_size", [None, 64])
def test_p1_chunks_over_long_prefixes(guard: Guard, head_dim: int, page_size: int | None) -> None:
    """193 new tokens that end about a power of two, up to 131072 keys."""
    for power in range(9, 18, 2) if guard.device == "cuda" else (8,):
        lengths = [(193, 2**power + i - 193, 193) for i in (-1, 0, 1)]
        case = make_case(lengths, dtype=HALVES[power % 4 // 2], heads=(8, 2), head_dim=head_dim, device=guard.device)
        cache = build_cache(case, Guard(guard.device), page_size=page_size, fill=math.nan)
        with hopper(guard.device):
            result = run_cached(case, guard, cache)
        case.check(result, f"2^{power}")


@both_kernels
@every_half
def test_p1_every_group(guard: Guard, dtype: torch.dtype) -> None:
    """1 to 71 query heads for a KV head, over many rows and, in decoding, over few."""
    on_gpu = guard.device == "cuda"
    for group in range(1, 72) if on_gpu else (1, 5, 71):
        head_dim = (64, 96, 128, 256)[group % 4]
        heads = (group * (1 + group % 2), 1 + group % 2)
        lengths = [(70, 0, 70), (65, 0, 130)]
        case = make_case(lengths, dtype=dtype, heads=heads, head_dim=head_dim, device=guard.device)
        ragged(case, guard, f"group {group}")
        case = make_case(
            [(1, n, 1) for n in (300, 0, 77)], dtype=dtype, heads=heads, head_dim=head_dim, device=guard.device
        )
        cache = build_cache(case, guard, fill=math.nan)
        if group <= 8:
            with hopper(guard.device):
                result = run_cached(case, guard, cache, decode=True)
        else:
            result = run_cached(case, guard, cache, decode=True)
        case.check(result, f"decoding, group {group}")


@both_kernels
@every_width
@pytest.mark.parametrize("share", [4, 8, 16])
def test_p1_decode_about_share_edges(guard: Guard, head_dim: int, share: int) -> None:
    """About every multiple of 64 keys up to 2048, in a cache whose keys that many blocks share."""
    capacity = 2080 if guard.device == "cuda" else 160
    dtype, heads = HALVES[share == 8], (4, 2) if share < 16 else (4, 1)
    sequences = batch_for(share, head_dim, 2080, heads=heads, dtype=dtype)
    full = make_case([(1, capacity, 0)] * sequences, dtype=dtype, heads=heads, head_dim=head_dim, device=guard.device)
    cache = build_cache(full, guard, capacity=capacity)
    q, lengths = guard.place(torch.stack(full.q)), edges(64, capacity - 32)
    parts: list[tuple[Tensor, ...]] = []
    with hopper(guard.device) as launches:
        for start in range(0, len(lengths), sequences):
            some = (lengths[start:] + lengths * sequences)[:sequences]
            result = gqa_attention_decode(q, cache.k, cache.v, cache_seqlens=guard.ints(some), return_lse=True)
            for b, (n, out, lse) in enumerate(zip(some, *result)):
                parts.append((full.q[b], full.k[b][:n], full.v[b][:n], out, lse))
    q_all, k_all, v_all, outs, lses = (list(part) for part in zip(*parts))
    Case(q_all, k_all, v_all, [0] * len(parts)).check((torch.cat(outs), torch.cat(lses, 1)))
    if has_hopper_kernels(guard.device):
        assert clusters(launches) == {share}


@both_kernels
@every_width
@pytest.mark.parametrize("page_size", [None, 64])
def test_p1_decode_to_131072(guard: Guard, head_dim: int, page_size: int | None) -> None:
    """About each power of two, all in one batch and the longest alone; appending and not."""
    powers = (13, 15, 17) if guard.device == "cuda" else (8,)
    lengths = [2**n + i for n in powers for i in (-1, 0, 1)]
    for new, dtype in ((2, torch.float16), (0, torch.bfloat16)):
        rows: list[Length] = [(max(1, new), n - new, new) for n in lengths]
        for some in (rows, rows[-1:], rows[-3:]):
            case = make_case(some, dtype=dtype, heads=(8, 2), head_dim=head_dim, device=guard.device)
            cache = build_cache(case, Guard(guard.device), page_size=page_size, fill=math.nan)
            with hopper(guard.device):
                result = run_cached(case, guard, cache, decode=True)
            case.check(result, f"{new} new, {len(some)} sequences")


@both_kernels
@every_width
@every_mask
def test_p1_every_length_alone(guard: Guard, head_dim: int, causal: bool) -> None:
    """Without offsets: every number of queries from 64 to 257, over as many keys."""
    counts = range(64, 258) if guard.device == "cuda" else (64, 129)
    shape = [(counts[-1], 0, counts[-1])]
    full = make_case(shape, dtype=HALVES[causal], heads=(3, 1), head_dim=head_dim, device=guard.device)
    q, k, v = (guard.place(x[0][None]) for x in (full.q, full.k, full.v))
    with hopper(guard.device):
        results = [gqa_attention_prefill(q[:, :n], k[:, :n], v[:, :n], causal=causal, return_lse=True) for n in counts]
    parts = [[x[:n] for n in counts] for x in (full.q[0], full.k[0], full.v[0])]
    out, lse = (torch.cat([result[i][0] for result in results], i) for i in (0, 1))
    Case(*parts, list(counts), causal=causal).check((out, lse))
