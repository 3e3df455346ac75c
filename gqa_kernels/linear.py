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
    weight_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor:
    """``x @ weight.T + bias``, for one to three matrices at once: their outputs side by side.

    Called as ``linear(x, w_o)``, or ``linear(x, w_q, w_k, w_v)`` for projections that share their input.

    Args:
        x: ``[..., in_features]`` float32, float16 or bfloat16.
        w1, w2, w3: ``[out_features, in_features]`` each, laid out as ``torch.nn.Linear.weight``, of x's dtype or, all
            of them, float8_e4m3fn.
        bias: ``[sum of out_features]``, the biases of the matrices, one after the other.
        weight_scale: ``[sum of out_features]`` float32, for float8_e4m3fn weights: what the weights of each output are
            to be multiplied by.
        residual: like the result: ``residual + (x @ weight.T + bias)`` is returned, rounded before and after the sum.
        static_weights: a promise that nothing that may still run on the device writes the weights. The kernel then
            reads them while the kernel before it still runs.

    Returns:
        A contiguous tensor ``[..., sum of out_features]``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    Up to 16 tokens of float16 or bfloat16 on sm_90 run as one kernel that streams the weights and applies scales to
    float32 sums; anything else as torch's matrix products, before which weights with scales become a matrix of x's
    dtype, each weight times its scale rounded once. ``explain`` says which.

    PyTorch equivalent: ``torch.cat([F.linear(x, w) for w in (w1, w2, w3)], dim=-1) + bias``, rounded once; with
    ``weight_scale``, of ``w.float() * weight_scale[:, None]``.
    """
    refuse_grad("linear", x=x, w1=w1, w2=w2, w3=w3, bias=bias, weight_scale=weight_scale, residual=residual)
    options = {"weight_scale": weight_scale, "residual": residual}
    given = {name: option for name, option in options.items() if option is not None}
    result: Tensor = ops.linear(x, w1, w2, w3, bias=bias, static_weights=static_weights, **given)
    return result


@torch.library.register_fake("gqa_kernels::linear")
def _linear_fake(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None = None,
    w3: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor:
    features = sum(weight.shape[0] for weight in (w1, w2, w3) if weight is not None)
    return x.new_empty((*x.shape[:-1], features))
