"""The forward that patch() binds to an attention layer: projections, then rotation, append and attention in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from gqa_kernels.hf.cache import count_append, has_room, layer_of, moved, reserve, unservable
from gqa_kernels.hf.families import Family, eps_of, sinks_of, softcap_of, window_of
from gqa_kernels.hf.forwards import DTYPES, is_plain, norm_style, note, unserved
from gqa_kernels.hf.masks import is_bounds, leftpad_of, original_mask
from gqa_kernels.hf.report import PatchReport
from gqa_kernels.kv_cache import MAX_DECODE_QUERIES

#: Keywords that would change what attention computes.
UNSERVED_KEYWORDS = ("position_bias", "s_aux", "softcap", "sliding_window", "cu_seq_lens_q", "cache")


def attention_forward(
    module: Any,
    report: PatchReport,
    family: Family,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    reason = _call_unserved(module, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)
    if reason is None:
        q, k, v = _project(module, family, hidden_states)
        reason = _projections_unserved(module, family, q, k, v, position_embeddings, past_key_values)
    if reason is not None:
        note(report, module, reason)
        if is_bounds(attention_mask):
            attention_mask = original_mask(
                module, attention_mask, hidden_states, past_key_values, window_of(family, module)
            )
        original: tuple[Tensor, Tensor | None] = type(module).forward(
            module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return original

    out = _attention(module, family, q, k, v, position_embeddings, attention_mask, past_key_values)
    return module.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None


def _call_unserved(
    module: Any, hidden_states: Tensor, position_embeddings: Any, mask: Any, past: Any, kwargs: dict[str, Any]
) -> str | None:
    reason = unserved(module, hidden_states)
    if reason is not None:
        return reason
    if module.training and module.attention_dropout > 0:
        return "attention dropout is active in training mode"
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return "output_attentions is on, and the kernels never form the attention weights"
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "is_causal is False"
    for name in UNSERVED_KEYWORDS:
        if kwargs.get(name) is not None:
            return f"{name} is given"
    # The cache comes before the mask: with a cache the kernels cannot use, the mask is left to transformers.
    reason = unservable(past, module.layer_idx) if past is not None else None
    if reason is not None:
        return reason
    if not is_bounds(mask):
        return "the attention mask is not one interval of keys per row (custom 4D, holes, right padding, packed)"
    if position_embeddings is None or hidden_states.dim() != 3:
        return "it is called without position embeddings or with another shape than [batch, tokens, hidden]"
    return None


def _project(module: Any, family: Family, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, S, H, D]``: projections called as modules, for adapters; heads counted in what they give, for
    tensor parallelism."""
    shape = (*hidden_states.shape[:2], -1, module.head_dim)
    if not family.fused:
        q, k, v = (getattr(module, name)(hidden_states).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
        return q, k, v
    qkv = module.qkv_proj(hidden_states).view(shape)
    kv_heads = qkv.shape[2] // (module.num_key_value_groups + 2)
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    return q, k, v


def _projections_unserved(
    module: Any, family: Family, q: Tensor, k: Tensor, v: Tensor, position_embeddings: Any, past: Any
) -> str | None:
    cos, sinks = position_embeddings[0], sinks_of(family, module)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return "its projections differ in dtype, or no kernel takes it"
    if cos.dtype not in (torch.float32, q.dtype) or cos.shape[-1] > module.head_dim:
        return "the rotary tables have another dtype or are wider than a head"
    if family.qk_norm and not module.q_norm.weight.dtype == module.k_norm.weight.dtype == q.dtype:
        return "the norms of its heads have another dtype than its projections"
    if sinks is not None and sinks.dtype not in (torch.float32, q.dtype):
        return "its sinks have another dtype than its projections"
    if past is not None and module.layer_idx < len(past.layers):
        cached = past.layers[module.layer_idx].keys
        if cached is not None and (cached.dtype != k.dtype or cached.device != k.device):
            return "the cache holds another dtype or lies on another device"
    return None


def _attention(
    module: Any,
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: Any,
    bounds: Any,
    past: Any,
) -> Any:
    cos, sin = position_embeddings
    if family.repeated_angles:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    rotary = {"rotary_cos": cos, "rotary_sin": sin}
    if family.qk_norm:
        q, k, rotary = _normed(module, family, q, k, rotary)
    options: dict[str, Any] = {
        "softmax_scale": module.scaling,
        "softcap": softcap_of(family, module),
        "sinks": sinks_of(family, module),
    }
    window, tokens = window_of(family, module), q.shape[1]
    if rotary and tokens > MAX_DECODE_QUERIES:  # the fastest kernels of prefill take rotated q and k
        (q, k), rotary = gqa_kernels.rope(q, k, cos, sin), {}
    if past is None:
        options.update(rotary, cache_leftpad=leftpad_of(bounds), window_size=_window_size(window, tokens))
        return gqa_kernels.gqa_attention_prefill(q, k, v, **options)

    layer = layer_of(past, module.layer_idx)
    appends = has_room(layer, tokens)
    new: tuple[Tensor | None, Tensor | None] = (k, v) if appends else (None, None)
    if appends:
        room = reserve(past, layer, k.transpose(1, 2), v.transpose(1, 2))
    else:
        if rotary:
            q, k = gqa_kernels.rope(q, k, cos, sin)
            rotary = {}
        room = moved(layer, k.transpose(1, 2), v.transpose(1, 2))
    options.update(
        rotary,
        cache_seqlens=room.length,
        cache_leftpad=leftpad_of(bounds, room.dropped),
        window_size=_window_size(window, room.most_keys),
    )
    caches = room.keys.transpose(1, 2), room.values.transpose(1, 2)
    if 1 <= tokens <= MAX_DECODE_QUERIES:
        out = gqa_kernels.gqa_attention_decode(q, *caches, *new, **options)
    else:
        out = gqa_kernels.gqa_attention_prefill(q, *new, *caches, **options)
    if appends:
        count_append(layer, tokens)
    return out


def _window_size(window: int | None, most_keys: int) -> tuple[int, int]:
    """The op's window, or none where no query has more keys than it: kernels without a window are faster."""
    return (-1, -1) if window is None or most_keys <= window else (window - 1, -1)


def _normed(
    module: Any, family: Family, q: Tensor, k: Tensor, rotary: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """q and k through the norms of their heads, and the rotation that is left to do: none where the norms are nothing
    but norms, and one op does both."""
    norms = module.q_norm, module.k_norm
    if not all(map(is_plain, norms)) or eps_of(norms[0]) != eps_of(norms[1]):
        return norms[0](q), norms[1](k), rotary
    weights = (norm.weight for norm in norms)
    q, k = gqa_kernels.qk_rmsnorm_rope(q, k, *weights, *rotary.values(), eps=eps_of(norms[0]), **norm_style(family))
    return q, k, {}
