"""transformers' caches as these kernels use them: written in place, at lengths that live on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class GrowingLayer(DynamicLayer):
    """A DynamicLayer with room to spare: keys and values are views of buffers that double when they are full.

    Takes the place of a DynamicLayer in a cache, and behaves as one. Whoever assigns ``keys`` or ``values`` (reorder,
    batch operations, offload) takes the room away; the next append makes new room.
    """

    SPARE = 128  # rows beyond the first prefill

    def __init__(self, **kwargs: Any) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        super().__init__(**kwargs)

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> GrowingLayer:
        growing = cls()
        for name, value in vars(layer).items():
            setattr(growing, name, value)
        return growing

    @property
    def keys(self) -> Tensor | None:
        return self._keys

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys, self._buffers = tensor, None

    @property
    def values(self) -> Tensor | None:
        return self._values

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values, self._buffers = tensor, None

    def reserve(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers ``[B, H, capacity, D]`` that hold what is cached and have room for these states after it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        needed = length + key_states.shape[-2]
        # A buffer made in inference mode must not be written outside of it.
        frozen = self._buffers is not None and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if self._buffers is None or needed > self._buffers[0].shape[-2] or frozen:
            capacity = max(needed + self.SPARE, 2 * length)
            self._buffers = (
                self._grown(self._keys, key_states, length, capacity),
                self._grown(self._values, value_states, length, capacity),
            )
            self._view(length)
        return self._buffers

    @staticmethod
    def _grown(cached: Tensor | None, like: Tensor, length: int, capacity: int) -> Tensor:
        buffer = like.new_empty((*like.shape[:-2], capacity, like.shape[-1]))
        if length and cached is not None:
            buffer[..., :length, :] = cached
        return buffer

    def _view(self, length: int) -> None:
        assert self._buffers is not None
        self._keys, self._values = (buffer[..., :length, :] for buffer in self._buffers)

    def advance(self, tokens: int) -> None:
        """Counts rows that were written into the buffers."""
        self._view(self.get_seq_length() + tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return states
        keys, values = self.reserve(key_states, value_states)
        start, tokens = self.get_seq_length(), key_states.shape[-2]
        keys[..., start : start + tokens, :] = key_states
        values[..., start : start + tokens, :] = value_states
        self.advance(tokens)
        assert self._keys is not None and self._values is not None
        return self._keys, self._values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        buffers = self._buffers
        super().crop(*args, **kwargs)
        self._buffers = buffers  # what is left is still a prefix of them


@dataclass
class CacheState:
    """What the patched model remembers with a cache."""

    mask_seen: tuple[int, int] | None = None  # rows and columns of the last mask known to be one interval per row
    lengths: dict[torch.device, tuple[int, Tensor]] = field(default_factory=dict)

    def length(self, length: int, device: torch.device) -> Tensor:
        """The length on the device: one tensor for all layers of a step."""
        known = self.lengths.get(device)
        if known is None or known[0] != length:
            known = (length, torch.full((), length, dtype=torch.int32, device=device))
            self.lengths[device] = known
        return known[1]


def state_of(cache: Any) -> CacheState:
    if cache is None:
        return CacheState()
    state: CacheState | None = getattr(cache, "_gqa_kernels_state", None)
    if state is None:
        state = cache._gqa_kernels_state = CacheState()
    return state


def unservable(cache: Any, index: int | None = None) -> str | None:
    """Why the kernels cannot write into this cache, or into one layer of it; None where they can."""
    if not isinstance(cache, Cache) or type(cache).update is not Cache.update:
        return f"the cache is a {type(cache).__name__}, which keeps its keys in its own way"
    if cache.offloading:
        return "the cache is offloaded to the CPU"
    layers = cache.layers if index is None else cache.layers[index : index + 1]
    if not layers and cache.layer_class_to_replicate not in (DynamicLayer, GrowingLayer):
        return "the cache makes layers of an unknown class"
    for layer in layers:
        if type(layer) not in (DynamicLayer, GrowingLayer, StaticLayer):
            return f"the cache has a {type(layer).__name__}"
    return None


def layer_for_append(cache: Cache, index: int, key_states: Tensor, value_states: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The cache's layer and its buffers ``[B, H, capacity, D]``, with room for the new states."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(GrowingLayer())
    layer = cache.layers[index]
    if type(layer) is StaticLayer:
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        return layer, layer.keys, layer.values
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = GrowingLayer.from_layer(layer)
    keys, values = layer.reserve(key_states, value_states)
    return layer, keys, values


def length_of(cache: Cache, layer: Any, device: torch.device) -> Tensor:
    """Tokens in the layer before the append, on the device."""
    if isinstance(layer, StaticLayer):
        length: Tensor = layer.cumulative_length
        return length
    return state_of(cache).length(layer.get_seq_length(), device)


def count_append(layer: Any, tokens: int) -> None:
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.add_(tokens)
    else:
        layer.advance(tokens)
