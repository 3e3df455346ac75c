"""A KV cache of pages: rows take pages from one pool as they grow, and forks share them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gqa_kernels.kv_cache import BaseCache, Scale, movable, to_device


class _PagePool:
    """Which pages are free, and how many rows hold each of the others."""

    def __init__(self, num_pages: int) -> None:
        self.holders = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))

    def take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        self.holders[page] += 1

    def drop(self, page: int) -> None:
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.free.append(page)


def _drop_all(pool: _PagePool, tables: list[list[int]]) -> None:
    for table in tables:
        for page in table:
            pool.drop(page)
        table.clear()


class PagedKVCache(BaseCache):
    """A cache whose rows are lists of pages ``[page_size, num_kv_heads, head_dim]`` out of one pool.

    Rows take pages as they grow and give them back when cropped, reset or gone. ``fork`` shares pages; a shared page
    is copied when one of its holders is about to write to it.

    Args:
        batch, num_layers, capacity, num_kv_heads, head_dim, dtype, device, num_q_heads, k_scale, v_scale: as in
            :class:`KVCache`; capacity is rounded up to whole pages.
        page_size: tokens to a page.
        num_pages: pages in the pool; None holds every row at full capacity.
    """

    def __init__(
        self,
        batch: int,
        num_layers: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        num_q_heads: int | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> None:
        for name, value in {"page_size": page_size, "num_pages": num_pages}.items():
            if value is not None and value < 1:
                raise RuntimeError(f"PagedKVCache: {name} must be at least 1, got {value}")
        pages_per_row = -(-capacity // page_size)
        super().__init__(batch, num_layers, pages_per_row * page_size, num_kv_heads, head_dim)
        self.page_size = page_size
        self.num_pages = num_pages if num_pages is not None else batch * pages_per_row
        shape = (num_layers, self.num_pages, page_size, num_kv_heads, head_dim)
        self._allocate(shape, dtype, device, num_q_heads, k_scale, v_scale)
        self._hold(_PagePool(self.num_pages), [[] for _ in range(batch)])
        #: int32 [batch, pages per row] on the device; -1 where a row has no page
        self.block_table = torch.full((batch, pages_per_row), -1, dtype=torch.int32, device=self.device)

    def _hold(self, pool: _PagePool, tables: list[list[int]]) -> None:
        self._pool, self._tables = pool, tables
        self._ready = 0  # tokens a row that the pages are known to take: each layer of a step asks for the same
        weakref.finalize(self, _drop_all, pool, tables)

    @property
    def num_free_pages(self) -> int:
        return len(self._pool.free)

    def where(self) -> dict[str, Any]:
        return {"cache_seqlens": self.lengths, "block_table": self.block_table}

    def reserve(self, tokens: int) -> None:
        self._check_room("append", tokens)
        if tokens <= self._ready:
            return
        copies, new = self._wanted(tokens)
        if len(copies) + len(new) > len(self._pool.free):
            raise RuntimeError(
                f"PagedKVCache.append: tokens must need at most {self.num_free_pages} more pages (num_pages "
                f"{self.num_pages}), got {tokens} tokens a row that need {len(copies) + len(new)}"
            )
        sources, targets = [], []
        for row, column in copies:
            sources.append(self._tables[row][column])
            targets.append(self._pool.take())
            self._pool.drop(sources[-1])
            self._tables[row][column] = targets[-1]
        if copies:
            source, target = to_device(sources, self.device), to_device(targets, self.device)
            movable(self._k)[:, target] = movable(self._k)[:, source]
            movable(self._v)[:, target] = movable(self._v)[:, source]
        for row, _ in new:
            self._tables[row].append(self._pool.take())
        self._write_table([(row, column, self._tables[row][column]) for row, column in copies + new])
        self._ready = tokens

    def _wanted(self, tokens: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(row, column) of the pages to copy because others hold them too, and of those to add."""
        copies, new, left = [], [], Counter[int]()
        for row, table in enumerate(self._tables):
            for column in range(self._lowest[row] // self.page_size, len(table)):
                page = table[column]
                if self._pool.holders[page] - left[page] > 1:
                    copies.append((row, column))
                    left[page] += 1
            needed = -(-(self._highest[row] + tokens) // self.page_size)
            new += [(row, column) for column in range(len(table), needed)]
        return copies, new

    def advance(self, tokens: int | Tensor, *, at_most: int | None = None) -> None:
        super().advance(tokens, at_most=at_most)
        self._ready = 0

    def crop(self, length: int | Tensor) -> None:
        super().crop(length)
        self._give_back(range(self.batch))

    def reset(self, rows: Iterable[int] | None = None) -> None:
        chosen = self._rows(rows)
        super().reset(chosen)
        self._give_back(chosen)

    def _give_back(self, rows: Iterable[int]) -> None:
        """Drops the pages that no token of these rows can lie on."""
        gone = []
        self._ready = 0
        for row in rows:
            table, kept = self._tables[row], -(-self._highest[row] // self.page_size)
            gone += [(row, column, -1) for column in range(kept, len(table))]
            for page in table[kept:]:
                self._pool.drop(page)
            del table[kept:]
        self._write_table(gone)

    def _write_table(self, entries: list[tuple[int, int, int]]) -> None:
        if entries:
            rows, columns, pages = to_device(entries, self.device).unbind(-1)
            self.block_table[rows, columns] = pages.to(torch.int32)

    def fork(self, rows: Sequence[int] | None = None) -> PagedKVCache:
        """A new cache on the same pool whose row i shares the pages of row ``rows[i]`` (default: of every row)."""
        chosen = self._rows(rows)
        if not chosen:
            raise RuntimeError("PagedKVCache.fork: rows must hold at least 1 row, got 0")
        self._ready = 0  # its pages are about to be shared
        other = PagedKVCache.__new__(PagedKVCache)
        other.__dict__.update(self.__dict__)
        other.batch = len(chosen)
        other._lowest = [self._lowest[row] for row in chosen]
        other._highest = [self._highest[row] for row in chosen]
        other._hold(self._pool, [list(self._tables[row]) for row in chosen])
        for table in other._tables:
            for page in table:
                self._pool.share(page)
        index = to_device(chosen, self.device)
        other.lengths, other.block_table = self.lengths[index], self.block_table[index]
        return other

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages this cache holds, those it shares with itself counted once."""
        return self.bytes_allocated // self.num_pages * len({page for table in self._tables for page in table})
