"""sample against its definition in NumPy, float64 softmax, and its promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES
from support.guard import Guard, same_bytes
from support.sampling import distribution, filtered64, mul_high, philox, softmax64
from torch import Tensor

from gqa_kernels import sample

INF, NAN = float("inf"), float("nan")
on_every_kernel = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 100, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 0.95},
]
# A temperature whose scale log2(e) / temperature is exactly 1: logits are then exact base-2 logarithms.
LOG2 = float(np.float32(1.44269504))


def rows_of(logits: Tensor, count: int) -> Tensor:
    return logits.expand(count, logits.shape[-1])


def heavy_tail(vocab: int) -> Tensor:
    return -1.5 * torch.log(torch.arange(1, vocab + 1, dtype=torch.float32))


def assert_defined(guard: Guard, logits: Tensor, count: int, seed: int, **settings: Any) -> None:
    """``count`` draws from one row are the definition's, token for token and log-probability for log-probability."""
    offsets = torch.arange(count)
    ids, logprob = sample(
        rows_of(logits, count), seed=seed, offset=guard.place(offsets), return_logprob=True, **settings
    )
    row = distribution(logits.float().cpu().numpy(), **settings)
    expected = row.draw(*philox(seed, offsets.numpy(), 0))
    np.testing.assert_array_equal(ids.cpu().numpy(), expected)
    exact = np.log(row.probabilities()[expected])
    assert bool((np.abs(logprob.cpu().numpy() - exact) <= 2e-7 * np.abs(exact) + 1e-12).all())


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of the chi-square statistic."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(1, counts.numel() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def test_reference_philox_known_answers() -> None:
    """The published vectors of Random123."""
    known = {
        (0, 0, 0): (0xE169C58D6627E8D5, 0x9B00DBD8BC57AC4C),
        (2**64 - 1, 2**64 - 1, 2**64 - 1): (0x41C83B0E408F276D, 0x6D5451FDA20BC7C6),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E): (0x94FDCCEBD16CFE09, 0x24126EA15001E420),
    }
    for arguments, (a, b) in known.items():
        first, second = philox(*(np.uint64(x) for x in arguments))
        assert (int(first[0]), int(second[0])) == (a, b)


@on_every_kernel
@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 1000, 32001, 152064])
def test_matches_definition(guard: Guard, dtype: torch.dtype, vocab: int) -> None:
    for scale in (0.0, 0.1, 1.0, 4.0, 30.0):
        logits = guard.randn(vocab, dtype=dtype, scale=scale)
        for i, settings in enumerate(SETTINGS if vocab < 10000 else SETTINGS[-2:]):
            assert_defined(guard, logits, 4 if vocab > 10000 else 64, 1000 * i + vocab, **settings)
    for settings in SETTINGS:
        assert_defined(guard, guard.place(heavy_tail(min(vocab, 1000)).to(dtype)), 64, 9, **settings)


@on_every_kernel
@pytest.mark.parametrize("vocab", [1 << 18, 131072])
def test_largest_sums(guard: Guard, vocab: int) -> None:
    """The weights whose sum over the largest vocabulary is largest: each 2^19 * 2^(1/16)."""
    logits = torch.full((vocab,), float(np.nextafter(np.float32(-0.0625), np.float32(-1))))
    logits[vocab // 2] = 0.0
    for settings in ({}, {"top_k": 1000}, {"top_p": 0.5}):
        assert_defined(guard, guard.place(logits), 4, 1, temperature=LOG2, **settings)


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_filters_end(guard: Guard, dtype: torch.dtype) -> None:
    """Among few tokens or many, equal ones, steps down to zero, or all within one bin."""
    vocab = 20001
    index = torch.arange(vocab)
    normal = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    rows = {
        "one value and a few more": (index % 1000 == 7).float(),
        "one value and one more": 5.0 + (index == 5).float(),
        "powers of two": torch.where(index % 2 == 0, 0.02, -0.02) * 0.5 ** (index % 90).float(),
        "a narrow range": 1e-3 * normal,
        "a few bins": 0.02 * normal,
        "a dozen bins": 0.1 * normal,
        "some dozens of bins": 0.5 * normal,
        "half forbidden": torch.where(index % 2 == 0, 0.01 * normal, -INF),
        "some dozens of tokens": 8.0 * normal,
        "some hundreds of tokens": 3.0 * normal,
    }
    ends: list[dict[str, Any]] = [
        {"top_k": 60},
        {"top_k": 130},
        {"top_k": 3000, "top_p": 0.5},
        {"top_p": 0.9, "min_p": 0.02},
    ]
    ends += [{"min_p": 0.9}, {"top_p": 0.999, "min_p": 0.7}, {"top_k": 15000, "min_p": 0.6}]
    for row in rows.values():
        for settings in ends:
            assert_defined(guard, guard.place(row.to(dtype)), 4, 5, **settings)


@on_every_kernel
def test_extreme_logits(guard: Guard) -> None:
    """Overflowing differences, denormals, temperatures at the ends of float32."""
    largest = float(np.finfo(np.float32).max)
    rows = [[largest, -largest, 0.0, largest], [1e-45, -1e-45, 0.0, -0.0, 1e-38], [1e4, -1e4, 9999.0, 1e4 - 2**-9]]
    for values in rows:
        for temperature in (1e-45, 1e-30, 1.0, 1e4, 1e30, largest):
            assert_defined(guard, guard.place(torch.tensor(values)), 64, 3, temperature=temperature)


@on_every_kernel
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 2.0, 4.0, 8.0, 30.0])
def test_p28_filters_keep_what_a_float64_sort_keeps(guard: Guard, scale: float) -> None:
    """The definition's kept set is the sort's; the op's log-probabilities show that it kept the same mass."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = guard.randn(128256, dtype=dtype, scale=scale)
        z = logits.float().cpu().numpy()
        for settings in ({"temperature": 0.7, "top_p": 0.9}, {"top_k": 1000, "min_p": 0.013}):
            exact = filtered64(z, **settings)
            np.testing.assert_array_equal(distribution(z, **settings).kept, exact > 0)
            ids, logprob = sample(rows_of(logits, 4), seed=guard.ints([1, 2, 3, 4]), return_logprob=True, **settings)
            expected = np.log(exact[ids.cpu().numpy()])
            assert np.isfinite(expected).all()
            assert bool((np.abs(logprob.cpu().numpy() - expected) < 3e-6 + 2e-7 * np.abs(expected)).all())


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
def test_p28_total_variation(scale: float) -> None:
    """The definition's exact probabilities against float64 softmax: the op is tied to them token for token."""
    for seed in range(3):
        z = (torch.randn(128256, generator=torch.Generator().manual_seed(seed)) * scale).numpy()
        row = distribution(z, temperature=0.7)
        assert 0.5 * np.abs(row.probabilities() - softmax64(z, 0.7)).sum() <= 1e-6


PEAKED = torch.tensor([8.0, 5.0, 4.9, 3.0, 2.0, 1.5, 1.0, 0.0, -1.0, -40.0])
SHAPES = {"peaked": PEAKED, "flat": torch.zeros(97), "gentle": torch.linspace(0, 2, 50), "heavy tail": heavy_tail(300)}
DRAWS = 100_000


@on_every_kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows_by", ["index", "offsets", "seeds"])
def test_p28_chi_square(guard: Guard, shape: str, rows_by: str) -> None:
    """Bonferroni: 72 comparisons share a false alarm rate of one in a thousand, with seeds that are fixed anyway."""
    logits = guard.place(SHAPES[shape])
    own = guard.place(torch.arange(DRAWS))
    streams: dict[str, Any] = {"index": {"seed": 7}, "offsets": {"seed": 7, "offset": own}, "seeds": {"seed": own}}
    for settings in SETTINGS:
        ids = sample(rows_of(logits, DRAWS), **streams[rows_by], **settings)
        counts = torch.bincount(ids, minlength=logits.numel()).double().cpu()
        expected = torch.from_numpy(filtered64(logits.cpu().numpy(), **settings)) * DRAWS
        assert counts.numel() == logits.numel() and not bool(counts[expected == 0].any()), settings
        counts, expected = counts[expected > 0], expected[expected > 0]
        rare = expected < 10
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        if float(expected[-1]) < 10:  # the rare tokens together are still rare: bound them by Poisson's tail
            assert float(counts[-1]) <= 40, settings
            counts, expected = counts[:-1], expected[:-1]
        assert p_value(counts, expected) > 1e-3 / 72, settings


@on_every_kernel
def test_p28_chi_square_sees_a_wrong_sampler(guard: Guard) -> None:
    """The same statistic rejects draws at a temperature 6 % off."""
    logits = guard.place(SHAPES["gentle"])
    counts = torch.bincount(sample(rows_of(logits, DRAWS), seed=7, temperature=1.06), minlength=50).double().cpu()
    assert p_value(counts, torch.from_numpy(softmax64(logits.cpu().numpy())) * DRAWS) < 1e-3 / 72


@on_every_kernel
def test_p28_zero_probability_is_never_drawn(guard: Guard) -> None:
    lowest = torch.finfo(torch.float32).min
    logits = guard.place(torch.tensor([1.0, -INF, 0.5, lowest, 0.0, -1e4, 1.0, -1e9]))
    counts = torch.zeros(8, dtype=torch.int64, device=guard.device)
    for seed in range(10):
        counts += torch.bincount(sample(rows_of(logits, 1_000_000), seed=seed), minlength=8)
    assert int(counts.sum()) == 10**7
    assert not bool(counts[[1, 3, 5, 7]].any())
    assert bool((counts[[0, 2, 4, 6]] > 10**6).all())


def test_p28_filtered_tokens_are_never_drawn(guard: Guard) -> None:
    """Ten million draws, by every filter alone and all together, from tokens with mass on both sides of the cut."""
    logits = guard.place(torch.cat([PEAKED, torch.linspace(7.9, 0, 50)]))
    filters: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
    filters.append({"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05})
    for settings in filters:
        kept = torch.from_numpy(filtered64(logits.cpu().numpy(), **settings)) > 0
        assert 0 < int(kept.sum()) < 60
        ids = torch.cat([sample(rows_of(logits, 1_250_000), seed=seed, **settings) for seed in (1, 2)])
        counts = torch.bincount(ids, minlength=60).cpu()
        assert int(counts.sum()) == 2_500_000 and torch.equal(counts > 0, kept), settings


def support_of(guard: Guard, values: list[float], **settings: Any) -> list[int]:
    logits = guard.place(torch.tensor(values))
    return sorted(set(sample(rows_of(logits, 2000), seed=1, temperature=LOG2, **settings).tolist()))


@on_every_kernel
def test_p28_ties(guard: Guard) -> None:
    """A token that ties with the last one kept is kept too."""
    assert support_of(guard, [1.0, 3.0, 1.0, 2.0, 1.0, 0.0], top_k=3) == [0, 1, 2, 3, 4]
    assert support_of(guard, [1.0, 3.0, 1.0, 2.0, 1.0, 0.0], top_k=2) == [1, 3]
    assert support_of(guard, [1.0, 1.0, 1.0, 1.0], top_k=1) == [0, 1, 2, 3]
    assert support_of(guard, [1.0, 1.0, 1.0, 1.0], top_p=0.1) == [0, 1, 2, 3]
    assert support_of(guard, [0.0, -0.0, 0.0, -1.0], top_k=1) == [0, 1, 2]
    assert support_of(guard, [-INF, 2.0, -INF, 1.0], top_k=3) == [1, 3]


@on_every_kernel
def test_p28_boundaries_are_inclusive(guard: Guard) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 exactly."""
    values = [-3.0, -1.0, -3.0, -2.0]
    just_above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    assert support_of(guard, values, top_p=0.5) == [1]
    assert support_of(guard, values, top_p=just_above) == [1, 3]
    assert support_of(guard, values, top_p=0.75) == [1, 3]
    assert support_of(guard, values, top_p=0.76) == [0, 1, 2, 3]
    assert support_of(guard, values, min_p=0.5) == [1, 3]
    assert support_of(guard, values, min_p=just_above) == [1]
    assert support_of(guard, values, min_p=0.25) == [0, 1, 2, 3]
    assert support_of(guard, values, min_p=1.0) == [1]
    # top-p counts what top-k kept: of 1/2 and 1/4 the first is two thirds.
    assert support_of(guard, values, top_k=2, top_p=0.66) == [1]
    assert support_of(guard, values, top_k=2, top_p=0.67) == [1, 3]


INVALID = [
    ([NAN, 1.0, 2.0], 2),
    ([1.0, NAN, INF], 2),
    ([NAN, NAN, NAN], 0),
    ([-INF, -INF, -INF], 0),
    ([NAN, -INF, -INF], 1),
]


@on_every_kernel
@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.0}])
def test_p27_ids_are_always_in_range(guard: Guard, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    logits = guard.place(torch.tensor([values for values, _ in INVALID]).to(dtype))
    ids, valid, logprob = sample(logits, return_valid=True, return_logprob=True, **settings)
    assert ids.tolist() == [expected for _, expected in INVALID]
    assert not bool(valid.any()) and bool(logprob.isnan().all())

    logits = guard.place(torch.tensor([-INF, INF, 5.0, INF]).to(dtype))
    ids, valid, logprob = sample(rows_of(logits, 100), return_valid=True, return_logprob=True, **settings)
    assert bool(valid.all())
    greedy = settings.get("temperature") == 0.0
    assert set(ids.tolist()) == ({1} if greedy else {1, 3})
    assert bool((logprob == (0.0 if greedy else np.float32(np.log(0.5)))).all())

    ids, valid = sample(guard.place(torch.tensor([[-INF, -INF, 0.0]]).to(dtype)), return_valid=True, **settings)
    assert ids.tolist() == [2] and bool(valid.all())


@on_every_kernel
def test_p27_one_bad_row_among_others(guard: Guard) -> None:
    """NaN and empty rows leave their neighbours alone."""
    logits = torch.randn(6, 1000)
    clean = sample(guard.place(logits), seed=3, top_p=0.9)
    logits[1, 7] = NAN
    logits[4] = -INF
    ids, valid = sample(guard.place(logits), seed=3, top_p=0.9, return_valid=True)
    assert valid.tolist() == [True, False, True, True, False, True]
    assert same_bytes(ids[valid], clean[valid])


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_is_argmax(guard: Guard, dtype: torch.dtype) -> None:
    logits = guard.randn(50, 1001, dtype=dtype)
    ids, logprob = sample(logits, temperature=0.0, top_k=3, top_p=0.5, return_logprob=True)
    top = logits.float().max(-1, keepdim=True).values
    lowest = (logits.float() == top).int().cpu().numpy().argmax(-1)
    np.testing.assert_array_equal(ids.cpu().numpy(), lowest)
    assert not bool(logprob.any())
    ties = guard.place(torch.tensor([[-1.0, 4.0, 4.0], [-0.0, 0.0, -1.0], [-5.0, -3.0, -3.0]]).to(dtype))
    assert sample(ties, temperature=0.0).tolist() == [1, 0, 1]


@on_every_kernel
@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
def test_p29_alone_or_in_a_batch(guard: Guard, dtype: torch.dtype) -> None:
    rows, vocab = 9, 5000
    logits = torch.randn(rows, vocab).to(dtype)
    seeds, offsets = torch.arange(rows) * 17 + 2**40, torch.arange(rows) + 100
    settings = {
        "temperature": torch.linspace(0, 2, rows),
        "top_k": torch.arange(rows) * 40,
        "top_p": torch.linspace(0.3, 1.0, rows),
        "min_p": torch.linspace(0.0, 0.01, rows),
        "seed": seeds,
        "offset": offsets,
    }
    placed = {name: guard.place(value) for name, value in settings.items()}
    ids, logprob = sample(guard.place(logits), return_logprob=True, **placed)
    for row in range(rows):
        numbers = {name: value[row].item() for name, value in settings.items()}
        alone = sample(guard.place(logits[row : row + 1]), return_logprob=True, **numbers)
        assert same_bytes(alone[0], ids[row : row + 1]) and same_bytes(alone[1], logprob[row : row + 1])
    order = torch.tensor([4, 0, 8, 8, 2, 1])
    neighbours = logits[order].clone()
    neighbours[3] = NAN
    shuffled = sample(guard.place(neighbours), **{name: guard.place(v[order]) for name, v in settings.items()})
    keep = torch.tensor([0, 1, 2, 4, 5])
    assert shuffled[keep].tolist() == ids[order[keep]].tolist()


@on_every_kernel
def test_p29_seeds_and_offsets_differ(guard: Guard) -> None:
    logits = guard.randn(64, 1000)
    draws = [sample(logits, seed=s, offset=o) for s, o in ((0, 0), (1, 0), (0, 1), (2**63 - 1, 0), (-1, 0), (0, 2**40))]
    draws += [sample(logits, seed=guard.ints(torch.arange(64), torch.int64) + shift) for shift in (0, 64)]
    for i, a in enumerate(draws):
        assert same_bytes(a, draws[i])
        for b in draws[:i]:
            assert int((a != b).sum()) > 32
    same = rows_of(guard.randn(1000), 64)
    assert len(set(sample(same, seed=5).tolist())) > 16, "rows of one call draw independently"


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_p29_one_value_on_the_device_is_the_number(guard: Guard, dtype: torch.dtype) -> None:
    logits = guard.randn(3, 4, 777)
    numbers = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "seed": 11, "offset": 13}
    expected = sample(logits, return_logprob=True, **numbers)
    for names in (["temperature"], ["top_k"], ["top_p"], ["min_p"], ["seed"], ["offset"], list(numbers)):
        given: dict[str, Any] = dict(numbers)
        for name in names:
            kind = torch.float32 if isinstance(numbers[name], float) else dtype
            given[name] = guard.place(torch.tensor(numbers[name], dtype=kind))
        ids, logprob = sample(logits, return_logprob=True, **given)
        assert same_bytes(ids, expected[0]) and same_bytes(logprob, expected[1]), names


@on_every_kernel
def test_p29_edges_of_the_draw(guard: Guard) -> None:
    """The smallest and the largest of four million random words, at the first and the last token of a row."""
    assert mul_high(np.array([0, 2**64 - 1], dtype=np.uint64), 2**61 + 5).tolist() == [0, 2**61 + 4]
    offsets = np.arange(1 << 22)
    words = philox(77, offsets, 0)
    extremes = np.concatenate([np.argsort(word)[ends] for word in words for ends in (slice(64), slice(-64, None))])
    assert words[0][extremes].min() < 2**46 and words[0][extremes].max() > 2**64 - 2**46
    for values in ([0.0, -18.0], [-18.0, 0.0], [0.0] * 262144, [-43.75, 0.0, -43.8, -43.5], [-0.03] * 4000 + [0.0]):
        logits = torch.tensor(values)
        count = 16 if len(values) > 10000 else extremes.size
        ids = sample(
            rows_of(guard.place(logits), count),
            temperature=LOG2,
            seed=77,
            offset=guard.place(torch.from_numpy(extremes[:: extremes.size // count])),
        )
        expected = distribution(logits.numpy(), LOG2).draw(*(w[extremes[:: extremes.size // count]] for w in words))
        np.testing.assert_array_equal(ids.cpu().numpy(), expected)
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    for row in (distribution(np.zeros(5, np.float32)), distribution(np.array([0, -9, -20], np.float32))):
        assert row.draw(ends, ends).tolist() == [0, row.m.size - 1]


@on_every_kernel
def test_out_of_range_values_on_the_device(guard: Guard) -> None:
    """Numbers are refused; values on the device take their nearest meaning."""
    logits = guard.place(torch.randn(200))
    count = 500

    def ids(**settings: float) -> Tensor:
        placed = {name: guard.place(torch.tensor(value)) for name, value in settings.items()}
        return sample(rows_of(logits, count), seed=4, **placed)

    top, everything = int(logits.argmax()), sample(rows_of(logits, count), seed=4)
    for settings in ({"temperature": -1.0}, {"temperature": NAN}, {"top_p": 0.0}, {"top_p": -2.0}, {"top_p": NAN}):
        assert set(ids(**settings).tolist()) == {top}, settings
    assert set(ids(min_p=2.0).tolist()) == {top}
    for settings in ({"top_p": 1.5}, {"min_p": -1.0}, {"min_p": NAN}, {"top_k": -3}, {"top_k": 10**6}):
        assert same_bytes(ids(**settings), everything), settings
    assert len(set(ids(temperature=INF).tolist())) > 150
