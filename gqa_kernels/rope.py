"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): the rotation, and its tables for each scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from gqa_kernels._library import ops, pair_of, refuse_grad
from gqa_kernels.validation import validate_positions, validating


@overload
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def rope(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor: ...
def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    out: tuple[Tensor, Tensor] | Tensor | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """Rotates the pairs of each head of ``q`` and ``k`` by the angles of the token's position.

    Args:
        q: ``[batch, tokens, heads, head_dim]`` or ``[tokens, heads, head_dim]``, float32, float16 or bfloat16, any
            strides.
        k: like ``q``, with any number of heads, or None.
        cos: a table ``[positions, R/2]``, one angle per pair, or already gathered ``[batch or 1, tokens, R/2]``;
            float32 or the dtype of ``q``. ``R <= head_dim``: the rest of each head passes through. transformers' own
            ``cos`` holds each angle twice: pass ``cos[..., : R // 2]``.
        sin: like ``cos``.
        position_ids: int32 or int64 ``[batch, tokens]``, ``[1, tokens]`` or ``[tokens]``: the row of the table that
            each token takes; None means ``0 ... tokens - 1``. Not with gathered ``cos``. A token whose position is
            outside the table becomes NaN where it would be rotated.
        interleaved: pairs are ``(2i, 2i + 1)`` (GPT-J) instead of ``(i, i + R/2)`` (Llama).
        out: for q and k, or for q alone where ``k`` is None; written and returned instead of new tensors: contiguous,
            like q and k, apart from each other and from the inputs in memory, or q and k themselves.

    Returns:
        Contiguous ``(q, k)`` rotated; ``q`` alone where ``k`` is None.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``q * cos + rotate_half(q) * sin`` as transformers' ``apply_rotary_pos_emb``, computed in
    float32 and rounded once.
    """
    refuse_grad("rope", q=q, k=k, cos=cos, sin=sin)
    if validating() and position_ids is not None and cos.dim() == 2:
        validate_positions("rope", "position_ids", position_ids, cos.shape[0])
    if out is not None:
        q_out, k_out = (out, None) if isinstance(out, Tensor) else pair_of("rope", "one for q and one for k", out)
        refuse_grad("rope", q_out=q_out, k_out=k_out)
        ops.rope.out(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved, q_out=q_out, k_out=k_out)
        return out
    if position_ids is None and not interleaved:
        rotated: tuple[Tensor, Tensor] = ops.rope(q, k, cos, sin)
    else:
        rotated = ops.rope(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved)
    return rotated[0] if k is None else rotated


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """:func:`rope` in place, to the same bits.

    Args:
        q, k: as in :func:`rope`, contiguous in the last dimension, and no two elements in one place of memory; slices
            of one fused projection are fine.
        cos, sin, position_ids, interleaved: as in :func:`rope`.

    Raises:
        RuntimeError: as :func:`rope`, and for expanded or overlapping tensors.

    PyTorch equivalent: ``q.copy_(rope(q, None, cos, sin))``, and so for ``k``.
    """
    refuse_grad("rope_", q=q, k=k, cos=cos, sin=sin)
    if validating() and position_ids is not None and cos.dim() == 2:
        validate_positions("rope_", "position_ids", position_ids, cos.shape[0])
    if position_ids is None and not interleaved:
        ops.rope_(q, k, cos, sin)
    else:
        ops.rope_(q, k, cos, sin, position_ids=position_ids, interleaved=interleaved)


def rope_tables(
    head_dim: int,
    max_position: int,
    *,
    base: float,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
    seq_len: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin for positions ``0 ... max_position - 1``, as transformers computes them.

    Args:
        head_dim: of the attention heads.
        max_position: rows of the tables.
        base: ``rope_theta``.
        scaling: a config's ``rope_scaling`` or ``rope_parameters``: ``rope_type`` (or ``type``) default, linear,
            dynamic, yarn, llama3 or longrope, with that type's settings as transformers names them. Where transformers
            reads the config's ``max_position_embeddings``, that key is read here too, and is ``max_position`` by
            default.
        rotary_dim: rotated dimensions R; by default ``head_dim`` times the scaling's ``partial_rotary_factor``.
        seq_len: length of the sequence that the tables are for: dynamic stretches, and longrope takes its long
            factors, when it exceeds the length of pretraining. None: as transformers starts, with neither.
        device: of the tables.

    Returns:
        ``(cos, sin)``, float32 ``[max_position, R/2]``, multiplied by the scaling's attention factor. Angles are
        products in float32, as in transformers.

    Raises:
        ValueError: an unknown ``rope_type``, a missing setting, or a size out of range.

    PyTorch equivalent: ``LlamaRotaryEmbedding(config)(x, positions)`` of transformers, the first half of each row.
    """
    settings = dict(scaling or {})
    if rotary_dim is None:
        rotary_dim = int(head_dim * settings.get("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2 != 0 or rotary_dim > head_dim:
        raise ValueError(f"rope_tables: rotary_dim must be even, from 2 to head_dim {head_dim}, got {rotary_dim}")
    if max_position < 0:
        raise ValueError(f"rope_tables: max_position must be 0 or more, got {max_position}")
    theta = settings.get("rope_theta")
    if theta is not None and theta != base:
        raise ValueError(
            f"rope_tables: base must equal scaling['rope_theta'] ({theta}) where both are given, got {base}"
        )
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    compute = _INVERSE_FREQUENCIES.get(rope_type)
    if compute is None:
        raise ValueError(
            f"rope_tables: scaling['rope_type'] must be one of {', '.join(_INVERSE_FREQUENCIES)}, got {rope_type!r}"
        )
    settings.setdefault("max_position_embeddings", max_position)
    if settings.get("original_max_position_embeddings") is None:
        settings["original_max_position_embeddings"] = settings["max_position_embeddings"]
    try:
        inverse, attention_factor = compute(float(base), rotary_dim, settings, seq_len)
    except KeyError as error:
        raise ValueError(f"rope_tables: scaling must hold {error} for rope_type {rope_type!r}, got {scaling}") from None
    positions = torch.arange(max_position, dtype=torch.int64, device=device).to(torch.float32)
    angles = positions[:, None] * inverse.to(device=positions.device)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


# Each returns the inverse frequencies [dim / 2] and the factor of cos and sin. The order of operations is that of
# transformers' modeling_rope_utils, which decides the last bit.


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / dim


def _default(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    return 1.0 / (base ** _exponents(dim)), 1.0


def _linear(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    return 1.0 / (base ** _exponents(dim)) / settings["factor"], 1.0


def _dynamic(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    factor, trained = settings["factor"], settings["max_position_embeddings"]
    length: int | Tensor = trained
    if seq_len is not None and seq_len > trained:
        length = torch.tensor(seq_len, device="cpu")  # transformers stretches in float32, by a tensor
    stretched = base * ((factor * length / trained) - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (stretched ** _exponents(dim)), 1.0


def _yarn(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    trained = settings["original_max_position_embeddings"]
    factor = settings.get("factor")
    if factor is None:
        factor = settings["max_position_embeddings"] / trained

    def mscale(weight: float = 1) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        weight, weight_all = settings.get("mscale"), settings.get("mscale_all_dim")
        attention_factor = mscale(weight) / mscale(weight_all) if weight and weight_all else mscale()

    def dimension_of(rotations: float) -> float:
        return (dim * math.log(trained / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension_of(settings.get("beta_fast") or 32), dimension_of(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    extrapolated = 1 - ramp
    frequencies = base ** _exponents(dim)
    inverse = 1.0 / (factor * frequencies) * (1 - extrapolated) + 1.0 / frequencies * extrapolated
    return inverse, attention_factor


def _llama3(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    factor, trained = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    inverse = 1.0 / (base ** _exponents(dim))
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > trained / low, inverse / factor, inverse)
    smooth = (trained / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelength < trained / high) * ~(wavelength > trained / low)
    return torch.where(is_medium, smoothed, scaled), 1.0


def _longrope(base: float, dim: int, settings: dict[str, Any], seq_len: int | None) -> tuple[Tensor, float]:
    trained = settings["original_max_position_embeddings"]
    factor, attention_factor = settings.get("factor"), settings.get("attention_factor")
    if factor is None:
        factor = settings["max_position_embeddings"] / trained
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    name = "long_factor" if seq_len and seq_len > trained else "short_factor"
    factors = torch.tensor(settings[name], dtype=torch.float32, device="cpu")
    if factors.shape != (dim // 2,):
        raise ValueError(f"rope_tables: scaling[{name!r}] must hold {dim // 2} numbers, got {factors.numel()}")
    return 1.0 / (factors * base ** _exponents(dim)), attention_factor


_INVERSE_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


@torch.library.register_fake("gqa_kernels::rope")
def _rope_fake(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


@torch.library.register_fake("gqa_kernels::rope.out")
def _rope_out_fake(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **_: Any) -> None:
    return None


@torch.library.register_fake("gqa_kernels::rope_")
def _rope_in_place_fake(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    return None
