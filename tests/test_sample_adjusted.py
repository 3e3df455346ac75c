"""sample with penalties, a bias and a bitmask: what it would draw from logits that were changed beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES
from support.contract import assert_compiles, assert_compiles_once, assert_graph_replays, assert_same, opcheck
from support.guard import Guard, same_bytes
from support.pairs import pairwise
from support.sampling import adjusted
from torch import Tensor

from gqa_kernels import explain, record_launches, sample

INF, NAN = float("inf"), float("nan")
on_every_kernel = pytest.mark.parametrize("device", ["cpu", "cuda", "cuda portable"], indirect=True)
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FACTORS: dict[str, list[Any]] = {
    "logit_bias": ["one row", None, "own rows", "one row, like logits", "own rows, like logits"],
    "allowed_bitmask": ["own rows", None, "one row"],
    "token_counts": ["own rows", "one row"],
    **{name: ["own values", None, "one value", "number"] for name in PENALTIES},
    "temperature": [0.7, 0.0, 1.0],
    "top_k": [0, 7],
    "top_p": [1.0, 0.9],
    "min_p": [0.0, 0.05],
    "dtype": DTYPES,
    "vocab": [33, 1, 64, 1001],
}


def counts_of(*shape: int) -> Tensor:
    """Most tokens never, some in the prompt alone, some drawn up to 2^31 - 1 times."""
    kinds = torch.tensor([0, 0, 0, 0, -1, -7, 1, 2, 40, 2**31 - 1], dtype=torch.int32)
    return kinds[torch.randint(len(kinds), shape)]


def mask_of(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def penalty_of(name: str, *shape: int) -> Tensor:
    return torch.rand(shape) + 0.6 if name == "repetition_penalty" else torch.randn(shape) * 0.3


def adjustments(kinds: dict[str, Any], rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if kinds["logit_bias"]:
        shape = (vocab,) if "one" in kinds["logit_bias"] else (rows, vocab)
        found["logit_bias"] = torch.randn(shape).to(dtype if "like" in kinds["logit_bias"] else torch.float32)
    if kinds["allowed_bitmask"]:
        words = -(-vocab // 32)
        found["allowed_bitmask"] = mask_of(*((words,) if "one" in kinds["allowed_bitmask"] else (rows, words)))
    found["token_counts"] = counts_of(*((vocab,) if "one" in kinds["token_counts"] else (rows, vocab)))
    for name in PENALTIES:
        if kinds[name]:
            found[name] = penalty_of(name, *((rows,) if "own" in kinds[name] else ()))
            found[name] = found[name].item() if kinds[name] == "number" else found[name]
    return found


def beforehand(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """The logits as NumPy changes them."""
    plain = {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        if isinstance(value, Tensor)
        else value
        for name, value in options.items()
    }
    return torch.from_numpy(adjusted(logits.float().cpu().numpy(), **plain)).view(logits.shape)


def placed(guard: Guard, options: dict[str, Any]) -> dict[str, Any]:
    return {name: guard.place(value) if isinstance(value, Tensor) else value for name, value in options.items()}


def drawn(logits: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return sample(logits, return_valid=True, return_logprob=True, **options)


@pytest.mark.abi
@on_every_kernel
def test_is_sampling_from_changed_logits(guard: Guard) -> None:
    """Every pair of ways to give the adjustments, with each other and with every filter: the bytes of sampling from
    float32 logits that NumPy has changed."""
    rows = 12
    for seed, kinds in enumerate(pairwise(FACTORS)):
        torch.manual_seed(seed)
        dtype, vocab = kinds["dtype"], kinds["vocab"]
        logits = (torch.randn(rows, vocab) * torch.linspace(0, 8, rows)[:, None]).to(dtype)
        options = adjustments(kinds, rows, vocab, dtype)
        settings = {name: kinds[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        want = drawn(guard.place(beforehand(logits, options)), seed=seed, **settings)
        got = drawn(guard.place(logits), seed=seed, **settings, **placed(guard, options))
        assert_same(got, want, kinds)


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [32001, 128256, 262144])
@pytest.mark.parametrize("kind", ["all", "penalties", "few penalties", "a bitmask"])
def test_large_vocabularies(guard: Guard, dtype: torch.dtype, vocab: int, kind: str) -> None:
    """Without a bias the Hopper kernel holds 16-bit rows as they are, and apart, while they are few, other values."""
    rows = 3
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    options: dict[str, Any] = {"allowed_bitmask": mask_of(rows, -(-vocab // 32))}
    if kind != "a bitmask":
        options |= {name: penalty_of(name, rows) for name in PENALTIES}
        options["token_counts"] = counts_of(rows, vocab)
    if kind == "few penalties":
        options["token_counts"][torch.rand(rows, vocab) < 0.98] = 0
    if kind == "all":
        options["logit_bias"] = torch.randn(vocab)
    changed, given = guard.place(beforehand(logits, options)), placed(guard, options)
    logits = guard.place(logits)
    every: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 50, "min_p": 0.02}, {"top_k": 3000}, {"temperature": 0.0}]
    for settings in every:
        want = drawn(changed, seed=5, **settings)
        assert_same(drawn(logits, seed=5, **settings, **given), want, settings)
        assert same_bytes(sample(logits, seed=5, **settings, **given).cpu(), want[0].cpu()), settings


def test_engines_formula(guard: Guard) -> None:
    """The float32 tensor operations of vLLM's penalties, and a bias and a mask after them."""
    rows, vocab = 5, 999
    logits, prompt, output = torch.randn(rows, vocab) * 4, counts_of(rows, vocab) != 0, counts_of(rows, vocab).clamp(0)
    values = {name: penalty_of(name, rows) for name in PENALTIES}
    repetition, frequency, presence = (values[name][:, None] for name in PENALTIES)
    scale = torch.where(prompt | (output > 0), repetition, torch.ones(()))
    z = torch.where(logits > 0, logits / scale, logits * scale)
    z -= frequency * output
    z -= presence * (output > 0)
    bias, allowed = torch.randn(vocab), torch.rand(rows, vocab) < 0.7
    z = (z + bias).masked_fill(~allowed, -INF)
    bits = torch.nn.functional.pad(allowed, (0, 32 - vocab % 32)).view(rows, -1, 32).long()
    mask = (bits << torch.arange(32)).sum(-1).to(torch.int64)
    options: dict[str, Any] = {
        "token_counts": torch.where(output > 0, output, -prompt.int()),
        "logit_bias": bias,
        "allowed_bitmask": torch.where(mask >= 2**31, mask - 2**32, mask).int(),
        **values,
    }
    for settings in ({}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 40}):
        want = drawn(guard.place(z), seed=3, **settings)
        assert_same(drawn(guard.place(logits), seed=3, **settings, **placed(guard, options)), want)


def test_transformers_processors(guard: Guard) -> None:
    """Repetition over prompt and generated ids, biases of single tokens, suppressed tokens."""
    processors = pytest.importorskip("transformers").generation.logits_process
    rows, vocab = 6, 500
    scores, ids = torch.randn(rows, vocab) * 3, torch.randint(vocab, (rows, 40))
    bias = {(int(token),): float(value) for token, value in zip(torch.randperm(vocab)[:50], torch.randn(50) * 5)}
    banned = torch.randperm(vocab)[:200].tolist()
    z = processors.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    z = processors.SequenceBiasLogitsProcessor([[list(key), value] for key, value in bias.items()])(ids, z)
    z = processors.SuppressTokensLogitsProcessor(banned)(ids, z)
    allowed = np.ones(512, dtype=bool)
    allowed[banned] = False
    dense = torch.zeros(vocab)
    for (token,), value in bias.items():
        dense[token] = value
    mask = torch.from_numpy(np.packbits(allowed, bitorder="little").view(np.int32).copy())
    for count in (-1, 2):
        counts = torch.zeros(rows, vocab, dtype=torch.int32).scatter_(1, ids, count)
        options = placed(guard, {"token_counts": counts, "logit_bias": dense, "allowed_bitmask": mask})
        got = drawn(guard.place(scores), repetition_penalty=1.3, temperature=0.8, seed=2, **options)
        assert_same(got, drawn(guard.place(z), temperature=0.8, seed=2))


def test_logprob_is_of_the_changed_distribution(guard: Guard) -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, float(np.log(3.0)), 0.0, INF])
    counts = torch.tensor([[0, 0, 2, 0]], dtype=torch.int32)
    ids, logprob = sample(
        rows_of(guard.place(logits), 400),
        logit_bias=guard.place(bias),
        allowed_bitmask=guard.ints([0b0111]),
        token_counts=guard.place(counts[0]),
        frequency_penalty=guard.place(torch.tensor(float(np.log(2.0)) / 2)),
        return_logprob=True,
    )
    assert set(ids.tolist()) == {0, 1, 2}
    exact = torch.tensor([2.0, 6.0, 1.0, 0.0]).div(9).log()[ids.cpu()]
    torch.testing.assert_close(logprob.cpu(), exact, rtol=1e-5, atol=0)


def rows_of(logits: Tensor, count: int) -> Tensor:
    return logits.expand(count, logits.shape[-1])


@on_every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}])
def test_p27_nothing_to_draw_from(guard: Guard, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """All tokens forbidden: as a row of -inf. A NaN that is forbidden is no NaN; one that arises is."""
    rows, vocab = 7, 70
    logits = torch.randn(rows, vocab).to(dtype)
    logits[5, 3] = NAN
    logits[4, 69] = INF
    mask = torch.full((rows, 3), -1, dtype=torch.int32)
    mask[0] = 0
    mask[1] = torch.tensor([0, 0, ~0 << 6])  # bits of no token
    mask[2] = torch.tensor([0, 0, 1 << 5])
    mask[5, 0] = ~(1 << 3)
    bias = torch.zeros(rows, vocab)
    bias[3] = -INF
    bias[4, 69] = -INF
    ids, valid, logprob = drawn(
        guard.place(logits), logit_bias=guard.place(bias), allowed_bitmask=guard.place(mask), **settings
    )
    assert valid.tolist() == [False, False, True, False, False, True, True]
    assert ids[[0, 1, 3]].tolist() == [0, 0, 0] and int(ids[2]) == 69
    assert bool(logprob[~valid].isnan().all()) and float(logprob[2]) == 0.0
    assert bool(((ids >= 0) & (ids < vocab)).all()) and int(ids[5]) != 3


def test_neutral_values_change_nothing(guard: Guard) -> None:
    """Not even the sign of a zero, or which of equal logits is the first."""
    logits = torch.randn(20, 130)
    logits[3] = -0.0
    logits[4, ::7] = -INF
    logits[5, 9] = INF
    want = drawn(guard.place(logits), seed=1, top_p=0.9)
    options: dict[str, Any] = {
        "logit_bias": torch.zeros(130),
        "allowed_bitmask": torch.full((20, 5), -1, dtype=torch.int32),
        "token_counts": counts_of(20, 130),
        "repetition_penalty": torch.ones(20),
        "frequency_penalty": torch.zeros(()),
        "presence_penalty": torch.zeros(20),
    }
    assert_same(drawn(guard.place(logits), seed=1, top_p=0.9, **placed(guard, options)), want)
    for name, value in options.items():
        given = {name: value, "token_counts": options["token_counts"]}
        assert_same(drawn(guard.place(logits), seed=1, top_p=0.9, **placed(guard, given)), want, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    shape, vocab = (3, 4), 77
    logits = torch.randn(*shape, vocab).to(dtype)
    tables = {
        "logit_bias": torch.randn(*shape, vocab).to(dtype),
        "allowed_bitmask": mask_of(*shape, 3),
        "token_counts": counts_of(*shape, vocab),
    }
    values = {name: penalty_of(name, *shape) for name in PENALTIES}
    want = drawn(guard.place(logits), seed=4, top_p=0.9, **placed(guard, tables | values))
    assert want[0].shape == shape
    ways = {
        "transposed": lambda x: guard.place(x).transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": lambda x: guard.place(x).transpose(-1, -2).contiguous().transpose(-1, -2),
        "sliced": lambda x: torch.cat([guard.place(x), guard.place(x)], -1)[..., : x.shape[-1]],
        **{f"misaligned by {n}": lambda x, n=n: guard.place(x, offset=n) for n in (1, 3)},
    }
    for name, way in ways.items():
        given = {key: way(value) for key, value in tables.items()} | placed(guard, values)
        assert_same(drawn(guard.place(logits), seed=4, top_p=0.9, **given), want, name)
    flat = {name: value.flatten(0, 1) for name, value in (tables | values).items()}
    assert_same(
        drawn(guard.place(logits.flatten(0, 1)), seed=4, top_p=0.9, **placed(guard, flat)),
        [part.flatten() for part in want],
    )
    for name, value in tables.items():
        shared = placed(guard, tables | values | {name: value[0, 0]})
        repeated = placed(guard, tables | values) | {name: guard.place(value[0, 0]).expand(value.shape)}
        assert_same(drawn(guard.place(logits), **shared), drawn(guard.place(logits), **repeated), name)


def test_p29_alone_or_in_a_batch(guard: Guard) -> None:
    rows, vocab = 6, 3000
    logits = torch.randn(rows, vocab)
    options: dict[str, Tensor] = {
        "logit_bias": torch.randn(rows, vocab),
        "allowed_bitmask": mask_of(rows, -(-vocab // 32)),
        "token_counts": counts_of(rows, vocab),
        **{name: penalty_of(name, rows) for name in PENALTIES},
        "seed": torch.arange(rows),
    }
    together = drawn(guard.place(logits), top_p=0.95, **placed(guard, options))
    for row in range(rows):
        own = placed(guard, {name: value[row : row + 1] for name, value in options.items()})
        alone = drawn(guard.place(logits[row : row + 1]), top_p=0.95, **own)
        assert_same(alone, tuple(part[row : row + 1] for part in together), row)


def test_counts_grow_as_documented(guard: Guard) -> None:
    """A presence penalty without end visits every token once; the prompt's come last under a repetition penalty."""
    vocab = 40
    counts = torch.zeros(2, vocab, dtype=torch.int32)
    prompt = torch.arange(10, 20)[None].expand(2, -1)
    counts.scatter_(-1, prompt, -1)
    counts = counts.to(guard.device)
    logits, seen = guard.place(torch.linspace(-2, -1, vocab).expand(2, vocab)), []
    for _ in range(vocab):
        ids = sample(logits, temperature=0.0, token_counts=counts, presence_penalty=1e9, repetition_penalty=100.0)[
            ..., None
        ]
        counts.scatter_(-1, ids, counts.gather(-1, ids).clamp(min=0) + 1)
        seen.append(ids[:, 0].tolist())
    first = [row[0] for row in seen]
    assert first == [*range(39, 19, -1), *range(9, -1, -1), *range(19, 9, -1)]
    assert all(a == b for a, b in seen) and bool((counts == 1).all())


def test_one_launch(gpu: str) -> None:
    logits = torch.randn(3, 1000, device=gpu)
    counts = torch.zeros(3, 1000, dtype=torch.int32, device=gpu)
    with record_launches() as launches:
        sample(logits, token_counts=counts, presence_penalty=torch.ones(3, device=gpu))
    assert [launch["kernel"] for launch in launches] in (["sample_row"], ["sample_cluster"])


def test_explained(device: str) -> None:
    logits, words = torch.randn(3, 100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    plan = explain("sample", logits, allowed_bitmask=words, device="cuda")
    assert plan.kernel in ("sample_row", "sample_cluster") and plan.reason


def test_p16_opcheck(guard: Guard) -> None:
    """Every pair of ways to give the adjustments."""
    rows, vocab = 3, 50
    for kinds in pairwise({name: FACTORS[name] for name in list(FACTORS)[:6]} | {"dtype": DTYPES}):
        options = adjustments(kinds, rows, vocab, kinds["dtype"])
        options = {name: torch.as_tensor(value) for name, value in options.items()}
        logits = guard.randn(rows, vocab, dtype=kinds["dtype"])
        opcheck(torch.ops.gqa_kernels.sample.default, (logits,), placed(guard, options))


def step(logits: Tensor, bias: Tensor, mask: Tensor, counts: Tensor, penalties: Tensor) -> Any:
    return sample(
        logits,
        logit_bias=bias,
        allowed_bitmask=mask,
        token_counts=counts,
        repetition_penalty=penalties[0],
        frequency_penalty=penalties[1],
        presence_penalty=penalties[2],
        seed=3,
        return_logprob=True,
    )


def arguments(guard: Guard, rows: int, vocab: int) -> tuple[Tensor, ...]:
    penalties = torch.stack([penalty_of(name, rows) for name in PENALTIES])
    tables = torch.randn(rows, vocab), mask_of(rows, -(-vocab // 32)), counts_of(rows, vocab)
    return guard.randn(rows, vocab), *(guard.place(table) for table in tables), guard.place(penalties)


@pytest.mark.abi
def test_p17_compile(guard: Guard) -> None:
    given = arguments(guard, 3, 100)
    assert_compiles(step, *given)
    assert_compiles(lambda x, counts: sample(x, token_counts=counts, repetition_penalty=1.1), given[0], given[3])
    assert_compiles_once(step, [arguments(guard, 3, 100) for _ in range(4)])


def test_p23_graph_replay(gpu: str) -> None:
    """One capture serves other counts, masks, biases and penalties."""
    given = arguments(Guard(gpu), 8, 32000)

    def change() -> None:
        for tensor, other in zip(given, arguments(Guard(gpu), 8, 32000)):
            tensor.copy_(other)

    assert_graph_replays(lambda: step(*given), change)


@pytest.mark.parametrize("family", ["cuda", "cuda portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 31, 1000, 32001, 151936])
def test_p29_same_tokens_on_cpu_and_cuda(gpu: str, family: str, dtype: torch.dtype, vocab: int) -> None:
    """Ids and log-probabilities, over flat to peaked rows."""
    from gqa_kernels._library import C

    rows = 12
    logits = (torch.randn(rows, vocab) * torch.linspace(0, 20, rows)[:, None]).to(dtype)
    C.set_kernel_override(1 if "portable" in family else 0)
    try:
        for kinds in pairwise({name: FACTORS[name] for name in list(FACTORS)[:10]}):
            options = adjustments(kinds, rows, vocab, dtype)
            settings = {name: kinds[name] for name in ("temperature", "top_k", "top_p", "min_p")}
            want = drawn(logits, seed=9, **settings, **options)
            there = {name: v.to(gpu) if isinstance(v, Tensor) else v for name, v in options.items()}
            got = drawn(logits.to(gpu), seed=9, **settings, **there)
            assert_same(got[:2], want[:2], kinds)
            torch.testing.assert_close(got[2].cpu(), want[2], rtol=2e-7, atol=0, equal_nan=True)
    finally:
        C.set_kernel_override(0)
