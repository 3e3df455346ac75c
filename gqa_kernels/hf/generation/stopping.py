"""Where rows end, found on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stopping:
    eos: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, config: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> Stopping:
        if eos_token_id is None:
            eos_token_id = getattr(config, "eos_token_id", None)
        if eos_token_id is None:
            eos: tuple[int, ...] = ()
        else:
            eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        if pad_token_id is None:
            pad_token_id = getattr(config, "pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = eos[0] if eos else 0
        return cls(eos, pad_token_id)

    def look(self, tokens: Tensor) -> tuple[Tensor, bool]:
        """Drawn tokens ``[rows, n]``, padded behind each row's end and cut where all have ended; and whether they have.

        Waits for the device, if there is any eos.
        """
        if not self.eos:
            return tokens, False
        ends = torch.isin(tokens, torch.tensor(self.eos, device=tokens.device))
        before = ends.cumsum(1) - ends.to(torch.int64)
        padded = tokens.masked_fill(before > 0, self.pad)
        running = (before == 0).sum(1).max()
        ended, length = torch.stack([ends.any(1).all().to(torch.int64), running]).tolist()
        return padded[:, :length], bool(ended)
