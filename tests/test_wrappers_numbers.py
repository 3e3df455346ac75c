"""Each wrapper that compares, widens, narrows, transposes or multiplies numbers, alone and over all of its inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.wrappers import DTYPES, every_half, fixtures, integers, pointer
from torch import Tensor

STORED = {torch.float8_e4m3fn: 5, torch.int8: 6}
every_stored = pytest.mark.parametrize("stored", STORED)


built, wrappers = fixtures("wrappers_numbers")


def test_they_build(built: Path) -> None:
    assert built.exists()


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@every_half
def test_pairs(wrappers: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every number beside another one, NaN and infinities too: a NaN loses, or wins, or shows."""
    patterns = torch.arange(1 << 16).to(torch.int16)
    a = torch.stack([patterns, patterns[torch.randperm(1 << 16)]], dim=1).contiguous()
    b = a[torch.randperm(1 << 16)].contiguous()
    out = torch.empty(4, 1 << 16, 2, dtype=torch.int16, device="cuda")
    a_cuda, b_cuda = a.cuda(), b.cuda()
    assert wrappers.test_compare(DTYPES[dtype], 1 << 16, pointer(a_cuda), pointer(b_cuda), pointer(out)) == 0
    x, y, found = a.view(dtype).float(), b.view(dtype).float(), out.cpu().view(dtype).float()

    def beside_nan(pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # torch.fmax gives NaN for a signalling one
        return torch.where(x.isnan(), y, torch.where(y.isnan(), x, pick(x, y)))

    larger, smaller = beside_nan(torch.maximum), beside_nan(torch.minimum)
    for i, expected in enumerate((larger, torch.maximum(x, y), smaller)):
        assert_equal(found[i], expected)
    assert torch.equal(out[3].cpu() == -1, ~x.isfinite())
    assert torch.equal(out[3].cpu() == 0, x.isfinite())


def test_functions(wrappers: ctypes.CDLL) -> None:
    """2^x and tanh x against float64, as near as their comments say; 2^-inf is 0 and NaN stays NaN."""
    inf, nan = float("inf"), float("nan")
    ends = torch.tensor([0.0, -0.0, 1.0, 1e-30, -1e-30, inf, -inf, nan, -126.0, -200.0, 127.0])
    x = torch.cat([ends, torch.linspace(-125.9, 127.9, 100_001), torch.randn(100_000) * 4, torch.randn(10_000) / 1000])
    out, x_cuda = torch.full((2, len(x)), nan, device="cuda"), x.cuda()
    assert wrappers.test_functions(len(x), pointer(x_cuda), pointer(out)) == 0
    power, tangent = out.cpu().double()
    assert_equal(power.isinf(), x == inf)
    assert power[6] == 0 and power[9] == 0
    assert torch.equal(power.isnan(), x.isnan()) and torch.equal(tangent.isnan(), x.isnan())
    normal = x.isfinite() & (x >= -126)
    exact = torch.exp2(x.double())
    assert ((power - exact)[normal].abs() <= 2**-22 * exact[normal]).all()
    number = ~x.isnan()
    exact = torch.tanh(x.double())
    assert ((tangent - exact)[number].abs() <= 2**-10.9 * exact[number].abs()).all()


@every_half
@every_stored
def test_widen(wrappers: ctypes.CDLL, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Every stored number becomes that very number: where caches are copied, and where weights are streamed."""
    out = torch.empty(2, 256, dtype=dtype, device="cuda")
    assert wrappers.test_widen(DTYPES[dtype], STORED[stored], pointer(out)) == 0
    expected = torch.arange(256).to(torch.uint8).view(stored).float()
    assert_equal(out[0].cpu().float(), expected)
    if stored != torch.int8:
        assert_equal(out[1].cpu().float(), expected)


def quantized(x: Tensor, stored: torch.dtype, scale: float) -> Tensor:
    """The nearest stored number, of two the even one; the largest beyond it; NaN is the positive one, or 0."""
    x = x / torch.tensor(scale)
    if stored == torch.int8:
        return x.nan_to_num(nan=0.0).round().clamp(-127, 127).to(torch.int8)
    return torch.where(x.isnan(), float("nan"), x.clamp(-448, 448)).to(stored)


@every_stored
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_store_and_load(wrappers: ctypes.CDLL, stored: torch.dtype, offset: int, scale: float) -> None:
    """Whole chunks at any address, nothing beside them; every float16, which has all halfway cases, and more."""
    halves = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
    x = torch.cat([halves, halves * scale, torch.randn(1 << 12) * 100])
    to = torch.full((len(x) + 32,), 0xA5, dtype=torch.uint8, device="cuda")
    back = torch.empty(len(x), dtype=torch.float16, device="cuda")
    given, rate = x.cuda(), ctypes.c_float(scale)
    where = pointer(given), pointer(to), pointer(back)
    assert wrappers.test_store(STORED[stored], len(x) // 8, offset, rate, *where) == 0
    expected = quantized(x, stored, scale)
    written = to.cpu()
    assert torch.equal(written[offset : offset + len(x)], expected.view(torch.uint8))
    assert (written[:offset] == 0xA5).all() and (written[offset + len(x) :] == 0xA5).all()
    assert_equal(back.cpu().float(), expected.float())


def test_transpose(wrappers: ctypes.CDLL) -> None:
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8).cuda()
    out = torch.empty_like(matrix)
    assert wrappers.test_transpose(pointer(matrix), pointer(out)) == 0
    assert torch.equal(out, matrix.T)


@every_stored
def test_products_of_stored_tiles(wrappers: ctypes.CDLL, stored: torch.dtype) -> None:
    """Keys and values as they are stored, out of a tile of a decode block, times queries and weights: exactly."""
    whole = torch.randint(-128, 128, (2, 16, 64)) if stored == torch.int8 else torch.randint(-16, 17, (2, 16, 64))
    keys, values = whole.to(stored).cuda()
    q, weights = (integers(8, columns, dtype=torch.float16) for columns in (64, 16))
    scores, sums = (torch.full((rows, 8), float("nan"), device="cuda") for rows in (16, 64))
    tensors = [pointer(x) for x in (keys, values, q, weights, scores, sums)]
    assert wrappers.test_quantized_products(stored == torch.int8, *tensors) == 0
    keys, values, q, weights = (x.double() for x in (keys, values, q, weights))
    assert torch.equal(scores.double(), keys @ q.T)
    assert torch.equal(sums.double(), values.T @ weights.T)
