"""Calls the kernels do not serve use the original forward, with one logged reason, and lose nothing on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import WINDOW, shared_model
from support.guard import same_bytes
from support.llama import assert_same_model, make_cache, make_llama, make_prompt, positions_of
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import gqa_kernels

pytestmark = pytest.mark.abi

Run = Callable[[LlamaForCausalLM], Tensor]


def causal_4d(tokens: int, dtype: torch.dtype, device: str) -> Tensor:
    """A custom mask: causal, and every third key hidden from the others."""
    keys = torch.arange(tokens, device=device)
    allowed = (keys[None] <= keys[:, None]) & ((keys[None] % 3 != 1) | (keys[None] == keys[:, None]))
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


class OwnCache(DynamicCache):
    """A cache that keeps its keys in its own way."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def decoded_with_holes(model: LlamaForCausalLM, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """A second turn after a padded answer: its mask has a hole."""
    past, ids, mask = cache(), inputs["input_ids"], inputs["attention_mask"].clone()
    model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=past)
    mask[0, 5:9] = 0
    logits = [model(ids[:, 9:12], attention_mask=mask[:, :12], past_key_values=past).logits]
    for step in range(12, 15):
        out = model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=past)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


LONG = {"lengths": [20, 20]}
CASES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Tensor]], Run]]] = {
    "custom 4D mask": (
        "not one interval",
        {},
        lambda i: lambda m: m(i["input_ids"], attention_mask=causal_4d(20, m.dtype, m.device)).logits,
    ),
    "right padding": (
        "not one interval",
        {"lengths": [20, 13], "side": "right"},
        lambda i: lambda m: m(**i).logits,
    ),
    "holes": ("not one interval", LONG, lambda i: lambda m: decoded_with_holes(m, i, DynamicCache)),
    "packed sequences": (
        "not one interval",
        {},
        lambda i: (
            lambda m: (
                m(i["input_ids"], position_ids=torch.arange(20, device=m.device)[None] % 7, use_cache=False).logits
            )
        ),
    ),
    "a cache of its own": (
        "OwnCache",
        {"lengths": [20, 7]},
        lambda i: lambda m: m(**i, position_ids=positions_of(i["attention_mask"]), past_key_values=OwnCache()).logits,
    ),
    "bidirectional": ("is_causal", {}, lambda i: lambda m: m(i["input_ids"], is_causal=False).logits),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_steps_aside(device: str, caplog: pytest.LogCaptureFixture, case: str) -> None:
    reason, prompt, make_run = CASES[case]
    inputs = make_prompt(device, **{"lengths": [20], **prompt})
    rows = (
        inputs["attention_mask"].bool() if prompt.get("lengths") == [20, 13] or case == "a cache of its own" else None
    )
    with caplog.at_level(logging.WARNING, logger="gqa_kernels.hf"):
        report = assert_same_model(make_llama(device), make_run(inputs), rows=rows)
    assert len(report.fallbacks) == 1 and reason in next(iter(report.fallbacks))
    messages = [record.getMessage() for record in caplog.records if record.name == "gqa_kernels.hf"]
    assert len(messages) == 1 and reason in messages[0] and messages[0].startswith("LlamaAttention uses its original")


def test_training(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """Gradients are those of the unpatched model, with and without checkpointing."""
    inputs = make_prompt(device, [20, 11])
    for checkpointing in (False, True):
        gradients = []
        for wanted in (False, True):
            model = make_llama(device).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            if wanted:
                report = gqa_kernels.patch(model)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(same_bytes(a, b) for a, b in zip(*gradients))
        assert [reason for reason in report.fallbacks if "gradients are wanted" in reason]


def test_packed_training_with_checkpointing(device: str) -> None:
    """Checkpointing turns the cache off inside transformers, which then reads the sequences off the positions."""
    ids = make_prompt(device, [20])["input_ids"]
    positions = torch.arange(20, device=device)[None] % 7
    gradients = []
    for wanted in (False, True):
        model = make_llama(device).train()
        model.gradient_checkpointing_enable()
        if wanted:
            gqa_kernels.patch(model)
        model(ids, position_ids=positions, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(same_bytes(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bidirectional_over_a_padded_batch(device: str, family: str) -> None:
    """A call that takes causality away, with a cache, and windows that a prompt leaves behind."""
    model, inputs = shared_model(family, device), make_prompt(device, [WINDOW + 6, 9])
    rows = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, is_causal=False).logits[rows]
        with gqa_kernels.patched(model) as report:
            actual = model(**inputs, is_causal=False).logits[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert list(report.fallbacks) == ["is_causal is False"]


def test_dropout(device: str) -> None:
    model, inputs = make_llama(device, attention_dropout=0.5).train(), make_prompt(device, [20])
    with gqa_kernels.patched(model) as report, torch.no_grad():
        torch.manual_seed(0)
        first = model(**inputs).logits
        assert not torch.equal(first, model(**inputs).logits)
    assert list(report.fallbacks) == ["attention dropout is active in training mode"]


@pytest.mark.parametrize("padded", [False, True])
def test_output_attentions(device: str, padded: bool) -> None:
    """An eager model still gives its weights, over a mask rebuilt from the bounds."""
    model = make_llama(device, attn_implementation="eager")
    inputs = make_prompt(device, [20, 11] if padded else [20, 20])
    mask = inputs["attention_mask"]
    report = assert_same_model(
        model,
        lambda m: m(**inputs, output_attentions=True).attentions[0].sum(1),
        rows=mask.bool(),
    )
    assert len(report.fallbacks) == 1 and "output_attentions" in next(iter(report.fallbacks))


def test_eager_model_is_served(device: str) -> None:
    model, inputs = make_llama(device, attn_implementation="eager"), make_prompt(device, [20, 11])
    rows = inputs["attention_mask"].bool()
    exact = make_llama(device, torch.float64)  # by sdpa: eager masks overflow in float64
    report = assert_same_model(model, lambda m: m(**inputs).logits, rows=rows, exact=exact)
    assert not report.fallbacks


def test_double_precision(device: str) -> None:
    model, inputs = make_llama(device, torch.float64), make_prompt(device, [20])
    with torch.no_grad():
        expected = model(**inputs).logits
        with gqa_kernels.patched(model) as report:
            assert same_bytes(model(**inputs).logits, expected)
    assert list(report.fallbacks) == ["no kernel takes torch.float64"]


def test_autocast(device: str) -> None:
    """Projections in bfloat16 between norms in float32."""
    model, inputs = make_llama(device), make_prompt(device, [20, 11])
    rows = inputs["attention_mask"].bool()

    def run(model: LlamaForCausalLM) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(**inputs).logits

    with torch.no_grad():
        truth, expected = model(**inputs).logits[rows], run(model)[rows]
        with gqa_kernels.patched(model):
            actual = run(model)[rows]
    best = expected.float().topk(2, dim=-1).values
    decided = best[..., 0] - best[..., 1] > 2 * (expected.float() - truth).abs().amax(-1)
    assert decided.any() and torch.equal(actual.argmax(-1)[decided], expected.argmax(-1)[decided])


def test_a_mask_that_breaks_in_a_decode_step(device: str) -> None:
    """It is not looked at on the host there: the row becomes NaN, its neighbour is untouched."""
    model, inputs = make_llama(device), make_prompt(device, [9, 9])
    token, mask = inputs["input_ids"][:, :1], torch.ones(2, 10, device=device)
    with gqa_kernels.patched(model), torch.no_grad():
        logits = []
        for hole in (False, True):
            past = DynamicCache()
            model(**inputs, past_key_values=past)
            mask[1, 4] = 0 if hole else 1
            logits.append(model(token, attention_mask=mask, past_key_values=past).logits)
    assert bool(logits[1][1].isnan().all())
    assert same_bytes(logits[0][0], logits[1][0])


def test_p22_no_synchronisation_in_a_decode_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step reads a tensor on the host, with a padded batch and either cache."""
    model, inputs = make_llama(device), make_prompt(device, [9, 5])
    token = inputs["input_ids"][:, -1:]

    def forbidden(*args: Any) -> Any:
        raise AssertionError("a decode step read a tensor on the host")

    with gqa_kernels.patched(model) as report, torch.no_grad():
        for cache in ("dynamic", "static"):
            model_inputs = {**inputs, "position_ids": positions_of(inputs["attention_mask"])}
            past = make_cache(model, cache, 32)
            model(**model_inputs, past_key_values=past)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
            positions = positions_of(mask)[:, -1:]
            with monkeypatch.context() as patcher:
                for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
                    patcher.setattr(torch.Tensor, name, forbidden)
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    model(token, attention_mask=mask, position_ids=positions, past_key_values=past)
                finally:
                    if device == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
    assert not report.fallbacks
