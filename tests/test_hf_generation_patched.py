"""patch() gives model.generate the steps of hf.generate, where they mean the same, and transformers' loop elsewhere."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from support.families import longrope, make_model, shared_model
from support.llama import make_llama, make_prompt
from support.streamer import Recorder
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

import gqa_kernels
from gqa_kernels.hf.generation import graphs

pytestmark = pytest.mark.abi

FAMILIES = ["llama", "mistral", "qwen2 sliding", "qwen3", "phi4"]


class Halved(LogitsProcessor):
    """A processor that nobody knows."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids, 0.5 * scores.gather(1, input_ids))


SERVED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "sampling all": {"do_sample": True, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.2},
    "penalty": {"repetition_penalty": 1.3},
    "no repeats": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": list(range(2, 40))},
    "eos": {"eos_token_id": [5, 9, 33, 71]},
    "sampling to eos": {"do_sample": True, "eos_token_id": [5, 9, 33, 71], "pad_token_id": 3},
    "own processor": {"logits_processor": LogitsProcessorList([Halved()])},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "max_length": {"max_length": 40, "max_new_tokens": None},
    "chunks": {"prefill_chunk_size": 5},
}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    result = model.generate(**inputs, **{key: value for key, value in options.items() if value is not None})
    # What follows draws as if the unpatched model had generated.
    return result, torch.rand(2, device=inputs["input_ids"].device)


def steps_of(model: PreTrainedModel) -> int:
    return len(graphs.kept_for(model)._steppers)


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_served_calls(device: str, options: dict[str, Any]) -> None:
    """The unpatched model's tokens, sampled ones too, and torch's generator left where it would be."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = generate(model, inputs, **options)
    with gqa_kernels.patched(model) as report:
        actual = generate(model, inputs, **options)
        assert steps_of(model) == 1 and not report.own_loops and not report.fallbacks
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert steps_of(model) == 0


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(device: str, family: str, sample: bool) -> None:
    """Of the draws a few: logits that differ in the last bit make another one now and then."""
    model, inputs = shared_model(family, device), make_prompt(device, [11] if sample else [11, 4, 23])
    gqa_kernels.hf.release(model)  # what other tests left
    tokens = 16 if sample else 64
    expected = generate(model, inputs, do_sample=sample, max_new_tokens=tokens)
    with gqa_kernels.patched(model) as report:
        actual = generate(model, inputs, do_sample=sample, max_new_tokens=tokens)
        assert steps_of(model) == 1 and not report.own_loops
    assert torch.equal(actual[0], expected[0])


OWN_LOOP: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "its mode is beam_search"),
    "assisted": ({"prompt_lookup_num_tokens": 3}, "its mode is assisted_generation"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "return_dict_in_generate is set"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "criteria": ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)])}, "it stops by MaxTimeCriteria"),
    "max_time": ({"max_time": 60.0}, "it stops by MaxTimeCriteria"),
}


@pytest.mark.parametrize(("options", "reason"), OWN_LOOP.values(), ids=OWN_LOOP)
def test_calls_of_transformers_own_loop(
    device: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = make_llama(device), make_prompt(device, [12])
    expected, _ = generate(model, inputs, **options)
    with gqa_kernels.patched(model) as report, caplog.at_level(logging.INFO, logger="gqa_kernels.hf"):
        for _ in range(2):
            actual, _ = generate(model, inputs, **options)
        assert steps_of(model) == 0 and not report.fallbacks
    assert report.own_loops == [reason]
    logged = [record.message for record in caplog.records]
    assert logged == [f"generate() of LlamaForCausalLM takes transformers' own loop: {reason}"]
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert torch.equal(actual.sequences, expected.sequences) and len(actual.scores) == 24
    assert reason in str(report)


def test_inputs_of_transformers_own_loop(device: str) -> None:
    """Caches and embeddings of the caller, masks with holes, prompts that are too long, other layers."""
    model, inputs = make_llama(device), make_prompt(device, [12, 5])
    right = make_prompt(device, [12, 5], side="right")
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}

    def calls() -> list[Tensor]:
        cached = {**inputs, "past_key_values": DynamicCache(config=model.config)}
        return [model.generate(**one, max_new_tokens=8, do_sample=False) for one in (cached, right, embedded)]

    expected = calls()
    with gqa_kernels.patched(model) as report:
        assert all(torch.equal(a, b) for a, b in zip(calls(), expected))
        assert report.own_loops[1:] == [
            "a row of the attention mask is not left padding and then ones to its end",
            "inputs_embeds is given",
        ]
        linear = model.model.layers[0].mlp.up_proj
        handle = linear.register_forward_hook(lambda module, args, output: output * 0.5)
        hooked = generate(model, inputs)[0]
        assert report.own_loops[3:] == ["model.layers.0.mlp.up_proj has hooks"]
        handle.remove()
        assert not torch.equal(generate(model, inputs)[0], hooked) and steps_of(model) == 1
    crossing, prompt = make_model("phi3", device, **longrope(96, switch=24)), make_prompt(device, [20])
    expected = [generate(crossing, prompt, max_new_tokens=12)[0]]
    with gqa_kernels.patched(crossing) as report:
        assert torch.equal(generate(crossing, prompt, max_new_tokens=12)[0], expected[0])
        assert "longrope" in report.own_loops[0]


def test_positional_arguments_and_configs(device: str) -> None:
    model, ids = make_llama(device), make_prompt(device, [12])["input_ids"]
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.2, pad_token_id=0)
    expected = model.generate(ids, config), model.generate(ids, generation_config=config), model.generate(inputs=ids)
    with gqa_kernels.patched(model) as report:
        actual = model.generate(ids, config), model.generate(ids, generation_config=config), model.generate(inputs=ids)
        assert steps_of(model) == 1 and not report.own_loops
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_streamer(device: str, sample: bool) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    options = {"eos_token_id": [5, 9, 33, 71], "do_sample": sample}
    theirs, ours = Recorder(), Recorder()
    generate(model, inputs, streamer=theirs, **options)
    with gqa_kernels.patched(model):
        generate(model, inputs, streamer=ours, **options)
    assert ours.ended and theirs.ended and len(ours.values) == len(theirs.values)
    assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_interrupted(device: str, fail_at: int, error: type[BaseException]) -> None:
    """The next call knows nothing of it."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4])
    expected = generate(model, inputs)[0]
    with gqa_kernels.patched(model) as report:
        with pytest.raises(error):
            generate(model, inputs, streamer=Recorder(fail_at, error))
        assert torch.equal(generate(model, inputs)[0], expected)
    assert not report.own_loops


def test_inside_another_generation(device: str) -> None:
    """While its buffers are in use, a model generates by transformers' own loop."""
    model, inputs = make_llama(device), make_prompt(device, [11])
    expected = generate(model, inputs)[0]

    class Nested(LogitsProcessor):
        inner: list[Tensor]

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == 15:
                self.inner = [model.generate(**inputs, max_new_tokens=24, do_sample=False)]
            return scores

    nested = Nested()
    with gqa_kernels.patched(model) as report:
        actual = generate(model, inputs, logits_processor=LogitsProcessorList([nested]))[0]
    assert torch.equal(actual, expected) and torch.equal(nested.inner[0], expected)
    assert report.own_loops == ["another generation of this model is running, and its buffers are in use"]


def test_copies_generate_for_themselves(device: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11])
    expected = generate(model, inputs)[0]
    gqa_kernels.patch(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    assert not torch.equal(generate(model, inputs)[0], expected)
    for twin in twins:
        assert torch.equal(generate(twin, inputs)[0], expected)
        assert steps_of(twin) == 1
        gqa_kernels.unpatch(twin)
        assert "generate" not in vars(twin) and steps_of(twin) == 0


def test_a_generate_of_ones_own_is_left_alone() -> None:
    model = make_llama("cpu")
    own = model.generate = lambda *args, **kwargs: "mine"
    with gqa_kernels.patched(model):
        assert model.generate is own
    assert model.generate is own


def test_wrapped_model(device: str) -> None:
    model, inputs = make_llama(device), make_prompt(device, [11])
    expected = generate(model, inputs)[0]
    wrapper = nn.ModuleDict({"base_model": model})
    with gqa_kernels.patched(wrapper):
        assert torch.equal(generate(model, inputs)[0], expected) and steps_of(model) == 1
    assert steps_of(model) == 0
