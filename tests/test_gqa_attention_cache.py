"""Prefill over a cache: appended chunks, ragged batches, pages, and the algebra of caches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attention import Case, Result, make_case, make_rotary
from support.attention_layout import Cache, build_cache, lengths_to_offsets, run_cached, run_prefill
from support.attention_options import OPTION_PAIRS, name_of, option_case
from support.bounds import DTYPES
from support.contract import assert_same
from support.guard import Guard, same_bytes
from support.kernels import hopper

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

PAGE_SIZES = [1, 16, 64, 256]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination", OPTION_PAIRS, ids=name_of)
def test_p1_options(guard: Guard, dtype: torch.dtype, combination: dict[str, Any]) -> None:
    """Dense and ragged chunks, appended or only read; a paged cache gives the bytes of a contiguous one."""
    dense = [(18, cached, 18) for cached in (0, 50, 3, 20)]
    ragged = [(40, 25, 40), (1, 60, 1), (0, 9, 0), (7, 0, 7)]
    reads = [(18, cached, 0) for cached in (0, 50, 3, 20)]
    for lengths, is_ragged in ((dense, False), (ragged, True), (reads, False), (reads, True)):
        case = option_case(combination, lengths, dtype=dtype)
        result = run_cached(case, guard, build_cache(case, guard, fill=math.nan), ragged=is_ragged)
        case.check(result, f"{lengths}")
        paged = build_cache(case, guard, page_size=16, fill=math.nan)
        assert_same(run_cached(case, guard, paged, ragged=is_ragged), result, "paged differs from contiguous")


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 17])
def test_p1_every_prefix(guard: Guard, dtype: torch.dtype, queries: int) -> None:
    """Every prefix from 0 to 130, one length a row, appending or not."""
    for new in (queries, 0):
        case = make_case([(queries, n, new) for n in range(131)], dtype=dtype, heads=(2, 1), head_dim=32)
        for page_size in (None, 16):
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
            case.check(run_cached(case, guard, cache), f"{new} new keys, pages of {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 64])
def test_p1_prefixes_about_powers_of_two(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    lengths = [(3, 2**n + i - 3, 3) for n in range(7, 13) for i in (-1, 0, 1)]
    case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=32)
    case.check(run_cached(case, guard, build_cache(case, guard, page_size=page_size)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("heads", [(2, 1), (21, 3), (8, 8)])
def test_p12_page_placement_does_not_matter(
    guard: Guard, dtype: torch.dtype, decode: bool, heads: tuple[int, int]
) -> None:
    """Any page size, any order, any pool: the bytes of a contiguous cache of that capacity."""
    case = make_case([(3, cached, 3) for cached in (0, 15, 61, 64, 300)], dtype=dtype, heads=heads)
    expected = run_cached(case, guard, build_cache(case, guard, capacity=512), decode=decode)
    case.check(expected)
    pools: list[dict[str, Any]] = [
        {"spare_pages": 0, "shuffle": False},
        {"spare_pages": 9, "index_dtype": torch.int64, "fill": math.nan},
    ]
    for page_size in (*PAGE_SIZES, 7):
        for pool in pools:
            cache = build_cache(case, guard, page_size=page_size, capacity=512, **pool)
            assert_same(run_cached(case, guard, cache, decode=decode), expected, f"page size {page_size}")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_p12_page_placement_under_many_queries(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """On Hopper pages of a multiple of 16 rows give the bytes of a contiguous cache. Smaller ones have another kernel,
    within P1's bound."""
    case = make_case([(70, cached, 70) for cached in (0, 15, 61, 64, 300)], dtype=dtype, head_dim=head_dim)
    with hopper(guard.device):
        expected = run_cached(case, guard, build_cache(case, guard, capacity=512))
        case.check(expected)
        for page_size in (16, 48, 64, 256):
            for pool in ({"spare_pages": 0, "shuffle": False}, {"spare_pages": 9, "fill": math.nan}):
                cache = build_cache(case, guard, page_size=page_size, capacity=512, **pool)
                assert_same(run_cached(case, guard, cache), expected, f"page size {page_size}")
    for page_size in (1, 7):
        case.check(run_cached(case, guard, build_cache(case, guard, page_size=page_size, capacity=512)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [False, True])
def test_p12_shared_pages(guard: Guard, dtype: torch.dtype, decode: bool) -> None:
    """Three sequences over one prefix: three copies of its pages, or the same pages three times."""
    case = make_case([(2, 96, 0)] * 3, dtype=dtype)
    case = case.change(k=[case.k[0]] * 3, v=[case.v[0]] * 3)
    expected = run_cached(case, guard, build_cache(case, guard, page_size=16), decode=decode)
    case.check(expected)
    own = build_cache(case, guard, page_size=16)
    assert own.block_table is not None
    shared = replace(own, block_table=guard.place(own.block_table[:1].repeat(3, 1).cpu()))
    assert_same(run_cached(case, guard, shared, decode=decode), expected)
    expanded = replace(own, block_table=own.block_table[:1].expand(3, -1))
    assert_same(run_cached(case, guard, expanded, decode=decode), expected)


def prefill_in_chunks(guard: Guard, case: Case, chunks: list[int], *, page_size: int | None) -> tuple[Result, Cache]:
    """The queries of every sequence in pieces, each appended; pieces of at most 16 through decode where allowed."""
    total = sum(chunks)
    empty = case.change(new=[total] * case.batch)
    cache = build_cache(empty, guard, page_size=page_size, capacity=total, shuffle=False)
    outs, lses, start = [], [], 0
    for count in chunks:
        piece = slice(start, start + count)
        q, k, v = (guard.place(torch.stack([x[piece] for x in part])) for part in (case.q, case.k, case.v))
        rotary: dict[str, Any] = {}
        if case.rotary is not None:
            rotary = {"rotary_cos": guard.place(case.rotary.cos), "rotary_sin": guard.place(case.rotary.sin)}
        op = gqa_attention_decode if count == 1 else gqa_attention_prefill
        lengths = guard.ints([start] * case.batch)
        common = {"cache_seqlens": lengths, "block_table": cache.block_table, "return_lse": True, **rotary}
        out, lse = op(q, k_cache=cache.k, v_cache=cache.v, k=k, v=v, **common)
        outs.append(out)
        lses.append(lse)
        start += count
    out, lse = torch.cat(outs, 1), torch.cat(lses, 2)
    return (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), cache


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_p13_cache_algebra(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    """One prefill, a prefill in two, and one decode a token: the same cache bytes, the same answer within P1."""
    few = make_case([(40, 0, 40)] * 2, dtype=dtype, rotary=make_rotary(64))
    many = make_case([(160, 0, 160)] * 2, dtype=dtype)
    for case, pieces in (
        (few, ([13, 27], [17, 1, 22], [39, 1], [1] * 40)),
        (many, ([80, 80], [64, 1, 95], [159, 1], [17, 143])),
    ):
        whole, cache = prefill_in_chunks(guard, case, [len(case.q[0])], page_size=page_size)
        case.check(whole, "one prefill")
        case.check(run_prefill(case, guard), "no cache")
        for chunks in pieces:
            result, other = prefill_in_chunks(guard, case, chunks, page_size=page_size)
            case.check(result, f"chunks {chunks}")
            assert same_bytes(other.k, cache.k) and same_bytes(other.v, cache.v), f"chunks {chunks}: caches differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [False, True])
def test_p13_batch_permutation(guard: Guard, dtype: torch.dtype, decode: bool) -> None:
    case = make_case([(4, cached, 4) for cached in (9, 130, 0, 77, 31)], dtype=dtype, leftpad=[2, 0, 0, 5, 31])
    out, lse = run_cached(case, guard, build_cache(case, guard), decode=decode)
    case.check((out, lse))
    order = [3, 0, 4, 2, 1]
    part = case.pick(order)
    other_out, other_lse = run_cached(part, guard, build_cache(part, guard), decode=decode)
    assert same_bytes(other_out, out.unflatten(0, (5, 4))[order].flatten(0, 1))
    assert same_bytes(other_lse, lse.unflatten(1, (5, 4))[:, order].flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_p13_ragged_prefill_equals_dense(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    """The same bytes where both know the same longest sequence; within P1 where it has to be guessed."""
    for queries, rotary in ((12, make_rotary(64)), (70, None)):
        case = make_case([(queries, cached, queries) for cached in (0, 33, 100)], dtype=dtype, rotary=rotary)
        dense = run_cached(case, guard, build_cache(case, guard, page_size=page_size))
        case.check(dense)
        known = {"max_seqlen_q": queries}
        for bound in ({}, known, {"max_seqlen_q": 1000, "max_seqlen_k": 5000}):
            result = run_cached(case, guard, build_cache(case, guard, page_size=page_size), ragged=True, **bound)
            case.check(result, f"{bound}")
            if bound == known:
                assert_same(result, dense, f"{bound}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_p1_num_splits(guard: Guard, dtype: torch.dtype, ragged: bool) -> None:
    """Any number of parts, more than there are keys too, stays within the bound; sinks are counted once."""
    for queries, heads in ((1, (8, 2)), (9, (14, 2))):
        lengths = [(queries, cached, queries) for cached in (0, 3, 130, 777)]
        case = make_case(lengths, dtype=dtype, heads=heads, sinks=torch.randn(heads[0]) + 2)
        for num_splits in (1, 2, 3, 8, 32):
            cache = build_cache(case, guard, page_size=16, fill=math.nan)
            result = run_cached(case, guard, cache, ragged=ragged, num_splits=num_splits)
            case.check(result, f"{num_splits} splits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_p15_batch_invariant(guard: Guard, dtype: torch.dtype, ragged: bool) -> None:
    """A sequence's bytes do not depend on its neighbours, their order or number, or the capacity of the cache."""
    lengths = [
        (q if ragged else 12, cached, q if ragged else 12) for q, cached in ((3, 700), (40, 0), (1, 129), (17, 64))
    ]
    case = make_case(lengths, dtype=dtype, heads=(8, 2), rotary=make_rotary(64, 1024))

    def run(order: list[int], capacity: int) -> list[Result]:
        part = case.pick(order)
        cache = build_cache(part, guard, page_size=16, capacity=capacity)
        out, lse = run_cached(part, guard, cache, ragged=ragged, batch_invariant=True)
        sizes = [len(q) for q in part.q]
        return list(zip(out.split(sizes), lse.split(sizes, 1)))

    together = run([0, 1, 2, 3], 720)
    case.check((torch.cat([out for out, _ in together]), torch.cat([lse for _, lse in together], 1)))
    for order, capacity in (
        ([3, 2, 1, 0], 720),
        ([1] * 30 + [0], 2000),
        ([0], 720),
        ([1], 720),
        ([2], 720),
        ([3], 720),
    ):
        for b, result in zip(order, run(order, capacity)):
            assert_same(result, together[b], f"sequence {b} of {order}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_one_length_for_all(guard: Guard, dtype: torch.dtype) -> None:
    for queries in (20, 70):
        case = make_case([(queries, 37, queries)] * 2, dtype=dtype)
        expected = run_cached(case, guard, build_cache(case, guard))
        for kind in (torch.int32, torch.int64):
            seqlens = guard.place(torch.tensor(37, dtype=kind))
            assert_same(run_cached(case, guard, build_cache(case, guard), cache_seqlens=seqlens), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_left_padded_batch_equals_each_sequence_alone(guard: Guard, dtype: torch.dtype) -> None:
    """Padded to 30 on the left, with rotary positions counted from the first real token."""
    alone = make_case([(n, 0, n) for n in (30, 11, 1)], dtype=dtype, rotary=make_rotary(64))
    pads = [30 - len(q) for q in alone.q]

    def pad(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([torch.full((n, *x.shape[1:]), math.nan, dtype=dtype), x]) for n, x in zip(pads, parts)]

    q, k, v = (guard.place(torch.stack(pad(part))) for part in (alone.q, alone.k, alone.v))
    assert alone.rotary is not None
    tables = {"rotary_cos": guard.place(alone.rotary.cos), "rotary_sin": guard.place(alone.rotary.sin)}
    leftpad = guard.ints(pads)
    caches = [guard.place(torch.zeros(3, 32, 2, 64, dtype=dtype), writable=True) for _ in range(2)]
    over_cache = {"k_cache": caches[0], "v_cache": caches[1], "cache_seqlens": guard.ints([0, 0, 0])}
    for extra in ({}, over_cache):
        out, lse = gqa_attention_prefill(q, k, v, cache_leftpad=leftpad, return_lse=True, **tables, **extra)
        real = [(b, slice(n, None)) for b, n in enumerate(pads)]
        alone.check((torch.cat([out[at] for at in real]), torch.cat([lse[b, :, rows] for b, rows in real], 1)))
        for b, n in enumerate(pads):
            assert bool((lse[b, :, :n] == -math.inf).all()) and not bool(out[b, :n].any()), "padding rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for batch, queries, capacity in [(0, 3, 8), (2, 0, 8), (2, 3, 0)]:
        q = guard.randn(batch, queries, 4, 64, dtype=dtype)
        caches = [guard.place(torch.full((batch, capacity, 2, 64), math.nan, dtype=dtype)) for _ in range(2)]
        lengths = guard.ints([0] * batch)
        out, lse = gqa_attention_prefill(q, None, None, *caches, cache_seqlens=lengths, return_lse=True)
        assert out.shape == q.shape and not bool(out.any()) and bool((lse == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_ragged_rows_past_the_last_sequence(guard: Guard, dtype: torch.dtype) -> None:
    """P15: a batch padded to a fixed number of tokens: the padding is zero, appends nothing, changes nothing."""
    case = make_case([(6, 10, 6), (1, 3, 1)], dtype=dtype, rotary=make_rotary(64))
    clean = build_cache(case, guard)
    expected = run_cached(case, guard, clean, ragged=True, batch_invariant=True)
    assert case.rotary is not None
    poison = torch.full((4, 4, 64), math.nan, dtype=dtype)
    starts = case.cached
    q = guard.place(torch.cat([*case.q, poison]))
    k = guard.place(torch.cat([*(k[n:] for k, n in zip(case.k, starts)), poison[:, :2]]))
    v = guard.place(torch.cat([*(v[n:] for v, n in zip(case.v, starts)), poison[:, :2]]))
    cache = build_cache(case, guard)
    out, lse = gqa_attention_prefill(
        q,
        k,
        v,
        cache.k,
        cache.v,
        cache_seqlens=cache.seqlens,
        cu_seqlens_q=guard.ints(lengths_to_offsets([6, 1])),
        rotary_cos=guard.place(case.rotary.cos),
        rotary_sin=guard.place(case.rotary.sin),
        return_lse=True,
        batch_invariant=True,
    )
    assert_same((out[:7], lse[:, :7]), expected)
    assert not bool(out[7:].any()) and bool((lse[:, 7:] == -math.inf).all())
    assert same_bytes(cache.k, clean.k) and same_bytes(cache.v, clean.v)
