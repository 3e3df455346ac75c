"""What the attention ops share in Python: the keywords of a call and the checks of ``validation()``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gqa_kernels.validation import (
    validate_block_table,
    validate_cache_seqlens,
    validate_cu_seqlens,
    validate_last_position,
    validate_leftpad,
    validate_positions,
)


def cache_options(
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_positions: Tensor | None,
    rotary_interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> dict[str, Any]:
    """What differs from the op's defaults: every keyword of a call costs host time."""
    options: dict[str, Any] = {}
    if cache_leftpad is not None:
        options["cache_leftpad"] = cache_leftpad
    if block_table is not None:
        options["block_table"] = block_table
    if rotary_cos is not None or rotary_sin is not None:
        options.update(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    if rotary_positions is not None:
        options["rotary_positions"] = rotary_positions
    if rotary_interleaved:
        options["rotary_interleaved"] = True
    if k_scale is not None:
        options["k_scale"] = k_scale
    if v_scale is not None:
        options["v_scale"] = v_scale
    return options


def attention_options(
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_positions: Tensor | None,
    rotary_interleaved: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    num_splits: int,
    batch_invariant: bool,
    return_lse: bool,
    workspace: Tensor | None,
) -> dict[str, Any]:
    options = cache_options(
        cache_leftpad, block_table, rotary_cos, rotary_sin, rotary_positions, rotary_interleaved, k_scale, v_scale
    )
    if softmax_scale is not None:
        options["softmax_scale"] = softmax_scale
    left, right = window_size
    if left != -1:
        options["window_left"] = left
    if right != -1:
        options["window_right"] = right
    if softcap != 0.0:
        options["softcap"] = softcap
    if sinks is not None:
        options["sinks"] = sinks
    if num_splits != 0:
        options["num_splits"] = num_splits
    if batch_invariant:
        options["batch_invariant"] = True
    if return_lse:
        options["return_lse"] = True
    if workspace is not None:
        options["workspace"] = workspace
    return options


def validate(
    op: str,
    q: Tensor,
    k: Tensor | None,
    *,
    k_cache: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    **_: Any,
) -> None:
    """The checks of ``validation()``. Malformed shapes are left to the op, which names them better."""
    ragged = cu_seqlens_q is not None
    tensors = ((q, 3 if ragged else 4), (k, 3 if ragged else 4), (k_cache, 4), (block_table, 2), (rotary_cos, None))
    if any(tensor is not None and dims is not None and tensor.dim() != dims for tensor, dims in tensors):
        return
    queries = [q.shape[1]] * q.shape[0] if not ragged else []
    if cu_seqlens_q is not None:
        queries = validate_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    new = [0] * len(queries)
    if k is not None:
        new = queries if ragged else [k.shape[1]] * len(queries)
        if cu_seqlens_k is not None:
            new = validate_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    keys = new
    if k_cache is not None and cache_seqlens is not None:
        page_size = k_cache.shape[1]
        capacity = page_size if block_table is None else page_size * block_table.shape[1]
        cached = validate_cache_seqlens(op, cache_seqlens, new, capacity)
        keys = [a + b for a, b in zip(cached, new)]
        if block_table is not None:
            validate_block_table(op, block_table, keys, k_cache.shape[0], page_size)
    leftpad = validate_leftpad(op, cache_leftpad) if cache_leftpad is not None else [0] * len(keys)
    if rotary_cos is None or rotary_cos.dim() != 2:
        return
    if rotary_positions is not None:
        validate_positions(op, "rotary_positions", rotary_positions, rotary_cos.shape[0])
    else:
        last = max((count - pad - 1 for count, pad in zip(keys, leftpad)), default=0)
        validate_last_position(op, "rotary_cos", last, rotary_cos.shape[0])
