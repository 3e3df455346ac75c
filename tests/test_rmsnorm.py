"""rmsnorm and add_rmsnorm against float64 NumPy, HuggingFace's LlamaRMSNorm and their contract with torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles, assert_same, opcheck
from support.guard import Guard, same_bytes
from torch import Tensor

from gqa_kernels import add_rmsnorm, rmsnorm

EPS = 1e-5


def reference(x: Tensor, weight: Tensor, offset: float = 0.0) -> np.ndarray:
    x64 = to_numpy(x)
    return x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS) * (to_numpy(weight) + offset)


def eager(x: Tensor, weight: Tensor, offset: float = 0.0, cast_before_weight: bool = True) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
    if cast_before_weight:
        return (normed.to(x.dtype) * (weight + offset)).to(x.dtype)
    return (normed * (weight.float() + offset)).to(x.dtype)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 32, 64, 100, 896, 2048, 4096, 4100, 5120, 18944, 20001, 65536, 131072])
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    for rows in (1, 5):
        x, weight = guard.randn(rows, hidden, dtype=dtype), guard.randn(hidden, dtype=dtype)
        assert_within_bound(rmsnorm(x, weight, EPS), reference(x, weight), eager(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_before_weight", [True, False])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_p1_options(guard: Guard, dtype: torch.dtype, cast_before_weight: bool, weight_offset: float) -> None:
    options = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    for weight_dtype in {dtype, torch.float32}:
        x, weight = guard.randn(9, 256, dtype=dtype), guard.randn(256, dtype=weight_dtype)
        assert_within_bound(
            rmsnorm(x, weight, EPS, **options),
            reference(x, weight, weight_offset),
            eager(x, weight, weight_offset, cast_before_weight),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_p1_magnitudes(guard: Guard, dtype: torch.dtype, scale: float) -> None:
    x, weight = guard.randn(4, 512, dtype=dtype, scale=scale), guard.randn(512, dtype=dtype)
    assert_within_bound(rmsnorm(x, weight, EPS), reference(x, weight), eager(x, weight))


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("llama.modeling_llama.LlamaRMSNorm", {}),
        ("gemma2.modeling_gemma2.Gemma2RMSNorm", {"weight_offset": 1.0, "cast_before_weight": False}),
        ("gpt_oss.modeling_gpt_oss.GptOssRMSNorm", {"cast_before_weight": False}),
    ],
    ids=["llama", "gemma2", "gpt_oss"],
)
@pytest.mark.parametrize("hidden", [896, 1024, 4096, 4100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matches_transformers(
    guard: Guard, dtype: torch.dtype, hidden: int, norm: str, options: dict[str, Any]
) -> None:
    """The rounding of each family's own class: at most one unit in the last place apart. Where that rounds before it
    multiplies by the weight, the product is torch's of a value so close."""
    module, _, name = norm.rpartition(".")
    theirs = getattr(pytest.importorskip(f"transformers.models.{module}"), name)(hidden, eps=EPS)
    theirs = theirs.to(guard.device, dtype)
    x, weight = guard.randn(33, hidden, dtype=dtype), guard.randn(hidden, dtype=dtype)
    rounds_twice = options.get("cast_before_weight", True)
    with torch.no_grad():
        theirs.weight.copy_(torch.ones_like(weight) if rounds_twice else weight)
        expected, actual = theirs(x), rmsnorm(x, theirs.weight, EPS, **options)
    ulp = torch.finfo(dtype).eps * expected.double().abs()
    assert bool(((actual.double() - expected.double()).abs() <= ulp * 1.01).all())
    if rounds_twice:
        assert same_bytes(rmsnorm(x, weight, EPS), actual * weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [100, 1024, 20000])
def test_add_is_exact(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    x, residual = guard.randn(3, hidden, dtype=dtype), guard.randn(3, hidden, dtype=dtype)
    weight = guard.randn(hidden, dtype=dtype)
    normed, new_residual = add_rmsnorm(x, residual, weight, EPS)
    assert same_bytes(new_residual, x + residual)
    assert same_bytes(normed, rmsnorm(new_residual, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    x, weight = guard.randn(0, 64, dtype=dtype), guard.randn(64, dtype=dtype)
    assert rmsnorm(x, weight, EPS).shape == (0, 64)
    assert [part.shape for part in add_rmsnorm(x, x, weight, EPS)] == [(0, 64), (0, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    base, weight = guard.randn(4, 6, 5, 64, dtype=dtype), guard.randn(64, dtype=dtype)
    expected = rmsnorm(base, weight, EPS)
    views = {
        "transposed": base.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": torch.cat([base, base], -1)[..., :64],
        "misaligned": guard.place(base, offset=1),
        "last dimension strided": base.transpose(-1, -2).contiguous().transpose(-1, -2),
        "three strides": base.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    }
    for name, view in views.items():
        assert same_bytes(rmsnorm(view, weight, EPS), expected), name
        normed, total = add_rmsnorm(view, base, weight, EPS)
        assert same_bytes(total, base + base) and same_bytes(normed, rmsnorm(base + base, weight, EPS)), name
    expanded = base[:1].expand(4, 6, 5, 64)
    assert same_bytes(rmsnorm(expanded, weight, EPS), expected[:1].expand(4, 6, 5, 64).contiguous())
    assert same_bytes(rmsnorm(base, guard.place(weight, offset=1), EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hidden", [7, 32, 128, 200, 268, 896, 2048, 4096, 4100, 4108, 5120, 8188, 8192, 8200, 14336, 18944, 40000, 65536]
)
def test_p15_a_row_decides_its_bytes_alone(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    """Neither how many rows there are, nor where they lie, nor the dtype of equal weights."""
    rows = 300 if hidden < 10000 else 3
    x, residual, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), guard.randn(hidden, dtype=dtype)
    x, residual = guard.place(x.to(dtype)), guard.place(residual.to(dtype))
    out, (normed, total) = rmsnorm(x, weight, EPS), add_rmsnorm(x, residual, weight, EPS)
    for i in (0, rows - 1):
        assert same_bytes(rmsnorm(x[i], weight, EPS), out[i])
        assert_same(add_rmsnorm(x[i], residual[i], weight, EPS), (normed[i], total[i]))
    for offset in (1, 2, 4):
        elsewhere = guard.place(x, offset=offset)
        assert same_bytes(rmsnorm(elsewhere, weight, EPS), out), offset
        assert_same(add_rmsnorm(elsewhere, residual, weight, EPS), (normed, total), str(offset))
    apart = guard.place(torch.cat([x, x], -1))[:, :hidden]
    assert same_bytes(rmsnorm(apart, weight, EPS), out)
    assert_same(add_rmsnorm(apart, residual, weight, EPS), (normed, total))
    one_cast = rmsnorm(x, weight.float(), EPS, cast_before_weight=False)
    assert same_bytes(one_cast, rmsnorm(x, weight, EPS, cast_before_weight=False))


WIDE = [(1301, 512), (1101, 1024), (1101, 4100), (1101, 4108), (1101, 8188), (1102, 5120), (1101, 14336), (201, 65536)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), WIDE)
def test_p15_many_rows(gpu: str, dtype: torch.dtype, rows: int, hidden: int) -> None:
    """More rows than run at once, or than kernels for few take, an odd one last: as in calls of a few."""
    x, residual = (torch.randn(rows, hidden, device=gpu).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=gpu).to(dtype)
    out, (normed, total) = rmsnorm(x, weight, EPS), add_rmsnorm(x, residual, weight, EPS)
    for few in (slice(0, 33), slice(rows // 2, rows // 2 + 33), slice(rows - 33, rows)):
        assert same_bytes(rmsnorm(x[few], weight, EPS), out[few])
        assert_same(add_rmsnorm(x[few], residual[few], weight, EPS), (normed[few], total[few]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [4096, 4100, 5120, 8188, 8192, 14336, 18944, 40000, 65536])
def test_p15_large_calls(gpu: str, dtype: torch.dtype, hidden: int) -> None:
    """From 64 MiB on, kernels of their own, whose clusters prefetch: the bytes of small calls."""
    rows = max(265, 2**26 // (2 * hidden * dtype.itemsize)) + 1
    x, residual = (torch.randn(rows, hidden, device=gpu).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=gpu).to(dtype)
    for options in ({}, {"cast_before_weight": False}, {"weight_offset": 1.0}):
        out = rmsnorm(x, weight, EPS, **options)
        normed, total = add_rmsnorm(x, residual, weight, EPS, **options)
        assert same_bytes(total, x + residual)
        for few in (slice(rows - 33, rows), *(slice(at, at + 200) for at in range(0, rows - 33, rows // 4))):
            assert same_bytes(rmsnorm(x[few], weight, EPS, **options), out[few])
            assert same_bytes(add_rmsnorm(x[few], residual[few], weight, EPS, **options)[0], normed[few])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("cast_before_weight", [True, False])
def test_equals_eager_where_sums_are_exact(
    guard: Guard, dtype: torch.dtype, offset: float, cast_before_weight: bool
) -> None:
    """HuggingFace's LlamaRMSNorm, GptOssRMSNorm and GemmaRMSNorm, to the bit: sums of small integers do not round."""
    for hidden in (64, 896, 4096, 8192):
        x = guard.place(torch.randint(-8, 9, (40, hidden)).to(dtype))
        weight = guard.randn(hidden, dtype=dtype)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
        scale = weight.float() + offset
        expected = (normed.to(dtype).float() if cast_before_weight else normed) * scale
        out = rmsnorm(x, weight, EPS, weight_offset=offset, cast_before_weight=cast_before_weight)
        assert float((out.double() - expected.to(dtype).double()).abs().max()) == 0.0, hidden


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_stays_in_its_row(guard: Guard, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 128).to(dtype), guard.randn(128, dtype=dtype)
    clean = rmsnorm(guard.place(x), weight, EPS)
    x[2, 77] = float("nan")
    out = rmsnorm(guard.place(x), weight, EPS)
    assert bool(out[2].isnan().all())
    assert same_bytes(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    x = guard.randn(3, 64, dtype=dtype)
    for weight_dtype, weight_offset, cast in itertools.product({dtype, torch.float32}, (0.0, 1.0), (True, False)):
        weight = guard.randn(64, dtype=weight_dtype)
        options = {"weight_offset": weight_offset, "cast_before_weight": cast}
        opcheck(torch.ops.gqa_kernels.rmsnorm.default, (x, weight, EPS), options)
        opcheck(torch.ops.gqa_kernels.add_rmsnorm.default, (x, x, weight, EPS), options)


def test_p17_compile(guard: Guard) -> None:
    x, weight = guard.randn(3, 64), guard.randn(64)
    assert_compiles(lambda x, w: rmsnorm(x, w, EPS), x, weight)
    assert_compiles(lambda x, w: add_rmsnorm(x, x, w, EPS), x, weight)
