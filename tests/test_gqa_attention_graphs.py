"""Attention in execution on a GPU: no synchronisation, capture and replay, exact workspaces, streams."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.attention_calls import FUNCTIONS, Call, every_call, make_call
from support.contract import assert_same, capture, flat
from support.guard import Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

import gqa_kernels
from gqa_kernels import (
    gqa_attention_decode,
    gqa_attention_decode_workspace_size,
    gqa_attention_prefill_workspace_size,
)

SIZES: dict[str, Any] = {
    "gqa_attention_decode": gqa_attention_decode_workspace_size,
    "gqa_attention_prefill": gqa_attention_prefill_workspace_size,
}


def owned_call(op: str, combination: dict[str, Any], device: str) -> Call:
    """A call whose tensors may be changed in place."""
    call = make_call(op, combination, Guard(device))
    return Call(op, {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.keywords.items()})


@every_call
def test_p22_never_synchronises(gpu: str, op: str, call: dict[str, Any]) -> None:
    given = owned_call(op, call, gpu)
    FUNCTIONS[op](**given.keywords)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        FUNCTIONS[op](**given.keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_p23_replay_equals_eager(gpu: str, op: str, call: dict[str, Any]) -> None:
    """Captured once; then q, the lengths, the offsets and the pages change in place."""
    given = owned_call(op, call, gpu).keywords
    with hopper(gpu) if "head_dim" in call else nullcontext():
        graph, captured = capture(lambda: FUNCTIONS[op](**given))
    for length in (0, 5, 11):
        given["q"].normal_()
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if name in given:
                given[name][1:-1] = length
        if "cache_seqlens" in given:
            given["cache_seqlens"].fill_(length)
        if "block_table" in given:
            table = given["block_table"]
            table.copy_(torch.randperm(given["k_cache"].shape[0], device=gpu)[: table.numel()].view_as(table))
        graph.replay()
        replayed = [part.clone() for part in captured]
        caches = [given[name].clone() for name in ("k_cache", "v_cache") if name in given]
        assert_same(replayed, FUNCTIONS[op](**given))
        assert_same(caches, [given[name] for name in ("k_cache", "v_cache") if name in given])


def decode_buffers(gpu: str, batch: int = 3, capacity: int = 1024) -> dict[str, Any]:
    half = {"device": gpu, "dtype": torch.bfloat16}
    pages = batch * capacity // 16 + 5
    return {
        "q": torch.randn(batch, 1, 8, 128, **half),
        "k_cache": torch.randn(pages, 16, 2, 128, **half),
        "v_cache": torch.randn(pages, 16, 2, 128, **half),
        "k": torch.randn(batch, 1, 2, 128, **half),
        "v": torch.randn(batch, 1, 2, 128, **half),
        "cache_seqlens": torch.ones(batch, device=gpu, dtype=torch.int32),
        "block_table": torch.arange(batch * capacity // 16, device=gpu, dtype=torch.int32).view(batch, -1),
        "return_lse": True,
    }


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_p23_thousand_replays(gpu: str, batch_invariant: bool) -> None:
    """Captured at length 1, replayed up to capacity over permuted pages: every replay the bytes of eager."""
    given = {**decode_buffers(gpu), "batch_invariant": batch_invariant}
    graph, captured = capture(lambda: gqa_attention_decode(**given))
    pages = given["k_cache"].shape[0]
    for step in range(1000):
        given["q"].normal_()
        given["cache_seqlens"].copy_(torch.randint(0, 1024, (3,), device=gpu))
        if step % 10 == 0:
            table = given["block_table"]
            table.copy_(torch.randperm(pages, device=gpu)[: table.numel()].view_as(table))
        graph.replay()
        replayed = [part.clone() for part in captured]
        assert_same(replayed, gqa_attention_decode(**given))


def test_p6_bad_metadata_in_a_replay(gpu: str) -> None:
    """Lengths and pages spoilt after capture: NaN for that row, the others as ever, nothing written for it."""
    given = decode_buffers(gpu)
    lengths, table = given["cache_seqlens"], given["block_table"]
    lengths.copy_(torch.tensor([1000, 500, 3]))
    graph, (out, lse) = capture(lambda: gqa_attention_decode(**given))
    graph.replay()
    good, good_lse = out.clone(), lse.clone()
    pages, good_table = given["k_cache"].shape[0], table.clone()
    caches = given["k_cache"].clone(), given["v_cache"].clone()
    spoils = [("length", bad) for bad in (-1, 1024, 2**31 - 1, -(2**31))]
    spoils += [("page", bad) for bad in (-1, pages, 2**31 - 1, -(2**31))]
    for kind, bad in spoils:
        if kind == "length":
            lengths[1] = bad
        else:
            table[1, 7] = bad
        graph.replay()
        assert bool(out[1].isnan().all()) and bool(lse[1].isnan().all()), (kind, bad)
        assert same_bytes(out[[0, 2]], good[[0, 2]]) and same_bytes(lse[[0, 2]], good_lse[[0, 2]]), (kind, bad)
        assert same_bytes(given["k_cache"], caches[0]) and same_bytes(given["v_cache"], caches[1]), (kind, bad)
        lengths.copy_(torch.tensor([1000, 500, 3]))
        table.copy_(good_table)
        graph.replay()
        assert same_bytes(out, good) and same_bytes(lse, good_lse), "a later replay is not healthy"


@every_call
def test_p5_exact_workspace(gpu: str, op: str, call: dict[str, Any]) -> None:
    given = owned_call(op, call, gpu).keywords
    assert_exact_workspace(op, given)


def assert_exact_workspace(op: str, given: dict[str, Any]) -> int:
    """As many bytes as asked for are enough, whatever they hold; one byte less is refused."""
    size = SIZES[op](**given)
    expected = [part.clone() for part in flat(FUNCTIONS[op](**given))]
    for payload in (0, 0xFF, 0x7F):
        buffer = torch.full((256 + size + 256,), payload, dtype=torch.uint8, device=given["q"].device)
        assert_same(FUNCTIONS[op](**given, workspace=buffer[256 : 256 + size]), expected)
        assert bool((buffer[:256] == payload).all()) and bool((buffer[256 + size :] == payload).all())
    if size:
        with pytest.raises(RuntimeError, match=rf"^{op}: workspace must be at least {size} bytes, got {size - 1}"):
            FUNCTIONS[op](**given, workspace=buffer[256 : 255 + size])
    return size


def test_p5_splits_need_a_workspace(gpu: str) -> None:
    given = decode_buffers(gpu)
    given["cache_seqlens"].copy_(torch.tensor([1000, 500, 3]))
    for splits in (0, 2, 7, 32):
        size = assert_exact_workspace("gqa_attention_decode", {**given, "num_splits": splits})
        assert size > 0 or splits == 0


def test_p14_repeatable_beside_traffic(gpu: str) -> None:
    """A thousand runs while another stream keeps the memory busy: the same bytes."""
    given = decode_buffers(gpu, batch=8)
    given["cache_seqlens"].copy_(torch.randint(1, 1000, (8,)))
    out, lse = (part.clone() for part in gqa_attention_decode(**given))
    chunks = torch.zeros(2, 1 << 27, dtype=torch.uint8, device=gpu)
    stream = torch.cuda.Stream()
    differs = torch.zeros((), dtype=torch.bool, device=gpu)
    torch.cuda.synchronize()
    for _ in range(1000):
        with torch.cuda.stream(stream):
            chunks[0].copy_(chunks[1])
        other, other_lse = gqa_attention_decode(**given)
        differs |= (other.view(torch.int16) != out.view(torch.int16)).any()
        differs |= (other_lse.view(torch.int32) != lse.view(torch.int32)).any()
    assert not bool(differs)


def test_p24_side_stream(gpu: str) -> None:
    """Runs on the current stream: behind slow work there, its input is what that work wrote."""
    given = decode_buffers(gpu)
    expected = [part.clone() for part in gqa_attention_decode(**given)]
    q = given["q"].clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        given["q"].zero_()
        slow = torch.randn(4096, 4096, device=gpu)
        for _ in range(20):
            slow = slow @ slow / 64
        given["q"].copy_(q)
        result = gqa_attention_decode(**given)
    stream.synchronize()
    assert_same(result, expected)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_p15_the_knob_matters(gpu: str, head_dim: int) -> None:
    """The negative control: a row alone and among others has the same bytes with batch_invariant, and without it the
    very comparison fails, as other splits round otherwise."""
    half = {"device": gpu, "dtype": torch.bfloat16}
    q = torch.randn(64, 1, 8, head_dim, **half)
    caches = [torch.randn(64, 4096, 2, head_dim, **half) for _ in range(2)]
    lengths = torch.full((64,), 4000, device=gpu, dtype=torch.int32)

    def depends_on_the_batch(**options: Any) -> tuple[bool, bool]:
        """Whether the plan does, and whether the bytes do."""
        results, splits = [], []
        for batch in (1, 64):
            with gqa_kernels.record_launches() as launches:
                results.append(
                    gqa_attention_decode(
                        q[:batch],
                        *(cache[:batch] for cache in caches),
                        cache_seqlens=lengths[:batch],
                        return_lse=True,
                        **options,
                    )
                )
            splits.append(max(launch["num_splits"] for launch in launches))
        same = all(same_bytes(alone, among[:1]) for alone, among in zip(*results))
        return splits[0] != splits[1], not same

    assert depends_on_the_batch() == (True, True)
    assert depends_on_the_batch(batch_invariant=True) == (False, False)


def test_p9_nothing_to_launch(gpu: str) -> None:
    """Empty batches in a capture launch nothing and fail nothing."""
    q, cache = torch.zeros(0, 1, 4, 64, device=gpu), torch.zeros(0, 8, 2, 64, device=gpu)
    lengths = torch.zeros(0, dtype=torch.int32, device=gpu)
    graph, (out, lse) = capture(
        lambda: gqa_attention_decode(q, cache, cache.clone(), cache_seqlens=lengths, return_lse=True)
    )
    graph.replay()
    assert out.shape == q.shape and lse.shape == (0, 4, 1) and not math.isnan(float(out.sum()))
