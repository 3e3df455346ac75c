"""Full attention over many rows, which warpgroups serve on sm_90; and which calls they take: a pure function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention import Case, make_case
from support.attention_layout import packed, run_prefill
from support.guard import Guard, same_bytes
from torch import Tensor

from gqa_kernels import gqa_attention_prefill
from gqa_kernels._library import C
from gqa_kernels.explain import H200

NAN = float("nan")
HALVES = [torch.float16, torch.bfloat16]
HEADS = [(2, 2), (8, 2), (7, 1)]
LENGTHS = [(64, 64), (65, 1), (127, 175), (128, 176), (129, 177), (191, 129), (193, 385), (257, 100), (400, 399)]

every_half = pytest.mark.parametrize("dtype", HALVES)
every_width = pytest.mark.parametrize("head_dim", [64, 128])


def full_case(
    queries: int, keys: int, dtype: torch.dtype, head_dim: int, heads: tuple[int, int] = (4, 2), batch: int = 2
) -> Case:
    return make_case([(queries, 0, keys)] * batch, dtype=dtype, heads=heads, head_dim=head_dim, causal=False)


@every_half
@every_width
@pytest.mark.parametrize("heads", HEADS)
def test_p1_lengths(guard: Guard, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    for queries, keys in LENGTHS if guard.device == "cuda" else LENGTHS[2:4]:
        case = full_case(queries, keys, dtype, head_dim, heads)
        case.check(run_prefill(case, guard, return_lse=True), f"{queries} queries, {keys} keys")


@every_half
@every_width
def test_p1_large_scores(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """Maxima far apart and growing towards either end; weights are rescaled block by block."""
    for factor in (8.0, 60.0):
        case = full_case(130, 380, dtype, head_dim, batch=1)
        ramp = torch.linspace(0.1, factor, 380)[:, None, None]
        for keys in (case.k[0] * ramp, case.k[0] * ramp.flip(0)):
            steep = case.change(k=[keys.to(dtype)])
            steep.check(run_prefill(steep, guard, return_lse=True), f"factor {factor}")


@every_half
@every_width
def test_p11_strided_views_and_slack(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    """The same bytes from every layout with aligned rows; NaN in slack and past the end is not read."""
    case = full_case(130, 200, dtype, head_dim)
    tensors = {name: guard.place(torch.stack(getattr(case, name))) for name in ("q", "k", "v")}
    expected = run_prefill(case, guard, return_lse=True)
    case.check(expected)
    for name, x in tensors.items():
        batch, tokens, heads, dim = x.shape
        wide = torch.full((batch + 1, tokens + 5, heads + 1, 2 * dim), NAN, dtype=dtype, device=x.device)
        wide[:batch, :tokens, :heads, :dim] = x
        views = {
            "slack": wide[:batch, :tokens, :heads, :dim],
            "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
            "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        }
        for what, view in views.items():
            result = packed(*gqa_attention_prefill(**{**tensors, name: view}, causal=False, return_lse=True))
            for part, other in zip(result, expected):
                assert same_bytes(part, other), f"{name} {what}"
    alone = gqa_attention_prefill(*(x[1:] for x in tensors.values()), causal=False)
    assert same_bytes(alone.flatten(0, 1), expected[0][130:]), "bytes depend on the batch"


@every_half
@every_width
def test_p8_nan_stays_in_its_head_and_sequence(guard: Guard, dtype: torch.dtype, head_dim: int) -> None:
    case = full_case(130, 200, dtype, head_dim)
    q, k, v = (guard.place(torch.stack(x), writable=True) for x in (case.q, case.k, case.v))
    clean = gqa_attention_prefill(q, k, v, causal=False)
    v[0, 7, 1, 3] = NAN
    out = gqa_attention_prefill(q, k, v, causal=False)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, :, 2:, 3] = True
    assert bool(out[hit].isnan().all())
    assert same_bytes(out[~hit], clean[~hit])
    v[0, 7, 1, 3] = 0
    q[1, 64, 3, 0] = NAN
    out = gqa_attention_prefill(q, k, v, causal=False)
    assert bool(out[1, 64, 3].isnan().all())
    assert bool(out[1, :64].isfinite().all()) and bool(out[1, 65:].isfinite().all())


def explain(*tensors: Tensor, gpu: dict[str, int] = H200, **options: Any) -> tuple[dict[str, Any], str]:
    """The last launch and the reason."""
    C.explain_begin("cuda", *gpu.values())
    try:
        gqa_attention_prefill(*tensors, **{"causal": False, **options})
    finally:
        plans = C.explain_end()
    return plans[0]["launches"][-1], plans[0]["reason"]


def prompt(
    batch: int = 1, queries: int = 512, keys: int = 512, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    shapes = [(batch, queries, 32, dim), (batch, keys, 8, dim), (batch, keys, 8, dim)]
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


@every_half
@pytest.mark.parametrize("dim, rows, threads", [(64, 192, 512), (128, 128, 384)])
def test_wgmma_serves_full_attention(dtype: torch.dtype, dim: int, rows: int, threads: int) -> None:
    for queries in (64, 512, 513):
        launch, reason = explain(*prompt(queries=queries, dim=dim, dtype=dtype))
        tiles = 32 * -(-queries // rows)
        assert launch["kernel"] == "prefill_wgmma" and launch["grid"] == (min(132, tiles), 1, 1), reason
        assert launch["block"] == (threads, 1, 1) and launch["shared_memory"] <= H200["max_shared_memory"]


def test_wgmma_takes_what_it_was_built_for() -> None:
    def refused(tensors: list[Tensor], why: str, **options: Any) -> None:
        launch, reason = explain(*tensors, **options)
        assert launch["kernel"] != "prefill_wgmma" and why in reason, reason

    q, k, v = prompt()
    refused([q, k, v], "full attention", causal=True)
    refused([q, k, v], "full attention", window_size=(100, -1))
    refused([q, k, v], "softcap", softcap=30.0)
    refused([q, k, v], "scale", softmax_scale=-1.0)
    refused([q, k, v], "sinks", sinks=torch.zeros(32))
    refused([q, k, v], "number of splits", num_splits=2)
    refused([q, k, v], "batch_invariant", batch_invariant=True)
    refused(prompt(queries=63), "at least 64 queries")
    refused(prompt(keys=0), "and keys")
    refused(prompt(dim=96), "head_dim 64 and 128")
    refused(prompt(dtype=torch.float32), "float32")
    refused(prompt(queries=64, keys=65536), "few rows")
    # Copied first, so that layout does not decide over the kernel and its bytes.
    for other in (k[:, :1].expand_as(k), torch.empty(1, 512, 8, 129, dtype=q.dtype)[..., :128]):
        assert explain(q, other, v)[0]["kernel"] == "prefill_wgmma"
    refused([q, k, v], "warps divide the rows", gpu={**H200, "compute_capability": 80})
    C.set_kernel_override(1)
    try:
        refused([q, k, v], "portable kernels were asked for")
    finally:
        C.set_kernel_override(0)
