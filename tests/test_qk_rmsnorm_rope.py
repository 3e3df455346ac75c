"""qk_rmsnorm_rope: the bytes of rmsnorm and rope one after the other, and of transformers' Qwen3."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_graph_replays, assert_same, opcheck
from support.guard import Guard, same_bytes
from support.pairs import pairwise
from torch import Tensor

from gqa_kernels import qk_rmsnorm_rope, rmsnorm, rope, rope_tables, validation

EPS = 1e-6


def tables(guard: Guard, dim: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(dim, rows, base=10000.0)
    return guard.place(cos.to(dtype)), guard.place(sin.to(dtype))


def two_ops(q: Tensor, k: Tensor, weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, **options: Any) -> Any:
    norm = {name: options.pop(name) for name in ("weight_offset", "cast_before_weight") if name in options}
    return rope(rmsnorm(q, weights[0], EPS, **norm), rmsnorm(k, weights[1], EPS, **norm), cos, sin, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dim",
    [*((d, d) for d in (2, 8, 48, 64, 80, 96, 128, 256, 520)), (96, 72), (128, 2), (128, 96), (256, 64)],
)
def test_the_bytes_of_the_two_ops(guard: Guard, dtype: torch.dtype, interleaved: bool, dim: tuple[int, int]) -> None:
    head_dim, rotary_dim = dim
    for (batch, seqlen, heads, kv_heads), weight_dtype, table_dtype in itertools.product(
        [(1, 1, 1, 1), (2, 7, 14, 2), (1, 3, 32, 8), (1, 2, 71, 1)], {dtype, torch.float32}, {dtype, torch.float32}
    ):
        q, k = (guard.randn(batch, seqlen, h, head_dim, dtype=dtype) for h in (heads, kv_heads))
        weights = guard.randn(head_dim, dtype=weight_dtype), guard.randn(head_dim, dtype=weight_dtype)
        cos, sin = tables(guard, rotary_dim, seqlen + 3, table_dtype)
        out = qk_rmsnorm_rope(q, k, *weights, cos, sin, eps=EPS, interleaved=interleaved)
        assert_same(out, two_ops(q, k, weights, cos, sin, interleaved=interleaved), str((heads, weight_dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("cast_before_weight", [True, False])
def test_options(guard: Guard, dtype: torch.dtype, weight_offset: float, cast_before_weight: bool) -> None:
    q, k = guard.randn(2, 5, 6, 64, dtype=dtype), guard.randn(2, 5, 2, 64, dtype=dtype)
    weights = guard.randn(64, dtype=dtype), guard.randn(64, dtype=dtype)
    cos, sin = tables(guard, 64, 16)
    options: dict[str, Any] = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    for index_dtype in (torch.int32, torch.int64):
        ids = guard.ints([[3, 0, 15, 7, 7], [1, 2, 3, 4, 16]], index_dtype)  # the last one is outside the tables
        out = qk_rmsnorm_rope(q, k, *weights, cos, sin, eps=EPS, position_ids=ids, **options)
        expected = two_ops(q, k, weights, cos, sin, position_ids=ids, **options)
        assert bool(out[0][1, 4].isnan().all()) and bool(expected[0][1, 4].isnan().all())
        for a, b in zip(out, expected):
            assert same_bytes(a[0], b[0]) and same_bytes(a[1, :4], b[1, :4])
    gathered = cos[None, :5], sin[None, :5]
    out = qk_rmsnorm_rope(q, k, *weights, *gathered, eps=EPS, **options)
    assert_same(out, two_ops(q, k, weights, *gathered, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_transformers(guard: Guard, dtype: torch.dtype) -> None:
    """Qwen3's q_norm, k_norm and rotation, within the bound of their own error against float64."""
    modeling_qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    norms = [modeling_qwen3.Qwen3RMSNorm(64, eps=EPS).to(guard.device, dtype) for _ in range(2)]
    exact_norms = [modeling_qwen3.Qwen3RMSNorm(64, eps=EPS).double() for _ in range(2)]
    for norm, exact in zip(norms, exact_norms):
        with torch.no_grad():
            norm.weight.copy_(torch.randn(64))
            exact.weight.copy_(norm.weight)
    q, k = guard.randn(2, 19, 8, 64, dtype=dtype), guard.randn(2, 19, 2, 64, dtype=dtype)
    cos, sin = tables(guard, 64, 19, dtype)

    def theirs(q: Tensor, k: Tensor, norms: list[Any], cos: Tensor, sin: Tensor) -> Any:
        twice = [torch.cat([table, table], -1)[None] for table in (cos, sin)]
        heads_first = norms[0](q).transpose(1, 2), norms[1](k).transpose(1, 2)
        return [x.transpose(1, 2) for x in modeling_qwen3.apply_rotary_pos_emb(*heads_first, *twice)]

    with torch.no_grad():
        out = qk_rmsnorm_rope(q, k, norms[0].weight, norms[1].weight, cos, sin, eps=EPS)
        eager = theirs(q, k, norms, cos, sin)
        exact = theirs(q.cpu().double(), k.cpu().double(), exact_norms, cos.cpu().double(), sin.cpu().double())
    for mine, baseline, reference in zip(out, eager, exact):
        assert_within_bound(mine, to_numpy(reference), baseline)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [48, 64])
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype, rotary_dim: int) -> None:
    q, k = torch.randn(3, 5, 4, 64).to(dtype), torch.randn(3, 5, 2, 64).to(dtype)
    weights = guard.randn(64, dtype=dtype), guard.randn(64, dtype=dtype)
    cos, sin = tables(guard, rotary_dim, 5)
    expected = qk_rmsnorm_rope(guard.place(q), guard.place(k), *weights, cos, sin)
    fused = guard.place(torch.cat([q, k, k], 2))
    assert_same(qk_rmsnorm_rope(fused[:, :, :4], fused[:, :, 4:6], *weights, cos, sin), expected)
    heads_first = [guard.place(x.transpose(1, 2)).transpose(1, 2) for x in (q, k)]
    assert_same(qk_rmsnorm_rope(*heads_first, *weights, cos, sin), expected)
    dim_strided = [guard.place(x.transpose(-1, -2)).transpose(-1, -2) for x in (q, k)]
    assert_same(qk_rmsnorm_rope(*dim_strided, *weights, cos, sin), expected)
    for place in itertools.product((0, 1), repeat=4):
        moved = [guard.place(x, offset=offset) for x, offset in zip((q, k, *weights), place)]
        assert_same(qk_rmsnorm_rope(*moved, cos, sin), expected)
    flat = qk_rmsnorm_rope(guard.place(q[0]), guard.place(k[0]), *weights, cos, sin)
    assert_same(flat, [x[0] for x in expected])


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    weight = guard.randn(64, dtype=dtype)
    cos, sin = tables(guard, 64, 4)
    for shape in [(0, 3, 4, 64), (2, 0, 4, 64), (2, 3, 0, 64), (0, 4, 64)]:
        q = guard.randn(*shape, dtype=dtype)
        assert [x.shape for x in qk_rmsnorm_rope(q, q, weight, weight, cos, sin)] == [shape, shape]


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    choices: dict[str, list[Any]] = {
        "interleaved": [False, True],
        "weight_offset": [0.0, 1.0],
        "cast_before_weight": [True, False],
        "position_ids": [None, guard.ints([2, 0, 1])],
    }
    q, k, weight = guard.randn(2, 3, 4, 32, dtype=dtype), guard.randn(2, 3, 2, 32, dtype=dtype), guard.randn(32)
    cos, sin = tables(guard, 32, 3)
    for options in pairwise(choices):
        opcheck(torch.ops.gqa_kernels.qk_rmsnorm_rope.default, (q, k, weight, weight, cos, sin), options)


def test_p6_validation_names_the_position(device: str) -> None:
    q, cos = torch.zeros(2, 3, 1, 16, device=device), torch.zeros(9, 8, device=device)
    ids, weight = torch.tensor([[0, 1, 8], [3, 4, 9]], device=device), torch.ones(16, device=device)
    with validation(), pytest.raises(RuntimeError, match=r"^qk_rmsnorm_rope: position_ids\[1, 2\] must be from 0 to 8"):
        qk_rmsnorm_rope(q, q, weight, weight, cos, cos, position_ids=ids)


def test_p23_graph_replay(gpu: str) -> None:
    q, k = torch.randn(2, 16, 32, 128, device=gpu), torch.randn(2, 16, 8, 128, device=gpu)
    weight, ids = torch.randn(128, device=gpu), torch.arange(16, device=gpu)
    cos, sin = rope_tables(128, 64, base=10000.0, device=gpu)

    def change() -> None:
        q.normal_()
        weight.normal_()
        ids.add_(30)

    assert_graph_replays(lambda: qk_rmsnorm_rope(q, k, weight, weight, cos, sin, position_ids=ids), change)


def test_p7_above_2_31_elements(gpu: str) -> None:
    tokens, heads, dim = 2**31 // (16 * 128) + 5, 16, 128
    cos, sin = rope_tables(dim, 64, base=10000.0, device=gpu)
    ids = torch.arange(tokens, device=gpu, dtype=torch.int32) % 64
    weight = torch.randn(dim, device=gpu, dtype=torch.bfloat16)
    q = torch.empty(tokens, heads, dim, device=gpu, dtype=torch.bfloat16).normal_()
    rows = torch.tensor([0, 1, tokens // 2, tokens - 6, tokens - 5, tokens - 1], device=gpu)
    expected = qk_rmsnorm_rope(q[rows], q[rows, :1], weight, weight, cos, sin, position_ids=ids[rows])
    out = qk_rmsnorm_rope(q, q[:, :1], weight, weight, cos, sin, position_ids=ids)
    assert_same([x[rows] for x in out], expected)
