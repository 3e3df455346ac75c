"""How tokens are drawn: settings on the device, one value per row, which a captured step reads at each replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gqa_kernels

Setting = float | Sequence[float] | Tensor

#: What each setting is when it does nothing; a step that is captured without it has no kernel for it.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_DTYPES = {"top_k": torch.int32, "seed": torch.int64}


@dataclass
class Settings:
    """Each a number for all rows, or one value per row."""

    do_sample: bool
    seed: int | Sequence[int] | Tensor
    temperature: Setting = 1.0
    top_k: Setting = 0
    top_p: Setting = 1.0
    min_p: Setting = 0.0
    repetition_penalty: Setting = 1.0

    def active(self) -> tuple[str, ...]:
        """The settings that a step must look at: what tells captured steps apart."""
        names = NEUTRAL if self.do_sample else ("repetition_penalty",)
        used = [name for name in names if not _is_number(getattr(self, name)) or getattr(self, name) != NEUTRAL[name]]
        return (*used, *(["seed"] if self.do_sample else []))


class Drawing:
    """The settings of one state: a tensor ``[batch]`` for each that was ever used, at an address that stays."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self._values: dict[str, Tensor] = {}

    def reserve(self, active: tuple[str, ...]) -> None:
        for name in active:
            if name not in self._values:
                dtype = _DTYPES.get(name, torch.float32)
                self._values[name] = torch.zeros(self.batch, dtype=dtype, device=self.device)

    def set(self, settings: Settings, rows: int) -> None:
        self.reserve(settings.active())
        for name in settings.active():
            buffer, value = self._values[name][:rows], getattr(settings, name)
            if name == "seed" and _is_number(value):  # a stream for each row, the first one that of the number
                value = [_wrapped(value + row) for row in range(rows)]
            if _is_number(value):
                buffer.fill_(value)
                continue
            values = torch.as_tensor(value, dtype=buffer.dtype)
            if values.shape != (rows,):
                raise ValueError(
                    f"generate: {name} must be a number or hold one value for each of {rows} rows, "
                    f"got shape {tuple(values.shape)}"
                )
            buffer.copy_(values)

    def draw(self, active: tuple[str, ...], logits: Tensor, step: Tensor, token_counts: Tensor | None) -> Tensor:
        """The next token of each row of logits, int64 ``[rows]``. ``step`` is its place in the row's random stream."""
        rows = logits.shape[0]
        options: dict[str, Any] = {name: self._values[name][:rows] for name in active}
        if "seed" in active:
            options["offset"] = step.view(())
        else:
            options["temperature"] = 0.0
        if "repetition_penalty" in active:
            assert token_counts is not None
            options["token_counts"] = token_counts[:rows]
        ids: Tensor = gqa_kernels.sample(logits, **options)
        return ids


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _wrapped(seed: int) -> int:
    """64 bits, as the sampler's int64."""
    return (seed + 2**63) % 2**64 - 2**63
