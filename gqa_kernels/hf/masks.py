"""Attention masks as bounds: the first valid key of each row, in a tensor small enough to build at every step.

transformers hands a 4D attention mask through to the layers as it is. So the patched model replaces a 2D mask, before
transformers expands it to [batch, 1, queries, keys], by *bounds*: int32 ``[batch, 1, 1, 1]`` holding each row's left
padding, or ``[batch, 1, 1, 0]`` where there is none. No mask of transformers or of a user is an int32 tensor.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)

from gqa_kernels.hf.cache import state_of, unservable


def is_bounds(mask: object) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] <= 1


def leftpad_of(bounds: Tensor, dropped: int = 0) -> Tensor | None:
    """Each row's first key, counted from the first one still cached; a row that must become NaN stays negative."""
    if not bounds.shape[-1]:
        return None
    leftpad = bounds.view(-1)
    return torch.where(leftpad < 0, leftpad, (leftpad - dropped).clamp(min=0)) if dropped else leftpad


def make_bounds(
    config: Any,
    attention_mask: Tensor | None,
    past_key_values: Any,
    *,
    batch: int,
    queries: int,
    device: torch.device,
    position_ids: Tensor | None,
    use_cache: bool,
) -> Tensor | None:
    """The bounds that say the same as ``attention_mask``, or None where no bounds do.

    Looking at a mask on the device takes a synchronisation. That is done for each prefill. A decode step that adds
    one column to a mask already looked at is taken to continue it; should it not, its row becomes NaN on the device.
    """
    implementation = config._attn_implementation or ""
    if not getattr(config, "is_causal", True) or implementation.startswith("paged|"):
        return None
    if past_key_values is not None and unservable(past_key_values):
        return None
    state = state_of(past_key_values)
    if attention_mask is None:
        # transformers reads packed sequences off the positions of a call without mask and cache.
        packable = past_key_values is None and not use_cache and position_ids is not None
        if packable and (torch.compiler.is_compiling() or find_packed_sequence_indices(position_ids) is not None):
            return None
        state.mask_seen = None
        return torch.empty((batch, 1, 1, 0), dtype=torch.int32, device=device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        return None

    offset = past_key_values.get_seq_length() if past_key_values is not None else 0
    if isinstance(offset, int):
        keys = offset + queries
        if attention_mask.shape[1] < keys or (past_key_values is None and attention_mask.shape[1] != keys):
            return None
        attention_mask = attention_mask[:, :keys]
    columns = attention_mask.shape[1]
    present = attention_mask.to(device=device, dtype=torch.bool)
    broken = (present[:, 1:] < present[:, :-1]).any(-1)
    leftpad = columns - present.sum(-1)

    if torch.compiler.is_compiling():
        if queries != 1:
            return None
    elif queries != 1 or state.mask_seen != (batch, columns - 1):
        facts = [broken.any(), (leftpad > 0).any()]
        if isinstance(offset, Tensor):
            facts.append(columns - queries - offset.to(device))
        unusable, padded, *surplus = torch.stack([fact.to(torch.int64) for fact in facts]).tolist()
        state.mask_seen = None
        if unusable or min(surplus, default=0) < 0:
            return None
        if max(surplus, default=0) == 0:
            state.mask_seen = (batch, columns)
        if not padded:
            return torch.empty((batch, 1, 1, 0), dtype=torch.int32, device=device)
    else:
        state.mask_seen = (batch, columns)
    return leftpad.masked_fill(broken, -1).to(torch.int32).view(batch, 1, 1, 1)


def original_mask(module: Any, bounds: Tensor, hidden_states: Tensor, past_key_values: Any, window: int | None) -> Any:
    """The mask that transformers would have built in place of ``bounds``, for a layer's original forward."""
    leftpad, padding = leftpad_of(bounds), None
    if leftpad is not None:
        if not torch.compiler.is_compiling() and bool((leftpad < 0).any()):
            raise ValueError(
                "attention_mask must extend the mask of the step before by a column of ones in a decode step, "
                "got a row whose ones are not one interval up to the newest key"
            )
        keys, offset = hidden_states.shape[1], 0
        if past_key_values is not None:
            keys, offset = past_key_values.get_mask_sizes(keys, module.layer_idx)
        padding = torch.arange(keys + offset, device=leftpad.device) >= leftpad[:, None]
    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    return create(
        config=module.config,
        inputs_embeds=hidden_states,
        attention_mask=padding,
        past_key_values=past_key_values,
        layer_idx=module.layer_idx,
    )
