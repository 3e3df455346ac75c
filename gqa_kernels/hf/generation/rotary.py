"""The model's own rotary embedding as tables that a captured step reads by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_kernels.hf.generation.record import Unserved


class RotaryTables:
    """cos and sin ``[capacity, R / 2]`` at fixed addresses, in the dtype that transformers gives them.

    Longrope has two sets of frequencies: one for sequences up to its switch, one for longer ones.
    """

    def __init__(self, rotary: Any, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rotary, self.capacity, self.dtype, self.device = rotary, capacity, dtype, device
        half = self._angles(1)[0].shape[-1]
        self.cos = torch.zeros((capacity, half), dtype=dtype, device=device)
        self.sin = torch.zeros_like(self.cos)
        self._filled: tuple[Any, ...] = ()

    def fill(self, length: int) -> None:
        """Makes the tables those of a sequence of this length."""
        frequencies = self.rotary.inv_freq
        source = (frequencies.data_ptr(), frequencies._version, self.rotary.attention_scaling)
        changing = switch_of(self.rotary) is not None or dynamic_limit(self.rotary) is not None
        if source == self._filled and not changing:
            return
        switch = switch_of(self.rotary)
        beyond = switch is not None and length > switch
        rows = self.capacity if switch is None or beyond else min(self.capacity, switch)
        limit = dynamic_limit(self.rotary)
        if limit is not None:
            rows = min(rows, limit)
        cos, sin = self._angles(rows)
        self.cos[:rows].copy_(cos)
        self.sin[:rows].copy_(sin)
        self._filled = source

    def _angles(self, rows: int) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.rotary(like, torch.arange(rows, device=self.device)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]


def switch_of(rotary: Any) -> int | None:
    """The longest sequence with longrope's short factors; None for other rotations."""
    if rotary.rope_type != "longrope":
        return None
    switch: int = rotary.config.rope_parameters["original_max_position_embeddings"]
    return switch


def dynamic_limit(rotary: Any) -> int | None:
    """The longest sequence before dynamic scaling begins, which changes with each token."""
    if "dynamic" not in rotary.rope_type:
        return None
    limit: int = rotary.original_max_seq_len
    return limit


def check_length(model: Any, rotary: Any, cached: int, prompt: int, new: int) -> None:
    """Whether sequences can go on from so many cached tokens: by a prompt, then by new ones."""
    limit, switch, start, total = dynamic_limit(rotary), switch_of(rotary), cached + prompt, cached + prompt + new
    if limit is not None and total > limit:
        raise Unserved(f"dynamic rotary scaling changes with each token beyond {limit}, and {total} are asked for")
    crosses = switch is not None and (0 < cached <= switch < total or start <= switch < total)
    if crosses and (cached or model.config.model_type != "phi3"):  # Phi-3 goes through all tokens again
        raise Unserved(f"the sequence would cross from longrope's short factors to its long ones, at {switch}")
    longest = model.config.max_position_embeddings
    if total > longest:
        before = f"{cached} cached tokens, the" if cached else "the"
        raise Unserved(f"{before} prompt of {prompt} and {new} new tokens exceed the model's {longest} positions")
