"""Small seeded Llama models, and what a patched one must do like an unpatched one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import gqa_kernels
from support.bounds import assert_within_bound, to_numpy

LAYERS = 2
PAD = 0


def make_llama(device: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama whose logits lie far apart: 4 query heads to a KV head."""
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": None,
            **options,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model.to(device=device, dtype=dtype)


def make_prompt(device: str, lengths: list[int], *, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(2, 97, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(0, longest - length) if side == "left" else slice(length, longest)
        ids[row, padding], mask[row, padding] = PAD, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def make_cache(model: PreTrainedModel, kind: str, slots: int = 96) -> Any:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=slots)


def step_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, prompt: int, past: Any = None) -> Tensor:
    """The last logits of a prefill, then those of each token after it; ``mask`` is the prompt's or longer."""
    past, steps = make_cache(model, "dynamic") if past is None else past, []
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    positions = positions_of(mask)
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=past,
            use_cache=True,
        )
        steps.append(out.logits[:, -1])
    return torch.stack(steps, dim=1)


def attention_calls(launches: list[dict[str, Any]]) -> int:
    """Calls of our attention: its launches, less those that only write keys or join the parts of one call."""
    others = ("append", "rotate", "combine", "merge")
    return sum(
        launch["op"].startswith("gqa_attention") and not any(word in launch["kernel"] for word in others)
        for launch in launches
    )


def assert_same_model(
    model: LlamaForCausalLM,
    run: Callable[[LlamaForCausalLM], Tensor],
    *,
    rows: Tensor | None = None,
    exact: LlamaForCausalLM | None = None,
) -> gqa_kernels.hf.PatchReport:
    """``run`` on the patched model is within the bound of P1: the reference is the model in float64 (``exact``), the
    baseline the unpatched one. ``rows`` picks the logits that mean something. Returns the report."""
    with torch.no_grad():
        baseline = run(model)
        reference = run(exact if exact is not None else copy.deepcopy(model).double())
    with gqa_kernels.patched(model) as report, torch.no_grad():
        actual = run(model)
    if rows is not None:
        actual, reference, baseline = actual[rows], reference[rows], baseline[rows]
    scale = float(reference.abs().max())
    assert_within_bound(actual, to_numpy(reference), baseline, attention_extra=LAYERS * scale, what="logits")
    return report
