"""Attention cases laid out in memory and run: dense, ragged, over a contiguous or a paged cache.

Every run guards its tensors; a run that appends compares every byte of the cache with what it should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill
from support.attention import Case, Result, rotary_rows, rotate_eager, rotate_numpy, token_positions
from support.bounds import assert_within_bound, to_numpy
from support.contract import assert_same
from support.guard import Guard

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


@dataclass
class Cache:
    """A cache as a case finds it: its first keys in place, everything else ``fill``."""

    k: Tensor
    v: Tensor
    seqlens: Tensor
    block_table: Tensor | None
    # The block table again, on the host: looking a page up there waits for no GPU.
    _pages: Tensor | None = field(default=None, init=False)

    def slots(self, b: int, rows: range) -> tuple[Tensor, Tensor]:
        """Indices into the first two dimensions of k and v."""
        return self.slots_of([b], [rows])

    def slots_of(self, sequences: Sequence[int], rows: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Of rows of several sequences, one behind another."""
        if self._pages is None and self.block_table is not None:
            self._pages = self.block_table.cpu().long()
        return find_slots(sequences, rows, self._pages, self.k.shape[1])


def find_slots(
    sequences: Sequence[int], rows: Sequence[range], pages: Tensor | None, page_size: int
) -> tuple[Tensor, Tensor]:
    at = torch.cat([torch.arange(some.start, some.stop) for some in rows])
    sequence = torch.repeat_interleave(torch.tensor(sequences), torch.tensor([len(some) for some in rows]))
    return (sequence, at) if pages is None else (pages[sequence, at // page_size], at % page_size)


def build_cache(
    case: Case,
    guard: Guard,
    *,
    page_size: int | None = None,
    capacity: int | None = None,
    fill: float = 0.0,
    spare_pages: int = 2,
    heads_first: bool = False,
    index_dtype: torch.dtype = torch.int32,
    shuffle: bool = True,
) -> Cache:
    """``fill`` goes wherever no key is: past the end, in front of leftpad, in spare pages. Entries of the block table
    past a sequence's pages are INT_MAX and INT_MIN."""
    needed = max((len(k) for k in case.k), default=0)
    # Whole pages of 16, so that a paged cache has the capacity of a contiguous one: splits depend on it.
    capacity = -(-(needed + 3) // 16) * 16 if capacity is None else capacity
    heads, dim = case.heads[1], case.head_dim
    writable = any(case.new)
    table: Tensor | None = None
    pages: Tensor | None = None
    if page_size is None:
        shape = [case.batch, capacity, heads, dim]
    else:
        columns = max(1, -(-capacity // page_size))
        used = [-(-len(k) // page_size) for k in case.k]
        order = torch.randperm(sum(used) + spare_pages) if shuffle else torch.arange(sum(used) + spare_pages)
        shape = [len(order), page_size, heads, dim]
        table = torch.tensor([INT_MAX, INT_MIN]).repeat(columns)[:columns].repeat(case.batch, 1)
        for b, own in enumerate(order[: sum(used)].split(used)):
            table[b, : len(own)] = own
        pages = table.long()
        table = guard.ints(table, index_dtype)
    if heads_first:
        shape[1], shape[2] = shape[2], shape[1]
    placed, held = [], held_rows(case)
    for keys in (case.k, case.v):
        memory = torch.full(shape, fill, dtype=case.dtype, device=keys[0].device if keys else "cpu")
        view = memory.transpose(1, 2) if heads_first else memory
        if any(held):
            slots = find_slots(range(case.batch), held, pages, view.shape[1])
            view[slots] = torch.cat([x[rows.start : rows.stop] for x, rows in zip(keys, held)])
        memory = guard.place(memory, name="cache", writable=writable)
        placed.append(memory.transpose(1, 2) if heads_first else memory)
    return Cache(placed[0], placed[1], guard.ints(case.cached, index_dtype), table)


def held_rows(case: Case) -> list[range]:
    """Those of each sequence that are in the cache and mean something."""
    return [
        range(min(padding, cached), cached) for padding, cached in zip(case.leftpad or [0] * case.batch, case.cached)
    ]


def options(case: Case, guard: Guard, *, dense: bool, gathered: bool = False) -> dict[str, Any]:
    """The keyword arguments a case asks for, defaults left out."""
    out: dict[str, Any] = {"return_lse": True}
    if case.window != (-1, -1):
        out["window_size"] = case.window
    if case.softcap:
        out["softcap"] = case.softcap
    if case.scale is not None:
        out["softmax_scale"] = case.scale
    if case.sinks is not None:
        out["sinks"] = guard.place(case.sinks)
    if case.leftpad is not None:
        out["cache_leftpad"] = guard.ints(case.leftpad)
    if case.rotary is None:
        return out
    out["rotary_interleaved"] = case.rotary.interleaved
    rows = [token_positions(case, b, len(q)) for b, q in enumerate(case.q)]
    index = torch.tensor(rows if dense else [row for sequence in rows for row in sequence], dtype=torch.int64)
    if gathered:
        index = index if dense else index[None]
        out["rotary_cos"], out["rotary_sin"] = guard.place(case.rotary.cos[index]), guard.place(case.rotary.sin[index])
    else:
        out["rotary_cos"], out["rotary_sin"] = guard.place(case.rotary.cos), guard.place(case.rotary.sin)
        if case.rotary.positions is not None:
            out["rotary_positions"] = guard.ints(index)
    return out


def lengths_to_offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(out: Tensor, lse: Tensor) -> Result:
    """Dense or ragged results as out [tokens, Hq, D] and lse [Hq, tokens]."""
    if out.dim() == 4:
        assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert lse.shape == (out.shape[1], out.shape[0])
    return out, lse


def stack(parts: list[Tensor], guard: Guard, dense: bool, offset: int = 0) -> Tensor:
    return guard.place(torch.stack(parts) if dense else torch.cat(parts), offset=offset)


def arguments(
    case: Case, guard: Guard, cache: Cache | None = None, *, ragged: bool = False, gathered: bool = False
) -> dict[str, Any]:
    """What to call an attention op with. Without a cache every key is given."""
    out = {"q": stack(case.q, guard, not ragged), **options(case, guard, dense=not ragged, gathered=gathered)}
    if ragged:
        out["cu_seqlens_q"] = guard.ints(lengths_to_offsets([len(q) for q in case.q]))
    if cache is None:
        assert not any(case.cached)
        if ragged:
            out["cu_seqlens_k"] = guard.ints(lengths_to_offsets(case.new))
    else:
        out |= {"k_cache": cache.k, "v_cache": cache.v, "cache_seqlens": cache.seqlens}
        if cache.block_table is not None:
            out["block_table"] = cache.block_table
    if cache is None or any(case.new):
        for name, keys in (("k", case.k), ("v", case.v)):
            out[name] = stack([x[n:] for x, n in zip(keys, case.cached)], guard, not ragged)
    return out


def run_prefill(case: Case, guard: Guard, *, ragged: bool = False, gathered: bool = False, **extra: Any) -> Result:
    given = arguments(case, guard, ragged=ragged, gathered=gathered)
    return packed(*gqa_attention_prefill(**{**given, "causal": case.causal, **extra}))


def run_cached(
    case: Case,
    guard: Guard,
    cache: Cache,
    *,
    decode: bool = False,
    ragged: bool = False,
    gathered: bool = False,
    **extra: Any,
) -> Result:
    """Prefill or decode over a cache. New keys, if the case has any, are appended and the cache is compared."""
    given = arguments(case, guard, cache, ragged=ragged, gathered=gathered)
    assert case.causal or not decode or len(case.q[0]) == 1
    if not decode:
        given["causal"] = case.causal
    before = (cache.k.clone(), cache.v.clone())
    result = (gqa_attention_decode if decode else gqa_attention_prefill)(**{**given, **extra})
    check_appended(case, cache, before)
    return packed(*result)


def check_appended(case: Case, cache: Cache, before: tuple[Tensor, Tensor]) -> None:
    """New rows hold k and v; every other byte is as it was."""
    expected_k, expected_v = before
    added = [b for b in range(case.batch) if case.new[b] > 0]
    if added:
        slots = cache.slots_of(added, [range(case.cached[b], case.cached[b] + case.new[b]) for b in added])
        slots = tuple(index.to(cache.k.device, non_blocking=True) for index in slots)
        k, v = (torch.cat([x[b][case.cached[b] :] for b in added]) for x in (case.k, case.v))
        expected_v[slots] = v.to(expected_v.device, non_blocking=True)
        expected_k[slots] = k.to(cache.k.device, non_blocking=True) if case.rotary is None else cache.k[slots]
    assert_same(
        (cache.k, cache.v), (expected_k, expected_v), "a byte outside the new rows changed, or one of them: cache"
    )
    if case.rotary is None or not added:
        return
    rows = rotary_rows(case, added)[1]
    cos, sin, interleaved = case.rotary.cos[rows], case.rotary.sin[rows], case.rotary.interleaved
    wanted = rotate_numpy(to_numpy(k), to_numpy(cos), to_numpy(sin), interleaved)
    assert_within_bound(
        cache.k[slots], wanted, rotate_eager(k, cos, sin, interleaved), what="rotated keys in the cache"
    )
