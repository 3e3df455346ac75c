"""The residual add, for engines that do not fuse it with the norm (see :func:`gqa_kernels.add_rmsnorm`)."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad


def residual_add(x: Tensor, residual: Tensor) -> Tensor:
    """``x + residual``.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16, any strides.
        residual: like ``x``; shapes do not broadcast.

    Returns:
        A contiguous tensor like ``x``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``x + residual``, to the bit.
    """
    refuse_grad("residual_add", x=x, residual=residual)
    result: Tensor = ops.residual_add(x, residual)
    return result


@torch.library.register_fake("gqa_kernels::residual_add")
def _residual_add_fake(x: Tensor, residual: Tensor) -> Tensor:
    return x.new_empty(x.shape)
