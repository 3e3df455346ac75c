"""Tensors inside larger buffers: canaries around them, poison in what must not be read, unchanged inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CANARY = 0xA5
MARGIN = 256


def raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's values as bytes, so that NaN compares equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw_bytes(a), raw_bytes(b))


class Comparison:
    """Of bytes, on the device: nothing waits for it until it is asked."""

    def __init__(self, device: str) -> None:
        self.differs = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, actual: Any, expected: Any) -> None:
        for a, b in zip(actual, expected, strict=True):
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            self.differs |= (a.view(kind) != b.view(kind)).any()

    def check(self, what: str) -> None:
        assert not bool(self.differs), what


class Guard:
    """Places tensors between canaries. ``check`` fails if a canary or a read-only tensor has changed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._buffers: list[tuple[Tensor, int, int]] = []
        self._read_only: list[tuple[str, Tensor, Tensor]] = []

    def place(self, tensor: Tensor, *, name: str = "input", writable: bool = False, offset: int = 0) -> Tensor:
        """A contiguous copy of ``tensor`` on the device; ``offset`` elements misalign it."""
        size = tensor.numel() * tensor.element_size()
        start = MARGIN + offset * tensor.element_size()
        buffer = torch.full((start + size + MARGIN,), CANARY, dtype=torch.uint8, device=self.device)
        inside = buffer[start : start + size]
        placed = inside.view(tensor.dtype).view(tensor.shape)
        placed.copy_(tensor, non_blocking=True)  # from memory of the host's own: a GPU is not waited for
        self._buffers.append((buffer, start, size))
        if not writable:
            self._read_only.append((name, placed, placed.clone()))
        return placed

    def randn(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        writable: bool = False,
        offset: int = 0,
    ) -> Tensor:
        return self.place((torch.randn(shape) * scale).to(dtype), writable=writable, offset=offset)

    def ints(self, values: list[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.place(torch.as_tensor(values, dtype=dtype))

    def check(self) -> None:
        kept = [
            (torch.cat([buffer[:start], buffer[start + size :]]) == CANARY).all()
            for buffer, start, size in self._buffers
        ]
        assert not kept or bool(torch.stack(kept).all()), "bytes around a tensor were overwritten"
        # All at once: a test on a GPU waits for one answer.
        same = [(raw_bytes(placed) == raw_bytes(before)).all() for _, placed, before in self._read_only]
        if same and not bool(torch.stack(same).all()):
            changed = [name for (name, _, _), alike in zip(self._read_only, same) if not alike]
            raise AssertionError(f"{changed}: a read-only tensor was changed")
