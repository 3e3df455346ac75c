"""kv_cache_append: every byte of the cache is what it should be, whatever the metadata."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attention import Case, make_case, make_rotary
from support.attention_layout import INT_MAX, INT_MIN, Cache, build_cache, check_appended, run_cached
from support.bounds import DTYPES
from support.contract import assert_compiles, opcheck
from support.guard import Guard, same_bytes
from support.pairs import pairwise
from torch import Tensor

import gqa_kernels
from gqa_kernels import kv_cache_append, rope

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_cache = pytest.mark.parametrize("page_size", [None, 1, 16])


def new_rows(case: Case, guard: Guard) -> tuple[Tensor, Tensor]:
    k, v = (torch.stack([x[n:] for x, n in zip(part, case.cached)]) for part in (case.k, case.v))
    return guard.place(k), guard.place(v)


def append(case: Case, guard: Guard, cache: Cache, **extra: Any) -> None:
    """Appends the new keys of a case and compares every byte of the cache."""
    k, v = new_rows(case, guard)
    if case.leftpad is not None:
        extra.setdefault("cache_leftpad", guard.ints(case.leftpad))
    if case.rotary is not None:
        extra.setdefault("rotary_cos", guard.place(case.rotary.cos))
        extra.setdefault("rotary_sin", guard.place(case.rotary.sin))
        extra["rotary_interleaved"] = case.rotary.interleaved
        if case.rotary.positions is not None:
            extra["rotary_positions"] = guard.ints(torch.tensor(case.rotary.positions))
    extra = {"cache_seqlens": cache.seqlens, "block_table": cache.block_table, **extra}
    before = cache.k.clone(), cache.v.clone()
    kv_cache_append(k, v, cache.k, cache.v, **extra)
    check_appended(case, cache, before)


@pytest.mark.abi
@every_dtype
@every_cache
@pytest.mark.parametrize("new", [1, 3, 40])
def test_p3_writes_only_the_new_rows(guard: Guard, dtype: torch.dtype, page_size: int | None, new: int) -> None:
    for heads, head_dim in (((2, 2), 64), ((1, 1), 8), ((3, 3), 256), ((8, 8), 72)):
        lengths = [(new, cached, new) for cached in (0, 15, 16, 63)]
        case = make_case(lengths, dtype=dtype, heads=heads, head_dim=head_dim)
        append(case, guard, build_cache(case, guard, page_size=page_size, fill=math.nan))


@every_dtype
@every_cache
@pytest.mark.parametrize("interleaved", [False, True])
def test_p1_rotated(guard: Guard, dtype: torch.dtype, page_size: int | None, interleaved: bool) -> None:
    case = make_case([(5, cached, 5) for cached in (0, 9, 100)], dtype=dtype)
    for rotary_dim in (2, 30, 64):
        for table in {torch.float32, dtype}:
            rotary = make_rotary(rotary_dim, dtype=table, interleaved=interleaved)
            plain = case.change(rotary=rotary)
            append(plain, guard, build_cache(plain, guard, page_size=page_size, fill=math.nan))
            padded = plain.change(leftpad=[2, 9, 50])
            append(padded, guard, build_cache(padded, guard, page_size=page_size, fill=math.nan))
            explicit = make_rotary(
                rotary_dim, dtype=table, interleaved=interleaved, explicit=torch.randint(0, 512, (3, 5)).tolist()
            )
            moved = case.change(rotary=explicit)
            append(moved, guard, build_cache(moved, guard, page_size=page_size))


@every_dtype
def test_rotated_like_rope(guard: Guard, dtype: torch.dtype) -> None:
    """What append writes are the bytes of rope, and those that decode writes."""
    case = make_case([(4, cached, 4) for cached in (0, 7, 100)], dtype=dtype, rotary=make_rotary(64))
    assert case.rotary is not None
    caches = [build_cache(case, guard) for _ in range(2)]
    append(case, guard, caches[0])
    run_cached(case, guard, caches[1], decode=True)
    assert same_bytes(caches[0].k, caches[1].k) and same_bytes(caches[0].v, caches[1].v)
    k, _ = new_rows(case, guard)
    positions = guard.ints([[n + i for i in range(4)] for n in case.cached])
    turned = rope(k, None, guard.place(case.rotary.cos), guard.place(case.rotary.sin), position_ids=positions)
    turned = turned[0] if isinstance(turned, tuple) else turned
    for b, n in enumerate(case.cached):
        assert same_bytes(caches[0].k[b, n : n + 4], turned[b]), b


@every_dtype
@every_cache
def test_gathered_tables(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    case = make_case([(4, cached, 4) for cached in (0, 7, 100)], dtype=dtype, rotary=make_rotary(64))
    assert case.rotary is not None
    rows = torch.tensor([[n + i for i in range(4)] for n in case.cached])
    tables = {"rotary_cos": guard.place(case.rotary.cos[rows]), "rotary_sin": guard.place(case.rotary.sin[rows])}
    append(case, guard, build_cache(case, guard, page_size=page_size), **tables)


@every_dtype
def test_lengths_of_any_kind(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(3, 21, 3)] * 3, dtype=dtype)
    for kind in (torch.int32, torch.int64):
        for seqlens in (guard.ints([21] * 3, kind), guard.place(torch.tensor(21, dtype=kind))):
            append(case, guard, build_cache(case, guard), cache_seqlens=seqlens)
        append(case, guard, build_cache(case, guard, page_size=16, index_dtype=kind))


@every_dtype
@every_cache
def test_p6_bad_lengths(guard: Guard, dtype: torch.dtype, page_size: int | None) -> None:
    """A length out of range drops that sequence's write and no other."""
    case = make_case([(3, cached, 3) for cached in (30, 14, 60)], dtype=dtype, rotary=make_rotary(64))
    for bad in (-1, 62, 65, INT_MAX, INT_MIN, 2**63 - 1, 2**63 - 2, -(2**63)):
        cache = build_cache(case, guard, page_size=page_size, capacity=64)
        kind = torch.int32 if INT_MIN <= bad <= INT_MAX else torch.int64
        append_dropping(case, guard, cache, cache_seqlens=guard.ints([30, bad, 60], kind))


@every_dtype
@pytest.mark.parametrize("page", [-1, "pages", INT_MAX, INT_MIN])
def test_p6_bad_pages(guard: Guard, dtype: torch.dtype, page: int | str) -> None:
    case = make_case([(3, cached, 3) for cached in (30, 16, 60)], dtype=dtype)
    cache = build_cache(case, guard, page_size=16, capacity=64)
    assert cache.block_table is not None
    table = cache.block_table.cpu().clone()
    table[1, 1] = cache.k.shape[0] if page == "pages" else int(page)
    append_dropping(case, guard, cache, block_table=guard.place(table))


def append_dropping(case: Case, guard: Guard, cache: Cache, **extra: Any) -> None:
    """Sequence 1 must write nothing."""
    k, v = new_rows(case, guard)
    if case.rotary is not None:
        extra |= {"rotary_cos": guard.place(case.rotary.cos), "rotary_sin": guard.place(case.rotary.sin)}
    before_k, before_v = cache.k.clone(), cache.v.clone()
    extra = {"cache_seqlens": cache.seqlens, "block_table": cache.block_table, **extra}
    kv_cache_append(k, v, cache.k, cache.v, **extra)
    for b in (0, 2):
        slots = cache.slots(b, range(case.cached[b], len(case.k[b])))
        if case.rotary is None:
            assert same_bytes(cache.k[slots], k[b])
        before_k[slots], before_v[slots] = cache.k[slots], v[b]
    assert same_bytes(cache.k, before_k) and same_bytes(cache.v, before_v)


@every_dtype
def test_p6_bad_position(guard: Guard, dtype: torch.dtype) -> None:
    """A position outside the tables writes NaN for that token."""
    case = make_case([(3, cached, 3) for cached in (30, 16, 60)], dtype=dtype)
    tables = {"rotary_cos": guard.place(make_rotary(64).cos), "rotary_sin": guard.place(make_rotary(64).sin)}
    for position in (512, -1, INT_MAX):
        cache = build_cache(case, guard)
        positions = guard.ints([[1, 2, 3], [4, position, 6], [7, 8, 9]])
        kv_cache_append(
            *new_rows(case, guard), cache.k, cache.v, cache_seqlens=cache.seqlens, rotary_positions=positions, **tables
        )
        assert bool(cache.k[1, 17].isnan().all())
        assert int(cache.k.isnan().sum()) == 2 * 64 and not bool(cache.v.isnan().any())


@every_dtype
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(3, cached, 3) for cached in (0, 9)], dtype=dtype, rotary=make_rotary(64))
    assert case.rotary is not None
    tables = {"rotary_cos": guard.place(case.rotary.cos), "rotary_sin": guard.place(case.rotary.sin)}
    expected = build_cache(case, guard)
    append(case, guard, expected)
    k, v = new_rows(case, guard)
    views = {
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
        "sliced": [torch.cat([x, x], -1)[..., :64] for x in (k, v)],
        "misaligned": [guard.place(x, offset=1) for x in (k, v)],
        "fused": list(torch.cat([k, v], 2).split(2, 2)),
    }
    for name, (k_view, v_view) in views.items():
        for heads_first in (False, True):
            cache = build_cache(case, guard, heads_first=heads_first)
            kv_cache_append(k_view, v_view, cache.k, cache.v, cache_seqlens=cache.seqlens, **tables)
            assert same_bytes(cache.k, expected.k) and same_bytes(cache.v, expected.v), name


@every_dtype
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for batch, new in ((0, 3), (2, 0)):
        rows = guard.randn(batch, new, 2, 64, dtype=dtype)
        caches = [guard.randn(batch, 8, 2, 64, dtype=dtype) for _ in range(2)]
        kv_cache_append(rows, rows, *caches, cache_seqlens=guard.ints([3] * batch))


PATTERNS = pairwise(
    {
        "rotary": ["none", "table", "gathered", "positions"],
        "page_size": [None, 16],
        "leftpad": [False, True],
        "interleaved": [False, True],
    }
)


@every_dtype
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(3, cached, 3) for cached in (0, 9)], dtype=dtype)
    k, v = new_rows(case, guard)
    tables = {"rotary_cos": guard.place(make_rotary(64).cos), "rotary_sin": guard.place(make_rotary(64).sin)}
    op = torch.ops.gqa_kernels.kv_cache_append.default
    for pattern in PATTERNS:
        cache = build_cache(case, guard, page_size=pattern["page_size"])
        options: dict[str, Any] = {"cache_seqlens": cache.seqlens, "block_table": cache.block_table}
        if pattern["leftpad"]:
            options["cache_leftpad"] = guard.ints([1, 2])
        if pattern["rotary"] != "none":
            options |= {**tables, "rotary_interleaved": pattern["interleaved"]}
        if pattern["rotary"] == "gathered":
            options |= {name: guard.place(table[:3][None].cpu()) for name, table in tables.items()}
        if pattern["rotary"] == "positions":
            options["rotary_positions"] = guard.ints([[1, 2, 3], [4, 5, 6]])
        opcheck(op, (k, v, cache.k.clone(), cache.v.clone()), options)


def test_p17_compile(guard: Guard) -> None:
    case = make_case([(3, cached, 3) for cached in (0, 9)])
    k, v = new_rows(case, guard)
    cache = build_cache(case, guard)

    def function(k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        caches = torch.zeros_like(cache.k), torch.zeros_like(cache.v)
        kv_cache_append(k, v, *caches, cache_seqlens=lengths)
        return caches

    assert_compiles(function, k, v, cache.seqlens)


def test_p6_validation_names_the_index(device: str) -> None:
    rows, caches = torch.zeros(3, 2, 2, 64, device=device), [torch.zeros(3, 16, 2, 64, device=device) for _ in range(2)]
    with gqa_kernels.validation():
        kv_cache_append(rows, rows, *caches, cache_seqlens=torch.tensor([0, 14, 5], device=device))
        for bad in (15, -1):
            lengths = torch.tensor([0, 5, bad], device=device)
            with pytest.raises(RuntimeError, match=rf"^kv_cache_append: cache_seqlens\[2\].*{bad}"):
                kv_cache_append(rows, rows, *caches, cache_seqlens=lengths)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"k": (3, 2, 64)}, "k"),
        ({"k": (3, 2, 3, 64), "v": (3, 2, 3, 64)}, "k"),
        ({"v": (3, 1, 2, 64)}, "v"),
        ({"k": (3, 2, 2, 60), "v": (3, 2, 2, 60), "k_cache": (3, 16, 2, 60), "v_cache": (3, 16, 2, 60)}, "head_dim"),
        ({"k_cache": (2, 16, 2, 64), "v_cache": (2, 16, 2, 64)}, "k_cache"),
        ({"v_cache": (3, 15, 2, 64)}, "v_cache"),
    ],
)
def test_p20_refused_shapes(device: str, change: dict[str, tuple[int, ...]], word: str) -> None:
    shapes = {"k": (3, 2, 2, 64), "v": (3, 2, 2, 64), "k_cache": (3, 16, 2, 64), "v_cache": (3, 16, 2, 64), **change}
    tensors = [torch.zeros(shape, device=device) for shape in shapes.values()]
    with pytest.raises(RuntimeError, match=rf"^kv_cache_append: .*\b{word}\b.*got"):
        kv_cache_append(*tensors, cache_seqlens=torch.zeros(3, dtype=torch.int32, device=device))


def test_p20_refused_dtypes(device: str) -> None:
    rows, lengths = torch.zeros(3, 2, 2, 64, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    caches = [torch.zeros(3, 16, 2, 64, device=device) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"^kv_cache_append: .*float16"):
        kv_cache_append(rows, rows, caches[0].half(), caches[1].half(), cache_seqlens=lengths)
    with pytest.raises(RuntimeError, match=r"^kv_cache_append: cache_seqlens .*float32"):
        kv_cache_append(rows, rows, *caches, cache_seqlens=lengths.float())
    with pytest.raises(RuntimeError, match=r"^kv_cache_append: k_scale"):
        kv_cache_append(rows, rows, *caches, cache_seqlens=lengths, k_scale=torch.ones(1, device=device))
    with pytest.raises(RuntimeError, match=r"^kv_cache_append: .*grad"):
        kv_cache_append(rows.requires_grad_(), rows, *caches, cache_seqlens=lengths)
