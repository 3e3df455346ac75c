"""Sequences of an attention case side by side, padded to the longest: a few large tensors for many small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from support.attention import Case

Rotate = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Rows = tuple[list[int], list[int]]  # of the rotary tables: of queries, of new keys

MOST = 1 << 22  # scores at once, where a sequence alone does not have more


def parts(case: Case) -> Iterator[range]:
    """Neighbours, as many as make no more than MOST scores with their padding."""
    start, queries, keys = 0, 0, 0
    for b, (q, k) in enumerate(zip(case.q, case.k)):
        widest = max(queries, len(q)), max(keys, len(k))
        if b > start and (b + 1 - start) * widest[0] * widest[1] * q.shape[1] > MOST:
            yield range(start, b)
            start, widest = b, (len(q), len(k))
        queries, keys = widest
    if start < case.batch:
        yield range(start, case.batch)


def where(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Of each element of the sequences, one behind another: which sequence, and which of it."""
    sizes = torch.tensor(lengths)
    sequence = torch.repeat_interleave(sizes)
    return sequence, torch.arange(len(sequence)) - (sizes.cumsum(0) - sizes)[sequence]


def seen_keys(case: Case, some: range, device: str) -> Tensor:
    """[sequences, queries, keys]: who sees whom."""
    lengths = [(len(case.q[b]), len(case.k[b]), case.leftpad[b] if case.leftpad else 0) for b in some]
    queries, keys, leftpad = torch.tensor(lengths).to(device, non_blocking=True).T[..., None, None]
    position = keys - queries + torch.arange(max(q for q, _, _ in lengths), device=device)[:, None]
    key = torch.arange(max(k for _, k, _ in lengths), device=device)
    left, right = case.window
    seen = (key >= leftpad) & (key < keys)
    if left >= 0:
        seen = seen & (key >= position - left)
    if case.causal:
        seen = seen & (key <= position)
    if right >= 0:
        seen = seen & (key <= position + right)
    return seen.expand(-1, position.shape[1], -1)


@dataclass
class Padded:
    """Sequences of a case on a device, in its dtype or another one, their queries and new keys rotated."""

    q: Tensor  # [sequences, queries, Hq, D]
    k: Tensor  # [sequences, keys, Hkv, D]
    v: Tensor
    seen: Tensor  # [sequences, queries, keys]
    queries: tuple[Tensor, ...]  # as where() has them

    @staticmethod
    def of(case: Case, some: range, device: str, dtype: torch.dtype | None, rotate: Rotate, rows: Rows) -> Padded:
        def place(x: Tensor) -> Tensor:  # waits for no GPU
            return x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)

        q, k, v = (place(torch.cat([x[b] for b in some])) for x in (case.q, case.k, case.v))
        queries, keys = (where([len(x[b]) for b in some]) for x in (case.q, case.k))
        seen = seen_keys(case, some, device)
        if case.rotary is not None:
            cos, sin = (place(table) for table in (case.rotary.cos, case.rotary.sin))
            of_q, of_k = (place(torch.tensor(positions, dtype=torch.long)) for positions in rows)
            q = rotate(q, cos[of_q], sin[of_q], case.rotary.interleaved)
            old = torch.tensor([len(case.k[b]) - case.new[b] for b in some])
            new = place((keys[1] >= old[keys[0]]).nonzero()[:, 0])
            k = k.index_copy(0, new, rotate(k[new], cos[of_k], sin[of_k], case.rotary.interleaved))
        at_queries, at_keys = (tuple(place(torch.stack(index))) for index in (queries, keys))

        def pad(x: Tensor, index: tuple[Tensor, ...], longest: int) -> Tensor:
            if len(some) == 1:
                return x[None]
            return x.new_zeros(len(some), longest, *x.shape[1:]).index_put_(index, x)

        k, v = (pad(x, at_keys, seen.shape[2]) for x in (k, v))
        return Padded(pad(q, at_queries, seen.shape[1]), k, v, seen, at_queries)

    def pack(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [tokens, Hq, D] and lse [Hq, tokens] of [sequences, Hq, queries, ...]."""
        return out.transpose(1, 2)[self.queries], lse.transpose(1, 2)[self.queries].T
