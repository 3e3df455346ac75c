"""Extreme inputs, exact answers and metamorphic relations of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.attention import Case, Result, make_case
from support.attention_layout import build_cache, run_cached, run_prefill
from support.attention_padded import seen_keys
from support.bounds import DTYPES, assert_within_bound
from support.guard import Guard, same_bytes
from support.kernels import hopper
from torch import Tensor

Function = Callable[[Case, Guard], Result]


def _prefill(case: Case, guard: Guard) -> Result:
    return run_prefill(case, guard)


def _decode(case: Case, guard: Guard) -> Result:
    over = case.change(new=[0] * case.batch)
    return run_cached(over, guard, build_cache(over, guard), decode=True)


def _paged_prefill(case: Case, guard: Guard) -> Result:
    over = case.change(new=[0] * case.batch)
    return run_cached(over, guard, build_cache(over, guard, page_size=16))


@dataclass(frozen=True)
class Run:
    """A way to compute a case. ``queries``: as many as a Hopper kernel wants, 0 for as many as the test likes."""

    function: Function
    head_dim: int
    queries: int = 0
    for_hopper: bool = True

    def __call__(self, case: Case, guard: Guard) -> Result:
        if not self.for_hopper or case.dtype == torch.float32:
            return self.function(case, guard)
        with hopper(guard.device):
            return self.function(case, guard)

    def __str__(self) -> str:
        rows = f" of {self.queries}" if self.queries else ""
        return f"{self.function.__name__[1:]}{rows} D{self.head_dim}"


FEW = [Run(function, 32, for_hopper=False) for function in (_prefill, _decode, _paged_prefill)]
TILES = [Run(_prefill, dim, 80) for dim in (64, 96, 128, 256)]
RINGS = [Run(_decode, dim, 1) for dim in (64, 96, 128, 256)]
RUNS = {"cpu": [*FEW, TILES[0]], "cuda": [*FEW, *TILES, Run(_paged_prefill, 128, 80), *RINGS]}
RUNS["cuda portable"] = [*TILES, RINGS[2]]
# float32 has kernels of its own, that do not care about the number of rows.
COMBINATIONS = [
    (dtype, device, run) for device in RUNS for run in RUNS[device] for dtype in (DTYPES if run in FEW else DTYPES[1:])
]
every_run = pytest.mark.parametrize(
    "dtype, device, run",
    COMBINATIONS,
    indirect=["device"],
    ids=[f"{device}-{run}-{str(dtype)[6:]}" for dtype, device, run in COMBINATIONS],
)


def square(dtype: torch.dtype, run: Run, queries: int = 8, keys: int = 150, heads: tuple[int, int] = (4, 2)) -> Case:
    """As many queries as the run wants, and as many more keys: the first sees as many as it would."""
    more = run.queries - queries if run.queries else 0
    return make_case([(queries + more, 0, keys + more)] * 2, dtype=dtype, heads=heads, head_dim=run.head_dim)


@every_run
@pytest.mark.parametrize("scale_q, scale_v", [(1e-4, 1.0), (1.0, 1e-4), (30.0, 1.0), (1.0, 1e4), (1e-7, 1e-7)])
def test_p1_magnitudes(guard: Guard, dtype: torch.dtype, run: Run, scale_q: float, scale_v: float) -> None:
    case = square(dtype, run)
    case = case.change(q=[q * scale_q for q in case.q], v=[v * scale_v for v in case.v])
    case.check(run(case, guard))


@every_run
@pytest.mark.parametrize("kind", ["uniform", "alternating", "constant"])
def test_p1_distributions(guard: Guard, dtype: torch.dtype, run: Run, kind: str) -> None:
    case = square(dtype, run)
    for part in (*case.q, *case.k, *case.v):
        if kind == "uniform":
            part.copy_(torch.rand(part.shape))
        elif kind == "alternating":
            part.copy_(part.abs() * (1 - 2 * (torch.arange(part.shape[-1]) % 2)))
        else:
            part.fill_(0.5)
    case.check(run(case, guard))


@every_run
def test_p1_zero_scale_is_the_mean(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    case = square(dtype, run).change(scale=0.0)
    case.check(run(case, guard))
    counting = case.change(v=[torch.ones_like(v) for v in case.v])
    counting.check(run(counting, guard))


@every_run
def test_p1_one_key_dominates_at_every_position(
    request: pytest.FixtureRequest, guard: Guard, dtype: torch.dtype, run: Run
) -> None:
    """A logit of 1e4 among others far below, down to -1e4: out is that key's value, wherever the key stands."""
    if guard.device == "cuda" and dtype == torch.float16 and run.head_dim == 96 and run.function is _prefill:
        why = "the highest weight is 2^(s c - round(m c)), here 1.0003: out is off by 1 ulp, and eager exact"
        request.applymarker(pytest.mark.xfail(strict=True, reason=why))
    queries, dim = run.queries or 16, run.head_dim
    step = 160 // queries  # row j of sequence b looks at key step * j + b
    case = make_case([(queries, 0, 160)] * step, dtype=dtype, heads=(2, 1), head_dim=dim, scale=1.0)
    for b in range(step):
        codes = (torch.randint(0, 2, (160, dim)) * 2 - 1).to(dtype)
        case.k[b][:, 0] = codes * 20
        case.q[b][:] = codes[b::step, None] * (512 / dim)
    case.check(run(case, guard))


@every_run
def test_p1_logits_at_the_end_of_the_range(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """Logits of 1e11 in float16 and 3e31 otherwise, of either sign: equal ones average, whatever their size."""
    case = square(dtype, run, queries=1, keys=64).change(scale=1.0)
    for sign in (1.0, -1.0):
        for b in range(2):
            # Each row of a size of its own: of equal ones the errors would be one error.
            case.q[b].copy_(biggest(dtype) * (1 - torch.rand(*case.q[b].shape[:2], 1) / 2))
            case.k[b].fill_(sign * biggest(dtype))
            case.v[b].fill_(0.25)
        out, lse = run(case, guard)
        assert bool((out == 0.25).all()), sign
        expected = case.change().reference()[1]
        eager = torch.cat([eager_lse(case, b, guard.device) for b in range(2)], 1)
        assert_within_bound(lse, expected, eager, attention_extra=float(abs(expected).max()))


def eager_lse(case: Case, b: int, device: str) -> Tensor:
    """As plain PyTorch has it whose scores are float32, as 16 bits do not hold these; by the tensor cores of a GPU."""
    q, k = (part[b].to(device).transpose(0, 1) for part in (case.q, case.k))
    k = k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
    if device == "cuda" and case.dtype != torch.float32:
        scores = torch.bmm(q, k, out_dtype=torch.float32)
    else:
        scores = q.float() @ k.float()
    return torch.logsumexp(scores.masked_fill(~seen_keys(case, range(b, b + 1), device)[0], -math.inf), -1)


def biggest(dtype: torch.dtype) -> float:
    return 65504.0 if dtype == torch.float16 else 1e15


@every_run
def test_p10_masked_key_never_dominates(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """The lowest visible logits there are lose to no finite mask value."""
    case = square(dtype, run, keys=40).change(scale=1.0)
    for b in range(2):
        case.q[b].fill_(biggest(dtype))
        case.k[b].fill_(-biggest(dtype))
        case.v[b].fill_(1.0)
        case.k[b][34:] = biggest(dtype)
        case.v[b][34:] = -1.0
    out, _ = run(case, guard)
    rows = out.unflatten(0, (2, -1))
    assert bool((rows[:, :2] > 0).all()) and bool((rows[:, 2:] < 0).all())


@every_run
def test_p1_scaling_values_scales_out(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """By a power of two: bit for bit, away from denormals."""
    case = square(dtype, run)
    case = case.change(v=[v * 1024 for v in case.v])
    out, lse = run(case, guard)
    double, same = run(case.change(v=[v * 4 for v in case.v]), guard)
    usual = out.abs() >= torch.finfo(dtype).tiny  # the odd result of values that cancel is not
    assert torch.equal(double[usual], (out * 4)[usual]) and same_bytes(same, lse)
    assert bool(usual.float().mean() > 0.99)


@every_run
def test_p1_equal_values_come_back(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    case = square(dtype, run)
    row = torch.randn(2, run.head_dim).to(dtype)
    case = case.change(v=[row.expand_as(v).clone() for v in case.v])
    case.check(run(case, guard))


@every_run
def test_p1_keys_in_any_order(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """Without a mask the order of keys does not matter, within P1's bound."""
    case = square(dtype, run, queries=1).change(causal=False)
    order = torch.randperm(len(case.k[0]))
    turned = case.change(k=[k[order] for k in case.k], v=[v[order] for v in case.v])
    case.check(run(turned, guard))


@every_run
@pytest.mark.parametrize("group", [2, 7])
def test_p1_duplicated_kv_heads_are_gqa(guard: Guard, dtype: torch.dtype, run: Run, group: int) -> None:
    """MHA over repeated KV heads, within P1's bound of the same answer; out of grouped heads alike."""
    case = square(dtype, run, heads=(2 * group, 2))

    def repeat(parts: list[Tensor]) -> list[Tensor]:
        return [part.repeat_interleave(group, 1) for part in parts]

    mha = case.change(k=repeat(case.k), v=repeat(case.v))
    case.check(run(mha, guard), "MHA")
    case.check(run(case, guard), "GQA")


@every_run
def test_p11_equal_query_heads_give_equal_bytes(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """Heads of one group with the same query: where a head sits in its group does not matter."""
    case = square(dtype, run, heads=(14, 2))
    case = case.change(q=[q[:, :1].repeat(1, 14, 1) for q in case.q], k=[k[:, :1].repeat(1, 2, 1) for k in case.k])
    case = case.change(v=[v[:, :1].repeat(1, 2, 1) for v in case.v])
    out, lse = run(case, guard)
    assert same_bytes(out, out[:, :1].repeat(1, 14, 1)) and same_bytes(lse, lse[:1].repeat(14, 1))


@every_run
def test_p1_sinks_take_their_share(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    """A sink of -inf is none; one equal to lse halves out; one far above takes all."""
    case = square(dtype, run, queries=1, heads=(2, 1))
    out, lse = run(case, guard)
    none, same = run(case.change(sinks=torch.full((2,), -math.inf)), guard)
    assert same_bytes(none, out) and same_bytes(same, lse)
    one = case.pick([0])
    half = one.change(sinks=run(one, guard)[1][:, 0].cpu())
    half.check(run(half, guard))
    drowned = case.change(sinks=torch.full((2,), 1e4))
    drowned.check(run(drowned, guard))


@every_run
def test_p1_softcap_bounds_the_logits(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    case = square(dtype, run).change(scale=100.0, softcap=1.5)
    case.check(run(case, guard))


@every_run
def test_p14_repeatable(guard: Guard, dtype: torch.dtype, run: Run) -> None:
    case = square(dtype, run, queries=2, keys=333, heads=(8, 2))
    first = run(case, guard)
    for _ in range(20 if guard.device == "cuda" else 3):
        for part, other in zip(run(case, guard), first):
            assert same_bytes(part, other)
