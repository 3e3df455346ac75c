"""Prompts into the caches, in chunks: small ones whose shape comes again from CUDA graphs, as a step is."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gqa_kernels.hf.generation.record import ModelWeights
from gqa_kernels.hf.generation.state import State
from gqa_kernels.hf.generation.step import embed, forward, logits_of
from gqa_kernels.validation import validating

CHUNK = 2048
KEPT_SHAPES = 4
#: Weights times tokens: beyond, the device takes longer over a chunk than the host does over its launches.
MOST_WORK = 4 * 10**12


class Shape(NamedTuple):
    rows: int
    tokens: int
    padded: bool


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    last: Tensor


class Prefill:
    """The chunks of one state."""

    def __init__(self, weights: ModelWeights, state: State, pool: Any) -> None:
        self._weights, self._state, self._pool = weights, state, pool
        self._size = sum(tensor.numel() for tensor in weights.tensors())
        self._shapes: OrderedDict[Shape, Captured | None] = OrderedDict()  # those seen, and what was captured of them

    def __call__(self, ids: Tensor, *, padded: bool) -> Tensor:
        """A prompt ``[rows, tokens]`` into the caches; the logits of its last token."""
        last = self._state.hidden
        for start in range(0, ids.shape[1], CHUNK):
            self._state.set_place(ids.shape[0], start, 0)
            last = self._chunk(ids[:, start : start + CHUNK], padded)
        return logits_of(self._weights, last)

    def _chunk(self, ids: Tensor, padded: bool) -> Tensor:
        shape = Shape(ids.shape[0], ids.shape[1], padded)
        if not ids.is_cuda or validating() or ids.numel() * self._size > MOST_WORK:
            return self._run(ids, padded)
        if shape not in self._shapes:
            self._shapes[shape] = None
            if len(self._shapes) > KEPT_SHAPES:
                self._shapes.popitem(last=False)
            return self._run(ids, padded)
        captured = self._shapes[shape] or self._capture(ids, padded)
        self._shapes[shape] = captured
        self._shapes.move_to_end(shape)
        captured.ids.copy_(ids)
        captured.graph.replay()
        return captured.last

    def _capture(self, ids: Tensor, padded: bool) -> Captured:
        static = ids.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            last = self._run(static, padded)
        return Captured(graph, static, last)

    def _run(self, ids: Tensor, padded: bool) -> Tensor:
        """The normed hidden state ``[rows, 1, width]`` of the last token."""
        hidden = embed(self._weights, ids.reshape(-1)).view(*ids.shape, -1)
        return forward(self._weights, self._state, hidden, padded=padded)[:, -1:].clone()
