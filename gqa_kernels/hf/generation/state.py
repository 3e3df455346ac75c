"""What a generation changes as it goes, at addresses that captured graphs know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqa_kernels.hf.generation.record import ModelWeights
from gqa_kernels.hf.generation.rotary import RotaryTables
from gqa_kernels.kv_cache import BaseCache, KVCache

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


def own_cache(weights: ModelWeights, batch: int, capacity: int) -> KVCache:
    """A cache for a call that brings none."""
    layer, layers = weights.layers[0], len(weights.layers)
    options: dict[str, Any] = {"dtype": weights.dtype, "device": weights.device}
    cache = KVCache(batch, layers, capacity, layer.kv_heads, layer.head_dim, **options)
    for index in range(layers):  # poisoned memory must not reach a row that stands for nobody
        for held in cache.layer(index):
            held.zero_()
    return cache


class State:
    """Buffers for a batch over one cache: lengths, the next token's embedding, and the tokens drawn.

    Holds the tensors of the cache, but not the cache, so that a caller's can go.
    """

    def __init__(self, weights: ModelWeights, cache: BaseCache) -> None:
        device, dtype = weights.device, weights.dtype
        self.batch, self.capacity = batch, capacity = cache.batch, cache.capacity
        self.keys, self.values = zip(*(cache.layer(index) for index in range(cache.num_layers)))
        self.scales = [cache.scales(index) for index in range(cache.num_layers)]
        self.block_table: Tensor | None = cache.where().get("block_table")
        self._held = cache.lengths  # what lies in the cache before the prompt
        self.tables = RotaryTables(weights.rotary, capacity, dtype, device)
        self.hidden = torch.zeros((batch, 1, weights.embedding.shape[1]), dtype=dtype, device=device)
        # Counted together, by one launch: each row's tokens in the cache, and the number of the token drawn next.
        self._counters = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        self.lengths, self.step = self._counters[:batch], self._counters[batch:]
        self.leftpad = torch.zeros(batch, dtype=torch.int64, device=device)
        self.drawn = torch.zeros((capacity, batch), dtype=torch.int64, device=device)
        self.token_counts: Tensor | None = None  # [batch, vocabulary], where a penalty looks at it
        self.logits: Tensor | None = None  # [batch, vocabulary], where the caller draws

    def is_over(self, cache: BaseCache) -> bool:
        """False where the cache has moved since, to larger buffers."""
        return cache.layer(0)[0].data_ptr() == self.keys[0].data_ptr() and cache.capacity == self.capacity

    def begin(self, rows: int, leftpad: Tensor | None) -> None:
        """Rows beyond ``rows`` stand for nobody: empty caches, so that they cost next to nothing."""
        self.step.zero_()
        self.lengths.copy_(self._held)
        self.leftpad.zero_()
        if leftpad is not None:
            self.leftpad[:rows].copy_(leftpad)

    def set_place(self, rows: int, tokens: int, step: int) -> None:
        """So many tokens behind what the cache held."""
        torch.add(self._held[:rows], tokens, out=self.lengths[:rows])
        self.step.fill_(step)

    def advance(self) -> None:
        self._counters.add_(1)

    def where(self, rows: int, *, padded: bool) -> dict[str, Any]:
        """The keywords that tell an op where the first rows lie."""
        table = self.block_table
        return {
            "cache_seqlens": self.lengths[:rows],
            "cache_leftpad": self.leftpad[:rows] if padded else None,
            "block_table": table if table is None else table[:rows],
        }

    def layer(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows in one layer, as ops take them with ``where``."""
        keys, values = self.keys[index], self.values[index]
        return (keys[:rows], values[:rows]) if self.block_table is None else (keys, values)
