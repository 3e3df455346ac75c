"""A KV cache that owns its tensors and lengths, and attention that makes and grows one by itself.

Lengths live on the device and the ops read them there. Beside them the host keeps, for each row, bounds that the
length cannot leave: they refuse an overflow before anything is written, without asking the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_kernels.attention import gqa_attention_decode, gqa_attention_prefill, kv_cache_append

MAX_DECODE_QUERIES = 16  # the most that gqa_attention_decode takes
QUANTIZED = (torch.float8_e4m3fn, torch.int8)
Scale = Tensor | float | None


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Small host data as int64 on the device, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def movable(cache: Tensor) -> Tensor:
    """The same memory in a dtype that torch indexes on every device."""
    return cache.view(torch.uint8) if cache.dtype in QUANTIZED else cache


class BaseCache(ABC):
    """Lengths, their bounds, and what both caches do in the same way."""

    _k: Tensor  # [num_layers, ...]
    _v: Tensor

    def __init__(self, batch: int, num_layers: int, capacity: int, num_kv_heads: int, head_dim: int) -> None:
        for name, value in {
            "batch": batch,
            "num_layers": num_layers,
            "capacity": capacity,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }.items():
            if value < 1:
                raise RuntimeError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.batch = batch
        self.num_layers = num_layers
        self.capacity = capacity
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_q_heads: int | None = None
        self._lowest = [0] * batch
        self._highest = [0] * batch
        self.lengths: Tensor  #: int32 [batch] on the device, what the ops take as ``cache_seqlens``

    def _allocate(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: Any,
        num_q_heads: int | None,
        k_scale: Scale,
        v_scale: Scale,
    ) -> None:
        if num_q_heads is not None and (num_q_heads < 1 or num_q_heads % self.num_kv_heads):
            raise RuntimeError(
                f"{type(self).__name__}: num_q_heads must be a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {num_q_heads}"
            )
        self.num_q_heads = num_q_heads
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty_like(self._k)
        #: float32 [num_layers, num_kv_heads] on the device, where given: what numbers of a quantised cache stand for
        self.k_scale = self._scales("k_scale", k_scale)
        self.v_scale = self._scales("v_scale", v_scale)
        self.lengths = torch.zeros(self.batch, dtype=torch.int32, device=self._k.device)

    def _scales(self, name: str, scale: Scale) -> Tensor | None:
        if scale is None:
            return None
        if self.dtype not in QUANTIZED:
            raise RuntimeError(
                f"{type(self).__name__}: {name} must be None unless dtype is float8_e4m3fn or int8, got a value"
            )
        shape = self.num_layers, self.num_kv_heads
        values = torch.as_tensor(scale, dtype=torch.float32).to(self.device)
        if values.dim() > 2 or any(size not in (1, n) for size, n in zip(values.shape[::-1], shape[::-1])):
            raise RuntimeError(
                f"{type(self).__name__}: {name} must be one number, [num_kv_heads] or [num_layers, num_kv_heads] = "
                f"{list(shape)}, got shape {list(values.shape)}"
            )
        return values.expand(shape).contiguous()

    def scales(self, layer: int) -> dict[str, Any]:
        """The keywords that tell an op what one layer's numbers stand for: ``k_scale`` and ``v_scale``, where given."""
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: scale[layer] for name, scale in scales.items() if scale is not None}

    @property
    def dtype(self) -> torch.dtype:
        return self._k.dtype

    @property
    def device(self) -> torch.device:
        return self._k.device

    @property
    def length(self) -> int | None:
        """Tokens of every row; None where rows differ, or only the device knows."""
        lengths = {*self._lowest, *self._highest}
        return lengths.pop() if len(lengths) == 1 else None

    @property
    def length_bound(self) -> int:
        """No row is longer, as far as the host knows without asking the device."""
        return max(self._highest)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """``k_cache, v_cache`` of one layer, as the ops take them."""
        if not 0 <= layer < self.num_layers:
            raise RuntimeError(f"{type(self).__name__}: layer must be from 0 to {self.num_layers - 1}, got {layer}")
        return self._k[layer], self._v[layer]

    @abstractmethod
    def where(self) -> dict[str, Any]:
        """The keywords that tell an op where the rows lie: ``cache_seqlens``, and ``block_table`` where paged."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Makes sure each row can take ``tokens`` more, or raises and changes nothing. ``append`` and ``attend`` call
        it; call it before capturing or replaying a graph that appends."""

    def append(self, layer: int, k: Tensor, v: Tensor, **options: Any) -> None:
        """Writes k and v ``[batch, S, num_kv_heads, head_dim]`` after the rows of one layer, with the options of
        :func:`kv_cache_append` (rotation, left padding). The lengths move with ``advance``, once for all layers."""
        k_cache, v_cache = self.layer(layer)
        self.reserve(self._tokens(k))
        kv_cache_append(k, v, k_cache, v_cache, **self.where(), **options, **self.scales(layer))

    def attend(self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> Any:
        """Attention over one layer, appending k and v first where given: :func:`gqa_attention_decode` up to 16 query
        tokens, else :func:`gqa_attention_prefill`, with their options. The lengths move with ``advance``.

        Ragged tokens (``cu_seqlens_q``) that are appended need ``max_seqlen_q``: each row makes room for so many."""
        k_cache, v_cache = self.layer(layer)
        ragged = options.get("cu_seqlens_q") is not None
        if k is not None:
            self.reserve(self._longest(options.get("max_seqlen_q")) if ragged else self._tokens(k))
        options = {**options, **self.scales(layer)}
        if not ragged and 1 <= q.shape[1] <= MAX_DECODE_QUERIES and options.get("causal", True):
            options.pop("causal", None)
            return gqa_attention_decode(q, k_cache, v_cache, k, v, **self.where(), **options)
        return gqa_attention_prefill(q, k, v, k_cache, v_cache, **self.where(), **options)

    def advance(self, tokens: int | Tensor, *, at_most: int | None = None) -> None:
        """Counts ``tokens`` appended to every row, on the device. A tensor ``[batch]`` gives each row its own number,
        from 0 to ``at_most`` (drafted tokens that were accepted); what is beyond these is clamped. The host then counts
        ``at_most`` for each row; ``crop(int(cache.lengths.max()))`` waits for the device and takes the excess back.

        Called once a step, outside of captured graphs: a replay would move the lengths and not the host's bounds."""
        if isinstance(tokens, Tensor):
            if at_most is None:
                raise RuntimeError(f"{type(self).__name__}.advance: at_most must be given with a tensor, got None")
            self._check_room("advance", at_most)
            self.lengths.add_(tokens.clamp(0, at_most).to(torch.int32))
            self._highest = [bound + at_most for bound in self._highest]
            return
        self._check_room("advance", tokens)
        self.lengths.add_(tokens)
        self._highest = [bound + tokens for bound in self._highest]
        self._lowest = [bound + tokens for bound in self._lowest]

    def crop(self, length: int | Tensor) -> None:
        """Forgets what lies beyond ``length`` tokens; a tensor ``[batch]`` gives each row its own."""
        if isinstance(length, Tensor):
            torch.minimum(self.lengths, length.clamp(min=0).to(torch.int32), out=self.lengths)
            self._lowest = [0] * self.batch
            return
        if length < 0:
            raise RuntimeError(f"{type(self).__name__}.crop: length must be at least 0, got {length}")
        self.lengths.clamp_(max=length)
        self._lowest = [min(bound, length) for bound in self._lowest]
        self._highest = [min(bound, length) for bound in self._highest]

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Empties all rows, or these."""
        chosen = self._rows(rows)
        if len(set(chosen)) == self.batch:
            self.lengths.zero_()
        else:
            self.lengths.index_fill_(0, to_device(chosen, self.device), 0)
        for row in chosen:
            self._lowest[row] = self._highest[row] = 0

    @property
    @abstractmethod
    def bytes_used(self) -> int:
        """Bytes that hold tokens (at the host's bounds)."""

    @property
    def bytes_allocated(self) -> int:
        return self._k.nbytes + self._v.nbytes

    @property
    def bytes_saved(self) -> int:
        """Bytes that the same tokens would take more with a KV head for each query head (MHA)."""
        if self.num_q_heads is None:
            raise RuntimeError(f"{type(self).__name__}.bytes_saved: num_q_heads must be given to the cache, got None")
        return self.bytes_used * (self.num_q_heads // self.num_kv_heads - 1)

    def _tokens(self, k: Tensor) -> int:
        expected = (self.batch, "S", self.num_kv_heads, self.head_dim)
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (self.batch, self.num_kv_heads, self.head_dim):
            raise RuntimeError(f"{type(self).__name__}: k must be {list(expected)}, got shape {list(k.shape)}")
        return k.shape[1]

    def _longest(self, max_seqlen_q: int | None) -> int:
        if max_seqlen_q is None:
            raise RuntimeError(
                f"{type(self).__name__}: max_seqlen_q must be given with cu_seqlens_q, k and v, got None"
            )
        return max_seqlen_q

    def _check_room(self, what: str, tokens: int) -> None:
        room = self.capacity - self.length_bound
        if not 0 <= tokens <= room:
            raise RuntimeError(
                f"{type(self).__name__}.{what}: tokens must be from 0 to {room} (capacity {self.capacity}, "
                f"{self.length_bound} used), got {tokens}"
            )

    def _rows(self, rows: Iterable[int] | None) -> list[int]:
        chosen = list(range(self.batch)) if rows is None else list(rows)
        for row in chosen:
            if not 0 <= row < self.batch:
                raise RuntimeError(f"{type(self).__name__}: rows must be from 0 to {self.batch - 1}, got {row}")
        return chosen

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch={self.batch}, num_layers={self.num_layers}, capacity={self.capacity}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, dtype={self.dtype}, device={self.device}, "
            f"length_bound={self.length_bound})"
        )


class KVCache(BaseCache):
    """A cache of ``capacity`` rows for each sequence: ``[batch, capacity, num_kv_heads, head_dim]`` per layer.

    Args:
        batch, num_layers, capacity, num_kv_heads, head_dim: its size; capacity is tokens per sequence.
        dtype, device: of keys and values; torch's defaults. With torch.float8_e4m3fn or torch.int8 float16 and bfloat16
            keys and values are quantised as they are appended.
        num_q_heads: only to tell ``bytes_saved``.
        k_scale, v_scale: of a quantised cache, whose numbers stand for themselves times the scale: one number,
            ``[num_kv_heads]`` or ``[num_layers, num_kv_heads]``; 1 where not given.

    A step: ``out = cache.attend(layer, q, k, v)`` for each layer, then ``cache.advance(tokens)``.
    """

    def __init__(
        self,
        batch: int,
        num_layers: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
        num_q_heads: int | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> None:
        super().__init__(batch, num_layers, capacity, num_kv_heads, head_dim)
        shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
        self._allocate(shape, dtype, device, num_q_heads, k_scale, v_scale)

    def where(self) -> dict[str, Any]:
        return {"cache_seqlens": self.lengths}

    def reserve(self, tokens: int) -> None:
        self._check_room("append", tokens)

    def grow(self, capacity: int) -> None:
        """Moves to larger buffers; to no effect where they are large enough."""
        if capacity <= self.capacity:
            return
        used = self.length_bound
        for name in ("_k", "_v"):
            old = getattr(self, name)
            new = old.new_empty((self.num_layers, self.batch, capacity, self.num_kv_heads, self.head_dim))
            movable(new)[:, :, :used] = movable(old)[:, :, :used]
            setattr(self, name, new)
        self.capacity = capacity

    def fork(self, rows: Sequence[int] | None = None) -> KVCache:
        """A new cache whose row i is a copy of row ``rows[i]`` (default: of every row)."""
        chosen = self._rows(rows)
        other = KVCache(
            len(chosen),
            self.num_layers,
            self.capacity,
            self.num_kv_heads,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
            num_q_heads=self.num_q_heads,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )
        other._lowest = [self._lowest[row] for row in chosen]
        other._highest = [self._highest[row] for row in chosen]
        index, used = to_device(chosen, self.device), other.length_bound
        movable(other._k)[:, :, :used] = movable(self._k)[:, index, :used]
        movable(other._v)[:, :, :used] = movable(self._v)[:, index, :used]
        other.lengths = self.lengths[index]
        return other

    @property
    def bytes_used(self) -> int:
        return self.bytes_allocated // (self.batch * self.capacity) * sum(self._highest)


def attention_with_kv_cache(
    q: Tensor, k: Tensor, v: Tensor, past_key_value: KVCache | None = None, update_cache: bool = True
) -> tuple[Tensor, KVCache | None]:
    """Causal attention of new tokens over a cache that makes and grows itself. Heads come first here.

    Args:
        q: ``[B, Hq, S, D]``.
        k, v: ``[B, Hkv, S, D]``; Hkv divides Hq.
        past_key_value: what an earlier call returned, or None to begin.
        update_cache: keep k and v for the next call. False leaves the lengths of the cache as they are.

    Returns:
        ``(out, cache)``: out ``[B, Hq, S, D]``; the cache given, or a new one, or None where none was given and none
        is wanted. The cache is changed in place; it doubles when it is full.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or an input that requires grad.

    PyTorch equivalent: ``scaled_dot_product_attention(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2),
    enable_gqa=True)`` with a bottom-right causal mask.
    """
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.dim() != 4:
            raise RuntimeError(f"attention_with_kv_cache: {name} must be [B, H, S, D], got shape {list(tensor.shape)}")
    if not isinstance(past_key_value, KVCache | None):
        raise RuntimeError(
            "attention_with_kv_cache: past_key_value must be the cache that an earlier call returned, or None, "
            f"got {type(past_key_value).__name__}"
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    batch, tokens, num_kv_heads, head_dim = key.shape
    cache = past_key_value
    if cache is None and not update_cache:
        alone: Any = gqa_attention_prefill(query, key, value)
        return alone.transpose(1, 2), None
    if cache is None:
        cache = KVCache(
            batch,
            1,
            max(64, 2 * tokens),
            num_kv_heads,
            head_dim,
            dtype=k.dtype,
            device=k.device,
            num_q_heads=q.shape[1],
        )
    needed = cache.length_bound + tokens
    if needed > cache.capacity:
        cache.grow(max(needed, 2 * cache.capacity))
    out: Tensor = cache.attend(0, query, key, value)
    if update_cache:
        cache.advance(tokens)
    return out.transpose(1, 2), cache
