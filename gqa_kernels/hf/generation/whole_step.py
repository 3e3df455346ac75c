"""A step of a whole model in one kernel, where there is one for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from gqa_kernels.hf.generation.record import LayerWeights, ModelWeights
from gqa_kernels.hf.generation.state import State

#: By rows, the bytes of a layer's weights beyond which the ops for each part are faster; for more rows they always are.
MOST_BYTES = {1: 256 << 20, 2: 64 << 20}


def whole_step(weights: ModelWeights, state: State, *, padded: bool) -> Tensor | None:
    """Logits ``[rows, vocabulary]`` of the token after ``state.hidden``, or None where the ops for each part do
    better, or the kernel doesn't serve it."""
    if weights.device.type != "cuda" or not _is_plain(weights) or not _is_small(weights, state.batch):
        return None
    if state.block_table is not None or state.keys[0].dtype != weights.dtype:
        return None
    arguments, options = _call(weights, state, padded)
    try:
        gqa_kernels.explain("decoder_step", *arguments, **options)
    except RuntimeError:  # the kernel's limits
        return None
    return gqa_kernels.decoder_step(*arguments, **options)


def _is_plain(weights: ModelWeights) -> bool:
    """One eps and one scale for all, and no biases but those of q, k and v."""
    layers = weights.layers
    norms = [weights.norm, *(norm for layer in layers for norm in (layer.input_norm, layer.mlp_norm))]
    norms += [norm for layer in layers for norm in layer.qk_norms or ()]
    without = [weights.head, *(part for layer in layers for part in (layer.o, layer.gate_up, layer.down))]
    return (
        len({norm.eps for norm in norms}) == 1
        and len({(layer.scale, layer.q_heads, layer.kv_heads, layer.head_dim) for layer in layers}) == 1
        and len({(layer.qk_norms is None, layer.qkv.bias is None) for layer in layers}) == 1
        and not any(part.biases for part in without)
    )


def _is_small(weights: ModelWeights, rows: int) -> bool:
    layer = weights.layers[0]
    matrices = (*layer.qkv.weights, *layer.o.weights, *layer.gate_up.weights, *layer.down.weights)
    return sum(matrix.nbytes for matrix in matrices) <= MOST_BYTES.get(rows, 0)


def _call(weights: ModelWeights, state: State, padded: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layers = weights.layers
    q, k, v = zip(*(_parts(layer.qkv.weights, _heads(layer)) for layer in layers))
    gate, up = zip(*(_parts(layer.gate_up.weights, [layer.down.weights[0].shape[1]] * 2) for layer in layers))
    arguments = (
        state.hidden[:, 0],
        state.keys,
        state.values,
        q,
        k,
        v,
        [layer.o.weights[0] for layer in layers],
        gate,
        up,
        [layer.down.weights[0] for layer in layers],
        [layer.input_norm.weight for layer in layers],
        [layer.mlp_norm.weight for layer in layers],
        weights.norm.weight,
        weights.head.weights[0],
    )
    options: dict[str, Any] = {
        "cache_seqlens": state.lengths,
        "eps": weights.norm.eps,
        "cache_leftpad": state.leftpad if padded else None,
        "rotary_cos": state.tables.cos,
        "rotary_sin": state.tables.sin,
        "softmax_scale": layers[0].scale,
        "window_left": [layer.window_left(state.capacity) for layer in layers],
    }
    biases = [_parts((layer.qkv.bias,), _heads(layer)) for layer in layers if layer.qkv.bias is not None]
    if biases:
        options["q_bias"], options["k_bias"], options["v_bias"] = zip(*biases)
    norms = [[norm.weight for norm in layer.qk_norms] for layer in layers if layer.qk_norms is not None]
    if norms:
        options["q_norm"], options["k_norm"] = zip(*norms)
    return arguments, options


def _heads(layer: LayerWeights) -> list[int]:
    return [heads * layer.head_dim for heads in (layer.q_heads, layer.kv_heads, layer.kv_heads)]


def _parts(tensors: tuple[Tensor, ...], sizes: list[int]) -> tuple[Tensor, ...]:
    """Matrices that may lie in one."""
    return tensors if len(tensors) > 1 else torch.split(tensors[0], sizes)
