"""hf.generate over a cache of the caller's: the tokens of a call without one, before and after what it holds."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from support.contract import lacks_sm90
from support.families import longrope, make_model, shared_model
from support.llama import LAYERS, make_llama, make_prompt, positions_of
from support.quantized import FORMATS, LARGEST, dequantize, quantize
from support.streamer import Recorder
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import gqa_kernels
from gqa_kernels import KVCache, PagedKVCache
from gqa_kernels.hf import generate, release
from gqa_kernels.hf.generation import graphs, prefill
from gqa_kernels.hf.generation.whole_step import whole_step
from gqa_kernels.kv_cache import BaseCache

KINDS: dict[str, dict[str, Any]] = {"dense": {}, "pages of 16": {"page_size": 16}, "pages of 7": {"page_size": 7}}


def cache_for(model: PreTrainedModel, batch: int, capacity: int, **options: Any) -> BaseCache:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = PagedKVCache if "page_size" in options else KVCache
    sizes = (batch, LAYERS, capacity, config.num_key_value_heads, head_dim)
    return kind(*sizes, **{"dtype": model.dtype, "device": model.device, **options})


@pytest.mark.abi
@pytest.mark.parametrize("lengths", [[11], [11, 4, 23]], ids=["single", "left-padded"])
@pytest.mark.parametrize(
    "family, kind",
    [
        *(("llama", kind) for kind in KINDS),
        ("qwen2 sliding", "pages of 16"),
        ("qwen3", "dense"),
        ("phi3", "pages of 7"),
    ],
)
def test_same_tokens(device: str, family: str, lengths: list[int], kind: str) -> None:
    """In one call, and in four that go on from one another."""
    model, inputs = shared_model(family, device), make_prompt(device, lengths)
    tokens, prompt = 230 if family == "phi3" else 256, max(lengths)
    expected = generate(model, **inputs, max_new_tokens=tokens)
    cache = cache_for(model, len(lengths), 300, **KINDS[kind])
    assert torch.equal(generate(model, **inputs, max_new_tokens=tokens, kv_cache=cache), expected)
    assert cache.length == prompt + tokens - 1 and (cache.lengths == cache.length).all()
    cache.reset()
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(expected[:, prompt:])], dim=1)
    start = 0
    for end in (prompt - 3, prompt, prompt + 29, prompt + tokens):  # more and fewer tokens than decode takes
        given = expected[:, start : max(start + 1, end - 10)] if end > prompt else inputs["input_ids"][:, start:end]
        new = max(1, end - start - given.shape[1])
        out = generate(model, given, mask[:, : start + given.shape[1]], max_new_tokens=new, kv_cache=cache)
        start += out.shape[1] - 1
        assert cache.length == start
        if end >= prompt:
            assert torch.equal(out, expected[:, start + 1 - out.shape[1] : start + 1])


@pytest.mark.parametrize("kind", ["dense", "pages of 16", "quantised"])
def test_whole_steps(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a dense cache one op a step where a call without a cache has that, to the same tokens; else an op a part."""
    whole: list[bool] = []

    def watched(*args: Any, **options: Any) -> Tensor | None:
        logits = whole_step(*args, **options)
        whole.append(logits is not None)
        return logits

    monkeypatch.setattr(graphs, "whole_step", watched)
    model, ids = make_model("llama", device, torch.bfloat16), make_prompt(device, [11])["input_ids"]
    expected = generate(model, ids, max_new_tokens=64)
    served, whole = set(whole), []
    options = {"dtype": torch.int8, "k_scale": 0.05, "v_scale": 0.05} if kind == "quantised" else KINDS[kind]
    out = generate(model, ids, max_new_tokens=64, kv_cache=cache_for(model, 1, 256, **options))
    assert set(whole) == (served if kind == "dense" else {False})
    assert kind != "dense" or torch.equal(out, expected)
    assert served == {device != "cpu" and not lacks_sm90()}


def test_long_prompts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that are captured when they come again, from wherever the cache ends."""
    monkeypatch.setattr(prefill, "CHUNK", 24)
    model, ids = make_llama(device), make_prompt(device, [150])["input_ids"]
    expected = [generate(model, ids[:, : 50 * n], max_new_tokens=20) for n in (1, 2, 3)]
    cache = cache_for(model, 1, 170, page_size=16)
    for n in range(3):
        out = generate(model, ids[:, 50 * n : 50 * (n + 1)], max_new_tokens=20, kv_cache=cache)
        assert torch.equal(out[:, 50:], expected[n][:, 50 * (n + 1) :])
        cache.crop(50 * (n + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_length(device: str, kind: str) -> None:
    """Cropped each at its own place, rows go on as they would alone."""
    model, ids = make_llama(device), make_prompt(device, [30, 30, 30])["input_ids"]
    held = [21, 8, 30]
    alone = [generate(model, ids[row : row + 1, : held[row]], max_new_tokens=40) for row in range(3)]
    cache = cache_for(model, 3, 96, **KINDS[kind])
    generate(model, ids, max_new_tokens=1, kv_cache=cache)
    assert cache.length == 30
    cache.crop(torch.tensor(held, device=device) - 1)
    last = torch.cat([one[:, length - 1 : length] for one, length in zip(alone, held)])
    out = generate(model, last, max_new_tokens=40, kv_cache=cache)
    for row, one in enumerate(alone):
        assert torch.equal(out[row, 1:], one[0, held[row] :])
    assert cache.lengths.tolist() == [length + 39 for length in held]
    with pytest.raises(ValueError, match="attention_mask must be None over a kv_cache whose rows differ"):
        generate(model, last, torch.ones_like(last), max_new_tokens=1, kv_cache=cache)


def test_forks_share_a_prefix(device: str) -> None:
    """Two batches go on from one prompt whose pages they share, and leave it as it was."""
    model, ids = make_llama(device), make_prompt(device, [40])["input_ids"]
    prefix = cache_for(model, 1, 128, page_size=16, num_pages=32)
    generate(model, ids[:, :37], max_new_tokens=1, kv_cache=prefix)
    before = [part[prefix.block_table[0, :3].long(), :].clone() for part in prefix.layer(1)]
    for rows in (1, 3):
        fork = prefix.fork([0] * rows)
        ends = torch.cat([ids[:, 37:] + row for row in range(rows)])
        expected = generate(model, torch.cat([ids[:, :37].expand(rows, -1), ends], dim=1), max_new_tokens=50)
        assert torch.equal(generate(model, ends, max_new_tokens=50, kv_cache=fork), expected[:, 37:])
        del fork
    assert prefix.length == 37 and prefix.num_free_pages == 32 - 3
    for part, was in zip(prefix.layer(1), before):
        held = part[prefix.block_table[0, :3].long(), :]
        assert torch.equal(held.flatten(0, 1)[:37], was.flatten(0, 1)[:37])


class Rounded(DynamicCache):
    """Keys and values as a quantised cache holds them."""

    def __init__(self, cache: BaseCache) -> None:
        super().__init__()
        self._like = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        scales = self._like.scales(layer_idx)
        rounded = []
        for states, name in ((key_states, "k_scale"), (value_states, "v_scale")):
            scale = scales[name].float()
            stored = quantize(states.transpose(1, 2), scale, self._like.dtype)
            rounded.append(dequantize(stored, scale).to(states.dtype).transpose(1, 2))
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("kind", ["dense", "pages of 16"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_quantised(device: str, family: str, dtype: torch.dtype, kind: str) -> None:
    """Each token is the choice of the unpatched model over a cache of rounded keys and values, wherever that is no tie:
    its two best logits further apart than twice its own rounding error, taken from the same model in float32."""
    model, inputs = shared_model(family, device, torch.bfloat16), make_prompt(device, [11, 4, 23])
    plain = DynamicCache()
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=plain)
    largest = [[part.abs().amax((0, 2, 3)) for part in (layer.keys, layer.values)] for layer in plain.layers]
    k_scale, v_scale = (torch.stack(parts).float() * 1.5 / LARGEST[dtype] for parts in zip(*largest))
    cache = cache_for(model, 3, 128, dtype=dtype, k_scale=k_scale, v_scale=v_scale, **KINDS[kind])
    first = generate(model, **inputs, max_new_tokens=17, kv_cache=cache)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first[:, 23:])], dim=1)
    tokens = torch.cat([first[:, :-1], generate(model, first[:, -1:], mask, max_new_tokens=40, kv_cache=cache)], dim=1)
    mask = torch.cat([mask, torch.ones_like(tokens[:, 40:])], dim=1)

    options = {"attention_mask": mask, "position_ids": positions_of(mask)}
    with torch.no_grad():
        expected = model(tokens, past_key_values=Rounded(cache), **options).logits[:, 22:-1].float()
        exact = copy.deepcopy(model).float()
        truth = exact(tokens, past_key_values=Rounded(cache), **options).logits[:, 22:-1]
    best, noise = expected.topk(2, dim=-1).values, (expected - truth).abs().amax(-1)
    decided = best[..., 0] - best[..., 1] > 2 * noise
    assert decided.float().mean() > 0.3, "too many ties for the test to mean anything"
    assert torch.equal(tokens[:, 23:][decided], expected.argmax(-1)[decided])


def test_sampling_stopping_and_streaming(device: str) -> None:
    """As without a cache; rows end where they end, and pages behind the last one are free again."""
    model, inputs = make_llama(device), make_prompt(device, [11, 4, 23])
    sampling: dict[str, Any] = {"do_sample": True, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    options: dict[str, Any] = {**sampling, "max_new_tokens": 60}
    plain = generate(model, **inputs, **options)
    cache = cache_for(model, 3, 128, page_size=4)
    for check_every in (1, 5, 16):
        cache.reset()
        ends = plain[:, 23 + 20].tolist()
        expected = generate(model, **inputs, **options, eos_token_id=ends, pad_token_id=3)
        ending: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": 3, "check_every": check_every}
        streamer = Recorder()
        out = generate(model, **inputs, **options, **ending, kv_cache=cache, streamer=streamer)
        assert torch.equal(out, expected) and len(streamer.values) == 1 + out.shape[1] - 23
        assert cache.length == out.shape[1] - 1
        assert cache.num_free_pages == cache.num_pages - 3 * -(-cache.length // 4)


def test_interrupted(device: str) -> None:
    model, ids = make_llama(device), make_prompt(device, [11, 11])["input_ids"]
    cache = cache_for(model, 2, 64, page_size=4)
    first = generate(model, ids, max_new_tokens=8, kv_cache=cache)
    expected = generate(model, first, max_new_tokens=20)
    length, free = cache.length, cache.num_free_pages

    class Failing:
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:
                raise KeyboardInterrupt

    for options in ({}, {"check_every": 4}):
        with pytest.raises(KeyboardInterrupt):
            generate(model, first[:, -1:], max_new_tokens=20, kv_cache=cache, streamer=Failing(), **options)
        assert (cache.length, cache.num_free_pages) == (length, free)
    out = generate(model, first[:, -1:], max_new_tokens=20, kv_cache=cache)
    assert torch.equal(out[:, 1:], expected[:, first.shape[1] :])


def test_kept_with_the_cache(device: str) -> None:
    """A step is captured once for a cache, anew where it has moved, and forgotten with it; a capture amid tokens, of
    another kind of step, leaves them as they are."""
    model, ids = make_llama(device), make_prompt(device, [20])["input_ids"]
    expected = generate(model, ids, max_new_tokens=60)
    cache = cache_for(model, 1, 32)
    kept = graphs.kept_for(model)
    out = generate(model, ids, max_new_tokens=10, kv_cache=cache)
    first = kept._over[cache]
    out = torch.cat([out, generate(model, out[:, -1:], max_new_tokens=1, kv_cache=cache)[:, 1:]], dim=1)
    assert kept._over[cache] is first
    cache.grow(100)
    out = torch.cat([out, generate(model, out[:, -1:], max_new_tokens=9, kv_cache=cache)[:, 1:]], dim=1)
    assert kept._over[cache] is not first
    release(model)
    generate(model, out[:, -1:], max_new_tokens=9, kv_cache=cache, do_sample=True, seed=1)
    cache.crop(out.shape[1] - 1)
    out = torch.cat([out, generate(model, out[:, -1:], max_new_tokens=40, kv_cache=cache)[:, 1:]], dim=1)
    assert torch.equal(out, expected)
    kept, gone = graphs.kept_for(model), weakref.ref(graphs.kept_for(model)._over[cache])
    assert not kept._steppers
    del first, cache
    gc.collect()
    assert gone() is None and not kept._over


def test_longrope(device: str) -> None:
    """An empty cache crosses the switch as a call without one does; a filled one does not."""
    model, ids = make_model("phi3", device, **longrope(96, switch=24)), make_prompt(device, [40])["input_ids"]
    for length in (20, 24, 25):
        expected = generate(model, ids[:, :length], max_new_tokens=12)
        cache = cache_for(model, 1, 64, page_size=4)
        assert torch.equal(generate(model, ids[:, :length], max_new_tokens=12, kv_cache=cache), expected)
        assert cache.length == length + 11
    out = generate(model, expected[:, -1:], max_new_tokens=5, kv_cache=cache)
    assert torch.equal(out[:, 1:], generate(model, expected, max_new_tokens=5)[:, 37:])
    cache.crop(20)
    with pytest.raises(ValueError, match="longrope's short factors"):
        generate(model, ids[:, :1], max_new_tokens=8, kv_cache=cache)


def test_refusals(device: str) -> None:
    """With what was wanted and given; model and cache serve the next call."""
    model, ids = make_llama(device), make_prompt(device, [11, 11])["input_ids"]
    half = shared_model("llama", device, torch.bfloat16)
    good = cache_for(model, 2, 32, page_size=8, num_pages=6)
    expected = generate(model, ids, max_new_tokens=4, kv_cache=good)
    ones = torch.ones_like(ids)
    with torch.inference_mode():
        inference = cache_for(model, 2, 32)
    sizes: dict[str, Any] = {"dtype": torch.float32, "device": device}
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, cache_for(model, 3, 32), {}, "kv_cache must have batch 2, as input_ids, got 3"),
        (model, KVCache(2, LAYERS + 1, 32, 2, 16, **sizes), {}, "kv_cache must have num_layers 2, as the model, got 3"),
        (model, KVCache(2, LAYERS, 32, 1, 16, **sizes), {}, "kv_cache must have num_kv_heads 2, as the model, got 1"),
        (model, KVCache(2, LAYERS, 32, 2, 24, **sizes), {}, "kv_cache must have head_dim 16, as the model, got 24"),
        (model, cache_for(model, 2, 32, dtype=torch.bfloat16), {}, "must be of torch.float32, as the model, got"),
        (
            model,
            cache_for(model, 2, 32, dtype=torch.int8),
            {},
            "must be of torch.float32, as the model, got torch.int8",
        ),
        (half, cache_for(half, 2, 32, dtype=torch.float16), {}, "bfloat16, as the model, float8_e4m3fn or int8, got"),
        (model, cache_for(model, 2, 30), {"max_new_tokens": 21}, "room for 31 tokens more: .* from 0 to 30"),
        (model, good, {"max_new_tokens": 6}, r"room for 16 tokens more: .* must need at most 2 more pages"),
        (model, good, {"attention_mask": ones}, r"must have shape \(2, 25\), 14 cached tokens and input_ids \(2, 11\)"),
        (model, cache_for(model, 2, 1000), {"max_new_tokens": 502}, "the prompt of 11 and 502 new tokens exceed"),
        (model, {}, {}, "kv_cache must be a KVCache or a PagedKVCache, got dict"),
        (model, inference, {}, r"made outside of torch.inference_mode\(\)"),
    ]
    if device != "cpu":
        cases.append((model, cache_for(model, 2, 32, device="cpu"), {}, "kv_cache must have device cuda:0"))
    for used, cache, options, reason in cases:
        with pytest.raises(ValueError, match=f"^generate: .*{reason}"):
            generate(used, ids, **{"max_new_tokens": 2, **options}, kv_cache=cache)
    assert good.length == 14 and good.num_free_pages == 2
    good.reset()
    assert torch.equal(generate(model, ids, max_new_tokens=4, kv_cache=good), expected)
    with gqa_kernels.validation():
        good.reset()
        assert torch.equal(generate(model, ids, max_new_tokens=4, kv_cache=good), expected)
