"""What only the portable attention kernels do: bases that stay behind the maximum, a second pass, blocks of 32 rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.attention import Case, Result, make_case
from support.attention_layout import build_cache, run_cached, run_prefill
from support.guard import Guard, same_bytes
from test_plans import GPUS, decode, plan_for, splits, wide

from gqa_kernels._library import C

DTYPES = [torch.float16, torch.bfloat16]
# Query tokens and heads: tiles of 16, 32 and many rows.
TILES = {"16 rows": (4, (8, 2)), "32 rows": (4, (14, 2)), "many rows": (90, (4, 2))}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_tile = pytest.mark.parametrize("tile", TILES)
every_head_dim = pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
devices = pytest.mark.parametrize("device", ["cpu", "cuda portable"], indirect=True)


def tile_case(tile: str, dtype: torch.dtype, head_dim: int, keys: int = 300, **options: object) -> Case:
    queries, heads = TILES[tile]
    return make_case([(queries, 0, keys)] * 2, dtype=dtype, heads=heads, head_dim=head_dim, **options)


def run(case: Case, guard: Guard) -> Result:
    if len(case.q[0]) > 16:
        return run_prefill(case, guard)
    over = case.change(new=[0] * case.batch)
    return run_cached(over, guard, build_cache(over, guard), decode=True)


@devices
@every_dtype
@every_head_dim
@every_tile
@pytest.mark.parametrize("trend", ["up", "down", "jump"])
def test_p1_scores_with_a_trend(guard: Guard, dtype: torch.dtype, head_dim: int, tile: str, trend: str) -> None:
    """Scores that climb by 60 along the keys, or fall, or climb at one key: bases move often, never or once."""
    case = tile_case(tile, dtype, head_dim)
    slope = torch.linspace(-30, 30, 300) if trend != "jump" else 40.0 * (torch.arange(300) == 170)
    for b in range(2):
        case.q[b][..., 0] = 2.0
        case.k[b][..., 0] = (slope * (-1 if trend == "down" else 1) * head_dim**0.5 / 2)[:, None]
    case.check(run(case, guard), trend)


@devices
@every_dtype
@every_head_dim
@every_tile
def test_p15_loud_rows_leave_their_neighbours_alone(guard: Guard, dtype: torch.dtype, head_dim: int, tile: str) -> None:
    """Bit for bit: what one row's scores ask for is done to that row only."""
    case = tile_case(tile, dtype, head_dim)
    out, lse = run(case, guard)
    for factor in (8.0, 3000.0):
        loud = case.change(q=[q.clone() for q in case.q])
        for q in loud.q:
            q[::2, 1::2] *= factor
        other, same = run(loud, guard)
        quiet = torch.ones(len(out), out.shape[1], dtype=torch.bool)
        for start in range(0, len(out), len(case.q[0])):
            quiet[start : start + len(case.q[0]) : 2, 1::2] = False
        assert same_bytes(out.cpu()[quiet], other.cpu()[quiet]), factor
        assert same_bytes(lse.cpu().T[quiet], same.cpu().T[quiet]), factor


@devices
@every_dtype
@every_head_dim
@every_tile
def test_p8_values_out_of_sight_may_be_anything(guard: Guard, dtype: torch.dtype, head_dim: int, tile: str) -> None:
    """Rows that do not see a NaN keep their bytes; those that do become NaN, in its columns."""
    case = tile_case(tile, dtype, head_dim)
    out, _ = run(case, guard)
    queries = len(case.q[0])
    poisoned = case.change(v=[v.clone() for v in case.v])
    for v in poisoned.v:
        v[300 - queries // 2, :, 3::5] = float("nan")
    other, _ = run(poisoned, guard)
    sees = (torch.arange(2 * queries) % queries >= queries - queries // 2)[:, None, None]
    column = (torch.arange(head_dim) % 5 == 3)[None, None]
    hit = (sees & column).expand(out.shape)
    assert bool(other.cpu()[hit].isnan().all())
    assert same_bytes(out.cpu()[~hit], other.cpu()[~hit])


@pytest.fixture
def portable() -> Iterator[None]:
    C.set_kernel_override(1)
    yield
    C.set_kernel_override(0)


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("gpu", GPUS)
def test_blocks_of_warps_that_divide_the_keys_take_32_rows(gpu: str) -> None:
    for heads, seqlen, few in (((16, 1), 1, True), ((32, 1), 1, True), ((32, 8), 8, True), ((33, 1), 1, False)):
        launch = decode(2, 4096, heads=heads, seqlen=seqlen, gpu=gpu)["launches"][0]
        assert launch["kernel"] == ("attend_few_rows" if few else "attend_many_rows"), (heads, seqlen)


@pytest.mark.usefixtures("portable")
def test_short_prefill_is_not_split() -> None:
    """128 blocks of 128 rows on 132 SMs; over a long prefix they are worth splitting."""
    q, k = wide(1, 512, 32, 128), wide(1, 512, 8, 128)
    assert splits(plan_for(GPUS["H200"], "gqa_attention_prefill", q, k, k)) == 1
    cache, lengths = wide(1, 16384, 8, 128), torch.zeros(1, dtype=torch.int32)
    assert (
        splits(plan_for(GPUS["H200"], "gqa_attention_prefill", q, None, None, cache, cache, cache_seqlens=lengths)) > 1
    )
