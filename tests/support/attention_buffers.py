"""Attention calls of serving, in buffers whose tokens, lengths, offsets and pages change in place: for CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill

OPS: dict[str, Any] = {"gqa_attention_decode": gqa_attention_decode, "gqa_attention_prefill": gqa_attention_prefill}


@dataclass
class Buffers:
    op: str
    given: dict[str, Any]
    change: Callable[[random.Random], None]

    def __call__(self) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = OPS[self.op](**self.given)
        return result

    @property
    def caches(self) -> list[Tensor]:
        return [self.given[name] for name in ("k_cache", "v_cache") if name in self.given]


def offsets(source: random.Random, count: int, most: int, longest: int) -> list[int]:
    """Of ``count`` sequences, some without tokens, at most ``longest`` each and ``most`` together."""
    ends = [0]
    for _ in range(count):
        length = source.choice([0, 1, source.randint(0, longest), source.randint(0, longest)])
        ends.append(min(most, ends[-1] + length))
    return ends


def write(target: Tensor, values: list[Any]) -> None:
    target.copy_(torch.tensor(values, dtype=target.dtype))


def caches(
    device: str, batch: int, capacity: int, heads: int, dim: int, dtype: torch.dtype, page_size: int | None, kind: Any
) -> dict[str, Any]:
    shape = (batch, capacity, heads, dim)
    if page_size is not None:
        shape = (batch * capacity // page_size + 3, page_size, heads, dim)
    made = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    out: dict[str, Any] = {}
    if kind is not None:
        made = [(x * 20).to(kind) for x in made]
        out |= {name: torch.full((heads,), 0.05, device=device) for name in ("k_scale", "v_scale")}
    out |= {"k_cache": made[0], "v_cache": made[1]}
    if page_size is not None:
        table = torch.arange(batch * capacity // page_size, device=device, dtype=torch.int32)
        out["block_table"] = table.view(batch, -1)
    return out


def shuffle_pages(given: dict[str, Any]) -> None:
    if "block_table" in given:
        table = given["block_table"]
        order = torch.randperm(given["k_cache"].shape[0], device=table.device)[: table.numel()]
        table.copy_(order.view_as(table))


def prefill_buffers(
    device: str,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (8, 2),
    ragged: bool = True,
    cached: bool = False,
    appends: bool = True,
    page_size: int | None = None,
    **options: Any,
) -> Buffers:
    """Ragged: 6 sequences of up to 300 tokens, and rows of none at the end. Otherwise 3 of 130, over a cache."""
    count, longest, capacity = (6, 300, 768) if ragged else (3, 130, 512)
    most = 1200

    def tokens(heads: int) -> Tensor:
        shape = (most,) if ragged else (count, longest)
        return torch.randn(*shape, heads, dim, device=device, dtype=dtype)

    given: dict[str, Any] = {"q": tokens(heads[0]), "return_lse": True, **options}
    if appends or not cached:
        given |= {"k": tokens(heads[1]), "v": tokens(heads[1])}
    if ragged:
        given |= {"max_seqlen_q": longest, "cu_seqlens_q": torch.zeros(count + 1, device=device, dtype=torch.int32)}
        if not cached:
            given |= {"max_seqlen_k": longest, "cu_seqlens_k": torch.zeros_like(given["cu_seqlens_q"])}
    if cached:
        given |= caches(device, count, capacity, heads[1], dim, dtype, page_size, None)
        given["cache_seqlens"] = torch.ones(count, device=device, dtype=torch.int32)

    def change(source: random.Random) -> None:
        given["q"].normal_()
        ends = offsets(source, count, most, longest)
        if ragged:
            write(given["cu_seqlens_q"], ends)
        if not cached and ragged:
            same = source.random() < 0.5
            write(given["cu_seqlens_k"], ends if same else offsets(source, count, most, longest))
        if cached:
            write(
                given["cache_seqlens"],
                [source.choice([0, source.randint(0, capacity - longest)]) for _ in range(count)],
            )
        shuffle_pages(given)

    return Buffers("gqa_attention_prefill", given, change)


def decode_buffers(
    device: str,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (8, 2),
    batch: int = 3,
    capacity: int = 1024,
    tokens: int = 1,
    appends: bool = False,
    rotary: bool = False,
    page_size: int | None = None,
    kind: torch.dtype | None = None,
    **options: Any,
) -> Buffers:
    def new(heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype)

    given: dict[str, Any] = {"q": new(heads[0]), "return_lse": True, **options}
    given |= caches(device, batch, capacity, heads[1], dim, dtype, page_size, kind)
    given["cache_seqlens"] = torch.ones(batch, device=device, dtype=torch.int32)
    if appends:
        given |= {"k": new(heads[1]), "v": new(heads[1])}
    if rotary:
        angle = torch.randn(capacity, dim // 2, device=device)
        given |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}

    def change(source: random.Random) -> None:
        given["q"].normal_()
        last = capacity - tokens if appends else capacity
        write(given["cache_seqlens"], [source.choice([1, last, source.randint(0, last)]) for _ in range(batch)])
        shuffle_pages(given)

    return Buffers("gqa_attention_decode", given, change)


PREFILL: dict[str, dict[str, Any]] = {
    "ragged": {},
    "ragged full": {"causal": False},
    "ragged window": {"window_size": (100, -1), "softcap": 20.0},
    "ragged appended": {"cached": True},
    "ragged pages": {"cached": True, "page_size": 64},
    "chunk": {"ragged": False, "cached": True},
    "chunk pages": {"ragged": False, "cached": True, "page_size": 64, "appends": False},
}
DECODE: dict[str, dict[str, Any]] = {
    "batch": {},
    "alone": {"batch": 1, "capacity": 8192, "heads": (4, 1)},
    "appended": {"appends": True, "rotary": True, "window_size": (500, -1)},
    "tokens": {"tokens": 2, "appends": True},
    "pages": {"page_size": 16, "appends": True},
    "invariant": {"batch_invariant": True, "page_size": 64},
    "float8": {"kind": torch.float8_e4m3fn, "appends": True, "rotary": True},
    "int8 pages": {"kind": torch.int8, "page_size": 64},
}
NAMES = [*(f"prefill {name}" for name in PREFILL), *(f"decode {name}" for name in DECODE)]


def buffers(name: str, device: str, dim: int) -> Buffers:
    kind, _, which = name.partition(" ")
    return (
        prefill_buffers(device, dim, **PREFILL[which])
        if kind == "prefill"
        else decode_buffers(device, dim, **DECODE[which])
    )
