"""FlashAttention-3's interface over our ops: signatures, defaults, returns, and results against torch's attention."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gqa_kernels
from gqa_kernels import rope, rope_tables
from gqa_kernels._library import C
from gqa_kernels.compat import flash_attn
from gqa_kernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from gqa_kernels.explain import H200

pytestmark = pytest.mark.abi

COMMON = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0}
DESCALES = {"qv": None, "q_descale": None, "k_descale": None, "v_descale": None}
#: The parameters with defaults of each function in flash_attn_interface.py.
DEFAULTS: dict[str, dict[str, Any]] = {
    "flash_attn_func": {
        **COMMON, **DESCALES, "num_splits": 1, "pack_gqa": None, "deterministic": False, "sm_margin": 0,
        "return_attn_probs": False,
    },
    "flash_attn_varlen_func": {
        **COMMON, **DESCALES, "seqused_q": None, "seqused_k": None, "num_splits": 1, "pack_gqa": None,
        "deterministic": False, "sm_margin": 0, "return_attn_probs": False,
    },
    "flash_attn_with_kvcache": {
        **COMMON, **DESCALES, "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
        "cache_batch_idx": None, "cache_leftpad": None, "page_table": None, "cu_seqlens_q": None,
        "cu_seqlens_k_new": None, "max_seqlen_q": None, "rotary_seqlens": None, "rotary_interleaved": True,
        "scheduler_metadata": None, "num_splits": 0, "pack_gqa": None, "sm_margin": 0, "return_softmax_lse": False,
    },
}  # fmt: skip
POSITIONAL = {
    "flash_attn_func": ["q", "k", "v", "softmax_scale", "causal", "qv"],
    "flash_attn_varlen_func": ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
    "flash_attn_with_kvcache": ["q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens"],
}


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def test_defaults_take_the_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3's default of one split is not a wish for another kernel."""
    kernels = []
    for name in ("gqa_attention_prefill", "gqa_attention_decode"):
        monkeypatch.setattr(
            flash_attn, name, lambda *args, op=name, **options: kernels.append(plan_of(op, args, options)) or args[0]
        )
    q, k, v = (torch.empty(2, 512, heads, 128, dtype=torch.bfloat16) for heads in (32, 8, 8))
    offsets = torch.tensor([0, 512, 1024], dtype=torch.int32)
    flash_attn_func(q, k, v, causal=True)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    flash_attn_varlen_func(*packed, offsets, offsets, 512, 512, causal=True)
    flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=torch.full((2,), 512, dtype=torch.int32))
    assert kernels == ["prefill_wgmma", "prefill_wgmma", "decode_ring"]


def plan_of(op: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    C.explain_begin("cuda", *H200.values())
    try:
        getattr(gqa_kernels, op)(*args, **options)
    finally:
        plans = C.explain_end()
    return plans[0]["launches"][-1]["kernel"]


def attended(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """The same by torch, for one sequence ``[S, H, D]``, aligned to the bottom right."""
    row = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    column = torch.arange(len(k), device=q.device)
    left, right = window[0], 0 if causal else window[1]
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    if left >= 0:
        mask &= column >= row - left
    if right >= 0:
        mask &= column <= row + right
    q, k, v = (x.transpose(0, 1)[None].double() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).float()


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", DEFAULTS)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert {p.name: p.default for p in parameters.values() if p.default is not p.empty} == DEFAULTS[name]
    assert list(parameters)[: len(POSITIONAL[name])] == POSITIONAL[name]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0), (4, 3)])
def test_dense_and_ragged(device: str, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = random(2, 9, 6, 32, device=device), *(random(2, 17, 2, 32, device=device) for _ in "kv")
    options: dict[str, Any] = {"causal": causal, "window_size": window}
    out = flash_attn_func(q, k, v, **options)
    for b in range(2):
        same(out[b], attended(q[b], k[b], v[b], causal=causal, window=window))
    again, lse = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert torch.equal(again, out) and lse.shape == (2, 6, 9) and lse.dtype == torch.float32

    queries = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    keys = torch.tensor([0, 6, 17], dtype=torch.int32, device=device)
    ragged, lse = flash_attn_varlen_func(q[0], k[0], v[0], queries, keys, 5, 11, return_attn_probs=True, **options)
    assert lse.shape == (6, 9)
    for (a, b), (c, d) in (((0, 4), (0, 6)), ((4, 9), (6, 17))):
        same(ragged[a:b], attended(q[0, a:b], k[0, c:d], v[0, c:d], causal=causal, window=window))


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("layout", ["dense", "paged", "rows"])
def test_cache(device: str, layout: str, tokens: int) -> None:
    """Appended in place, rotated at the cached length, in each way that a cache can lie."""
    lengths = [5, 11]
    q, k, v = (random(2, tokens, heads, 32, device=device) for heads in (6, 2, 2))
    cached = [random(2, 48, 2, 32, device=device), random(2, 48, 2, 32, device=device) + 1]
    order: dict[str, Any] = {}
    caches = [cache.clone() for cache in cached]
    if layout == "paged":
        table = torch.randperm(6, generator=torch.Generator().manual_seed(0)).view(2, 3)
        caches = [torch.zeros(6, 16, 2, 32, device=device) for _ in "kv"]
        for cache, pages in zip(cached, caches):
            pages[table.flatten().to(device)] = cache.reshape(6, 16, 2, 32)
        order = {"page_table": table.to(device, torch.int32)}
    elif layout == "rows":
        caches = [torch.cat([torch.zeros_like(cache), cache.flip(0)]) for cache in cached]
        order = {"cache_batch_idx": torch.tensor([3, 2], dtype=torch.int32, device=device)}
    cos, sin = (table.to(device) for table in rope_tables(32, 64, base=10000.0))
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    out, lse, *accumulators = flash_attn_with_kvcache(
        q, *caches, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=seqlens, causal=True, return_softmax_lse=True,
        **order,
    )  # fmt: skip
    assert lse.shape == (2, 6, tokens) and [x.numel() for x in accumulators] == [0, 0]
    positions = seqlens[:, None] + torch.arange(tokens, device=device)
    q_rotated, k_rotated = rope(q, k, cos, sin, position_ids=positions, interleaved=True)
    for b, length in enumerate(lengths):
        keys, values = (torch.cat([cache[b, :length], new[b]]) for cache, new in zip(cached, (k_rotated, v)))
        same(out[b], attended(q_rotated[b], keys, values, causal=True))
    # What is cached now serves the same queries again, without new keys.
    seen = flash_attn_with_kvcache(q_rotated, *caches, cache_seqlens=seqlens + tokens, causal=True, **order)
    same(seen, out)


def test_cache_of_other_queries_and_lengths(device: str) -> None:
    """Not causal, one length for all as a number, a cache that is full, and more new keys than queries."""
    q, new = random(2, 4, 6, 32, device=device), random(2, 7, 2, 32, device=device)
    cache = random(2, 24, 2, 32, device=device)
    same(flash_attn_with_kvcache(q, cache, cache)[1], attended(q[1], cache[1], cache[1]))
    same(flash_attn_with_kvcache(q, cache, cache, cache_seqlens=9)[0], attended(q[0], cache[0, :9], cache[0, :9]))
    keys, values = cache.clone(), cache.clone()
    out = flash_attn_with_kvcache(q, keys, values, new, new, cache_seqlens=9, causal=True)
    whole = torch.cat([cache[0, :9], new[0]])
    same(out[0], attended(q[0], whole, whole, causal=True))
    assert torch.equal(keys[:, 9:16], new) and torch.equal(values[:, 9:16], new)


def test_leftpad_and_rotary_positions(device: str) -> None:
    """A rotation counts from the cached length, whatever the padding; or from rotary_seqlens."""
    q, k, v = (random(2, 3, heads, 32, device=device) for heads in (6, 2, 2))
    cache = random(2, 24, 2, 32, device=device)
    cos, sin = (table.to(device) for table in rope_tables(32, 64, base=10000.0))
    seqlens = torch.tensor([9, 9], dtype=torch.int32, device=device)
    leftpad = torch.tensor([0, 4], dtype=torch.int32, device=device)
    for start in (None, torch.tensor([30, 2], dtype=torch.int32, device=device)):
        keys, values = cache.clone(), cache.clone()
        out = flash_attn_with_kvcache(
            q, keys, values, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=seqlens, cache_leftpad=leftpad,
            rotary_seqlens=start, causal=True, rotary_interleaved=False,
        )  # fmt: skip
        positions = (seqlens if start is None else start)[:, None] + torch.arange(3, device=device)
        q_rotated, k_rotated = rope(q, k, cos, sin, position_ids=positions)
        for b, pad in enumerate((0, 4)):
            whole = [torch.cat([cache[b, pad:9], new[b]]) for new in (k_rotated, v)]
            same(out[b], attended(q_rotated[b], *whole, causal=True))


def test_ragged_queries_over_a_cache(device: str) -> None:
    offsets = torch.tensor([0, 2, 7], dtype=torch.int32, device=device)
    q, k = random(7, 6, 32, device=device), random(7, 2, 32, device=device)
    cache, seqlens = random(2, 24, 2, 32, device=device), torch.tensor([4, 9], dtype=torch.int32, device=device)
    keys, values = cache.clone(), cache.clone()
    out = flash_attn_with_kvcache(
        q, keys, values, k, k, cache_seqlens=seqlens, cu_seqlens_q=offsets, cu_seqlens_k_new=offsets, max_seqlen_q=5,
        causal=True,
    )  # fmt: skip
    for b, (start, end) in enumerate(((0, 2), (2, 7))):
        whole = torch.cat([cache[b, : (4, 9)[b]], k[start:end]])
        same(out[start:end], attended(q[start:end], whole, whole, causal=True))


REFUSED = {
    "qv": {"qv": torch.zeros(1)},
    "q_descale": {"q_descale": torch.ones(1)},
    "k_descale": {"k_descale": torch.ones(1)},
    "v_descale": {"v_descale": torch.ones(1)},
    "attention_chunk": {"attention_chunk": 128},
}


@pytest.mark.parametrize("argument", REFUSED)
def test_unsupported_arguments_are_named(argument: str) -> None:
    q, offsets = torch.zeros(1, 4, 2, 32), torch.tensor([0, 4], dtype=torch.int32)
    words = f"argument '{argument}' is not supported by gqa_kernels: "
    with pytest.raises(NotImplementedError, match=f"^flash_attn_func: {words}"):
        flash_attn_func(q, q, q, **REFUSED[argument])
    with pytest.raises(NotImplementedError, match=f"^flash_attn_varlen_func: {words}"):
        flash_attn_varlen_func(q[0], q[0], q[0], offsets, offsets, 4, 4, **REFUSED[argument])
    with pytest.raises(NotImplementedError, match=f"^flash_attn_with_kvcache: {words}"):
        flash_attn_with_kvcache(q, q, q, **REFUSED[argument])


def test_what_else_is_refused() -> None:
    q, offsets = torch.zeros(1, 4, 2, 32), torch.tensor([0, 4], dtype=torch.int32)
    cos = torch.zeros(8, 16)
    with pytest.raises(NotImplementedError, match="'seqused_k'"):
        flash_attn_varlen_func(q[0], q[0], q[0], offsets, offsets, 4, 4, seqused_k=offsets)
    with pytest.raises(NotImplementedError, match="'cache_batch_idx'"):
        flash_attn_with_kvcache(q, q, q, cache_batch_idx=offsets[:1], page_table=offsets[None])
    with pytest.raises(NotImplementedError, match="'cu_seqlens_k_new'"):
        flash_attn_with_kvcache(q[0], q, q, q[0], q[0], cache_seqlens=0, cu_seqlens_q=offsets)
    with pytest.raises(NotImplementedError, match="'rotary_cos'"):
        flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=0, rotary_cos=cos, rotary_sin=cos)
    with pytest.raises(ValueError, match="cache_seqlens must be given"):
        flash_attn_with_kvcache(q, q, q, q, q)
    with pytest.raises(RuntimeError, match="grad"):
        flash_attn_func(q.requires_grad_(), q, q)
