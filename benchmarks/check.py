"""float32 references, and the comparison that every result passes before it is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def assert_close(actual: Any, reference: Sequence[Tensor]) -> None:
    """Relative error in the 2-norm: at most two units in the last place of a half type, 1e-5 for float32."""
    outputs = list(actual) if isinstance(actual, (tuple, list)) else [actual]
    if len(outputs) != len(reference):
        raise AssertionError(f"{len(outputs)} outputs, not {len(reference)}")
    for got, want in zip(outputs, reference):
        if got.shape != want.shape:
            raise AssertionError(f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
        bound = 1e-5 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
        error = float((got.float() - want).norm() / want.norm().clamp(min=1e-30))
        if not error <= bound:
            raise AssertionError(f"relative error {error:.2e}, allowed {bound:.2e}")


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    causal: bool,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Query rows ``rows`` of float32 attention. q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]``; with ``causal`` a
    row sees at most ``window`` keys before its own."""
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    position, own = torch.arange(k.shape[1], device=q.device), (rows + offset)[:, None]
    hidden = position > own
    if window >= 0:
        hidden |= position < own - window
    out = []
    for b in range(q.shape[0]):
        keys, values = k[b].transpose(0, 1).float(), v[b].transpose(0, 1).float()
        queries = q[b, rows].transpose(0, 1).float().unflatten(0, (-1, group)).flatten(1, 2)
        scores = (queries @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])).unflatten(1, (group, -1))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            scores = scores.masked_fill(hidden, -math.inf)
        if sinks is None:
            weights = scores.softmax(-1)
        else:
            extra = sinks.float().view(-1, group, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        heads = (weights.flatten(1, 2) @ values).unflatten(1, (group, -1)).flatten(0, 1)
        out.append(heads.transpose(0, 1))
    return torch.stack(out)


def some_rows(length: int, device: str) -> Tensor:
    """All rows of a short sequence; of a long one the first, the last and some between."""
    if length <= 256:
        return torch.arange(length, device=device)
    return torch.cat(
        [
            torch.arange(64, device=device),
            torch.linspace(64, length - 65, 64, device=device).long(),
            torch.arange(length - 64, length, device=device),
        ]
    )
