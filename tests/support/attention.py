"""Attention cases as lists of sequences, their float64 NumPy answer and the plain eager PyTorch one.

A case says what is computed, not how it lies in memory: ``attention_layout`` places it densely, ragged, in a cache or
in pages. Results are compared packed: out ``[tokens, Hq, D]``, lse ``[Hq, tokens]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import attention_float64
from support.attention_padded import Padded, Rows, parts
from support.bounds import assert_within_bound, to_numpy

Result = tuple[Tensor, Tensor]
Length = tuple[int, int, int]  # queries, keys in the cache, new keys


@dataclass
class Rotary:
    """cos and sin are tables ``[positions, R / 2]``; ``positions`` one list of explicit positions a sequence."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    positions: list[list[int]] | None = None


@dataclass
class Case:
    q: list[Tensor]  # [queries, Hq, D] of each sequence
    k: list[Tensor]  # [keys, Hkv, D]: those in the cache, then the new ones
    v: list[Tensor]
    new: list[int]  # how many of the keys are new
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    sinks: Tensor | None = None
    leftpad: list[int] | None = None
    rotary: Rotary | None = None
    _answers: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.q)

    @property
    def dtype(self) -> torch.dtype:
        return self.q[0].dtype

    @property
    def heads(self) -> tuple[int, int]:
        return self.q[0].shape[1], self.k[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.q[0].shape[2]

    @cached_property
    def cached(self) -> list[int]:
        return [len(k) - new for k, new in zip(self.k, self.new)]

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def change(self, **fields: Any) -> Case:
        return replace(self, _answers={}, **fields)

    def pick(self, order: Sequence[int]) -> Case:
        """The sequences of ``order`` alone."""
        rotary = self.rotary
        if rotary is not None and rotary.positions is not None:
            rotary = replace(rotary, positions=[rotary.positions[b] for b in order])
        lists = {name: [getattr(self, name)[b] for b in order] for name in ("q", "k", "v", "new")}
        return self.change(**lists, leftpad=self.leftpad and [self.leftpad[b] for b in order], rotary=rotary)

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        if "reference" not in self._answers:
            outs, lses, largest = [], [], 0.0
            for b in range(self.batch):
                out, lse, score = _reference(self, b)
                outs.append(out)
                lses.append(lse)
                largest = max(largest, score)
            self._answers["reference"] = np.concatenate(outs), np.concatenate(lses, 1)
            self._answers["largest score"] = largest
        return self._answers["reference"]

    def reference_on(self, device: str) -> Result:
        """The same by torch on a GPU."""
        if "on device" not in self._answers:
            found = [attention_float64.reference(self, some, device, rotary_rows(self, some)) for some in parts(self)]
            outs, lses, scores = zip(*found) if found else ([], [], [])
            self._answers["on device"] = torch.cat(outs), torch.cat(lses, 1)
            self._answers["largest score"] = float(torch.stack(scores).max()) if scores else 0.0
        return self._answers["on device"]

    def baseline(self, device: str) -> Result:
        if "baseline" not in self._answers:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # thousands of tiny ops: waking a second thread for each costs more than it saves
            outs, lses = zip(*(_eager(self, some, device) for some in parts(self)))
            torch.set_num_threads(threads)
            self._answers["baseline"] = torch.cat(outs), torch.cat(lses, 1)
        return self._answers["baseline"]

    def check(self, result: Result, what: str = "") -> None:
        """out and lse within P1's bound."""
        out, lse = result
        on_gpu = out.device.type == "cuda"
        expected_out, expected_lse = self.reference_on("cuda") if on_gpu else self.reference()
        base_out, base_lse = self.baseline(out.device.type)
        score = 1 + self._answers["largest score"]
        values = torch.cat(self.v)
        value = float(values.abs().max()) if values.numel() else 0.0
        assert lse.dtype == torch.float32
        assert_within_bound(out, expected_out, base_out, attention_extra=score * value, what=f"{what} out")
        assert_within_bound(lse, expected_lse, base_lse, attention_extra=score, what=f"{what} lse")


def make_case(
    lengths: Sequence[Length],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    device: str = "cpu",
    **options: Any,
) -> Case:
    """Normally distributed sequences of these lengths; large ones are best drawn where they are used."""
    sizes_q = [q for q, _, _ in lengths]
    sizes_k = [cached + new for _, cached, new in lengths]
    q = torch.randn(sum(sizes_q), heads[0], head_dim, device=device).to(dtype)
    k, v = (torch.randn(sum(sizes_k), heads[1], head_dim, device=device).to(dtype) for _ in range(2))
    return Case(
        list(q.split(sizes_q)),
        list(k.split(sizes_k)),
        list(v.split(sizes_k)),
        [new for _, _, new in lengths],
        **options,
    )


def make_rotary(
    rotary_dim: int,
    positions: int = 512,
    *,
    dtype: torch.dtype = torch.float32,
    interleaved: bool = False,
    explicit: list[list[int]] | None = None,
) -> Rotary:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype), interleaved, explicit)


def token_positions(case: Case, b: int, count: int) -> list[int]:
    """Rotary positions of the last ``count`` tokens of a sequence, as the ops define them."""
    assert case.rotary is not None
    if case.rotary.positions is not None:
        return case.rotary.positions[b][:count]
    keys, leftpad = len(case.k[b]), case.leftpad[b] if case.leftpad else 0
    return [max(0, keys - count + i - leftpad) for i in range(count)]


def rotary_rows(case: Case, some: Sequence[int]) -> Rows:
    """Of the queries of some sequences, and of their new keys."""
    if case.rotary is None:
        return [], []
    counts = [(len(case.q[b]), case.new[b]) for b in some]
    rows = [[row for b, of in zip(some, counts) for row in token_positions(case, b, of[i])] for i in range(2)]
    return rows[0], rows[1]


def visible(case: Case, b: int) -> np.ndarray:
    """[queries, keys]: who sees whom."""
    queries, keys = len(case.q[b]), len(case.k[b])
    position = keys - queries + np.arange(queries)[:, None]
    key = np.arange(keys)[None, :]
    seen = np.broadcast_to(key >= (case.leftpad[b] if case.leftpad else 0), (queries, keys)).copy()
    left, right = case.window
    if case.causal:
        seen &= key <= position
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


def rotate_numpy(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [S, H, D]; cos, sin [S, R / 2]."""
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b, out = x[..., first], x[..., second], x.copy()
    c, s = cos[:, None], sin[:, None]
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out


def rotate_eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As HuggingFace does: tables in the dtype of x, every step rounded."""
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b, out = x[..., first], x[..., second], x.clone()
    c, s = cos.to(x)[:, None], sin.to(x)[:, None]
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out


def _reference(case: Case, b: int) -> tuple[np.ndarray, np.ndarray, float]:
    q, k, v = (to_numpy(part[b]) for part in (case.q, case.k, case.v))
    if case.rotary is not None:
        cos, sin, new = to_numpy(case.rotary.cos), to_numpy(case.rotary.sin), case.new[b]
        rows = token_positions(case, b, len(q))
        q = rotate_numpy(q, cos[rows], sin[rows], case.rotary.interleaved)
        rows = token_positions(case, b, new)
        fresh = rotate_numpy(k[len(k) - new :], cos[rows], sin[rows], case.rotary.interleaved)
        k = np.concatenate([k[: len(k) - new], fresh])
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * case.softmax_scale
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    seen = np.broadcast_to(visible(case, b), scores.shape)
    largest = float(np.abs(scores[seen]).max(initial=0.0))
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, initial=-np.inf)
    sink = np.full(q.shape[1], -np.inf) if case.sinks is None else to_numpy(case.sinks)
    top = np.maximum(top, sink[:, None])
    safe = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - safe[..., None])
    total = weights.sum(-1) + np.exp(sink[:, None] - safe)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    weights = weights / np.where(total > 0, total, 1.0)[..., None]
    return np.matmul(weights, v.transpose(1, 0, 2)).transpose(1, 0, 2), lse, largest


def _eager(case: Case, some: range, device: str) -> Result:
    """Every step in the dtype of q; a product accumulates in float32 and rounds once, as torch's half kernels do."""
    x = Padded.of(case, some, device, None, rotate_eager, rotary_rows(case, some))
    dtype, keys, group = case.dtype, x.k.shape[1], case.heads[0] // case.heads[1]
    q, k, v = x.q.transpose(1, 2), *(part.repeat_interleave(group, 2).transpose(1, 2) for part in (x.k, x.v))
    scores = (q.float() @ k.transpose(2, 3).float()).to(dtype) * case.softmax_scale
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~x.seen[:, None], float("-inf"))
    if case.sinks is not None:
        sink = case.sinks.to(device, dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(scores.float(), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :keys]
    return x.pack((weights.float() @ v.float()).to(dtype), lse)
