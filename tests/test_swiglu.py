"""swiglu against float64 NumPy, torch's silu, transformers' LlamaMLP and its contract with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles, opcheck
from support.guard import Guard, same_bytes
from torch import Tensor
from torch.nn.functional import silu

from gqa_kernels import swiglu

op = torch.ops.gqa_kernels.swiglu.default


def reference(gate: Tensor, up: Tensor) -> np.ndarray:
    x = to_numpy(gate)
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x)) * to_numpy(up)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3, 7, 8, 33, 64, 100, 1001, 4864, 8192, 14336, 20001])
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    for rows in (1, 5):
        gate, up = guard.randn(rows, hidden, dtype=dtype, scale=3), guard.randn(rows, hidden, dtype=dtype)
        out = swiglu(gate, up)
        assert_within_bound(out, reference(gate, up), silu(gate) * up)
        assert same_bytes(swiglu(guard.place(torch.cat([gate, up], -1).cpu())), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_p1_magnitudes(guard: Guard, dtype: torch.dtype, scale: float) -> None:
    gate, up = guard.randn(16, 512, dtype=dtype, scale=scale), guard.randn(16, 512, dtype=dtype, scale=0.25)
    assert_within_bound(swiglu(gate, up), reference(gate, up), silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_p1_every_half_agrees_with_torch(guard: Guard, dtype: torch.dtype) -> None:
    """All 65,536 gates: NaN where torch has it, else at most one unit in the last place apart and nearly all equal."""
    gate = guard.place(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype))
    out, expected = swiglu(gate, torch.ones_like(gate)), silu(gate)
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    ulps = (out.view(torch.int16).int() - expected.view(torch.int16).int()).abs()[number]
    assert int(ulps.max()) <= 1
    assert int((ulps != 0).sum()) <= 65


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_where_the_gate_is_exact(guard: Guard, dtype: torch.dtype) -> None:
    """silu(0) is 0, and where exp(-x) is far below or above 1 silu is x or -0: the product then is exact."""
    up = guard.randn(64, dtype=dtype)
    for gate, factor in ((0.0, 0.0), (50.0, 50.0), (-200.0, -0.0)):
        assert same_bytes(swiglu(torch.full_like(up, gate), up), torch.full_like(up, factor) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_llama_mlp(guard: Guard, dtype: torch.dtype) -> None:
    activations = pytest.importorskip("transformers.activations")
    gate, up = guard.randn(17, 344, dtype=dtype), guard.randn(17, 344, dtype=dtype)
    expected, actual = activations.ACT2FN["silu"](gate) * up, swiglu(gate, up)
    ulp = torch.finfo(dtype).eps * expected.double().abs()
    assert bool(((actual.double() - expected.double()).abs() <= 2.01 * ulp).all())
    if dtype != torch.float32:
        assert float((actual != expected).double().mean()) <= 0.001


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_and_infinity_stay_in_place(guard: Guard, dtype: torch.dtype) -> None:
    gate, up = torch.randn(5, 128).to(dtype), torch.randn(5, 128).to(dtype)
    clean = swiglu(guard.place(gate), guard.place(up))
    gate[1, 3], up[2, 77], gate[3, 5], gate[4, 6] = float("nan"), float("nan"), float("inf"), -float("inf")
    out, expected = swiglu(guard.place(gate), guard.place(up)), silu(gate) * up
    special = ~expected.isfinite()
    np.testing.assert_array_equal(to_numpy(out)[special.numpy()], to_numpy(expected)[special.numpy()])
    assert int(special.sum()) == 4
    assert same_bytes(out[~special], clean[~special])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for shape in [(0, 64), (3, 0), (2, 0, 4)]:
        x = guard.randn(*shape, dtype=dtype)
        assert swiglu(x, x).shape == shape
        assert swiglu(x).shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [5, 64])
def test_p2_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype, hidden: int) -> None:
    gate, up = torch.randn(4, 6, 5, hidden).to(dtype), guard.randn(4, 6, 5, hidden, dtype=dtype)
    expected = swiglu(guard.place(gate), up)
    poison = torch.full_like(gate, float("nan"))  # P2: what lies between the strides is never read
    views = {
        "transposed": guard.place(gate.transpose(0, 2)).transpose(0, 2),
        "sliced": guard.place(torch.cat([gate, poison], -1))[..., :hidden],
        "second half": guard.place(torch.cat([poison, gate], -1))[..., hidden:],
        "rows left out": guard.place(torch.cat([gate, poison], 1))[:, :6],
        "misaligned": guard.place(gate, offset=1),
        "last dimension strided": guard.place(gate.transpose(-1, -2)).transpose(-1, -2),
        "three strides": guard.place(gate.permute(1, 2, 0, 3)).permute(2, 0, 1, 3),
    }
    for name, view in views.items():
        assert same_bytes(swiglu(view, up), expected), name
    expanded = guard.place(gate[:1]).expand(4, 6, 5, hidden)
    assert same_bytes(swiglu(expanded, up)[0], expected[0])
    both = torch.cat([gate, up.cpu()], -1)
    for view in (guard.place(both, offset=1), guard.place(both.transpose(0, 1)).transpose(0, 1)):
        assert same_bytes(swiglu(view), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_p11_every_alignment(guard: Guard, dtype: torch.dtype, multiple: int) -> None:
    """Rows that begin at multiples of so many elements: each width of access, wide and narrow rows, two levels."""
    for hidden in (3, 40, 777, 5000):
        gate, up = torch.randn(6, hidden).to(dtype), guard.randn(6, hidden, dtype=dtype)
        expected = swiglu(guard.place(gate), up)
        wide = torch.zeros(6, (hidden + 63) // 8 * 8 + multiple, dtype=dtype)
        wide[:, multiple : multiple + hidden] = gate
        view = guard.place(wide)[:, multiple : multiple + hidden]
        assert same_bytes(swiglu(view, up), expected)
        pairs, others = (x.unflatten(0, (3, 2)).transpose(0, 1) for x in (view, up))
        assert same_bytes(swiglu(pairs, others)[1], expected[1::2])


def test_more_rows_than_a_grid_has_places(guard: Guard) -> None:
    gate, up = (guard.randn(70001, 3, 8, dtype=torch.bfloat16)[:, :2] for _ in range(2))
    assert same_bytes(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_more_wide_rows_than_a_grid_has_places(gpu: str) -> None:
    both = torch.randn(140001, 2 * 1024, device=gpu, dtype=torch.bfloat16)
    gate, up = both[:, :1024], both[:, 1024:]
    assert same_bytes(swiglu(both), swiglu(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    gate, up = guard.randn(3, 64, dtype=dtype), guard.randn(3, 64, dtype=dtype)
    for args in ((gate, up), (gate, None), (gate[:, ::2], up[:, :32])):
        opcheck(op, args)


@pytest.mark.abi
def test_p17_compile(guard: Guard) -> None:
    gate, up = guard.randn(3, 64), guard.randn(3, 64)
    assert_compiles(swiglu, gate, up)
    assert_compiles(swiglu, gate)


def test_p19_p20_misuse(device: str) -> None:
    x = torch.randn(3, 64, device=device)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x.double(), x), "gate must be float32, float16 or bfloat16, got float64"),
        ((x.int(),), "gate must be float32, float16 or bfloat16, got int32"),
        ((x, x[:, :32]), "up must have the shape of gate [3, 64], got [3, 32]"),
        ((x, x[0]), "up must have the shape of gate [3, 64], got [64]"),
        ((x, x.half()), "up must have the dtype of gate (float32), got float16"),
        ((x[:, :63],), "gate must be [..., 2 * hidden], gate and up side by side, where up is None; got shape [3, 63]"),
        ((x[0, 0],), "gate must be [..., 2 * hidden], gate and up side by side, where up is None; got shape []"),
        ((x[0, 0], x[0, 0]), "gate must be [..., hidden], got shape []"),
        ((x, x.clone().requires_grad_()), "up must not require grad, got requires_grad=True"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError) as error:
            swiglu(*args)
        assert str(error.value).startswith(f"swiglu: {message}"), error.value


def test_p19_device_mismatch(gpu: str) -> None:
    with pytest.raises(RuntimeError, match="swiglu: up must be on the device of gate"):
        swiglu(torch.randn(3, 4, device=gpu), torch.randn(3, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_torch(gpu: str, dtype: torch.dtype) -> None:
    """The same expf, division and roundings as torch's own kernels."""
    gate, up = (torch.randn(512, 14336, device=gpu).mul_(4).to(dtype) for _ in range(2))
    assert torch.equal(swiglu(gate, up), silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_equals_torch_for_every_gate(gpu: str, dtype: torch.dtype) -> None:
    gate = torch.arange(-(2**15), 2**15, device=gpu).to(torch.int16).view(dtype)
    got, want = swiglu(gate, torch.ones_like(gate)), silu(gate)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


def test_p7_above_2_31_elements(gpu: str) -> None:
    rows, hidden = 2**31 // 4096 + 3, 4096
    x = torch.empty(rows, hidden, device=gpu, dtype=torch.bfloat16).normal_()
    some = torch.tensor([0, 1, rows // 2, rows - 4, rows - 3, rows - 2, rows - 1], device=gpu)
    assert same_bytes(swiglu(x, x)[some], swiglu(x[some], x[some]))
    assert same_bytes(swiglu(x)[some], swiglu(x[some]))
    wide = x.flatten().as_strided((3, 64), (2**30, 1))
    assert same_bytes(swiglu(wide), swiglu(wide.contiguous()))
