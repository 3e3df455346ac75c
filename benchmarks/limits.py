"""What the machine can do, measured in the same run: reading bytes, copying bytes, multiplying matrices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks.timing import Settings, call_us, kernel_us

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MARK = 0x5EED1E5  # hardly ever in the data

if triton is not None:

    @triton.jit
    def _read_kernel(data, out, count, BLOCK: tl.constexpr, MARK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Loads every element; a store that practically never happens keeps the loads alive."""
        lane = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * BLOCK + lane
        value = tl.load(data + at, mask=at < count, other=0)
        tl.store(out + lane, value, mask=value == MARK)

    @triton.jit
    def _copy_kernel(data, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(data + at, mask=at < count, other=0), mask=at < count)


READ_BLOCKS = (1024, 2048, 4096, 8192)  # elements of 4 bytes per block of 4 warps; the fastest counts
COPY_BLOCKS = (512, 1024, 2048)  # the same


def reader_name(settings: Settings) -> str:
    return "a triton kernel that only reads" if settings.cuda and triton is not None else "torch.sum"


@cache
def read_us(size: int, settings: Settings, most_copies: int = 1024) -> float:
    """The read floor: microseconds to read ``size`` bytes, cold on CUDA."""
    count = max(16, -(-size // 64) * 16)
    buffers = _buffers(count, settings.copies(4 * count, most_copies), settings)
    if not settings.cuda:
        return call_us(lambda data: data.sum(), buffers[0].view(torch.float32), settings)
    if triton is None:
        return kernel_us(lambda data: data.view(torch.float32).sum(), buffers, settings)
    out = torch.empty(max(READ_BLOCKS), dtype=torch.int32, device=settings.device)

    def read(block: int) -> float:
        def run(data: Tensor) -> None:
            _read_kernel[(-(-count // block),)](data, out, count, BLOCK=block, MARK=MARK, num_warps=4)

        return kernel_us(run, buffers, settings)

    return min(read(block) for block in READ_BLOCKS)


@cache
def copy_us(size: int, settings: Settings, most_copies: int = 1024) -> float:
    """Microseconds of a plain copy that moves ``size`` bytes in all: half of them read, half of them written. On CUDA
    the faster of torch's, which slows down by a half at sizes like 6553 x 5120 x 2 bytes, and a triton kernel."""
    count = max(16, -(-size // 128) * 16)
    copies = settings.copies(8 * count, most_copies)
    sources, targets = _buffers(count, copies, settings), _buffers(count, copies, settings)
    pairs = list(zip(targets, sources))
    if not settings.cuda:
        return call_us(lambda pair: pair[0].copy_(pair[1]), pairs[0], settings)
    found = [kernel_us(lambda pair: pair[0].copy_(pair[1]), pairs, settings)]
    for block in COPY_BLOCKS if triton is not None else ():

        def copy(pair: tuple[Tensor, Tensor], block: int = block) -> None:
            _copy_kernel[(-(-count // block),)](pair[1], pair[0], count, BLOCK=block, num_warps=4)

        found.append(kernel_us(copy, pairs, settings))
    return min(found)


@cache
def matmul_flops(settings: Settings) -> float:
    """FLOP/s of a large matrix product: bfloat16 on CUDA, float32 on the CPU."""
    size, dtype = (8192, torch.bfloat16) if settings.cuda else (768, torch.float32)
    pair = torch.randn(size, size, device=settings.device).to(dtype), torch.randn(size, size, device=settings.device)
    a, b = pair[0], pair[1].to(dtype)
    us = kernel_us(lambda _: a @ b, [None], settings) if settings.cuda else call_us(lambda _: a @ b, None, settings)
    return 2.0 * size**3 / us * 1e6


def _buffers(count: int, copies: int, settings: Settings) -> list[Tensor]:
    """Random float32 bits: power, and with it speed, depends on the data."""
    return list(torch.randn(copies, count, device=settings.device).view(torch.int32).unbind())
