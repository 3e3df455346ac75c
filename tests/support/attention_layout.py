"""Attention cases laid out in memory and run: dense, ragged, over a contiguous or a paged cache.

Every run guards its tensors; a run that appends compares every byte of the cache with what it should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill
from support.attention import Case, Result, rotate_eager, rotate_numpy, token_positions
from support.bounds import assert_within_bound, to_numpy
from support.guard import Guard, same_bytes

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


@dataclass
class Cache:
    """A cache as a case finds it: its first keys in place, everything else ``fill``."""

    k: Tensor
    v: Tensor
    seqlens: Tensor
    block_table: Tensor | None

    def slots(self, b: int, rows: range) -> tuple[Tensor, Tensor]:
        """Indices into the first two dimensions of k and v."""
        at = torch.arange(rows.start, rows.stop)
        if self.block_table is None:
            return torch.full_like(at, b), at
        size = self.k.shape[1]
        return self.block_table[b].cpu().long()[at // size], at % size


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
    if page_size is None:
        shape = [case.batch, capacity, heads, dim]
    else:
        columns = max(1, -(-capacity // page_size))
        used = [-(-len(k) // page_size) for k in case.k]
        order = torch.randperm(sum(used) + spare_pages) if shuffle else torch.arange(sum(used) + spare_pages)
        shape = [len(order), page_size, heads, dim]
        table = torch.tensor([INT_MAX, INT_MIN]).repeat(columns)[:columns].repeat(case.batch, 1)
        for b, pages in enumerate(order[: sum(used)].split(used)):
            table[b, : len(pages)] = pages
        table = guard.ints(table, index_dtype)
    if heads_first:
        shape[1], shape[2] = shape[2], shape[1]
    placed = []
    for keys in (case.k, case.v):
        memory = torch.full(shape, fill, dtype=case.dtype, device=keys[0].device if keys else "cpu")
        view = memory.transpose(1, 2) if heads_first else memory
        cache = Cache(view, view, torch.empty(0), table)
        for b in range(case.batch):
            start = min(case.leftpad[b], case.cached[b]) if case.leftpad else 0
            if case.cached[b] > start:
                first, second = cache.slots(b, range(start, case.cached[b]))
                view[first, second] = keys[b][start : case.cached[b]]
        memory = guard.place(memory, name="cache", writable=writable)
        placed.append(memory.transpose(1, 2) if heads_first else memory)
    return Cache(placed[0], placed[1], guard.ints(case.cached, index_dtype), table)


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
    fresh = []
    for b in range(case.batch):
        start = case.cached[b]
        if case.new[b] == 0:
            continue
        slots = cache.slots(b, range(start, len(case.k[b])))
        expected_v[slots] = case.v[b][start:].to(expected_v.device)
        if case.rotary is None:
            expected_k[slots] = case.k[b][start:].to(expected_k.device)
        else:
            expected_k[slots] = cache.k[slots]
            fresh.append((b, start, cache.k[slots]))
    assert same_bytes(cache.v, expected_v), "v_cache: a byte outside the new rows changed, or a new row is wrong"
    assert same_bytes(cache.k, expected_k), "k_cache: a byte outside the new rows changed, or a new row is wrong"
    if case.rotary is None or not fresh:
        return
    rotary, wanted, eager = case.rotary, [], []
    for b, start, _ in fresh:
        rows = token_positions(case, b, case.new[b])
        k, cos, sin = case.k[b][start:], rotary.cos[rows], rotary.sin[rows]
        wanted.append(torch.from_numpy(rotate_numpy(to_numpy(k), to_numpy(cos), to_numpy(sin), rotary.interleaved)))
        eager.append(rotate_eager(k, cos, sin, rotary.interleaved))
    got = torch.cat([rows for _, _, rows in fresh])
    assert_within_bound(got, torch.cat(wanted).numpy(), torch.cat(eager), what="rotated keys in the cache")
