"""The one error bound of the project: no worse than twice plain eager PyTorch in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


@dataclass
class Errors:
    max: float
    mean: float


def errors(actual: np.ndarray, reference: np.ndarray) -> Errors:
    if actual.size == 0:
        return Errors(0.0, 0.0)
    difference = np.abs(actual - reference)
    return Errors(float(difference.max()), float(difference.mean()))


def assert_within_bound(
    actual: Tensor, reference: np.ndarray, baseline: Tensor, *, attention_extra: float = 0.0, what: str = "output"
) -> None:
    """max error <= 2 E + a and mean error <= 1.5 E_mean + a / 8, E being the baseline's error.

    ``reference`` is float64; ``baseline`` is the plain eager PyTorch computation in ``actual``'s dtype. ``a`` is
    0.25 eps max|reference| for half types and 8 eps max|reference| for float32, where attention adds
    8 eps (1 + max|score|) max|v|: pass (1 + max|score|) max|v| as ``attention_extra``.
    Infinities and NaN must stand in the same places.
    """
    assert tuple(actual.shape) == tuple(reference.shape) == tuple(baseline.shape), what
    got, base = to_numpy(actual), to_numpy(baseline)
    special = ~np.isfinite(reference)
    np.testing.assert_array_equal(got[special], reference[special], err_msg=f"{what}: NaN or infinities differ")
    assert np.isfinite(got[~special]).all(), f"{what}: not finite where the reference is"
    got, base, reference = got[~special], base[~special], reference[~special]
    if reference.size == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    largest = float(np.abs(reference).max())
    slack = 0.25 * eps * largest
    if actual.dtype == torch.float32:
        slack = 8 * eps * largest + 8 * eps * attention_extra
    mine, theirs = errors(got, reference), errors(base, reference)
    assert mine.max <= 2 * theirs.max + slack, (
        f"{what}: max error {mine.max:.3e} > 2 x {theirs.max:.3e} + {slack:.3e} ({actual.dtype})"
    )
    assert mine.mean <= 1.5 * theirs.mean + slack / 8, (
        f"{what}: mean error {mine.mean:.3e} > 1.5 x {theirs.mean:.3e} + {slack / 8:.3e} ({actual.dtype})"
    )
