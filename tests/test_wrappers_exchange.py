"""Each wrapper by which threads, blocks of a cluster and kernels hand over to each other, alone."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.wrappers import fixtures, pointer
from torch import Tensor

BLOCKS = 8  # of a cluster


built, wrappers = fixtures("wrappers_exchange")


def test_they_build(built: Path) -> None:
    assert built.exists()


def ints(*shape: int, value: int = -1) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device="cuda")


def test_push(wrappers: ctypes.CDLL) -> None:
    """Every form of push, from each block of a cluster to each: the bytes arrive where they are meant to, and only
    there, before the wait for them ends."""
    count = 5
    received, names = ints(count, BLOCKS, BLOCKS, 16), ints(count, BLOCKS, 3)
    assert wrappers.test_exchange(count, pointer(received), pointer(names)) == 0
    receiver, sender = torch.arange(BLOCKS)[:, None, None], torch.arange(BLOCKS)[None, :, None]
    expected = (1000 * sender + 100 * receiver + torch.arange(16)).int()
    expected[..., 15] = 0xDEADBEEF - (1 << 32)  # nobody's
    assert torch.equal(received.cpu(), expected.expand(count, -1, -1, -1))
    assert names[..., 0].tolist() == [list(range(BLOCKS))] * count
    assert (names[..., 1] == BLOCKS).all()
    assert names[..., 2].tolist() == [[i] * BLOCKS for i in range(count)]


def test_cluster_barrier(wrappers: ctypes.CDLL) -> None:
    rounds = 64
    board, out = ints(BLOCKS), ints(BLOCKS, 64)
    assert wrappers.test_cluster_barrier(rounds, pointer(board), pointer(out)) == 0
    assert (out == rounds * BLOCKS).all(), "a write before the barrier was not seen behind it"


def test_async_copies(wrappers: ctypes.CDLL) -> None:
    """Groups are waited for in order; unwanted copies write zeros and read nothing, at an address of nobody's."""
    source = torch.randint(-(2**31), 2**31, (3, 32, 4), dtype=torch.int32, device="cuda")
    first, everything, stored = ints(32, 4), ints(3, 32, 4), ints(32, 4)
    assert wrappers.test_copies(pointer(source), pointer(first), pointer(everything), pointer(stored)) == 0
    expected = source * (torch.arange(32, device="cuda") % 2 == 0)[None, :, None]
    assert torch.equal(everything, expected.int())
    assert torch.equal(first, expected[0].int())
    assert torch.equal(stored.cpu(), (31 - torch.arange(32))[:, None].int() + torch.arange(0, 400, 100).int())


@pytest.mark.parametrize("last", [16, 12, 0])
def test_stage_of_weights(wrappers: ctypes.CDLL, last: int) -> None:
    """Rows of 128 bytes, in pieces that move by row: as they were where load_matrices reads them."""
    source = torch.randint(-(2**31), 2**31, (32, 32), dtype=torch.int32, device="cuda")
    out = ints(32, 32)
    assert wrappers.test_ring_stage(pointer(source), last, pointer(out)) == 0
    expected = source.clone()
    expected[31].view(8, 4)[:, last // 4 :] = 0
    assert torch.equal(out, expected)


def test_programmatic_launch(wrappers: ctypes.CDLL) -> None:
    """The next kernel starts while the one before runs, and, behind its wait, sees all that one wrote."""
    started, handed, seen = ints(1, value=0), ints(2), ints(1)
    torch.cuda.synchronize()
    assert wrappers.test_programmatic(pointer(started), pointer(handed), pointer(seen)) == 0
    assert handed.tolist() == [42, 1], "the second kernel did not start before the first had ended"
    assert seen.item() == 42
