"""Every family in every situation of generate(): patched, a model gives the tokens it gave before."""

from __future__ import annotations

import copy

import pytest
import torch
from support.bounds import assert_within_bound, to_numpy
from support.families import CONFIGS, LAYERS, longrope, make_model, shared_model
from support.llama import attention_calls, make_prompt, step_logits
from support.situations import SITUATIONS, expected_tokens, generate
from torch import Tensor
from transformers import Gemma2ForCausalLM

import gqa_kernels
from gqa_kernels.hf.families import FAMILIES


@pytest.mark.abi
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_same_tokens(device: str, family: str, situation: str) -> None:
    model, run = shared_model(family, device), SITUATIONS[situation]
    expected = expected_tokens(family, device, situation)
    with gqa_kernels.patched(model) as report, gqa_kernels.record_launches() as launches:
        actual = run(model, device)
    assert torch.equal(actual, expected)
    assert not report.fallbacks, str(report)
    if device == "cpu":  # replayed graphs do not pass through the launchers
        assert attention_calls(launches) >= LAYERS * 6


@pytest.mark.parametrize("family", CONFIGS)
def test_right_padding_keeps_the_tokens(device: str, family: str) -> None:
    """A mask that is no interval per row goes to the original attention, cache and all."""
    model, prompt = shared_model(family, device), make_prompt(device, [11, 7], side="right")
    expected = generate(model, prompt, max_new_tokens=24)
    with gqa_kernels.patched(model) as report:
        assert torch.equal(generate(model, prompt, max_new_tokens=24), expected)
    assert len(report.fallbacks) == 1 and "right padding" in next(iter(report.fallbacks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_half_types(device: str, family: str, dtype: torch.dtype) -> None:
    """Prefill and steps, fed the same tokens, against the same weights in float32."""
    model = shared_model(family, device, dtype)
    exact, inputs = copy.deepcopy(model).float(), make_prompt(device, [30, 17])
    if model.config.model_type == "gemma2":
        inputs = make_prompt(device, [30, 30])  # masks of eager attention are finite, and reach padding in full
    given = inputs["input_ids"], inputs["attention_mask"], 24
    with torch.no_grad():
        reference, baseline = (step_logits(m, *given) for m in (exact, model))
        with gqa_kernels.patched(model) as report:
            actual = step_logits(model, *given)
    assert not report.fallbacks, str(report)
    assert_within_bound(actual, to_numpy(reference), baseline, what="logits")


@pytest.mark.parametrize("family", CONFIGS)
def test_autocast(device: str, family: str) -> None:
    """Projections in bfloat16 between norms in float32: served or not, the same within bfloat16's rounding."""
    model, inputs = shared_model(family, device), make_prompt(device, [24, 24])

    def logits() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return model(**inputs).logits.float()

    with torch.no_grad():
        truth = model(**inputs).logits
    expected = logits()
    with gqa_kernels.patched(model):
        actual = logits()
    best, noise = expected.topk(2, dim=-1).values, (expected - truth).abs().amax(-1)
    decided = best[..., 0] - best[..., 1] > 2 * noise
    assert decided.any() and torch.equal(actual.argmax(-1)[decided], expected.argmax(-1)[decided])
    assert float((actual - truth).abs().mean()) <= 2 * float((expected - truth).abs().mean())


def test_longrope_beyond_its_switch(device: str) -> None:
    """The long factors, and tokens that cross from the short ones: there transformers begins a new cache."""
    model, inputs = make_model("phi3", device, **longrope(96, switch=24)), make_prompt(device, [40])
    with torch.no_grad():
        expected = model(**inputs).logits
        with gqa_kernels.patched(model) as report:
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-3)
    assert not report.fallbacks
    crossing = make_prompt(device, [20])
    expected = generate(model, crossing, max_new_tokens=12)
    with gqa_kernels.patched(model):
        assert torch.equal(generate(model, crossing, max_new_tokens=12), expected)


def test_every_family_is_tested() -> None:
    assert {config.model_type for config, _ in CONFIGS.values()} == set(FAMILIES)


def test_softcap_is_that_of_the_implementation(device: str) -> None:
    """Where transformers offers Gemma 2 its sdpa, that leaves the softcap out; so does then a patched model."""
    inputs, logits = make_prompt(device, [19]), {}
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not Gemma2ForCausalLM._supports_sdpa:
            pytest.skip("this transformers has no sdpa for Gemma 2")
        model = make_model("gemma2", device, attn_implementation=implementation, attn_logit_softcapping=2.0)
        with torch.no_grad():
            expected = model(**inputs).logits
            with gqa_kernels.patched(model):
                logits[implementation] = model(**inputs).logits
        torch.testing.assert_close(logits[implementation], expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits["eager"], logits["sdpa"], atol=0.1)
