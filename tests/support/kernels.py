"""Which kernel serves a call: a test of a Hopper kernel says so, and fails where another one would answer for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import gqa_kernels
from gqa_kernels._library import C
from gqa_kernels.explain import H200

HOPPER = {"gqa_attention_decode": "decode_ring", "gqa_attention_prefill": "prefill_wgmma"}

_portable = False


def force_portable(portable: bool) -> None:
    """Leaves out kernels for sm_90."""
    global _portable
    _portable = portable
    C.set_kernel_override(int(portable))


def has_hopper_kernels(device: str) -> bool:
    return torch.device(device).type == "cuda" and not _portable and torch.cuda.get_device_capability() == (9, 0)


@contextmanager
def hopper(device: str) -> Iterator[list[dict[str, Any]]]:
    """Every attention call of the block runs a Hopper kernel where there are any, and none where they are left out."""
    with gqa_kernels.record_launches() as launches:
        yield launches
    served = [launch for launch in launches if launch["op"] in HOPPER]
    if has_hopper_kernels(device):
        assert any(launch["kernel"] in HOPPER.values() for launch in served), "no call of a Hopper kernel"
        others = {launch["kernel"] for launch in served if launch["kernel"].startswith("attend_")}
        assert not others, f"{others} served calls that are meant for Hopper kernels"
    elif torch.device(device).type == "cuda":
        assert not any(launch["kernel"] in HOPPER.values() for launch in served)


def clusters(launches: list[dict[str, Any]]) -> set[int]:
    """Blocks that shared a sequence and KV head, of the decode kernel for Hopper."""
    return {launch["num_splits"] for launch in launches if launch["kernel"] == HOPPER["gqa_attention_decode"]}


def batch_for(share: int, head_dim: int, capacity: int, *, heads: tuple[int, int], dtype: torch.dtype) -> int:
    """How many sequences to decode so that ``share`` blocks divide the keys of each, as an H200's plans have it."""
    C.set_kernel_override(0)
    found: dict[int, int] = {}
    for batch in (48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1):
        q = torch.empty(batch, 1, heads[0], head_dim, dtype=dtype)
        cache = torch.empty(head_dim, dtype=dtype).expand(batch, capacity, heads[1], head_dim)
        lengths = torch.zeros(batch, dtype=torch.int32)
        C.explain_begin("cuda", *H200.values())
        try:
            gqa_kernels.gqa_attention_decode(q, cache, cache, cache_seqlens=lengths)
        finally:
            found |= dict.fromkeys(clusters(C.explain_end()[0]["launches"]), batch)
    C.set_kernel_override(int(_portable))
    assert share in found, f"no batch has {share} blocks share {capacity} keys: {found}"
    return found[share]
