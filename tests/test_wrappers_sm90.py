"""Each wrapper of tensor maps, warpgroup products and mbarriers, alone."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.wrappers import DTYPES, every_half, fixtures, integers, pointer
from torch import Tensor

NAN = float("nan")


built, wrappers = fixtures("wrappers_sm90")


def test_they_build(built: Path) -> None:
    assert built.exists()


def swizzled(panel: Tensor) -> Tensor:
    """Rows of 64 or 128 bytes; a 16-byte piece moves by the row's number within the swizzle's 4 or 8 lines."""
    rows, columns = panel.shape
    row = torch.arange(rows)[:, None]
    piece = torch.arange(columns // 8)[None]
    there = piece ^ (row % 8 if columns == 64 else row // 2 % 4)
    pieces = panel.view(torch.int16).reshape(rows, columns // 8, 8)
    out = torch.empty_like(pieces)
    out[row.expand_as(there), there] = pieces
    return out.reshape(rows, columns)


@every_half
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 3, 2, 32), (0, 40, 1, 64), (1, 60, 0, 96), (1, 0, 1, 128)])
def test_copy_panel(
    wrappers: ctypes.CDLL, dtype: torch.dtype, columns: int, at: tuple[int, int, int, int], nan: bool
) -> None:
    """A panel of a strided tensor, swizzled. Past the last token and column zeros or NaN; nothing is read there."""
    batch, tokens, heads, width, rows = 2, 50, 3, 104, 24
    wide = torch.full((batch, tokens + 7, heads, width + 8), 7.0 if nan else NAN, dtype=dtype)
    wide[:, :tokens, :, :width] = torch.randn(batch, tokens, heads, width).to(dtype)
    placed = wide.cuda()
    b, token, head, column = at
    inside = wide[b, token : min(tokens, token + rows), head, column : min(width, column + columns)]
    expected = torch.full((rows, columns), NAN if nan else 0.0, dtype=dtype)
    expected[: inside.shape[0], : inside.shape[1]] = inside
    out = torch.full((2 * rows * columns,), 0xA5, dtype=torch.uint8, device="cuda")
    size = (ctypes.c_int64 * 4)(batch, tokens, heads, width)
    stride = (ctypes.c_int64 * 3)(*placed.stride()[:3])
    where = (ctypes.c_int * 4)(*at)
    rc = wrappers.test_dump_panel(DTYPES[dtype], pointer(placed), size, stride, rows, columns, nan, where, pointer(out))
    assert rc == 0
    copied, expected = out.cpu().view(dtype).reshape(rows, columns), swizzled(expected).view(dtype)
    assert torch.equal(copied.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))


def check_wgmma(wrappers: ctypes.CDLL, scores: bool, cols: int, swizzle: int, a: Tensor, b: Tensor) -> None:
    out = torch.full((64, cols), float("nan"), device="cuda")
    rc = wrappers.test_wgmma(scores, DTYPES[a.dtype], cols, swizzle, pointer(a), pointer(b), pointer(out))
    assert rc == 0
    expected = a.double() @ b.double().T if scores else a.double() @ b.double() + 1
    assert torch.equal(out.double(), expected)


@every_half
@pytest.mark.parametrize(
    "cols, swizzle",
    [(cols, 128) for cols in (64, 80, 128, 160)] + [(cols, 64) for cols in (96, 128)],
)
def test_wgmma_scores(wrappers: ctypes.CDLL, dtype: torch.dtype, cols: int, swizzle: int) -> None:
    """Both operands in shared memory, each swizzle, over both of two panels."""
    a, b = (integers(rows, swizzle, dtype=dtype) for rows in (64, cols))
    check_wgmma(wrappers, True, cols, swizzle, a, b)


@every_half
@pytest.mark.parametrize("cols, swizzle", [(64, 128), (128, 128), (256, 128), (96, 64)])
def test_wgmma_weighs(wrappers: ctypes.CDLL, dtype: torch.dtype, cols: int, swizzle: int) -> None:
    """Weights in registers; one descriptor spans the panels of the values. Added to what was there."""
    a, b = integers(64, 48, dtype=dtype), integers(48, cols, dtype=dtype)
    check_wgmma(wrappers, False, cols, swizzle, a, b)


def test_mbarrier_phases(wrappers: ctypes.CDLL) -> None:
    count = 200
    out = torch.full((count + 2,), -1, dtype=torch.int32, device="cuda")
    assert wrappers.test_hand_over(count, pointer(out)) == 0
    assert out[:count].tolist() == [3 * i + 1 for i in range(count)]
    assert out[count].item() == 1, "parity 1 passes on a fresh barrier, parity 0 does not"
    assert out[count + 1].item() == 1, "a phase ends when arrivals and bytes have both come"


@every_half
def test_mma_fragments(wrappers: ctypes.CDLL, dtype: torch.dtype) -> None:
    a, b = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype)
    out = torch.full((16, 8), float("nan"), device="cuda")
    assert wrappers.test_multiply(DTYPES[dtype], pointer(a), pointer(b), pointer(out)) == 0
    assert torch.equal(out.double(), a.double() @ b.double())
