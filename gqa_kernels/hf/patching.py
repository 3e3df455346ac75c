"""patch(), unpatch() and patched(): bind the forwards of forwards.py to a model's modules, and take them away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gqa_kernels.hf import forwards
from gqa_kernels.hf.attention_forward import attention_forward
from gqa_kernels.hf.families import FAMILIES, SILU, Family, activation_of, classes_of
from gqa_kernels.hf.generation.graphs import release
from gqa_kernels.hf.generation.loop import generate_forward
from gqa_kernels.hf.report import ModuleReport, PatchReport

MASKS, GENERATE = "create_masks_for_generate", "generate"

#: For each class of a family: its new forward, and what the report says of it.
REPLACEMENTS: dict[str, tuple[Any, str]] = {
    "model": (forwards.model_forward, "hands the layers bounds instead of a dense mask"),
    "layer": (forwards.decoder_layer_forward, "add_rmsnorm joins the residual add and the norm after it"),
    "attention": (
        attention_forward,
        "gqa_attention_prefill and gqa_attention_decode: rotation, append and attention in one op",
    ),
    "mlp": (forwards.mlp_forward, "swiglu"),
    "norm": (forwards.rmsnorm_forward, "rmsnorm"),
}


def patch(model: nn.Module) -> PatchReport:
    """Runs a HuggingFace model on these kernels from now on; ``generate`` and all else stay as they were.

    Binds a new forward to each attention, norm, MLP and decoder layer of this instance; no class, weight or config is
    touched, other models are not affected. Calls that the kernels cannot serve (training, output_attentions, masks
    with holes, quantised or offloaded caches, ...) use the original forward, and each reason is logged once.

    Args:
        model: a model of a family in ``gqa_kernels.hf.FAMILIES``, bare or inside a wrapper such as PEFT's. Patching
            twice changes nothing.

    Returns:
        The report: which modules were replaced, which were left alone and why. Print it.

    Raises:
        ValueError: the model is of another family, or none of transformers.
    """
    outermost = _outermost(model)
    supported = ", ".join(FAMILIES)
    if outermost is None:
        raise ValueError(f"patch: model must be a model of transformers ({supported}), got {type(model).__name__}")
    family = FAMILIES.get(outermost.config.model_type)
    if family is None or not any(isinstance(module, classes_of(family).model) for module in model.modules()):
        raise ValueError(
            f"patch: model must be of a family among {supported}, got {type(outermost).__name__} of family "
            f"{outermost.config.model_type!r}"
        )
    known = _report_of(model)
    if known is not None:
        return known

    report = PatchReport(type(outermost).__name__)
    classes, kept = classes_of(family), _attention_kept(model, family)
    for name, module in model.named_modules():
        part = next((part for part, kind in classes._asdict().items() if isinstance(module, kind)), None)
        if part is None:
            continue
        kind, (forward, what) = getattr(classes, part), REPLACEMENTS[part]
        reason = _kept(module, kind, family)
        if reason is None and kept is not None and kind in (classes.model, classes.attention):
            reason = kept
        if reason is None:
            module.forward = partial(forward, module, report, family)
        report.modules.append(ModuleReport(name, type(module).__name__, reason is None, reason or what))
    if kept is None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and not hasattr(module, MASKS) and module.can_generate():
                setattr(module, MASKS, partial(forwards.create_masks_for_generate, module, report, family))
                if GENERATE not in vars(module):
                    setattr(module, GENERATE, partial(generate_forward, module, report, family))
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every module of ``model`` its own forward back. A model that was not patched stays as it is."""
    for module in model.modules():
        for name in ("forward", MASKS, GENERATE):
            if _is_ours(vars(module).get(name)):
                delattr(module, name)
        release(module)


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
    others = [forwards.create_masks_for_generate, generate_forward]
    functions = [forward for forward, _ in REPLACEMENTS.values()] + others
    return isinstance(bound, partial) and bound.func in functions


def _report_of(model: nn.Module) -> PatchReport | None:
    """The report of a patched model: every bound forward carries it."""
    for module in model.modules():
        bound = vars(module).get("forward")
        if isinstance(bound, partial) and _is_ours(bound):
            report: PatchReport = bound.args[1]
            return report
    return None


def _outermost(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _kept(module: Any, kind: type[nn.Module], family: Family) -> str | None:
    """Why this module must keep its forward, or None."""
    classes = classes_of(family)
    if type(module) is not kind:
        return f"a subclass of {kind.__name__} with a forward of its own"
    if "forward" in vars(module):
        return "its forward was already replaced on the instance"
    if kind is classes.mlp:
        if not family.dense:
            return "a mixture of experts, and swiglu is one dense silu(gate) * up"
        if type(activation_of(module)).__name__ not in SILU:
            return f"its activation is {type(activation_of(module)).__name__}, and swiglu is silu(gate) * up"
    head_dim: int = getattr(module, "head_dim", 8)
    if kind is classes.attention and (head_dim % 8 or not 8 <= head_dim <= 256):
        return f"head_dim is {head_dim}, and the kernels take multiples of 8 up to 256"
    return None


def _attention_kept(model: Any, family: Family) -> str | None:
    """Why no attention layer can be replaced: all of them share one mask, so it is all or none."""
    classes = classes_of(family)
    for module in model.modules():
        if isinstance(module, classes.model):
            reason = _kept(module, classes.model, family)
            if reason is not None:
                return f"the model around it is left alone: {reason}"
            layers: Any = module.layers
            for index, layer in enumerate(layers):
                attention = getattr(layer, "self_attn", None)
                there = isinstance(attention, nn.Module)
                reason = _kept(attention, classes.attention, family) if there else "there is none"
                if reason is not None:
                    return f"attention layers share one mask, and that of layer {index} is left alone: {reason}"
    return None
