"""A small seeded model of each family, with the heads of a real one, and windows short enough to be left behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from support.llama import PAD

LAYERS = 2
WINDOW = 20
ALTERNATING = ["sliding_attention", "full_attention"]

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def heads(query: int, kv: int, size: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": size}


def longrope(rotary_dim: int, *, switch: int = 256, **options: Any) -> dict[str, Any]:
    """Short factors up to ``switch`` positions, long ones beyond."""
    half = rotary_dim // 2
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.01 * i for i in range(half)],
            "long_factor": [1.0 + 0.1 * i for i in range(half)],
            "original_max_position_embeddings": switch,
            **options,
        },
        "original_max_position_embeddings": switch,
        "max_position_embeddings": 512,
    }


#: Name: the config's class, and what differs from COMMON. The heads are those of Llama-3-8B, Mistral-7B, Qwen2.5-0.5B,
#: Qwen3-0.6B, Phi-3-mini, Phi-4-mini, Gemma-2-2B and gpt-oss-20b.
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, heads(32, 8, 128)),
    "mistral": (MistralConfig, {**heads(32, 8, 128), "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, heads(14, 2, 64)),
    "qwen2 sliding": (
        Qwen2Config,
        {**heads(14, 2, 64), "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "qwen3": (Qwen3Config, heads(16, 8, 128)),
    "phi3": (Phi3Config, {**heads(32, 32, 96), **longrope(96), "sliding_window": WINDOW}),
    "phi4": (Phi3Config, {**heads(24, 8, 128), **longrope(96, partial_rotary_factor=0.75)}),
    "gemma2": (
        Gemma2Config,
        {
            **heads(8, 4, 256),
            "query_pre_attn_scalar": 256,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "attn_implementation": "eager",
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            **heads(64, 8, 64),
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "experts_implementation": "eager",  # the same in every dtype, and deterministic
        },
    ),
}


def make_model(name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    kind, settings = CONFIGS[name]
    settings = {**COMMON, **settings, **options}
    names = ("attn_implementation", "experts_implementation")
    implementations = {name: settings.pop(name) for name in names if name in settings}
    hidden = settings["hidden_size"]
    if kind is Phi3Config:  # checks its rope_parameters against heads that share the hidden size among them
        settings["hidden_size"] = settings["num_attention_heads"] * settings["head_dim"]
    config = kind(**settings)
    config.hidden_size = hidden
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **implementations).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith((".sinks", ".bias")):
                parameter.uniform_(-1.0, 1.0)
    return model.to(device=device, dtype=dtype)


@cache
def shared_model(name: str, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same for all tests, which leave it as they find it."""
    return make_model(name, device, dtype)
