"""gqa_attention_prefill without a cache against float64 NumPy, torch SDPA and plain eager PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.attention import make_case, make_rotary
from support.attention_layout import lengths_to_offsets, run_prefill
from support.attention_options import OPTION_PAIRS, name_of, option_case
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.guard import Guard, same_bytes

from gqa_kernels import gqa_attention_prefill

# Of 64 rows and more Hopper's kernel takes those of 16 bits, unless the portable ones are asked for.
pytestmark = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)

HEADS = [(1, 1), (3, 3), (4, 2), (24, 8), (4, 1), (7, 1), (21, 3), (8, 1), (32, 1), (71, 1), (142, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}:{heads[1]}")
def test_p1_groups(guard: Guard, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    case = make_case([(70, 0, 70), (70, 0, 70)], dtype=dtype, heads=heads)
    case.check(run_prefill(case, guard), "dense")
    case = make_case([(3, 0, 40), (21, 0, 21), (1, 0, 7)], dtype=dtype, heads=heads, causal=False)
    case.check(run_prefill(case, guard, ragged=True), "ragged")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_head_dim(guard: Guard, dtype: torch.dtype) -> None:
    for head_dim in range(8, 257, 8):
        for long in (18, 70):
            case = make_case([(long, 0, long), (5, 0, 35)], dtype=dtype, heads=(2, 1), head_dim=head_dim)
            case.check(run_prefill(case, guard, ragged=True), f"head_dim {head_dim}")


@pytest.mark.parametrize("head_dim", [1, 4, 12, 63, 65, 100, 257, 264, 512])
def test_p20_head_dim_refused(device: str, head_dim: int) -> None:
    q = torch.zeros(1, 2, 1, head_dim, device=device)
    with pytest.raises(RuntimeError, match=rf"^gqa_attention_prefill: .*head_dim.*{head_dim}"):
        gqa_attention_prefill(q, q, q)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 17])
def test_p1_every_length(guard: Guard, dtype: torch.dtype, queries: int) -> None:
    """Every seqlen_k from 0 to 130, and so queries that see no key."""
    for causal in (True, False):
        case = make_case([(queries, 0, keys) for keys in range(131)], dtype=dtype, heads=(2, 1), head_dim=32)
        case = case.change(causal=causal)
        case.check(run_prefill(case, guard, ragged=True), f"causal {causal}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (40, 0), (17, 9)])
def test_p1_every_key_counts_once(guard: Guard, dtype: torch.dtype, window: tuple[int, int]) -> None:
    """With equal scores exp(lse) is the number of keys and out their share of ones: one key too many shows."""
    case = make_case([(1 + keys % 17, 0, keys) for keys in range(131)], dtype=dtype, heads=(2, 1), head_dim=16)
    marks = [(torch.arange(len(v))[:, None] % 16 == torch.arange(16)).to(dtype)[:, None] for v in case.v]
    for causal in (True, False):
        plain = case.change(q=[q * 0 for q in case.q], v=marks, causal=causal, window=window)
        plain.check(run_prefill(plain, guard, ragged=True), f"causal {causal}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_lengths_about_powers_of_two(guard: Guard, dtype: torch.dtype) -> None:
    lengths = [(1 + i % 3, 0, 2**n + i) for n in range(7, 13) for i in (-1, 0, 1)]
    case = make_case(lengths, dtype=dtype, heads=(2, 1), head_dim=32)
    case.check(run_prefill(case, guard, ragged=True), "few queries")
    case = make_case([(n, 0, n) for n in (127, 128, 129, 255, 256, 257)], dtype=dtype, heads=(2, 1), head_dim=64)
    case.check(run_prefill(case, guard, ragged=True), "square")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination", OPTION_PAIRS, ids=name_of)
def test_p1_options(guard: Guard, dtype: torch.dtype, combination: dict[str, Any]) -> None:
    case = option_case(combination, [(66, 0, 66)] * 4, dtype=dtype)
    dense = run_prefill(case, guard)
    case.check(dense, "dense")
    for part, other in zip(dense, run_prefill(case, guard, ragged=True, max_seqlen_q=66, max_seqlen_k=66)):
        assert same_bytes(part, other), "ragged differs from dense"
    lengths = [(70, 0, 70), (1, 0, 1), (0, 0, 0), (20, 0, 20)]
    ragged = option_case(combination, lengths, dtype=dtype)
    ragged.check(run_prefill(ragged, guard, ragged=True), "ragged")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_p1_gathered_rotary(guard: Guard, dtype: torch.dtype, ragged: bool) -> None:
    """cos and sin already gathered, one row a token, give what their table gives."""
    case = make_case([(9, 0, 9), (9, 0, 9)], dtype=dtype, rotary=make_rotary(64))
    expected = run_prefill(case, guard, ragged=ragged)
    case.check(expected)
    for part, other in zip(expected, run_prefill(case, guard, ragged=ragged, gathered=True)):
        assert same_bytes(part, other)
    if not ragged:
        assert case.rotary is not None
        tables = {
            "rotary_cos": guard.place(case.rotary.cos[None, :9]),
            "rotary_sin": guard.place(case.rotary.sin[None, :9]),
        }
        for part, other in zip(expected, run_prefill(case, guard, **tables)):
            assert same_bytes(part, other), "gathered tables of batch 1"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(8, 2), (7, 1), (3, 3)])
def test_p1_matches_sdpa(guard: Guard, dtype: torch.dtype, causal: bool, heads: tuple[int, int]) -> None:
    """torch's own attention with GQA broadcasting, in float64, as the reference."""
    case = make_case([(75, 0, 75), (75, 0, 75)], dtype=dtype, heads=heads, causal=causal)
    q, k, v = (torch.stack(part).double().transpose(1, 2) for part in (case.q, case.k, case.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    out, _ = run_prefill(case, guard)
    base, _ = case.baseline(guard.device)
    case.check((out, _))
    extra = 20 * max(float(part.abs().max()) for part in case.v)
    assert_within_bound(out, to_numpy(expected.flatten(0, 1)), base, attention_extra=extra)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    for batch, queries, keys in [(0, 4, 4), (2, 0, 5), (2, 3, 0), (2, 0, 0), (0, 0, 0)]:
        q = guard.randn(batch, queries, 4, 64, dtype=dtype)
        k, v = (guard.randn(batch, keys, 2, 64, dtype=dtype) for _ in range(2))
        for causal in (True, False):
            out, lse = gqa_attention_prefill(q, k, v, causal=causal, return_lse=True)
            assert out.shape == q.shape and lse.shape == (batch, 4, queries)
            assert not bool(out.any()) and bool((lse == -math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty_ragged(guard: Guard, dtype: torch.dtype) -> None:
    for lengths in ([], [0], [0, 0, 0]):
        q, k, v = (guard.randn(0, heads, 64, dtype=dtype) for heads in (4, 2, 2))
        offsets = guard.ints(lengths_to_offsets(lengths))
        out, lse = gqa_attention_prefill(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, return_lse=True)
        assert out.shape == (0, 4, 64) and lse.shape == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_rows_past_the_last_sequence(guard: Guard, dtype: torch.dtype) -> None:
    """Rows that belong to no sequence, as in a batch padded to a fixed size, are zero; their keys are never read."""
    case = make_case([(6, 0, 6), (0, 0, 0), (9, 0, 9)], dtype=dtype)
    expected, expected_lse = run_prefill(case, guard, ragged=True, batch_invariant=True)
    poison = torch.full((5, 4, 64), float("nan"), dtype=dtype)
    q = guard.place(torch.cat([*case.q, poison]))
    k, v = (guard.place(torch.cat([*part, poison[:, :2]])) for part in (case.k, case.v))
    offsets = guard.ints(lengths_to_offsets([6, 0, 9]))
    for bound in (None, 9, 100):
        keywords: dict[str, Any] = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "batch_invariant": True}
        if bound is not None:
            keywords |= {"max_seqlen_q": bound, "max_seqlen_k": bound}
        out, lse = gqa_attention_prefill(q, k, v, return_lse=True, **keywords)
        assert same_bytes(out[:15], expected) and same_bytes(lse[:, :15], expected_lse)
        assert not bool(out[15:].any()) and bool((lse[:, 15:] == -math.inf).all())


def test_p1_causal_is_aligned_bottom_right(guard: Guard) -> None:
    """3 queries over 5 keys see 3, 4 and 5 of them; 5 over 3 see none, none, 1, 2 and 3."""
    for queries, keys, counts in [(3, 5, [3, 4, 5]), (5, 3, [0, 0, 1, 2, 3])]:
        q, k = guard.place(torch.zeros(1, queries, 1, 8)), guard.place(torch.zeros(1, keys, 1, 8))
        _, lse = gqa_attention_prefill(q, k, k, return_lse=True)
        assert lse.exp().round().flatten().tolist() == counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_p1_lse_is_optional_and_ragged_offsets_may_be_int64(guard: Guard, dtype: torch.dtype) -> None:
    case = make_case([(7, 0, 7), (72, 0, 72)], dtype=dtype)
    expected, _ = run_prefill(case, guard, ragged=True)
    offsets = guard.ints([0, 7, 79], torch.int64)
    q, k, v = (guard.place(torch.cat(part)) for part in (case.q, case.k, case.v))
    out = gqa_attention_prefill(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    assert isinstance(out, torch.Tensor) and same_bytes(out, expected)
