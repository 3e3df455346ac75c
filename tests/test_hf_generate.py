"""A patched Llama generates what the unpatched one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.llama import (
    LAYERS,
    assert_same_model,
    attention_calls,
    make_cache,
    make_llama,
    make_prompt,
    positions_of,
    step_logits,
)
from torch import Tensor
from transformers import CompileConfig, LlamaForCausalLM

import gqa_kernels

STEPS = 64
PROMPTS = {"single": [11], "left-padded": [11, 4, 23, 8]}


def generate(model: LlamaForCausalLM, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "disable_compile": True, **options}
    return model.generate(**prompt, **settings)


def assert_served(report: gqa_kernels.hf.PatchReport) -> None:
    assert report.replaced and not report.left_alone and not report.fallbacks, str(report)


@pytest.mark.abi
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens(device: str, cache: str, prompt: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, PROMPTS[prompt])
    expected = generate(model, inputs, past_key_values=make_cache(model, cache))
    with gqa_kernels.patched(model) as report, gqa_kernels.record_launches() as launches:
        actual = generate(model, inputs, past_key_values=make_cache(model, cache))
    assert torch.equal(actual, expected)
    assert_served(report)
    assert attention_calls(launches) == LAYERS * STEPS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_bfloat16(device: str, cache: str, prompt: str) -> None:
    """Fed the same tokens, both models choose the same next one, wherever the unpatched model's choice is not a tie:
    its two best logits further apart than twice its own rounding error, taken from the float32 model."""
    exact, inputs = make_llama(device), make_prompt(device, PROMPTS[prompt])
    tokens = generate(exact, inputs)
    model, mask = make_llama(device, torch.bfloat16), inputs["attention_mask"]

    def logits(model: LlamaForCausalLM) -> Tensor:
        return step_logits(model, tokens[:, :-1], mask, mask.shape[1], make_cache(model, cache))

    with torch.no_grad():
        truth, expected = (logits(m) for m in (exact, model))
        with gqa_kernels.patched(model) as report:
            actual = logits(model)
    assert_served(report)
    best = expected.float().topk(2, dim=-1).values
    noise = (expected.float() - truth).abs().amax(-1)
    decided = best[..., 0] - best[..., 1] > 2 * noise
    assert decided.float().mean() > 0.5, "too many ties for the test to mean anything"
    assert torch.equal(actual.argmax(-1)[decided], expected.argmax(-1)[decided])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(device: str, cache: str) -> None:
    """Chunks on both sides of the decode kernel's sixteen queries, over one cache."""
    model, inputs = make_llama(device), make_prompt(device, [50, 31])
    for chunk in (7, 20):
        options = {"max_new_tokens": 8, "prefill_chunk_size": chunk}
        expected = generate(model, inputs, past_key_values=make_cache(model, cache), **options)
        with gqa_kernels.patched(model) as report:
            actual = generate(model, inputs, past_key_values=make_cache(model, cache), **options)
        assert torch.equal(actual, expected)
        assert_served(report)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["sampling", "beam search", "beam sampling", "static by name", "no cache"],
)
def test_ways_to_generate(device: str, options: dict[str, Any]) -> None:
    model, inputs = make_llama(device), make_prompt(device, [9, 17])
    options = {"max_new_tokens": 24, **options}
    torch.manual_seed(1)
    expected = generate(model, inputs, **options)
    torch.manual_seed(1)
    with gqa_kernels.patched(model) as report, gqa_kernels.record_launches() as launches:
        actual = generate(model, inputs, **options)
    assert torch.equal(actual, expected)
    assert_served(report)
    if device == "cpu":  # replayed graphs do not pass through the launchers
        assert attention_calls(launches) == LAYERS * 24


@pytest.mark.parametrize("kind", ["assistant model", "prompt lookup"])
def test_assisted_decoding(device: str, kind: str) -> None:
    """Rejected tokens are cropped from the cache, and the next ones are written over them."""
    model, inputs = make_llama(device), make_prompt(device, [12])
    inputs["input_ids"][:, 6:] = inputs["input_ids"][:, :6]
    assistant = make_llama(device, seed=0, num_hidden_layers=1)
    options = {"assistant_model": assistant} if kind == "assistant model" else {"prompt_lookup_num_tokens": 3}
    expected = generate(model, inputs)
    with gqa_kernels.patched(model) as report, gqa_kernels.patched(assistant):
        actual = generate(model, inputs, **options)
    assert torch.equal(actual, expected)
    assert_served(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[29], [29, 12, 5]], ids=["single", "left-padded"])
def test_p1_forward(device: str, dtype: torch.dtype, lengths: list[int]) -> None:
    model, inputs = make_llama(device, dtype), make_prompt(device, lengths)
    mask = inputs["attention_mask"]

    def run(model: LlamaForCausalLM) -> Tensor:
        return model(**inputs, position_ids=positions_of(mask), use_cache=False).logits

    assert_served(assert_same_model(model, run, rows=mask.bool()))


def test_bare_model_and_embeddings(device: str) -> None:
    """LlamaModel alone, given embeddings, no mask and no positions."""
    model = make_llama(device)
    embeddings = model.model.embed_tokens(make_prompt(device, [21, 21])["input_ids"]).detach()

    def run(model: LlamaForCausalLM) -> Tensor:
        embedded = embeddings.to(model.dtype)
        return model.model(inputs_embeds=embedded).last_hidden_state

    assert_served(assert_same_model(model, run))


def test_longrope_width_and_bias(device: str) -> None:
    """Llama-3 scaling, biases everywhere, and one KV head per query head."""
    options = {
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    model, inputs = make_llama(device, **options), make_prompt(device, [33])
    assert_served(assert_same_model(model, lambda model: model(**inputs).logits))


def test_p17_compiled_steps(device: str) -> None:
    """generate() compiles the steps over a static cache: one graph, no break, no recompilation, the same tokens."""
    model, inputs = make_llama(device), make_prompt(device, [9, 5])
    expected = generate(model, inputs)
    compilation = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compilation._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with gqa_kernels.patched(model):
        actual = generate(
            model, inputs, cache_implementation="static", compile_config=compilation, disable_compile=False
        )
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_static_cache_compiles_itself(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate() with a static cache captures its steps in CUDA graphs."""
    model, inputs = make_llama(gpu), make_prompt(gpu, [9, 5])
    expected = generate(model, inputs)
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    with gqa_kernels.patched(model):
        actual = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    assert torch.equal(actual, expected)
    assert len(replays) >= STEPS - 2  # the first steps may run as they are
