"""A model with adapters of the PEFT library answers, patched, as it does unpatched: projections stay modules."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.bounds import assert_within_bound
from support.families import CONFIGS, make_model
from support.llama import make_prompt
from support.situations import generate
from transformers import PreTrainedModel

import gqa_kernels
from gqa_kernels import hf

pytestmark = pytest.mark.abi


def adapted(model: PreTrainedModel, targets: str | list[str] = "all-linear") -> PeftModel:
    """With an adapter on every projection, or those named, that changes what the model says."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_adapters_keep_working(device: str, family: str) -> None:
    model, prompt = make_model(family, device), make_prompt(device, [11, 26])
    plain = generate(model, prompt, max_new_tokens=8)
    wrapped = adapted(model)
    expected = generate(wrapped, prompt, max_new_tokens=8)
    with gqa_kernels.patched(wrapped) as report:
        assert report.replaced
        assert torch.equal(generate(wrapped, prompt, max_new_tokens=8), expected)
        with wrapped.disable_adapter():
            assert torch.equal(generate(wrapped, prompt, max_new_tokens=8), plain)
    assert not report.fallbacks and not torch.equal(expected, plain)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "up_proj"]], ids=["every", "some"])
def test_adapters_that_come_and_go(device: str, targets: str | list[str]) -> None:
    """Given to a model that is patched already, merged into its weights, parted from them again, taken away."""
    model, prompt = make_model("llama", device), make_prompt(device, [11, 26])
    plain = generate(model, prompt, max_new_tokens=8)
    report = gqa_kernels.patch(model)
    wrapped = adapted(model, targets)
    with_adapters = generate(wrapped, prompt, max_new_tokens=8)
    wrapped.merge_adapter()
    merged = generate(wrapped, prompt, max_new_tokens=8)
    gqa_kernels.unpatch(model)
    assert torch.equal(generate(wrapped, prompt, max_new_tokens=8), merged)
    wrapped.unmerge_adapter()
    assert torch.equal(generate(wrapped, prompt, max_new_tokens=8), with_adapters)
    assert not torch.equal(with_adapters, plain) and not report.fallbacks
    report = gqa_kernels.patch(wrapped)
    unloaded = wrapped.unload()
    assert torch.equal(generate(unloaded, prompt, max_new_tokens=8), plain) and not report.fallbacks


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_generate_refuses_adapters(device: str, family: str) -> None:
    """hf.generate would read the weights and pass the adapters by; the model's own generate does not."""
    model, prompt = make_model(family, device), make_prompt(device, [11, 26])
    wrapped = adapted(model)
    expected = generate(wrapped, prompt, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"generate: .*\.self_attn\.q.*_proj is a peft.*Linear, not a plain Linear"):
        hf.generate(model, **prompt, max_new_tokens=8)
    with gqa_kernels.patched(model):
        assert torch.equal(generate(model, prompt, max_new_tokens=8), expected)
    merged = wrapped.merge_and_unload()
    assert torch.equal(hf.generate(merged, **prompt, max_new_tokens=8), generate(merged, prompt, max_new_tokens=8))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_adapters_learn(device: str, family: str) -> None:
    """Training falls back, but for the first norm, whose input and weight want no gradient."""
    inputs, gradients = make_prompt(device, [26, 26]), []
    for patched, dtype in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        model = adapted(make_model(family, device)).to(dtype).train()
        if patched:
            report = gqa_kernels.patch(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    for name, exact in gradients[0].items():
        assert "lora" in name
        assert_within_bound(gradients[2][name], exact, gradients[1][name], what=name)
    assert gradients[0] and any("gradients are wanted" in reason for reason in report.fallbacks)
