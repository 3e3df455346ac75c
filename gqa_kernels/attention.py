"""Grouped-query attention (arXiv:2305.13245) over dense, ragged, cached and paged keys, and what belongs to it.

The kernels follow FlashAttention-2 (arXiv:2307.08691): online softmax over blocks of keys, never a matrix of scores in
memory; decode divides long caches as Flash-Decoding does. Sinks are an extra logit per head (arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad
from gqa_kernels.attention_options import attention_options, cache_options, validate
from gqa_kernels.explain import explain
from gqa_kernels.validation import validating

Attention = Tensor | tuple[Tensor, Tensor]


def gqa_attention_prefill(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    rotary_interleaved: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Attention:
    """Attention of many queries: softmax(q kᵀ · scale) v with grouped-query heads.

    The keys are k and v alone; or, with a cache, its first ``cache_seqlens[b]`` rows and then k and v, which are also
    written to the cache at rows ``cache_seqlens[b]`` and on (chunked prefill); or the cache alone, without k and v.
    Query i of Sq sits at key position Sk - Sq + i. ``cache_seqlens`` itself is never changed.

    Args:
        q: ``[B, Sq, Hq, D]``, or ``[tokens, Hq, D]`` with ``cu_seqlens_q``; float32, float16 or bfloat16. D is a
            multiple of 8 up to 256.
        k, v: ``[B, Sk, Hkv, D]``, or ``[tokens, Hkv, D]``; Hkv divides Hq.
        k_cache, v_cache: ``[B, capacity, Hkv, D]``, or ``[pages, page_size, Hkv, D]`` with ``block_table``. Written in
            place where k and v are given. Of q's dtype; beside float16 and bfloat16 also torch.float8_e4m3fn or
            torch.int8.
        cache_seqlens: int32 or int64 ``[B]``, or 0-d for one length for all: tokens in the cache before this call.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[B + 1]``: sequence b is rows ``cu[b]`` to ``cu[b + 1]``. With a
            cache, ``cu_seqlens_q`` divides k and v too. Rows of q past the last offset give 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the ragged lengths; a longer sequence becomes NaN. None takes the
            number of tokens, which is safe and, on a GPU, slower.
        causal: query at position p sees keys up to p.
        cache_leftpad: int32 or int64 ``[B]``: keys before it do not exist; also without a cache.
        block_table: int32 or int64 ``[B, max_pages]``: the pages of each sequence in order.
        rotary_cos, rotary_sin: a table ``[positions, R / 2]``, or a row for each token ``[B or 1, Sq, R / 2]``; float32
            or the dtype of q. Rotates q and k (never cached keys), rounding each to its dtype.
        rotary_positions: ``[B or 1, Sq]`` or ``[tokens]``: row of the table for each token. None: the token's key
            position less ``cache_leftpad``.
        rotary_interleaved: pairs are (2i, 2i + 1) rather than (i, i + R / 2).
        softmax_scale: None is 1 / √D. It and softcap are constants of a graph that ``torch.compile`` makes.
        window_size: (left, right): a query at position p sees keys from p - left to p + right; -1 is unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is none.
        sinks: ``[Hq]``, float32 or the dtype of q: a logit of each head that takes weight and gives nothing. It is
            neither scaled nor capped, and is part of the lse.
        k_scale, v_scale: float32, one element or ``[Hkv]``, positive: with caches of torch.float8_e4m3fn or torch.int8
            a key is what is stored times ``k_scale``; None is 1. New keys and values are stored as x / scale, divided
            in float32, rounded to nearest even and held within ±448 or ±127 (NaN is 0 in int8), and attended to as
            stored.
        num_splits: parts the keys are divided into on a GPU; 0 chooses.
        batch_invariant: on a GPU, a row's bytes do not depend on the batch around it.
        return_lse: also return the log-sum-exp.
        workspace: uint8 memory on q's device, of :func:`gqa_attention_prefill_workspace_size` bytes; None allocates it.
        out: written and returned instead of a new tensor: contiguous, like q, aligned to 16 bytes, apart from the
            other arguments in memory.

    Returns:
        out like q, contiguous; with ``return_lse`` ``(out, lse)``, lse float32 ``[B, Hq, Sq]`` or ``[Hq, tokens]``, the
        natural logarithm. A query that sees no key gives out 0 and lse -inf. A sequence whose lengths or offsets are
        out of range gives NaN and writes nothing; so do queries that reach a page id out of range.

    Raises:
        RuntimeError: a wrong shape, dtype, device, stride or setting, or an input that requires grad.

    PyTorch equivalent: ``scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
    is_causal=True, enable_gqa=True).transpose(1, 2)`` where Sq == Sk. Accumulation is in float32.
    """
    refuse_grad("gqa_attention_prefill", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, out=out)
    options: dict[str, Any] = attention_options(
        cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, softmax_scale,
        window_size, softcap, sinks, k_scale, v_scale, num_splits, batch_invariant, return_lse, workspace,
    )  # fmt: skip
    if k_cache is not None or v_cache is not None:
        options.update(k_cache=k_cache, v_cache=v_cache)
    if cache_seqlens is not None:
        options["cache_seqlens"] = cache_seqlens
    if cu_seqlens_q is not None:
        options["cu_seqlens_q"] = cu_seqlens_q
    if cu_seqlens_k is not None:
        options["cu_seqlens_k"] = cu_seqlens_k
    if max_seqlen_q is not None:
        options["max_seqlen_q"] = max_seqlen_q
    if max_seqlen_k is not None:
        options["max_seqlen_k"] = max_seqlen_k
    if not causal:
        options["causal"] = False
    if validating():
        validate("gqa_attention_prefill", q, k, **options)
    if out is not None:
        options["out"] = out
    result, lse = ops.gqa_attention_prefill(q, k, v, **options)
    result = result if out is None else out
    return (result, lse) if return_lse else result


def gqa_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    rotary_interleaved: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    static_prefix: bool = False,
) -> Attention:
    """Attention of 1 to 16 new tokens over a cache; with k and v, appends them first. Causal among the new tokens.

    Args:
        q: ``[B, Sq, Hq, D]``, Sq from 1 to 16; float32, float16 or bfloat16. D is a multiple of 8 up to 256.
        k_cache, v_cache: ``[B, capacity, Hkv, D]``, or ``[pages, page_size, Hkv, D]`` with ``block_table``; of q's
            dtype, or quantised as in :func:`gqa_attention_prefill`.
        k, v: ``[B, Sq, Hkv, D]``: the keys and values of the new tokens, rotated where there are tables and written in
            place at rows ``cache_seqlens[b]`` and on. None: the new tokens are in the cache already, and
            ``cache_seqlens`` counts them.
        cache_seqlens: int32 or int64 ``[B]``, or 0-d: tokens in the cache before this call. Never changed.
        cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, softmax_scale,
        window_size, softcap, sinks, k_scale, v_scale, num_splits, batch_invariant, return_lse: as in
            :func:`gqa_attention_prefill`.
        workspace: uint8 memory on q's device, of :func:`gqa_attention_decode_workspace_size` bytes; None allocates it.
        out: as in :func:`gqa_attention_prefill`.
        static_prefix: a promise that nothing that may still run on the device writes ``cache_seqlens``,
            ``cache_leftpad``, ``block_table``, the scales or the cached rows below the lengths. Hopper's kernel then
            reads them while the kernel before it still runs; all else it reads when that has ended.

    Returns:
        out like q, contiguous; with ``return_lse`` ``(out, lse)``, lse float32 ``[B, Hq, Sq]``. Bad lengths and page
        ids give NaN as in :func:`gqa_attention_prefill`.

    Raises:
        RuntimeError: a wrong shape, dtype, device, stride or setting, or an input that requires grad.

    PyTorch equivalent: write k and v to the caches at ``cache_seqlens[b]``, then for each sequence
    ``scaled_dot_product_attention(q, cache[:length], …, enable_gqa=True)`` with a bottom-right causal mask.
    """
    refuse_grad("gqa_attention_decode", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, out=out)
    options: dict[str, Any] = attention_options(
        cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, softmax_scale,
        window_size, softcap, sinks, k_scale, v_scale, num_splits, batch_invariant, return_lse, workspace,
    )  # fmt: skip
    if validating():
        validate("gqa_attention_decode", q, k, k_cache=k_cache, cache_seqlens=cache_seqlens, **options)
    if out is not None:
        options["out"] = out
    if static_prefix:
        options["static_prefix"] = True
    result, lse = ops.gqa_attention_decode(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **options)
    result = result if out is None else out
    return (result, lse) if return_lse else result


def kv_cache_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    rotary_interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes k (rotated where there are tables) and v into the cache at rows ``cache_seqlens[b]`` and on.

    Args:
        k, v: ``[B, S, Hkv, D]`` float32, float16 or bfloat16.
        k_cache, v_cache: ``[B, capacity, Hkv, D]``, or ``[pages, page_size, Hkv, D]`` with ``block_table``; changed in
            place. Of k's dtype, or quantised as in :func:`gqa_attention_prefill`.
        cache_seqlens: int32 or int64 ``[B]``, or 0-d: tokens in the cache before this call. Never changed.
        cache_leftpad: int32 or int64 ``[B]``: a token's default rotary position is its row less this.
        block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, k_scale, v_scale: as in
            :func:`gqa_attention_prefill`.

    A length out of range or a page id out of range drops the write; nothing else is touched.

    Raises:
        RuntimeError: a wrong shape, dtype, device or stride, or an input that requires grad.

    PyTorch equivalent: ``k_cache[b, n : n + S] = k[b]; v_cache[b, n : n + S] = v[b]`` with ``n = cache_seqlens[b]``.
    """
    refuse_grad("kv_cache_append", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    options: dict[str, Any] = cache_options(
        cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, k_scale, v_scale
    )
    if validating():
        validate("kv_cache_append", k, k, k_cache=k_cache, cache_seqlens=cache_seqlens, **options)
    ops.kv_cache_append(k, v, k_cache, v_cache, cache_seqlens=cache_seqlens, **options)


def merge_attention_states(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attention over disjoint parts of the keys into attention over all of them.

    Args:
        outs: ``[parts, B, Sq, Hq, D]`` or ``[parts, tokens, Hq, D]``, or a sequence of the parts; float32, float16 or
            bfloat16.
        lses: ``[parts, B, Hq, Sq]`` or ``[parts, Hq, tokens]``, or a sequence; float32, natural logarithms.

    Returns:
        ``(out, lse)``. Parts with lse -inf saw no key and count for nothing; where all are, out is 0 and lse -inf.
        Sinks belong to one part only.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``lse = lses.logsumexp(0)`` and ``out = sum over parts of exp(lses - lse) * outs``.
    Accumulation is in float32.
    """
    stacked = outs if isinstance(outs, Tensor) else torch.stack(list(outs))
    weights = lses if isinstance(lses, Tensor) else torch.stack(list(lses))
    refuse_grad("merge_attention_states", outs=stacked, lses=weights)
    result: tuple[Tensor, Tensor] = ops.merge_attention_states(stacked, weights)
    return result


def gqa_attention_prefill_workspace_size(*args: Any, **kwargs: Any) -> int:
    """Bytes of workspace that :func:`gqa_attention_prefill` needs for these arguments; 0 on the CPU."""
    return explain("gqa_attention_prefill", *args, **kwargs).workspace_size


def gqa_attention_decode_workspace_size(*args: Any, **kwargs: Any) -> int:
    """Bytes of workspace that :func:`gqa_attention_decode` needs for these arguments; 0 on the CPU."""
    return explain("gqa_attention_decode", *args, **kwargs).workspace_size


def _attention_fake(q: Tensor, ragged: bool, return_lse: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    if not return_lse:
        shape: tuple[Any, ...] = (0,)
    elif ragged:
        shape = (q.shape[1], q.shape[0])
    else:
        shape = (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape if out is None else (0,)), q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("gqa_kernels::gqa_attention_prefill")
def _prefill_fake(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, cu_seqlens_q is not None, return_lse, out)


@torch.library.register_fake("gqa_kernels::gqa_attention_decode")
def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_lse: bool = False,
    out: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, False, return_lse, out)


@torch.library.register_fake("gqa_kernels::kv_cache_append")
def _append_fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> None:
    return None


@torch.library.register_fake("gqa_kernels::merge_attention_states")
def _merge_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
