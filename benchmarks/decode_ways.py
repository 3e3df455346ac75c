"""One decode shape called in other ways: paged, appending, with more tokens, each beside the plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import gqa_kernels
from benchmarks.case import OURS, Contestant, Inputs
from benchmarks.check import assert_close, attention_rows
from benchmarks.report import Aim
from benchmarks.shapes import Attention
from benchmarks.timing import Settings
from gqa_kernels._library import C

PAGES = {64: 1.03, 16: 1.10, 1: None}  # page size: at most so many times the contiguous cache's time
TOKENS = (2, 4, 8, 16)
MOST_TOKENS = 1.15
CAPTURED_AT_1 = OURS + " (captured at 1)"  # a graph captured at length 1, replayed at the lengths of the case
PORTABLE = OURS + " (portable kernel)"


@contextmanager
def _at_length_1(x: Inputs) -> Iterator[None]:
    lengths = x["lengths"].clone()
    x["lengths"].fill_(1)
    yield
    x["lengths"].copy_(lengths)


@contextmanager
def portable_kernel() -> Iterator[None]:
    C.set_kernel_override(1)
    try:
        yield
    finally:
        C.set_kernel_override(0)


def everywhere(call: Callable[[Inputs], Tensor]) -> list[Contestant]:
    """Of every shape on a GPU: ``call`` replayed far from where it was captured, and served as on older GPUs."""
    return [
        Contestant(CAPTURED_AT_1, call, capturing=_at_length_1, aim=Aim(1.1, beside=OURS), host=False),
        Contestant(PORTABLE, call, portable_kernel, aim=Aim(1.0, beside="SDPA flash"), host=False),
    ]


def inputs(shape: Attention, device: str, dtype: torch.dtype) -> Inputs:
    """Beside those of the plain call, all of whose sequences have ``shape.seqlen`` keys."""
    new = shape.batch, 1, shape.kv_heads, shape.head_dim
    return {
        "queries": torch.randn(shape.batch, max(TOKENS), shape.q_heads, shape.head_dim, device=device, dtype=dtype),
        "new_k": torch.randn(new, device=device, dtype=dtype),
        "new_v": torch.randn(new, device=device, dtype=dtype),
    }


def shared_inputs(shape: Attention, device: str) -> Inputs:
    """Those that all layers of a step have in common: lengths, page tables, the tables of RoPE."""
    cos, sin = gqa_kernels.rope_tables(shape.head_dim, shape.seqlen, base=10000.0, device=device)
    before = torch.full((shape.batch,), shape.seqlen - 1, dtype=torch.int32, device=device)
    rows = shape.batch * shape.seqlen
    tables = {f"table{page}": torch.randperm(rows // page, device=device).int().view(shape.batch, -1) for page in PAGES}
    return {"before": before, "cos": cos, "sin": sin, **tables}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _in_pages(x: Inputs, name: str, page: int) -> Tensor:
    return x[name].view(-1, page, *x[name].shape[2:])


def _check(x: Inputs, out: Tensor, tokens: int = 1, page: int = 0, append: bool = False, rotate: bool = False) -> None:
    q, k, v = x["queries"][:, :tokens], x["k"], x["v"]
    if page:
        k, v = (_in_pages(x, name, page)[x[f"table{page}"]].view_as(k) for name in ("k", "v"))
    if append:
        new_k, at = x["new_k"], k.shape[1] - 1
        if rotate:
            q, new_k = (_rotated(part, x["cos"][at], x["sin"][at]) for part in (q, new_k))
        k, v = (torch.cat([old[:, :-1], new.to(old.dtype)], 1) for old, new in ((k, new_k), (v, x["new_v"])))
    rows = torch.arange(tokens, device=q.device)
    for b in range(len(q)):
        part = slice(b, b + 1)
        assert_close(out[part], [attention_rows(q[part], k[part], v[part], rows, tokens > 1)])


def _paged(x: Inputs, page: int) -> Tensor:
    k, v = (_in_pages(x, name, page) for name in ("k", "v"))
    table, q = x[f"table{page}"], x["queries"][:, :1]
    out: Tensor = gqa_kernels.gqa_attention_decode(q, k, v, cache_seqlens=x["lengths"], block_table=table)
    return out


def _appending(x: Inputs, rotate: bool) -> Tensor:
    options = {"rotary_cos": x["cos"], "rotary_sin": x["sin"]} if rotate else {}
    caches = x["k"], x["v"], x["new_k"], x["new_v"]
    q = x["queries"][:, :1]
    out: Tensor = gqa_kernels.gqa_attention_decode(q, *caches, cache_seqlens=x["before"], **options)
    return out


def _many(x: Inputs, tokens: int) -> Tensor:
    q = x["queries"][:, :tokens]
    out: Tensor = gqa_kernels.gqa_attention_decode(q, x["k"], x["v"], cache_seqlens=x["lengths"])
    return out


def _promising(x: Inputs, option: str) -> Tensor:
    q = x["queries"][:, :1]
    out: Tensor = gqa_kernels.gqa_attention_decode(q, x["k"], x["v"], cache_seqlens=x["lengths"], **{option: True})
    return out


def ways(settings: Settings) -> list[Contestant]:
    """On :func:`inputs`."""

    def way(name: str, call: Callable[[Inputs], Tensor], aim: Aim, **checked: int) -> Contestant:
        return Contestant(f"{OURS} ({name})", call, check=partial(_check, **checked), aim=aim, host=False)

    found = []
    for page, most in PAGES.items():
        found.append(way(f"pages of {page}", partial(_paged, page=page), Aim(most, beside=OURS), page=page))
    for tokens in TOKENS:
        aim = Aim(MOST_TOKENS, beside=OURS)
        found.append(way(f"{tokens} tokens", partial(_many, tokens=tokens), aim, tokens=tokens))
    invariant, early = (partial(_promising, option=option) for option in ("batch_invariant", "static_prefix"))
    found.append(way("batch_invariant", invariant, Aim(1.05, beside=OURS)))
    if settings.cuda:
        found.append(way("static_prefix", early, Aim(beside=OURS)))
    for name, rotate in (("append", False), ("append and RoPE", True)):
        aim = Aim(plus=0.4, beside=OURS)
        found.append(way(name, partial(_appending, rotate=rotate), aim, append=True, rotate=rotate))
    return found
