"""A batch of prompts as the kernels take it: tokens, and the first one of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels.hf.generation.record import Unserved


def leftpad_of(input_ids: Tensor, attention_mask: Tensor | None, cached: int | None) -> Tensor | None:
    """Each row's left padding, None where no row has any. Looks at the mask once, which waits for the device.

    ``cached`` tokens of each row come before ``input_ids`` in the mask; None where rows differ in them.
    """
    if attention_mask is None:
        return None
    if cached is None:
        raise ValueError("generate: attention_mask must be None over a kv_cache whose rows differ in length, got one")
    rows, tokens = input_ids.shape
    if attention_mask.shape != (rows, cached + tokens):
        wanted = f"the shape of input_ids {(rows, tokens)}"
        if cached:
            wanted = f"shape {(rows, cached + tokens)}, {cached} cached tokens and input_ids {(rows, tokens)}"
        raise ValueError(f"generate: attention_mask must have {wanted}, got {tuple(attention_mask.shape)}")
    present = attention_mask.to(device=input_ids.device, dtype=torch.bool)
    broken = (present[:, 1:] < present[:, :-1]).any() | ~present[:, -1].all()
    leftpad = present.shape[1] - present.sum(-1)
    unusable, padded = torch.stack([broken, (leftpad > 0).any()]).tolist()
    if unusable:
        raise Unserved("a row of the attention mask is not left padding and then ones to its end")
    return leftpad if padded else None


def check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "generate: input_ids must be token ids [batch, tokens], at least one of each, "
            f"got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
