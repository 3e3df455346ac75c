"""P11: the same values in another layout give the same bytes, or are refused; never a wrong answer."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.attention import Case, make_case, make_rotary
from support.attention_layout import build_cache, lengths_to_offsets, packed, run_cached, run_prefill
from support.bounds import DTYPES
from support.contract import assert_same
from support.guard import Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill

pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def views(x: Tensor, guard: Guard) -> dict[str, Tensor]:
    """x [..., H, D] seven other ways."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    odd = torch.full((*x.shape[:-1], x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    odd[..., 1:] = x
    longer = torch.cat([x, torch.full_like(x[:1], float("nan"))])
    return {
        "heads first": x.transpose(-2, -3).contiguous().transpose(-2, -3),
        "transposed batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": wide[..., : x.shape[-1]],
        "odd strides": odd[..., 1:],
        "misaligned": guard.place(x, offset=1, writable=True),
        "longer": longer[:-1],
        "last dimension strided": x.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


@every_dtype
@pytest.mark.parametrize("queries, head_dim", [(21, 64), (21, 40), (70, 40), (130, 64), (70, 96), (70, 128), (70, 256)])
def test_p11_prefill(guard: Guard, dtype: torch.dtype, queries: int, head_dim: int) -> None:
    """70 queries and more run on Hopper's kernel, whatever the views: they decide over no kernel."""
    case = make_case([(queries, 0, queries)] * 2, dtype=dtype, heads=(6, 2), head_dim=head_dim)
    with hopper(guard.device) if queries >= 64 and dtype != torch.float32 else nullcontext():
        check_views_of_prompts(case, guard)


def check_views_of_prompts(case: Case, guard: Guard) -> None:
    expected = run_prefill(case, guard)
    case.check(expected)
    tensors = {name: guard.place(torch.stack(getattr(case, name))) for name in ("q", "k", "v")}
    for name, tensor in tensors.items():
        for layout, view in views(tensor, guard).items():
            out, lse = gqa_attention_prefill(**{**tensors, name: view}, return_lse=True)
            assert out.is_contiguous()
            assert_same(packed(out, lse), expected, f"{name} {layout}")
    fused = guard.place(torch.cat(list(tensors.values()), 2)).split([6, 2, 2], 2)
    assert_same(packed(*gqa_attention_prefill(*fused, return_lse=True)), expected, "fused q, k, v")


@every_dtype
@pytest.mark.parametrize("long, head_dim", [(30, 64), (130, 64), (70, 128)])
def test_p11_prefill_ragged(guard: Guard, dtype: torch.dtype, long: int, head_dim: int) -> None:
    case = make_case([(13, 0, 13), (long, 0, long)], dtype=dtype, heads=(6, 2), head_dim=head_dim)
    with hopper(guard.device) if long >= 64 and dtype != torch.float32 else nullcontext():
        check_views_of_a_ragged_batch(case, guard, long)


def check_views_of_a_ragged_batch(case: Case, guard: Guard, long: int) -> None:
    expected = run_prefill(case, guard, ragged=True)
    offsets = guard.ints(lengths_to_offsets([13, long]))
    strided = guard.ints(torch.tensor([0, 9, 13, 9, 13 + long, 9]))[::2]
    tensors = {name: guard.place(torch.cat(getattr(case, name))) for name in ("q", "k", "v")}
    for name, tensor in tensors.items():
        for layout, view in views(tensor, guard).items():
            given = {**tensors, name: view}
            out, lse = gqa_attention_prefill(**given, cu_seqlens_q=offsets, cu_seqlens_k=strided, return_lse=True)
            assert_same((out, lse), expected, f"{name} {layout}")


@every_dtype
def test_p11_expanded(guard: Guard, dtype: torch.dtype) -> None:
    """Strides of 0: one sequence, or one head, seen many times."""
    q = guard.randn(1, 70, 1, 64, dtype=dtype).expand(3, 70, 4, 64)
    k, v = (guard.randn(1, 90, 1, 64, dtype=dtype).expand(3, 90, 2, 64) for _ in range(2))
    with hopper(guard.device) if dtype != torch.float32 else nullcontext():
        expected = gqa_attention_prefill(q.contiguous(), k.contiguous(), v.contiguous())
        assert same_bytes(gqa_attention_prefill(q, k, v), expected)
    q = guard.randn(1, 9, 1, 64, dtype=dtype).expand(3, 9, 4, 64)
    k, v = (guard.randn(1, 9, 1, 64, dtype=dtype).expand(3, 9, 2, 64) for _ in range(2))
    expected = gqa_attention_prefill(q.contiguous(), k.contiguous(), v.contiguous())
    assert same_bytes(gqa_attention_prefill(q, k, v), expected)
    lengths = guard.ints([9, 9, 9])
    out = gqa_attention_decode(q, k.contiguous(), v.contiguous(), cache_seqlens=lengths)
    assert same_bytes(gqa_attention_decode(q, k, v, cache_seqlens=lengths[:1].expand(3)), out)


@every_dtype
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
def test_p11_cache(guard: Guard, dtype: torch.dtype, decode: bool, page_size: int | None) -> None:
    """A cache is written where it lies, so heads first, sliced or misaligned it must serve in place."""
    case = make_case([(3, cached, 3) for cached in (0, 40, 70)], dtype=dtype, heads=(6, 2), rotary=make_rotary(64))
    expected = run_cached(case, guard, build_cache(case, guard, page_size=page_size), decode=decode)
    case.check(expected)
    heads_first = build_cache(case, guard, page_size=page_size, heads_first=True)
    assert_same(run_cached(case, guard, heads_first, decode=decode), expected, "heads first")
    for layout in ("sliced", "odd strides", "misaligned", "longer", "transposed batch", "k and v together"):
        cache = build_cache(case, guard, page_size=page_size)
        if layout == "k and v together":
            cache.k, cache.v = guard.place(torch.stack([cache.k, cache.v], 2), writable=True).unbind(2)
        else:
            cache.k = views(cache.k, guard)[layout]
            cache.v = views(cache.v, guard)[layout]
        assert_same(run_cached(case, guard, cache, decode=decode), expected, layout)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [None, 64])
def test_p11_cache_under_many_queries(guard: Guard, dtype: torch.dtype, page_size: int | None, head_dim: int) -> None:
    """Layouts with aligned rows give the same bytes. Others are read by another kernel, which agrees within P1."""
    case = make_case([(70, cached, 70) for cached in (0, 40, 70)], dtype=dtype, heads=(6, 2), head_dim=head_dim)
    with hopper(guard.device):
        expected = run_cached(case, guard, build_cache(case, guard, page_size=page_size))
        case.check(expected)
        heads_first = build_cache(case, guard, page_size=page_size, heads_first=True)
        assert_same(run_cached(case, guard, heads_first), expected, "heads first")
        for layout in ("sliced", "longer", "transposed batch", "k and v together"):
            cache = build_cache(case, guard, page_size=page_size)
            if layout == "k and v together":
                cache.k, cache.v = guard.place(torch.stack([cache.k, cache.v], 2), writable=True).unbind(2)
            else:
                cache.k, cache.v = views(cache.k, guard)[layout], views(cache.v, guard)[layout]
            assert_same(run_cached(case, guard, cache), expected, layout)
    for layout in ("odd strides", "misaligned"):
        cache = build_cache(case, guard, page_size=page_size)
        cache.k, cache.v = views(cache.k, guard)[layout], views(cache.v, guard)[layout]
        case.check(run_cached(case, guard, cache), layout)


@every_dtype
@pytest.mark.parametrize("decode", [False, True])
def test_p11_new_tokens(guard: Guard, dtype: torch.dtype, decode: bool) -> None:
    case = make_case([(3, cached, 3) for cached in (0, 40, 70)], dtype=dtype, heads=(6, 2), rotary=make_rotary(64))
    expected = run_cached(case, guard, build_cache(case, guard), decode=decode)
    q = torch.stack(case.q)
    k, v = (torch.stack([x[n:] for x, n in zip(part, case.cached)]) for part in (case.k, case.v))
    tensors = {name: guard.place(x) for name, x in (("q", q), ("k", k), ("v", v))}
    assert case.rotary is not None
    cos, sin = guard.place(case.rotary.cos), guard.place(case.rotary.sin)
    tables = {
        "table": (cos, sin),
        "sliced": (torch.cat([cos, sin], -1)[:, :32], torch.cat([cos, sin], -1)[:, 32:]),
        "misaligned": (guard.place(cos, offset=1), guard.place(sin, offset=1)),
    }
    op = gqa_attention_decode if decode else gqa_attention_prefill
    for name, tensor in tensors.items():
        for layout, view in views(tensor, guard).items():
            for kind, (c, s) in tables.items() if layout == "heads first" else [("table", (cos, sin))]:
                cache = build_cache(case, guard)
                given = {**tensors, name: view, "k_cache": cache.k, "v_cache": cache.v, "cache_seqlens": cache.seqlens}
                out, lse = op(**given, rotary_cos=c, rotary_sin=s, return_lse=True)
                assert_same(packed(out, lse), expected, f"{name} {layout} {kind}")


@every_dtype
def test_p11_cache_strided_in_its_last_dimension_is_refused(device: str, dtype: torch.dtype) -> None:
    """It cannot be copied, as it is written in place."""
    q, new = torch.zeros(2, 1, 4, 64, dtype=dtype, device=device), torch.zeros(2, 1, 2, 64, dtype=dtype, device=device)
    caches = [torch.zeros(2, 8, 2, 128, dtype=dtype, device=device) for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    for op in (gqa_attention_decode, gqa_attention_prefill):
        with pytest.raises(RuntimeError, match=rf"^{op.__name__}: k_cache .*stride"):
            op(q, k_cache=caches[0][..., ::2], v_cache=caches[1][..., ::2], k=new, v=new, cache_seqlens=lengths)
