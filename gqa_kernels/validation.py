"""``with validation():`` reads lengths, page ids and positions on the host before each call and raises with the index.

Outside of it nothing is read: a bad value on the device makes its row NaN (or drops its write) without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor

_lock = threading.Lock()
_open = 0  # contexts open in any thread: the one thing a call looks at while there is none
_here: ContextVar[bool] = ContextVar("gqa_kernels_validation", default=False)


@contextmanager
def validation() -> Iterator[None]:
    """Checks device metadata on the host, for the calls of this thread (or task) inside the block.

    Each attention, append and rope call then copies its lengths, offsets, page ids and positions to the host and raises
    RuntimeError naming argument, index and value where one is out of range. This synchronises: for debugging, not for
    serving. Compiled code is not checked.
    """
    global _open
    token = _here.set(True)
    with _lock:
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
        _here.reset(token)


def validating() -> bool:
    """True inside :func:`validation`."""
    return _open > 0 and not torch.compiler.is_compiling() and _here.get()


def _ints(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.reshape(-1).tolist()
    return values


def _fail(op: str, name: str, wanted: str, value: int) -> None:
    raise RuntimeError(f"{op}: {name} must be {wanted}, got {value}")


def validate_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, total: int, longest: int | None) -> list[int]:
    """Offsets that start at 0, never decrease, end within ``total`` rows. Returns the lengths."""
    offsets = _ints(cu_seqlens)
    if offsets[0] != 0:
        _fail(op, f"{name}[0]", "0", offsets[0])
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            _fail(op, f"{name}[{i}]", f"at least {name}[{i - 1}] = {offsets[i - 1]}", offsets[i])
        if offsets[i] > total:
            _fail(op, f"{name}[{i}]", f"at most the number of tokens {total}", offsets[i])
        if longest is not None and offsets[i] - offsets[i - 1] > longest:
            length = offsets[i] - offsets[i - 1]
            _fail(op, f"{name}[{i}] - {name}[{i - 1}]", f"at most the maximum length {longest}", length)
    return [end - start for start, end in pairwise(offsets)]


def validate_cache_seqlens(op: str, cache_seqlens: Tensor, new: list[int], capacity: int) -> list[int]:
    """Lengths from 0 to the capacity less the new tokens. Returns one length a sequence."""
    lengths = _ints(cache_seqlens)
    if cache_seqlens.dim() == 0:
        lengths = lengths * len(new)
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity - new[b]:
            name = f"cache_seqlens[{b}]" if cache_seqlens.dim() else "cache_seqlens"
            wanted = f"from 0 to {capacity - new[b]} ({capacity} rows, {new[b]} new)"
            _fail(op, name, wanted, length)
    return lengths


def validate_block_table(op: str, block_table: Tensor, keys: list[int], num_pages: int, page_size: int) -> None:
    """Page ids of the pages that ``keys`` rows reach; entries beyond are never read and may hold anything."""
    for b, pages in enumerate(block_table.tolist()):
        for i in range(-(-keys[b] // page_size)):
            if not 0 <= pages[i] < num_pages:
                _fail(op, f"block_table[{b}, {i}]", f"a page from 0 to {num_pages - 1}", pages[i])


def validate_leftpad(op: str, cache_leftpad: Tensor) -> list[int]:
    leftpad = _ints(cache_leftpad)
    for b, value in enumerate(leftpad):
        if value < 0:
            _fail(op, f"cache_leftpad[{b}]", "0 or more", value)
    return leftpad


def validate_positions(op: str, name: str, positions: Tensor, num_positions: int) -> None:
    """Explicit positions within the rotary table."""
    outside = ((positions < 0) | (positions >= num_positions)).nonzero()
    if outside.numel():
        index = outside[0].tolist()
        where = ", ".join(map(str, index))
        _fail(op, f"{name}[{where}]", f"from 0 to {num_positions - 1}", int(positions[tuple(index)]))


def validate_last_position(op: str, name: str, last: int, num_positions: int) -> None:
    """The largest default position within the rotary table."""
    if last >= num_positions:
        raise RuntimeError(f"{op}: {name} must have a row for position {last}, got {num_positions} rows")
