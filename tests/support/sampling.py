"""The sampler's definition again, in NumPy and by sorting, and the float64 distribution that it approximates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
MASK = U64(0xFFFFFFFF)


def words(value: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    return value & MASK, value >> U64(32)


def mul_high(a: NDArray[np.uint64], b: int) -> NDArray[np.uint64]:
    """The upper 64 bits of a * b."""
    a_low, a_high = words(a)
    b_low, b_high = U64(b & 0xFFFFFFFF), U64(b >> 32)
    low, middle_a, middle_b = a_low * b_low, a_high * b_low, a_low * b_high
    carry = (low >> U64(32)) + (middle_a & MASK) + (middle_b & MASK)
    return a_high * b_high + (middle_a >> U64(32)) + (middle_b >> U64(32)) + (carry >> U64(32))


def philox(seed: object, offset: object, row: object) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Philox4x32-10 with key ``seed`` and counter ``(offset, row)``: two words of 64 bits."""
    as_u64 = [np.atleast_1d(np.asarray(x)).astype(np.uint64) for x in (seed, offset, row)]
    (k0, k1), (c0, c1), (c2, c3) = (words(x) for x in as_u64)
    for _ in range(10):
        a_low, a_high = words(U64(0xD2511F53) * c0)
        b_low, b_high = words(U64(0xCD9E8D57) * c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + U64(0x9E3779B9)) & MASK, (k1 + U64(0xBB67AE85)) & MASK
    return c0 | c1 << U64(32), c2 | c3 << U64(32)


def weigh(t: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Bin and 20-bit weight of 2^t; tokens below -43.75 get bin -1."""
    f32 = np.float32
    clamped = np.maximum(t, f32(-43.75))
    eighths = np.rint(clamped * f32(8)).astype(np.float32)
    f = clamped - eighths / f32(8)
    p = f * f32(29102.869) + f32(125967.57)
    p = p * f + f32(363408.75)
    m = np.rint((p * f).astype(np.float64) + 2.0**19)
    assert p.dtype == np.float32
    return np.where(t < f32(-43.75), -1, -eighths.astype(np.int64)), m.astype(np.uint64)


SCALES = [round(2**24 * 2 ** (-j / 8)) for j in range(8)]


def bin_mass(total: int, which: int) -> int:
    return total * SCALES[which % 8] >> which // 8


@dataclass
class Row:
    """One row's filtered distribution: ``kept`` and, per bin in order, its mass and its kept tokens."""

    kept: NDArray[np.bool_]
    m: NDArray[np.uint64]
    bins: list[int] = field(default_factory=list)
    masses: list[int] = field(default_factory=list)
    members: list[NDArray[np.int64]] = field(default_factory=list)

    def probabilities(self) -> NDArray[np.float64]:
        out = np.zeros(self.m.shape)
        for mass, members in zip(self.masses, self.members):
            weights = self.m[members].astype(np.float64)
            out[members] = mass / sum(self.masses) * (weights / weights.sum())
        return out

    def draw(self, u_bin: NDArray[np.uint64], u_token: NDArray[np.uint64]) -> NDArray[np.int64]:
        ends = np.cumsum(np.array(self.masses, dtype=np.uint64))
        which = np.searchsorted(ends, mul_high(u_bin, sum(self.masses)), side="right")
        ids = np.empty(which.shape, dtype=np.int64)
        for b in np.unique(which):
            here = which == b
            members = self.members[b]
            inner = np.cumsum(self.m[members])
            ids[here] = members[np.searchsorted(inner, mul_high(u_token[here], int(inner[-1])), side="right")]
        return ids


def distribution(
    z: NDArray[np.float32], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Row:
    """The exact distribution of a valid row that is not greedy."""
    f32 = np.float32
    scale = f32(1.44269504) / np.clip(f32(temperature), f32(2.0**-100), f32(2.0**100))
    with np.errstate(invalid="ignore", over="ignore"):
        t = (z - z.max()) * scale
    t = np.where(t < 0, t, f32(0))
    bins, m = weigh(t)
    candidates = bins >= 0
    kept = candidates.copy()

    def masses_of(mask: NDArray[np.bool_]) -> dict[int, int]:
        sums = np.zeros(351, dtype=np.uint64)
        np.add.at(sums, bins[mask], m[mask])
        return {b: bin_mass(int(sums[b]), b) for b in np.flatnonzero(sums).tolist()}

    if 0 < top_k < kept.sum():
        kept &= z >= np.sort(z[candidates])[-top_k]
    if f32(top_p) < 1:
        share = math.floor(float(f32(top_p)) * 2.0**32 + 0.5)
        wanted = max(1, -(-sum(masses_of(kept).values()) * share // 2**32))
        before = 0
        for b, mass in masses_of(kept).items():
            if before + mass >= wanted:
                members = np.flatnonzero(kept & (bins == b))
                members = members[np.argsort(-z[members], kind="stable")]
                running = np.cumsum(m[members])
                last = next(i for i, s in enumerate(running.tolist()) if before + bin_mass(s, b) >= wanted)
                kept &= z >= z[members[last]]
                break
            before += mass
    if min_p > 0:
        kept &= t >= f32(math.floor(math.log2(f32(min(min_p, 1.0))) * 2**28) / 2**28)

    row = Row(kept, m)
    for b, mass in masses_of(kept).items():
        row.bins.append(b)
        row.masses.append(mass)
        row.members.append(np.flatnonzero(kept & (bins == b)))
    return row


def adjusted(
    z: NDArray[np.float32],
    *,
    logit_bias: NDArray[np.float32] | None = None,
    allowed_bitmask: NDArray[np.int32] | None = None,
    token_counts: NDArray[np.int32] | None = None,
    repetition_penalty: NDArray[np.float32] | float = 1.0,
    frequency_penalty: NDArray[np.float32] | float = 0.0,
    presence_penalty: NDArray[np.float32] | float = 0.0,
) -> NDArray[np.float32]:
    """Rows of logits after penalties, bias and bitmask, every step rounded to float32. A penalty is one number per
    row, or one."""
    r, f, p = (
        np.asarray(x, dtype=np.float32).reshape(-1, 1)
        for x in (repetition_penalty, frequency_penalty, presence_penalty)
    )
    z = z.astype(np.float32).reshape(-1, z.shape[-1])
    with np.errstate(all="ignore"):
        if token_counts is not None:
            counts = np.broadcast_to(token_counts, z.shape)
            z = np.where(counts != 0, np.where(z > 0, z / r, z * r), z)
            z = np.where(counts > 0, (z - f * counts.astype(np.float32)) - p, z)
        if logit_bias is not None:
            z = z + logit_bias.astype(np.float32)
    assert z.dtype == np.float32
    if allowed_bitmask is not None:
        octets = np.atleast_2d(allowed_bitmask).astype("<i4").view(np.uint8)
        allowed = np.unpackbits(octets, axis=-1, bitorder="little")[:, : z.shape[-1]]
        z = np.where(allowed == 1, z, np.float32(-np.inf))
    return z


def softmax64(z: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    weights = np.exp((z.astype(np.float64) - float(z.max())) / float(np.float32(temperature)))
    return weights / weights.sum()


def filtered64(
    z: NDArray[np.float32], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> NDArray[np.float64]:
    """Top-k, top-p and min-p by a float64 sort, ties kept, renormalised after each."""
    p = softmax64(z, temperature)
    if 0 < top_k < z.size:
        p = np.where(z >= np.sort(z)[-top_k], p, 0)
    if np.float32(top_p) < 1:
        order = np.argsort(-z, kind="stable")
        running = np.cumsum(p[order] / p.sum())
        last = min(int(np.searchsorted(running, float(np.float32(top_p)), side="left")), z.size - 1)
        p = np.where(z >= z[order[last]], p, 0)
    if min_p > 0:
        p = np.where(p >= float(np.float32(min_p)) * p.max(), p, 0)
    result: NDArray[np.float64] = p / p.sum()
    return result
