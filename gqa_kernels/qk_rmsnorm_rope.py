"""q and k normalised per head and rotated, in one pass: what Qwen3, Gemma 3 and OLMo 2 do before attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad
from gqa_kernels.validation import validate_positions, validating


def qk_rmsnorm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normalises each head of ``q`` and ``k`` to unit root mean square, scales it by a weight, and rotates it.

    Args:
        q: ``[batch, tokens, heads, head_dim]`` or ``[tokens, heads, head_dim]``, float32, float16 or bfloat16, any
            strides.
        k: like ``q``, with any number of heads.
        q_weight: ``[head_dim]``, float32 or the dtype of ``q``.
        k_weight: like ``q_weight``.
        cos, sin, position_ids, interleaved: as in :func:`gqa_kernels.rope`.
        eps, weight_offset, cast_before_weight: as in :func:`gqa_kernels.rmsnorm`.

    Returns:
        Contiguous ``(q, k)``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``rope(rmsnorm(q, q_weight, eps), rmsnorm(k, k_weight, eps), cos, sin)``, to the bit: the
    normalised heads are rounded to their dtype before they are rotated, as transformers does.
    """
    refuse_grad("qk_rmsnorm_rope", q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    if validating() and position_ids is not None and cos.dim() == 2:
        validate_positions("qk_rmsnorm_rope", "position_ids", position_ids, cos.shape[0])
    if position_ids is None and not interleaved and weight_offset == 0.0 and cast_before_weight:
        plain: tuple[Tensor, Tensor] = ops.qk_rmsnorm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps)
        return plain
    result: tuple[Tensor, Tensor] = ops.qk_rmsnorm_rope(
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        eps=eps,
        position_ids=position_ids,
        interleaved=interleaved,
        weight_offset=weight_offset,
        cast_before_weight=cast_before_weight,
    )
    return result


@torch.library.register_fake("gqa_kernels::qk_rmsnorm_rope")
def _qk_rmsnorm_rope_fake(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)
