"""GqaSampler in generate(): the op's own tokens, whatever the cache and whoever proposes them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from support.families import shared_model
from support.llama import make_prompt
from support.situations import generate
from torch import Tensor

import gqa_kernels
from gqa_kernels.hf import GqaSampler

pytestmark = pytest.mark.abi

SETTINGS: dict[str, Any] = {"temperature": 3.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7}


def sampled(model: Any, prompt: dict[str, Tensor], sampler: GqaSampler, **options: Any) -> Tensor:
    return generate(model, prompt, logits_processor=[sampler], **{"max_new_tokens": 16, **options})


class Recorded(GqaSampler):
    """Remembers what it was called with."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append((input_ids.clone(), scores.clone()))
        return super().__call__(input_ids, scores)


calls: list[tuple[Tensor, Tensor]] = []


def test_draws_what_the_op_draws(device: str) -> None:
    model, prompt = shared_model("qwen2", device), make_prompt(device, [9, 17])
    calls.clear()
    ids = sampled(model, prompt, Recorded(**SETTINGS))
    for before, scores in calls:
        length = before.shape[1]
        assert torch.equal(gqa_kernels.sample(scores, offset=length, **SETTINGS), ids[:, length])
    assert len(calls) == 16
    assert not torch.equal(ids, sampled(model, prompt, GqaSampler(**{**SETTINGS, "seed": 8})))


def test_neither_patch_nor_cache_nor_assistant_changes_the_text(device: str) -> None:
    model, prompt = shared_model("qwen2", device), make_prompt(device, [12])
    prompt["input_ids"][:, 6:] = prompt["input_ids"][:, :6]
    # No filters: where one cuts, the last bits of a logit decide over a token.
    sampler = pickle.loads(pickle.dumps(GqaSampler(temperature=2.0, seed=7)))
    expected = sampled(model, prompt, sampler)
    for options in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        with gqa_kernels.patched(model):
            assert torch.equal(sampled(model, prompt, sampler, **options), expected)


def test_a_seed_per_row_makes_rows_independent(device: str) -> None:
    model = shared_model("qwen2", device)
    ids = make_prompt(device, [9, 9])["input_ids"]
    seeds = torch.tensor([3, 4], device=device)

    def text(rows: slice) -> Tensor:
        sampler = GqaSampler(temperature=2.0, seed=seeds[rows])
        return sampled(model, {"input_ids": ids[rows]}, sampler)

    assert torch.equal(text(slice(0, 2)), torch.cat([text(slice(0, 1)), text(slice(1, 2))]))


def test_penalties_are_those_of_transformers(device: str) -> None:
    model, prompt = shared_model("qwen2", device), make_prompt(device, [15])
    expected = generate(model, prompt, max_new_tokens=24, repetition_penalty=1.7)
    assert torch.equal(
        sampled(model, prompt, GqaSampler(temperature=0, repetition_penalty=1.7), max_new_tokens=24), expected
    )
    sampler = GqaSampler(temperature=0, presence_penalty=1e6, prompt_length=15)
    generated = sampled(model, prompt, sampler, max_new_tokens=40)[0, 15:]
    assert len(generated.unique()) == 40
    with pytest.raises(ValueError, match="frequency_penalty needs prompt_length"):
        GqaSampler(frequency_penalty=0.5)
