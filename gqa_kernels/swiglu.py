"""SwiGLU (Shazeer 2020, arXiv:2002.05202): the activation, and the whole feed-forward block around it."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from gqa_kernels._library import ops, refuse_grad


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``[..., hidden]`` float32, float16 or bfloat16, any strides; or, where ``up`` is None, gate and up side by
            side (gate first) as ``[..., 2 * hidden]``.
        up: like ``gate``.

    Returns:
        A contiguous tensor ``[..., hidden]``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``F.silu(gate) * up``, with the same rounding: silu to the dtype, then the product.
    """
    refuse_grad("swiglu", gate=gate, up=up)
    result: Tensor = ops.swiglu(gate) if up is None else ops.swiglu(gate, up)
    return result


@overload
def swiglu_ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, /) -> Tensor: ...
@overload
def swiglu_ffn(x: Tensor, w_gate_up: Tensor, w_down: Tensor, /) -> Tensor: ...
def swiglu_ffn(x: Tensor, *weights: Tensor) -> Tensor:
    """The feed-forward block of a Llama layer: ``swiglu(x @ w_gate.T, x @ w_up.T) @ w_down.T``.

    Called as ``swiglu_ffn(x, w_gate, w_up, w_down)`` or ``swiglu_ffn(x, w_gate_up, w_down)``.

    Args:
        x: ``[..., hidden]``.
        w_gate, w_up: ``[intermediate, hidden]``, laid out as ``torch.nn.Linear.weight``.
        w_gate_up: ``[2 * intermediate, hidden]``, the rows of ``w_gate`` and then those of ``w_up``.
        w_down: ``[hidden_out, intermediate]``.

    Returns:
        ``[..., hidden_out]``.

    Raises:
        RuntimeError: a wrong shape or number of weights, or an input that requires grad.

    PyTorch equivalent: ``F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)``. The matrix products are
    torch's.
    """
    if len(weights) not in (2, 3):
        raise RuntimeError(
            f"swiglu_ffn: weights must be w_gate, w_up, w_down or w_gate_up, w_down, got {len(weights)} tensors"
        )
    names = ("w_gate_up", "w_down") if len(weights) == 2 else ("w_gate", "w_up", "w_down")
    refuse_grad("swiglu_ffn", x=x, **dict(zip(names, weights)))
    if x.dim() < 1:
        raise RuntimeError(f"swiglu_ffn: x must be [..., hidden], got shape {list(x.shape)}")
    hidden, w_down = x.shape[-1], weights[-1]
    for name, weight in zip(names[:-1], weights[:-1]):
        if weight.dim() != 2 or weight.shape[1] != hidden:
            raise RuntimeError(
                f"swiglu_ffn: {name} must have shape [intermediate, {hidden}] to match x, got {list(weight.shape)}"
            )
    rows = weights[0].shape[0]
    if len(weights) == 2 and rows % 2 != 0:
        raise RuntimeError(f"swiglu_ffn: w_gate_up must have an even number of rows, got {rows}")
    intermediate = rows // 2 if len(weights) == 2 else rows
    if len(weights) == 3 and weights[1].shape[0] != intermediate:
        raise RuntimeError(
            f"swiglu_ffn: w_up must have the shape of w_gate {list(weights[0].shape)}, got {list(weights[1].shape)}"
        )
    if w_down.dim() != 2 or w_down.shape[1] != intermediate:
        raise RuntimeError(f"swiglu_ffn: w_down must have shape [any, {intermediate}], got {list(w_down.shape)}")
    return linear(swiglu(*(linear(x, weight) for weight in weights[:-1])), w_down)


@torch.library.register_fake("gqa_kernels::swiglu")
def _swiglu_fake(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))
