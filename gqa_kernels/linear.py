"""The projections of a decoder layer: matrix products at the speed of reading the weights, for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad


def linear(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None = None,
    w3: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor:
    """``x @ weight.T + bias``, for one to three matrices at once: their outputs side by side.

    Called as ``linear(x, w_o)``, or ``linear(x, w_q, w_k, w_v)`` for projections that share their input.

    Args:
        x: ``[..., in_features]`` float32, float16 or bfloat16.
        w1, w2, w3: ``[out_features, in_features]`` each, laid out as ``torch.nn.Linear.weight``.
        bias: ``[sum of out_features]``, the biases of the matrices, one after the other.
        static_weights: a promise that nothing that may still run on the device writes the weights. The kernel then
            reads them while the kernel before it still runs.

    Returns:
        A contiguous tensor ``[..., sum of out_features]``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    Up to 16 tokens of float16 or bfloat16 on sm_90 run as one kernel that streams the weights; anything else as torch's
    matrix products. ``explain`` says which.

    PyTorch equivalent: ``torch.cat([F.linear(x, w) for w in (w1, w2, w3)], dim=-1) + bias``, rounded once.
    """
    refuse_grad("linear", x=x, w1=w1, w2=w2, w3=w3, bias=bias)
    result: Tensor = ops.linear(x, w1, w2, w3, bias=bias, static_weights=static_weights)
    return result


@torch.library.register_fake("gqa_kernels::linear")
def _linear_fake(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None = None,
    w3: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor:
    features = sum(weight.shape[0] for weight in (w1, w2, w3) if weight is not None)
    return x.new_empty((*x.shape[:-1], features))
