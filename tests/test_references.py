"""The two float64 answers to an attention case, of NumPy and of torch, are one; large cases trust the second."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.attention import make_case, visible
from support.attention_options import OPTION_PAIRS, name_of, option_case
from support.attention_padded import seen_keys
from support.bounds import DTYPES, to_numpy


@pytest.mark.parametrize("combination", OPTION_PAIRS, ids=name_of)
def test_p1_references_agree(device: str, combination: dict[str, Any]) -> None:
    lengths = [(18, 30, 18), (5, 0, 9), (7, 11, 0), (9, 0, 4), (3, 0, 0), (0, 5, 0)]
    if combination["rotary"]:
        lengths = [(18, 30, 18), (5, 0, 5), (1, 60, 1)]
    case = option_case(combination, lengths, dtype=torch.float32)
    out, lse = case.reference()
    largest = case._answers["largest score"]
    other_out, other_lse = case.reference_on(device)
    np.testing.assert_allclose(to_numpy(other_out), out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(to_numpy(other_lse), lse, rtol=1e-12, atol=1e-12)
    assert abs(case._answers["largest score"] - largest) <= 1e-12 * largest
    for b in range(case.batch):
        assert np.array_equal(seen_keys(case, range(b, b + 1), device)[0].cpu().numpy(), visible(case, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_the_bound_sees_faults(device: str, dtype: torch.dtype) -> None:
    """The negative control: eager's answer passes, and none of these does."""
    case = make_case([(9, 0, 40), (9, 0, 3)], dtype=dtype)
    good = case.baseline(device)
    case.check(good)
    out, lse = good
    faults = {
        "a row of another token": (torch.cat([out[1:2], out[1:]]), lse),
        "one number": (out.clone().index_put_((torch.tensor([0]),) * 3, out.max() * 2), lse),
        "NaN": (out.clone().index_put_((torch.tensor([0]),) * 3, out.new_tensor(math.nan)), lse),
        "a row that sees nothing is not 0": (torch.where(out == 0, 0.1, out).to(dtype), lse),
        "its lse is finite": (out, lse.nan_to_num()),
        "one key too many": (out, lse + 1 / 40),
        "all of it by a little": (out * 1.05, lse),
    }
    for what, wrong in faults.items():
        try:
            case.check(wrong)
        except AssertionError:
            continue
        pytest.fail(f"not seen: {what}")
