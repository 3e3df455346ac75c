"""KVCache and PagedKVCache against Python lists, and attention_with_kv_cache against torch."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.guard import same_bytes
from torch import Tensor

from gqa_kernels import KVCache, PagedKVCache, attention_with_kv_cache, gqa_attention_prefill

LAYERS, HEADS, DIM = 2, 2, 8


def make_cache(kind: str, device: str, *, batch: int = 2, capacity: int = 40, **options: Any) -> Any:
    if kind == "contiguous":
        return KVCache(batch, LAYERS, capacity, HEADS, DIM, dtype=torch.float32, device=device, num_q_heads=8)
    options = {"page_size": 4, "num_q_heads": 8, **options}
    return PagedKVCache(batch, LAYERS, capacity, HEADS, DIM, dtype=torch.float32, device=device, **options)


def rows_of(cache: Any, layer: int, row: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one row, read through the lengths and the block table on the device."""
    length = int(cache.lengths[row])
    parts = []
    for tensor in cache.layer(layer):
        if isinstance(cache, PagedKVCache):
            pages = cache.block_table[row][: -(-length // cache.page_size)]
            assert bool((pages >= 0).all())
            parts.append(tensor[pages.long()].flatten(0, 1)[:length])
        else:
            parts.append(tensor[row, :length])
    return parts[0], parts[1]


@dataclass
class Twin:
    """A cache and what it ought to hold: lists of tokens."""

    cache: Any
    rows: list[list[Tensor]] = field(default_factory=list)  # [batch][token] -> [2, LAYERS, HEADS, DIM]

    def append(self, tokens: int, *, advance: bool = True) -> Tensor:
        new = torch.randn(2, LAYERS, self.cache.batch, tokens, HEADS, DIM)
        for layer in range(LAYERS):
            self.cache.append(layer, *(part[layer].to(self.cache.device) for part in new))
        if advance:
            self.cache.advance(tokens)
            for row, kept in enumerate(self.rows):
                kept += list(new[:, :, row].unbind(2))
        return new

    def check(self) -> None:
        assert self.cache.lengths.tolist() == [len(kept) for kept in self.rows]
        assert all(low <= len(kept) <= high for low, kept, high in self.bounds())
        assert self.cache.length is None or all(len(kept) == self.cache.length for kept in self.rows)
        for row, kept in enumerate(self.rows):
            if not kept:
                continue
            expected = torch.stack(kept, dim=2).to(self.cache.device)
            for layer in range(LAYERS):
                keys, values = rows_of(self.cache, layer, row)
                assert same_bytes(keys, expected[0, layer]) and same_bytes(values, expected[1, layer])

    def bounds(self) -> Any:
        return zip(self.cache._lowest, self.rows, self.cache._highest)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("seed", range(4))
def test_p13_random_operations(device: str, kind: str, seed: int) -> None:
    """Appends, drafts, crops, resets and forks in any order; forks stay apart; no page is lost or held twice."""
    pick = random.Random(seed)
    twins = [Twin(make_cache(kind, device, batch=3, num_pages=200), [[], [], []])]
    pages = [twins[0].cache._pool] if kind == "paged" else []
    refusals = 0
    for _ in range(60):
        twin = pick.choice(twins)
        step = pick.choice(["append"] * 5 + ["draft", "crop", "crop rows", "reset", "reset rows", "fork", "forget"])
        batch = twin.cache.batch
        if step == "append":
            try:
                twin.append(pick.choice([1, 1, 1, 2, 3, 5, 9]))
            except RuntimeError as error:
                assert "tokens must" in str(error)
                refusals += 1
        elif step == "draft" and twin.cache.length_bound + 3 <= twin.cache.capacity:
            accepted = [pick.randrange(4) for _ in range(batch)]
            new = twin.append(3, advance=False)
            twin.cache.advance(torch.tensor(accepted, device=device), at_most=3)
            for row, count in enumerate(accepted):
                twin.rows[row] += list(new[:, :, row, :count].unbind(2))
        elif step == "crop":
            length = pick.randrange(30)
            twin.cache.crop(length)
            twin.rows = [kept[:length] for kept in twin.rows]
        elif step == "crop rows":
            lengths = [pick.randrange(30) for _ in range(batch)]
            twin.cache.crop(torch.tensor(lengths, device=device))
            twin.rows = [kept[:length] for kept, length in zip(twin.rows, lengths)]
        elif step == "reset" and pick.random() < 0.3:
            twin.cache.reset()
            twin.rows = [[] for _ in twin.rows]
        elif step == "reset rows":
            row = pick.randrange(batch)
            twin.cache.reset([row])
            twin.rows[row] = []
        elif step == "fork" and len(twins) < 4:
            order = [pick.randrange(batch) for _ in range(pick.choice([1, 3, 4]))]
            twins.append(Twin(twin.cache.fork(order), [list(twin.rows[row]) for row in order]))
        elif step == "forget" and len(twins) > 1:
            twins.remove(twin)
            del twin
            gc.collect()
        for other in twins:
            other.check()
        for pool in pages:
            held = [page for other in twins for table in other.cache._tables for page in table]
            assert [held.count(page) for page in range(200)] == pool.holders
            assert sorted(pool.free) == [page for page in range(200) if page not in held]
    assert refusals < 40


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_overflow_is_refused_before_anything_is_written(device: str, kind: str) -> None:
    twin = Twin(make_cache(kind, device, capacity=8), [[], []])
    twin.append(6)
    before = [tensor.clone() for layer in range(LAYERS) for tensor in twin.cache.layer(layer)]
    keys = torch.ones(2, 3, HEADS, DIM, device=device)
    for call in (
        lambda: twin.cache.append(0, keys, keys),
        lambda: twin.cache.attend(0, keys, keys, keys),
        lambda: twin.cache.advance(3),
        lambda: twin.cache.advance(torch.ones(2, dtype=torch.int32, device=device), at_most=3),
        lambda: twin.cache.reserve(3),
    ):
        with pytest.raises(RuntimeError, match=r"tokens must be from 0 to 2 \(capacity 8, 6 used\), got 3"):
            call()
    after = [tensor for layer in range(LAYERS) for tensor in twin.cache.layer(layer)]
    assert all(same_bytes(a, b) for a, b in zip(before, after))
    twin.check()
    twin.append(2)
    twin.check()


def test_a_dry_pool_is_refused_before_anything_is_written(device: str) -> None:
    twin = Twin(make_cache("paged", device, num_pages=5), [[], []])
    twin.append(8)
    with pytest.raises(RuntimeError, match=r"at most 1 more pages \(num_pages 5\), got 1 tokens a row that need 2"):
        twin.append(1)
    twin.check()
    assert twin.cache.num_free_pages == 1
    twin.cache.reset([0])
    twin.rows[0] = []
    twin.append(1)
    twin.check()


def test_forks_share_pages_until_one_writes(device: str) -> None:
    twin = Twin(make_cache("paged", device, num_pages=40), [[], []])
    twin.append(10)
    assert twin.cache.num_free_pages == 34
    fork = Twin(twin.cache.fork([0, 0, 1]), [list(twin.rows[row]) for row in (0, 0, 1)])
    assert twin.cache.num_free_pages == 34
    fork.append(1)
    assert twin.cache.num_free_pages == 31, "three partial pages are copied, the full ones stay shared"
    twin.append(1)
    assert twin.cache.num_free_pages == 31, "the last holder keeps its page"
    twin.check()
    fork.check()
    del fork
    gc.collect()
    assert twin.cache.num_free_pages == 34


def test_the_layers_of_a_step_look_for_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(make_cache("paged", "cpu"), [[], []])
    wanted, looks = PagedKVCache._wanted, []
    monkeypatch.setattr(PagedKVCache, "_wanted", lambda cache, tokens: looks.append(tokens) or wanted(cache, tokens))
    for _ in range(3):
        twin.append(3)
    assert looks == [3, 3, 3] and LAYERS > 1
    twin.cache.reserve(2)
    fork = Twin(twin.cache.fork(), [list(row) for row in twin.rows])
    twin.append(2)
    fork.append(1)
    assert looks[3:] == [2, 2, 1], "a fork shares pages that were ready"
    twin.check()
    fork.check()


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_bytes(kind: str) -> None:
    cache = make_cache(kind, "cpu", batch=2, capacity=40)
    token = LAYERS * 2 * HEADS * DIM * 4
    assert cache.bytes_allocated == 80 * token and cache.bytes_used == cache.bytes_saved == 0
    Twin(cache, [[], []]).append(10)
    held = 2 * (12 if kind == "paged" else 10)
    assert cache.bytes_used == held * token
    assert cache.bytes_saved == 3 * held * token, "8 query heads on 2 KV heads: MHA takes 4 times as much"
    cache.num_q_heads = None
    with pytest.raises(RuntimeError, match="num_q_heads must be given"):
        _ = cache.bytes_saved


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_row_named_twice_is_reset_alone(device: str, kind: str) -> None:
    cache = make_cache(kind, device)
    cache.reserve(3)
    cache.advance(3)
    cache.reset([0, 0])
    assert cache.lengths.tolist() == [0, 3]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_bounds_that_ran_ahead_are_taken_back(device: str, kind: str) -> None:
    """Drafts of which one token is accepted, until the bounds alone are at the capacity."""
    cache = make_cache(kind, device)
    for _ in range(10):
        cache.reserve(4)
        cache.advance(torch.tensor([1, 2], device=device), at_most=4)
    with pytest.raises(RuntimeError, match="tokens must be from 0 to 0"):
        cache.reserve(1)
    cache.crop(int(cache.lengths.max()))
    cache.reserve(4)
    assert cache.lengths.tolist() == [10, 20] and cache.length_bound == 20


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("heads", [2, 32])
def test_attend_takes_ragged_tokens(device: str, kind: str, heads: int) -> None:
    """Few heads or many: q's second dimension is not its tokens."""
    tokens, ragged = [5, 7], {"cu_seqlens_q": torch.tensor([0, 5, 12], device=device), "max_seqlen_q": 7}
    q, k, v = (torch.randn(12, n, DIM, device=device) for n in (heads, HEADS, HEADS))
    cache = make_cache(kind, device)
    out = cache.attend(0, q, k, v, **ragged)
    cache.advance(torch.tensor(tokens, device=device), at_most=7)
    torch.testing.assert_close(cache.attend(0, q, **ragged), out, rtol=1e-5, atol=1e-5)
    alone = [
        gqa_attention_prefill(*(part[None] for part in parts)) for parts in zip(*(t.split(tokens) for t in (q, k, v)))
    ]
    torch.testing.assert_close(out, torch.cat(alone, dim=1)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="max_seqlen_q must be given with cu_seqlens_q"):
        cache.attend(0, q, k, v, cu_seqlens_q=ragged["cu_seqlens_q"])


def test_misuse() -> None:
    with pytest.raises(RuntimeError, match="KVCache: capacity must be at least 1, got 0"):
        KVCache(1, 1, 0, 1, 8)
    with pytest.raises(RuntimeError, match="PagedKVCache: page_size must be at least 1, got 0"):
        PagedKVCache(1, 1, 8, 1, 8, page_size=0)
    with pytest.raises(RuntimeError, match="num_q_heads must be a multiple of num_kv_heads=2, got 3"):
        KVCache(1, 1, 8, 2, 8, num_q_heads=3)
    cache = make_cache("contiguous", "cpu")
    keys = torch.zeros(2, 1, HEADS, DIM)
    for match, call in {
        "layer must be from 0 to 1, got 2": lambda: cache.append(2, keys, keys),
        r"k must be \[2, 'S', 2, 8\], got shape \[1, 1, 2, 8\]": lambda: cache.append(0, keys[:1], keys[:1]),
        "rows must be from 0 to 1, got 5": lambda: cache.reset([5]),
        "length must be at least 0, got -1": lambda: cache.crop(-1),
        "at_most must be given": lambda: cache.advance(torch.ones(2)),
        "from 0 to 40 .*, got -1": lambda: cache.advance(-1),
        "rows must hold at least 1 row, got 0": lambda: make_cache("paged", "cpu").fork([]),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()
    with pytest.raises(RuntimeError, match=r"q must be \[B, H, S, D\], got shape \[1, 1, 8\]"):
        attention_with_kv_cache(*[torch.zeros(1, 1, 8)] * 3)
    with pytest.raises(RuntimeError, match=r"past_key_value must be the cache .*, or None, got tuple"):
        attention_with_kv_cache(*[keys] * 3, past_key_value=(keys, keys))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_p22_steps_do_not_synchronise(gpu: str, kind: str) -> None:
    cache = make_cache(kind, gpu)
    keys = torch.randn(2, 1, HEADS, DIM, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            for layer in range(LAYERS):
                cache.attend(layer, keys, keys, keys)
            cache.advance(1)
        cache.crop(5)
        cache.reset([1])
        cache.fork([0, 0]).append(0, keys, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_attend_is_the_same_in_any_steps(device: str, kind: str) -> None:
    """One prefill of 40, or chunks through both ops: the same keys, and the same attention to the bound of P1."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, DIM, device=device) for heads in (8, HEADS, HEADS))
    results = []
    for chunks in ([40], [20, 1, 1, 2, 16]):
        cache, start, outs = make_cache(kind, device), 0, []
        for tokens in chunks:
            part = slice(start, start + tokens)
            outs.append(cache.attend(1, q[:, part], k[:, part], v[:, part]))
            cache.advance(tokens)
            start += tokens
        results.append(torch.cat(outs, dim=1))
        keys, values = rows_of(cache, 1, 0)
        assert same_bytes(keys, k[0]) and same_bytes(values, v[0])
    reference, baseline = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    for result in results:
        check(result.transpose(1, 2), reference, baseline, q, k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """float64, and step by step in the inputs' dtype; causal, aligned bottom-right; heads first."""
    groups = q.shape[1] // k.shape[1]
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    reference = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), ~hidden, enable_gqa=True)
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return reference, scores.softmax(-1) @ values


def check(actual: Tensor, reference: Tensor, baseline: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    score = q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max() * q.shape[-1] ** -0.5
    extra = float((1 + score) * v.float().abs().max())
    assert_within_bound(actual, to_numpy(reference), baseline, attention_extra=extra)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_attention_with_kv_cache(device: str, dtype: torch.dtype) -> None:
    """A prompt and then token by token past two doublings; a call that does not update leaves the cache as it was."""
    torch.manual_seed(0)
    total = 300
    q, k, v = (torch.randn(2, heads, total, 16).to(device, dtype) for heads in (8, 2, 2))
    cache, start, capacities = None, 0, set()
    for tokens in [20, *[1] * 180, 60, 7, 33]:
        part = slice(start, start + tokens)
        inputs = (q[:, :, part], k[:, :, part], v[:, :, part])
        if start in (0, 100):
            peeked, same = attention_with_kv_cache(*inputs, past_key_value=cache, update_cache=False)
            assert same is cache
        out, cache = attention_with_kv_cache(*inputs, past_key_value=cache)
        if start in (0, 100):
            assert torch.equal(peeked, out)
        start += tokens
        assert cache is not None and cache.length_bound == start
        capacities.add(cache.capacity)
        if tokens > 1 or start % 45 == 0:
            seen = (q[:, :, part], k[:, :, :start], v[:, :, :start])
            check(out, *sdpa(*seen), *seen)
    assert capacities == {64, 128, 256, 512}
