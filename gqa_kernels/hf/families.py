"""Which parts a model family of transformers is made of. A new family is one line of FAMILIES, and a test."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import nn

#: The configs' names for silu, as the classes of transformers' activations.
SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True)
class Family:
    """What differs between families; everything else is read from the module that is served.

    Attributes:
        name: the config's ``model_type``.
        prefix: of the classes in ``transformers.models.<name>``: LlamaModel, LlamaDecoderLayer, LlamaAttention, ...
        window: where an attention layer finds its sliding window: in its config, on itself, or nowhere.
        fused: q, k and v come from one ``qkv_proj``, gate and up from one ``gate_up_proj``.
        sandwich: each block has a norm behind it as well as before it.
        weight_offset, cast_before_weight: of the norms, as in :func:`gqa_kernels.rmsnorm`.
        qk_norm: each head of q and k has a norm before its rotation.
        repeated_angles: the rotary tables hold each angle twice, for both halves of a head.
        dense: the MLP is a gated one, not a mixture of experts.
        softcap, sinks: names of the attention's attributes that hold them.
    """

    name: str
    prefix: str
    window: Literal["none", "config", "layer"] = "none"
    fused: bool = False
    sandwich: bool = False
    weight_offset: float = 0.0
    cast_before_weight: bool = True
    qk_norm: bool = False
    repeated_angles: bool = True
    dense: bool = True
    softcap: str | None = None
    sinks: str | None = None


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", window="config"),
        Family("qwen2", "Qwen2", window="layer"),
        Family("qwen3", "Qwen3", window="layer", qk_norm=True),
        Family("phi3", "Phi3", window="config", fused=True),
        Family(
            "gemma2",
            "Gemma2",
            window="layer",
            sandwich=True,
            weight_offset=1.0,
            cast_before_weight=False,
            softcap="attn_logit_softcapping",
        ),
        Family(
            "gpt_oss",
            "GptOss",
            window="layer",
            cast_before_weight=False,
            repeated_angles=False,
            dense=False,
            sinks="sinks",
        ),
    )
}


class Classes(NamedTuple):
    """A family's modules in transformers."""

    model: type[nn.Module]
    layer: type[nn.Module]
    attention: type[nn.Module]
    mlp: type[nn.Module]
    norm: type[nn.Module]


@cache
def classes_of(family: Family) -> Classes:
    modeling = importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")
    names = ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")
    return Classes(*(getattr(modeling, family.prefix + name) for name in names))


def window_of(family: Family, attention: Any) -> int | None:
    """How many keys, itself included, a query of this layer sees; None where it sees all before it."""
    if family.window == "none":
        return None
    window: int | None = getattr(attention.config if family.window == "config" else attention, "sliding_window", None)
    return window


def softcap_of(family: Family, attention: Any) -> float:
    """0 is none. transformers' sdpa leaves a softcap out, and a patched model computes what it did before."""
    if family.softcap is None or attention.config._attn_implementation == "sdpa":
        return 0.0
    return getattr(attention, family.softcap) or 0.0


def sinks_of(family: Family, attention: Any) -> Any:
    return getattr(attention, family.sinks) if family.sinks is not None else None


def eps_of(norm: Any) -> float:
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


def activation_of(mlp: Any) -> nn.Module:
    activation: nn.Module = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    return activation
