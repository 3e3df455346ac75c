"""transformers' caches as these kernels use them: written in place, at lengths that live on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class _Growing(DynamicLayer):
    """Keys and values as views of buffers with room to spare, that are made anew when they are full.

    Behaves as the layer it takes the place of. Whoever assigns ``keys`` or ``values`` (reorder, batch operations,
    offload) takes the room away; the next append makes new room.
    """

    SPARE = 128  # rows beyond the first prefill

    _buffers: tuple[Tensor, Tensor] | None = None
    _start = 0  # row of the buffers where the views begin

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> Any:
        growing = cls.__new__(cls)
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

    @property
    def rows(self) -> int:
        """Tokens whose keys are still held."""
        return self._keys.shape[-2] if self._keys is not None and self._keys.numel() else 0

    def reserve(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers ``[B, H, capacity, D]`` that begin with what is cached and have room for these states after it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.rows
        needed = rows + key_states.shape[-2]
        # A buffer made in inference mode must not be written outside of it.
        frozen = self._buffers is not None and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if self._buffers is None or self._start + needed > self._buffers[0].shape[-2] or frozen:
            capacity = max(needed + self.SPARE, 2 * rows)
            self._buffers = (
                self._grown(self._keys, key_states, rows, capacity),
                self._grown(self._values, value_states, rows, capacity),
            )
            self._view(0, rows)
        keys, values = self._buffers
        return keys[..., self._start :, :], values[..., self._start :, :]

    @staticmethod
    def _grown(cached: Tensor | None, like: Tensor, rows: int, capacity: int) -> Tensor:
        buffer = like.new_empty((*like.shape[:-2], capacity, like.shape[-1]))
        if rows and cached is not None:
            buffer[..., :rows, :] = cached
        return buffer

    def _view(self, start: int, rows: int) -> None:
        assert self._buffers is not None
        self._start = start
        self._keys, self._values = (buffer[..., start : start + rows, :] for buffer in self._buffers)

    def advance(self, tokens: int) -> None:
        """Counts rows that were written into the buffers."""
        self._view(self._start, self.rows + tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return states
        keys, values = self.reserve(key_states, value_states)
        start, tokens = self.rows, key_states.shape[-2]
        keys[..., start : start + tokens, :] = key_states
        values[..., start : start + tokens, :] = value_states
        self.advance(tokens)
        return keys[..., : start + tokens, :], values[..., : start + tokens, :]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        buffers, end, length = self._buffers, self._start + self.rows, self.get_seq_length()
        super().crop(*args, **kwargs)
        self._buffers = buffers  # what is left still lies in them
        self._start = end - (length - self.get_seq_length()) - self.rows


class GrowingLayer(_Growing):
    """A DynamicLayer whose appends are written in place."""


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):
    """A DynamicSlidingWindowLayer whose appends are written in place: its window moves along the buffers."""

    def advance(self, tokens: int) -> None:
        self.cumulative_length += tokens
        rows = self.rows + tokens
        dropped = 0 if self.record_past else max(rows - self.sliding_window + 1, 0)
        self._view(self._start + dropped, rows - dropped)
        assert self._buffers is not None and self._keys is not None and self._values is not None
        if self._buffers[0].shape[-2] > 4 * max(self.sliding_window, self.SPARE):  # those of a long prompt
            self.keys, self.values = self._keys.clone(), self._values.clone()


#: What each layer that transformers makes is replaced by before its first append here.
GROWING: dict[type, type[_Growing]] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingLayer,
}
SERVED = (*GROWING, *GROWING.values(), StaticLayer, StaticSlidingWindowLayer)


@dataclass
class CacheState:
    """What the patched model remembers with a cache."""

    mask_seen: tuple[int, int] | None = None  # rows and columns of the last mask known to be one interval per row
    lengths: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    def length(self, length: int, device: torch.device) -> Tensor:
        """The length on the device: one tensor for all layers of a step that have it."""
        known = self.lengths.get((device, length))
        if known is None:
            if len(self.lengths) >= 4:  # full and sliding layers, on few devices: those of steps gone by
                self.lengths.clear()
            known = self.lengths[device, length] = torch.full((), length, dtype=torch.int32, device=device)
        return known


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
        if type(layer) not in SERVED:
            return f"the cache has a {type(layer).__name__}"
    return None


def layer_of(cache: Cache, index: int) -> Any:
    """The cache's layer, as one that is written in place."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(GrowingLayer())
    layer = cache.layers[index]
    growing = GROWING.get(type(layer))
    if growing is not None:
        layer = cache.layers[index] = growing.from_layer(layer)
    return layer


def has_room(layer: Any, tokens: int) -> bool:
    """Whether new keys go behind the cached ones. A static window that is full, or becomes so, moves its keys first."""
    return type(layer) is not StaticSlidingWindowLayer or layer.cumulative_length_int + tokens <= layer.max_cache_len


class Room(NamedTuple):
    """Where a layer's keys are: buffers ``[B, H, capacity, D]``, and their filled length on the device."""

    keys: Tensor
    values: Tensor
    length: Tensor
    dropped: int  # tokens before the buffers' first row, which a sliding window has let go of
    most_keys: int  # upper bound of what any query of this step sees


def reserve(cache: Cache, layer: Any, k: Tensor, v: Tensor) -> Room:
    """Room for k and v ``[B, H, S, D]`` behind what is cached; the length does not count them."""
    if isinstance(layer, StaticLayer):
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        return Room(layer.keys, layer.values, layer.cumulative_length, 0, layer.keys.shape[2])
    keys, values = layer.reserve(k, v)
    length = state_of(cache).length(layer.rows, k.device)
    return Room(keys, values, length, layer.get_seq_length() - layer.rows, layer.rows + k.shape[2])


def moved(layer: Any, k: Tensor, v: Tensor) -> Room:
    """The layer's own way to append k and v, rotated: the keys that count, old and new in order, all of them filled."""
    after = layer.get_seq_length() + k.shape[2]
    keys, values = layer.update(k, v)
    rows = keys.shape[2]
    length = torch.full((), rows, dtype=torch.int32, device=k.device)
    return Room(keys, values, length, after - rows, rows)


def count_append(layer: Any, tokens: int) -> None:
    if not isinstance(layer, StaticLayer):
        layer.advance(tokens)
        return
    layer.cumulative_length.add_(tokens)
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int += tokens
