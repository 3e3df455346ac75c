"""Where rows end, found on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_kernels.kv_cache import to_device


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

    def cut(self, tokens: Tensor) -> tuple[Tensor, bool]:
        """Drawn tokens ``[rows, n]``, padded behind each row's end and cut where all have ended; and whether they have.

        Waits for the device, if there is any eos.
        """
        if not self.eos:
            return tokens, False
        ends = torch.isin(tokens, to_device(self.eos, tokens.device))
        before = ends.cumsum(1) - ends.to(torch.int64)
        padded = tokens.masked_fill(before > 0, self.pad)
        running = (before == 0).sum(1).max()
        ended, length = torch.stack([ends.any(1).all().to(torch.int64), running]).tolist()
        return padded[:, :length], bool(ended)


class Ends:
    """Which rows have ended, known on the device; whether all have comes to the host behind the steps that follow."""

    def __init__(self, stopping: Stopping, input_ids: Tensor) -> None:
        self._eos = to_device(stopping.eos, input_ids.device)
        self._ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=input_ids.is_cuda)
        self._copied = torch.Event(input_ids.device) if input_ids.is_cuda else None

    def look(self, tokens: Tensor) -> None:
        """Takes in the next tokens ``[rows, n]``."""
        self._ended |= torch.isin(tokens, self._eos).any(1)
        self._flag.copy_(self._ended.all(), non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def all_ended(self) -> bool:
        """At the last look; waits for that one."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)
