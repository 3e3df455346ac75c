"""Whole models with random weights: transformers' generate, eager and compiled, a patched model's, and hf.generate."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import gqa_kernels
import gqa_kernels.hf
from benchmarks import shapes
from benchmarks.case import OURS
from benchmarks.limits import read_us
from benchmarks.report import Row
from benchmarks.shapes import Model
from benchmarks.timing import Settings
from gqa_kernels.hf.generation.graphs import kept_for

REPEATS = 3
HF_GENERATE = f"{OURS} hf.generate"
EAGER, COMPILED = "transformers", "transformers compile"
PROMPT_ALONE = f"{HF_GENERATE}, the prompt alone"
FLOOR = "reading all once"
FEW_TOKENS = 8  # checked; and what a compiled call may need to record its steps anew
CHECKED_ROWS = 4
SHORT_PROMPT = 10

Generate = Callable[[int], Tensor]


def wanted(settings: Settings, quick: bool) -> list[Model]:
    if quick:
        return [] if settings.cuda else shapes.MODELS_CPU
    return shapes.MODELS if settings.cuda else shapes.MODELS_CPU


def build(shape: Model, settings: Settings, dtype: torch.dtype) -> Any:
    """The model in its dtype from the start: 8 billion parameters in float32 are 32 GB more."""
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=2 * shape.prompt + shape.new_tokens,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(settings.device):
            model: Any = getattr(transformers, f"{shape.family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _contestants(
    built: Any, ids: Tensor, compiled: bool
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]], Generate]]:
    """Name, what surrounds its calls, and the call; ours first."""

    def generate(tokens: int, **options: Any) -> Tensor:
        return built.generate(ids, max_new_tokens=tokens, do_sample=False, **options)

    yield HF_GENERATE, nullcontext, lambda tokens: gqa_kernels.hf.generate(built, ids, max_new_tokens=tokens)
    yield OURS, lambda: gqa_kernels.patched(built), generate
    yield EAGER, nullcontext, generate
    if compiled:
        yield COMPILED, nullcontext, lambda tokens: generate(tokens, cache_implementation="static")


def _check(built: Any, ids: Tensor, generated: Tensor) -> None:
    """Each token is the float32 model's choice, wherever that is further ahead than twice what rounding the unpatched
    model to its dtype changes."""
    if generated.shape != (ids.shape[0], ids.shape[1] + FEW_TOKENS):
        raise AssertionError(f"generated {tuple(generated.shape)} of a prompt {tuple(ids.shape)}")
    generated = generated[:CHECKED_ROWS]
    options = {"logits_to_keep": FEW_TOKENS + 1}
    theirs = built(generated, **options).logits[:, :-1].float()
    exact = copy.deepcopy(built).float()(generated, **options).logits[:, :-1]
    best, noise = exact.topk(2, dim=-1).values, (theirs - exact).abs().amax(-1)
    decided = best[..., 0] - best[..., 1] > 2 * noise
    if not torch.equal(generated[:, ids.shape[1] :][decided], exact.argmax(-1)[decided]):
        raise AssertionError("a token is not the float32 model's choice")


def _seconds(generate: Generate, tokens: int, settings: Settings) -> float:
    times = []
    for _ in range(REPEATS):
        if settings.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        generate(tokens)
        if settings.cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def _times(generate: Generate, new_tokens: int, settings: Settings) -> tuple[float, float]:
    """Seconds to the first token, in a call that is not the first, and for each further one."""
    first, few = _seconds(generate, 1, settings), _seconds(generate, FEW_TOKENS, settings)
    return first, (_seconds(generate, new_tokens, settings) - few) / (new_tokens - FEW_TOKENS)


def _prompt_seconds(built: Any, ids: Tensor, settings: Settings) -> float:
    """The prompt through the layers, one time right after the other: what the device takes for it."""
    prefill = kept_for(built).stepper(*ids.shape, None).prefill

    def often() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            prefill(ids, padded=False)
        if settings.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / REPEATS

    often()
    return often()


def _bytes_of_a_step(built: Any, model: Model) -> int:
    """Every weight once, but an embedding that is not the head too, and every key and value."""
    weights = {weight.data_ptr(): weight.nbytes for weight in built.parameters()}
    if not model.tied:
        del weights[built.get_input_embeddings().weight.data_ptr()]
    keys = model.layers * model.batch * model.prompt * model.kv_heads * (model.hidden // model.q_heads)
    return sum(weights.values()) + 2 * keys * built.dtype.itemsize


def _short_prompt(built: Any, model: Model, settings: Settings) -> Iterator[Row]:
    """The first token after a few, and further ones."""
    ids = torch.randint(1, model.vocab, (1, SHORT_PROMPT), device=settings.device)

    def generate(tokens: int) -> Tensor:
        return gqa_kernels.hf.generate(built, ids, max_new_tokens=tokens)

    for _ in range(2):
        generate(FEW_TOKENS)
    first, each = _times(generate, model.new_tokens, settings)
    yield Row("model", "prefill", f"{model.name}, {SHORT_PROMPT} tokens", HF_GENERATE, call_us=first * 1e6)
    yield Row("model", "decode", f"{model.name} at {SHORT_PROMPT}", HF_GENERATE, call_us=each * 1e6)


def measure(model: Model, settings: Settings, compiled: bool = False) -> Iterator[Row]:
    """Prefill is the time to the first token, in a call that is not the first; decode what each further token costs."""
    rows: list[Row] = []
    prompts, steps = f"{model.name}, {model.prompt} tokens", f"{model.name} at {model.prompt}"
    with torch.no_grad():
        built = build(model, settings, torch.bfloat16 if settings.cuda else torch.float32)
        ids = torch.randint(1, model.vocab, (model.batch, model.prompt), device=settings.device)  # 0 pads
        checked: Tensor | None = None
        for name, context, generate in _contestants(built, ids, compiled):
            with context():
                generate(model.new_tokens)
                tokens = generate(FEW_TOKENS)
                first, each = _times(generate, model.new_tokens, settings)
            if name.startswith(OURS) and (checked is None or not torch.equal(tokens, checked)):
                _check(built, ids, tokens)
                checked = tokens
            prefill = Row("model", "prefill", prompts, name, call_us=first * 1e6)
            prefill.tokens_per_s = model.batch * model.prompt / first
            decode = Row("model", "decode", steps, name, call_us=each * 1e6)
            decode.tokens_per_s = model.batch / each
            rows += [prefill, decode]
            if name == HF_GENERATE:
                alone = _prompt_seconds(built, ids, settings)
                rows.append(Row("model", "prefill", prompts, PROMPT_ALONE, call_us=alone * 1e6))
        if model.batch == 1:
            rows += _short_prompt(built, model, settings)
        gqa_kernels.hf.release(built)
        floor = read_us(_bytes_of_a_step(built, model), settings)
        rows.append(Row("model", "decode", steps, FLOOR, call_us=floor))
    for row in rows:
        peers = [peer for peer in rows if peer.shape == row.shape and peer.impl in (EAGER, COMPILED)]
        if row.impl in (OURS, HF_GENERATE) and peers:
            best = min(peers, key=lambda peer: peer.us)
            row.best_peer, row.vs_best_peer = best.impl, best.us / row.us
    yield from sorted(rows, key=lambda row: (row.shape, row.op), reverse=True)
