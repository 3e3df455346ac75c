"""patch(), unpatch() and patched(): bind the forwards of forwards.py to a model's modules, and take them away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from gqa_kernels.hf import forwards
from gqa_kernels.hf.report import ModuleReport, PatchReport

MASKS = "create_masks_for_generate"

#: Class: its new forward, and what the report says of it.
REPLACEMENTS: dict[type[nn.Module], tuple[Any, str]] = {
    LlamaModel: (forwards.model_forward, "hands the layers bounds instead of a dense mask"),
    LlamaDecoderLayer: (forwards.decoder_layer_forward, "add_rmsnorm joins the residual add and the norm after it"),
    LlamaAttention: (
        forwards.attention_forward,
        "gqa_attention_prefill and gqa_attention_decode: rotation, append and attention in one op",
    ),
    LlamaMLP: (forwards.mlp_forward, "swiglu"),
    LlamaRMSNorm: (forwards.rmsnorm_forward, "rmsnorm"),
}


def patch(model: nn.Module) -> PatchReport:
    """Runs a HuggingFace Llama model on these kernels from now on; ``generate`` and all else stay as they were.

    Binds a new forward to each attention, norm, MLP and decoder layer of this instance; no class, weight or config is
    touched, other models are not affected. Calls that the kernels cannot serve (training, output_attentions, masks
    with holes, quantised or offloaded caches, ...) use the original forward, and each reason is logged once.

    Args:
        model: a Llama model of transformers, bare or inside a wrapper such as PEFT's. Patching twice changes nothing.

    Returns:
        The report: which modules were replaced, which were left alone and why. Print it.

    Raises:
        ValueError: the model is of another family, or none of transformers.
    """
    family = _family(model)
    if family is not None and family.config.model_type != "llama":
        raise ValueError(
            f"patch: model must be a Llama model, got {type(family).__name__} of family "
            f"{family.config.model_type!r}, which is not supported yet"
        )
    if family is None or not any(isinstance(module, LlamaModel) for module in model.modules()):
        raise ValueError(f"patch: model must be a Llama model of transformers, got {type(model).__name__}")
    known = _report_of(model)
    if known is not None:
        return known

    report = PatchReport(type(family).__name__)
    kept = _attention_kept(model)
    for name, module in model.named_modules():
        found = next((kind for kind in REPLACEMENTS if isinstance(module, kind)), None)
        if found is None:
            continue
        forward, what = REPLACEMENTS[found]
        reason = _kept(module, found)
        if reason is None and kept is not None and found in (LlamaModel, LlamaAttention):
            reason = kept
        if reason is None:
            module.forward = partial(forward, module, report)
        report.modules.append(ModuleReport(name, type(module).__name__, reason is None, reason or what))
    if kept is None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and not hasattr(module, MASKS) and module.can_generate():
                setattr(module, MASKS, partial(forwards.create_masks_for_generate, module, report))
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every module of ``model`` its own forward back. A model that was not patched stays as it is."""
    for module in model.modules():
        for name in ("forward", MASKS):
            if _is_ours(vars(module).get(name)):
                delattr(module, name)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches inside the block only; a model patched before stays patched."""
    before = _report_of(model)
    report = patch(model)
    try:
        yield report
    finally:
        if before is None:
            unpatch(model)


def _is_ours(bound: object) -> bool:
    functions = [forward for forward, _ in REPLACEMENTS.values()] + [forwards.create_masks_for_generate]
    return isinstance(bound, partial) and bound.func in functions


def _report_of(model: nn.Module) -> PatchReport | None:
    """The report of a patched model: every bound forward carries it."""
    for module in model.modules():
        bound = vars(module).get("forward")
        if isinstance(bound, partial) and _is_ours(bound):
            report: PatchReport = bound.args[1]
            return report
    return None


def _family(model: nn.Module) -> PreTrainedModel | None:
    """The outermost model of transformers in ``model``."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _kept(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why this module must keep its forward, or None."""
    if type(module) is not kind:
        return f"a subclass of {kind.__name__} with a forward of its own"
    if "forward" in vars(module):
        return "its forward was already replaced on the instance"
    if isinstance(module, LlamaMLP) and type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"hidden_act is {module.config.hidden_act!r}, and swiglu is silu(gate) * up"
    if isinstance(module, LlamaAttention) and (module.head_dim % 8 or not 8 <= module.head_dim <= 256):
        return f"head_dim is {module.head_dim}, and the kernels take multiples of 8 up to 256"
    return None


def _attention_kept(model: nn.Module) -> str | None:
    """Why no attention layer can be replaced: all of them share one mask, so it is all or none."""
    for module in model.modules():
        if isinstance(module, LlamaModel):
            reason = _kept(module, LlamaModel)
            if reason is not None:
                return f"the model around it is left alone: {reason}"
            for index, layer in enumerate(module.layers):
                attention = getattr(layer, "self_attn", None)
                reason = _kept(attention, LlamaAttention) if isinstance(attention, nn.Module) else "there is none"
                if reason is not None:
                    return f"attention layers share one mask, and that of layer {index} is left alone: {reason}"
    return None
