"""A cache that the caller of ``generate`` brings: whether it fits the model and the call, and its pages meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gqa_kernels.hf.generation.record import ModelWeights
from gqa_kernels.kv_cache import QUANTIZED, BaseCache


def check_cache(cache: BaseCache, weights: ModelWeights, rows: int) -> None:
    if not isinstance(cache, BaseCache):
        raise ValueError(f"generate: kv_cache must be a KVCache or a PagedKVCache, got {type(cache).__name__}")
    layer = weights.layers[0]
    wanted = {
        "batch": rows,
        "num_layers": len(weights.layers),
        "num_kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "device": weights.device,
    }
    for name, value in wanted.items():
        if getattr(cache, name) != value:
            whose = "input_ids" if name == "batch" else "the model"
            raise ValueError(f"generate: kv_cache must have {name} {value}, as {whose}, got {getattr(cache, name)}")
    quantizable = weights.dtype in (torch.float16, torch.bfloat16)
    if cache.dtype != weights.dtype and not (quantizable and cache.dtype in QUANTIZED):
        quantized = ", float8_e4m3fn or int8" if quantizable else ""
        raise ValueError(f"generate: kv_cache must be of {weights.dtype}, as the model{quantized}, got {cache.dtype}")
    if cache.lengths.is_inference():
        raise ValueError("generate: kv_cache must be made outside of torch.inference_mode(), got one made in it")


@contextmanager
def room_in(cache: BaseCache, tokens: int) -> Iterator[None]:
    """Room for so many tokens more; what is not counted at the end is given back."""
    try:
        cache.reserve(tokens)
    except RuntimeError as error:
        raise ValueError(f"generate: kv_cache must have room for {tokens} tokens more: {error}") from None
    try:
        yield
    finally:
        cache.crop(cache.length_bound)
