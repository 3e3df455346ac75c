"""``attn_implementation="gqa_kernels"``: the attention function, and the mask function that belongs to it.

transformers builds the mask before the layers run and calls the function after rotation and cache. Here the mask is a
*span*: what causal attention over a cache needs to know, an int32 tensor ``[batch, 1 or 2, 1 or window + 1, 2]`` that
holds two numbers per row, keys filled and first valid key. Its shape tells the host what it must not read off the
device: a second dimension of 2 that a row is padded, a third of more than 1 the window; both are expanded, not stored.
A mask that is no span stays the boolean 4D mask of transformers, and is served by torch.
"""

from __future__ import annotations

import logging
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

import gqa_kernels
from gqa_kernels.hf.forwards import DTYPES, serves_device
from gqa_kernels.kv_cache import MAX_DECODE_QUERIES

NAME = "gqa_kernels"

logger = logging.getLogger("gqa_kernels.hf")
_logged: set[str] = set()


def register() -> None:
    """Function and mask together: transformers drops every mask of an implementation that has no mask function."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def _log_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _logged:
        _logged.add(reason)
        logger.warning("attn_implementation=%r uses torch's attention: %s", NAME, reason)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The span of a causal or sliding mask over at most left padding; else what ``sdpa`` would be given."""
    rule = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    filled = q_offset + q_length
    padding, known = _left_padding(attention_mask, filled, q_length)
    if known and _same_rule(mask_function, rule):
        span = torch.zeros((batch_size, 1, 1, 2), dtype=torch.int32, device=device)
        span[..., 0] = filled - kv_offset
        if padding is not None:
            span[..., 1] = (padding - kv_offset).clamp(min=0)[:, None, None]
        return span.expand(-1, 1 if padding is None else 2, 1 if local_size is None else local_size + 1, -1)
    _log_once("the attention mask is not causal over one interval of keys per row (holes, right padding, packed, ...)")
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    dense: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **kwargs,
    )
    return dense


def _left_padding(mask: Tensor | None, filled: int | Tensor, queries: int) -> tuple[Tensor | None, bool]:
    """Each row's left padding, None where no row has any; and whether the mask is nothing else.

    Looking at a mask takes a synchronisation, as transformers' own masks do; a compiled model cannot look.
    """
    if mask is None:
        return None, True
    if torch.compiler.is_compiling() or mask.dim() != 2:
        return None, False
    columns = torch.arange(mask.shape[1], device=mask.device)
    cached = columns < filled
    present = mask.bool() & cached
    padding = filled - present.sum(-1)
    expected = (columns >= padding[:, None]) & cached
    broken, padded = torch.stack([(present != expected).any(), (padding > 0).any()]).tolist()
    return (padding if padded else None), not broken


def _same_rule(function: Any, rule: Any) -> bool:
    """Whether two of transformers' mask functions say the same: one code, over equal captured values. A compiled model
    cannot look into them, and knows the plain causal one alone."""
    if function is rule or torch.compiler.is_compiling():
        return function is rule
    if isinstance(function, FunctionType) and isinstance(rule, FunctionType):
        if function.__code__ is not rule.__code__:
            return False
        cells = (function.__closure__ or (), rule.__closure__ or ())
        return _same_rule(*(tuple(cell.cell_contents for cell in each) for each in cells))
    if isinstance(function, tuple) and isinstance(rule, tuple):
        return len(function) == len(rule) and all(_same_rule(a, b) for a, b in zip(function, rule))
    return isinstance(function, int) and isinstance(rule, int) and function == rule


def is_span(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Sk, D]``, rotated and cached; gives ``[B, Sq, Hq, D]``."""
    span = attention_mask if is_span(attention_mask) else None
    reason = _unserved(query, key, value, span, dropout, s_aux, kwargs)
    if reason is not None or span is None:
        _log_once(reason or "it is called without its mask")
        mask = _dense_mask(span, query.shape[2], key.shape[2]) if span is not None else attention_mask
        if softcap is None and s_aux is None:
            out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
            return out, None
        return _eager(module, query, key, value, mask, dropout, scaling, softcap, s_aux), None

    queries, keys = query.shape[2], key.shape[2]
    window = span.shape[2] - 1
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "cache_leftpad": span[:, 0, 0, 1] if span.shape[1] == 2 else None,
        "window_size": (window - 1, -1) if 0 < window < keys else (-1, -1),
    }
    if queries == keys:
        served = gqa_kernels.gqa_attention_prefill(q, k, v, **options)
    elif 1 <= queries <= MAX_DECODE_QUERIES:
        served = gqa_kernels.gqa_attention_decode(q, k, v, cache_seqlens=span[0, 0, 0, 0], **options)
    else:
        served = gqa_kernels.gqa_attention_prefill(q, k_cache=k, v_cache=v, cache_seqlens=span[0, 0, 0, 0], **options)
    assert isinstance(served, Tensor)
    return served, None


def _unserved(
    q: Tensor, k: Tensor, v: Tensor, span: Tensor | None, dropout: float, sinks: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    if span is None:
        return "the attention mask is not causal over one interval of keys per row (holes, right padding, packed, ...)"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, sinks)):
        return "gradients are wanted, and these are inference kernels: call it under torch.no_grad()"
    if dropout > 0.0:
        return "attention dropout is active in training mode"
    if kwargs.get("position_bias") is not None:
        return "position_bias is given"
    if not serves_device(q.device):
        return f"this build of gqa_kernels has no kernels for device {q.device.type}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"no kernel takes {q.dtype}, {k.dtype} and {v.dtype} together"
    if sinks is not None and sinks.dtype not in (torch.float32, q.dtype):
        return f"its sinks are {sinks.dtype} and its queries {q.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256 or v.shape[-1] != q.shape[-1]:
        return f"head_dim is {q.shape[-1]}, and the kernels take multiples of 8 up to 256"
    return None


def _dense_mask(span: Tensor, queries: int, keys: int) -> Tensor:
    """The boolean mask ``[B, 1, queries, keys]`` that a span stands for."""
    filled, first = span[:, 0, 0, 0].view(-1, 1, 1, 1), span[:, 0, 0, 1].view(-1, 1, 1, 1)
    row = filled - queries + torch.arange(queries, device=span.device)[:, None]
    column = torch.arange(keys, device=span.device)
    allowed = (column <= row) & (column >= first)
    window = span.shape[2] - 1
    return allowed & (column > row - window) if window > 0 else allowed


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What torch's fused attention cannot do: a softcap, or sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    scores = scores.float()
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(query.dtype).nan_to_num()
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous()
