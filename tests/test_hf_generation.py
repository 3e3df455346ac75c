"""hf.generate gives what the unpatched model's generate gives, in every family, batch and length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.bounds import assert_within_bound, to_numpy
from support.families import WINDOW, longrope, make_model, shared_model
from support.llama import make_llama, make_prompt, positions_of
from torch import Tensor
from transformers import PreTrainedModel

import gqa_kernels
from gqa_kernels.hf import generate
from gqa_kernels.hf.generation import graphs, prefill, step
from gqa_kernels.hf.generation.state import State, own_cache
from gqa_kernels.hf.generation.weights import read_weights
from gqa_kernels.hf.generation.whole_step import whole_step

FAMILIES = ["llama", "mistral", "qwen2", "qwen2 sliding", "qwen3", "phi3", "phi4"]
PROMPTS = {"single": [11], "left-padded": [11, 4, 23]}


def expected_tokens(model: PreTrainedModel, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    settings = {"max_new_tokens": 64, "do_sample": False, "disable_compile": True, **options}
    return model.generate(**prompt, **settings)


@pytest.mark.abi
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(device: str, family: str, prompt: str) -> None:
    model, inputs = shared_model(family, device), make_prompt(device, PROMPTS[prompt])
    tokens = 230 if family.startswith("phi") else 256  # short of the switch of longrope
    expected = expected_tokens(model, inputs, max_new_tokens=tokens)
    assert torch.equal(generate(model, **inputs, max_new_tokens=tokens), expected)


def test_long_sequences(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the chunks of a prompt and the capacities of a cache, there and back, with one graph and another."""
    monkeypatch.setattr(prefill, "CHUNK", 24)
    model = make_llama(device)
    for lengths in ([50, 31], [7, 25], [50, 31]):
        inputs = make_prompt(device, lengths)
        for tokens in (256, 32):
            actual = generate(model, **inputs, max_new_tokens=tokens)
            assert torch.equal(actual, expected_tokens(model, inputs, max_new_tokens=tokens))
    assert len(graphs.kept_for(model)._steppers) == 1


def test_prompt_of_every_length(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last chunk of 1 token, of as many as decode takes, and of more; windows filled by the prompt or beyond it."""
    monkeypatch.setattr(prefill, "CHUNK", 32)
    model = shared_model("mistral", device)
    for length in (1, 16, 17, WINDOW, WINDOW + 1, 32, 33, 49):
        inputs = make_prompt(device, [length])
        expected = expected_tokens(model, inputs, max_new_tokens=6)
        for _ in range(3):  # as it is, captured, replayed
            assert torch.equal(generate(model, inputs["input_ids"], max_new_tokens=6), expected)


@pytest.mark.parametrize("rows", [1, 3, 5, 17])
def test_batches(device: str, rows: int) -> None:
    """Batches between the sizes that have graphs."""
    model, inputs = make_llama(device), make_prompt(device, [5 + row % 7 for row in range(rows)])
    actual = generate(model, **inputs, max_new_tokens=12)
    assert torch.equal(actual, expected_tokens(model, inputs, max_new_tokens=12))


@pytest.mark.parametrize("length", [20, 24, 25, 40])
def test_longrope_beyond_its_switch(device: str, length: int) -> None:
    """Prompts below the switch at 24, at it and beyond. Where the new tokens cross it, the cache is made anew, so the
    tokens are those without one: with a cache, transformers 5.17 goes on from the last token alone."""
    model, inputs = make_model("phi3", device, **longrope(96, switch=24)), make_prompt(device, [length])
    actual = generate(model, **inputs, max_new_tokens=12)
    assert torch.equal(actual, expected_tokens(model, inputs, max_new_tokens=12, use_cache=False))
    assert torch.equal(generate(model, **inputs, max_new_tokens=12), actual)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_rotary_scaling(device: str, rope_type: str) -> None:
    parameters = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    wanted = {"linear": 3, "dynamic": 3, "yarn": 3, "llama3": 6}[rope_type]
    model = make_llama(device, rope_parameters=dict(list(parameters.items())[:wanted]))
    inputs = make_prompt(device, [33, 12])
    assert torch.equal(generate(model, **inputs, max_new_tokens=40), expected_tokens(model, inputs, max_new_tokens=40))


def test_biases_everywhere(device: str) -> None:
    model = make_llama(device, attention_bias=True, mlp_bias=True, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1.0, 1.0)
    inputs = make_prompt(device, [9, 17])
    assert torch.equal(generate(model, **inputs, max_new_tokens=24), expected_tokens(model, inputs, max_new_tokens=24))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_bfloat16(device: str, family: str, prompt: str) -> None:
    """Each token is the unpatched model's choice after the same tokens, wherever that choice is not a tie: its two best
    logits further apart than twice its own rounding error, taken from the same weights in float32."""
    model, inputs = shared_model(family, device, torch.bfloat16), make_prompt(device, PROMPTS[prompt])
    start = inputs["input_ids"].shape[1]
    tokens = generate(model, **inputs, max_new_tokens=32)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, start:])], dim=1)
    options = {"attention_mask": mask, "position_ids": positions_of(mask)}
    with torch.no_grad():
        expected = model(tokens, **options).logits[:, start - 1 : -1].float()
        truth = copy.deepcopy(model).float()(tokens, **options).logits[:, start - 1 : -1]
    best, noise = expected.topk(2, dim=-1).values, (expected - truth).abs().amax(-1)
    decided = best[..., 0] - best[..., 1] > 2 * noise
    assert decided.float().mean() > 0.3, "too many ties for the test to mean anything"
    assert torch.equal(tokens[:, start:][decided], expected.argmax(-1)[decided])


@pytest.mark.parametrize("whole_steps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_p1_logits(device: str, family: str, dtype: torch.dtype, whole_steps: bool) -> None:
    """Of the prompt and of steps after it, fed the same tokens; by an op for each part, or one for the step."""
    model = shared_model(family, device, dtype)
    exact, inputs, prompt = copy.deepcopy(model).double(), make_prompt(device, [30, 17]), 24
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        options = {"attention_mask": mask, "position_ids": positions_of(mask)}
        reference, baseline = (m(ids, **options).logits[:, prompt - 1 :] for m in (exact, model))
        weights = read_weights(model)
        weights.pack()
        weights.refresh()
        state = State(weights, own_cache(weights, 2, 64))
        state.begin(2, (mask == 0).sum(-1))
        state.tables.fill(ids.shape[1])
        logits = [prefill.Prefill(weights, state, None)(ids[:, :prompt], padded=True)]
        for position in range(prompt, ids.shape[1]):
            state.set_place(2, position, 0)
            state.hidden.copy_(step.embed(weights, ids[:, position])[:, None])
            whole = whole_step(weights, state, padded=True) if whole_steps else None
            if whole is None:
                whole = step.logits_of(weights, step.forward(weights, state, state.hidden, padded=True))
            logits.append(whole)
    assert_within_bound(torch.stack(logits, 1), to_numpy(reference), baseline, attention_extra=0.0, what="logits")


@pytest.mark.parametrize("patched", [False, True])
def test_patched_or_not(device: str, patched: bool) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = expected_tokens(model, inputs, max_new_tokens=16)
    if patched:
        gqa_kernels.patch(model)
    assert torch.equal(generate(model, **inputs, max_new_tokens=16), expected)


def test_in_any_mode_of_autograd(device: str) -> None:
    """Buffers made in inference mode serve a call outside of it, and the other way round; autocast changes nothing."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = expected_tokens(model, inputs, max_new_tokens=16)
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad(), torch.autocast(device)):
        with context:
            assert torch.equal(generate(model, **inputs, max_new_tokens=16), expected)
