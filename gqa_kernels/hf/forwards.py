"""The forwards that patch() binds to a model's modules. Each one serves a call, or says why not and steps aside.

They are bound as ``functools.partial(forward, module, report)``: picklable, copied with the module, undone by deletion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import gqa_kernels
from gqa_kernels._library import C
from gqa_kernels.hf.cache import count_append, layer_for_append, length_of, unservable
from gqa_kernels.hf.masks import is_bounds, leftpad_of, make_bounds, original_mask
from gqa_kernels.hf.report import PatchReport
from gqa_kernels.kv_cache import MAX_DECODE_QUERIES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Keywords that would change what attention computes.
UNSERVED_KEYWORDS = ("position_bias", "s_aux", "softcap", "sliding_window", "cu_seq_lens_q", "cache")

_DEVICES = ("cpu", "cuda") if C.build_info()["cuda_archs"] else ("cpu",)


def _note(report: PatchReport, module: nn.Module, reason: str) -> None:
    if not torch.compiler.is_compiling():
        report.note_fallback(type(module).__name__, reason)


def _wants_grad(module: nn.Module, tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and (tensor.requires_grad or any(p.requires_grad for p in module.parameters()))


def _unserved(module: nn.Module, tensor: Tensor) -> str | None:
    """What no kernel serves, whatever the op."""
    if _wants_grad(module, tensor):
        return "gradients are wanted, and these are inference kernels: call it under torch.no_grad()"
    if tensor.device.type not in _DEVICES:
        return f"this build of gqa_kernels has no kernels for device {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return f"no kernel takes {tensor.dtype}"
    return None


def rmsnorm_forward(module: LlamaRMSNorm, report: PatchReport, hidden_states: Tensor) -> Tensor:
    reason = _unserved(module, hidden_states)
    if reason is None and module.weight.dtype != hidden_states.dtype:
        reason = "its weight and its input differ in dtype"
    if reason is not None:
        _note(report, module, reason)
        original: Tensor = type(module).forward(module, hidden_states)
        return original
    return gqa_kernels.rmsnorm(hidden_states, module.weight, module.variance_epsilon)


def mlp_forward(module: Any, report: PatchReport, x: Tensor) -> Tensor:
    reason = _unserved(module, x)
    if reason is None:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.dtype in DTYPES and gate.dtype == up.dtype:
            served: Tensor = module.down_proj(gqa_kernels.swiglu(gate, up))
            return served
        reason = f"its projections give {gate.dtype} and {up.dtype}"
    _note(report, module, reason)
    original: Tensor = type(module).forward(module, x)
    return original


def decoder_layer_forward(
    module: Any,
    report: PatchReport,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    options = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        **kwargs,
    }
    norm = module.post_attention_layernorm
    reason = _unserved(module, hidden_states)
    if reason is None and not _is_plain(norm):
        reason = "post_attention_layernorm has hooks or is of another class"
    if reason is None and norm.weight.dtype != hidden_states.dtype:
        reason = "its norm's weight and its input differ in dtype"
    if reason is not None:
        _note(report, module, reason)
        original: Tensor = type(module).forward(module, hidden_states, **options)
        return original

    attention, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **options)
    if attention.dtype == hidden_states.dtype:
        normed, residual = gqa_kernels.add_rmsnorm(attention, hidden_states, norm.weight, norm.variance_epsilon)
    else:
        residual = hidden_states + attention
        normed = norm(residual)
    output: Tensor = residual + module.mlp(normed)
    return output


def _is_plain(norm: nn.Module) -> bool:
    """Whether calling the norm means computing its forward and nothing else."""
    bound = vars(norm).get("forward")
    return (
        type(norm) is LlamaRMSNorm
        and (bound is None or getattr(bound, "func", None) is rmsnorm_forward)
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
    )


def attention_forward(
    module: Any,
    report: PatchReport,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    reason = _attention_unserved(module, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)
    if reason is None:
        # [B, S, H, D], the layout of the kernels
        shape = (*hidden_states.shape[:2], -1, module.head_dim)
        q = module.q_proj(hidden_states).view(shape)
        k = module.k_proj(hidden_states).view(shape)
        v = module.v_proj(hidden_states).view(shape)
        reason = _projections_unserved(module, q, k, v, position_embeddings, past_key_values)
    if reason is not None:
        _note(report, module, reason)
        if is_bounds(attention_mask):
            attention_mask = original_mask(module, attention_mask, hidden_states, past_key_values)
        original: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return original

    out = _attention(module, q, k, v, position_embeddings, attention_mask, past_key_values)
    return module.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None


def _attention_unserved(
    module: Any, hidden_states: Tensor, position_embeddings: Any, mask: Any, past: Any, kwargs: dict[str, Any]
) -> str | None:
    reason = _unserved(module, hidden_states)
    if reason is not None:
        return reason
    if module.training and module.attention_dropout > 0:
        return "attention dropout is active in training mode"
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return "output_attentions is on, and the kernels never form the attention weights"
    if kwargs.get("is_causal") is False:
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


def _projections_unserved(
    module: Any, q: Tensor, k: Tensor, v: Tensor, position_embeddings: Any, past: Any
) -> str | None:
    cos = position_embeddings[0]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return "its projections differ in dtype, or no kernel takes it"
    if cos.dtype not in (torch.float32, q.dtype) or cos.shape[-1] > module.head_dim:
        return "the rotary tables have another dtype or are wider than a head"
    if past is not None and module.layer_idx < len(past.layers):
        cached = past.layers[module.layer_idx].keys
        if cached is not None and (cached.dtype != k.dtype or cached.device != k.device):
            return "the cache holds another dtype or lies on another device"
    return None


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, position_embeddings: Any, bounds: Any, past: Any) -> Any:
    cos, sin = position_embeddings
    half = cos.shape[-1] // 2  # transformers repeats the angles for the second half of a head
    options: dict[str, Any] = {
        "cache_leftpad": leftpad_of(bounds),
        "rotary_cos": cos[..., :half],
        "rotary_sin": sin[..., :half],
        "softmax_scale": module.scaling,
    }
    if past is None:
        return gqa_kernels.gqa_attention_prefill(q, k, v, **options)
    tokens = q.shape[1]
    layer, keys, values = layer_for_append(past, module.layer_idx, k.transpose(1, 2), v.transpose(1, 2))
    options["cache_seqlens"] = length_of(past, layer, q.device)
    k_cache, v_cache = keys.transpose(1, 2), values.transpose(1, 2)
    if 1 <= tokens <= MAX_DECODE_QUERIES:
        out = gqa_kernels.gqa_attention_decode(q, k_cache, v_cache, k, v, **options)
    else:
        out = gqa_kernels.gqa_attention_prefill(q, k, v, k_cache, v_cache, **options)
    count_append(layer, tokens)
    return out


def model_forward(
    module: Any,
    report: PatchReport,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """LlamaModel.forward with the mask as bounds (see masks.py)."""
    inputs = inputs_embeds if inputs_embeds is not None else input_ids
    if inputs is not None and (attention_mask is None or attention_mask.dim() == 2):
        bounds = make_bounds(
            module.config,
            attention_mask,
            past_key_values,
            batch=inputs.shape[0],
            queries=inputs.shape[1],
            device=inputs.device,
            position_ids=position_ids,
            use_cache=bool(use_cache if use_cache is not None else module.config.use_cache),
        )
        attention_mask = bounds if bounds is not None else attention_mask
    return type(module).forward(
        module,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def create_masks_for_generate(
    module: Any,
    report: PatchReport,
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """generate() prepares the masks of a static cache itself, and asks the model for this first."""
    bounds = make_bounds(
        config,
        attention_mask,
        past_key_values,
        batch=inputs_embeds.shape[0],
        queries=inputs_embeds.shape[1],
        device=inputs_embeds.device,
        position_ids=position_ids,
        use_cache=True,
    )
    if bounds is not None:
        return bounds
    return masking_utils.create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        **kwargs,
    )
