"""What a step needs to know of a model: its own tensors, and the numbers beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Unserved(Exception):
    """Why a model or a call cannot be generated with here; a sentence without its subject's name."""


@dataclass
class Projection:
    """Linear layers whose outputs lie side by side, and so must their biases."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]  # none at all, or one for each weight
    bias: Tensor | None = None  # the biases as one tensor

    def pack(self) -> None:
        if len(self.biases) == 1:
            self.bias = self.biases[0]
        elif self.biases:
            self.bias = self.weights[0].new_zeros(sum(weight.shape[0] for weight in self.weights))

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The places in ``bias`` of what was copied there, and what."""
        if len(self.biases) > 1 and self.bias is not None:
            for part, bias in zip(torch.split(self.bias, [weight.shape[0] for weight in self.weights]), self.biases):
                if bias is not None:
                    yield part, bias


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True)
class LayerWeights:
    input_norm: Norm
    qkv: Projection
    qk_norms: tuple[Norm, Norm] | None
    o: Projection
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # keys that a query sees, itself included

    def window_left(self, capacity: int) -> int:
        """As the ops take it. A window that no cache of this capacity exceeds is none: kernels without are faster."""
        return -1 if self.window is None or self.window >= capacity else self.window - 1


@dataclass(frozen=True)
class ModelWeights:
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Projection
    rotary: Any  # the model's own rotary embedding
    _copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def projections(self) -> Iterator[Projection]:
        yield self.head
        for layer in self.layers:
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)

    def tensors(self) -> Iterator[Tensor]:
        yield self.embedding
        yield self.norm.weight
        for layer in self.layers:
            yield from (norm.weight for norm in (layer.input_norm, layer.mlp_norm, *(layer.qk_norms or ())))
        for projection in self.projections():
            yield from projection.weights
            yield from (bias for bias in projection.biases if bias is not None)

    def pack(self) -> None:
        for projection in self.projections():
            projection.pack()
            self._copied.extend(projection.parts())

    def refresh(self) -> None:
        """Copies the biases that had to be packed, the only weights that are not read where they are."""
        if self._copied:
            torch._foreach_copy_([packed for packed, _ in self._copied], [bias for _, bias in self._copied])

    def fingerprint(self) -> tuple[Any, ...]:
        """Where the weights lie, and what else a captured step has as constants. What was captured for one fingerprint
        is right for each call with the same: kernels read the values anew."""
        settings = ((layer.q_heads, layer.kv_heads, layer.scale, layer.window) for layer in self.layers)
        norms = (norm.eps for layer in self.layers for norm in (layer.input_norm, layer.mlp_norm, self.norm))
        return (*((tensor.data_ptr(), tensor.shape) for tensor in self.tensors()), *settings, *norms)
