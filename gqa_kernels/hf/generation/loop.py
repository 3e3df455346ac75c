"""The decoding loop of a patched model's ``generate()``: transformers prepares the call and says what it means, the
steps are ours. A call that they cannot serve takes transformers' own loop, over the patched modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria

from gqa_kernels.hf.cache import unservable
from gqa_kernels.hf.families import Family
from gqa_kernels.hf.generation.drawing import Settings
from gqa_kernels.hf.generation.generate import run, session_of
from gqa_kernels.hf.generation.record import Unserved
from gqa_kernels.hf.generation.rotary import switch_of
from gqa_kernels.hf.generation.session import Session
from gqa_kernels.hf.generation.stopping import Stopping
from gqa_kernels.hf.report import PatchReport

CHECK_EVERY = 16

#: Arguments of generate() that its loop would not get, or not as they were given.
UNSERVED_ARGUMENTS = ("custom_generate", "synced_gpus", "tokenizer", "past_key_values", "inputs_embeds", "position_ids")
#: Settings that ask for more than tokens, or for steps of another kind.
UNSERVED_SETTINGS = ("return_dict_in_generate", "is_assistant", "token_healing", "compile_config")
#: What generate() itself hands to its loop.
MODEL_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def generate_forward(model: Any, report: PatchReport, family: Family, *args: Any, **kwargs: Any) -> Any:
    """``model.generate`` of a patched model."""
    original = partial(type(model).generate, model)
    if torch.compiler.is_compiling() or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return original(*args, **kwargs)
    given = [name for name in UNSERVED_ARGUMENTS if kwargs.get(name) is not None]
    if given or len(args) > 2:  # inputs and config
        report.note_generation(f"{given[0]} is given" if given else f"{len(args)} arguments are given by position")
        return original(*args, **kwargs)
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    named = {name: value for name, value in kwargs.items() if name != "generation_config"}
    mode = model._prepare_generation_config(config, **named)[0].get_generation_mode(kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        report.note_generation(f"its mode is {mode.value}")
        return original(*args, **kwargs)
    return original(*args, **kwargs, custom_generate=partial(_loop, report, kwargs.get("streamer")))


def _loop(
    report: PatchReport,
    streamer: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    try:
        stopping, new_tokens = _checked(model, input_ids, stopping_criteria, generation_config, model_kwargs)
        device_draws = not generation_config.do_sample and not logits_processor
        settings = Settings(do_sample=False, seed=0) if device_draws else None
        every = CHECK_EVERY if streamer is None else 1
        with session_of(model, input_ids, model_kwargs.get("attention_mask"), settings, new_tokens, None) as session:
            if device_draws:
                return run(session, stopping, new_tokens, every, streamer)
            return _run(session, stopping, new_tokens, every, streamer, logits_processor, generation_config.do_sample)
    except Unserved as reason:
        report.note_generation(str(reason))
    return type(model)._sample(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )


def _checked(
    model: Any, input_ids: Tensor, criteria: Any, config: Any, model_kwargs: dict[str, Any]
) -> tuple[Stopping, int]:
    """Where rows end, and after how many tokens at the latest. Raises :class:`Unserved`."""
    unknown = set(model_kwargs) - MODEL_ARGUMENTS
    if unknown:
        raise Unserved(f"{', '.join(sorted(unknown))} is given to the model")
    asked = [name for name in UNSERVED_SETTINGS if getattr(config, name, None)]
    if asked:
        raise Unserved(f"{asked[0]} is set")
    other = [type(one).__name__ for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    if other:
        raise Unserved(f"it stops by {other[0]}")
    lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    if not lengths or min(lengths) <= input_ids.shape[1]:
        raise Unserved("it has no length to stop at")
    if not model_kwargs.get("use_cache"):
        raise Unserved("use_cache is False")
    cache = model_kwargs.get("past_key_values")
    reason = unservable(cache) if cache is not None else None
    if reason is not None:
        raise Unserved(reason)
    if torch.is_autocast_enabled(input_ids.device.type):
        raise Unserved("autocast is on")
    switch = switch_of(model.model.rotary_emb)
    if switch is not None and input_ids.shape[1] <= switch < min(lengths):
        raise Unserved(f"the sequence may cross longrope's switch at {switch}, where transformers begins a new cache")
    ends = any(type(one) is EosTokenCriteria for one in criteria)
    return Stopping.of(config, None if ends else (), None), min(lengths) - input_ids.shape[1]


def _run(
    session: Session, stopping: Stopping, new_tokens: int, every: int, streamer: Any, processors: Any, samples: bool
) -> Tensor:
    """Steps whose tokens transformers' processors decide, and torch's generator: the unpatched model's draws."""
    ids = session.input_ids
    random = RandomStates(ids.device) if samples else None
    while True:
        scores = processors(ids, session.logits.to(torch.float32, copy=True))
        drawn = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0] if samples else scores.argmax(-1)
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        session.take(drawn)
        if random is not None:
            random.keep()
        last = session.drawn == new_tokens
        if streamer is not None or (stopping.eos and (last or session.drawn % every == 0)):
            tokens, ended = stopping.cut(session.tokens())
            if streamer is not None:
                streamer.put(tokens[:, -1].cpu())
            if ended and random is not None:
                random.return_to(tokens.shape[1])
            last = last or ended
        if last:
            break
        session.step()
    if streamer is not None:
        streamer.end()
    return torch.cat([session.input_ids, stopping.cut(session.tokens())[0]], dim=1)


class RandomStates:
    """The states of torch's generator after each step, for steps that turn out to have been too many."""

    def __init__(self, device: torch.device) -> None:
        self._of: Any = torch.cuda if device.type == "cuda" else torch
        self._states: list[Tensor] = []

    def keep(self) -> None:
        self._states.append(self._of.get_rng_state())

    def return_to(self, steps: int) -> None:
        self._of.set_rng_state(self._states[steps - 1])
