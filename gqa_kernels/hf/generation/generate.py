"""``generate(model, input_ids, ...)``: a whole generation on the device, one CUDA graph per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels.hf.generation.callers_cache import check_cache, room_in
from gqa_kernels.hf.generation.drawing import Setting, Settings
from gqa_kernels.hf.generation.graphs import kept_for
from gqa_kernels.hf.generation.prompt import check_ids, leftpad_of
from gqa_kernels.hf.generation.record import Unserved
from gqa_kernels.hf.generation.rotary import check_length
from gqa_kernels.hf.generation.session import Session
from gqa_kernels.hf.generation.stopping import Ends, Stopping
from gqa_kernels.kv_cache import BaseCache

#: Steps between a look at the tokens and the reading of what it saw, so that the device has work meanwhile.
LAG = 2


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: Setting = 1.0,
    top_k: Setting = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    repetition_penalty: Setting = 1.0,
    seed: int | Sequence[int] | Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Any = None,
    check_every: int = 16,
    kv_cache: BaseCache | None = None,
) -> Tensor:
    """Continues prompts with a HuggingFace model, patched or not, over the model's own weights.

    On a GPU each token is the replay of one CUDA graph, from the last token's embedding to the next token; the host
    looks at the tokens every ``check_every`` steps, and not at all where nothing can stop the batch. On the CPU the
    same step runs as it is. The first call of a batch size allocates a KV cache and captures the graph; both are kept
    with the model until it is gone, its weights are replaced, or :func:`release` frees them.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or Phi-3 for causal language modeling, in eval mode, all of it on one
            device in one dtype. Weights changed or replaced since the last call are seen.
        input_ids: ``[batch, tokens]``.
        attention_mask: like ``input_ids``: zeros before each prompt, ones to its end. None: no padding. With a
            ``kv_cache`` that holds tokens it begins with those.
        max_new_tokens: prompt and new tokens together may not exceed the model's ``max_position_embeddings``.
        do_sample: False takes the most probable token, after ``repetition_penalty``.
        temperature, top_k, top_p, min_p, repetition_penalty: as in :func:`gqa_kernels.sample`: a number, or one value
            for each row. Prompt tokens count for the penalty.
        seed: of the random stream. Row ``b`` takes stream ``seed + b``; a sequence gives each row its own, and the row
            then draws the same tokens alone or in any batch. None takes one from torch's generator.
        eos_token_id: a token, or several, that end a row; ``[]`` is none. None: those of the generation config.
        pad_token_id: what follows in a row that has ended. None: that of the generation config, else the first eos.
        streamer: given the prompt and then each token, as by transformers' ``generate``.
        check_every: how many tokens lie between two looks of the host at what was drawn. Steps made beyond the end of
            the last row are thrown away.
        kv_cache: a :class:`gqa_kernels.KVCache` or :class:`gqa_kernels.PagedKVCache` for the model's layers, KV heads
            and head_dim and the rows of ``input_ids``, in the model's dtype or quantised, made outside of inference
            mode. ``input_ids`` go on from what it holds; afterwards it holds them and the new tokens but the last one,
            with which the next call begins. Where a row ended before others, it goes on with what was drawn there, not
            with padding: ``crop`` takes that back. None: a cache of the model's own, for this call.

    Returns:
        int64 ``[batch, tokens + new]``: the prompts and what follows, padded behind each row's end.

    Raises:
        ValueError: an argument is wrong, or the model or the prompts cannot be served, with the reason.

    Interrupted, by an exception of the streamer or from the keyboard, it leaves the model and the cache as they were.

    PyTorch equivalent: ``model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
    do_sample=False)``.
    """
    check_ids(input_ids)
    for name, value in (("max_new_tokens", max_new_tokens), ("check_every", check_every)):
        if value < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {value}")
    config: Any = getattr(model, "generation_config", None)
    stopping = Stopping.of(config, eos_token_id, pad_token_id)
    if seed is None:
        seed = int(torch.randint(2**62, ())) if do_sample else 0
    settings = Settings(do_sample, seed, temperature, top_k, top_p, min_p, repetition_penalty)
    try:
        with session_of(model, input_ids, attention_mask, settings, max_new_tokens, kv_cache) as session:
            if streamer is not None:
                streamer.put(session.input_ids.cpu())
            sequences = run(session, stopping, max_new_tokens, check_every, streamer)
            if kv_cache is not None:
                kv_cache.advance(sequences.shape[1] - 1)
            return sequences
    except Unserved as reason:
        raise ValueError(f"generate: the call cannot be served: {reason}") from None


@contextmanager
def session_of(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Settings | None,
    max_new_tokens: int,
    cache: BaseCache | None,
) -> Iterator[Session]:
    """A session that has gone through the prompts. Raises :class:`Unserved`, before anything has changed."""
    kept = kept_for(model)
    with torch.inference_mode(False), torch.no_grad(), kept.exclusively():
        weights = kept.weights(model)
        rows, prompt = input_ids.shape
        if cache is not None:
            check_cache(cache, weights, rows)
        check_length(model, weights.rotary, cache.length_bound if cache is not None else 0, prompt, max_new_tokens)
        device = weights.device
        ids = input_ids.to(device=device, dtype=torch.int64)
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, torch.autocast(device.type, enabled=False):
            leftpad = leftpad_of(ids, attention_mask, cache.length if cache is not None else 0)
            with room_in(cache, prompt + max_new_tokens - 1) if cache is not None else nullcontext():
                try:
                    session = Session(kept, ids, leftpad, settings, max_new_tokens, cache)
                except torch.OutOfMemoryError as error:
                    kept.release()
                    raise Unserved(f"its buffers do not fit into memory: {str(error).splitlines()[0]}") from None
                yield session


def run(session: Session, stopping: Stopping, max_new_tokens: int, check_every: int, streamer: Any) -> Tensor:
    """Steps until every row has ended; the sequences."""
    if streamer is not None:
        _stream(session, stopping, max_new_tokens, check_every, streamer)
    else:
        ends = Ends(stopping, session.input_ids) if stopping.eos else None
        lag = min(LAG, check_every - 1)
        while session.drawn < max_new_tokens:
            if ends is not None and session.drawn % check_every == 0:
                ends.look(session.tokens(session.drawn - check_every))
            if ends is not None and session.drawn % check_every == lag and ends.all_ended():
                break
            session.step()
    return torch.cat([session.input_ids, stopping.cut(session.tokens())[0]], dim=1)


def _stream(session: Session, stopping: Stopping, max_new_tokens: int, check_every: int, streamer: Any) -> None:
    """Steps until every row has ended, with tokens to the streamer at the first and at each look."""
    shown = 0
    while True:
        last = session.drawn == max_new_tokens
        if last or session.drawn == 1 or session.drawn % check_every == 0:
            tokens, ended = stopping.cut(session.tokens())
            for column in tokens[:, shown:].cpu().unbind(1):
                streamer.put(column)
            shown, last = tokens.shape[1], last or ended
        if last:
            break
        session.step()
    streamer.end()
