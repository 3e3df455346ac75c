"""P20: what the host can see is refused at once, in one sentence, the same on CPU and CUDA.

Each row of the table is one misuse: a valid call of the op with some arguments replaced, and what the sentence must
say: the argument, what was wanted, what was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.contract import require_sm90
from support.guard import same_bytes
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import gqa_kernels
from gqa_kernels.explain import OPS

B, S, HQ, HKV, D, CAPACITY, PAGE = 2, 3, 4, 2, 16, 12, 4

Arguments = dict[str, Any]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _norm() -> Arguments:
    return {"x": zeros(3, 64), "weight": zeros(64), "eps": 1e-6}


def _rope() -> Arguments:
    return {"q": zeros(B, S, HQ, D), "k": zeros(B, S, HKV, D), "cos": zeros(9, D // 2), "sin": zeros(9, D // 2)}


def _append() -> Arguments:
    return {
        "k": zeros(B, S, HKV, D),
        "v": zeros(B, S, HKV, D),
        "k_cache": zeros(B, CAPACITY, HKV, D),
        "v_cache": zeros(B, CAPACITY, HKV, D),
        "cache_seqlens": ints(B),
    }


def _prefill() -> Arguments:
    return {"q": zeros(B, S, HQ, D), "k": zeros(B, S, HKV, D), "v": zeros(B, S, HKV, D)}


def _step() -> Arguments:
    """Two layers of 4 heads of 64 over 2, of a dtype that the kernel takes."""

    def each(*shape: int) -> list[Tensor]:
        return [zeros(*shape, dtype=torch.float16) for _ in range(2)]

    lists = {name: each(B, CAPACITY, 2, 64) for name in ("k_caches", "v_caches")}
    lists |= {"q_proj": each(256, 32), "k_proj": each(128, 32), "v_proj": each(128, 32), "o_proj": each(32, 256)}
    lists |= {"gate_proj": each(48, 32), "up_proj": each(48, 32), "down_proj": each(32, 48)}
    lists |= {"input_norm": each(32), "mlp_norm": each(32)}
    ends = {"hidden": each(B, 32)[0], "norm": each(32)[0], "head": each(40, 32)[0]}
    return {"hidden": ends.pop("hidden"), **lists, **ends, "cache_seqlens": ints(B), "eps": 1e-6}


VALID: dict[str, Callable[[], Arguments]] = {
    "rmsnorm": _norm,
    "add_rmsnorm": lambda: _norm() | {"residual": zeros(3, 64)},
    "residual_add": lambda: {"x": zeros(3, 64), "residual": zeros(3, 64)},
    "swiglu": lambda: {"gate": zeros(3, 64), "up": zeros(3, 64)},
    "swiglu_ffn": lambda: {"x": zeros(3, 64), "w_gate": zeros(88, 64), "w_up": zeros(88, 64), "w_down": zeros(32, 88)},
    "linear": lambda: {"x": zeros(3, 64), "w1": zeros(88, 64), "w2": zeros(40, 64), "bias": zeros(128)},
    "decoder_step": _step,
    "rope": _rope,
    "rope_": _rope,
    "qk_rmsnorm_rope": lambda: _rope() | {"q_weight": zeros(D), "k_weight": zeros(D)},
    "kv_cache_append": _append,
    "gqa_attention_decode": lambda: {"q": zeros(B, S, HQ, D)} | _append(),
    "gqa_attention_prefill": _prefill,
    "merge_attention_states": lambda: {"outs": zeros(3, B, S, HQ, D), "lses": zeros(3, B, HQ, S)},
    "sample": lambda: {
        "logits": zeros(3, 10),
        "logit_bias": zeros(3, 10),
        "allowed_bitmask": ints(3, 1),
        "token_counts": ints(3, 10),
        "repetition_penalty": zeros(3),
        "frequency_penalty": zeros(3),
        "presence_penalty": zeros(3),
    },
}


def on(device: str, tensor: Tensor) -> Tensor:
    """Zeros with the strides of ``tensor``, which a copy to a device would lose."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    memory = torch.zeros(reach + 1 if tensor.numel() else 0, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


@dataclass(frozen=True)
class Misuse:
    op: str
    changes: Arguments
    argument: str
    wanted: str
    given: str

    def arguments(self, device: str) -> Arguments:
        found: Arguments = tree_map_only(Tensor, lambda x: on(device, x), VALID[self.op]() | self.changes)
        return found

    def sentence(self, device: str) -> str:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
            getattr(gqa_kernels, self.op)(**self.arguments(device))
        return str(raised.value)


def rows(op: str, *table: tuple[Arguments, str, str, str]) -> list[Misuse]:
    return [Misuse(op, *row) for row in table]


HALF = torch.float16
PAGED = {"k_cache": zeros(6, PAGE, HKV, D), "v_cache": zeros(6, PAGE, HKV, D), "block_table": ints(B, 3)}
NO_PAGE = PAGED | {"k_cache": zeros(6, 0, HKV, D), "v_cache": zeros(6, 0, HKV, D)}
RAGGED = {"q": zeros(6, HQ, D), "k": zeros(6, HKV, D), "v": zeros(6, HKV, D)}
LONGER = {"k": zeros(B, S + 1, HKV, D), "v": zeros(B, S + 1, HKV, D)}
OFFSETS = {"cu_seqlens_q": ints(3), "cu_seqlens_k": ints(3)}
NO_NEW = {"k": None, "v": None}
NO_GRAD = "requires_grad=True"
TABLES = {"rotary_cos": zeros(CAPACITY, D // 2), "rotary_sin": zeros(CAPACITY, D // 2)}


def grad(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def layers(*shape: int, dtype: torch.dtype = torch.float16, step: int = 1) -> list[Tensor]:
    return [zeros(*shape, dtype=dtype)[..., ::step] for _ in range(2)]


def norm_rows(op: str) -> list[Misuse]:
    return rows(
        op,
        ({"weight": zeros(5)}, "weight", "[hidden] = [64]", "[5]"),
        ({"weight": zeros(1, 64)}, "weight", "[hidden] = [64]", "[1, 64]"),
        ({"weight": zeros(64, dtype=torch.float64)}, "weight", "float32 or have the dtype of x", "float64"),
        ({"weight": zeros(64, dtype=torch.bfloat16)}, "weight", "float32 or have the dtype of x", "bfloat16"),
        ({"x": ints(3, 64)}, "x", "float32, float16 or bfloat16", "int32"),
        ({"x": zeros()}, "x", "[..., hidden]", "shape []"),
        ({"x": zeros(3, 0)}, "x", "hidden at least 1", "[3, 0]"),
        ({"eps": -1.0}, "eps", "0 or more", "-1"),
        ({"x": grad(3, 64)}, "x", "not require grad", NO_GRAD),
        ({"weight": grad(64)}, "weight", "not require grad", NO_GRAD),
    )


def rope_rows(op: str) -> list[Misuse]:
    return rows(
        op,
        ({"q": zeros(S, D)}, "q", "[batch, tokens, heads, head_dim]", "[3, 16]"),
        ({"q": ints(B, S, HQ, D)}, "q", "float32, float16 or bfloat16", "int32"),
        ({"k": zeros(B, S, D)}, "k", "the shape of q [2, 3, 4, 16]", "[2, 3, 16]"),
        ({"k": zeros(B, S + 1, HKV, D)}, "k", "the shape of q [2, 3, 4, 16]", "[2, 4, 2, 16]"),
        ({"k": zeros(B, S, HKV, D, dtype=HALF)}, "k", "dtype of q (float32)", "float16"),
        ({"cos": zeros(D // 2)}, "cos", "a table [positions, R/2]", "[8]"),
        ({"cos": zeros(9, D), "sin": zeros(9, D)}, "cos", "1 to 8 for head_dim 16", "[9, 16]"),
        ({"cos": zeros(9, D // 2, dtype=torch.float64)}, "cos", "float32 or have the dtype of q", "float64"),
        ({"sin": zeros(8, D // 2)}, "sin", "the shape of cos [9, 8]", "[8, 8]"),
        ({"sin": zeros(9, D // 2, dtype=HALF)}, "sin", "dtype of cos (float32)", "float16"),
        ({"cos": zeros(2, D // 2), "sin": zeros(2, D // 2)}, "cos", "one row for each of the 3 tokens", "[2, 8]"),
        ({"cos": zeros(3, S, D // 2), "sin": zeros(3, S, D // 2)}, "cos", "[batch or 1, tokens, R/2]", "[3, 3, 8]"),
        ({"position_ids": zeros(B, S)}, "position_ids", "int32 or int64", "float32"),
        ({"position_ids": ints(B, S + 1)}, "position_ids", "[batch, tokens] = [2, 3]", "[2, 4]"),
        ({"q": grad(B, S, HQ, D)}, "q", "not require grad", NO_GRAD),
    )


def cache_rows(op: str) -> list[Misuse]:
    """What every op with a cache refuses alike."""
    return rows(
        op,
        ({"v": zeros(B, S, HKV, 8)}, "v", "the shape of k [2, 3, 2, 16]", "[2, 3, 2, 8]"),
        ({"v": zeros(B, S, HKV, D, dtype=HALF)}, "v", "have the dtype of", "float16"),
        ({"k": zeros(B, S, 1, D), "v": zeros(B, S, 1, D)}, "k", "the 2 heads of k_cache", "[2, 3, 1, 16]"),
        ({"k_cache": zeros(B, CAPACITY, D)}, "k_cache", "[batch, capacity, num_kv_heads, head_dim]", "[2, 12, 16]"),
        ({"v_cache": zeros(B, CAPACITY + 1, HKV, D)}, "v_cache", "the shape of k_cache", "[2, 13, 2, 16]"),
        ({"k_cache": zeros(B, CAPACITY, HKV, D, dtype=HALF)}, "k_cache", "have the dtype of", "float16"),
        ({"k_cache": zeros(B, CAPACITY, HKV, D, dtype=torch.int16)}, "k_cache", "have the dtype of", "int16"),
        ({"k_cache": zeros(B, CAPACITY, HKV, 2 * D)[..., ::2]}, "k_cache", "stride 1", "stride 2"),
        (
            {"k_cache": zeros(3, CAPACITY, HKV, D), "v_cache": zeros(3, CAPACITY, HKV, D)},
            "k_cache",
            "= [2, any, any, 16]",
            "[3, 12, 2, 16]",
        ),
        (
            {"k_cache": zeros(1, CAPACITY, HKV, D).expand(B, CAPACITY, HKV, D)},
            "k_cache",
            "not overlap itself",
            "k_cache",
        ),
        ({"cache_seqlens": ints(3)}, "cache_seqlens", "[batch] = [2]", "[3]"),
        ({"cache_seqlens": zeros(B)}, "cache_seqlens", "int32 or int64", "float32"),
        ({"cache_leftpad": ints(B + 1)}, "cache_leftpad", "[batch] = [2]", "[3]"),
        ({"cache_leftpad": zeros(B)}, "cache_leftpad", "int32 or int64", "float32"),
        (PAGED | {"block_table": ints(3)}, "block_table", "[batch, max_pages]", "[3]"),
        (PAGED | {"block_table": ints(3, 3)}, "block_table", "[batch, max_pages]", "[3, 3]"),
        (PAGED | {"block_table": zeros(B, 3)}, "block_table", "int32 or int64", "float32"),
        (NO_PAGE, "k_cache", "a page size of at least 1", "[6, 0, 2, 16]"),
        ({"rotary_cos": TABLES["rotary_cos"]}, "rotary_sin", "together with rotary_cos", "None"),
        ({"rotary_positions": ints(B, S)}, "rotary_positions", "None without rotary_cos", "a value"),
        (TABLES | {"rotary_sin": zeros(3, D // 2)}, "rotary_sin", "rotary_cos", "[3, 8]"),
        ({"rotary_cos": zeros(12, D), "rotary_sin": zeros(12, D)}, "rotary_cos", "1 to 8", "[12, 16]"),
        (TABLES | {"rotary_positions": ints(B, S + 1)}, "rotary_positions", "[2, 3]", "[2, 4]"),
        ({"k_scale": zeros(1)}, "k_scale", "None unless k_cache is float8_e4m3fn or int8", "a value"),
        ({"v_scale": zeros(1)}, "v_scale", "None unless v_cache is float8_e4m3fn or int8", "a value"),
        ({"k": grad(B, S, HKV, D)}, "k", "not require grad", NO_GRAD),
    )


def attention_rows(op: str) -> list[Misuse]:
    """What decode and prefill refuse alike."""
    three = {"q": zeros(B, S, 3, D)}
    return rows(
        op,
        (three, "q", "a multiple of num_kv_heads = 2", "3"),
        ({"q": zeros(B, HQ, D)}, "q", "[batch, seqlen, num_q_heads, head_dim]", "[2, 4, 16]"),
        ({"q": zeros(B, S, HQ, D, dtype=torch.float64)}, "q", "float32, float16 or bfloat16", "float64"),
        ({"v": None}, "v", "together with k", "None"),
        ({"window_size": (-2, 0)}, "window_size", "-1 (unlimited) or more", "(-2, 0)"),
        ({"softmax_scale": float("inf")}, "softmax_scale", "finite", "inf"),
        ({"workspace": zeros(4)}, "workspace", "uint8", "float32"),
        ({"softcap": -1.0}, "softcap", "0 (none) or more", "-1"),
        ({"num_splits": -1}, "num_splits", "0 (chosen) or more", "-1"),
        ({"sinks": zeros(3)}, "sinks", "[num_q_heads] = [4]", "[3]"),
        ({"sinks": zeros(HQ, dtype=HALF)}, "sinks", "float32 or have the dtype of q", "float16"),
        ({"q": grad(B, S, HQ, D)}, "q", "not require grad", NO_GRAD),
        (head_dim(op, 12), "q", "a multiple of 8", "12"),
        (head_dim(op, 264), "q", "up to 256", "264"),
    )


def head_dim(op: str, dim: int) -> Arguments:
    found = {"q": zeros(B, S, HQ, dim), "k": zeros(B, S, HKV, dim), "v": zeros(B, S, HKV, dim)}
    found |= {name: zeros(B, CAPACITY, HKV, dim) for name in ("k_cache", "v_cache")}
    return {name: value for name, value in found.items() if name in VALID[op]()}


TABLE = [
    *norm_rows("rmsnorm"),
    *norm_rows("add_rmsnorm"),
    *rows(
        "add_rmsnorm",
        ({"residual": zeros(4, 64)}, "residual", "the shape of x [3, 64]", "[4, 64]"),
        ({"residual": zeros(3, 64, dtype=HALF)}, "residual", "dtype of x (float32)", "float16"),
        ({"residual": grad(3, 64)}, "residual", "not require grad", NO_GRAD),
    ),
    *rows(
        "residual_add",
        ({"residual": zeros(64)}, "residual", "the shape of x [3, 64]", "[64]"),
        ({"residual": zeros(3, 64, dtype=HALF)}, "residual", "dtype of x (float32)", "float16"),
        ({"x": ints(3, 64)}, "x", "float32, float16 or bfloat16", "int32"),
        ({"x": grad(3, 64)}, "x", "not require grad", NO_GRAD),
    ),
    *rows(
        "swiglu",
        ({"up": zeros(3, 32)}, "up", "the shape of gate [3, 64]", "[3, 32]"),
        ({"up": zeros(3, 64, dtype=HALF)}, "up", "dtype of gate (float32)", "float16"),
        ({"gate": ints(3, 64)}, "gate", "float32, float16 or bfloat16", "int32"),
        ({"gate": zeros(3, 7), "up": None}, "gate", "[..., 2 * hidden]", "[3, 7]"),
        ({"gate": grad(3, 64)}, "gate", "not require grad", NO_GRAD),
    ),
    *rows(
        "swiglu_ffn",
        ({"x": zeros()}, "x", "[..., hidden]", "[]"),
        ({"x": ints(3, 64)}, "x", "float32, float16 or bfloat16", "int32"),
        ({"w_gate": zeros(88, 32)}, "w_gate", "[intermediate, 64] to match x", "[88, 32]"),
        ({"w_up": zeros(64)}, "w_up", "[intermediate, 64] to match x", "[64]"),
        ({"w_up": zeros(80, 64)}, "w_up", "the shape of w_gate [88, 64]", "[80, 64]"),
        ({"w_up": zeros(88, 64, dtype=HALF)}, "w_up", "dtype of x (float32)", "float16"),
        ({"w_down": zeros(88, 32)}, "w_down", "[any, 88]", "[88, 32]"),
        ({"w_down": zeros(32, 88, dtype=HALF)}, "w_down", "dtype of x (float32)", "float16"),
        ({"w_down": grad(32, 88)}, "w_down", "not require grad", NO_GRAD),
    ),
    *rows(
        "linear",
        ({"x": zeros()}, "x", "[..., in_features]", "[]"),
        ({"x": ints(3, 64)}, "x", "float32, float16 or bfloat16", "int32"),
        ({"w1": zeros(88, 32)}, "w1", "[out_features, 64] to match x", "[88, 32]"),
        ({"w2": zeros(64)}, "w2", "[out_features, 64] to match x", "[64]"),
        ({"w2": zeros(40, 64, dtype=HALF)}, "w2", "dtype of x (float32)", "float16"),
        ({"w2": None, "w3": zeros(40, 64)}, "w3", "come with a w2", "none"),
        ({"bias": zeros(88)}, "bias", "[128], one value for each output", "[88]"),
        ({"bias": zeros(128, dtype=HALF)}, "bias", "dtype of x (float32)", "float16"),
        ({"w1": grad(88, 64)}, "w1", "not require grad", NO_GRAD),
    ),
    *rows(
        "decoder_step",
        ({"hidden": zeros(32, dtype=HALF)}, "hidden", "[batch, hidden]", "[32]"),
        ({"hidden": ints(B, 32)}, "hidden", "float32, float16 or bfloat16", "int32"),
        ({"hidden": zeros(B, 0, dtype=HALF)}, "hidden", "hidden at least 1", "[2, 0]"),
        ({"k_caches": []}, "k_caches", "a tensor for each layer", "none"),
        ({"k_caches": layers(B, CAPACITY, 64)}, "k_caches[0]", "[batch, capacity, kv_heads, head_dim]", "[2, 12, 64]"),
        ({"k_caches": layers(B, 0, 2, 64)}, "k_caches[0]", "a row and a head at least", "[2, 0, 2, 64]"),
        ({"k_caches": layers(B, CAPACITY, 2, 12)}, "k_caches[0]", "a multiple of 8", "12"),
        ({"k_caches": layers(3, CAPACITY, 2, 64)}, "k_caches[0]", "[2, 12, 2, 64]", "[3, 12, 2, 64]"),
        ({"v_caches": layers(B, CAPACITY, 2, 64)[:1]}, "v_caches", "one tensor for each of the 2 layers", "1"),
        ({"v_caches": layers(B, CAPACITY, 2, 128, step=2)}, "v_caches[0]", "contiguous", "strided memory"),
        ({"q_proj": layers(64 * 3, 32)}, "q_proj[0]", "a multiple of the cache's 128", "[192, 32]"),
        ({"q_proj": layers(256)}, "q_proj[0]", "[q_heads * head_dim, hidden]", "[256]"),
        ({"k_proj": [*layers(128, 32)[:1], zeros(64, 32, dtype=HALF)]}, "k_proj[1]", "[128, 32]", "[64, 32]"),
        ({"o_proj": layers(256, 32)}, "o_proj[0]", "[32, 256]", "[256, 32]"),
        ({"up_proj": layers(40, 32)}, "up_proj[0]", "[48, 32]", "[40, 32]"),
        ({"down_proj": layers(32, 48, dtype=torch.float32)}, "down_proj[0]", "dtype of hidden (float16)", "float32"),
        ({"input_norm": layers(33)}, "input_norm[0]", "[32]", "[33]"),
        ({"norm": zeros(33, dtype=HALF)}, "norm", "[32]", "[33]"),
        ({"head": zeros(32, dtype=HALF)}, "head", "[vocabulary, hidden]", "[32]"),
        ({"cache_seqlens": zeros(B)}, "cache_seqlens", "int32 or int64", "float32"),
        ({"cache_seqlens": ints(3)}, "cache_seqlens", "[batch] = [2]", "[3]"),
        ({"cache_leftpad": ints(3)}, "cache_leftpad", "[batch] = [2]", "[3]"),
        ({"eps": -1.0}, "eps", "0 or more", "-1"),
        ({"rotary_cos": zeros(12, 32)}, "rotary_cos", "come with rotary_sin", "no rotary_sin"),
        ({n: zeros(12, 33) for n in ("rotary_cos", "rotary_sin")}, "rotary_cos", "1 to 32", "[12, 33]"),
        ({n: zeros(B, 1, 32) for n in ("rotary_cos", "rotary_sin")}, "rotary_cos", "a table", "[2, 1, 32]"),
        ({"q_bias": layers(256)}, "q_bias", "come with k_bias", "no k_bias"),
        ({"k_norm": layers(64)}, "q_norm", "come with k_norm", "only k_norm"),
        ({"q_norm": layers(64), "k_norm": layers(63)}, "k_norm[0]", "[64]", "[63]"),
        ({"softmax_scale": float("nan")}, "softmax_scale", "finite", "nan"),
        ({"window_left": [3]}, "window_left", "one value for each of the 2 layers", "1"),
        ({"window_left": [3, -2]}, "window_left", "-1 (all) or more", "-2"),
        ({"hidden": grad(B, 32)}, "hidden", "not require grad", NO_GRAD),
        ({"q_proj": [grad(256, 32)]}, "q_proj[0]", "not require grad", NO_GRAD),
    ),
    *rope_rows("rope"),
    *rope_rows("rope_"),
    *rope_rows("qk_rmsnorm_rope"),
    *rows(
        "qk_rmsnorm_rope",
        ({"q_weight": zeros(D + 1)}, "q_weight", "[head_dim] = [16]", "[17]"),
        ({"k_weight": zeros(1, D)}, "k_weight", "[head_dim] = [16]", "[1, 16]"),
        ({"q_weight": zeros(D, dtype=HALF)}, "q_weight", "float32 or have the dtype of q", "float16"),
        ({"eps": -1.0}, "eps", "0 or more", "-1"),
        ({"q": grad(B, S, HQ, D)}, "q", "not require grad", NO_GRAD),
        ({"k_weight": grad(D)}, "k_weight", "not require grad", NO_GRAD),
    ),
    *rows(
        "rope_",
        ({"q": zeros(B, S, HQ, 2 * D)[..., ::2]}, "q", "stride 1", "stride 2"),
        ({"q": zeros(1, 1, HQ, D).expand(B, S, HQ, D)}, "q", "in place", "[2, 3, 4, 16]"),
    ),
    *cache_rows("kv_cache_append"),
    *rows(
        "kv_cache_append",
        (head_dim("kv_cache_append", 12), "k", "a multiple of 8", "12"),
        ({"k": zeros(B, S, HKV, D, dtype=torch.float64)}, "k", "float32, float16 or bfloat16", "float64"),
        ({"k": zeros(S, HKV, D)}, "k", "[batch, seqlen, num_kv_heads, head_dim]", "[3, 2, 16]"),
        ({n: zeros(B, 13, HKV, D) for n in ("k", "v")}, "k", "as the cache has rows (12)", "13"),
    ),
    *cache_rows("gqa_attention_decode"),
    *attention_rows("gqa_attention_decode"),
    *rows(
        "gqa_attention_decode",
        (NO_NEW | {"q": zeros(B, 17, HQ, D)}, "q", "1 to 16 query tokens", "17"),
        (NO_NEW | {"q": zeros(B, 0, HQ, D)}, "q", "1 to 16 query tokens", "0"),
        ({"q": zeros(B, S + 1, HQ, D)}, "k", "[batch, seqlen, num_kv_heads, head_dim] = [2, 4,", "[2, 3, 2, 16]"),
    ),
    *attention_rows("gqa_attention_prefill"),
    *rows(
        "gqa_attention_prefill",
        (NO_NEW, "k", "given where there is no k_cache", "None"),
        ({"k_cache": zeros(B, CAPACITY, HKV, D)}, "v_cache", "together with k_cache", "None"),
        (
            {n: zeros(B, CAPACITY, HKV, D) for n in ("k_cache", "v_cache")},
            "cache_seqlens",
            "together with k_cache",
            "None",
        ),
        ({"block_table": ints(B, 3)}, "block_table", "None without a k_cache", "a value"),
        ({"cache_seqlens": ints(B)}, "cache_seqlens", "None without a k_cache", "a value"),
        ({"cu_seqlens_q": ints(3)}, "q", "[tokens, num_q_heads, head_dim] with cu_seqlens_q", "[2, 3, 4, 16]"),
        (RAGGED | {"cu_seqlens_q": ints(3)}, "cu_seqlens_k", "together with cu_seqlens_q", "None"),
        (RAGGED | OFFSETS | {"cu_seqlens_q": zeros(3)}, "cu_seqlens_q", "int32 or int64", "float32"),
        (RAGGED | OFFSETS | {"cu_seqlens_q": ints(0)}, "cu_seqlens_q", "at least one offset", "[0]"),
        (RAGGED | OFFSETS | {"cu_seqlens_k": ints(4)}, "cu_seqlens_k", "[batch + 1] = [3]", "[4]"),
        (RAGGED | OFFSETS | {"max_seqlen_q": -1}, "max_seqlen_q", "0 or more", "-1"),
        (RAGGED | OFFSETS | {"k": zeros(B, S, HKV, D)}, "k", "[tokens, num_kv_heads, head_dim]", "[2, 3, 2, 16]"),
        ({"cu_seqlens_k": ints(3)}, "cu_seqlens_k", "None without cu_seqlens_q", "a value"),
        ({"max_seqlen_k": 7}, "max_seqlen_k", "None without cu_seqlens_q", "a value"),
        (TABLES | {"rotary_positions": ints(B, S), **LONGER}, "k", "as long as q (3 tokens)", "4 tokens"),
        (
            {"k": zeros(3, S, HKV, D), "v": zeros(3, S, HKV, D)},
            "k",
            "[batch, seqlen, num_kv_heads, head_dim]",
            "[3, 3, 2, 16]",
        ),
    ),
    *rows(
        "merge_attention_states",
        ({"outs": zeros(B, S, HQ, D)}, "outs", "[parts, batch, seqlen, num_heads, head_dim]", "[2, 3, 4, 16]"),
        ({"outs": zeros(0, B, S, HQ, D), "lses": zeros(0, B, HQ, S)}, "outs", "one part or more", "[0, 2, 3, 4, 16]"),
        ({"outs": ints(3, B, S, HQ, D)}, "outs", "float32, float16 or bfloat16", "int32"),
        ({"lses": zeros(3, B, S, HQ)}, "lses", "= [3, 2, 4, 3]", "[3, 2, 3, 4]"),
        ({"lses": zeros(3, B, HQ, S, dtype=HALF)}, "lses", "float32", "float16"),
        ({"outs": grad(3, B, S, HQ, D)}, "outs", "not require grad", NO_GRAD),
    ),
    *rows(
        "sample",
        ({"logits": zeros()}, "logits", "[..., vocab]", "[]"),
        ({"logits": ints(3, 10)}, "logits", "float32, float16 or bfloat16", "int32"),
        ({"logits": zeros(3, 0)}, "logits", "vocab from 1", "[3, 0]"),
        ({"temperature": -0.5}, "temperature", "0 (greedy)", "-0.5"),
        ({"temperature": float("nan")}, "temperature", "0 (greedy)", "nan"),
        ({"top_p": 0.0}, "top_p", "above 0 and at most 1", "0"),
        ({"top_p": 1.5}, "top_p", "above 0 and at most 1", "1.5"),
        ({"min_p": -0.1}, "min_p", "between 0", "-0.1"),
        ({"temperature": zeros(2)}, "temperature", "one value per row", "[2]"),
        ({"temperature": zeros(3, dtype=torch.float64)}, "temperature", "float32", "float64"),
        ({"top_k": zeros(3)}, "top_k", "int32 or int64", "float32"),
        ({"seed": zeros(3)}, "seed", "int32 or int64", "float32"),
        ({"logit_bias": zeros(3)}, "logit_bias", "[10] or one such row per row of logits [3, 10]", "[3]"),
        ({"logit_bias": zeros(2, 10)}, "logit_bias", "[10] or one such row", "[2, 10]"),
        ({"logit_bias": zeros(10, dtype=HALF)}, "logit_bias", "float32 or have the dtype of logits", "float16"),
        ({"allowed_bitmask": ints(3, 2)}, "allowed_bitmask", "[1] or one such row", "[3, 2]"),
        ({"allowed_bitmask": ints(3, 1, dtype=torch.int64)}, "allowed_bitmask", "int32", "int64"),
        ({"token_counts": ints(3, 1)}, "token_counts", "[10] or one such row", "[3, 1]"),
        ({"token_counts": ints(3, 10, dtype=torch.int64)}, "token_counts", "int32", "int64"),
        ({"token_counts": None}, "token_counts", "given together with a penalty", "None"),
        ({"repetition_penalty": zeros(2)}, "repetition_penalty", "one value per row", "[2]"),
        ({"frequency_penalty": zeros(3, dtype=HALF)}, "frequency_penalty", "float32", "float16"),
        ({"presence_penalty": ints(3)}, "presence_penalty", "float32", "int32"),
        ({"logit_bias": grad(10)}, "logit_bias", "not require grad", NO_GRAD),
        ({"presence_penalty": grad(3)}, "presence_penalty", "not require grad", NO_GRAD),
        ({"logits": grad(3, 10)}, "logits", "not require grad", NO_GRAD),
    ),
]

FORBIDDEN = re.compile(r"::|\.cpp|\.cu\b|\.h\b|\.so\b|Exception raised|std_|libtorch|/usr|/home|\n")


def served(device: str, op: str) -> None:
    if device == "cuda" and op == "decoder_step":
        require_sm90()


def test_the_table_covers_every_op() -> None:
    assert len(TABLE) >= 60
    assert {misuse.op for misuse in TABLE} == set(VALID) == set(OPS)


@pytest.mark.parametrize("op", VALID)
def test_the_calls_before_the_change_are_valid(device: str, op: str) -> None:
    served(device, op)
    getattr(gqa_kernels, op)(**Misuse(op, {}, "", "", "").arguments(device))


@pytest.mark.abi
@pytest.mark.parametrize("misuse", TABLE, ids=lambda misuse: f"{misuse.op}-{misuse.argument}-{misuse.given}")
def test_p20_misuse(device: str, misuse: Misuse) -> None:
    sentence = misuse.sentence(device)
    assert sentence.startswith(f"{misuse.op}: {misuse.argument} must "), sentence
    before, _, after = sentence.partition("got ")
    assert misuse.wanted in before, sentence
    assert misuse.given in after, sentence
    assert not FORBIDDEN.search(sentence), sentence
    if device == "cuda":
        assert sentence.replace("cuda:0", "cpu") == misuse.sentence("cpu")


@pytest.mark.parametrize("op", VALID)
def test_p20_healthy_afterwards(device: str, op: str) -> None:
    """A refusal writes nothing and leaves the next call right."""
    served(device, op)
    arguments = Misuse(op, {}, "", "", "").arguments(device)
    for misuse in [row for row in TABLE if row.op == op]:
        wrong = arguments | {name: value for name, value in misuse.arguments(device).items() if name in misuse.changes}
        before = [x.clone() for x in tree_leaves(wrong) if isinstance(x, Tensor)]
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            getattr(gqa_kernels, op)(**wrong)
        assert all(map(same_bytes, [x for x in tree_leaves(wrong) if isinstance(x, Tensor)], before))
    getattr(gqa_kernels, op)(**arguments)


@pytest.mark.parametrize("op", VALID)
def test_every_tensor_on_the_same_device(gpu: str, op: str) -> None:
    """One argument left on the CPU is refused by name, whichever it is."""
    arguments = Misuse(op, {}, "", "", "").arguments(gpu)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in names[1:]:
        with pytest.raises(RuntimeError) as raised:
            getattr(gqa_kernels, op)(**arguments | {name: arguments[name].cpu()})
        sentence = str(raised.value)
        assert sentence.startswith(f"{op}: {name} must be on the device of"), sentence
        assert sentence.endswith("got cpu") and not FORBIDDEN.search(sentence), sentence
