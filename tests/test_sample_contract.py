"""What sample promises to torch: layouts, refusals, opcheck, compile, capture, the same tokens on both devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bounds import DTYPES
from support.contract import assert_compiles, assert_compiles_once, assert_graph_replays, opcheck
from support.guard import Guard, same_bytes
from support.pairs import pairwise
from torch import Tensor

from gqa_kernels import record_launches, sample


@pytest.mark.parametrize("dtype", DTYPES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    base = guard.randn(4, 6, 1001, dtype=dtype)
    options: dict[str, Any] = {"seed": 3, "top_p": 0.9, "top_k": 300}
    expected = sample(base, **options)
    assert expected.shape == (4, 6) and expected.dtype == torch.int64
    views = {
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.cat([base, base], -1)[..., :1001],
        "every second row": torch.stack([base, base * 2], 2).flatten(1, 2)[:, ::2],
        "last dimension strided": base.transpose(-1, -2).contiguous().transpose(-1, -2),
        **{f"misaligned by {n}": guard.place(base, offset=n) for n in range(1, 8)},
    }
    for name, view in views.items():
        assert same_bytes(sample(view, **options), expected), name
    assert same_bytes(sample(base.flatten(0, 1), **options), expected.flatten())
    assert same_bytes(sample(base[0, 0], **options), expected[0, 0])
    per_row = guard.place(torch.rand(4, 6) + 0.5)
    assert same_bytes(sample(base, temperature=per_row.T.contiguous().T), sample(base, temperature=per_row))
    seeds = guard.ints([9, 9, 9, 9, 9, 9], torch.int64)
    assert same_bytes(sample(base[0], seed=seeds[:1].expand(6)), sample(base[0], seed=seeds))


@pytest.mark.parametrize("dtype", DTYPES)
def test_p9_empty(guard: Guard, dtype: torch.dtype) -> None:
    logits = guard.randn(0, 64, dtype=dtype)
    ids, valid, logprob = sample(logits, top_p=0.5, return_valid=True, return_logprob=True)
    assert ids.shape == valid.shape == logprob.shape == (0,)
    assert (ids.dtype, valid.dtype, logprob.dtype) == (torch.int64, torch.bool, torch.float32)
    assert sample(guard.randn(2, 0, 5)).shape == (2, 0)


def test_returns_what_is_asked_for(guard: Guard) -> None:
    logits = guard.randn(3, 10)
    ids = sample(logits)
    assert isinstance(ids, Tensor)
    assert [part.dtype for part in sample(logits, return_valid=True)] == [torch.int64, torch.bool]
    assert [part.dtype for part in sample(logits, return_logprob=True)] == [torch.int64, torch.float32]
    assert torch.ops.gqa_kernels.sample(logits)[2].shape == (0,)


def test_one_launch(gpu: str) -> None:
    logits = torch.randn(3, 1000, device=gpu)
    one = torch.tensor(0.5, device=gpu)
    with record_launches() as launches:
        sample(logits, top_p=one, temperature=one, seed=torch.tensor(1, device=gpu))
        sample(logits, temperature=0)
    assert [launch["kernel"] for launch in launches] in (["sample_row"] * 2, ["sample_cluster", "sample_greedy"])


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("temperature", {"temperature": -0.5}, "temperature must be 0 (greedy) or a larger number, got -0.5"),
    ("temperature nan", {"temperature": float("nan")}, "temperature must be 0 (greedy) or a larger number, got nan"),
    ("top_p 0", {"top_p": 0.0}, "top_p must be above 0 and at most 1 (off), got 0"),
    ("top_p above 1", {"top_p": 1.25}, "top_p must be above 0 and at most 1 (off), got 1.25"),
    ("min_p", {"min_p": -0.1}, "min_p must be between 0 (off) and 1, got -0.1"),
    ("min_p above 1", {"min_p": 2.0}, "min_p must be between 0 (off) and 1, got 2"),
    ("float64", {"temperature": torch.ones(3).double()}, "temperature must be float32, got float64"),
    ("float seed", {"seed": torch.ones(3)}, "seed must be int32 or int64, got float32"),
    ("int16", {"top_k": torch.ones(3, dtype=torch.int16)}, "top_k must be int32 or int64, got int16"),
    (
        "rows",
        {"top_p": torch.ones(4)},
        "top_p must be a number, a tensor of one value or one value per row of logits [3, 10], got shape [4]",
    ),
    (
        "penalty rows",
        {"presence_penalty": torch.ones(4), "token_counts": torch.ones(3, 10, dtype=torch.int32)},
        "presence_penalty must be a number, a tensor of one value or one value per row of logits [3, 10], "
        "got shape [4]",
    ),
    (
        "bias",
        {"logit_bias": torch.ones(9)},
        "logit_bias must be [10] or one such row per row of logits [3, 10], got shape [9]",
    ),
    ("no counts", {"presence_penalty": torch.ones(3)}, "token_counts must be given together with a penalty, got None"),
]


@pytest.mark.parametrize("options, sentence", [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_p20_refusals(device: str, options: dict[str, Any], sentence: str) -> None:
    placed = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    with pytest.raises(RuntimeError) as error:
        sample(torch.randn(3, 10, device=device), **placed)
    assert str(error.value).splitlines()[0] == "sample: " + sentence


def test_p20_refused_logits(device: str) -> None:
    for logits, sentence in (
        (torch.zeros(3, 10, dtype=torch.float64), "logits must be float32, float16 or bfloat16, got float64"),
        (torch.zeros(()), "logits must be [..., vocab], got shape []"),
        (torch.zeros(3, 0), "logits must be [..., vocab] with vocab from 1 to 262144, got shape [3, 0]"),
        (
            torch.zeros(1, 262145),
            "logits must be [..., vocab] with vocab from 1 to 262144, got shape [1, 262145]",
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            sample(logits.to(device))
        assert str(error.value).splitlines()[0] == "sample: " + sentence
    with pytest.raises(RuntimeError, match="sample: logits must not require grad"):
        sample(torch.randn(3, 10, device=device, requires_grad=True))


def test_p20_refuses_a_setting_on_another_device(gpu: str) -> None:
    with pytest.raises(RuntimeError, match=r"sample: top_p must be on the device of logits \(cuda:0\), got cpu"):
        sample(torch.randn(3, 10, device=gpu), top_p=torch.ones(3))


def per_row(guard: Guard) -> dict[str, Tensor]:
    floats, ints = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([3, 0, 10])
    placed = {name: guard.place(floats) for name in ("temperatures", "top_ps", "min_ps")}
    return placed | {name: guard.place(ints) for name in ("top_ks", "seeds", "offsets")}


NUMBERS = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 3, "offset": 9}
PATTERNS = pairwise(
    {
        "return_logprob": [False, True],
        "shape": [(3, 20), (20,), (3, 2, 20)],
        **{name: ["default", "number", "per row", "one value"] for name in NUMBERS},
    }
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    """Every pair of ways to give the settings."""
    for pattern in PATTERNS:
        logits = guard.randn(*pattern["shape"], dtype=dtype)
        logits = logits.transpose(0, 1) if logits.dim() == 3 else logits
        options: dict[str, Any] = {"return_logprob": pattern["return_logprob"]}
        for name, number in NUMBERS.items():
            values = torch.full(logits.shape[:-1] if pattern[name] == "per row" else (), number, device=guard.device)
            if pattern[name] == "number":
                options[name] = number
            elif pattern[name] != "default":
                options[name + "s"] = values
        opcheck(torch.ops.gqa_kernels.sample.default, (logits,), options)


@pytest.mark.abi
def test_p17_compile(guard: Guard) -> None:
    logits = guard.randn(3, 100)
    values = {name[:-1]: value for name, value in per_row(guard).items()}
    assert_compiles(lambda x: sample(x, seed=3, top_p=0.9, return_valid=True), logits)
    assert_compiles(lambda x: sample(x, return_logprob=True, **values), logits)


def test_p17_changing_numbers_do_not_recompile(guard: Guard) -> None:
    """Numbers of each step, as a Python loop passes them: two graphs at most, however many steps."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, seed: int, temperature: float, probability: float) -> Any:
        return sample(x, seed=seed, offset=seed - 9, top_k=seed - 995, temperature=temperature, top_p=probability)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    logits = guard.randn(3, 100)
    for i in range(12):
        numbers = (1000 + 7 * i, 0.35 + 0.1 * i, 0.95 - 0.05 * i)
        assert same_bytes(compiled(logits, *numbers), step(logits, *numbers))
    assert counter.frame_count <= 2


def test_p17_compiled_numbers_are_checked(guard: Guard) -> None:
    compiled = torch.compile(lambda x, t: sample(x, temperature=t), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="sample: temperature must be"):
        compiled(guard.randn(3, 100), -1.0)


def test_p17_settings_on_the_device_do_not_recompile(guard: Guard) -> None:
    """Any temperature and filter through one compilation, where they are tensors."""

    def function(x: Tensor, floats: Tensor, top_k: Tensor) -> Any:
        return sample(x, temperature=floats[0], top_p=floats[1], min_p=floats[2], top_k=top_k, seed=3)

    logits = guard.randn(3, 100)
    assert_compiles_once(
        function, [(logits, guard.randn(3, 3).abs().clamp(max=1), guard.ints([0, i, 2 * i])) for i in range(12)]
    )


def test_p23_graph_replay(gpu: str) -> None:
    """One capture serves other logits, seeds, offsets and settings, from greedy to every filter."""
    rows = 8
    logits = torch.randn(rows, 32000, device=gpu)
    floats = {name: torch.ones(rows, device=gpu) for name in ("temperature", "top_p")}
    ints = {name: torch.zeros(rows, dtype=torch.int64, device=gpu) for name in ("top_k", "offset")}
    single = {"min_p": torch.zeros((), device=gpu), "seed": torch.zeros((), dtype=torch.int64, device=gpu)}

    def change() -> None:
        logits.normal_()
        floats["temperature"].copy_(torch.linspace(0, 2, rows))
        floats["top_p"].copy_(torch.linspace(0.2, 1, rows))
        ints["top_k"].copy_(torch.arange(rows) * 9)
        ints["offset"].copy_(torch.arange(rows))
        single["min_p"].fill_(0.01)
        single["seed"].fill_(2**50 + 3)

    everything: dict[str, Any] = {**floats, **ints, **single}
    assert_graph_replays(lambda: sample(logits, return_valid=True, return_logprob=True, **everything), change)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 31, 1000, 32001, 128256, 262144])
def test_p29_same_tokens_on_cpu_and_cuda(gpu: str, dtype: torch.dtype, vocab: int) -> None:
    """Ids and log-probabilities, over flat to peaked rows, every combination of filters and odd strides."""
    rows = 24
    logits = torch.randn(rows, vocab + 3)[:, 3:] * torch.linspace(0, 20, rows)[:, None]
    logits[5, vocab // 2] = float("nan")
    logits[6, : vocab // 2] = float("-inf")
    logits[7, vocab // 3] = float("inf")
    logits = logits.to(dtype)
    on_gpu = torch.nn.functional.pad(logits, (3, 0)).to(gpu)[:, 3:]
    values: dict[str, Tensor] = {
        "temperature": torch.linspace(0.0, 2.0, rows).roll(7),
        "top_k": torch.arange(rows).roll(3) * max(1, vocab // 30),
        "top_p": torch.linspace(0.1, 1.2, rows).roll(11),
        "min_p": torch.linspace(-0.01, 0.05, rows).roll(5),
        "seed": torch.arange(rows) * 2**33,
        "offset": torch.arange(rows) - 3,
    }
    for names in ([], ["top_k"], ["top_p"], ["min_p"], ["temperature"], ["seed"], ["top_k", "top_p"], list(values)):
        options = {name: values[name] for name in names}
        want = sample(logits, return_valid=True, return_logprob=True, **options)
        got = sample(on_gpu, return_valid=True, return_logprob=True, **{n: v.to(gpu) for n, v in options.items()})
        assert same_bytes(got[0].cpu(), want[0]) and same_bytes(got[1].cpu(), want[1]), names
        torch.testing.assert_close(got[2].cpu(), want[2], rtol=2e-7, atol=0, equal_nan=True)
