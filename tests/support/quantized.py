"""Quantised caches: what they hold, by torch alone, and how far attention over them may be from the unquantised one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gqa_kernels import gqa_attention_decode, gqa_attention_prefill
from support.attention import Case, Result, rotate_eager, token_positions, visible
from support.attention_layout import Cache, arguments, held_rows, packed
from support.bounds import errors, to_numpy
from support.guard import Guard, raw_bytes

FORMATS = [torch.float8_e4m3fn, torch.int8]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., Hkv, D] as a cache stores it; scale [Hkv] or one element."""
    value = x.float() / scale.reshape(-1, 1)
    largest = LARGEST[dtype]
    held = value.clamp(-largest, largest)
    if dtype == torch.int8:
        return held.round().nan_to_num(0.0).to(torch.int8)
    return torch.where(value.isnan(), torch.full_like(value, float("nan")), held).to(dtype)


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.double() * scale.double().reshape(-1, 1)


def step(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring stored values about x: rounding is off by half of it at most."""
    scale = scale.double().reshape(-1, 1)
    if dtype == torch.int8:
        return scale.expand(x.shape)
    exponent = torch.frexp((x.double() / scale).abs()).exponent - 1
    return torch.exp2(exponent.clamp(min=-6).double() - 3) * scale


@dataclass
class Quantized:
    """A case whose keys and values lie in a quantised cache."""

    case: Case
    dtype: torch.dtype
    k_scale: Tensor
    v_scale: Tensor
    _stored: list[list[Tensor]] = field(default_factory=list)

    @staticmethod
    def fit(case: Case, dtype: torch.dtype, *, per_head: bool, headroom: float = 1.0) -> Quantized:
        """Scales under which the largest number of a head, or of all, is the largest stored one."""

        def scale(parts: list[Tensor]) -> Tensor:
            heads = torch.stack([part.float().abs().amax((0, 2)) for part in parts if part.numel()]).amax(0)
            return (heads if per_head else heads.amax(0, keepdim=True)) * headroom / LARGEST[dtype]

        return Quantized(case, dtype, scale(case.k), scale(case.v))

    def rotated(self, b: int) -> Tensor:
        """Keys of a sequence as an unquantised cache would hold them after the call."""
        case, k, new = self.case, self.case.k[b], self.case.new[b]
        if case.rotary is None or new == 0:
            return k
        rows, rotary = token_positions(case, b, new), case.rotary
        fresh = rotate_eager(k[len(k) - new :].float(), rotary.cos[rows], rotary.sin[rows], rotary.interleaved)
        return torch.cat([k[: len(k) - new], fresh.to(k.dtype)])

    def stored(self) -> tuple[list[Tensor], list[Tensor]]:
        if not self._stored:
            k, lengths = [self.rotated(b) for b in range(self.case.batch)], [len(v) for v in self.case.v]
            for parts, scale in ((k, self.k_scale), (self.case.v, self.v_scale)):
                self._stored.append(list(quantize(torch.cat(parts), scale, self.dtype).split(lengths)))
        return self._stored[0], self._stored[1]

    def attended(self, cache: Cache | None = None) -> Case:
        """The case whose keys and values are what the cache stands for; those of ``cache``, if given."""
        k, v = self.stored()
        if cache is not None:
            lengths = [len(part) for part in k]
            slots = cache.slots_of(range(len(k)), [range(n) for n in lengths])
            k, v = (movable(x).cpu()[slots].view(self.dtype).split(lengths) for x in (cache.k, cache.v))
        k, v = ([dequantize(x, scale) for x in parts] for parts, scale in ((k, self.k_scale), (v, self.v_scale)))
        for b, padding in enumerate(self.case.leftpad or []):  # may hold anything
            k[b][:padding], v[b][:padding] = 0.0, 0.0
        return self.case.change(k=k, v=v, new=[0] * self.case.batch)

    def scales(self, guard: Guard) -> dict[str, Tensor]:
        return {"k_scale": guard.place(self.k_scale), "v_scale": guard.place(self.v_scale)}


def movable(x: Tensor) -> Tensor:
    """The bytes, in a dtype that torch indexes everywhere."""
    return x.view(torch.uint8)


def place_cache(x: Quantized, cache: Cache, guard: Guard, fill: int = 0) -> Cache:
    """``cache``, which holds the case unquantised, with the bytes of the quantised one; ``fill`` where no key is."""
    placed, held = [], held_rows(x.case)
    for parts, like in zip(x.stored(), (cache.k, cache.v)):
        memory = torch.full(like.shape, fill, dtype=torch.uint8)
        if any(held):
            rows = torch.cat([movable(part)[some.start : some.stop] for part, some in zip(parts, held)])
            memory[cache.slots_of(range(x.case.batch), held)] = rows
        placed.append(guard.place(memory.view(x.dtype), name="cache", writable=any(x.case.new)))
    return Cache(placed[0], placed[1], cache.seqlens, cache.block_table)


def run_quantized(x: Quantized, guard: Guard, cache: Cache, *, decode: bool, **extra: Any) -> Result:
    """Runs over the cache; what was appended is compared with torch's quantisation, and no other byte may change."""
    before = [movable(part).clone() for part in (cache.k, cache.v)]
    given = {**arguments(x.case, guard, cache), **x.scales(guard), **extra}
    if not decode:
        given["causal"] = x.case.causal
    result = (gqa_attention_decode if decode else gqa_attention_prefill)(**given)
    case = x.case
    added = [b for b in range(case.batch) if case.new[b] > 0]
    slots = cache.slots_of(added, [range(case.cached[b], case.cached[b] + case.new[b]) for b in added]) if added else ()
    slots = tuple(index.to(cache.k.device, non_blocking=True) for index in slots)
    for name, part, expected, stored in zip("kv", (cache.k, cache.v), before, x.stored()):
        if added and name == "k" and case.rotary is not None:  # bounded by what attention makes of them
            expected[slots] = movable(part)[slots]
            got = movable(part)[slots].cpu().view(x.dtype).split([case.new[b] for b in added])
            for b, rows in zip(added, got):
                check_rotated(x, b, rows)
        elif added:
            new = torch.cat([movable(stored[b][case.cached[b] :]) for b in added])
            expected[slots] = new.to(expected.device, non_blocking=True)
        assert torch.equal(movable(part), expected), (
            f"{name}_cache: a byte outside the new rows changed, or a row is wrong"
        )
    return packed(*result)


def check_rotated(x: Quantized, b: int, got: Tensor) -> None:
    """Rotated keys differ by a rounding of the 16-bit dtype, which may move a stored number by one step."""
    wanted = x.rotated(b)[x.case.cached[b] :]
    distance = (dequantize(got, x.k_scale) - wanted.double()).abs()
    slack = 2 * torch.finfo(x.case.dtype).eps * wanted.double().abs().amax()
    assert bool((distance <= 0.5 * step(wanted, x.k_scale, x.dtype) * 1.001 + slack).all()), "rotated keys in the cache"


def check_unquantized(x: Quantized, result: Result) -> None:
    """The distance to attention over keys and values that were never quantised.

    With half a step for each number, s and v being off by at most ds and dv: |out - out'| <= max dv + (exp(2 max ds) -
    1) sum p |v| and |lse - lse'| <= max ds. And on average rounding errors are independent, of step / sqrt(12) each, so
    that out is off by sqrt(sum p^2 (sv^2 + ss^2 (v - out)^2)); measured over all outputs it may be 1.5 times that.
    Both beside twice the error of the eager computation without quantisation (P1).
    """
    out, lse = to_numpy(result[0]), to_numpy(result[1])
    expected, expected_lse = x.case.reference()
    base, base_lse = x.case.baseline(result[0].device.type)
    worst, worst_lse, variance = _distances(x)
    eager, eager_lse = errors(to_numpy(base), expected), errors(to_numpy(base_lse), expected_lse)
    slack = 2 * eager.max + 0.25 * torch.finfo(x.case.dtype).eps * float(np.abs(expected).max(initial=0.0))
    assert (np.abs(out - expected) <= worst + slack).all(), "out is further from the unquantised one than steps explain"
    seen = np.isfinite(expected_lse)
    slack_lse = 2 * eager_lse.max + 1e-5
    assert (np.abs(lse - expected_lse)[seen] <= worst_lse[seen] + slack_lse).all(), "lse"
    typical = float(np.sqrt(np.mean((out - expected) ** 2)))
    assert typical <= 1.5 * float(np.sqrt(np.mean(variance))) + 2 * eager.mean, "typical distance"


def _distances(x: Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of out the largest distance and the variance, of lse the largest distance; packed as results are."""
    case, group = x.case, x.case.heads[0] // x.case.heads[1]
    assert case.rotary is None and case.softcap == 0 and case.sinks is None
    worst, worst_lse, variance = [], [], []
    for b in range(case.batch):
        q = to_numpy(case.q[b]).transpose(1, 0, 2)

        def heads(part: Tensor) -> np.ndarray:
            return np.repeat(to_numpy(part), group, 1).transpose(1, 0, 2)

        k, v = heads(case.k[b]), heads(case.v[b])
        k_step, v_step = (heads(step(part[b], s, x.dtype)) for part, s in ((case.k, x.k_scale), (case.v, x.v_scale)))
        seen = np.broadcast_to(visible(case, b), (len(q), q.shape[1], k.shape[1]))
        scores = np.where(seen, np.matmul(q, k.transpose(0, 2, 1)) * case.softmax_scale, -np.inf)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        p = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
        p /= np.where(p.sum(-1, keepdims=True) > 0, p.sum(-1, keepdims=True), 1.0)
        score_off = np.matmul(np.abs(q), k_step.transpose(0, 2, 1)) / 2 * case.softmax_scale
        furthest = np.where(seen, score_off, 0.0).max(-1, initial=0.0)
        v_off = (v_step / 2).max((0, 1), initial=0.0).max(initial=0.0)
        worst.append((v_off + np.expm1(2 * furthest)[..., None] * np.matmul(p, np.abs(v))).transpose(1, 0, 2))
        worst_lse.append(furthest)
        score_var = np.matmul(q**2, (k_step**2).transpose(0, 2, 1)) / 12 * case.softmax_scale**2
        out = np.matmul(p, v)
        spread = p**2 * score_var
        square = np.matmul(spread, v**2) - 2 * out * np.matmul(spread, v) + out**2 * spread.sum(-1, keepdims=True)
        variance.append((np.matmul(p**2, v_step**2 / 12) + square).transpose(1, 0, 2))
    return np.concatenate(worst), np.concatenate(worst_lse, 1), np.concatenate(variance)


def same_cache(a: Tensor, b: Tensor) -> bool:
    return torch.equal(raw_bytes(a), raw_bytes(b))
