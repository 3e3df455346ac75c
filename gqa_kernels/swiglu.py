"""SwiGLU (Shazeer 2020, arXiv:2002.05202): the activation, and the whole feed-forward block around it."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad


def swiglu(gate: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``[..., hidden]`` float32, float16 or bfloat16, any strides; or, where ``up`` is None, gate and up side by
            side (gate first) as ``[..., 2 * hidden]``.
        up: like ``gate``.
        out: written and returned instead of a new tensor: contiguous, like the result, and apart from the inputs in
            memory or, where ``up`` is given, ``gate`` or ``up`` itself.

    Returns:
        A contiguous tensor ``[..., hidden]``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``F.silu(gate) * up``, with the same rounding: silu to the dtype, then the product.
    """
    refuse_grad("swiglu", gate=gate, up=up, out=out)
    if out is not None:
        ops.swiglu.out(gate, up, out=out)
        return out
    result: Tensor = ops.swiglu(gate) if up is None else ops.swiglu(gate, up)
    return result


@overload
def swiglu_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor: ...
@overload
def swiglu_ffn(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor: ...
def swiglu_ffn(
    x: Tensor,
    *weights: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
    **named: Tensor,
) -> Tensor:
    """The feed-forward block of a Llama layer: ``swiglu(x @ w_gate.T, x @ w_up.T) @ w_down.T``.

    Called as ``swiglu_ffn(x, w_gate, w_up, w_down)`` or ``swiglu_ffn(x, w_gate_up, w_down)``.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16.
        w_gate, w_up: ``[intermediate, hidden]``, laid out as ``torch.nn.Linear.weight``.
        w_gate_up: ``[2 * intermediate, hidden]``, the rows of ``w_gate`` and then those of ``w_up``.
        w_down: ``[hidden_out, intermediate]``.
        gate_up_scale: ``[2 * intermediate]`` float32, for ``w_gate`` and ``w_up`` of float8_e4m3fn: what the weights of
            each of their outputs are to be multiplied by, those of ``w_gate`` first.
        down_scale: ``[hidden_out]`` likewise, for ``w_down`` of float8_e4m3fn.
        residual: like the result: added to it, rounded before and after the sum.
        static_weights: a promise that nothing that may still run on the device writes the weights, as in
            :func:`linear`.

    Returns:
        A contiguous tensor ``[..., hidden_out]``.

    Raises:
        RuntimeError: a wrong shape, dtype, device or number of weights, or an input that requires grad.

    Up to 16 tokens of float16 or bfloat16 on sm_90 run as two kernels that stream the weights, with the activation
    between them; anything else as torch's matrix products around :func:`swiglu`, of weights with scales as in
    :func:`linear`. ``explain`` says which.

    PyTorch equivalent: ``F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)``, with the same roundings.
    """
    names = ("w_gate_up", "w_down") if "w_gate_up" in named else ("w_gate", "w_up", "w_down")
    weights += tuple(named.pop(name) for name in names[len(weights) :] if name in named)
    if named:
        raise TypeError(f"swiglu_ffn: no such argument, or given twice: {', '.join(named)}")
    if len(weights) not in (2, 3):
        raise RuntimeError(
            f"swiglu_ffn: weights must be w_gate, w_up, w_down or w_gate_up, w_down, got {len(weights)} tensors"
        )
    names = ("w_gate_up", "w_down") if len(weights) == 2 else ("w_gate", "w_up", "w_down")
    options = {"gate_up_scale": gate_up_scale, "down_scale": down_scale, "residual": residual}
    given = {name: option for name, option in options.items() if option is not None}
    refuse_grad("swiglu_ffn", x=x, **dict(zip(names, weights)), **given)
    w_up = weights[1] if len(weights) == 3 else None
    result: Tensor = ops.swiglu_ffn(x, weights[0], w_up, weights[-1], static_weights=static_weights, **given)
    return result


@torch.library.register_fake("gqa_kernels::swiglu")
def _swiglu_fake(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


@torch.library.register_fake("gqa_kernels::swiglu_ffn")
def _swiglu_ffn_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    *,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
    static_weights: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


@torch.library.register_fake("gqa_kernels::swiglu.out")
def _swiglu_out_fake(gate: Tensor, up: Tensor | None = None, *, out: Tensor) -> None:
    return None
