"""What patch() replaces, what it says about it, and that unpatch() takes all of it back."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.llama import assert_same_model, make_llama, make_prompt
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

import gqa_kernels

KINDS = {"LlamaModel": 1, "LlamaDecoderLayer": 2, "LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}


def generate(model: LlamaForCausalLM) -> torch.Tensor:
    return model.generate(**make_prompt(str(model.device), [7, 4]), max_new_tokens=6, do_sample=False)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.abi
def test_report_names_every_module() -> None:
    model = make_llama("cpu")
    report = gqa_kernels.patch(model)
    counted: dict[str, int] = {}
    for module in report.replaced:
        counted[module.kind] = counted.get(module.kind, 0) + 1
        assert module.name and module.reason
    assert counted == KINDS and not report.left_alone
    assert json.loads(json.dumps(report.to_dict()))["model"] == "LlamaForCausalLM"
    text = str(report)
    assert "12 modules replaced, 0 left alone" in text
    assert "model.layers.0-1.self_attn  LlamaAttention" in text and "model.norm  LlamaRMSNorm" in text


def test_idempotent_and_undone() -> None:
    model = make_llama("cpu")
    before, config = attributes(model), copy.deepcopy(model.config.to_dict())
    forward = model.model.layers[0].self_attn.forward
    report = gqa_kernels.patch(model)
    bound = model.model.layers[0].self_attn.forward
    assert bound is not forward
    assert gqa_kernels.patch(model) is report and model.model.layers[0].self_attn.forward is bound
    assert gqa_kernels.patch(model.model) is report
    for _ in range(2):
        gqa_kernels.unpatch(model)
        assert attributes(model) == before
        assert model.model.layers[0].self_attn.forward == forward
        assert model.config.to_dict() == config


def test_context_manager() -> None:
    model = make_llama("cpu")
    before = attributes(model)
    with pytest.raises(KeyError), gqa_kernels.patched(model):
        assert attributes(model) != before
        raise KeyError
    assert attributes(model) == before
    gqa_kernels.patch(model)
    with gqa_kernels.patched(model):
        pass
    assert attributes(model) != before


def test_models_are_independent() -> None:
    """Even two models that share one config object."""
    first = make_llama("cpu")
    second = LlamaForCausalLM(first.config).eval()
    before = attributes(second)
    gqa_kernels.patch(first)
    assert attributes(second) == before
    gqa_kernels.patch(second)
    gqa_kernels.unpatch(first)
    with gqa_kernels.record_launches() as launches:
        generate(first)
        assert not launches
        generate(second)
        assert launches


def test_copies_and_files(tmp_path: Path) -> None:
    model = make_llama("cpu")
    expected = generate(model)
    names = set(model.state_dict())
    gqa_kernels.patch(model)
    assert set(model.state_dict()) == names
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        attention = other.model.layers[1].self_attn
        assert attention.forward.args[0] is attention
        assert torch.equal(generate(other), expected)
        gqa_kernels.unpatch(other)
        assert "forward" not in vars(attention)
    model.save_pretrained(tmp_path)
    assert "gqa" not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert "forward" not in vars(loaded.model) and torch.equal(generate(loaded), expected)


@pytest.mark.parametrize("family", ["gpt2", "none"])
def test_other_families_are_refused_by_name(family: str) -> None:
    models = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)),
        "none": lambda: nn.Linear(2, 2),
    }
    words = {"gpt2": "of a family among llama, .*GPT2LMHeadModel.*'gpt2'", "none": "of transformers .*got Linear"}
    model = models[family]()
    before = attributes(model)
    with pytest.raises(ValueError, match=f"^patch: model must be .*{words[family]}"):
        gqa_kernels.patch(model)
    assert attributes(model) == before


class OtherNorm(LlamaRMSNorm):
    pass


class OtherAttention(LlamaAttention):
    pass


def test_left_alone_with_reasons(device: str) -> None:
    """Whatever stays behind is named, and the model still computes the same."""
    model, inputs = make_llama(device, hidden_act="gelu"), make_prompt(device, [19])
    model.model.norm.__class__ = OtherNorm
    layer = model.model.layers[0]
    layer.post_attention_layernorm.forward = LlamaRMSNorm.forward.__get__(layer.post_attention_layernorm)
    report = assert_same_model(model, lambda model: model(**inputs).logits)
    reasons = {module.name: module.reason for module in report.left_alone}
    assert set(reasons) == {
        "model.norm",
        "model.layers.0.mlp",
        "model.layers.1.mlp",
        "model.layers.0.post_attention_layernorm",
    }
    assert "GELU" in reasons["model.layers.0.mlp"] and "subclass of LlamaRMSNorm" in reasons["model.norm"]
    assert "already replaced" in reasons["model.layers.0.post_attention_layernorm"]
    assert list(report.fallbacks) == ["the norm before its MLP has hooks or is of another class"]


@pytest.mark.parametrize("why", ["subclass", "head_dim"])
def test_attention_is_all_or_none(device: str, why: str) -> None:
    """The layers share one mask, so a foreign attention layer keeps the others out."""
    model = make_llama(device, head_dim=12) if why == "head_dim" else make_llama(device)
    if why == "subclass":
        model.model.layers[1].self_attn.__class__ = OtherAttention
    inputs = make_prompt(device, [19, 7])
    mask = inputs["attention_mask"].bool()
    report = assert_same_model(model, lambda model: model(**inputs).logits, rows=mask)
    assert {m.kind for m in report.left_alone} >= {"LlamaModel"}
    assert {m.name for m in report.left_alone} >= {f"model.layers.{i}.self_attn" for i in range(2)}
    assert why in " ".join(m.reason for m in report.left_alone)
    assert any(m.kind == "LlamaMLP" for m in report.replaced)


def test_hooks_and_outputs() -> None:
    model, inputs = make_llama("cpu"), make_prompt("cpu", [9])
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
        for module in model.modules()
        if isinstance(module, (LlamaAttention, LlamaMLP, LlamaRMSNorm))
    ]
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        before, seen[:] = list(seen), []
        with gqa_kernels.patched(model):
            actual = model(**inputs, output_hidden_states=True)
    assert seen == before and len(seen) == 9
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for handle in handles:
        handle.remove()


def test_import_leaves_transformers_alone() -> None:
    code = "import sys, gqa_kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'pitch'"):
        gqa_kernels.pitch  # noqa: B018


def test_nothing_is_logged_where_all_is_served(caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama("cpu")
    with caplog.at_level(logging.INFO, logger="gqa_kernels.hf"), gqa_kernels.patched(model):
        generate(model)
    assert not [record for record in caplog.records if record.name.startswith("gqa_kernels")]
