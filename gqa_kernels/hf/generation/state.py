"""What a generation changes as it goes, at addresses that captured graphs know."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels.hf.generation.record import ModelWeights
from gqa_kernels.hf.generation.rotary import RotaryTables

SMALLEST_CAPACITY = 256
LINEAR_CAPACITY = 8192


def capacity_bucket(tokens: int) -> int:
    """Powers of two, then multiples of 8192: few capacities, so that captured graphs fit most calls."""
    if tokens > LINEAR_CAPACITY:
        return -(-tokens // LINEAR_CAPACITY) * LINEAR_CAPACITY
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def batch_bucket(rows: int) -> int:
    """Powers of two up to 16, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


class State:
    """Buffers of one batch size and capacity: caches, lengths, the next token's embedding, and the tokens drawn."""

    def __init__(self, weights: ModelWeights, batch: int, capacity: int) -> None:
        device, dtype = weights.device, weights.dtype
        self.batch, self.capacity = batch, capacity
        self.tables = RotaryTables(weights.rotary, capacity, dtype, device)
        # Poisoned memory must not reach a row that stands for nobody: zeros, once.
        self.caches = [
            tuple(
                torch.zeros((batch, capacity, layer.kv_heads, layer.head_dim), dtype=dtype, device=device)
                for _ in ("keys", "values")
            )
            for layer in weights.layers
        ]
        self.hidden = torch.zeros((batch, 1, weights.embedding.shape[1]), dtype=dtype, device=device)
        # Counted together, by one launch: each row's tokens in the cache, and the number of the token drawn next.
        self._counters = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        self.lengths, self.step = self._counters[:batch], self._counters[batch:]
        self.leftpad = torch.zeros(batch, dtype=torch.int64, device=device)
        self.drawn = torch.zeros((capacity, batch), dtype=torch.int64, device=device)
        self.token_counts: Tensor | None = None  # [batch, vocabulary], where a penalty looks at it
        self.logits: Tensor | None = None  # [batch, vocabulary], where the caller draws

    def begin(self, rows: int, leftpad: Tensor | None) -> None:
        """Rows beyond ``rows`` stand for nobody: empty caches, so that they cost next to nothing."""
        self._counters.zero_()
        self.leftpad.zero_()
        if leftpad is not None:
            self.leftpad[:rows].copy_(leftpad)

    def set_place(self, rows: int, length: int, step: int) -> None:
        self.lengths[:rows].fill_(length)
        self.step.fill_(step)

    def advance(self) -> None:
        self._counters.add_(1)
