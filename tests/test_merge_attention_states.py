"""merge_attention_states: attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.attention import make_case
from support.attention_layout import build_cache, run_cached
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles, opcheck
from support.guard import Guard, same_bytes
from torch import Tensor

from gqa_kernels import merge_attention_states


def reference(outs: Tensor, lses: Tensor) -> tuple[np.ndarray, np.ndarray]:
    o, part = to_numpy(outs), to_numpy(lses)
    top = part.max(0)
    safe = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(part - safe)
    total = weights.sum(0)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    share = weights / np.where(total > 0, total, 1.0)
    return (o * share.transpose(0, 1, 3, 2)[..., None]).sum(0), lse


def eager(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Every step rounded to the dtype of outs."""
    share = torch.softmax(lses, 0).nan_to_num(0.0).transpose(2, 3)[..., None].to(outs.dtype)
    total = torch.zeros_like(outs[0])
    for out, weight in zip(outs, share):
        total = total + out * weight
    return total, torch.logsumexp(lses, 0)


def check(outs: Tensor, lses: Tensor, what: str = "") -> None:
    out, lse = merge_attention_states(outs, lses)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    expected, expected_lse = reference(outs, lses)
    base, base_lse = eager(outs, lses)
    finite = lses[lses.isfinite()]
    score = 1 + (float(finite.abs().max()) if finite.numel() else 0.0)
    value = float(outs.abs().max()) if outs.numel() else 0.0
    assert_within_bound(out, expected, base, attention_extra=score * value, what=f"{what} out")
    assert_within_bound(lse, expected_lse, base_lse, attention_extra=score, what=f"{what} lse")


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_accuracy(guard: Guard, dtype: torch.dtype) -> None:
    for parts in (1, 2, 3, 7, 16, 64, 133):
        for shape in ((2, 3, 4, 64), (1, 1, 7, 8), (3, 5, 1, 256), (1, 2, 3, 40)):
            batch, queries, heads, _ = shape
            outs = guard.randn(parts, *shape, dtype=dtype)
            lses = guard.randn(parts, batch, heads, queries, scale=5.0)
            check(outs, lses, f"{parts} parts of {shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_empty_parts_weigh_nothing(guard: Guard, dtype: torch.dtype) -> None:
    """lse -inf in some parts, in all parts; whatever such a part's out holds, it is not used."""
    outs = torch.randn(5, 2, 3, 4, 64).to(dtype)
    lses = torch.randn(5, 2, 4, 3)
    lses[torch.rand(lses.shape) < 0.5] = -math.inf
    lses[:, 1, 2] = -math.inf
    lses[3] = -math.inf
    check(guard.place(outs), guard.place(lses))
    clean = merge_attention_states(guard.place(outs), guard.place(lses))
    outs[3] = math.nan
    poisoned = merge_attention_states(guard.place(outs), guard.place(lses))
    assert all(same_bytes(a, b) for a, b in zip(poisoned, clean))
    assert not bool(clean[0][1, :, 2].any()) and bool((clean[1][1, 2] == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e30])
def test_p1_extreme_lse(guard: Guard, dtype: torch.dtype, offset: float) -> None:
    check(guard.randn(4, 2, 3, 4, 64, dtype=dtype), guard.place(torch.randn(4, 2, 4, 3) + offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_part_comes_back(guard: Guard, dtype: torch.dtype) -> None:
    outs, lses = guard.randn(1, 2, 3, 4, 64, dtype=dtype), guard.randn(1, 2, 4, 3)
    out, lse = merge_attention_states(outs, lses)
    assert same_bytes(out, outs[0]) and same_bytes(lse, lses[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_cache(guard: Guard, dtype: torch.dtype) -> None:
    """Attention over three stretches of the keys, sinks in the first alone, joined: within P1 of the whole."""
    whole = make_case([(1, 200, 0)] * 3, dtype=dtype, heads=(8, 2), sinks=torch.randn(8) + 1)
    outs, lses = [], []
    for first, last in ((0, 90), (90, 91), (91, 200)):
        part = whole.change(k=[k[first:last] for k in whole.k], v=[v[first:last] for v in whole.v])
        part = part if first == 0 else part.change(sinks=None)
        out, lse = run_cached(part, guard, build_cache(part, guard), decode=True)
        outs.append(out[:, None])
        lses.append(lse.T[..., None])
    out, lse = merge_attention_states(torch.stack(outs), torch.stack(lses))
    whole.check((out[:, 0], lse[..., 0].T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_stays_in_its_row(guard: Guard, dtype: torch.dtype) -> None:
    outs, lses = torch.randn(3, 2, 3, 4, 64).to(dtype), torch.randn(3, 2, 4, 3)
    clean, clean_lse = merge_attention_states(guard.place(outs), guard.place(lses))
    lses[1, 0, 2, 1] = math.nan
    out, lse = merge_attention_states(guard.place(outs), guard.place(lses))
    assert bool(out[0, 1, 2].isnan().all()) and bool(lse[0, 2, 1].isnan())
    others = torch.ones(2, 3, 4, dtype=torch.bool)
    others[0, 1, 2] = False
    assert same_bytes(out[others], clean[others])
    assert same_bytes(lse[others.transpose(1, 2)], clean_lse[others.transpose(1, 2)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for shape in ((0, 3, 4, 64), (2, 0, 4, 64)):
        outs, lses = guard.randn(2, *shape, dtype=dtype), guard.randn(2, shape[0], shape[2], shape[1])
        out, lse = merge_attention_states(outs, lses)
        assert out.shape == shape and lse.shape == lses.shape[1:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    outs, lses = guard.randn(3, 2, 5, 4, 64, dtype=dtype), guard.randn(3, 2, 4, 5)
    expected = merge_attention_states(outs, lses)
    views = {
        "transposed": (outs.transpose(2, 3).contiguous().transpose(2, 3), lses.mT.contiguous().mT),
        "misaligned": (guard.place(outs, offset=1), guard.place(lses, offset=1)),
        "sliced": (torch.cat([outs, outs], -1)[..., :64], torch.cat([lses, lses], 1)[:, :2]),
    }
    for name, (o, part) in views.items():
        assert all(same_bytes(a, b) for a, b in zip(merge_attention_states(o, part), expected)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    outs, lses = guard.randn(3, 2, 5, 4, 64, dtype=dtype), guard.randn(3, 2, 4, 5)
    opcheck(torch.ops.gqa_kernels.merge_attention_states.default, (outs, lses))


def test_p17_compile(guard: Guard) -> None:
    assert_compiles(merge_attention_states, guard.randn(3, 2, 5, 4, 64), guard.randn(3, 2, 4, 5))


@pytest.mark.parametrize(
    "outs, lses, word",
    [
        ((3, 2, 5, 64), (3, 2, 4, 5), "outs"),
        ((3, 2, 5, 4, 64), (3, 2, 4), "lses"),
        ((3, 2, 5, 4, 64), (3, 2, 5, 4), "lses"),
        ((0, 2, 5, 4, 64), (0, 2, 4, 5), "outs"),
        ((3, 2, 5, 4, 60), (3, 2, 4, 5), "head_dim"),
        ((3, 2, 5, 4, 264), (3, 2, 4, 5), "head_dim"),
    ],
)
def test_p20_refusals(device: str, outs: tuple[int, ...], lses: tuple[int, ...], word: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^merge_attention_states: .*{word}.*got"):
        merge_attention_states(torch.zeros(outs, device=device), torch.zeros(lses, device=device))


def test_p20_refuses_half_lses(device: str) -> None:
    outs, lses = torch.zeros(3, 2, 5, 4, 64, device=device), torch.zeros(3, 2, 4, 5, device=device)
    with pytest.raises(RuntimeError, match=r"^merge_attention_states: lses must be float32, got float16"):
        merge_attention_states(outs, lses.half())
