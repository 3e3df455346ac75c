"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone or with the residual add before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_kernels._library import ops, pair_of, refuse_grad


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Normalises the last dimension to unit root mean square and scales it by ``weight``.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16, any strides.
        weight: ``[hidden]``, float32 or the dtype of ``x``.
        eps: added to the mean square before the root.
        weight_offset: added to ``weight`` (Gemma: 1.0).
        cast_before_weight: round the normalised value to the dtype of ``x`` before multiplying by ``weight``, as
            HuggingFace's LlamaRMSNorm does; False multiplies in float32 and rounds once (Gemma, gpt-oss).
        out: written and returned instead of a new tensor: contiguous, like ``x``, and apart from the inputs in memory
            or ``x`` itself.

    Returns:
        A contiguous tensor like ``x``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)`` with ``x32 = x.float()``,
    cast to the dtype of ``x``, times ``weight + weight_offset``. Accumulation is in float32.
    """
    refuse_grad("rmsnorm", x=x, weight=weight, out=out)
    if out is not None:
        ops.rmsnorm.out(x, weight, eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight, out=out)
        return out
    if weight_offset == 0.0 and cast_before_weight:
        result: Tensor = ops.rmsnorm(x, weight, eps)
    else:
        result = ops.rmsnorm(x, weight, eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight)
    return result


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds ``x`` to the residual stream and normalises the sum, in one pass over memory.

    Args:
        x: ``[..., hidden]``, the output of the block before.
        residual: like ``x``, the residual stream.
        weight, eps, weight_offset, cast_before_weight: as in :func:`rmsnorm`.
        out: ``(normed, new_residual)``, written and returned instead of new tensors: contiguous, like ``x``, apart from
            each other and from the inputs in memory; each may be ``x`` or ``residual`` itself.

    Returns:
        ``(normed, new_residual)``: ``new_residual = x + residual`` rounded to the dtype of ``x``, and its norm.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``new_residual = x + residual; normed = rmsnorm(new_residual, weight, eps)``.
    """
    refuse_grad("add_rmsnorm", x=x, residual=residual, weight=weight)
    if out is not None:
        normed, new_residual = pair_of("add_rmsnorm", "(normed, new_residual)", out)
        refuse_grad("add_rmsnorm", out=normed, residual_out=new_residual)
        ops.add_rmsnorm.out(
            x, residual, weight, eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight,
            out=normed, residual_out=new_residual,
        )  # fmt: skip
        return normed, new_residual
    if weight_offset == 0.0 and cast_before_weight:
        result: tuple[Tensor, Tensor] = ops.add_rmsnorm(x, residual, weight, eps)
    else:
        result = ops.add_rmsnorm(
            x, residual, weight, eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight
        )
    return result


@torch.library.register_fake("gqa_kernels::rmsnorm")
def _rmsnorm_fake(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gqa_kernels::add_rmsnorm")
def _add_rmsnorm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("gqa_kernels::rmsnorm.out")
def _rmsnorm_out_fake(x: Tensor, weight: Tensor, eps: float, *, out: Tensor, **_: Any) -> None:
    return None


@torch.library.register_fake("gqa_kernels::add_rmsnorm.out")
def _add_rmsnorm_out_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor, residual_out: Tensor, **_: Any
) -> None:
    return None
