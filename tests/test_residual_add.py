"""residual_add is torch's addition to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bounds import DTYPES
from support.contract import assert_compiles, opcheck
from support.guard import Guard, same_bytes

from gqa_kernels import residual_add

op = torch.ops.gqa_kernels.residual_add.default


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3, 7, 8, 33, 64, 100, 1001, 4096, 8193, 20001])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_p1_exact(guard: Guard, dtype: torch.dtype, hidden: int, scale: float) -> None:
    for rows in (1, 5):
        x, residual = guard.randn(rows, hidden, dtype=dtype, scale=scale), guard.randn(rows, hidden, dtype=dtype)
        assert same_bytes(residual_add(x, residual), x + residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_p1_every_half_is_exact(guard: Guard, dtype: torch.dtype) -> None:
    """All 65,536 values plus a few others: sums that overflow, cancel, and fall into the denormals."""
    x = guard.place(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype))
    for value in (0.0, -0.0, 1.0, -1e-6, 60000.0, float("inf")):
        residual = torch.full_like(x, value)
        out, expected = residual_add(x, residual), x + residual
        number = ~expected.isnan()
        assert torch.equal(out.isnan(), expected.isnan()) and same_bytes(out[number], expected[number])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_stays_in_place(guard: Guard, dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 128).to(dtype), guard.randn(5, 128, dtype=dtype)
    clean = residual_add(guard.place(x), residual)
    x[2, 77] = float("nan")
    out = residual_add(guard.place(x), residual)
    assert torch.equal(out.isnan().cpu(), x.isnan())
    assert same_bytes(out[~x.isnan()], clean[~x.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for shape in [(0, 64), (3, 0), (0,)]:
        x = guard.randn(*shape, dtype=dtype)
        assert residual_add(x, x).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [5, 64])
def test_p2_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    x, residual = torch.randn(4, 6, 5, hidden).to(dtype), guard.randn(4, 6, 5, hidden, dtype=dtype)
    expected = x.to(guard.device) + residual
    poison = torch.full_like(x, float("nan"))  # P2: what lies between the strides is never read
    views = {
        "transposed": guard.place(x.transpose(0, 2)).transpose(0, 2),
        "sliced": guard.place(torch.cat([x, poison], -1))[..., :hidden],
        "rows left out": guard.place(torch.cat([x, poison], 1))[:, :6],
        "misaligned": guard.place(x, offset=1),
        "last dimension strided": guard.place(x.transpose(-1, -2)).transpose(-1, -2),
        "three strides": guard.place(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3),
    }
    for name, view in views.items():
        assert same_bytes(residual_add(view, residual), expected), name
        assert same_bytes(residual_add(residual, view), expected), name
    expanded = guard.place(x[:1]).expand(4, 6, 5, hidden)
    assert same_bytes(residual_add(expanded, residual), expanded + residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    x, residual = guard.randn(3, 64, dtype=dtype), guard.randn(3, 64, dtype=dtype)
    for args in ((x, residual), (x.T, residual.T)):
        opcheck(op, args)


@pytest.mark.abi
def test_p17_compile(guard: Guard) -> None:
    assert_compiles(residual_add, guard.randn(3, 64), guard.randn(3, 64))


def test_p19_p20_misuse(device: str) -> None:
    x = torch.randn(3, 64, device=device)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x.double(), x), "x must be float32, float16 or bfloat16, got float64"),
        ((x, x[:1]), "residual must have the shape of x [3, 64], got [1, 64]"),
        ((x, x.half()), "residual must have the dtype of x (float32), got float16"),
        ((x[0, 0], x[0, 0]), "x must be [..., hidden], got shape []"),
        ((x, x.clone().requires_grad_()), "residual must not require grad, got requires_grad=True"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError) as error:
            residual_add(*args)
        assert str(error.value).startswith(f"residual_add: {message}"), error.value


def test_p19_device_mismatch(gpu: str) -> None:
    with pytest.raises(RuntimeError, match="residual_add: residual must be on the device of x"):
        residual_add(torch.randn(3, 4, device=gpu), torch.randn(3, 4))


def test_p7_above_2_31_elements(gpu: str) -> None:
    rows, hidden = 2**31 // 4096 + 3, 4096
    x = torch.empty(rows, hidden, device=gpu, dtype=torch.bfloat16).normal_()
    some = torch.tensor([0, 1, rows // 2, rows - 4, rows - 3, rows - 2, rows - 1], device=gpu)
    assert same_bytes(residual_add(x, x)[some], (x[some] + x[some]))
    wide = x.flatten().as_strided((3, 64), (2**30, 1))
    assert same_bytes(residual_add(wide, wide), wide + wide)
