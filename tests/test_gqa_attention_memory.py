"""What attention may read and must not: poison, bad metadata, NaN that belongs to one row, masked keys."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attention import Case, Result, make_case, make_rotary, visible
from support.attention_layout import INT_MAX, INT_MIN, Cache, build_cache, run_cached, run_prefill
from support.bounds import DTYPES
from support.contract import assert_same
from support.guard import Comparison, Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

import gqa_kernels
from gqa_kernels import gqa_attention_decode, gqa_attention_prefill

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

POISONS = [math.nan, math.inf, -math.inf]
CACHED = {"decode": True, "prefill": False}


def by_sequence(result: Result, batch: int) -> list[Result]:
    return list(zip(result[0].chunk(batch), result[1].chunk(batch, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("appends", [True, False])
def test_p2_reads_only_what_it_may(
    guard: Guard, dtype: torch.dtype, op: str, page_size: int | None, appends: bool
) -> None:
    """NaN and infinities in front of leftpad, behind the last key and in spare pages; nonsense behind the pages."""
    everything = ({}, {"leftpad": [4, 0, 0, 20, 0]}, {"sinks": torch.ones(4)}, {"window": (9, -1)})
    for options, queries in itertools.product(everything, (3,) if CACHED[op] else (3, 70)):
        lengths = [(queries, cached, queries if appends else 0) for cached in (10, 0, 65, 40, 130)]
        case = make_case(lengths, dtype=dtype, **options)

        def run(fill: float, case: Case = case) -> Result:
            cache = build_cache(case, guard, page_size=page_size, capacity=208, fill=fill)
            return run_cached(case, guard, cache, decode=CACHED[op])

        clean = run(0.0)
        case.check(clean)
        for fill in POISONS:
            assert_same(run(fill), clean, f"{fill} with {list(options)}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p2_block_table_is_not_read_past_the_last_page(guard: Guard, dtype: torch.dtype) -> None:
    """A table of exactly the pages needed, read as a slice of a wider one full of nonsense, and transposed."""
    case = make_case([(2, cached, 2) for cached in (30, 14, 62)], dtype=dtype)
    cache = build_cache(case, guard, page_size=16, capacity=64)
    expected = run_cached(case, guard, cache, decode=True)
    table = cache.block_table
    assert table is not None
    for junk in (INT_MAX, INT_MIN, -1):
        wide = torch.full((table.shape[0] + 2, table.shape[1] + 3), junk, dtype=torch.int32)
        wide[1:-1, 1:-2] = table.cpu()
        placed = guard.place(wide)
        for view in (placed[1:-1, 1:-2], guard.place(wide.T.contiguous()).T[1:-1, 1:-2]):
            assert_same(run_cached(case, guard, replace(cache, block_table=view), decode=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p2_ragged_neighbours(guard: Guard, dtype: torch.dtype) -> None:
    """A sequence of NaN between two others touches neither."""
    for lengths in ([(13, 0, 20), (9, 0, 9), (30, 0, 30)], [(70, 0, 100), (130, 0, 90), (65, 0, 65)]):
        case = make_case(lengths, dtype=dtype)
        first, last = lengths[0][0], lengths[0][0] + lengths[1][0]
        with hopper(guard.device) if first == 70 and dtype != torch.float32 else nullcontext():
            clean = run_prefill(case, guard, ragged=True)
            for poison in POISONS:
                for name in ("q", "k", "v"):
                    parts = list(getattr(case, name))
                    parts[1] = torch.full_like(parts[1], poison)
                    out, lse = run_prefill(case.change(**{name: parts}), guard, ragged=True)
                    for rows in (slice(0, first), slice(last, None)):
                        assert same_bytes(out[rows], clean[0][rows]) and same_bytes(lse[:, rows], clean[1][:, rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("heads_first", [False, True])
def test_p3_writes_only_the_new_rows(
    guard: Guard, dtype: torch.dtype, op: str, page_size: int | None, heads_first: bool
) -> None:
    """Of the cache nothing but the new rows, exactly; nothing around it, no input, and nothing where nothing is new."""
    for new in (5, 0):
        case = make_case([(5, cached, new) for cached in (0, 15, 16, 63)], dtype=dtype, head_dim=40)
        cache = build_cache(case, guard, page_size=page_size, fill=math.nan, heads_first=heads_first)
        run_cached(case, guard, cache, decode=CACHED[op])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
@pytest.mark.parametrize("payload", [0.0, math.nan, 3.0])
def test_p4_every_output_byte_is_written(guard: Guard, dtype: torch.dtype, op: str, payload: float) -> None:
    """What the memory of the outputs held before does not show."""
    case = make_case([(3, cached, 0) for cached in (0, 40, 130)], dtype=dtype)
    cache = build_cache(case, guard)
    expected = run_cached(case, guard, cache, decode=CACHED[op])
    torch.utils.deterministic.fill_uninitialized_memory = False
    shapes = ((3, 3, 4, 64), dtype), ((3, 4, 3), torch.float32)
    for _ in range(3):
        stale = [torch.full(shape, payload, dtype=kind, device=guard.device) for shape, kind in shapes]
        del stale
        assert_same(run_cached(case, guard, cache, decode=CACHED[op]), expected)


def bad_lengths(capacity: int) -> list[int]:
    return [-1, capacity - 1, capacity + 1, INT_MAX, INT_MIN]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
@pytest.mark.parametrize("page_size", [None, 16])
def test_p6_bad_cache_seqlens(guard: Guard, dtype: torch.dtype, op: str, page_size: int | None) -> None:
    """NaN for that sequence, nothing written for it, its neighbours as ever."""
    case = make_case([(2, cached, 2) for cached in (30, 14, 60)], dtype=dtype, rotary=make_rotary(64))
    good = by_sequence(
        run_cached(case, guard, build_cache(case, guard, page_size=page_size, capacity=64), decode=CACHED[op]), 3
    )
    for bad in bad_lengths(64):
        cache = build_cache(case, guard, page_size=page_size, capacity=64)
        out, lse = run_with_bad_row(case, guard, cache, decode=CACHED[op], cache_seqlens=guard.ints([30, bad, 60]))
        assert_bad_row(by_sequence((out, lse), 3), good, bad=1, what=f"cache_seqlens {bad}")


def run_with_bad_row(case: Case, guard: Guard, cache: Cache, *, decode: bool, bad: int = 1, **extra: Any) -> Result:
    """Runs with metadata that spoils sequence ``bad``: nothing of it may reach the cache."""
    q = guard.place(torch.stack(case.q))
    k, v = (guard.place(torch.stack([x[n:] for x, n in zip(part, case.cached)])) for part in (case.k, case.v))
    keywords: dict[str, Any] = {"cache_seqlens": cache.seqlens, "block_table": cache.block_table, "return_lse": True}
    if case.rotary is not None:
        keywords |= {"rotary_cos": guard.place(case.rotary.cos), "rotary_sin": guard.place(case.rotary.sin)}
    expected_k, expected_v = cache.k.clone(), cache.v.clone()
    op = gqa_attention_decode if decode else gqa_attention_prefill
    out, lse = op(q, k_cache=cache.k, v_cache=cache.v, k=k, v=v, **{**keywords, **extra})
    for b in range(case.batch):
        if b != bad:
            rows = cache.slots(b, range(case.cached[b], len(case.k[b])))
            expected_k[rows], expected_v[rows] = cache.k[rows], v[b]
    assert same_bytes(cache.v, expected_v) and same_bytes(cache.k, expected_k), "a dropped write reached the cache"
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


def assert_bad_row(rows: list[Result], good: list[Result], *, bad: int, what: str) -> None:
    for b, (row, expected) in enumerate(zip(rows, good)):
        if b == bad:
            assert bool(row[0].isnan().all()) and bool(row[1].isnan().all()), f"{what}: not NaN"
        else:
            assert_same(row, expected, f"{what}: neighbour {b} changed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_p6_bad_page(guard: Guard, dtype: torch.dtype, op: str, column: int) -> None:
    """A page that does not exist, under old keys or where the new ones should go."""
    case = make_case([(2, cached, 2) for cached in (30, 35, 60)], dtype=dtype)
    cache = build_cache(case, guard, page_size=16, capacity=64)
    good = by_sequence(run_cached(case, guard, cache, decode=CACHED[op]), 3)
    for page in (-1, cache.k.shape[0], INT_MAX, INT_MIN):
        cache = build_cache(case, guard, page_size=16, capacity=64)
        assert cache.block_table is not None
        table = cache.block_table.cpu().clone()
        table[1, column] = page
        if column == 2:
            result = run_with_bad_row(case, guard, cache, decode=CACHED[op], block_table=guard.place(table))
        else:
            result = run_cached(case, guard, cache, decode=CACHED[op], block_table=guard.place(table))
        assert_bad_row(by_sequence(result, 3), good, bad=1, what=f"page {page}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
def test_p6_bad_page_that_nobody_sees(guard: Guard, dtype: torch.dtype, op: str) -> None:
    """Under keys in front of leftpad or behind the window a bad page is never looked at."""
    for options in ({"leftpad": [0, 32, 0]}, {"window": (3, -1)}):
        case = make_case([(2, cached, 2) for cached in (30, 60, 60)], dtype=dtype, **options)
        cache = build_cache(case, guard, page_size=16)
        assert cache.block_table is not None
        expected = run_cached(case, guard, cache, decode=CACHED[op])
        table = cache.block_table.cpu().clone()
        table[1, :2] = torch.tensor([INT_MAX, -1])
        assert_same(run_cached(case, guard, cache, decode=CACHED[op], block_table=guard.place(table)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CACHED)
def test_p6_bad_rotary_position(guard: Guard, dtype: torch.dtype, op: str) -> None:
    """A position outside the tables: that token is NaN, and who attends to it; no other sequence."""
    case = make_case([(3, cached, 3) for cached in (30, 35, 60)], dtype=dtype)
    tables = {"rotary_cos": guard.place(make_rotary(64).cos), "rotary_sin": guard.place(make_rotary(64).sin)}
    good = None
    for position in (7, 512, -1, INT_MAX, INT_MIN):
        cache = build_cache(case, guard)
        q = guard.place(torch.stack(case.q))
        new = [guard.place(torch.stack([x[n:] for x, n in zip(part, case.cached)])) for part in (case.k, case.v)]
        run = gqa_attention_decode if CACHED[op] else gqa_attention_prefill
        positions = guard.ints([[5, 6, 7], [5, position, 9], [1, 2, 3]])
        keywords = {"cache_seqlens": cache.seqlens, "rotary_positions": positions, "return_lse": True, **tables}
        out, lse = run(q, k_cache=cache.k, v_cache=cache.v, k=new[0], v=new[1], **keywords)
        if good is None:
            good = out, lse
            continue
        assert same_bytes(out[[0, 2]], good[0][[0, 2]]) and same_bytes(lse[[0, 2]], good[1][[0, 2]]), position
        assert same_bytes(out[1, 0], good[0][1, 0]) and same_bytes(lse[1, :, 0], good[1][1, :, 0]), position
        assert bool(out[1, 1:].isnan().all()) and bool(lse[1, :, 1:].isnan().all()), position


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1, 14])
def test_p6_bad_cu_seqlens(guard: Guard, dtype: torch.dtype, unit: int) -> None:
    """Offsets past the end, negative, or longer than max_seqlen: NaN for that sequence only."""
    with hopper(guard.device) if unit > 1 and dtype != torch.float32 else nullcontext():
        check_bad_offsets(guard, dtype, unit)


def check_bad_offsets(guard: Guard, dtype: torch.dtype, unit: int) -> None:
    """Of sequences of 6, 9 and 5 units."""
    case = make_case([(n * unit, 0, n * unit) for n in (6, 9, 5)], dtype=dtype)
    q, k, v = (guard.place(torch.cat(part)) for part in (case.q, case.k, case.v))
    good = [0, 6, 15, 20]

    def units(offsets: list[int]) -> Tensor:
        """Extremes stay as they are; one unit too far may be one token."""
        exact = {21: 20 * unit + 1, 1: 1, -1: -1, INT_MAX: INT_MAX, INT_MIN: INT_MIN}
        return guard.ints([exact.get(n, n * unit) for n in offsets])

    def run(offsets_q: list[int], offsets_k: list[int], **limits: int) -> Result:
        offsets = {"cu_seqlens_q": units(offsets_q), "cu_seqlens_k": units(offsets_k)}
        limits = {name: n * unit for name, n in limits.items()}
        out, lse = gqa_attention_prefill(q, k, v, **offsets, return_lse=True, **limits)
        return out, lse

    clean = run(good, good)
    case.check(clean)

    def check(result: Result, bad: slice, what: str) -> None:
        rows = torch.ones(20 * unit, dtype=torch.bool)
        bad = slice(bad.start * unit, bad.stop * unit)
        rows[bad] = False
        assert same_bytes(result[0][rows], clean[0][rows]) and same_bytes(result[1][:, rows], clean[1][:, rows]), what
        assert bool(result[0][bad].isnan().all()) and bool(result[1][:, bad].isnan().all()), what

    for end in (21, INT_MAX):
        check(run(good, [0, 6, 15, end]), slice(15, 20), f"keys to {end}")
        check(run([0, 6, 15, end], good), slice(15, 20), f"queries to {end}")
    for start in (1, -1, INT_MIN):
        check(run(good, [start, 6, 15, 20]), slice(0, 6), f"keys from {start}")
        check(run([start, 6, 15, 20], good), slice(0, 6), f"queries from {start}")
    # What is longest decides over splits, so over bytes: a sound call with the same limits for either neighbour.
    for name, other, which in (("max_seqlen_q", "max_seqlen_k", 0), ("max_seqlen_k", "max_seqlen_q", 1)):
        limits = {name: 8, other: 9}
        found = run(good, good, **limits)
        for shorter, rows in (([0, 6, 14, 20], slice(0, 6 * unit)), ([0, 7, 15, 20], slice(15 * unit, None))):
            sound = run(good, shorter, **limits) if which else run(shorter, good, **limits)
            assert same_bytes(found[0][rows], sound[0][rows]) and same_bytes(found[1][:, rows], sound[1][:, rows]), name
        long = slice(6 * unit, 15 * unit)
        assert bool(found[0][long].isnan().all()) and bool(found[1][:, long].isnan().all()), name
    # Unsound in the middle: every row has one owner, and the rows in doubt are NaN.
    for offsets, bad in ([0, 6, 3, 20], slice(6, 20)), ([0, 21, 15, 20], slice(0, 15)), ([0, -1, 15, 20], slice(0, 15)):
        check(run(offsets, good), bad, f"queries {offsets}")
        check(run(good, offsets), bad, f"keys {offsets}")
    for end in (14, 8, 0, -1, INT_MIN):
        check(run([0, 6, 15, end], good), slice(15, 20), f"queries to {end}")
        check(run(good, [0, 6, 15, end]), slice(15, 20), f"keys to {end}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_reaches_who_attends_to_it(guard: Guard, dtype: torch.dtype) -> None:
    """A NaN key: out and lse of the queries that see it, of its own heads and sequence, are NaN; all else as ever."""
    for count, run, head_dim in itertools.product((20, 150), ("dense", "ragged", "cache"), wide_dims(guard)):
        case = make_case([(count, 0, count)] * 2, dtype=dtype, heads=(6, 2), head_dim=head_dim, window=(7, -1))
        clean = attend(case, guard, run)
        k = [x.clone() for x in case.k]
        k[1][9, 1, 5] = math.nan
        out, lse = attend(case.change(k=k), guard, run)
        hit = torch.zeros(2 * count, 6, dtype=torch.bool)
        hit[count:, 3:] = torch.from_numpy(visible(case, 1)[:, 9])[:, None]
        assert bool(out[hit].isnan().all()) and bool(lse[hit.T].isnan().all()), (run, count, head_dim)
        assert same_bytes(out[~hit], clean[0][~hit]) and same_bytes(lse[~hit.T], clean[1][~hit.T]), (run, count)


def wide_dims(guard: Guard) -> tuple[int, ...]:
    """Of each kernel for Hopper."""
    return (64, 96, 128, 256) if guard.device == "cuda" else (64,)


def attend(case: Case, guard: Guard, how: str) -> Result:
    halves = case.dtype != torch.float32
    few = len(case.q[0]) * case.heads[0] // case.heads[1] <= 8
    with hopper(guard.device) if halves and (few if how == "decode" else len(case.q[0]) >= 64) else nullcontext():
        if how in ("dense", "ragged"):
            return run_prefill(case, guard, ragged=how == "ragged")
        over = case.change(new=[0] * case.batch)
        return run_cached(over, guard, build_cache(over, guard), decode=how == "decode")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_query_and_value(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(1, 40, 1)] * 3, dtype=dtype)
    clean = run_cached(case, guard, build_cache(case, guard), decode=True)
    q, v = ([x.clone() for x in part] for part in (case.q, case.v))
    q[1][0, 2, 7] = math.nan
    out, lse = run_cached(case.change(q=q), guard, build_cache(case, guard), decode=True)
    assert bool(out[1, 2].isnan().all()) and bool(lse[2, 1].isnan())
    others = torch.ones(3, 4, dtype=torch.bool)
    others[1, 2] = False
    assert same_bytes(out[others], clean[0][others]) and same_bytes(lse.T[others], clean[1].T[others])
    v[1][11, 1, 7] = math.nan
    poisoned = case.change(v=v)
    out, lse = run_cached(poisoned, guard, build_cache(poisoned, guard), decode=True)
    hit = torch.zeros(3, 4, 64, dtype=torch.bool)
    hit[1, 2:, 7] = True
    assert bool(out[hit].isnan().all()) and same_bytes(out[~hit], clean[0][~hit]) and same_bytes(lse, clean[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["dense", "ragged", "cache", "decode"])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("poison", ["largest", "nan", "inf"])
def test_p10_masked_never_matters(guard: Guard, dtype: torch.dtype, how: str, part: str, poison: str) -> None:
    """Whatever a masked key or value holds, the bytes of those who do not see it stay."""
    value = {"largest": torch.finfo(dtype).max, "nan": math.nan, "inf": math.inf}[poison]
    queries = 4 if how == "decode" else 70
    for head_dim in wide_dims(guard):
        case = make_case([(queries, 0, 70)] * 2, dtype=dtype, heads=(4, 2), head_dim=head_dim, window=(25, -1))
        clean = attend(case, guard, how)
        seen, same = visible(case, 0), Comparison(guard.device)
        for query in (0, queries // 2, queries - 1):
            hidden = torch.from_numpy(~seen[query])
            if not bool(hidden.any()):
                continue
            tensors = [x.clone() for x in getattr(case, part)]
            for x in tensors:
                x[hidden] = value
            out, lse = attend(case.change(**{part: tensors}), guard, how)
            rows = slice(query, None, queries)
            same.add((out[rows], lse[:, rows]), (clean[0][rows], clean[1][:, rows]))
        same.check(f"{head_dim}")


def test_p6_validation_names_the_index(device: str) -> None:
    """Inside validation() each call checks its metadata on the host and says which entry is wrong."""
    q, new = torch.zeros(3, 1, 4, 64, device=device), torch.zeros(3, 1, 2, 64, device=device)
    pool = [torch.zeros(8, 16, 2, 64, device=device) for _ in range(2)]

    def decode(lengths: list[int], table: list[list[int]], positions: list[list[int]] | None = None) -> Tensor:
        keywords: dict[str, Any] = {}
        if positions is not None:
            tables = make_rotary(64)
            keywords = {"rotary_cos": tables.cos.to(device), "rotary_sin": tables.sin.to(device)}
            keywords["rotary_positions"] = torch.tensor(positions, dtype=torch.int32, device=device)
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        pages = torch.tensor(table, dtype=torch.int32, device=device)
        return gqa_attention_decode(q, *pool, new, new, cache_seqlens=seqlens, block_table=pages, **keywords)

    pages = [[0, 1], [2, 3], [4, INT_MAX]]
    with gqa_kernels.validation():
        decode([31, 5, 3], pages)
        for lengths in ([31, -1, 3], [3, 32, 3]):
            with pytest.raises(RuntimeError, match=rf"^gqa_attention_decode: cache_seqlens\[1\].*{lengths[1]}"):
                decode(lengths, pages)
        for page in (8, -1, INT_MAX):
            with pytest.raises(RuntimeError, match=rf"^gqa_attention_decode: block_table\[1, 1\].*{page}"):
                decode([31, 20, 3], [[0, 1], [2, page], [4, 5]])
        with pytest.raises(RuntimeError, match=r"^gqa_attention_decode: rotary_positions\[2, 0\].*512"):
            decode([31, 5, 3], pages, [[1], [2], [512]])
        ragged = torch.zeros(10, 4, 64, device=device)
        for offsets, index in ([0, 6, 4, 10], 2), ([0, 4, 8, 11], 3), ([1, 4, 8, 10], 0):
            cu = torch.tensor(offsets, dtype=torch.int32, device=device)
            with pytest.raises(RuntimeError, match=rf"^gqa_attention_prefill: cu_seqlens_q\[{index}\]"):
                gqa_attention_prefill(ragged, ragged, ragged, cu_seqlens_q=cu, cu_seqlens_k=cu)
    decode([31, -1, 3], pages)
