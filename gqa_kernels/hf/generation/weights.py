"""Reads a HuggingFace model into a record of its tensors, or says why it is more than those."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gqa_kernels.hf.families import FAMILIES, SILU, Family, activation_of, classes_of, eps_of, window_of
from gqa_kernels.hf.forwards import DTYPES, serves_device
from gqa_kernels.hf.generation.record import LayerWeights, ModelWeights, Norm, Projection, Unserved


def read_weights(model: nn.Module) -> ModelWeights:
    """The record of a model that is nothing but its family's layers. Raises :class:`Unserved` for any other."""
    if not isinstance(model, PreTrainedModel):
        raise Unserved(f"it is a {type(model).__name__}, not a model of transformers")
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.dense or family.sandwich:
        raise Unserved(f"its family is {model.config.model_type!r}")
    if type(model).__name__ != f"{family.prefix}ForCausalLM":
        raise Unserved(f"it is a {type(model).__name__}, not a {family.prefix}ForCausalLM")
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise Unserved("hooks are set on all modules")
    if model.training:
        raise Unserved("it is in training mode: call model.eval()")
    outer: Any = model
    kinds, body = classes_of(family), outer.model
    _plain(outer, type(outer), "the model")
    _plain(body, kinds.model, "model")
    _plain(body.rotary_emb, type(body.rotary_emb), "model.rotary_emb")
    embedding = body.embed_tokens
    _plain(embedding, nn.Embedding, "model.embed_tokens")
    if embedding.max_norm is not None:
        raise Unserved("its embedding has a max_norm")
    record = ModelWeights(
        embedding=embedding.weight,
        layers=tuple(_layer(layer, family, f"model.layers.{i}") for i, layer in enumerate(body.layers)),
        norm=_norm(body.norm, kinds.norm, "model.norm"),
        head=_projection(outer, ("lm_head",), "the model"),
        rotary=body.rotary_emb,
    )
    _check_tensors(record)
    if len({(layer.kv_heads, layer.head_dim) for layer in record.layers}) > 1:
        raise Unserved("its layers differ in their KV heads")
    return record


def _layer(layer: Any, family: Family, name: str) -> LayerWeights:
    kinds = classes_of(family)
    attention, mlp = layer.self_attn, layer.mlp
    _plain(layer, kinds.layer, name)
    _plain(attention, kinds.attention, f"{name}.self_attn")
    _plain(mlp, kinds.mlp, f"{name}.mlp")
    if type(activation_of(mlp)).__name__ not in SILU:
        raise Unserved(f"its activation is {type(activation_of(mlp)).__name__}, not SiLU")
    if not getattr(attention, "is_causal", True) or not getattr(attention.config, "is_causal", True):
        raise Unserved("its attention is not causal")
    head_dim: int = attention.head_dim
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise Unserved(f"its head_dim is {head_dim}, and the kernels take multiples of 8 up to 256")
    qkv = _projection(attention, ("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj"), f"{name}.self_attn")
    o = _projection(attention, ("o_proj",), f"{name}.self_attn")
    heads = sum(weight.shape[0] for weight in qkv.weights) // head_dim
    kv_heads = heads // (attention.num_key_value_groups + 2)
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm, kinds.norm, f"{name}.input_layernorm"),
        qkv=qkv,
        qk_norms=_qk_norms(attention, kinds.norm, name) if family.qk_norm else None,
        o=o,
        mlp_norm=_norm(layer.post_attention_layernorm, kinds.norm, f"{name}.post_attention_layernorm"),
        gate_up=_projection(mlp, ("gate_up_proj",) if family.fused else ("gate_proj", "up_proj"), f"{name}.mlp"),
        down=_projection(mlp, ("down_proj",), f"{name}.mlp"),
        q_heads=heads - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=attention.scaling,
        window=window_of(family, attention),
    )


def _qk_norms(attention: Any, kind: type[nn.Module], name: str) -> tuple[Norm, Norm]:
    q, k = (_norm(getattr(attention, part), kind, f"{name}.self_attn.{part}") for part in ("q_norm", "k_norm"))
    if q.eps != k.eps:
        raise Unserved("the norms of its q and k differ in eps")
    return q, k


def _norm(norm: Any, kind: type[nn.Module], name: str) -> Norm:
    _plain(norm, kind, name)
    return Norm(norm.weight, eps_of(norm))


def _projection(parent: Any, parts: tuple[str, ...], name: str) -> Projection:
    layers = [getattr(parent, part) for part in parts]
    for part, layer in zip(parts, layers):
        _plain(layer, nn.Linear, f"{name}.{part}")
    biases = tuple(layer.bias for layer in layers)
    return Projection(tuple(layer.weight for layer in layers), biases if any(b is not None for b in biases) else ())


def _plain(module: Any, kind: type[nn.Module], name: str) -> None:
    """That calling the module means its class's forward, or patch()'s, and nothing else: no adapter, no hook."""
    if type(module) is not kind:
        found = f"{type(module).__module__}.{type(module).__qualname__}"  # an adapter's class is a Linear, too
        raise Unserved(f"{name} is a {found}, not a plain {kind.__name__}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unserved(f"{name} has hooks")
    bound = vars(module).get("forward")
    ours = isinstance(bound, partial) and getattr(bound.func, "__module__", "").startswith("gqa_kernels.hf.")
    if bound is not None and not ours:
        raise Unserved(f"the forward of {name} was replaced on the instance")


def _check_tensors(record: ModelWeights) -> None:
    device, dtype = record.device, record.dtype
    if dtype not in DTYPES:
        raise Unserved(f"no kernel takes {dtype}")
    if not serves_device(device):
        raise Unserved(f"this build has no kernels for device {device.type}")
    for tensor in record.tensors():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Unserved(f"a weight is a {type(tensor).__name__}")
        if tensor.dtype != dtype or tensor.device != device:
            raise Unserved(f"its weights are of {dtype} on {device} and of {tensor.dtype} on {tensor.device}")
        if not tensor.is_contiguous():
            raise Unserved("a weight is not contiguous")
