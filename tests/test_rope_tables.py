"""rope_tables against transformers' LlamaRotaryEmbedding for each scaling, and against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import to_numpy
from support.guard import same_bytes

from gqa_kernels import rope_tables

DIM, TRAINED = 64, 256
RAMP = [1.0 + 0.1 * i for i in range(DIM // 2)]
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.3},
    "dynamic": {"rope_type": "dynamic", "factor": 3.3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": 32,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "yarn, no original length": {"rope_type": "yarn", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": RAMP,
        "long_factor": [3 * x for x in RAMP],
        "original_max_position_embeddings": 64,
    },
    "longrope, no factor": {
        "rope_type": "longrope",
        "short_factor": RAMP,
        "long_factor": [3 * x for x in RAMP],
        "original_max_position_embeddings": 64,
    },
}


def theirs(
    scaling: dict[str, Any] | None, seq_len: int, device: str = "cpu", base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a model that meets a sequence of seq_len tokens."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": base, **(scaling or {"rope_type": "default"})},
    )
    rotary = llama.LlamaRotaryEmbedding(config).to(device)
    cos, sin = rotary(torch.zeros(1, device=device), torch.arange(seq_len, device=device)[None])
    return cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]


@pytest.mark.abi
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers(device: str, name: str) -> None:
    scaling = SCALINGS[name]
    for seq_len in (40, 64, 65, TRAINED, TRAINED + 1, 700):
        settings = {**(scaling or {}), "max_position_embeddings": TRAINED}
        ours = rope_tables(DIM, seq_len, base=10000.0, scaling=settings, seq_len=seq_len, device=device)
        for mine, want in zip(ours, theirs(scaling, seq_len, device)):
            if device == "cpu":
                assert same_bytes(mine, want.contiguous()), f"{seq_len} tokens"
            else:  # there transformers computes some scalings' frequencies with the GPU's own power function
                slack = 4 * torch.finfo(torch.float32).eps * (1 + torch.arange(seq_len, device=device)[:, None])
                assert bool(((mine - want).abs() <= slack).all()), f"{seq_len} tokens"


def test_type_may_be_called_type() -> None:
    tables = [rope_tables(DIM, 9, base=1e4, scaling={key: "linear", "factor": 2.0}) for key in ("type", "rope_type")]
    assert same_bytes(tables[0][1], tables[1][1])
    assert not same_bytes(tables[0][1], rope_tables(DIM, 9, base=1e4)[1])


def test_without_seq_len_nothing_is_stretched() -> None:
    for name in ("dynamic", "longrope"):
        settings = {**(SCALINGS[name] or {}), "max_position_embeddings": TRAINED}
        cos, _ = rope_tables(DIM, 40, base=10000.0, scaling=settings)
        assert same_bytes(cos, theirs(SCALINGS[name], 40)[0].contiguous())
        stretched, _ = rope_tables(DIM, 40, base=10000.0, scaling=settings, seq_len=TRAINED + 1)
        assert not same_bytes(cos, stretched)


def test_rotary_dim() -> None:
    part = rope_tables(128, 33, base=10000.0, rotary_dim=DIM)
    whole = rope_tables(DIM, 33, base=10000.0)
    factor = rope_tables(128, 33, base=10000.0, scaling={"rope_type": "default", "partial_rotary_factor": 0.5})
    assert part[0].shape == (33, DIM // 2)
    for a, b, c in zip(part, whole, factor):
        assert same_bytes(a, b) and same_bytes(a, c)
    assert [table.shape for table in rope_tables(128, 0, base=10000.0)] == [(0, 64), (0, 64)]


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_p30_positions_to_a_million(device: str, base: float) -> None:
    """Float32 angles: off by their own rounding, three roundings of pos * base^(-2i/R), and not more."""
    rows = 1048577
    positions = np.array([0, 1, 4097, 131071, 524289, 1048573, 1048575, 1048576])
    cos, sin = (to_numpy(table.cpu()[positions]) for table in rope_tables(DIM, rows, base=base, device=device))
    exponent = np.arange(0, DIM, 2) / DIM
    angle = positions[:, None] * base**-exponent
    eps = np.finfo(np.float32).eps
    # The power's exponent is itself rounded: an error of eps/2 in it is ln(base) * exponent * eps/2 in the result.
    relative = eps / 2 * (4 + np.log(base) * exponent)
    bound = angle * relative + eps
    assert (np.abs(cos - np.cos(angle)) <= bound).all()
    assert (np.abs(sin - np.sin(angle)) <= bound).all()
    assert bound[positions <= 4097].max() < 4e-3


def test_p30_no_worse_than_transformers_at_a_million() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, rope_parameters={"rope_theta": 1e4})
    positions = torch.tensor([0, 1048573, 1048575, 1048576])
    want = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    for mine, other in zip(rope_tables(DIM, 1048577, base=1e4), want):
        assert same_bytes(mine[positions], other[0, :, : DIM // 2].contiguous())


def test_p20_misuse() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"head_dim": 63}, "rotary_dim must be even, from 2 to head_dim 63, got 63"),
        ({"rotary_dim": 66}, "rotary_dim must be even, from 2 to head_dim 64, got 66"),
        ({"rotary_dim": 0}, "rotary_dim must be even, from 2 to head_dim 64, got 0"),
        ({"max_position": -1}, "max_position must be 0 or more, got -1"),
        ({"scaling": {"rope_type": "proportional"}}, "scaling['rope_type'] must be one of default, linear, dynamic"),
        ({"scaling": {"rope_type": "linear"}}, "scaling must hold 'factor' for rope_type 'linear', got"),
        ({"scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaling must hold 'low_freq_factor' for rope_type"),
        (
            {"scaling": {"rope_theta": 5e5}},
            "base must equal scaling['rope_theta'] (500000.0) where both are given, got",
        ),
        (
            {"scaling": {"rope_type": "longrope", "factor": 1.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "scaling['short_factor'] must hold 32 numbers, got 1",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as error:
            rope_tables(**{"head_dim": DIM, "max_position": 9, "base": 10000.0, **arguments})
        assert str(error.value).startswith(f"rope_tables: {message}"), error.value
