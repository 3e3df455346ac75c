"""gqa_attention_decode against float64 NumPy, torch SDPA and plain eager PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.attention import make_case, make_rotary
from support.attention_layout import build_cache, run_cached
from support.attention_options import DECODE_PAIRS, name_of, option_case
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.guard import Guard, same_bytes

from gqa_kernels import gqa_attention_decode

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

HEADS = [(1, 1), (3, 3), (4, 2), (24, 8), (4, 1), (7, 1), (21, 3), (8, 1), (32, 1), (71, 1), (142, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}:{heads[1]}")
def test_p1_groups(guard: Guard, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    for queries in (1, 3):
        lengths = [(queries, cached, queries) for cached in (0, 40, 131)]
        case = make_case(lengths, dtype=dtype, heads=heads)
        case.check(run_cached(case, guard, build_cache(case, guard), decode=True), f"{queries} queries")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_head_dim(guard: Guard, dtype: torch.dtype) -> None:
    for head_dim in range(8, 257, 8):
        lengths = [(1, cached, 1) for cached in (0, 17, 70)]
        case = make_case(lengths, dtype=dtype, heads=(4, 2), head_dim=head_dim)
        case.check(run_cached(case, guard, build_cache(case, guard), decode=True), f"head_dim {head_dim}")


@pytest.mark.parametrize("head_dim", [1, 4, 12, 63, 65, 100, 257, 264, 512])
def test_p20_head_dim_refused(device: str, head_dim: int) -> None:
    q = torch.zeros(1, 1, 1, head_dim, device=device)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=rf"^gqa_attention_decode: .*head_dim.*{head_dim}"):
        gqa_attention_decode(q, q, q, cache_seqlens=length)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", range(1, 17))
def test_p1_every_query_count(guard: Guard, dtype: torch.dtype, queries: int) -> None:
    for new in (queries, 0):
        case = make_case([(queries, cached, new) for cached in (0, 1, 15, 16, 63, 64, 65, 200)], dtype=dtype)
        case.check(run_cached(case, guard, build_cache(case, guard), decode=True), f"{new} new keys")


@pytest.mark.parametrize("queries", [0, 17, 64])
def test_p20_query_count_refused(device: str, queries: int) -> None:
    q, cache = torch.zeros(2, queries, 4, 64, device=device), torch.zeros(2, 80, 2, 64, device=device)
    length = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=rf"^gqa_attention_decode: q .*16.*{queries}"):
        gqa_attention_decode(q, cache, cache.clone(), cache_seqlens=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
def test_p1_every_length(guard: Guard, dtype: torch.dtype, queries: int) -> None:
    """Every cached length from 0 to 130, appending or not: queries without a key included."""
    for new in (queries, 0):
        lengths = [(queries, cached, new) for cached in range(131)]
        head_dim = 64 if guard.device == "cuda" else 32
        case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=head_dim)
        for page_size in (None, 16):
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True), f"{new} new keys, pages of {page_size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (40, 0), (0, 0)])
def test_p1_every_key_counts_once(guard: Guard, dtype: torch.dtype, window: tuple[int, int]) -> None:
    """With equal scores exp(lse) is the number of keys and out their share of ones: one key too many shows."""
    for queries in (1, 6):
        lengths = [(queries, cached, queries) for cached in range(131)]
        head_dim = 64 if guard.device == "cuda" else 16
        case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=head_dim, window=window)
        columns = torch.arange(head_dim)
        marks = [(torch.arange(len(v))[:, None] % head_dim == columns).to(dtype)[:, None] for v in case.v]
        case = case.change(q=[q * 0 for q in case.q], v=marks)
        case.check(run_cached(case, guard, build_cache(case, guard), decode=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 64])
def test_p1_lengths_about_powers_of_two(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    for new in (1, 0):
        lengths = [(1, 2**n + i - new, new) for n in range(7, 13) for i in (-1, 0, 1)]
        for head_dim in (64, 96, 128, 256) if guard.device == "cuda" else (32,):
            case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=head_dim)
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True), f"head_dim {head_dim}, {new} new")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_p1_long_caches_of_a_batch(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """All lengths together say how many blocks take part in one sequence: alike, or one long among short ones."""
    on_gpu = guard.device == "cuda"
    long = 8150 if on_gpu else 300
    for new, cached in ((0, [long // 2] * 3), (1, [5, long, 777]), (0, [long, 5, 777, 0, *range(35)])):
        case = make_case([(1, n, new) for n in cached], dtype=dtype, heads=(2, 1), head_dim=head_dim)
        for page_size in (None, 16):
            cache = build_cache(case, guard, page_size=page_size, capacity=16384 if on_gpu else None, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True), f"{len(cached)} sequences, pages of {page_size}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_p1_more_sequences_than_blocks(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """Blocks that are done with one sequence take another."""
    on_gpu = guard.device == "cuda"
    for new in (1, 0):
        lengths = [8150 if on_gpu else 300, 0, 2500, *((37 * b) % 90 for b in range(127 if on_gpu else 9))]
        case = make_case([(1, n, new) for n in lengths], dtype=dtype, heads=(4, 2), head_dim=head_dim)
        for page_size in (64, 7):
            cache = build_cache(case, guard, page_size=page_size, capacity=16384 if on_gpu else None, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True), f"{new} new, pages of {page_size}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (21, 3), (40, 5)], ids=lambda heads: f"{heads[0]}:{heads[1]}")
def test_p1_heads_of_a_block(guard: Guard, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Blocks take two heads with rows that are no whole lines of memory, the last of them perhaps one."""
    for queries, new in ((1, 1), (1, 0), (1 if heads[0] > 21 else 8 * heads[1] // heads[0], 1)):
        case = make_case(
            [(queries, cached, queries if new else 0) for cached in (40, 131, 1000)],
            dtype=dtype,
            heads=heads,
            head_dim=96,
            rotary=make_rotary(96, 1024) if new else None,
            sinks=torch.randn(heads[0]),
        )
        for page_size in (None, 16):
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True), f"{queries} queries, {new} new, {page_size}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_p11_any_cache_at_every_share(device: str, dtype: torch.dtype, head_dim: int) -> None:
    """From one sequence to many, from few blocks a sequence to many: in pages or misaligned, the same bytes."""
    calls = ((1, 4096, 1), (1, 1024, 8), (2, 2048, 3), (9, 640, 1), (40, 256, 2), (1, 2048, 0), (9, 640, 0))
    for batch, capacity, new in calls if device == "cuda" else calls[3:4]:
        guard = Guard(device)
        case = make_case(
            [(max(1, new), capacity - 40 - 7 * (b % 9), new) for b in range(batch)],
            dtype=dtype,
            heads=(4, 2),
            head_dim=head_dim,
            rotary=make_rotary(head_dim, 4096) if new > 0 else None,
        )
        expected = run_cached(case, guard, build_cache(case, guard, capacity=capacity), decode=True)
        if batch > 2:  # a mean over four lse values would be luck
            case.check(expected, f"batch {batch}")
        paged = [build_cache(case, guard, page_size=size, capacity=capacity, fill=math.nan) for size in (16, 7)]
        odd = build_cache(case, guard, capacity=capacity)
        odd.k, odd.v = (guard.place(x, offset=1, writable=True) for x in (odd.k, odd.v))
        for cache in (*paged, odd):
            for part, other in zip(run_cached(case, guard, cache, decode=True), expected):
                assert same_bytes(part, other), (batch, capacity)
        guard.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination", DECODE_PAIRS, ids=name_of)
def test_p1_options(guard: Guard, dtype: torch.dtype, combination: dict[str, Any]) -> None:
    """Contiguous and paged caches give the same bytes, with cos and sin as tables or gathered."""
    for queries, new in ((1, 1), (4, 4), (2, 0)):
        lengths = [(queries, cached, new) for cached in (90, 20, 33, 5, 0)]
        case = option_case(combination, lengths, dtype=dtype)
        result = run_cached(case, guard, build_cache(case, guard, fill=math.nan), decode=True)
        case.check(result, f"{queries} queries, {new} new")
        paged = build_cache(case, guard, page_size=16, fill=math.nan)
        for part, other in zip(result, run_cached(case, guard, paged, decode=True)):
            assert same_bytes(part, other), "paged differs from contiguous"
        if case.rotary is not None:
            gathered = run_cached(case, guard, build_cache(case, guard), decode=True, gathered=True)
            for part, other in zip(result, gathered):
                assert same_bytes(part, other), "gathered tables differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [2, 6, 16, 48, 62, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_p1_rotary_dim(guard: Guard, dtype: torch.dtype, rotary_dim: int, interleaved: bool) -> None:
    case = make_case([(2, cached, 2) for cached in (0, 7, 100)], dtype=dtype)
    for table in {torch.float32, dtype}:
        turned = case.change(rotary=make_rotary(rotary_dim, dtype=table, interleaved=interleaved))
        turned.check(run_cached(turned, guard, build_cache(turned, guard), decode=True), f"{table} tables")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(8, 2), (7, 1), (3, 3)])
def test_p1_matches_sdpa(guard: Guard, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """torch's own attention with GQA broadcasting, in float64, as the reference."""
    case = make_case([(3, cached, 3) for cached in (60, 60)], dtype=dtype, heads=heads)
    q, k, v = (torch.stack(part).double().transpose(1, 2) for part in (case.q, case.k, case.v))
    mask = torch.ones(3, 63, dtype=torch.bool).tril(60)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    out, _ = run_cached(case, guard, build_cache(case, guard), decode=True)
    base, _ = case.baseline(guard.device)
    extra = 20 * max(float(part.abs().max()) for part in case.v)
    assert_within_bound(out, to_numpy(expected.flatten(0, 1)), base, attention_extra=extra)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_one_length_for_all(guard: Guard, dtype: torch.dtype) -> None:
    """cache_seqlens may be int64, or 0-d: one length for every sequence."""
    case = make_case([(2, 37, 2)] * 3, dtype=dtype, rotary=make_rotary(64))
    expected = run_cached(case, guard, build_cache(case, guard), decode=True)
    case.check(expected)
    scalars = [guard.place(torch.tensor(37, dtype=kind)) for kind in (torch.int32, torch.int64)]
    for seqlens in (*scalars, guard.ints([37] * 3, torch.int64), guard.ints([37]).expand(3)):
        result = run_cached(case, guard, build_cache(case, guard), decode=True, cache_seqlens=seqlens)
        for part, other in zip(expected, result):
            assert same_bytes(part, other), f"{seqlens.dtype} {tuple(seqlens.shape)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_p1_num_splits(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    """Any number of parts, more than there are keys too, stays within the bound; sinks are counted once."""
    for queries, heads in ((1, (8, 2)), (4, (7, 1))):
        lengths = [(queries, cached, queries) for cached in (0, 3, 130, 777)]
        case = make_case(lengths, dtype=dtype, heads=heads, sinks=torch.randn(heads[0]) + 2)
        for num_splits in (1, 2, 3, 5, 8, 16, 32):
            cache = build_cache(case, guard, page_size=page_size, fill=math.nan)
            case.check(run_cached(case, guard, cache, decode=True, num_splits=num_splits), f"{num_splits} splits")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [None, 16])
def test_p15_batch_invariant(guard: Guard, dtype: torch.dtype, page_size: int | None, head_dim: int) -> None:
    """A row's bytes do not depend on its neighbours, their order or number, or the capacity of the cache."""
    lengths = [(2, cached, 2) for cached in (700, 3, 129, 0, 64, 255, 1, 500)]
    head_dim = head_dim if guard.device == "cuda" else 32
    case = make_case(lengths, dtype=dtype, heads=(8, 2), head_dim=head_dim, rotary=make_rotary(head_dim, 1024))

    def run(order: list[int], capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = case.pick(order)
        cache = build_cache(part, guard, page_size=page_size, capacity=capacity)
        out, lse = run_cached(part, guard, cache, decode=True, batch_invariant=True)
        return out.unflatten(0, (len(order), 2)), lse.unflatten(1, (len(order), 2))

    out, lse = run(list(range(8)), 704)
    case.check((out.flatten(0, 1), lse.flatten(1)))
    for order, capacity in [([7, 6, 5, 4, 3, 2, 1, 0], 704), ([0] * 40 + [2], 2000), *(([b], 704) for b in range(8))]:
        other_out, other_lse = run(order, capacity)
        assert same_bytes(other_out, out[order]) and same_bytes(other_lse, lse[:, order]), order


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    """No sequence; no key; a cache of capacity 0."""
    for batch, capacity in [(0, 8), (3, 8), (3, 0), (0, 0)]:
        q = guard.randn(batch, 2, 4, 64, dtype=dtype)
        caches = [guard.place(torch.full((batch, capacity, 2, 64), math.nan, dtype=dtype)) for _ in range(2)]
        out, lse = gqa_attention_decode(q, *caches, cache_seqlens=guard.ints([0] * batch), return_lse=True)
        assert out.shape == q.shape and lse.shape == (batch, 4, 2)
        assert not bool(out.any()) and bool((lse == -math.inf).all())
    pool = guard.place(torch.zeros(0, 16, 2, 64, dtype=dtype))
    table, lengths = guard.ints(torch.zeros(3, 4)), guard.ints([0, 0, 0])
    q = guard.randn(3, 1, 4, 64, dtype=dtype)
    out, lse = gqa_attention_decode(q, pool, pool, cache_seqlens=lengths, block_table=table, return_lse=True)
    assert not bool(out.any()) and bool((lse == -math.inf).all())
