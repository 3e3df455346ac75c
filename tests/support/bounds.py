"""The one error bound of the project: no worse than twice plain eager PyTorch in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


Exact = Any  # float64: an array of NumPy or, to work on a GPU, a tensor there


def to_float64(tensor: Tensor) -> Exact:
    return tensor.detach().double() if tensor.is_cuda else to_numpy(tensor)


def concatenate(parts: list[Exact], axis: int = -1) -> Exact:
    return torch.cat(parts, axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis)


@dataclass
class Errors:
    max: float
    mean: float


def errors(actual: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> Errors:
    if 0 in actual.shape:
        return Errors(0.0, 0.0)
    difference = abs(actual - reference)
    return Errors(float(difference.max()), float(difference.mean()))


def assert_within_bound(
    actual: Tensor,
    reference: np.ndarray | Tensor,
    baseline: Tensor,
    *,
    attention_extra: float = 0.0,
    what: str = "output",
) -> None:
    """max error <= 2 E + a and mean error <= 1.5 E_mean + a / 8, E being the baseline's error.

    ``reference`` is float64: an array or, to compare on a GPU, a tensor there. ``baseline`` is the plain eager PyTorch
    computation in ``actual``'s dtype. ``a`` is 0.25 eps max|reference| for half types and 8 eps max|reference| for
    float32, where attention adds 8 eps (1 + max|score|) max|v|: pass (1 + max|score|) max|v| as ``attention_extra``.
    Infinities and NaN must stand in the same places.
    """
    assert tuple(actual.shape) == tuple(reference.shape) == tuple(baseline.shape), what
    expected = torch.from_numpy(reference) if isinstance(reference, np.ndarray) else reference
    got, base = (x.detach().to(expected.device, torch.float64) for x in (actual, baseline))
    if 0 in expected.shape:
        return
    finite = expected.isfinite()
    same = (finite | (got == expected) | (got.isnan() & expected.isnan())).all()
    off, base_off, size = (torch.where(finite, x.abs(), 0.0) for x in (got - expected, base - expected, expected))
    count = finite.sum().clamp(min=1)
    asked = [same, (got.isfinite() | ~finite).all(), size.max()]
    asked += [statistic for x in (off, base_off) for statistic in (x.max(), x.sum() / count)]
    # All at once: a GPU is waited for one time.
    alike, is_finite, largest, *found = torch.stack([x.double() for x in asked]).tolist()
    assert alike, f"{what}: NaN or infinities differ"
    assert is_finite, f"{what}: not finite where the reference is"
    mine, theirs = Errors(*found[:2]), Errors(*found[2:])
    eps = torch.finfo(actual.dtype).eps
    slack = 0.25 * eps * largest
    if actual.dtype == torch.float32:
        slack = 8 * eps * largest + 8 * eps * attention_extra
    assert mine.max <= 2 * theirs.max + slack, (
        f"{what}: max error {mine.max:.3e} > 2 x {theirs.max:.3e} + {slack:.3e} ({actual.dtype})"
    )
    assert mine.mean <= 1.5 * theirs.mean + slack / 8, (
        f"{what}: mean error {mine.mean:.3e} > 1.5 x {theirs.mean:.3e} + {slack / 8:.3e} ({actual.dtype})"
    )
