"""Calls of decoder_step: random ones, those of a HuggingFace model, and what they mean, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gqa_kernels.hf.generation.weights import read_weights

Arguments = dict[str, Any]


def make_step(
    device: str,
    dtype: torch.dtype,
    lengths: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    hidden: int = 128,
    intermediate: int = 208,
    layers: int = 2,
    vocabulary: int = 131,
    capacity: int = 200,
    rotary: int | None = None,
    tables: torch.dtype = torch.float32,
    leftpad: Sequence[int] | None = None,
    bias: bool = False,
    norms: bool = False,
    windows: Sequence[int] | None = None,
    index: torch.dtype = torch.int32,
    drawn_on: str = "cpu",
) -> Arguments:
    """Arguments of a random step. ``rotary``: rotated dimensions, all of them where None, 0 for no rotation. Whatever
    no token may see of the caches is NaN. ``drawn_on``: the same numbers for every device, or the device itself, where
    they are many."""

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=drawn_on) * scale).to(device, dtype)

    def each(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [make(*shape, scale=scale) for _ in range(layers)]

    q, kv, rows = heads[0] * dim, heads[1] * dim, len(lengths)
    call: Arguments = {"hidden": make(rows, hidden)}
    for name in ("k_caches", "v_caches"):
        call[name] = each(rows, capacity, heads[1], dim)
        for cache in call[name]:
            for b, length in enumerate(lengths):
                cache[b, max(length, 0) :] = float("nan")
                cache[b, : leftpad[b] if leftpad else 0] = float("nan")
    for name, outputs in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        call[name] = each(outputs, hidden, scale=hidden**-0.5)
    call["o_proj"] = each(hidden, q, scale=q**-0.5)
    call["gate_proj"], call["up_proj"] = (each(intermediate, hidden, scale=hidden**-0.5) for _ in range(2))
    call["down_proj"] = each(hidden, intermediate, scale=intermediate**-0.5)
    call["input_norm"], call["mlp_norm"], call["norm"] = each(hidden), each(hidden), make(hidden)
    call["head"] = make(vocabulary, hidden, scale=hidden**-0.5)
    call["cache_seqlens"] = torch.tensor(lengths, dtype=index, device=device)
    call["eps"] = 1e-5
    if leftpad is not None:
        call["cache_leftpad"] = torch.tensor(leftpad, dtype=index, device=device)
    if rotary != 0:
        angles = torch.outer(torch.arange(capacity), 10000.0 ** -torch.linspace(0, 1, (rotary or dim) // 2))
        call["rotary_cos"], call["rotary_sin"] = (x.to(device, tables) for x in (angles.cos(), angles.sin()))
    if bias:
        call |= {"q_bias": each(q), "k_bias": each(kv), "v_bias": each(kv)}
    if norms:
        call |= {"q_norm": each(dim), "k_norm": each(dim)}
    if windows is not None:
        call["window_left"] = list(windows)
    return call


def eager(call: Arguments, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, and the new keys and values of each layer, computed in ``dtype`` with plain PyTorch."""
    cast = {name: [x.to(dtype) for x in value] for name, value in call.items() if name.endswith(("_proj", "_bias"))}
    cast |= {name: [x.to(dtype) for x in call[name]] for name in call if name.endswith(("_norm", "_caches"))}
    lengths, leftpad = call["cache_seqlens"].tolist(), call.get("cache_leftpad")
    padding = leftpad.tolist() if leftpad is not None else [0] * len(lengths)
    x, new_keys, new_values = call["hidden"].to(dtype), [], []
    for i in range(len(cast["q_proj"])):
        layer = {name: value[i] for name, value in cast.items()}
        normed = norm(x, layer["input_norm"], call["eps"])
        dim = layer["k_caches"].shape[-1]
        parts = (F.linear(normed, layer[f"{n}_proj"], layer.get(f"{n}_bias")).unflatten(-1, (-1, dim)) for n in "qkv")
        q, k, v = parts
        if "q_norm" in layer:
            q, k = norm(q, layer["q_norm"], call["eps"]), norm(k, layer["k_norm"], call["eps"])
        if "rotary_cos" in call:
            positions = [max(length - pad, 0) for length, pad in zip(lengths, padding)]
            cos, sin = (call[f"rotary_{n}"][positions].to(dtype)[:, None] for n in ("cos", "sin"))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = call["window_left"][i] if "window_left" in call else -1
        outs = []
        for b, length in enumerate(lengths):
            first = padding[b] if window < 0 else max(padding[b], length - window)
            keys, values = (
                torch.cat([cache[b, first:length], new[b : b + 1]] if first <= length else [cache[b, :0]])
                for cache, new in ((layer["k_caches"], k), (layer["v_caches"], v))
            )
            outs.append(attend(q[b], keys, values, call.get("softmax_scale")))
        x = F.linear(torch.stack(outs).flatten(1), layer["o_proj"]) + x
        normed = norm(x, layer["mlp_norm"], call["eps"])
        activation = F.silu(F.linear(normed, layer["gate_proj"])) * F.linear(normed, layer["up_proj"])
        x = F.linear(activation, layer["down_proj"]) + x
        new_keys.append(k)
        new_values.append(v)
    logits = F.linear(norm(x, call["norm"].to(dtype), call["eps"]), call["head"].to(dtype))
    return logits, new_keys, new_values


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """``[heads, D]`` over ``[keys, kv_heads, D]``; 0 where there is no key."""
    if not len(keys):
        return torch.zeros_like(q)
    keys, values = (x.transpose(0, 1).repeat_interleave(len(q) // x.shape[1], 0) for x in (keys, values))
    scores = torch.matmul(keys, q[..., None])[..., 0] * (scale if scale is not None else q.shape[-1] ** -0.5)
    weights = torch.softmax(scores, -1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.matmul(weights.to(q.dtype)[:, None], values)[:, 0]


def weights_of(model: Any, positions: int) -> Arguments:
    """What a step takes of a HuggingFace model: fused projections as slices, its own rotary tables."""
    record = read_weights(model)
    first = record.layers[0]
    heads = [first.q_heads * first.head_dim, first.kv_heads * first.head_dim, first.kv_heads * first.head_dim]
    call: Arguments = {"norm": record.norm.weight, "head": record.head.weights[0], "eps": record.norm.eps}
    fused = len(first.qkv.weights) == 1
    qkv = [torch.split(x.qkv.weights[0], heads) if fused else x.qkv.weights for x in record.layers]
    gate_up = [x.gate_up.weights[0].chunk(2) if fused else x.gate_up.weights for x in record.layers]
    call |= {name: list(each) for name, each in zip(("q_proj", "k_proj", "v_proj"), zip(*qkv))}
    call |= {name: list(each) for name, each in zip(("gate_proj", "up_proj"), zip(*gate_up))}
    call["o_proj"], call["down_proj"] = ([getattr(x, n).weights[0] for x in record.layers] for n in ("o", "down"))
    call["input_norm"], call["mlp_norm"] = (
        [getattr(x, n).weight for x in record.layers] for n in ("input_norm", "mlp_norm")
    )
    if first.qkv.biases:
        biases = zip(*(x.qkv.biases for x in record.layers))
        call |= {name: list(each) for name, each in zip(("q_bias", "k_bias", "v_bias"), biases)}
    if first.qk_norms is not None:
        norms = zip(*(x.qk_norms or () for x in record.layers))
        call |= {name: [x.weight for x in each] for name, each in zip(("q_norm", "k_norm"), norms)}
    call["softmax_scale"] = first.scale
    call["window_left"] = [-1 if x.window is None else x.window - 1 for x in record.layers]
    device = record.embedding.device
    cos, sin = record.rotary(record.embedding[:0], torch.arange(positions, device=device)[None])
    half = cos.shape[-1] // 2
    call |= {"rotary_cos": cos[0, :, :half].contiguous(), "rotary_sin": sin[0, :, :half].contiguous()}
    return call
