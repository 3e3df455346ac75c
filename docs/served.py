"""What is served by what, asked of the plans themselves: the README's tables of support."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

import gqa_kernels
from gqa_kernels import hf
from gqa_kernels.__main__ import examples
from gqa_kernels.explain import H200

A100 = {"compute_capability": 80, "num_sms": 108, "max_shared_memory": 166912, "l2_size": 41943040}
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
B, D = 4, 128
REFUSED = "refused"


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def kernels(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: dict[str, int] | None) -> str:
    """The kernels of the plan on this device, None being the CPU; "refused" where the op refuses the call."""
    properties = H200 if device is None else device
    with mock.patch("gqa_kernels.explain._properties", lambda _: properties):
        try:
            plan = gqa_kernels.explain(op, *args, device="cpu" if device is None else "cuda", **kwargs)
        except RuntimeError:
            return REFUSED
    names = list(dict.fromkeys(launch["kernel"] for launch in plan.launches))
    if device is None:
        return "yes" if plan.kernel else "torch"
    return " + ".join(f"`{name}`" for name in names) or "torch's matrix products"


def cells(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return " | ".join(kernels(op, args, kwargs, device) for device in (None, A100, H200))


def attention_calls() -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """(what, op, args, options): 32 query heads over 8, prompts of 2048 tokens, caches of 4096 rows."""
    q, k = tensor(B, 2048, 32, D), tensor(B, 2048, 8, D)
    one, new = tensor(B, 1, 32, D), tensor(B, 1, 8, D)
    cache, pages = tensor(B, 4096, 8, D), tensor(B * 256, 16, 8, D)
    lengths, table = ints(*[1024] * B), torch.zeros(B, 256, dtype=torch.int32)
    cos = tensor(8192, D // 2, dtype=torch.float32)
    offsets = ints(*(2048 * b for b in range(B + 1)))
    options: dict[str, dict[str, Any]] = {
        "sliding window": {"window_size": (1023, -1)},
        "softcap": {"softcap": 30.0},
        "attention sinks": {"sinks": tensor(32)},
        "left padding": {"cache_leftpad": ints(*[7] * B)},
        "log-sum-exp returned": {"return_lse": True},
        "rotation in the call": {"rotary_cos": cos, "rotary_sin": cos},
        "bytes independent of the batch": {"batch_invariant": True},
    }
    prefill, decode = "gqa_attention_prefill", "gqa_attention_decode"
    ragged = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 2048, "max_seqlen_k": 2048}
    at = {"cache_seqlens": lengths}
    paged = {**at, "block_table": table}
    scale, eights = tensor(8, dtype=torch.float32), tensor(B, 4096, 8, D, dtype=torch.int8)
    return [
        ("causal", prefill, (q, k, k), {}),
        ("full", prefill, (q, k, k), {"causal": False}),
        ("ragged", prefill, (q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1)), ragged),
        ("over a cached prefix", prefill, (q, k, k, cache, cache), at),
        ("over a paged prefix", prefill, (q, k, k, pages, pages), paged),
        *((name, prefill, (q, k, k), option) for name, option in options.items()),
        ("float32", prefill, tuple(x.float() for x in (q, k, k)), {}),
        ("1 token", decode, (one, cache, cache), at),
        ("append", decode, (one, cache, cache, new, new), at),
        ("append to pages", decode, (one, pages, pages, new, new), paged),
        *((name, decode, (one, cache, cache, new, new), {**at, **option}) for name, option in options.items()),
        ("16 tokens", decode, (q[:, :16], cache, cache, k[:, :16], k[:, :16]), at),
        ("float32", decode, tuple(x.float() for x in (one, cache, cache)), at),
        ("float8_e4m3fn or int8 caches", decode, (one, eights, eights), {**at, "k_scale": scale}),
        ("append to float8_e4m3fn or int8 caches", decode, (one, eights, eights, new, new), {**at, "k_scale": scale}),
        ("over a float8_e4m3fn or int8 prefix", prefill, (q, k, k, eights, eights), {**at, "k_scale": scale}),
    ]


def attention_rows() -> list[str]:
    """One row for the calls of an op that the same kernels serve."""
    rows: dict[tuple[str, str], list[str]] = {}
    for label, op, args, kwargs in attention_calls():
        rows.setdefault((op.removeprefix("gqa_attention_"), cells(op, args, kwargs)), []).append(label)
    return [f"| {op}: {', '.join(labels)} | {served} |" for (op, served), labels in rows.items()]


def head_dims() -> list[int]:
    """Every head_dim that attention takes, on the CPU and on both devices alike."""
    served = []
    for head_dim in range(1, 300):
        q = tensor(1, 64, 4, head_dim)
        found = {kernels("gqa_attention_prefill", (q, q, q), {}, device) == REFUSED for device in (None, A100, H200)}
        if len(found) != 1:
            raise SystemExit(f"head_dim {head_dim} is served on some devices only")
        if found == {False}:
            served.append(head_dim)
    return served


def groups() -> list[int]:
    """Query heads to a KV head, of 1 to 128."""
    served = []
    for group in range(1, 129):
        q, k = tensor(1, 64, group, 64), tensor(1, 64, 1, 64)
        if all(kernels("gqa_attention_prefill", (q, k, k), {}, device) != REFUSED for device in (None, A100, H200)):
            served.append(group)
    return served


def op_dtypes(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The dtypes that every device takes, of those that take the op at all."""

    def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            return x
        if id(x) not in made:  # a tensor may stand for those of many layers
            made[id(x)] = torch.empty_like(x, dtype=dtype)
        return made[id(x)]

    devices = [device for device in (None, A100, H200) if kernels(op, args, kwargs, device) != REFUSED]
    served = []
    for dtype, name in DTYPES.items():
        made: dict[int, torch.Tensor] = {}
        changed = tree_map_only(torch.Tensor, lambda x, dtype=dtype: cast(x, dtype), args)
        if all(kernels(op, changed, kwargs, device) != REFUSED for device in devices):
            served.append(name)
    return ", ".join(served)


def support_tables() -> str:
    dims = head_dims()
    if dims != list(range(8, dims[-1] + 1, 8)) or groups() != list(range(1, 129)):
        raise SystemExit("head_dims are no longer the multiples of 8, or a ratio is refused: say so here")
    lines = [
        f"Attention: bfloat16 unless said otherwise, any head_dim that is a multiple of 8 up to {dims[-1]}, any "
        "number of query heads to a KV head, any page size (wgmma over pages: multiples of 16 rows, head_dim 64, 96, "
        "128 or 256). Planned for 4 sequences, 32 heads over 8, head_dim 128, prompts of 2048, caches of 4096:",
        "",
        "| | CPU | sm_80 and newer | sm_90 |",
        "|---|---|---|---|",
        *attention_rows(),
        "",
        "The other ops, at Llama-3.1-8B's shapes:",
        "",
        "| | dtypes | CPU | sm_80 and newer | sm_90 |",
        "|---|---|---|---|---|",
    ]
    for shape, op, args, kwargs in examples():
        if not op.startswith("gqa_attention"):
            lines.append(f"| `{op}` {shape} | {op_dtypes(op, args, kwargs)} | {cells(op, args, kwargs)} |")
    lines += ["", f"`patch` serves models of these families of transformers: {', '.join(hf.FAMILIES)}."]
    return "\n".join(lines)
