"""Matrix products with the weights of one or several linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, *weights: Tensor, bias: Tensor | None = None, static_weights: bool = False) -> Tensor:
    """``F.linear``; several weights give their outputs side by side."""
    biases = [None] * len(weights) if bias is None else list(torch.split(bias, [weight.shape[0] for weight in weights]))
    parts = [F.linear(x, weight, part) for weight, part in zip(weights, biases)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
