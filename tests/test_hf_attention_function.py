"""attn_implementation="gqa_kernels", without a patch: the tokens of transformers' own attention, and no mask lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import CONFIGS, LAYERS, WINDOW, make_model, shared_model
from support.llama import attention_calls, make_prompt
from support.situations import SITUATIONS, expected_tokens, generate
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import gqa_kernels
from gqa_kernels.hf import attention_function
from gqa_kernels.hf.attention_function import is_span, make_mask


@pytest.fixture(autouse=True)
def _logged_anew() -> None:
    attention_function._logged.clear()


@contextmanager
def implementation(model: PreTrainedModel, name: str = "gqa_kernels") -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("situation", ["static cache", "chunked prefill", "beam search", "assisted", "prefix reused"])
@pytest.mark.parametrize("family", ["llama", "qwen2 sliding", "gemma2", "gpt_oss"])
def test_same_tokens(device: str, caplog: pytest.LogCaptureFixture, family: str, situation: str) -> None:
    model, run = shared_model(family, device), SITUATIONS[situation]
    expected = expected_tokens(family, device, situation)
    with (
        implementation(model),
        gqa_kernels.record_launches() as launches,
        caplog.at_level(logging.WARNING, logger="gqa_kernels.hf"),
    ):
        actual = run(model, device)
    assert torch.equal(actual, expected)
    assert not [record for record in caplog.records if record.name == "gqa_kernels.hf"]
    assert attention_calls(launches) >= LAYERS * 6


@pytest.mark.abi
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(device: str, family: str) -> None:
    """Right padding takes torch's attention, left padding the kernels: in one logged step, and to the same tokens."""
    model = shared_model(family, device)
    for side in ("left", "right"):
        prompt = make_prompt(device, [26, 9], side=side)
        expected = generate(model, prompt, max_new_tokens=8)
        with implementation(model):
            assert torch.equal(generate(model, prompt, max_new_tokens=8), expected)
        assert len(attention_function._logged) == (side == "right")


def test_registered_by_import() -> None:
    model = make_model("llama", "cpu", attn_implementation="gqa_kernels")
    assert model.config._attn_implementation == "gqa_kernels"
    assert AttentionInterface()["gqa_kernels"] is attention_function.attention
    assert AttentionMaskInterface()["gqa_kernels"] is make_mask


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, prompt = shared_model("llama", "cpu"), make_prompt("cpu", [9])
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="gqa_kernels").eval()
    with gqa_kernels.record_launches() as launches:
        assert torch.equal(generate(loaded, prompt, max_new_tokens=4), generate(model, prompt, max_new_tokens=4))
    assert attention_calls(launches) == LAYERS * 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_gradients(device: str, family: str) -> None:
    """Training takes torch's attention, over the mask that the span stands for."""
    inputs = make_prompt(device, [30, 17])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(-1) < 2, -100)  # nothing that padding says
    gradients = []
    for name in ("eager", "gqa_kernels"):
        model = make_model(family, device, attn_implementation=name).train()
        model(**inputs, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))
    assert any("gradients are wanted" in reason for reason in attention_function._logged)


@pytest.mark.parametrize("offset", [0, 5, 21, "on the device"])
@pytest.mark.parametrize("window", [None, 7])
def test_a_span_stands_for_the_mask_of_transformers(window: int | None, offset: Any) -> None:
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    filled = 21 if offset == "on the device" else offset
    q_offset = torch.tensor(21) if offset == "on the device" else offset
    for queries in (1, 4):
        for padding in (None, [0, 3, 9]):
            mask = None
            if padding is not None:
                mask = torch.arange(filled + queries) >= torch.tensor(padding)[:, None]
                if not mask[:, -queries:].all():
                    continue
            dropped = 0 if window is None else max(filled - window + 1, 0)
            arguments = {
                "batch_size": 3,
                "q_length": queries,
                "kv_length": filled + queries - dropped,
                "q_offset": q_offset,
                "kv_offset": dropped,
                "mask_function": rule,
                "attention_mask": mask,
                "local_size": window,
            }
            span = make_mask(**arguments)
            assert is_span(span) and span.untyped_storage().nbytes() == 3 * 2 * 4
            dense = attention_function._dense_mask(span, queries, filled + queries - dropped)
            assert torch.equal(dense, sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_sinks_of_another_dtype(device: str) -> None:
    """As under autocast, where the projections' dtype is not the sinks'."""
    q, k, v = (torch.randn(1, heads, 6, 16, device=device, dtype=torch.float16) for heads in (4, 2, 2))
    sinks = torch.randn(4, device=device)
    module, span = torch.nn.Module(), make_mask(1, 6, 6, device=device)
    expected, _ = attention_function.attention(module, q, k, v, span, s_aux=sinks.bfloat16().float())
    actual, _ = attention_function.attention(module, q, k, v, span, s_aux=sinks.bfloat16())
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_a_rule_that_is_not_causal_is_never_a_span() -> None:
    groups = torch.tensor([[0, 0, 1, 1]])
    rules = [
        and_masks(causal_mask_function, packed_sequence_mask_function(groups)),
        sliding_window_causal_mask_function(2),
        lambda batch, head, q, kv: kv >= q,
    ]
    for rule in rules:
        arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": rule}
        mask = make_mask(**arguments)
        assert not is_span(mask) and torch.equal(mask, sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_packed_sequences_and_custom_masks(device: str) -> None:
    model = shared_model("mistral", device)
    ids = make_prompt(device, [WINDOW + 4])["input_ids"]
    positions = torch.arange(ids.shape[1], device=device)[None] % 9
    keys = torch.arange(ids.shape[1], device=device)
    custom = ((keys[None] <= keys[:, None]) & (keys[None] % 3 != 1) | (keys[None] == keys[:, None]))[None, None]

    def run() -> Tensor:
        with torch.no_grad():
            packed = model(ids, position_ids=positions, use_cache=False).logits
            return torch.cat([packed, model(ids, attention_mask=custom, use_cache=False).logits])

    expected = run()
    with implementation(model):
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-3)


def test_patch_and_attention_function_together(device: str) -> None:
    model, prompt = shared_model("qwen2 sliding", device), make_prompt(device, [26, 9])
    expected = generate(model, prompt, max_new_tokens=8)
    with implementation(model), gqa_kernels.patched(model) as report:
        assert torch.equal(generate(model, prompt, max_new_tokens=8), expected)
    assert not report.fallbacks


def test_cost_follows_the_filled_length(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a static cache the op is told how much is filled, not how much there is."""
    model, seen = shared_model("llama", device), []
    decode = gqa_kernels.gqa_attention_decode

    def recorded(q: Tensor, k_cache: Tensor, *args: Any, cache_seqlens: Tensor, **options: Any) -> Any:
        seen.append((int(cache_seqlens), k_cache.shape[1]))
        return decode(q, k_cache, *args, cache_seqlens=cache_seqlens, **options)

    monkeypatch.setattr(gqa_kernels, "gqa_attention_decode", recorded)
    ids = make_prompt(device, [20])["input_ids"]
    past = StaticCache(model.config, max_cache_len=300)
    with implementation(model), torch.no_grad():
        model(ids[:, :18], past_key_values=past)
        seen.clear()  # a static cache hands all its rows on: a prompt longer than 16 tokens is a prefill over them
        for step in (18, 19):
            model(ids[:, step : step + 1], past_key_values=past)
    assert seen == [(19, 300)] * LAYERS + [(20, 300)] * LAYERS
