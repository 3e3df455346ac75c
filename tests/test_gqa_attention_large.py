"""Attention past 2^31 elements and at 131072 keys: on a GPU only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.attention import Case, make_case
from support.attention_layout import build_cache, run_cached
from support.bounds import DTYPES, assert_within_bound
from support.guard import Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill, kv_cache_append

HEADS, DIM = (16, 8), 128
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """Tens of gigabytes: other workers want them."""
    yield
    torch.cuda.empty_cache()


def values(gpu: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=gpu, dtype=HALF)


def empty(gpu: str, *shape: int) -> Tensor:
    """Left as it comes: gigabytes need no filling, and stray NaN would show."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.empty(*shape, device=gpu, dtype=HALF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode, page_size", [(True, None), (True, 256), (False, 256)])
def test_p1_lengths_to_131072(gpu: str, dtype: torch.dtype, decode: bool, page_size: int | None) -> None:
    lengths = [(2, 2**n + i - 2, 2) for n in (13, 15, 17) for i in (-1, 0, 1)]
    case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=64, device=gpu)
    guard = Guard(gpu)
    cache = build_cache(case, guard, page_size=page_size)
    case.check(run_cached(case, guard, cache, decode=decode))
    guard.check()


@pytest.mark.parametrize("num_splits", [1, 16, 100, 128])
def test_p1_many_splits(gpu: str, num_splits: int) -> None:
    case = make_case([(1, n, 1) for n in (30000, 5, 12345)], dtype=HALF, heads=(8, 2), head_dim=64)
    guard = Guard(gpu)
    case.check(run_cached(case, guard, build_cache(case, guard), decode=True, num_splits=num_splits))
    guard.check()


def test_p7_contiguous_cache(gpu: str) -> None:
    """Two sequences, the second wholly past 2^31 elements: decode, append and prefill give a small cache's bytes."""
    capacity = 2**31 // (HEADS[1] * DIM) + 4096
    caches = [empty(gpu, 2, capacity, HEADS[1], DIM) for _ in range(2)]
    small = [values(gpu, 2, 512, HEADS[1], DIM) for _ in range(2)]
    for big, part in zip(caches, small):
        big[:, :512] = part
    lengths = torch.tensor([100, 300], device=gpu, dtype=torch.int32)
    for op, tokens in ((gqa_attention_decode, 3), (gqa_attention_prefill, 3), (gqa_attention_prefill, 150)):
        q, k, v = (values(gpu, 2, tokens, heads, DIM) for heads in (HEADS[0], HEADS[1], HEADS[1]))
        options = {"k": k, "v": v, "cache_seqlens": lengths, "return_lse": True, "batch_invariant": tokens == 3}
        with hopper(gpu) if tokens == 150 else nullcontext():
            expected = op(q, k_cache=small[0], v_cache=small[1], **options)
            actual = op(q, k_cache=caches[0], v_cache=caches[1], **options)
        assert all(same_bytes(a, b) for a, b in zip(actual, expected)), (op.__name__, tokens)
    for big, part in zip(caches, small):
        assert same_bytes(big[:, :512], part)


def test_p7_rows_of_one_sequence(gpu: str) -> None:
    """Keys on both sides of element 2^31 and at the very end, through a window; appended there too."""
    boundary = 2**31 // (HEADS[1] * DIM)
    caches = [empty(gpu, 1, boundary + 1000, HEADS[1], DIM) for _ in range(2)]
    for end in (boundary + 50, boundary + 1000):
        k, v = (values(gpu, 1, 200, HEADS[1], DIM) for _ in range(2))
        q = values(gpu, 1, 2, HEADS[0], DIM)
        caches[0][:, end - 200 : end - 2], caches[1][:, end - 200 : end - 2] = k[:, :-2], v[:, :-2]
        lengths = torch.tensor([end - 2], device=gpu, dtype=torch.int32)
        kv_cache_append(k[:, -2:], v[:, -2:], *caches, cache_seqlens=lengths)
        assert same_bytes(caches[0][:, end - 2 : end], k[:, -2:]) and same_bytes(caches[1][:, end - 2 : end], v[:, -2:])
        case = Case([q[0].cpu()], [k[0].cpu()], [v[0].cpu()], [0], window=(150, -1))
        for op in (gqa_attention_decode, gqa_attention_prefill):
            out, lse = op(
                q,
                k_cache=caches[0],
                v_cache=caches[1],
                cache_seqlens=lengths + 2,
                window_size=(150, -1),
                return_lse=True,
            )
            case.check((out[0], lse[0]), f"{op.__name__} up to row {end}")


def test_p7_every_key_of_a_long_sequence(gpu: str) -> None:
    """Zero keys: lse is the logarithm of how many were seen, out the mean of the values, past 2^31 elements."""
    rows = 2**31 // DIM + 1000
    cache = torch.zeros(1, rows, 1, DIM, device=gpu, dtype=HALF)
    ones = torch.ones_like(cache)
    q = values(gpu, 1, 1, 4, DIM)
    lengths = torch.tensor([rows], device=gpu, dtype=torch.int32)
    out, lse = gqa_attention_decode(q, cache, ones, cache_seqlens=lengths, return_lse=True)
    assert bool((out == 1).all())
    expected = np.full((1, 4, 1), np.log(rows))
    assert_within_bound(lse, expected, torch.from_numpy(expected).float(), attention_extra=1.0)


def test_p7_page_pool(gpu: str) -> None:
    """Pages at both ends of a pool of more than 2^31 elements, and about the boundary."""
    page = 64 * HEADS[1] * DIM
    count = 2**31 // page + 100
    pools = [empty(gpu, count, 64, HEADS[1], DIM) for _ in range(2)]
    used = [0, count - 1, 2**31 // page - 1, 2**31 // page, 2**31 // page + 1, count - 2]
    small = [values(gpu, len(used), 64, HEADS[1], DIM) for _ in range(2)]
    for pool, part in zip(pools, small):
        pool[used] = part
    few = torch.tensor([[0, 1, 2], [3, 4, 5]], device=gpu, dtype=torch.int32)
    many = torch.tensor(used, device=gpu, dtype=torch.int32).view(2, 3)
    for op, tokens in ((gqa_attention_decode, 1), (gqa_attention_prefill, 2), (gqa_attention_prefill, 70)):
        q, k, v = (values(gpu, 2, tokens, heads, DIM) for heads in (HEADS[0], HEADS[1], HEADS[1]))
        lengths = torch.tensor([192 - tokens, 131 - tokens], device=gpu, dtype=torch.int32)
        options = {"k": k, "v": v, "cache_seqlens": lengths, "return_lse": True}
        with hopper(gpu) if tokens != 2 else nullcontext():
            expected = op(q, k_cache=small[0], v_cache=small[1], block_table=few, **options)
            actual = op(q, k_cache=pools[0], v_cache=pools[1], block_table=many, **options)
        assert all(same_bytes(a, b) for a, b in zip(actual, expected)), (op.__name__, tokens)
    for pool, part in zip(pools, small):
        assert same_bytes(pool[used], part)


def test_p7_keys_of_a_ragged_batch(gpu: str) -> None:
    """k and v of more than 2^31 elements: sequences that lie before, about and past the boundary, and at the end."""
    boundary = 2**31 // (HEADS[1] * DIM)
    k, v = (empty(gpu, boundary + 1000, HEADS[1], DIM) for _ in range(2))
    ends = [0, 300, boundary - 150, boundary + 150, boundary + 200, boundary + 700, boundary + 1000]
    counts = [300, 0, 300, 0, 130, 300]  # the long sequence between has no queries
    q = values(gpu, sum(counts), HEADS[0], DIM)
    offsets = [torch.tensor(x, device=gpu, dtype=torch.int32) for x in ([0, *np.cumsum(counts).tolist()], ends)]
    rows = torch.cat([torch.arange(a, b, device=gpu) for a, b, n in zip(ends, ends[1:], counts) if n])
    k[rows], v[rows] = values(gpu, len(rows), HEADS[1], DIM), values(gpu, len(rows), HEADS[1], DIM)
    with hopper(gpu):
        result = gqa_attention_prefill(
            q, k, v, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], max_seqlen_q=300, return_lse=True
        )
    spans = [(a, b) for a, b, n in zip(ends, ends[1:], counts) if n]
    keys, others = ([x[a:b].clone() for a, b in spans] for x in (k, v))
    parts = list(q.split([n for n in counts if n]))
    Case(parts, keys, others, [b - a for a, b in spans]).check(result)


def test_p7_queries(gpu: str) -> None:
    """q and out of more than 2^31 elements: the first rows, the last, and those about the boundary."""
    tokens = 2**31 // (HEADS[0] * DIM) + 1000
    q = empty(gpu, tokens, HEADS[0], DIM).normal_()
    k, v = (values(gpu, tokens, 2, DIM) for _ in range(2))
    offsets = torch.tensor([0, tokens], device=gpu, dtype=torch.int32)
    ragged = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    with hopper(gpu):
        out, lse = gqa_attention_prefill(q, k, v, **ragged, window_size=(40, -1), return_lse=True)
    for end in (200, 2**31 // (HEADS[0] * DIM) + 100, tokens):
        first = max(0, end - 240)
        keys = slice(first, end)
        queries = slice(end - 200, end)
        case = Case([q[queries].cpu()], [k[keys].cpu()], [v[keys].cpu()], [end - first], window=(40, -1))
        case.check((out[queries], lse[:, queries]), f"rows up to {end}")
