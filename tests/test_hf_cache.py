"""The cache layer that stands in for transformers' DynamicLayer, and static caches written in place."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from support.guard import same_bytes
from support.llama import LAYERS, make_llama, make_prompt
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import gqa_kernels
from gqa_kernels.hf.cache import GrowingLayer, GrowingSlidingLayer

pytestmark = pytest.mark.abi


def states(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 4)


def assert_same_layer(growing: Any, dynamic: DynamicLayer) -> None:
    assert growing.get_seq_length() == dynamic.get_seq_length()
    assert growing.get_mask_sizes(3) == dynamic.get_mask_sizes(3)
    assert growing.is_initialized == dynamic.is_initialized
    if dynamic.get_seq_length():
        assert same_bytes(growing.keys, dynamic.keys) and same_bytes(growing.values, dynamic.values)


@pytest.mark.parametrize("kind", ["full", "sliding", "sliding, recorded"])
@pytest.mark.parametrize("seed", range(6))
def test_p13_behaves_as_the_layer_it_replaces(seed: int, kind: str) -> None:
    """A random walk over everything that generate() does to a cache layer."""
    pick = random.Random(seed)
    window, recorded = 40, kind == "sliding, recorded"
    growing, layer, batch = GrowingLayer(), DynamicLayer(), 2
    if kind != "full":
        growing, layer = (which(sliding_window=window) for which in (GrowingSlidingLayer, DynamicSlidingWindowLayer))
    if recorded:
        growing.activate_past_recording()
        layer.activate_past_recording()
    steps = ["update"] * 6 + ["crop", "reorder", "repeat", "select", "copy", "adopt"] + ["reset"] * (kind == "full")
    for _ in range(60):
        step = pick.choice(steps)
        both = (growing, layer)
        length, held = layer.get_seq_length(), layer.keys.shape[-2] if layer.get_seq_length() else 0
        if step == "update":
            new = states(batch, pick.choice([1, 1, 1, 2, 17, 90]))
            ours, theirs = (each.update(*new) for each in both)
            if recorded:  # older transformers give the recorded past too, and no mask covers it
                assert ours[0].shape[-2] == min(held, window - 1) + new[0].shape[-2]
                theirs = tuple(states[..., -ours[0].shape[-2] :, :] for states in theirs)
            assert all(same_bytes(a, b) for a, b in zip(ours, theirs))
        elif step == "crop" and length > 1 and (kind == "full" or recorded or length < window):
            tokens = pick.randrange(1, min(length, max(held - window, 2)) if recorded and length >= window else length)
            for each in both:
                each.crop(-tokens)
        elif step == "reorder" and length:
            order = torch.tensor([pick.randrange(batch) for _ in range(batch)])
            for each in both:
                each.reorder_cache(order)
        elif step == "repeat" and length and batch < 8:
            batch *= 2
            for each in both:
                each.batch_repeat_interleave(2)
        elif step == "select" and batch > 1 and length:
            batch -= 1
            for each in both:
                each.batch_select_indices(torch.arange(batch))
        elif step == "copy":
            old, growing = growing, copy.deepcopy(growing)
            if length and old.keys is not None:
                old.update(*states(batch, 1))
        elif step == "reset":
            for each in both:
                each.reset()
        elif step == "adopt" and length:
            growing = type(growing).from_layer(layer)
        assert_same_layer(growing, layer)


def test_a_window_does_not_keep_a_long_prompt() -> None:
    layer = GrowingSlidingLayer(sliding_window=16)
    layer.update(*states(1, 5000))
    places = set()
    for _ in range(2000):
        layer.update(*states(1, 1))
        assert layer.keys is not None and layer.keys.shape[-2] == 15
        assert layer.keys.untyped_storage().nbytes() <= 1024 * layer.keys[:, :, :1].nbytes
        places.add(layer.keys.untyped_storage().data_ptr())
    assert len(places) <= 20


def test_p25_appends_in_place() -> None:
    """Over 2,000 appended tokens the buffers move a handful of times, not once per token."""
    layer, places = GrowingLayer(), set()
    for _ in range(2000):
        layer.update(*states(1, 1))
        assert layer.keys is not None
        places.add(layer.keys.data_ptr())
    assert len(places) <= 6
    before = layer.keys.data_ptr()
    layer.crop(-10)
    layer.update(*states(1, 10))
    assert layer.keys.data_ptr() == before


def test_inference_mode_then_not() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        first = states(1, 3)
        layer.update(*first)
    second = states(1, 2)
    keys, _ = layer.update(*second)
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=2))


def test_gradients_flow_through_it() -> None:
    layer = GrowingLayer()
    keys, values = states(1, 3)
    layer.update(keys, values)
    keys.requires_grad_()
    layer.update(keys, values)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


@pytest.mark.parametrize("made", ["by the model", "lazily", "with a config"])
def test_dynamic_cache_outlives_the_patch(device: str, made: str) -> None:
    """A cache filled by a patched model serves the unpatched one, and the other way round."""
    model, inputs = make_llama(device), make_prompt(device, [20])
    ids = inputs["input_ids"]

    def cache() -> DynamicCache | None:
        return {"by the model": None, "lazily": DynamicCache(), "with a config": DynamicCache(config=model.config)}[
            made
        ]

    def continued(past: DynamicCache) -> Tensor:
        return model(ids[:, 12:], past_key_values=past).logits.argmax(-1)

    with torch.no_grad():
        expected = model(ids).logits[:, 12:].argmax(-1)
        with gqa_kernels.patched(model):
            past = model(ids[:, :12], past_key_values=cache(), use_cache=True).past_key_values
        assert [type(layer) for layer in past.layers] == [GrowingLayer] * LAYERS
        assert torch.equal(continued(past), expected)
        past = model(ids[:, :12], past_key_values=cache(), use_cache=True).past_key_values
        with gqa_kernels.patched(model) as report:
            assert torch.equal(continued(past), expected)
    assert not report.fallbacks


def test_static_cache_keeps_its_tensors(device: str) -> None:
    """Written in place: the same buffers and the same length tensor after each step, and what transformers writes."""
    model, inputs = make_llama(device), make_prompt(device, [20])
    ids, caches = inputs["input_ids"], []
    for patch in (False, True):
        past = StaticCache(model.config, max_cache_len=32)
        if patch:
            gqa_kernels.patch(model)
        with torch.no_grad():
            model(ids[:, :18], past_key_values=past)
            kept = [(layer.keys.data_ptr(), layer.cumulative_length.data_ptr()) for layer in past.layers]
            for step in (18, 19):
                model(ids[:, step : step + 1], past_key_values=past)
        assert kept == [(layer.keys.data_ptr(), layer.cumulative_length.data_ptr()) for layer in past.layers]
        caches.append(past)
    for theirs, ours in zip(caches[0].layers, caches[1].layers):
        assert int(ours.cumulative_length) == int(theirs.cumulative_length) == 20
        assert not ours.keys[:, :, 20:].any() and not ours.values[:, :, 20:].any()
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    gqa_kernels.unpatch(model)


def test_prompt_cache_is_reused(device: str) -> None:
    """The documented way: prefill once, deepcopy the cache for each question."""
    model, inputs = make_llama(device), make_prompt(device, [20])
    ids = inputs["input_ids"]
    with torch.no_grad(), gqa_kernels.patched(model):
        prefix = DynamicCache()
        model(ids[:, :10], past_key_values=prefix)
        answers = [
            model.generate(ids[:, :length], past_key_values=copy.deepcopy(prefix), max_new_tokens=4, do_sample=False)
            for length in (14, 20)
        ]
        assert prefix.get_seq_length() == 10
    for length, answer in zip((14, 20), answers):
        expected = model.generate(ids[:, :length], max_new_tokens=4, do_sample=False)
        assert torch.equal(answer, expected)
