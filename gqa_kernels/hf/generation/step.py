"""The forward of a model's record over its state: chunks of a prompt, and steps of one token, by the same code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from gqa_kernels.hf.generation.record import LayerWeights, ModelWeights, Projection
from gqa_kernels.hf.generation.state import State
from gqa_kernels.kv_cache import MAX_DECODE_QUERIES

#: The most tokens that linear() takes in one kernel; beyond, outputs side by side are a copy more.
STREAMED_TOKENS = 16


def forward(weights: ModelWeights, state: State, hidden: Tensor, *, padded: bool) -> Tensor:
    """Embeddings ``[rows, tokens, width]`` to normed hidden states of the same shape, appending to the caches of the
    first ``rows`` rows at ``state.lengths``."""
    rows, tokens = hidden.shape[:2]
    where = state.where(rows, padded=padded)
    rotary: dict[str, Any] = {"rotary_cos": state.tables.cos, "rotary_sin": state.tables.sin}
    positions = None
    if tokens > MAX_DECODE_QUERIES or any(layer.qk_norms for layer in weights.layers):
        positions = where["cache_seqlens"][:, None] + torch.arange(tokens, device=hidden.device)
        if padded:
            positions = (positions - where["cache_leftpad"][:, None]).clamp_(min=0)

    residual = hidden
    normed = gqa_kernels.rmsnorm(hidden, weights.layers[0].input_norm.weight, weights.layers[0].input_norm.eps)
    following = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]
    for index, (layer, norm) in enumerate(zip(weights.layers, following)):
        options = {**where, **state.scales[index], "window_size": (layer.window_left(state.capacity), -1)}
        out = _attention(layer, normed, state.layer(index, rows), options, rotary, positions)
        normed, residual = gqa_kernels.add_rmsnorm(out, residual, layer.mlp_norm.weight, layer.mlp_norm.eps)
        normed, residual = gqa_kernels.add_rmsnorm(_feed_forward(layer, normed), residual, norm.weight, norm.eps)
    return normed


def logits_of(weights: ModelWeights, normed: Tensor) -> Tensor:
    """Logits ``[rows, vocabulary]`` of the last token of each row."""
    return _linear(normed[:, -1], weights.head)


def embed(weights: ModelWeights, ids: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.index_select(weights.embedding, 0, ids, out=out)


def _attention(
    layer: LayerWeights,
    normed: Tensor,
    cache: tuple[Tensor, Tensor],
    options: dict[str, Any],
    rotary: dict[str, Any],
    positions: Tensor | None,
) -> Tensor:
    rows, tokens = normed.shape[:2]
    q, k, v = _project(layer, normed)
    if layer.qk_norms is not None:
        q_norm, k_norm = layer.qk_norms
        q, k = gqa_kernels.qk_rmsnorm_rope(
            q, k, q_norm.weight, k_norm.weight, *rotary.values(), eps=q_norm.eps, position_ids=positions
        )
        rotary = {}
    elif tokens > MAX_DECODE_QUERIES:  # the fastest kernels of prefill take rotated q and k
        gqa_kernels.rope_(q, k, *rotary.values(), position_ids=positions)
        rotary = {}
    options = {**options, **rotary, "softmax_scale": layer.scale}
    if tokens <= MAX_DECODE_QUERIES:
        # Lengths and rows that an earlier step or chunk wrote are followed by an embedding, and torch launches that the
        # ordinary way: after the end of all kernels before it, whatever the model. So static_prefix holds.
        out: Any = gqa_kernels.gqa_attention_decode(q, *cache, k, v, **options, static_prefix=True)
    else:
        out = gqa_kernels.gqa_attention_prefill(q, k, v, *cache, **options)
    return _linear(out.view(rows, tokens, -1), layer.o)


def _project(layer: LayerWeights, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[rows, tokens, heads, head_dim]``."""
    shape = (*normed.shape[:2], -1, layer.head_dim)
    if len(layer.qkv.weights) == 3 and normed.shape[0] * normed.shape[1] > STREAMED_TOKENS:
        biases = layer.qkv.biases or (None, None, None)
        q, k, v = (gqa_kernels.linear(normed, w, bias=b).view(shape) for w, b in zip(layer.qkv.weights, biases))
        return q, k, v
    qkv = _linear(normed, layer.qkv).view(shape)
    q, k, v = torch.split(qkv, [layer.q_heads, layer.kv_heads, layer.kv_heads], dim=2)
    return q, k, v


def _feed_forward(layer: LayerWeights, normed: Tensor) -> Tensor:
    if layer.gate_up.biases or layer.down.biases:
        return _linear(gqa_kernels.swiglu(_linear(normed, layer.gate_up)), layer.down)
    return gqa_kernels.swiglu_ffn(normed, *layer.gate_up.weights, *layer.down.weights, static_weights=True)


# Nothing writes a weight while a session lasts, so that static_weights holds.
def _linear(x: Tensor, projection: Projection) -> Tensor:
    return gqa_kernels.linear(x, *projection.weights, bias=projection.bias, static_weights=True)
