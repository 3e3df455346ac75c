"""A valid call of every op with random shapes and options: (args, kwargs) for ``gqa_kernels.<op>``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Call = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[..., Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = [(1, 1), (2, 1), (4, 4), (8, 2), (7, 1), (14, 2), (32, 8)]


def _maker(rng: random.Random, dtypes: Sequence[torch.dtype] = DTYPES) -> Make:
    dtype = rng.choice(dtypes)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return make


def _ints(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tables(make: Make, rows: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    return make(rows, rotary_dim // 2, dtype=torch.float32), make(rows, rotary_dim // 2, dtype=torch.float32)


def _heads(rng: random.Random) -> tuple[int, int, int]:
    q_heads, kv_heads = rng.choice(HEADS)
    return q_heads, kv_heads, rng.choice([8, 32, 64, 96, 128, 256])


def _cache(
    rng: random.Random,
    make: Make,
    batch: int,
    capacity: int,
    kv_heads: int,
    dim: int,
    page_sizes: Sequence[int] = (1, 16, 64),
) -> Call:
    """(k_cache, v_cache), {block_table}: contiguous or paged."""
    if rng.random() < 0.5:
        return (make(batch, capacity, kv_heads, dim), make(batch, capacity, kv_heads, dim)), {}
    page = rng.choice(page_sizes)
    pages = -(-capacity // page)
    order = rng.sample(range(batch * pages), batch * pages)
    table = [order[b * pages : (b + 1) * pages] for b in range(batch)]
    pool = (make(batch * pages, page, kv_heads, dim), make(batch * pages, page, kv_heads, dim))
    return pool, {"block_table": _ints(table)}


def _attention_options(rng: random.Random, make: Make, q_heads: int, rows: int, dim: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["window_size"] = (rng.randrange(1, 40), 0)
    if rng.random() < 0.3:
        options["softcap"] = 20.0
    if rng.random() < 0.3:
        options["sinks"] = make(q_heads, dtype=torch.float32)
    if rng.random() < 0.5:
        options["return_lse"] = True
    if rng.random() < 0.3 and rows > 0:
        options["rotary_cos"], options["rotary_sin"] = _tables(make, rows, dim)
    return options


def _prefill(rng: random.Random) -> Call:
    make, (q_heads, kv_heads, dim) = _maker(rng), _heads(rng)
    batch, seqlen = rng.randrange(1, 4), rng.randrange(1, 50)
    options = _attention_options(rng, make, q_heads, 512, dim)
    if rng.random() < 0.3:
        options["causal"] = False
    kind = rng.choice(["dense", "ragged", "cache"])
    if kind == "ragged":
        lengths = [rng.randrange(0, seqlen + 1) for _ in range(batch)]
        ends = _ints([sum(lengths[:i]) for i in range(batch + 1)])
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
        tokens = sum(lengths)
        return (make(tokens, q_heads, dim), make(tokens, kv_heads, dim), make(tokens, kv_heads, dim)), options
    args: tuple[Any, ...] = (
        make(batch, seqlen, q_heads, dim),
        make(batch, seqlen, kv_heads, dim),
        make(batch, seqlen, kv_heads, dim),
    )
    if kind == "cache":
        prefix = rng.randrange(0, 60)
        caches, paged = _cache(rng, make, batch, prefix + seqlen + 5, kv_heads, dim)
        args += caches
        options |= paged | {"cache_seqlens": _ints([rng.randrange(0, prefix + 1) for _ in range(batch)])}
    return args, options


def _decode(rng: random.Random) -> Call:
    make, (q_heads, kv_heads, dim) = _maker(rng), _heads(rng)
    batch, capacity = rng.choice([(1, 4096), (1, 100), (3, 300), (5, 70)])
    seqlen = rng.choice([1, 1, 2, 5, 16])
    options = _attention_options(rng, make, q_heads, capacity, dim)
    if rng.random() < 0.3:
        options["num_splits"] = rng.randrange(1, 9)
    if rng.random() < 0.3:
        options["batch_invariant"] = True
    if rng.random() < 0.3:
        options["static_prefix"] = True
    caches, paged = _cache(rng, make, batch, capacity, kv_heads, dim)
    lengths = [rng.randrange(seqlen, capacity - seqlen + 1) for _ in range(batch)]
    options |= paged | {"cache_seqlens": _ints(lengths)}
    args: tuple[Any, ...] = (make(batch, seqlen, q_heads, dim), *caches)
    if rng.random() < 0.5 or "rotary_cos" in options:
        args += (make(batch, seqlen, kv_heads, dim), make(batch, seqlen, kv_heads, dim))
    return args, options


def _hopper_heads(rng: random.Random) -> tuple[int, int, int]:
    q_heads, kv_heads = rng.choice([(1, 1), (4, 4), (8, 2), (7, 1), (14, 2), (8, 1)])
    return q_heads, kv_heads, rng.choice([64, 96, 128, 256])


def _prefill_tiles(rng: random.Random) -> Call:
    """What warpgroups serve on Hopper: 64 queries and more of 16-bit numbers."""
    make, (q_heads, kv_heads, dim) = _maker(rng, DTYPES[1:]), _hopper_heads(rng)
    batch, seqlen = rng.randrange(1, 3), rng.randrange(64, 140)
    options = _attention_options(rng, make, q_heads, 0, dim)
    if rng.random() < 0.3:
        options["causal"] = False
    kind = rng.choice(["dense", "ragged", "cache", "cache"])
    if kind == "ragged":
        lengths = [seqlen, rng.randrange(0, seqlen)]
        ends = _ints([0, seqlen, sum(lengths)])
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
        tokens = sum(lengths)
        return (make(tokens, q_heads, dim), make(tokens, kv_heads, dim), make(tokens, kv_heads, dim)), options
    new = make(batch, seqlen, kv_heads, dim), make(batch, seqlen, kv_heads, dim)
    args: tuple[Any, ...] = (make(batch, seqlen, q_heads, dim), *new)
    if kind == "cache":
        capacity = 64 * (seqlen // 64 + 2)
        caches, paged = _cache(rng, make, batch, capacity, kv_heads, dim, [16, 64])
        args += caches
        options |= paged | {"cache_seqlens": _ints([rng.randrange(0, capacity - seqlen + 1) for _ in range(batch)])}
    return args, options


def _decode_ring(rng: random.Random, quantized: bool = False) -> Call:
    """What clusters of blocks serve on Hopper: few query rows of 16-bit numbers."""
    make, (q_heads, kv_heads, dim) = _maker(rng, DTYPES[1:]), _hopper_heads(rng)
    batch, capacity = rng.choice([(1, 2048), (3, 320), (5, 128)])
    seqlen = rng.randrange(1, 8 * kv_heads // q_heads + 1)
    options = _attention_options(rng, make, q_heads, capacity, dim)
    if rng.random() < 0.3:
        options["batch_invariant"] = True
    (k_cache, v_cache), paged = _cache(rng, make, batch, capacity, kv_heads, dim, [1, 16, 64])
    if quantized:
        kind, scales = rng.choice([torch.float8_e4m3fn, torch.int8]), rng.choice([1, kv_heads])
        k_cache, v_cache = ((20 * x).to(kind) for x in (k_cache, v_cache))
        options |= {name: make(scales, dtype=torch.float32).abs() / 20 + 0.01 for name in ("k_scale", "v_scale")}
    options |= paged | {"cache_seqlens": _ints([rng.randrange(seqlen, capacity - seqlen + 1) for _ in range(batch)])}
    args: tuple[Any, ...] = (make(batch, seqlen, q_heads, dim), k_cache, v_cache)
    if rng.random() < 0.5 or "rotary_cos" in options:
        args += (make(batch, seqlen, kv_heads, dim), make(batch, seqlen, kv_heads, dim))
    return args, options


def _decode_quantized(rng: random.Random) -> Call:
    return _decode_ring(rng, quantized=True)


def _append(rng: random.Random) -> Call:
    make, (_, kv_heads, dim) = _maker(rng), _heads(rng)
    batch, seqlen, capacity = rng.randrange(1, 4), rng.randrange(1, 20), 64
    caches, options = _cache(rng, make, batch, capacity, kv_heads, dim)
    options["cache_seqlens"] = _ints([rng.randrange(0, capacity - seqlen + 1) for _ in range(batch)])
    if rng.random() < 0.5:
        options["rotary_cos"], options["rotary_sin"] = _tables(make, capacity, dim)
    new = make(batch, seqlen, kv_heads, dim), make(batch, seqlen, kv_heads, dim)
    return (*new, *caches), options


def _merge(rng: random.Random) -> Call:
    make, (q_heads, _, dim) = _maker(rng), _heads(rng)
    parts, batch, seqlen = rng.randrange(1, 6), rng.randrange(1, 4), rng.randrange(1, 9)
    outs, lses = make(parts, batch, seqlen, q_heads, dim), make(parts, batch, q_heads, seqlen, dtype=torch.float32)
    return (outs, lses), {}


def _rope(rng: random.Random) -> Call:
    make, (q_heads, kv_heads, dim) = _maker(rng), _heads(rng)
    batch, seqlen = rng.randrange(1, 4), rng.randrange(1, 40)
    rotary_dim = rng.choice([dim, dim // 2])
    k = make(batch, seqlen, kv_heads, dim) if rng.random() < 0.8 else None
    options = {"interleaved": True} if rng.random() < 0.3 else {}
    return (make(batch, seqlen, q_heads, dim), k, *_tables(make, 64, rotary_dim)), options


def _norm_rope(rng: random.Random) -> Call:
    make, (q_heads, kv_heads, dim) = _maker(rng), _heads(rng)
    batch, seqlen = rng.randrange(1, 4), rng.randrange(1, 40)
    options: dict[str, Any] = {"interleaved": True} if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        options |= {"weight_offset": 1.0, "cast_before_weight": False}
    q, k = make(batch, seqlen, q_heads, dim), make(batch, seqlen, kv_heads, dim)
    return (q, k, make(dim), make(dim), *_tables(make, 64, rng.choice([dim, dim // 2]))), options


def _width(rng: random.Random) -> int:
    return rng.choice([8, 100, 896, 4096, 4100])


def _norm(inputs: int) -> Callable[[random.Random], Call]:
    def call(rng: random.Random) -> Call:
        make, rows, width = _maker(rng), rng.randrange(1, 40), _width(rng)
        return (*(make(rows, width) for _ in range(inputs)), make(width), 1e-5), {}

    return call


def _pair(rng: random.Random) -> Call:
    make, rows, width = _maker(rng), rng.randrange(1, 40), _width(rng)
    return (make(rows, width), make(rows, width)), {}


def _ffn(rng: random.Random) -> Call:
    """Of few tokens mostly, as the fused kernels want them."""
    make, tokens = _maker(rng), rng.choice([1, 2, 8, 16, 30])
    hidden, intermediate, out = rng.choice([(64, 176, 64), (8, 8, 8), (264, 520, 40), (33, 50, 17)])
    gate, up = make(intermediate, hidden) / 8, make(intermediate, hidden) / 8
    weights = (torch.cat([gate, up]),) if rng.random() < 0.5 else (gate, up)
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        weights = tuple(weight.to(torch.float8_e4m3fn) for weight in weights)
        options["gate_up_scale"] = make(2 * intermediate, dtype=torch.float32)
    return (make(tokens, hidden), *weights, make(out, intermediate) / 8), options


def _linear(rng: random.Random) -> Call:
    """Of few tokens mostly, as the streaming kernel wants them."""
    make, tokens = _maker(rng), rng.choice([1, 2, 8, 16, 30])
    inside, outs = rng.choice([(64, (176,)), (8, (8, 8, 3)), (264, (520, 40)), (33, (50, 17))])
    options: dict[str, Any] = {"bias": make(sum(outs))} if rng.random() < 0.5 else {}
    if rng.random() < 0.5:
        options["static_weights"] = True
    weights = [make(out, inside) / 8 for out in outs]
    if rng.random() < 0.3:
        weights = [weight.to(torch.float8_e4m3fn) for weight in weights]
        options["weight_scale"] = make(sum(outs), dtype=torch.float32)
    return (make(tokens, inside), *weights), options


def _decoder_step(rng: random.Random) -> Call:
    """Of a few narrow layers that the kernel takes: up to 8 rows of a 16-bit type, up to 8 query heads a KV head."""
    make = _maker(rng, [torch.float16, torch.bfloat16])
    q_heads, kv_heads = rng.choice([heads for heads in HEADS if heads[0] <= 14])
    dim, hidden, intermediate = rng.choice([64, 96, 128]), rng.choice([64, 176]), rng.choice([96, 208])
    layers, rows, capacity = rng.randrange(1, 4), rng.choice([1, 2, 5, 8]), rng.choice([70, 300])

    def each(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [make(*shape) * scale for _ in range(layers)]

    q, kv, width = q_heads * dim, kv_heads * dim, hidden**-0.5
    weights = [each(outputs, hidden, scale=width) for outputs in (q, kv, kv)] + [each(hidden, q, scale=q**-0.5)]
    weights += [each(intermediate, hidden, scale=width) for _ in range(2)]
    weights += [each(hidden, intermediate, scale=intermediate**-0.5), each(hidden), each(hidden)]
    options: dict[str, Any] = {"eps": 1e-5}
    options["cache_seqlens"] = _ints([rng.randrange(1, capacity) for _ in range(rows)])
    if rng.random() < 0.7:
        options["rotary_cos"], options["rotary_sin"] = _tables(make, capacity, rng.choice([dim, dim // 2]))
    if rng.random() < 0.3:
        options["cache_leftpad"] = _ints([rng.randrange(0, 40) for _ in range(rows)])
    if rng.random() < 0.3:
        options |= {"q_bias": each(q), "k_bias": each(kv), "v_bias": each(kv)}
    if rng.random() < 0.3:
        options |= {"q_norm": each(dim), "k_norm": each(dim)}
    if rng.random() < 0.3:
        options["window_left"] = [rng.choice([-1, 0, 16, 40]) for _ in range(layers)]
    caches = [each(rows, capacity, kv_heads, dim) for _ in range(2)]
    return (make(rows, hidden), *caches, *weights, make(hidden), make(333, hidden) * width), options


def _sample(rng: random.Random) -> Call:
    make, rows, vocab = _maker(rng), rng.randrange(1, 6), rng.choice([5, 1000, 32000])
    options: dict[str, Any] = {"seed": rng.randrange(100)}
    if rng.random() < 0.7:
        options["temperature"] = rng.choice([0.0, 0.7])
    if rng.random() < 0.5:
        options["top_k"] = rng.randrange(1, 100)
    if rng.random() < 0.5:
        options["top_p"] = 0.9
    if rng.random() < 0.3:
        options["min_p"] = 0.05
    logits = make(rows, vocab)
    if rng.random() < 0.3:
        options["logit_bias"] = make(*rng.choice([(vocab,), (rows, vocab)]))
    if rng.random() < 0.3:
        words = [rng.randrange(-(2**31), 2**31) for _ in range(rows * -(-vocab // 32))]
        options["allowed_bitmask"] = _ints(words).view(rows, -1)
    if rng.random() < 0.3:
        options["token_counts"] = _ints(rng.choices([0, 0, -1, 1, 3], k=rows * vocab)).view(rows, vocab)
        for name in rng.sample(["repetition_penalty", "frequency_penalty", "presence_penalty"], 2):
            options[name] = make(*rng.choice([(), (rows,)]), dtype=torch.float32).abs() + 0.5
    return (logits,), options


CALLS: dict[str, Callable[[random.Random], Call]] = {
    "add_rmsnorm": _norm(2),
    "decoder_step": _decoder_step,
    "gqa_attention_decode": _decode,
    "gqa_attention_prefill": _prefill,
    "kv_cache_append": _append,
    "linear": _linear,
    "merge_attention_states": _merge,
    "qk_rmsnorm_rope": _norm_rope,
    "residual_add": _pair,
    "rmsnorm": _norm(1),
    "rope": _rope,
    "rope_": _rope,
    "sample": _sample,
    "swiglu": _pair,
    "swiglu_ffn": _ffn,
}


# Every second call, or two in three, is one that the kernels for Hopper serve.
TURNS = {"gqa_attention_decode": [_decode, _decode_ring, _decode_quantized]}
TURNS |= {"gqa_attention_prefill": [_prefill, _prefill_tiles]}


def random_call(op: str, seed: int, device: str) -> Call:
    """Made on the CPU, then moved: a copy counts as initialised memory where a sanitizer watches our kernels alone."""

    turns = TURNS.get(op, [CALLS[op]])
    args, options = turns[seed % len(turns)](random.Random(f"{op} {seed}"))
    moved: Call = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), (args, options))
    return moved
