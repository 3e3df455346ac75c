"""Attention over float8_e4m3fn and int8 caches: against float64 of what the cache holds, and of what it was made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attention import make_case, make_rotary
from support.attention_layout import Cache, build_cache
from support.attention_options import DECODE_PAIRS, OPTION_PAIRS, name_of, option_case
from support.guard import Guard, same_bytes
from support.quantized import (
    FORMATS,
    LARGEST,
    Quantized,
    check_unquantized,
    dequantize,
    movable,
    place_cache,
    quantize,
    run_quantized,
    same_cache,
)

import gqa_kernels
from gqa_kernels import KVCache, PagedKVCache, gqa_attention_decode, gqa_attention_prefill, kv_cache_append

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
every_format = pytest.mark.parametrize("kind", FORMATS, ids=str)
NAN_BYTE = 0x7F  # e4m3's NaN; the largest number of int8


def cache_of(x: Quantized, guard: Guard, *, page_size: int | None = None, capacity: int | None = None) -> Cache:
    layout = build_cache(x.case, guard, page_size=page_size, capacity=capacity)
    return place_cache(x, layout, guard, fill=NAN_BYTE)


def check(x: Quantized, guard: Guard, what: str = "", *, decode: bool = True, **layout: Any) -> None:
    cache = cache_of(x, guard, **layout)
    result = run_quantized(x, guard, cache, decode=decode)
    x.attended(cache).check(result, what)


@every_dtype
@every_format
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (24, 8), (8, 1), (16, 1), (21, 3), (71, 1)], ids=str)
def test_p1_groups(guard: Guard, dtype: torch.dtype, kind: torch.dtype, heads: tuple[int, int]) -> None:
    for queries, new in ((1, 1), (3, 3), (1, 0)):
        case = make_case([(queries, cached, new) for cached in (3, 40, 131)], dtype=dtype, heads=heads)
        for per_head in (False, True):
            check(Quantized.fit(case, kind, per_head=per_head), guard, f"{queries} queries, {new} new")


@every_dtype
@every_format
def test_p1_head_dim(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    for head_dim in (8, 16, 40, 64, 72, 96, 104, 128, 192, 256):
        case = make_case([(1, cached, 1) for cached in (0, 17, 70)], dtype=dtype, head_dim=head_dim)
        x = Quantized.fit(case, kind, per_head=True)
        check(x, guard, f"head_dim {head_dim}")
        check(x, guard, f"head_dim {head_dim} in pages", page_size=16)


@every_dtype
@every_format
@pytest.mark.parametrize("head_dim", [64, 96])
def test_p1_heads_of_a_block(guard: Guard, dtype: torch.dtype, kind: torch.dtype, head_dim: int) -> None:
    """Blocks take several heads with narrow rows, the last of them perhaps fewer."""
    for heads in ((1, 1), (3, 3), (14, 2), (35, 5)):
        for queries, new in ((1, 1), (1, 0), (2 if heads[0] < 7 else 1, 1)):
            lengths = [(queries, cached, queries if new else 0) for cached in (40, 131, 1000)]
            case = make_case(lengths, dtype=dtype, heads=heads, head_dim=head_dim, sinks=torch.randn(heads[0]))
            for page_size in (None, 16):
                check(Quantized.fit(case, kind, per_head=True), guard, f"{heads}, {new} new", page_size=page_size)


@every_dtype
@every_format
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_p1_unlike_lengths(guard: Guard, dtype: torch.dtype, kind: torch.dtype, head_dim: int) -> None:
    """All lengths together say how many blocks take part in one sequence."""
    on_gpu = guard.device == "cuda"
    for new in (1, 0):
        lengths = [16200 if on_gpu else 300, 5, 777, 0, *((37 * b) % 90 for b in range(120 if on_gpu else 9))]
        case = make_case([(1, n, new) for n in lengths], dtype=dtype, heads=(4, 2), head_dim=head_dim)
        capacity = 32768 if on_gpu else None
        check(Quantized.fit(case, kind, per_head=True), guard, f"{new} new", page_size=64, capacity=capacity)


@every_dtype
@every_format
def test_p1_every_length(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Every length about the edges of tiles, with whatever bytes where no key is."""
    for queries, new in ((1, 1), (1, 0), (5, 5), (2, 0)):
        lengths = [
            (queries, cached, new)
            for cached in [*range(max(queries - new, 1), 20), 31, 32, 33, 63, 64, 65, 127, 128, 129]
        ]
        case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=64 if guard.device == "cuda" else 32)
        x = Quantized.fit(case, kind, per_head=False)
        for page_size in (None, 16, 7):
            check(x, guard, f"{queries} queries, {new} new, pages of {page_size}", page_size=page_size)


@every_dtype
@every_format
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_p11_any_cache_at_every_share(device: str, dtype: torch.dtype, kind: torch.dtype, head_dim: int) -> None:
    """From one sequence to many, from few blocks a sequence to many: in pages or misaligned, the same bytes."""
    calls = ((1, 4096, 1), (1, 1024, 0), (2, 2048, 3), (9, 640, 1), (40, 256, 2))
    for batch, capacity, new in calls if device == "cuda" else calls[3:4]:
        guard = Guard(device)
        queries = max(1, new)
        case = make_case(
            [(queries, capacity - 40 - 7 * (b % 9), new) for b in range(batch)],
            dtype=dtype,
            heads=(4, 2),
            head_dim=head_dim,
            rotary=make_rotary(head_dim, 4096) if new > 0 else None,
        )
        x = Quantized.fit(case, kind, per_head=True, headroom=1.5)
        cache = cache_of(x, guard, capacity=capacity)
        expected = run_quantized(x, guard, cache, decode=True)
        if batch > 2:  # a mean over four lse values would be luck
            x.attended(cache).check(expected, f"batch {batch}")
        others = [cache_of(x, guard, page_size=size, capacity=capacity) for size in (16, 7)]
        odd = cache_of(x, guard, capacity=capacity)
        odd.k, odd.v = (guard.place(part, offset=1, writable=True) for part in (odd.k, odd.v))
        for other in (*others, odd):
            for part, wanted in zip(run_quantized(x, guard, other, decode=True), expected):
                assert same_bytes(part, wanted), (batch, capacity)
        guard.check()


@every_dtype
@every_format
@pytest.mark.parametrize("combination", DECODE_PAIRS, ids=name_of)
def test_p1_options(guard: Guard, dtype: torch.dtype, kind: torch.dtype, combination: dict[str, Any]) -> None:
    """Windows, softcap, sinks, padding, rotation and scale, each pair of them; contiguous and paged alike."""
    for queries, new in ((1, 1), (4, 4), (2, 0)):
        case = option_case(combination, [(queries, n, new) for n in (90, 20, 33, 5, 2)], dtype=dtype)
        x = Quantized.fit(case, kind, per_head=True, headroom=1.5)
        cache = cache_of(x, guard)
        result = run_quantized(x, guard, cache, decode=True)
        x.attended(cache).check(result, f"{queries} queries, {new} new")
        paged = run_quantized(x, guard, cache_of(x, guard, page_size=16), decode=True)
        for part, other in zip(result, paged):
            assert same_bytes(part, other), "paged differs from contiguous"


@every_dtype
@every_format
@pytest.mark.parametrize("combination", OPTION_PAIRS[::3], ids=name_of)
def test_p1_prefill(guard: Guard, dtype: torch.dtype, kind: torch.dtype, combination: dict[str, Any]) -> None:
    """Chunked prefill over a quantised prefix, and prefill that is the first to fill the cache."""
    case = option_case(combination, [(40, 50, 40), (40, 0, 40), (40, 7, 40)], dtype=dtype)
    x = Quantized.fit(case, kind, per_head=True, headroom=1.5)
    for page_size in (None, 16):
        check(x, guard, f"pages of {page_size}", decode=False, page_size=page_size)


@every_dtype
@every_format
def test_p1_long(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    lengths = [(1, n, 1) for n in ((4000, 1023, 2100, 517) if guard.device == "cuda" else (1023, 517))]
    for head_dim in (64, 128) if guard.device == "cuda" else (32,):
        case = make_case(lengths, dtype=dtype, heads=(8, 2), head_dim=head_dim)
        check(Quantized.fit(case, kind, per_head=True), guard)


@every_dtype
@every_format
@pytest.mark.parametrize("per_head", [False, True])
def test_p1_distance_to_the_unquantised(guard: Guard, dtype: torch.dtype, kind: torch.dtype, per_head: bool) -> None:
    """Worst and typical distance follow from the format's step."""
    for queries, new in ((1, 1), (4, 4), (1, 0)):
        case = make_case([(queries, n, new) for n in (300, 77, 20)], dtype=dtype, heads=(8, 2), head_dim=64)
        x = Quantized.fit(case, kind, per_head=per_head)
        check_unquantized(x, run_quantized(x, guard, cache_of(x, guard), decode=True))


@every_dtype
@every_format
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e3])
def test_p1_queries_of_any_size(guard: Guard, dtype: torch.dtype, kind: torch.dtype, size: float) -> None:
    """Queries far outside of float16's range, in some rows: bfloat16 has them, and each row is for itself."""
    case = make_case([(2, 70, 0), (2, 33, 0)], dtype=dtype, heads=(6, 2))
    if dtype == torch.float16 and size < 1e-3:
        size = 1e-4
    case = case.change(q=[torch.cat([q[:1] * size, q[1:]]) for q in case.q], scale=0.125 / max(size, 1.0))
    check(Quantized.fit(case, kind, per_head=True), guard)


@every_dtype
@every_format
def test_p1_weights_far_below_the_largest_count(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    """One key of weight 1, thousands of 2^-17 each: together they are worth what they are."""
    keys = 4096 if guard.device == "cuda" else 1024
    case = make_case([(1, keys, 0)] * 2, dtype=dtype, heads=(4, 1), head_dim=64, scale=1.0)
    for b in range(2):
        case.q[b].zero_()[..., 0] = 1.0
        case.k[b].zero_()[..., 0] = -11.0
        case.k[b][100 + b, :, 0] = 0.0
        case.v[b].fill_(1.0)
        case.v[b][100 + b] = 0.0
    check(Quantized(case, kind, torch.ones(1), torch.ones(1)), guard)


@every_dtype
@every_format
def test_p1_append(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Nearest even, held within the largest number, NaN as documented: the bytes of torch's own conversion."""
    largest = LARGEST[kind]
    special = [
        0.0,
        -0.0,
        largest,
        -largest,
        1.5 * largest,
        -100 * largest,
        math.inf,
        -math.inf,
        math.nan,
        0.5,
        1.5,
        2.5,
    ]
    special += [-0.5, -1.5, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 2.0**-14, 17.0, 19.0, 248.0, 232.0, 464.0, 126.5, 127.5]
    values = torch.cat([torch.tensor(special), torch.randn(1000) * 10, torch.linspace(-500, 500, 1000)])[:2016]
    k = values.to(dtype).view(3, 7, 2, 48)
    v = k.flip(0).contiguous()
    for scale in (torch.tensor([1.0]), torch.tensor(0.37), torch.tensor([0.01, 3.0])):
        for page_size in (None, 5):
            caches = [torch.full((3, 20, 2, 48) if page_size is None else (12, 5, 2, 48), 0x55, dtype=torch.uint8)] * 2
            placed = [guard.place(x.view(kind), writable=True) for x in caches]
            table = None if page_size is None else guard.ints(torch.randperm(12).view(3, 4))
            start = [0, 13, 4]
            kv_cache_append(
                *(guard.place(x) for x in (k, v)),
                *placed,
                cache_seqlens=guard.ints(start),
                block_table=table,
                k_scale=guard.place(scale),
                v_scale=guard.place(scale * 2),
            )
            cache = Cache(placed[0], placed[1], guard.ints(start), table)
            for x, to, s in ((k, placed[0], scale), (v, placed[1], scale * 2)):
                expected = caches[0].clone()
                for b in range(3):
                    expected[cache.slots(b, range(start[b], start[b] + 7))] = movable(quantize(x[b], s, kind))
                assert torch.equal(movable(to).cpu(), expected)


@every_dtype
@every_format
def test_p8_nan_in_the_cache(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Of e4m3: a NaN reaches those that attend to it, and nobody else."""
    case = make_case([(2, 70, 0), (2, 33, 0)], dtype=dtype, heads=(4, 2))
    x = Quantized.fit(case, kind, per_head=True)
    cache = cache_of(x, guard)
    expected = run_quantized(x, guard, cache, decode=True)
    with_nan = [movable(part).clone() for part in (cache.k, cache.v)]
    for part in with_nan:
        part[0, 69, 1, 5] = NAN_BYTE  # the second token's alone, under the second KV head
    other = Cache(*(guard.place(part.view(kind)) for part in with_nan), cache.seqlens, None)
    for part, wanted in zip(run_quantized(x, guard, other, decode=True), expected):
        got, wanted = (rows if rows.dim() == 3 else rows.T for rows in (part, wanted))  # tokens first
        for index in (0, slice(2, None), (1, slice(2))):
            assert same_bytes(got[index], wanted[index])
        if kind == torch.float8_e4m3fn:
            assert bool(got[1, 2:].flatten(1).isnan().any(-1).all() if got.dim() == 3 else got[1, 2:].isnan().all())


@every_dtype
@every_format
@pytest.mark.parametrize("page_size", [16, 7])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_p6_bad_pages(guard: Guard, dtype: torch.dtype, kind: torch.dtype, page_size: int, head_dim: int) -> None:
    """A page that does not exist makes the rows that reach it NaN and takes no write; others keep their bytes."""
    for queries, new in ((1, 0), (1, 1), (3, 3)):
        case = make_case([(queries, n, new) for n in (90, 41, 60)], dtype=dtype, heads=(4, 2), head_dim=head_dim)
        x = Quantized.fit(case, kind, per_head=True, headroom=1.2)
        good = cache_of(x, guard, page_size=page_size)
        expected = [part.cpu() for part in run_quantized(x, guard, good, decode=True)]
        for bad_id in (-1, 10**6):
            for key in (0, 40, 89):
                cache = cache_of(x, guard, page_size=page_size)
                assert cache.block_table is not None
                table = cache.block_table.clone()
                table[0, key // page_size] = bad_id
                out, lse = gqa_attention_decode(
                    **{
                        **({"k": stack_new(x, guard, "k"), "v": stack_new(x, guard, "v")} if new else {}),
                        "q": guard.place(torch.stack(case.q)),
                        "k_cache": cache.k,
                        "v_cache": cache.v,
                        "cache_seqlens": cache.seqlens,
                        "block_table": table,
                        "return_lse": True,
                        **x.scales(guard),
                    }
                )
                assert bool(out[0].isnan().all()) and bool(lse[0].isnan().all()), (bad_id, key)
                assert same_bytes(out[1:].flatten(0, 1).cpu(), expected[0][queries:]), (bad_id, key)


def stack_new(x: Quantized, guard: Guard, name: str) -> torch.Tensor:
    parts = getattr(x.case, name)
    return guard.place(torch.stack([part[n:] for part, n in zip(parts, x.case.cached)]))


@every_dtype
@every_format
def test_p6_bad_lengths(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    case = make_case([(1, 20, 1)] * 3, dtype=dtype)
    x = Quantized.fit(case, kind, per_head=False)
    cache = cache_of(x, guard, capacity=24)
    before = movable(cache.k).clone()
    out = gqa_attention_decode(
        guard.place(torch.stack(case.q)),
        cache.k,
        cache.v,
        stack_new(x, guard, "k"),
        stack_new(x, guard, "v"),
        cache_seqlens=guard.ints([-1, 20, 24]),
        **x.scales(guard),
    )
    assert bool(out[0].isnan().all()) and bool(out[2].isnan().all()) and bool(out[1].isfinite().all())
    assert torch.equal(movable(cache.k)[[0, 2]], before[[0, 2]])


@every_dtype
@every_format
@pytest.mark.parametrize("paged", [False, True])
def test_p13_caches(device: str, dtype: torch.dtype, kind: torch.dtype, paged: bool) -> None:
    """A cache that owns its scales: append, attend, fork, grow and crop are those of the ops."""
    make: Any = PagedKVCache if paged else KVCache
    scales = torch.rand(2, 3) * 0.02 + 0.02
    cache = make(2, 2, 64, 3, 32, dtype=kind, device=device, num_q_heads=6, k_scale=scales, v_scale=0.03)
    assert cache.dtype == kind and cache.bytes_allocated == cache.layer(0)[0].numel() * 4
    k, v = (torch.randn(2, 40, 3, 32).to(dtype).to(device) for _ in range(2))
    q = torch.randn(2, 40, 6, 32).to(dtype).to(device)
    first = [cache.attend(layer, q, k, v) for layer in range(2)]
    cache.advance(40)
    other = cache.fork()
    if not paged:
        other.grow(128)
    token = [x[:, :1] * 0.5 for x in (q, k, v)]
    for layer in range(2):
        alone = [
            place(quantize(x.cpu(), s, kind), device)
            for x, s in (
                (torch.cat([k, token[1]], 1), scales[layer]),
                (torch.cat([v, token[2]], 1), torch.tensor([0.03])),
            )
        ]
        given = {"k_scale": scales[layer].to(device), "v_scale": torch.tensor(0.03, device=device)}
        length = torch.tensor(40, dtype=torch.int32, device=device)
        wanted = gqa_attention_prefill(q, None, None, *(x[:, :40] for x in alone), cache_seqlens=length, **given)
        torch.testing.assert_close(first[layer].float(), wanted.float(), rtol=0.02, atol=0.01)
        wanted = gqa_attention_decode(token[0], *alone, cache_seqlens=length + 1, **given)
        for each in (cache, other):
            torch.testing.assert_close(each.attend(layer, *token).float(), wanted.float(), rtol=0.02, atol=0.01)


def place(x: torch.Tensor, device: str) -> torch.Tensor:
    return movable(x.contiguous()).to(device).view(x.dtype)


def test_p20_refused(device: str) -> None:
    """Misuse, each by name."""

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=torch.uint8 if dtype in FORMATS else dtype).view(dtype)

    e4m3 = torch.float8_e4m3fn
    q, fp8, int8 = zeros(2, 1, 4, 64), zeros(2, 16, 2, 64, dtype=e4m3), zeros(2, 16, 2, 64, dtype=torch.int8)
    one, length = torch.ones(1, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    cases: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], str]] = [
        (q.float(), fp8, fp8, {}, r"q must be float16 or bfloat16 where k_cache is float8_e4m3fn, got float32"),
        (q, fp8, int8, {}, r"v_cache must have the dtype of k_cache \(float8_e4m3fn\), got int8"),
        (q, fp8.view(torch.float8_e5m2), fp8, {}, r"k_cache must have the dtype of q \(bfloat16\), got float8_e5m2"),
        (q, fp8.view(torch.uint8), fp8, {}, r"k_cache must have the dtype of q \(bfloat16\), got uint8"),
        (q, fp8.bfloat16(), fp8.bfloat16(), {"k_scale": one}, r"k_scale must be None unless k_cache is .*int8"),
        (q, fp8, fp8, {"k_scale": one.double()}, r"k_scale must be float32, got float64"),
        (q, int8, int8, {"v_scale": one.expand(3)}, r"v_scale must be one element, or \[num_kv_heads\] = \[2\], got"),
        (q, int8, int8, {"v_scale": one.view(1, 1)}, r"v_scale must be one element, .*\[1, 1\]"),
    ]
    for query, k, v, scales, message in cases:
        with pytest.raises(RuntimeError, match=r"^gqa_attention_decode: " + message):
            gqa_attention_decode(query, k, v, cache_seqlens=length, **scales)
    with pytest.raises(RuntimeError, match=r"^kv_cache_append: k must be float16 or bfloat16 where k_cache is int8"):
        kv_cache_append(q[:, :, :2].float(), q[:, :, :2].float(), int8, int8, cache_seqlens=length)
    with pytest.raises(RuntimeError, match=r"KVCache: k_scale must be None unless dtype"):
        KVCache(1, 1, 16, 2, 64, dtype=torch.bfloat16, device=device, k_scale=1.0)
    with pytest.raises(RuntimeError, match=r"KVCache: v_scale must be one number, .* = \[1, 2\], got shape \[3\]"):
        KVCache(1, 1, 16, 2, 64, dtype=torch.int8, device=device, v_scale=torch.ones(3))


@every_format
def test_explained(device: str, kind: torch.dtype) -> None:
    """The plan names the dtype of the cache."""
    q = torch.empty(2, 1, 8, 128, dtype=torch.bfloat16)
    cache, length = torch.empty(2, 4096, 2, 128, dtype=kind), torch.zeros(2, dtype=torch.int32)
    plan = gqa_kernels.explain("gqa_attention_decode", q, cache, cache, cache_seqlens=length, device="cuda")
    text = str(plan)
    assert str(kind).removeprefix("torch.") in text, text


@every_format
@pytest.mark.parametrize("page_size", [None, 16])
def test_p23_replayed(guard: Guard, kind: torch.dtype, page_size: int | None) -> None:
    """A captured append and its attention, replayed at other lengths and scales, is the eager call."""
    if guard.device != "cuda":
        return
    case = make_case([(1, 60, 1), (1, 60, 1)], dtype=torch.bfloat16, heads=(8, 2), head_dim=128)
    x = Quantized.fit(case, kind, per_head=True, headroom=2.0)
    cache = cache_of(x, guard, page_size=page_size)
    scales, q = x.scales(guard), guard.place(torch.stack(case.q))
    new = {name: stack_new(x, guard, name) for name in "kv"}
    movable(cache.k).fill_(0x31), movable(cache.v).fill_(0x32)

    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where = {"cache_seqlens": lengths, "block_table": cache.block_table}
        out: torch.Tensor = gqa_attention_decode(q, k, v, **new, **where, **scales)
        return out

    lengths = torch.tensor([1, 1], dtype=torch.int32, device=guard.device)
    run(cache.k, cache.v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(cache.k, cache.v)
    for step in range(20):
        lengths.copy_(torch.tensor([3 * step, 59 - step]))
        again = [movable(part).clone().view(kind) for part in (cache.k, cache.v)]
        graph.replay()
        assert same_bytes(run(*again), out), step
        assert same_cache(again[0], cache.k) and same_cache(again[1], cache.v), step


@every_dtype
@every_format
def test_p13_append_then_read(guard: Guard, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Appending in the call and before it give the same bytes of cache; attention over them stays within the bound."""
    case = make_case([(1, 33, 1), (1, 5, 1)], dtype=dtype, rotary=make_rotary(64))
    x = Quantized.fit(case, kind, per_head=True, headroom=1.5)
    together, apart = cache_of(x, guard), cache_of(x, guard)
    run_quantized(x, guard, together, decode=True)
    kv_cache_append(
        stack_new(x, guard, "k"),
        stack_new(x, guard, "v"),
        apart.k,
        apart.v,
        cache_seqlens=apart.seqlens,
        rotary_cos=guard.place(case.rotary.cos),  # type: ignore[union-attr]
        rotary_sin=guard.place(case.rotary.sin),  # type: ignore[union-attr]
        **x.scales(guard),
    )
    assert same_cache(together.k, apart.k) and same_cache(together.v, apart.v)


def test_p1_dequantize_is_exact(device: str) -> None:
    """The reference's own arithmetic: every stored number is itself."""
    every = torch.arange(256, dtype=torch.uint8)
    for kind in FORMATS:
        values = dequantize(every.view(kind).view(256, 1, 1), torch.ones(1)).flatten()
        again = quantize(values.float().view(256, 1, 1), torch.ones(1), kind).flatten()
        keep = values.isfinite() & (values != -128)
        assert torch.equal(movable(again)[keep], every[keep])
