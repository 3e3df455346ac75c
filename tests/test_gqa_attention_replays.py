"""The attention kernels for Hopper in execution: a capture freezes nothing, runs repeat, graphs share nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.attention_buffers import NAMES, Buffers, buffers
from support.contract import capture
from support.guard import Comparison, same_bytes
from support.kernels import hopper
from torch import Tensor

every_name = pytest.mark.parametrize("name", NAMES)
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def copies(parts: Any) -> list[Tensor]:
    return [part.clone() for part in parts]


@every_name
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_p23_thousand_replays(gpu: str, name: str, head_dim: int) -> None:
    """Captured where every length is 0 or 1; then tokens, offsets, lengths and pages change: the bytes of eager."""
    call, source = buffers(name, gpu, head_dim), random.Random(head_dim)
    with hopper(gpu):
        graph, captured = capture(call)
    same = Comparison(gpu)
    for step in range(1000 if head_dim == 128 else 100):
        call.change(source)
        before = copies(call.caches)
        graph.replay()
        replayed = copies([*captured, *call.caches])
        for cache, old in zip(call.caches, before):
            cache.copy_(old)
        same.add(replayed, [*call(), *call.caches])
        if step % 50 == 0:
            same.check(f"{step}")
    same.check("a replay has other bytes than eager")


@every_name
def test_p22_neither_synchronises_nor_allocates(gpu: str, name: str) -> None:
    """No memory but out, lse and a workspace."""
    call = buffers(name, gpu, 128)
    call.change(random.Random(0))
    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with hopper(gpu):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= 3


@contextmanager
def traffic(device: str) -> Iterator[Any]:
    """A function that has another stream copy 128 MiB."""
    chunks = torch.zeros(2, 1 << 27, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()

    def copy() -> None:
        with torch.cuda.stream(stream):
            chunks[0].copy_(chunks[1])

    yield copy
    torch.cuda.synchronize()


@every_name
@pytest.mark.parametrize("head_dim", [64, 128])
def test_p14_repeatable_beside_traffic(gpu: str, name: str, head_dim: int) -> None:
    """A thousand runs while another stream keeps the memory busy: the same bytes."""
    call = buffers(name, gpu, head_dim)
    call.change(random.Random(head_dim))
    with hopper(gpu):
        expected = copies(call())
    same = Comparison(gpu)
    with traffic(gpu) as copy:
        for _ in range(1000):
            copy()
            same.add(call(), expected)
    same.check("a run has other bytes")


@pytest.mark.parametrize(
    "names",
    [
        ("decode batch", "decode alone"),
        ("decode alone", "decode alone"),
        ("decode pages", "decode float8"),
        ("prefill ragged", "prefill ragged"),
        ("prefill ragged pages", "decode batch"),
        ("prefill chunk", "prefill ragged full"),
    ],
    ids=" + ".join,
)
def test_p23_two_graphs_on_two_streams(gpu: str, names: tuple[str, str]) -> None:
    """Replayed side by side, each gives what it gives alone: nothing that carries state is shared."""
    calls: list[Buffers] = []
    expected, graphs = [], []
    for seed, name in enumerate(names):
        call = buffers(name, gpu, 128)
        call.change(random.Random(seed))
        with hopper(gpu):
            graphs.append(capture(call))
        calls.append(call)
        expected.append(copies(call()))
    streams = [torch.cuda.Stream() for _ in names]
    same = Comparison(gpu)
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, captured) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                for part in captured:
                    part.zero_()
                for _ in range(5):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, captured), wanted in zip(graphs, expected):
            same.add(captured, wanted)
        torch.cuda.synchronize()
    same.check("two graphs side by side disturb each other")


def test_p6_bad_offsets_in_a_replay(gpu: str) -> None:
    """Offsets spoilt after the capture: NaN for the rows in doubt, the others as ever, later replays healthy."""
    call = buffers("prefill ragged", gpu, 128)
    good = [0, 200, 300, 300, 530, 800, 1000]
    offsets = {name: call.given[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    for x in offsets.values():
        x.copy_(torch.tensor(good))
    with hopper(gpu):
        graph, (out, lse) = capture(call)
    graph.replay()
    clean, clean_lse = out.clone(), lse.clone()
    assert bool(clean.isfinite().all()) and not bool(clean[1000:].any())
    spoils = [(6, 1201, slice(800, 1000)), (6, INT_MAX, slice(800, 1000)), (1, -1, slice(0, 300))]
    spoils += [(1, INT_MIN, slice(0, 300)), (1, 1201, slice(0, 300)), (6, 799, slice(800, 1000))]
    for name, x in offsets.items():
        for at, value, bad in spoils:
            x[at] = value
            graph.replay()
            rows = torch.ones(len(out), dtype=torch.bool, device=gpu)
            rows[bad] = False
            rows[1000:] = name == "cu_seqlens_k"
            assert bool(out[bad].isnan().all()) and bool(lse[:, bad].isnan().all()), (name, at, value)
            assert same_bytes(out[rows], clean[rows]) and same_bytes(lse[:, rows], clean_lse[:, rows]), (
                name,
                at,
                value,
            )
            x.copy_(torch.tensor(good))
            graph.replay()
            assert same_bytes(out, clean) and same_bytes(lse, clean_lse), "a later replay is not healthy"


@pytest.mark.parametrize(
    "name",
    [
        "prefill ragged pages",
        "prefill chunk pages",
        "prefill chunk",
        "decode pages",
        "decode int8 pages",
        "decode alone",
    ],
)
def test_p6_bad_lengths_and_pages_in_a_replay(gpu: str, name: str) -> None:
    """NaN for that sequence, the others as ever, nothing written for it."""
    call = buffers(name, gpu, 128)
    lengths, table = call.given["cache_seqlens"], call.given.get("block_table")
    lengths.fill_(140)
    ragged = "cu_seqlens_q" in call.given
    if ragged:
        call.given["cu_seqlens_q"].copy_(torch.arange(7) * 100)
    with hopper(gpu):
        graph, (out, lse) = capture(call)
    graph.replay()
    clean = copies((out, lse))
    last = len(lengths) - 1
    rows = slice(500, 600) if ragged else last
    others = torch.ones(len(out), dtype=torch.bool, device=gpu)
    others[rows] = False
    capacity = table.shape[1] * call.given["k_cache"].shape[1] if table is not None else call.given["k_cache"].shape[1]
    spoils = [("length", value) for value in (-1, capacity + 1, INT_MAX, INT_MIN)]
    if table is not None:
        spoils += [("page", value) for value in (-1, call.given["k_cache"].shape[0], INT_MAX, INT_MIN)]
    good_table = None if table is None else table.clone()
    caches = copies(call.caches)
    for kind, value in spoils:
        if kind == "length":
            lengths[last] = value
        else:
            assert table is not None
            table[last, 0] = value
        graph.replay()
        side = out[rows], (lse[:, rows] if ragged else lse[rows])
        assert all(bool(part.isnan().all()) for part in side), (kind, value)
        kept = (
            (out[others], clean[0][others]),
            ((lse[:, others], clean[1][:, others]) if ragged else (lse[others], clean[1][others])),
        )
        assert all(same_bytes(a, b) for a, b in kept), (kind, value)
        assert all(same_bytes(a, b) for a, b in zip(call.caches, caches)), (kind, value)
        lengths.fill_(140)
        if table is not None and good_table is not None:
            table.copy_(good_table)
        graph.replay()
        assert same_bytes(out, clean[0]) and same_bytes(lse, clean[1]), "a later replay is not healthy"
