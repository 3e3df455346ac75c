"""rope and rope_ against float64 NumPy, transformers' apply_rotary_pos_emb and their contract with torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles, assert_graph_replays, assert_same, opcheck
from support.guard import Guard, same_bytes
from support.pairs import pairwise
from torch import Tensor

from gqa_kernels import rope, rope_, rope_tables, validation
from gqa_kernels._library import C

ops = torch.ops.gqa_kernels


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> np.ndarray:
    """Float64, with cos and sin [B or 1, S, R/2]."""
    half = cos.shape[-1]
    x64, c, s = to_numpy(x).copy(), to_numpy(cos)[:, :, None], to_numpy(sin)[:, :, None]
    low = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    high = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x64[..., low].copy(), x64[..., high].copy()
    x64[..., low], x64[..., high] = a * c - b * s, b * c + a * s
    return x64


def eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Each step rounded to the dtype of x, as transformers does."""
    half = cos.shape[-1]
    c, s = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack([a * c + -b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat([a * c + -b * s, b * c + a * s], -1)
    return torch.cat([rotated, rest], -1)


def tables(guard: Guard, dim: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(dim, rows, base=10000.0)
    return guard.place(cos.to(dtype)), guard.place(sin.to(dtype))


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dim", [(2, 2), (8, 8), (64, 64), (80, 80), (96, 72), (128, 128), (128, 2), (128, 96), (256, 64)]
)
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, interleaved: bool, dim: tuple[int, int]) -> None:
    head_dim, rotary_dim = dim
    for (batch, seqlen, heads, kv_heads), table_dtype in itertools.product(
        [(1, 1, 1, 1), (2, 7, 14, 2), (1, 3, 32, 8)], {dtype, torch.float32}
    ):
        q, k = (guard.randn(batch, seqlen, h, head_dim, dtype=dtype) for h in (heads, kv_heads))
        cos, sin = tables(guard, rotary_dim, seqlen + 3, table_dtype)
        rows = cos[None, :seqlen], sin[None, :seqlen]
        for x, out in zip((q, k), rope(q, k, cos, sin, interleaved=interleaved)):
            assert_within_bound(out, reference(x, *rows, interleaved), eager(x, *rows, interleaved))
            assert same_bytes(out[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_p1_magnitudes(guard: Guard, dtype: torch.dtype, scale: float) -> None:
    q = guard.randn(1, 9, 4, 64, dtype=dtype, scale=scale)
    cos, sin = tables(guard, 64, 9)
    out = rope(q, None, cos, sin)
    assert_within_bound(out, reference(q, cos[None], sin[None]), eager(q, cos[None], sin[None]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_transformers(guard: Guard, dtype: torch.dtype) -> None:
    """Equal in float32; in half types, where transformers rounds each step, no farther from the truth than it is."""
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    # transformers keeps heads before tokens, and each angle twice.
    q, k = (guard.randn(2, heads, 19, 64, dtype=dtype) for heads in (8, 2))
    cos, sin = tables(guard, 64, 19, dtype)
    twice = [torch.cat([table, table], -1)[None] for table in (cos, sin)]
    expected = modeling_llama.apply_rotary_pos_emb(q, k, *twice)
    actual = rope(q.transpose(1, 2), k.transpose(1, 2), twice[0][..., :32], twice[1][..., :32])
    for x, out, theirs in zip((q, k), actual, expected):
        x, theirs = x.transpose(1, 2), theirs.transpose(1, 2)
        if dtype == torch.float32:
            assert torch.equal(out, theirs)
        else:
            exact = reference(x, cos[None], sin[None])
            assert np.abs(to_numpy(out) - exact).max() <= np.abs(to_numpy(theirs) - exact).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_p30_positions_to_a_million(guard: Guard, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 4095, 131071, 131072, 524288, 1048575, 1048576])
    cos, sin = (guard.place(table) for table in rope_tables(128, 1048577, base=500000.0))
    q = guard.randn(len(positions), 4, 128, dtype=dtype)
    rows = [table.cpu()[positions].to(guard.device)[None] for table in (cos, sin)]
    for index_dtype in (torch.int32, torch.int64):
        out = rope(q, None, cos, sin, position_ids=guard.place(positions.to(index_dtype)))
        assert_within_bound(out[None], reference(q[None], *rows), eager(q[None], *rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_p30_position_0_is_the_identity(guard: Guard, dtype: torch.dtype, interleaved: bool) -> None:
    q = torch.randn(2, 5, 3, 64).to(dtype)
    q[0, 0, 0, :8] = torch.tensor([0.0, -0.0, 1.0, -1.0, -0.0, 0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max])
    q = guard.place(q)
    cos, sin = tables(guard, 64, 4)
    zeros = guard.ints(torch.zeros(2, 5))
    assert same_bytes(rope(q, None, cos, sin, position_ids=zeros, interleaved=interleaved), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [(64, 64), (128, 96), (96, 72)])
def test_p30_in_place_equals_out_of_place(
    guard: Guard, dtype: torch.dtype, interleaved: bool, dim: tuple[int, int]
) -> None:
    head_dim, rotary_dim = dim
    q, k = (guard.randn(2, 6, heads, head_dim, dtype=dtype) for heads in (6, 2))
    cos, sin = tables(guard, rotary_dim, 6)
    expected = rope(q, k, cos, sin, interleaved=interleaved)
    for offset in (0, 1):
        q2, k2 = (guard.place(x, writable=True, offset=offset) for x in (q, k))
        assert rope_(q2, k2, cos, sin, interleaved=interleaved) is None
        assert_same((q2, k2), expected)
    alone = guard.place(q, writable=True)
    rope_(alone, None, cos, sin, interleaved=interleaved)
    assert same_bytes(alone, expected[0])
    # q and k as slices of one projection, heads first or tokens first; v between canaries stays as it is.
    for heads_first in (False, True):
        fused = torch.cat([q, k, k], 2)
        fused = guard.place(fused.transpose(1, 2) if heads_first else fused, writable=True)
        view = fused.transpose(1, 2) if heads_first else fused
        rope_(view[:, :, :6], view[:, :, 6:8], cos, sin, interleaved=interleaved)
        assert_same((view[:, :, :6], view[:, :, 6:8]), expected)
        assert same_bytes(view[:, :, 8:], k)
        rope_(view[:, :, 8:], view[:, :, 6:8], cos, sin, interleaved=interleaved)  # k before q
        assert same_bytes(view[:, :, 8:], expected[1])


def test_inner_products_depend_on_relative_position(guard: Guard) -> None:
    q, k = guard.randn(1, 1, 1, 64), guard.randn(1, 1, 1, 64)
    cos, sin = tables(guard, 64, 4096)

    def score(m: int, n: int) -> float:
        rotated_q = rope(q, None, cos, sin, position_ids=torch.tensor([m], device=guard.device))
        rotated_k = rope(k, None, cos, sin, position_ids=torch.tensor([n], device=guard.device))
        return float(rotated_q.double().flatten() @ rotated_k.double().flatten())

    # The angles' own rounding, position * eps / 2 for the fastest pair, bounds how far equal distances may differ.
    slack = 4096 * torch.finfo(torch.float32).eps * float(q.norm() * k.norm())
    assert abs(score(7, 3) - score(4087, 4083)) <= slack
    assert abs(score(7, 3) - score(8, 3)) > slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_position_forms_agree(guard: Guard, dtype: torch.dtype) -> None:
    q, k = guard.randn(3, 5, 4, 32, dtype=dtype), guard.randn(3, 5, 2, 32, dtype=dtype)
    cos, sin = tables(guard, 32, 50, dtype)
    expected = rope(q, k, cos, sin)
    default = torch.arange(5)
    for ids in (default, default[None], default.repeat(3, 1), default[None].expand(3, 5)):
        for index_dtype in (torch.int32, torch.int64):
            position_ids = ids.to(guard.device, index_dtype)
            assert_same(rope(q, k, cos, sin, position_ids=position_ids), expected)
    wide = torch.stack([default, default + 9], -1).to(guard.device)
    assert_same(rope(q, k, cos, sin, position_ids=wide[..., 0]), expected)  # a strided view
    assert_same(rope(q, k, cos[None, :5], sin[None, :5]), expected)
    assert_same(rope(q, k, cos[:5].expand(3, 5, 16), sin[:5].expand(3, 5, 16)), expected)
    # Each row of the batch its own positions; then the same tokens as one ragged run.
    ids = torch.tensor([[4, 3, 2, 1, 0], [9, 9, 9, 9, 9], [45, 46, 47, 48, 49]], device=guard.device)
    expected = rope(q, k, cos, sin, position_ids=ids)
    assert not same_bytes(expected[0], rope(q, k, cos, sin)[0])
    assert_same(rope(q, k, cos[ids], sin[ids]), expected)
    flat = rope(q.flatten(0, 1), k.flatten(0, 1), cos, sin, position_ids=ids.flatten())
    assert_same(flat, [x.flatten(0, 1) for x in expected])
    gathered = rope(q.flatten(0, 1), k.flatten(0, 1), cos[ids.flatten()][None], sin[ids.flatten()][None])
    assert_same(gathered, flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_p6_bad_positions_become_nan(guard: Guard, dtype: torch.dtype, interleaved: bool) -> None:
    table = torch.full((12, 24), float("nan"))  # poison around the 8 rows that may be read
    table[2:10] = torch.randn(8, 24)
    cos = guard.place(table)[2:10]
    q, k = guard.randn(2, 4, 3, 64, dtype=dtype), guard.randn(2, 4, 1, 64, dtype=dtype)
    good = torch.tensor([[0, 1, 2, 7], [3, 3, 0, 5]])
    for index_dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(index_dtype)
        for bad in (-1, 8, 10**6, limits.min, limits.max):
            ids = good.to(index_dtype, copy=True)
            ids[1, 2] = bad
            clean = rope(q, k, cos, cos, position_ids=guard.place(good.to(index_dtype)), interleaved=interleaved)
            out = rope(q, k, cos, cos, position_ids=guard.place(ids), interleaved=interleaved)
            in_place = [guard.place(x, writable=True) for x in (q, k)]
            rope_(*in_place, cos, cos, position_ids=guard.place(ids), interleaved=interleaved)
            for got, in_place_got, want, x in zip(out, in_place, clean, (q, k)):
                assert same_bytes(got, in_place_got)
                assert bool(got[1, 2, :, :48].isnan().all()) and same_bytes(got[1, 2, :, 48:], x[1, 2, :, 48:])
                keep = torch.ones(2, 4, dtype=torch.bool)
                keep[1, 2] = False
                assert same_bytes(got[keep], want[keep]) and not bool(want.isnan().any())
    empty = rope(q, None, cos[:0], cos[:0], position_ids=guard.place(good))
    assert bool(empty[..., :48].isnan().all())


def test_p6_validation_names_the_position(device: str) -> None:
    q, cos = torch.zeros(2, 3, 1, 16, device=device), torch.zeros(9, 8, device=device)
    ids = torch.tensor([[0, 1, 8], [3, 4, 9]], device=device)
    with validation():
        rope(q, None, cos, cos, position_ids=ids[:1])
        with pytest.raises(RuntimeError, match=r"^rope: position_ids\[1, 2\] must be from 0 to 8, got 9$"):
            rope(q, None, cos, cos, position_ids=ids)
        with pytest.raises(RuntimeError, match=r"^rope_: position_ids\[0\] must be from 0 to 8, got -1$"):
            rope_(q, None, cos, cos, position_ids=ids[0] - 1)
    rope(q, None, cos, cos, position_ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p8_nan_stays_in_its_pair(guard: Guard, dtype: torch.dtype) -> None:
    q = torch.randn(1, 3, 2, 64).to(dtype)
    cos, sin = tables(guard, 64, 3)
    clean = rope(guard.place(q), None, cos, sin)
    q[0, 1, 1, 5] = float("nan")
    out = rope(guard.place(q), None, cos, sin)
    changed = torch.zeros(1, 3, 2, 64, dtype=torch.bool)
    changed[0, 1, 1, [5, 37]] = True
    assert torch.equal(out.isnan().cpu(), changed)
    assert same_bytes(out[~changed], clean[~changed])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    cos, sin = tables(guard, 64, 4)
    for shape in [(0, 3, 4, 64), (2, 0, 4, 64), (2, 3, 0, 64), (0, 4, 64)]:
        q = guard.randn(*shape, dtype=dtype)
        assert rope(q, None, cos, sin).shape == shape
        rope_(q, None, cos, sin)
    q, k = guard.randn(2, 3, 0, 64, dtype=dtype), guard.randn(2, 3, 2, 64, dtype=dtype)
    assert same_bytes(rope(q, k, cos, sin)[1], rope(k, q, cos, sin)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_p2_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype, interleaved: bool) -> None:
    options: dict[str, Any] = {"interleaved": interleaved}
    q, k = torch.randn(3, 5, 4, 64).to(dtype), torch.randn(3, 5, 2, 64).to(dtype)
    cos, sin = tables(guard, 48, 5)
    expected = rope(guard.place(q), guard.place(k), cos, sin, **options)

    def views(x: Tensor) -> dict[str, Tensor]:
        poison = torch.full_like(x, float("nan"))  # P2: what lies between the strides is never read
        return {
            "heads first": guard.place(x.transpose(1, 2)).transpose(1, 2),
            "sliced": guard.place(torch.cat([x, poison], -1))[..., :64],
            "between heads": guard.place(torch.cat([poison, x, poison], 2))[:, :, x.shape[2] : 2 * x.shape[2]],
            "misaligned": guard.place(x, offset=1),
            "odd strides": guard.place(torch.cat([poison[..., :3], x], -1))[..., 3:],
            "last dimension strided": guard.place(x.transpose(-1, -2)).transpose(-1, -2),
        }

    for (name, q_view), k_view in zip(views(q).items(), views(k).values()):
        assert_same(rope(q_view, k_view, cos, sin, **options), expected, name)
    expanded = guard.place(q[:1]).expand(3, 5, 4, 64)
    assert same_bytes(rope(expanded, None, cos, sin, **options)[2], expected[0][0])
    for name, (c, s) in {
        "misaligned": (guard.place(cos, offset=1), guard.place(sin, offset=1)),
        "unlike": (cos, guard.place(torch.cat([sin, sin], -1))[:, :24]),
        "transposed": (guard.place(cos.T).T, guard.place(sin.T).T),
        "sliced": tuple(guard.place(torch.cat([t, t], -1))[:, :24] for t in (cos, sin)),
    }.items():
        assert_same(rope(guard.place(q), guard.place(k), c, s, **options), expected, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p3_in_place_writes_only_its_heads(guard: Guard, dtype: torch.dtype) -> None:
    buffer = torch.randn(2, 5, 9, 80).to(dtype)
    cos, sin = tables(guard, 64, 5)
    placed = guard.place(buffer, writable=True)
    rope_(placed[:, 1:4, 2:6, 8:72], placed[:, 1:4, 7:8, 8:72], cos, sin)
    inside = torch.zeros(buffer.shape, dtype=torch.bool)
    inside[:, 1:4, 2:6, 8:72] = inside[:, 1:4, 7:8, 8:72] = True
    before = buffer.to(guard.device)
    assert same_bytes(placed[~inside], before[~inside])
    assert same_bytes(placed[:, 1:4, 2:6, 8:72], rope(before[:, 1:4, 2:6, 8:72], None, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["rope", "rope_"])
def test_p16_opcheck(guard: Guard, dtype: torch.dtype, op: str) -> None:
    for pattern in pairwise(
        {
            "tables": ["table", "gathered"],
            "ids": [None, "tokens", "batch"],
            "k": [True, False],
            "interleaved": [False, True],
            "ragged": [False, True],
            "heads_first": [False, True],
            "float32": [False, True],
        }
    ):
        q, k = (guard.randn(2, heads, 3, 32, dtype=dtype, writable=True).transpose(1, 2) for heads in (4, 2))
        if not pattern["heads_first"]:
            q, k = (guard.place(x, writable=True) for x in (q, k))
        ids = {None: None, "tokens": guard.ints([1, 0, 7]), "batch": guard.ints([[1, 2, 3], [0, 6, 7]])}[pattern["ids"]]
        cos, sin = tables(guard, 32, 8, torch.float32 if pattern["float32"] else dtype)
        if pattern["ragged"]:
            q, k, ids = q[0], k[0], ids[0] if ids is not None and ids.dim() == 2 else ids
        if pattern["tables"] == "gathered":
            cos, sin, ids = cos[None, :3], sin[None, :3], None
        options = {"position_ids": ids, "interleaved": pattern["interleaved"]}
        opcheck(getattr(ops, op).default, (q, k if pattern["k"] else None, cos, sin), options)


@pytest.mark.abi
def test_p17_compile(guard: Guard) -> None:
    q, k = guard.randn(2, 6, 4, 32), guard.randn(2, 6, 2, 32)
    cos, sin = tables(guard, 32, 64)
    ids = guard.ints(torch.arange(12).view(2, 6))
    assert_compiles(rope, q, k, cos, sin)
    assert_compiles(lambda *args: rope(*args, position_ids=ids), q, None, cos, sin)

    def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q * 2, k * 2
        rope_(q, k, cos, sin, position_ids=ids, interleaved=True)
        return q, k

    assert_compiles(in_place, q, k)


def test_p17_no_recompilation_per_length(guard: Guard) -> None:
    cos, sin = tables(guard, 32, 64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: rope(q, None, cos, sin), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(guard.randn(2, 6, 4, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 30, 64):
            q = guard.randn(2, tokens, 4, 32)
            assert same_bytes(compiled(q), rope(q, None, cos, sin))


def test_p19_p20_misuse(device: str) -> None:
    q, k = torch.randn(2, 3, 4, 32, device=device), torch.randn(2, 3, 2, 32, device=device)
    cos = torch.randn(8, 16, device=device)
    ids = torch.zeros(2, 3, dtype=torch.int32, device=device)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((q[0, 0], None, cos, cos), {}, "q must be [batch, tokens, heads, head_dim] or [tokens, heads, head_dim], got"),
        ((q.double(), None, cos, cos), {}, "q must be float32, float16 or bfloat16, got float64"),
        ((q, k[0], cos, cos), {}, "k must have the shape of q [2, 3, 4, 32] but for the number of heads, got"),
        ((q, k[:, :2], cos, cos), {}, "k must have the shape of q"),
        ((q, k.half(), cos, cos), {}, "k must have the dtype of q (float32), got float16"),
        ((q, k, cos[0], cos), {}, "cos must be a table [positions, R/2] or gathered [batch or 1, tokens, R/2], got"),
        ((q, k, cos.half(), cos), {}, "cos must be float32 or have the dtype of q (float32), got float16"),
        ((q, k, cos, cos[:7]), {}, "sin must have the shape of cos [8, 16], got [7, 16]"),
        ((q.half(), None, cos, cos.half()), {}, "sin must have the dtype of cos (float32), got float16"),
        ((q, k, *[torch.cat([cos, cos], -1)] * 2), {}, "cos must hold R/2 angles, one per pair"),
        ((q, k, cos[:, :0], cos[:, :0]), {}, "cos must hold R/2 angles, one per pair"),
        ((q, k, cos[:2], cos[:2]), {}, "cos must have at least one row for each of the 3 tokens where position_ids"),
        (
            (q, k, *[cos[None, :4]] * 2),
            {},
            "cos must have shape [batch or 1, tokens, R/2] = [1, 3, 16], got [1, 4, 16]",
        ),
        ((q, k, *[cos[None, :3].expand(5, 3, 16)] * 2), {}, "cos must have shape [batch or 1, tokens, R/2]"),
        ((q, k, *[cos[None, :3]] * 2), {"position_ids": ids}, "position_ids must be None where cos is gathered"),
        ((q, k, cos, cos), {"position_ids": ids.float()}, "position_ids must be int32 or int64, got float32"),
        ((q, k, cos, cos), {"position_ids": ids[:, :2]}, "position_ids must have shape [batch, tokens] = [2, 3]"),
        ((q, k, cos, cos), {"position_ids": ids.flatten()}, "position_ids must have shape [batch, tokens] = [2, 3]"),
        ((q, k, cos, cos), {"position_ids": ids[0, 0]}, "position_ids must have shape [batch, tokens] = [2, 3]"),
        ((q.clone().requires_grad_(), k, cos, cos), {}, "q must not require grad, got requires_grad=True"),
    ]
    for function in (rope, rope_):
        for args, kwargs, message in cases:
            with pytest.raises(RuntimeError) as error:
                function(*args, **kwargs)
            assert str(error.value).startswith(f"{function.__name__}: {message}"), error.value
    in_place: list[tuple[tuple[Tensor, Tensor | None], str]] = [
        ((q.transpose(-1, -2).contiguous().transpose(-1, -2), None), "q must be contiguous in its last dimension"),
        ((q[:1].expand(2, 3, 4, 32), None), "q must have no two elements in one place of memory"),
        ((q, k[:, :1].expand(2, 3, 2, 32)), "k must have no two elements in one place of memory"),
        ((q.flatten().as_strided((2, 3, 4, 32), (100, 32, 96, 1)), None), "q must have no two elements in one place"),
        ((q, q), "k must lie apart from q in memory"),
        ((q[:, :, :3], q[:, :, 2:]), "k must lie apart from q in memory"),
    ]
    for (a, b), message in in_place:
        with pytest.raises(RuntimeError) as error:
            rope_(a, b, cos, cos)
        assert str(error.value).startswith(f"rope_: {message}"), error.value
    assert bool(rope(q, None, cos, cos).isfinite().all())  # still healthy


def test_p19_device_mismatch(gpu: str) -> None:
    q, cos = torch.randn(2, 3, 4, 32, device=gpu), torch.randn(8, 16, device=gpu)
    ids = torch.arange(3)
    for args, ids_given, name in [
        ((q, q.cpu(), cos, cos), None, "k"),
        ((q, None, cos.cpu(), cos), None, "cos"),
        ((q, None, cos, cos.cpu()), None, "sin"),
        ((q, None, cos, cos), ids, "position_ids"),
    ]:
        with pytest.raises(RuntimeError, match=f"rope: {name} must be on the device of"):
            rope(*args, position_ids=ids_given)


def test_p22_in_place_neither_allocates_nor_synchronises(gpu: str) -> None:
    q, k = torch.randn(4, 64, 32, 128, device=gpu), torch.randn(4, 64, 8, 128, device=gpu)
    cos, sin = rope_tables(128, 64, base=10000.0, device=gpu)
    ids = torch.arange(64, device=gpu)
    rope_(q, k, cos, sin, position_ids=ids)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            rope_(q, k, cos, sin, position_ids=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_plan_takes_vectors_where_all_is_aligned() -> None:
    """The choice of kernel is made of integers: it is tested, and explained, without a GPU."""
    q, k = torch.zeros(2, 9, 6, 128), torch.zeros(2, 9, 2, 128)
    cos = torch.zeros(9, 64)

    def launch(*args: Tensor | None) -> dict[str, Any]:
        C.explain_begin("cuda", 90, 132, 232448, 62914560)
        rope(*args)
        (plan,) = C.explain_end()
        (only,) = plan["launches"]
        return dict(only)

    aligned = launch(q, k, cos, cos)
    assert (aligned["kernel"], aligned["grid"][1] * aligned["block"][2] >= 18) == ("rope_dense", True)
    assert launch(torch.cat([q, k], 2)[:, :, :6], k, cos, cos)["kernel"] == "rope_dense"
    assert launch(q.transpose(1, 2).contiguous().transpose(1, 2), None, cos, cos)["kernel"] == "rope_vector"
    assert launch(q, torch.cat([k, k])[::2], cos, cos)["kernel"] == "rope_vector"
    assert launch(q, k, cos[:, :60], cos[:, :60])["kernel"] == "rope_vector"  # 60 pairs of float32 are 15 vectors
    assert launch(q.half(), k.half(), cos[:, :60], cos[:, :60])["kernel"] == "rope_scalar"
    misaligned = torch.zeros(2 * 9 * 6 * 128 + 1)[1:].view(2, 9, 6, 128)
    assert launch(misaligned, k, cos, cos)["kernel"] == "rope_scalar"
    assert launch(q, k, cos[:, 1:9], cos[:, 1:9])["kernel"] == "rope_scalar"
    for heads, dim in itertools.product((1, 7, 32, 40, 71, 80, 256), (8, 64, 96, 192, 224, 256)):
        plan = launch(torch.zeros(1, 3, heads, dim), None, torch.zeros(3, dim // 2), torch.zeros(3, dim // 2))
        x, y, z = plan["block"]
        dense = dim >= 64 or dim == 8
        assert plan["kernel"] == ("rope_dense" if dense else "rope_scalar")
        assert x * y * z <= (160 if dense else 320) and z <= 64
        parts, tokens = plan["grid"][0] if dense else 1, plan["grid"][1 if dense else 0]
        assert tokens * z >= 3 and (parts * y >= heads or not dense)


def test_p23_graph_replay(gpu: str) -> None:
    q, k = torch.randn(2, 16, 32, 128, device=gpu), torch.randn(2, 16, 8, 128, device=gpu)
    cos, sin = rope_tables(128, 64, base=10000.0, device=gpu)
    ids = torch.arange(16, device=gpu)

    def change() -> None:
        q.normal_()
        ids.add_(30)

    assert_graph_replays(lambda: rope(q, k, cos, sin, position_ids=ids), change)


def test_p7_above_2_31_elements(gpu: str) -> None:
    tokens, heads, dim = 2**31 // (16 * 128) + 5, 16, 128
    cos, sin = rope_tables(dim, 64, base=10000.0, device=gpu)
    ids = torch.arange(tokens, device=gpu, dtype=torch.int32) % 64
    q = torch.empty(tokens, heads, dim, device=gpu, dtype=torch.bfloat16).normal_()
    rows = torch.tensor([0, 1, tokens // 2, tokens - 6, tokens - 5, tokens - 4, tokens - 1], device=gpu)
    expected = rope(q[rows], None, cos, sin, position_ids=ids[rows])
    rope_(q, None, cos, sin, position_ids=ids)
    assert same_bytes(q[rows], expected)
    wide = q.flatten()[: 2**31 + 4096].as_strided((3, 1, 1, dim), (2**30, dim, dim, 1))
    assert same_bytes(rope(wide, None, cos, sin), rope(wide.contiguous(), None, cos, sin))
