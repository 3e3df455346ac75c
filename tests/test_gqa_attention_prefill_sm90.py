"""Attention over many rows, which warpgroups serve on sm_90; and which calls they take: a pure function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.attention import Case, make_case
from support.attention_layout import build_cache, packed, run_cached, run_prefill
from support.guard import Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

from gqa_kernels import gqa_attention_prefill
from gqa_kernels._library import C
from gqa_kernels.explain import H200

NAN = float("nan")
HALVES = [torch.float16, torch.bfloat16]
HEADS = [(2, 2), (8, 2), (7, 1)]
LENGTHS = [(64, 64), (65, 1), (127, 175), (128, 176), (129, 177), (191, 129), (193, 385), (257, 100), (400, 399)]
LENGTHS += [(128, 128), (256, 256), (300, 300), (100, 355), (384, 640)]

every_half = pytest.mark.parametrize("dtype", HALVES)
every_width = pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
every_mask = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def _served_by_warpgroups(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every call of a test over tensors."""
    with hopper(request.getfixturevalue("guard").device) if "guard" in request.fixturenames else nullcontext():
        yield


def dense_case(
    queries: int,
    keys: int,
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
) -> Case:
    return make_case([(queries, 0, keys)] * batch, dtype=dtype, heads=heads, head_dim=head_dim, causal=causal)


@every_half
@every_width
@every_mask
@pytest.mark.parametrize("heads", HEADS)
def test_p1_lengths(guard: Guard, dtype: torch.dtype, head_dim: int, causal: bool, heads: tuple[int, int]) -> None:
    few = guard.device == "cpu" or heads != (8, 2)
    for queries, keys in LENGTHS[2:6] if few else LENGTHS:
        case = dense_case(queries, keys, dtype, head_dim, causal, heads)
        case.check(run_prefill(case, guard, return_lse=True), f"{queries} queries, {keys} keys")


@every_half
@every_mask
@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 104, 120, 136, 192, 248])
def test_p1_widths_between_tiles(guard: Guard, dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """Columns past head_dim are another head's, or NaN beside the last one: neither read nor written."""
    for queries, keys in LENGTHS[4:8] if guard.device == "cuda" else LENGTHS[3:4]:
        case = dense_case(queries, keys, dtype, head_dim, causal, (6, 3))
        case.check(run_prefill(case, guard, return_lse=True), f"{queries} queries, {keys} keys")
    case = dense_case(129, 177, dtype, head_dim, causal, (3, 3))
    wide = []
    for x in (case.q, case.k, case.v):
        rows = torch.full((2, x[0].shape[0], 3, head_dim + 8), NAN, dtype=dtype, device=guard.device)
        rows[..., :head_dim] = torch.stack(x).to(guard.device)
        wide.append(rows[..., :head_dim])
    case.check(packed(*gqa_attention_prefill(*wide, causal=causal, return_lse=True)), "beside NaN")


@every_half
@every_width
@every_mask
def test_p1_large_scores(guard: Guard, dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """Maxima far apart and growing towards either end; weights are rescaled block by block, or overflow."""
    for factor in (8.0, 60.0):
        keys = 900 if guard.device == "cuda" else 380
        case = dense_case(130, keys, dtype, head_dim, causal, batch=1)
        ramp = torch.linspace(0.1, factor, keys)[:, None, None]
        for keys in (case.k[0] * ramp, case.k[0] * ramp.flip(0)):
            steep = case.change(k=[keys.to(dtype)])
            steep.check(run_prefill(steep, guard, return_lse=True), f"factor {factor}")


@every_half
@every_width
@every_mask
def test_p11_strided_views_and_slack(guard: Guard, dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """The same bytes from every layout with aligned rows; NaN in slack and past the end is not read."""
    case = dense_case(130, 200, dtype, head_dim, causal)
    tensors = {name: guard.place(torch.stack(getattr(case, name))) for name in ("q", "k", "v")}
    expected = run_prefill(case, guard, return_lse=True)
    case.check(expected)
    for name, x in tensors.items():
        batch, tokens, heads, dim = x.shape
        wide = torch.full((batch + 1, tokens + 5, heads + 1, 2 * dim), NAN, dtype=dtype, device=x.device)
        wide[:batch, :tokens, :heads, :dim] = x
        views = {
            "slack": wide[:batch, :tokens, :heads, :dim],
            "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
            "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        }
        for what, view in views.items():
            result = packed(*gqa_attention_prefill(**{**tensors, name: view}, causal=causal, return_lse=True))
            for part, other in zip(result, expected):
                assert same_bytes(part, other), f"{name} {what}"
    alone = gqa_attention_prefill(*(x[1:] for x in tensors.values()), causal=causal)
    assert same_bytes(alone.flatten(0, 1), expected[0][130:]), "bytes depend on the batch"


@every_half
@every_width
def test_p8_nan_stays_in_its_head_and_sequence(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    case = dense_case(130, 200, dtype, head_dim, causal=False)
    q, k, v = (guard.place(torch.stack(x), writable=True) for x in (case.q, case.k, case.v))
    clean = gqa_attention_prefill(q, k, v, causal=False)
    v[0, 7, 1, 3] = NAN
    out = gqa_attention_prefill(q, k, v, causal=False)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, :, 2:, 3] = True
    assert bool(out[hit].isnan().all())
    assert same_bytes(out[~hit], clean[~hit])
    v[0, 7, 1, 3] = 0
    q[1, 64, 3, 0] = NAN
    out = gqa_attention_prefill(q, k, v, causal=False)
    assert bool(out[1, 64, 3].isnan().all())
    assert bool(out[1, :64].isfinite().all()) and bool(out[1, 65:].isfinite().all())


@every_half
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_p8_values_reach_who_attends_to_them(guard: Guard, dtype: torch.dtype, head_dim: int, poison: float) -> None:
    """A value that is not finite, in a block that some rows see: those, and no others."""
    for queries, keys, at in [(300, 300, 17), (300, 300, 150), (300, 300, 255), (300, 300, 299), (70, 400, 350)]:
        case = dense_case(queries, keys, dtype, head_dim, causal=True)
        q, k, v = (guard.place(torch.stack(x), writable=True) for x in (case.q, case.k, case.v))
        clean, clean_lse = gqa_attention_prefill(q, k, v, return_lse=True)
        v[1, at, 0, 5] = poison
        out, lse = gqa_attention_prefill(q, k, v, return_lse=True)
        hit = torch.zeros_like(out, dtype=torch.bool)
        hit[1, max(0, at - keys + queries) :, :2, 5] = True
        assert same_bytes(out[~hit], clean[~hit]) and same_bytes(lse, clean_lse), (queries, keys, at)
        got = out[hit]
        assert bool(got.isnan().all() if poison != poison else (got == poison).all()), (queries, keys, at)


@every_half
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 256])
def test_p15_neighbours_do_not_decide_over_bytes(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """Rows whose weights overflow, or are NaN, leave the rows beside them as they are."""
    case = dense_case(128, 900, dtype, head_dim, causal=False, batch=1)
    q, k, v = (guard.place(torch.stack(x), writable=True) for x in (case.q, case.k, case.v))
    q[0, ::2] = 0
    k[0, ::7] *= 30
    clean = gqa_attention_prefill(q, k, v, causal=False)
    for value in (1.0, 50.0, 3000.0, NAN):
        q[0, ::2] = value
        out = gqa_attention_prefill(q, k, v, causal=False)
        assert same_bytes(out[0, 1::2], clean[0, 1::2]), value


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": (100, -1)},
    {"window": (30, 20), "causal": False},
    {"softcap": 20.0},
    {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0])},
    {"scale": -0.1},
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(options) or "plain"


@every_half
@every_width
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_p1_options_and_ragged(guard: Guard, dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> None:
    case = make_case([(300, 0, 300)] * 2, dtype=dtype, head_dim=head_dim, **options)
    dense = run_prefill(case, guard, return_lse=True)
    case.check(dense, "dense")
    for part, other in zip(dense, run_prefill(case, guard, ragged=True, return_lse=True)):
        assert same_bytes(part, other), "ragged differs from dense"
    case = make_case([(100, 0, 100), (0, 0, 0), (257, 0, 257), (64, 0, 300), (90, 0, 20)], dtype=dtype, **options)
    case.check(run_prefill(case, guard, ragged=True, return_lse=True), "ragged")


@every_half
@every_mask
@pytest.mark.parametrize("head_dim", [40, 64])
def test_p1_tall_tiles(guard: Guard, dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """Narrow heads have tiles of 192 rows where these are many. Sequences are alike: the first is compared."""
    batch = 20 if guard.device == "cuda" else 2
    for queries, keys in [(300, 300), (193, 450), (385, 129)]:
        case = dense_case(queries, keys, dtype, head_dim, causal, heads=(10, 2), batch=1)
        steep = case.change(k=[x * torch.linspace(60, 0.1, keys)[:, None, None].to(dtype) for x in case.k])
        for one, what in ((case, f"{queries} queries, {keys} keys"), (steep, "steep")):
            for ragged in (False, True) if queries == keys else (False,):
                out, lse = run_prefill(one.pick([0] * batch), guard, ragged=ragged, return_lse=True)
                first = out[:queries], lse[:, :queries]
                one.check(first, what)
                assert same_bytes(out, first[0].repeat(batch, 1, 1)), "a row's bytes depend on where its tile is"
                assert same_bytes(lse, first[1].repeat(1, batch))


@every_half
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("count", [40, 255, 256, 300])
def test_p9_many_sequences(guard: Guard, dtype: torch.dtype, head_dim: int, count: int) -> None:
    """More than one warp looks at once; and more than there are places for. Of each length the first is compared."""
    count = count if guard.device == "cuda" else 40
    lengths = [0, 1, 7, 33, 64, 65, 99, 400]
    case = make_case([(n, 0, n) for n in lengths], dtype=dtype, head_dim=head_dim)
    order = torch.randint(0, len(lengths) - 1, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    order[count // 2] = len(lengths) - 1
    out, lse = run_prefill(case.pick(order), guard, ragged=True, return_lse=True)
    sizes = [lengths[kind] for kind in order]
    parts = list(zip(out.split(sizes), lse.split(sizes, 1)))
    first = dict(reversed(list(zip(order, parts))))
    kinds = sorted(first)
    outs, lses = zip(*(first[kind] for kind in kinds))
    case.pick(kinds).check((torch.cat(outs), torch.cat(lses, 1)))
    for kind, part in zip(order, parts):
        assert same_bytes(part[0], first[kind][0]) and same_bytes(part[1], first[kind][1]), lengths[kind]


@every_half
@every_width
@pytest.mark.parametrize("options", [*OPTIONS[:3], {"leftpad": [3, 0, 250, 128]}], ids=name_of)
def test_p2_caches(guard: Guard, dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> None:
    """Chunks over a prefix; NaN and infinities where no key is change nothing."""
    on_gpu = guard.device == "cuda"
    for new in (130, 0) if on_gpu else (130,):
        lengths = [(130, cached, new) for cached in (200, 130, 391, 254)]
        case = make_case(lengths, dtype=dtype, head_dim=head_dim, **options)
        for page_size in (None, 16, 48, 64, 256) if on_gpu else (None, 16):
            clean = None
            for fill in (0.0, NAN, math.inf):
                cache = build_cache(case, guard, page_size=page_size, capacity=640, fill=fill)
                result = run_cached(case, guard, cache)
                if clean is None:
                    clean = result
                    case.check(result, f"{new} new, pages of {page_size}")
                for part, other in zip(result, clean):
                    assert same_bytes(part, other), f"{fill}, {new} new, pages of {page_size}"


@every_half
def test_p6_bad_lengths_and_pages(guard: Guard, dtype: torch.dtype) -> None:
    """NaN for that sequence, its neighbours as ever."""
    case = make_case([(130, cached, 0) for cached in (200, 300, 391)], dtype=dtype)
    q = guard.place(torch.stack(case.q))
    cache = build_cache(case, guard, page_size=64, capacity=512)
    assert cache.block_table is not None
    keywords = {"k_cache": cache.k, "v_cache": cache.v, "return_lse": True}
    good = gqa_attention_prefill(q, cache_seqlens=cache.seqlens, block_table=cache.block_table, **keywords)
    table = cache.block_table.cpu().clone()
    table[1, 1] = 10**6
    for seqlens, block_table in (
        (guard.ints([200, 513, 391]), cache.block_table),
        (guard.ints([200, -1, 391]), cache.block_table),
        (cache.seqlens, guard.place(table)),
    ):
        bad = gqa_attention_prefill(q, cache_seqlens=seqlens, block_table=block_table, **keywords)
        for part, other in zip(bad, good):
            assert same_bytes(part[[0, 2]], other[[0, 2]]) and bool(part[1].isnan().all())


@every_half
def test_p9_rows_of_no_sequence(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(200, 0, 200), (100, 0, 100)], dtype=dtype)
    expected, expected_lse = run_prefill(case, guard, ragged=True, return_lse=True)
    poison = torch.full((150, 4, 64), NAN, dtype=dtype)
    q = guard.place(torch.cat([*case.q, poison]))
    k, v = (guard.place(torch.cat([*part, poison[:, :2]])) for part in (case.k, case.v))
    for last, bad in ((300, 300), (500, 200)):
        offsets = guard.ints([0, 200, last])
        out, lse = gqa_attention_prefill(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, return_lse=True)
        assert same_bytes(out[:bad], expected[:bad]) and same_bytes(lse[:, :bad], expected_lse[:, :bad])
        if last == 300:
            assert not bool(out[300:].any()) and bool((lse[:, 300:] == -math.inf).all())
        else:
            assert bool(out[200:].isnan().all()) and bool(lse[:, 200:].isnan().all())


def explain(*tensors: Tensor, gpu: dict[str, int] = H200, **options: Any) -> tuple[dict[str, Any], str]:
    """The last launch and the reason."""
    C.explain_begin("cuda", *gpu.values())
    try:
        gqa_attention_prefill(*tensors, **{"causal": False, **options})
    finally:
        plans = C.explain_end()
    return plans[0]["launches"][-1], plans[0]["reason"]


def prompt(
    batch: int = 1, queries: int = 512, keys: int = 512, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    shapes = [(batch, queries, 32, dim), (batch, keys, 8, dim), (batch, keys, 8, dim)]
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


@every_half
@every_mask
@pytest.mark.parametrize(
    "dim, rows, threads, batch",
    [
        (8, 128, 384, 1),
        (64, 128, 384, 1),
        (64, 192, 512, 9),
        (72, 192, 512, 1),
        (96, 192, 512, 1),
        (112, 128, 384, 1),
        (128, 128, 384, 1),
        (256, 128, 384, 1),
    ],
)
def test_wgmma_serves_dense_prompts(
    dtype: torch.dtype, causal: bool, dim: int, rows: int, threads: int, batch: int
) -> None:
    for queries in (64, 512, 513):
        launch, reason = explain(*prompt(batch, queries=queries, dim=dim, dtype=dtype), causal=causal)
        tiles = batch * 32 * -(-queries // rows)
        assert launch["kernel"] == "prefill_wgmma" and launch["grid"] == (min(132, tiles), 1, 1), reason
        assert launch["block"] == (threads, 1, 1) and launch["shared_memory"] <= H200["max_shared_memory"]


def test_wgmma_takes_what_it_was_built_for() -> None:
    def refused(tensors: list[Tensor], why: str, **options: Any) -> None:
        launch, reason = explain(*tensors, **options)
        assert launch["kernel"] != "prefill_wgmma" and why in reason, reason

    q, k, v = prompt()
    for options in (
        {"causal": True},
        {"window_size": (100, -1)},
        {"softcap": 30.0},
        {"softmax_scale": -1.0},
        {"sinks": torch.zeros(32)},
    ):
        assert explain(q, k, v, **options)[0]["kernel"] == "prefill_wgmma"
    cos = torch.zeros(512, 64)
    refused([q, k, v], "rotated", rotary_cos=cos, rotary_sin=cos)
    refused([q, k, v], "number of splits", num_splits=2)
    refused([q, k, v], "batch_invariant", batch_invariant=True)
    refused(prompt(queries=63), "at least 64 queries")
    refused(prompt(keys=0), "and keys")
    refused(prompt(dim=128), "shared memory", gpu={**H200, "max_shared_memory": 101376})
    refused(prompt(dtype=torch.float32), "float32")
    refused(prompt(queries=64, keys=65536), "few rows")
    # Copied first, so that layout does not decide over the kernel and its bytes.
    for other in (k[:, :1].expand_as(k), torch.empty(1, 512, 8, 129, dtype=q.dtype)[..., :128]):
        assert explain(q, other, v)[0]["kernel"] == "prefill_wgmma"
    refused([q, k, v], "warps divide the rows", gpu={**H200, "compute_capability": 80})
    C.set_kernel_override(1)
    try:
        refused([q, k, v], "portable kernels were asked for")
    finally:
        C.set_kernel_override(0)
