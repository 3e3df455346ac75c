"""Tokens per second of whole Llama models with random weights through transformers' generate, patched and not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import shapes
from benchmarks.case import OURS
from benchmarks.report import Row
from benchmarks.shapes import Model
from benchmarks.timing import Settings

REPEATS = 3


def wanted(settings: Settings, quick: bool) -> list[Model]:
    if quick:
        return [] if settings.cuda else shapes.MODELS_CPU
    return shapes.MODELS if settings.cuda else shapes.MODELS_CPU


def build(shape: Model, settings: Settings, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.prompt + shape.new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def _check(built: Any, ids: Tensor, reference: Tensor, baseline: Tensor) -> None:
    """The patched model's logits are no further from float32 than twice the unpatched model's."""
    logits = built(ids).logits[:, -1].float()
    scale = reference.norm()
    mine, theirs = float((logits - reference).norm() / scale), float((baseline - reference).norm() / scale)
    if not mine <= 2 * theirs + 1e-5:
        raise AssertionError(f"patched model is wrong: relative error of logits {mine:.2e}, unpatched {theirs:.2e}")


def _seconds(run: Callable[[], Any], settings: Settings) -> float:
    times = []
    for _ in range(REPEATS):
        if settings.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if settings.cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def measure(model: Model, settings: Settings) -> Iterator[Row]:
    """Prefill is the time to the first token; decode is what each further token costs."""
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    with torch.no_grad():
        exact = build(model, settings, torch.float32)
        ids = torch.randint(1, model.vocab, (1, model.prompt), device=settings.device)  # 0 pads
        reference = exact(ids).logits[:, -1].float()
        built = exact.to(dtype)
        baseline = built(ids).logits[:, -1].float()

        def generate(tokens: int) -> None:
            built.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        def rows(impl: str) -> list[Row]:
            generate(2)
            first = _seconds(lambda: generate(1), settings)
            rest = _seconds(lambda: generate(model.new_tokens), settings) - first
            each = rest / (model.new_tokens - 1)
            prefill = Row("model", "prefill", f"{model.name}, {model.prompt} tokens", impl, call_us=first * 1e6)
            prefill.tokens_per_s = model.prompt / first
            decode = Row("model", "decode", f"{model.name} at {model.prompt}", impl, call_us=each * 1e6)
            decode.tokens_per_s = 1 / each
            return [prefill, decode]

        theirs = rows("transformers")
        with gqa_kernels.patched(built):
            _check(built, ids, reference, baseline)
            ours = rows(OURS)
    for mine, peer in zip(ours, theirs):
        mine.best_peer, mine.vs_best_peer = peer.impl, peer.us / mine.us
        yield from (mine, peer)
