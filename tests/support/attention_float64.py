"""The float64 answer to an attention case by torch, on a GPU: NumPy's again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support.attention_padded import Padded, Rows

if TYPE_CHECKING:
    from support.attention import Case


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos, sin)[:, None])
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), kept], -1)


def reference(case: Case, some: range, device: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the largest score of some sequences; ``rows``: rotary positions of their queries and new keys."""
    x = Padded.of(case, some, device, torch.float64, rotate, rows)
    sinks = None if case.sinks is None else case.sinks.to(device, torch.float64)
    kv_heads, group = x.k.shape[2], x.q.shape[2] // x.k.shape[2]
    # A KV head at a time where scores are large.
    heads = kv_heads if x.seen.numel() * x.q.shape[2] < 1 << 25 else 1
    parts = []
    for h in range(0, kv_heads, heads):
        some_kv, some_q = slice(h, h + heads), slice(h * group, (h + heads) * group)
        q, k, v = x.q[:, :, some_q], x.k[:, :, some_kv], x.v[:, :, some_kv]
        parts.append(_attend(case, q, k, v, x.seen[:, None], None if sinks is None else sinks[some_q, None]))
    outs, lses, largest = zip(*parts)
    return *x.pack(torch.cat(outs, 1), torch.cat(lses, 1)), torch.stack(largest).amax()


def _attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, queries, q_heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    rows = q_heads // kv_heads * queries  # of a KV head: by query head, then token
    grouped = q.transpose(1, 2).reshape(batch, kv_heads, rows, dim)
    scores = (grouped @ k.permute(0, 2, 3, 1)).reshape(batch, q_heads, queries, keys) * case.softmax_scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    largest = scores.abs().masked_fill_(~seen, 0.0).amax() if scores.numel() else scores.new_zeros(())
    scores = scores.masked_fill_(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1) if keys else scores.new_full((batch, q_heads, queries), -torch.inf)
    lse = total if sinks is None else torch.logaddexp(total, sinks)
    weights = scores.sub_(torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp_()
    out = weights.reshape(batch, kv_heads, rows, keys) @ v.transpose(1, 2)
    return out.reshape(batch, q_heads, queries, dim), lse, largest
