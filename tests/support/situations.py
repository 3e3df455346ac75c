"""Every way in which generate() drives a model, as one function each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from support.families import shared_model
from support.llama import make_prompt

STEPS = 64
Run = Callable[[PreTrainedModel, str], Tensor]


def generate(model: PreTrainedModel, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "disable_compile": True, **options}
    torch.manual_seed(3)
    return model.generate(**prompt, **settings)


def of_prompt(lengths: list[int], **options: Any) -> Run:
    return lambda model, device: generate(model, make_prompt(device, lengths), **options)


def static(model: PreTrainedModel, device: str) -> Tensor:
    past = StaticCache(model.config, max_cache_len=96)
    return generate(model, make_prompt(device, [11, 4, 23]), past_key_values=past)


def prefix_reused(model: PreTrainedModel, device: str) -> Tensor:
    """Two questions after one prefix, that is longer than the window."""
    ids, answers = make_prompt(device, [34])["input_ids"], []
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :25], past_key_values=prefix)
    for length in (29, 34):
        past = copy.deepcopy(prefix)
        answers.append(
            generate(model, {"input_ids": ids[:, :length]}, past_key_values=past, max_new_tokens=12)[0, -12:]
        )
    return torch.stack(answers)


def assisted(model: PreTrainedModel, device: str) -> Tensor:
    """Rejected tokens are cropped from the cache, and the next ones written over them."""
    inputs = make_prompt(device, [12])
    inputs["input_ids"][:, 6:] = inputs["input_ids"][:, :6]
    return generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=24)


SITUATIONS: dict[str, Run] = {
    "single": of_prompt([11]),
    "left-padded": of_prompt([11, 4, 23]),
    "static cache": static,
    "long prompt": of_prompt([50, 31], max_new_tokens=8),
    "chunked prefill": of_prompt([50, 31], max_new_tokens=8, prefill_chunk_size=20),
    "chunked prefill, static cache": of_prompt(
        [50], max_new_tokens=8, prefill_chunk_size=7, cache_implementation="static"
    ),
    "no cache": of_prompt([18], max_new_tokens=6, use_cache=False),
    "beam search": of_prompt([9, 17], max_new_tokens=12, num_beams=3, num_return_sequences=2),
    "sampling": of_prompt([9, 17], max_new_tokens=12, do_sample=True, top_k=20, num_return_sequences=2),
    "assisted": assisted,
    "prefix reused": prefix_reused,
}


@cache
def expected_tokens(family: str, device: str, situation: str) -> Tensor:
    return SITUATIONS[situation](shared_model(family, device), device)
