"""The float64 answer to an attention case by torch, for large cases, on a GPU: NumPy's again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from support.attention import Case


def seen_keys(case: Case, b: int, device: str) -> Tensor:
    """[queries, keys]: who sees whom."""
    queries, keys = len(case.q[b]), len(case.k[b])
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    left, right = case.window
    first = torch.full_like(position, case.leftpad[b] if case.leftpad else 0)
    last = torch.full_like(position, keys)
    if left >= 0:
        first = torch.maximum(first, position - left)
    if case.causal:
        last = torch.minimum(last, position)
    if right >= 0:
        last = torch.minimum(last, position + right)
    return (key >= first) & (key <= last)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos, sin)[:, None])
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), kept], -1)


def reference(case: Case, b: int, device: str, rows: tuple[list[int], list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the largest score of one sequence; ``rows``: rotary positions of its queries and of its new keys."""
    q, k, v = (part[b].to(device, torch.float64) for part in (case.q, case.k, case.v))
    if case.rotary is not None:
        cos, sin = (table.to(device, torch.float64) for table in (case.rotary.cos, case.rotary.sin))
        q = rotate(q, cos[rows[0]], sin[rows[0]], case.rotary.interleaved)
        old = len(k) - case.new[b]
        k = torch.cat([k[:old], rotate(k[old:], cos[rows[1]], sin[rows[1]], case.rotary.interleaved)])
    sinks = None if case.sinks is None else case.sinks.to(device, torch.float64)
    seen, group = seen_keys(case, b, device), q.shape[1] // k.shape[1]
    # A KV head at a time where scores are large.
    heads = k.shape[1] if seen.numel() * q.shape[1] < 1 << 25 else 1
    parts = []
    for h in range(0, k.shape[1], heads):
        some, of_q = slice(h, h + heads), slice(h * group, (h + heads) * group)
        parts.append(_attend(case, q[:, of_q], k[:, some], v[:, some], seen, None if sinks is None else sinks[of_q]))
    outs, lses, largest = zip(*parts)
    return torch.cat(outs, 1), torch.cat(lses), torch.stack(largest).amax()


def _attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (queries, q_heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    rows = q_heads // kv_heads * queries  # of a KV head: by query head, then token
    grouped = q.transpose(0, 1).reshape(kv_heads, rows, dim)
    scores = (grouped @ k.permute(1, 2, 0)).reshape(q_heads, queries, keys) * case.softmax_scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    largest = scores.abs().masked_fill_(~seen, 0.0).amax() if scores.numel() else scores.new_zeros(())
    scores = scores.masked_fill_(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1) if keys else scores.new_full((q_heads, queries), -torch.inf)
    lse = total if sinks is None else torch.logaddexp(total, sinks[:, None])
    weights = scores.sub_(torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp_()
    out = weights.reshape(kv_heads, rows, keys) @ v.transpose(0, 1)
    return out.reshape(q_heads, queries, dim).transpose(0, 1), lse, largest
