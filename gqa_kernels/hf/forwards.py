"""The forwards that patch() binds to a model's modules. Each one serves a call, or says why not and steps aside.

They are bound as ``functools.partial(forward, module, report, family)``: picklable, copied with the module, undone by
deletion. Attention has a file of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

import gqa_kernels
from gqa_kernels._library import C
from gqa_kernels.hf.families import Family, eps_of
from gqa_kernels.hf.masks import make_bounds
from gqa_kernels.hf.report import PatchReport

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_DEVICES = ("cpu", "cuda") if C.build_info()["cuda_archs"] else ("cpu",)


def serves_device(device: torch.device) -> bool:
    return device.type in _DEVICES


def note(report: PatchReport, module: nn.Module, reason: str) -> None:
    if not torch.compiler.is_compiling():
        report.note_fallback(type(module).__name__, reason)


def _wants_grad(module: nn.Module, tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and (tensor.requires_grad or any(p.requires_grad for p in module.parameters()))


def unserved(module: nn.Module, tensor: Tensor) -> str | None:
    """What no kernel serves, whatever the op."""
    if _wants_grad(module, tensor):
        return "gradients are wanted, and these are inference kernels: call it under torch.no_grad()"
    if not serves_device(tensor.device):
        return f"this build of gqa_kernels has no kernels for device {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return f"no kernel takes {tensor.dtype}"
    return None


def rmsnorm_forward(module: Any, report: PatchReport, family: Family, hidden_states: Tensor) -> Tensor:
    reason = unserved(module, hidden_states)
    if reason is None and module.weight.dtype != hidden_states.dtype:
        reason = "its weight and its input differ in dtype"
    if reason is not None:
        note(report, module, reason)
        original: Tensor = type(module).forward(module, hidden_states)
        return original
    return gqa_kernels.rmsnorm(hidden_states, module.weight, eps_of(module), **norm_style(family))


def norm_style(family: Family) -> dict[str, Any]:
    return {"weight_offset": family.weight_offset, "cast_before_weight": family.cast_before_weight}


def is_plain(norm: Any) -> bool:
    """Whether calling the norm means computing our forward and nothing else."""
    bound = vars(norm).get("forward")
    return getattr(bound, "func", None) is rmsnorm_forward and not norm._forward_hooks and not norm._forward_pre_hooks


def mlp_forward(module: Any, report: PatchReport, family: Family, x: Tensor) -> Tensor:
    reason = unserved(module, x)
    if reason is None:
        gated = (module.gate_up_proj(x),) if family.fused else (module.gate_proj(x), module.up_proj(x))
        if gated[0].dtype in DTYPES and gated[0].dtype == gated[-1].dtype:
            served: Tensor = module.down_proj(gqa_kernels.swiglu(*gated))
            return served
        reason = f"its projections give {gated[0].dtype} and {gated[-1].dtype}"
    note(report, module, reason)
    original: Tensor = type(module).forward(module, x)
    return original


def decoder_layer_forward(
    module: Any, report: PatchReport, family: Family, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The family's decoder layer with its first residual add and the norm of the MLP's input in one op."""
    norm = module.pre_feedforward_layernorm if family.sandwich else module.post_attention_layernorm
    reason = unserved(module, hidden_states)
    if reason is None and args:
        reason = "it is called with positional arguments"
    if reason is None and not is_plain(norm):
        reason = "the norm before its MLP has hooks or is of another class"
    if reason is None and norm.weight.dtype != hidden_states.dtype:
        reason = "its norm's weight and its input differ in dtype"
    dropout = getattr(module, "resid_attn_dropout", None)
    if reason is None and module.training and dropout is not None and dropout.p > 0.0:
        reason = "dropout is active in training mode"
    if reason is not None:
        note(report, module, reason)
        original: Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
        return original

    attention, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
    if family.sandwich:
        attention = module.post_attention_layernorm(attention)
    if attention.dtype == hidden_states.dtype:
        normed, residual = gqa_kernels.add_rmsnorm(
            attention, hidden_states, norm.weight, eps_of(norm), **norm_style(family)
        )
    else:
        residual = hidden_states + attention
        normed = norm(residual)
    output = module.mlp(normed)
    if not family.dense:
        output, _ = output  # the router's scores
    if family.sandwich:
        output = module.post_feedforward_layernorm(output)
    result: Tensor = residual + output
    return result


def model_forward(
    module: Any,
    report: PatchReport,
    family: Family,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The family's model with its mask as bounds (see masks.py)."""
    inputs = inputs_embeds if inputs_embeds is not None else input_ids
    ours = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
    if inputs is not None and ours and kwargs.get("is_causal") is not False:
        bounds = make_bounds(
            module.config,
            attention_mask,
            past_key_values,
            batch=inputs.shape[0],
            queries=inputs.shape[1],
            device=inputs.device,
            position_ids=position_ids,
            use_cache=_makes_cache(module, use_cache),
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


def _makes_cache(module: Any, use_cache: bool | None) -> bool:
    """What transformers makes of ``use_cache`` before it builds a mask."""
    if module.training and getattr(module, "gradient_checkpointing", False):
        return False
    return bool(use_cache if use_cache is not None else module.config.use_cache)


def create_masks_for_generate(
    module: Any,
    report: PatchReport,
    family: Family,
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
