"""FlashAttention-3's functions over these ops, with its names, defaults and return values: port by changing an import.

``from flash_attn_interface import flash_attn_func`` becomes ``from gqa_kernels.compat.flash_attn import
flash_attn_func``. An argument that these kernels cannot serve raises NotImplementedError with its name; what tunes
FlashAttention and changes no result (``pack_gqa``, ``sm_margin``, ``scheduler_metadata``, ``deterministic``) is
accepted and has no effect. There is no backward: an input that requires grad raises, under enabled gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_kernels.attention import gqa_attention_decode, gqa_attention_prefill, kv_cache_append
from gqa_kernels.kv_cache import MAX_DECODE_QUERIES

#: What a caller with a float8 cache does instead.
SCALES = "a scale per sequence; gqa_attention_decode and _prefill take k_scale and v_scale, per tensor or KV head"

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def _refuse(function: str, arguments: dict[str, tuple[Any, str]]) -> None:
    for name, (value, reason) in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{function}: argument {name!r} is not supported by gqa_kernels: {reason}")


def _refuse_common(
    function: str, qv: Any, q_descale: Any, k_descale: Any, v_descale: Any, attention_chunk: int
) -> None:
    _refuse(
        function,
        {
            "qv": (qv, "there is no attention with a second query part"),
            "q_descale": (q_descale, "queries are float32, float16 or bfloat16"),
            "k_descale": (k_descale, SCALES),
            "v_descale": (v_descale, SCALES),
            "attention_chunk": (attention_chunk or None, "there is no chunked mask; window_size slides"),
        },
    )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over q ``[B, Sq, Hq, D]`` and k, v ``[B, Sk, Hkv, D]``.

    Returns:
        out, or with ``return_attn_probs`` ``(out, softmax_lse)``, lse ``[B, Hq, Sq]``.

    Raises:
        NotImplementedError: qv, a descale or attention_chunk is given.
    """
    _refuse_common("flash_attn_func", qv, q_descale, k_descale, v_descale, attention_chunk)
    return gqa_attention_prefill(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=(window_size[0], window_size[1]),
        softcap=softcap,
        num_splits=num_splits,
        return_lse=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over sequences of different lengths, q ``[tokens, Hq, D]`` and k, v ``[tokens, Hkv, D]``.

    Returns:
        out, or with ``return_attn_probs`` ``(out, softmax_lse)``, lse ``[Hq, tokens]``.

    Raises:
        NotImplementedError: seqused_q, seqused_k, qv, a descale or attention_chunk is given.
    """
    name = "flash_attn_varlen_func"
    _refuse_common(name, qv, q_descale, k_descale, v_descale, attention_chunk)
    lengths = "a sequence is all of its rows; its length is the difference of the offsets"
    _refuse(name, {"seqused_q": (seqused_q, lengths), "seqused_k": (seqused_k, lengths)})
    return gqa_attention_prefill(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=(window_size[0], window_size[1]),
        softcap=softcap,
        num_splits=num_splits,
        return_lse=return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q ``[B, Sq, Hq, D]`` over a cache; k and v ``[B, Snew, Hkv, D]`` are written to it first.

    The cache is ``[B, capacity, Hkv, D]``, or ``[pages, page_size, Hkv, D]`` with ``page_table``. With ``cu_seqlens_q``
    q is ``[tokens, Hq, D]``, and so are k and v, whose offsets must be the same tensor.

    Returns:
        out, or with ``return_softmax_lse`` ``(out, softmax_lse, out_accum, lse_accum)``, of which the last two are
        empty: splits are not handed out.

    Raises:
        NotImplementedError: qv, a descale or attention_chunk is given; cache_batch_idx together with page_table;
            offsets of k other than those of q; or a rotation of many tokens to one position, which is what
            FlashAttention does with them where the call is neither causal nor windowed.
    """
    name = "flash_attn_with_kvcache"
    _refuse_common(name, qv, q_descale, k_descale, v_descale, attention_chunk)
    queries = q.shape[1] if cu_seqlens_q is None else None
    window = (window_size[0], window_size[1])
    if cache_batch_idx is not None:
        both = cache_batch_idx if page_table is not None else None
        _refuse(name, {"cache_batch_idx": (both, "a page_table already says where a sequence lies")})
        page_table = cache_batch_idx[:, None]  # each row of the cache is a page
    if k is not None and cu_seqlens_q is not cu_seqlens_k_new:
        _refuse(name, {"cu_seqlens_k_new": ("given", "offsets of k and v must be those of q, the same tensor")})
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{name}: cache_seqlens must be given with k and v, got None")
        cache_seqlens = k_cache.shape[1] if page_table is None else k_cache.shape[1] * page_table.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((), cache_seqlens, dtype=torch.int32, device=q.device)

    options: dict[str, Any] = {
        "cache_leftpad": cache_leftpad,
        "block_table": page_table,
        "softmax_scale": softmax_scale,
        "window_size": window,
        "softcap": softcap,
        "num_splits": num_splits,
        "return_lse": return_softmax_lse,
    }
    if rotary_cos is not None:
        if queries != 1 and not causal and window == (-1, -1):
            _refuse(name, {"rotary_cos": (rotary_cos, "of several queries, none causal: all would have one position")})
        options.update(rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved)
        if cache_leftpad is not None or rotary_seqlens is not None:
            if queries is None:
                _refuse(name, {"cu_seqlens_q": (cu_seqlens_q, "with positions of their own for its rotation")})
            first = cache_seqlens if rotary_seqlens is None else rotary_seqlens
            steps = torch.arange(queries or 1, device=q.device)
            options["rotary_positions"] = (first.view(-1, 1) + steps).to(torch.int32)
    if k is not None and v is not None and queries is not None and k.shape[1] != queries:
        if rotary_cos is not None:
            _refuse(name, {"rotary_cos": (rotary_cos, "where k has another number of tokens than q")})
        kv_cache_append(k, v, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=page_table)
        cache_seqlens, k, v = cache_seqlens + k.shape[1], None, None
    options["cache_seqlens"] = cache_seqlens

    # The decode op is causal among its queries.
    if queries == 1 or (causal and queries is not None and 1 <= queries <= MAX_DECODE_QUERIES):
        result = gqa_attention_decode(q, k_cache, v_cache, k, v, **options)
    else:
        options.update(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, causal=causal)
        result = gqa_attention_prefill(q, k, v, k_cache, v_cache, **options)
    if not return_softmax_lse:
        return result
    return (*result, q.new_empty(0), q.new_empty(0))
