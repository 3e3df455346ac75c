"""The memory-bound ops, against a plain copy that moves the same bytes; the whole FFN, against reading its weights.

The main figure rotates over at most 64 inputs, so that small ones are in the L2 cache, as in a model's step; "(cold)"
rotates over as many as it takes to find a cold cache. Calls of one row are measured with ordinary launches too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import gqa_kernels
from benchmarks import ops_chain, peers, shapes
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.check import assert_close
from benchmarks.ops_chain import EPS, norm, ordinary, rotate
from benchmarks.report import Aim
from benchmarks.timing import Settings

WARM_COPIES = 64
LARGE = 64e6  # bytes, from which on an op should move them as fast as a copy does
AS_A_COPY = Aim(factor=1 / 0.96)
ONE_ROW = "rmsnorm", "add_rmsnorm", "swiglu", "rope", "rope_"  # launched programmatically
ROPE_ALONE = OURS + " (rope alone)"

Sizes = dict[str, tuple[int, ...]]


def _add_norm(x: Inputs) -> tuple[Tensor, Tensor]:
    total = x["x"] + x["residual"]
    return norm(total, x["weight"]), total


def _rope(x: Inputs) -> tuple[Tensor, Tensor]:
    return rotate(x["q"], x["cos"], x["sin"]), rotate(x["k"], x["cos"], x["sin"])


def _norm_rope(x: Inputs) -> tuple[Tensor, Tensor]:
    q, k = norm(x["q"], x["q_weight"]), norm(x["k"], x["k_weight"])
    return rotate(q, x["cos"], x["sin"]), rotate(k, x["cos"], x["sin"])


def _ffn(x: Inputs) -> Tensor:
    gate, up = functional.linear(x["x"], x["w_gate"]), functional.linear(x["x"], x["w_up"])
    return functional.linear(functional.silu(gate) * up, x["w_down"])


def _projections(x: Inputs) -> Tensor:
    return torch.cat([functional.linear(x["x"], x[name]) for name in ("w_q", "w_k", "w_v")], dim=-1)


def _rope_in_place(x: Inputs) -> tuple[Tensor, Tensor]:
    gqa_kernels.rope_(x["q"], x["k"], x["cos"], x["sin"])
    return x["q"], x["k"]


def cases(settings: Settings, quick: bool) -> Iterator[Case]:
    hidden, intermediate = shapes.HIDDEN, shapes.INTERMEDIATE
    rows, tokens = shapes.ROWS_QUICK if quick else shapes.ROWS, [] if quick else shapes.FFN_TOKENS
    if not settings.cuda:
        hidden, intermediate = shapes.HIDDEN_CPU, shapes.INTERMEDIATE_CPU
        rows, tokens = shapes.ROWS_CPU[:1] if quick else shapes.ROWS_CPU, [] if quick else shapes.FFN_TOKENS_CPU
    for count in rows:
        yield from _row_cases(settings, count, hidden, intermediate)
        yield from _rope_cases(settings, count, shapes.ROPE_HEADS)
    if not quick:
        for attention in shapes.OPS_CHAIN if settings.cuda else []:
            yield ops_chain.case(attention, intermediate, settings)
        yield from _product_cases(settings, tokens, hidden, intermediate)
        for case in _other_widths(settings):  # a second each for torch.compile is too long
            case.contestants = [c for c in case.contestants if c.name != "torch.compile"]
            yield case


def _other_widths(settings: Settings) -> Iterator[Case]:
    for shape in shapes.NORMS if settings.cuda else shapes.NORMS_CPU:
        yield from _norm_cases(settings, shape.rows, shape.width)
    for shape in shapes.SWIGLUS if settings.cuda else []:
        yield _swiglu_case(settings, shape.rows, shape.width)
    for count, heads in shapes.ROPES if settings.cuda else []:
        yield from _rope_cases(settings, count, heads)


def _product_cases(settings: Settings, tokens: list[int], hidden: int, intermediate: int) -> Iterator[Case]:
    for count in tokens:
        sizes = {"w_gate": (intermediate, hidden), "w_up": (intermediate, hidden), "w_down": (hidden, intermediate)}
        ours = Contestant(OURS, lambda x: gqa_kernels.swiglu_ffn(x["x"], x["w_gate"], x["w_up"], x["w_down"]))
        case = _case(
            settings, "swiglu_ffn", f"{count} x {hidden}/{intermediate}", {"x": (count, hidden), **sizes}, ours, _ffn
        )
        if count >= 256:  # bound by its products, no longer by reading the weights
            case.limit, case.flops = "matmul", 6.0 * count * hidden * intermediate
        else:
            case.limit, case.traffic = "read", 3 * hidden * intermediate * _dtype(settings).itemsize
        yield case
        sizes = {"w_q": (hidden, hidden), "w_k": (hidden // 4, hidden), "w_v": (hidden // 4, hidden)}
        ours = Contestant(OURS, lambda x: gqa_kernels.linear(x["x"], x["w_q"], x["w_k"], x["w_v"]))
        case = _case(
            settings, "linear", f"{count} x {hidden}, q k v", {"x": (count, hidden), **sizes}, ours, _projections
        )
        if count >= 256:
            case.limit, case.flops = "matmul", 3.0 * count * hidden * hidden
        else:
            case.limit, case.traffic = "read", 3 * hidden * hidden // 2 * _dtype(settings).itemsize
        yield case


def _norm_cases(settings: Settings, rows: int, hidden: int) -> Iterator[Case]:
    narrow, shape = (rows, hidden), f"{rows} x {hidden}"
    yield _case(
        settings,
        "rmsnorm",
        shape,
        {"x": narrow, "weight": (hidden,)},
        Contestant(OURS, lambda x: gqa_kernels.rmsnorm(x["x"], x["weight"], EPS)),
        lambda x: norm(x["x"], x["weight"]),
        [
            Contestant("F.rms_norm", lambda x: functional.rms_norm(x["x"], (hidden,), x["weight"], EPS)),
            *peers.flashinfer_op(settings.device, lambda f: lambda x: f.rmsnorm(x["x"], x["weight"], EPS)),
        ],
    )
    yield _case(
        settings,
        "add_rmsnorm",
        shape,
        {"x": narrow, "residual": narrow, "weight": (hidden,)},
        Contestant(OURS, lambda x: gqa_kernels.add_rmsnorm(x["x"], x["residual"], x["weight"], EPS)),
        _add_norm,
        peers.flashinfer_op(settings.device, _flashinfer_add_norm),
    )


def _row_cases(settings: Settings, rows: int, hidden: int, intermediate: int) -> Iterator[Case]:
    narrow = rows, hidden
    yield from _norm_cases(settings, rows, hidden)
    yield _case(
        settings,
        "residual_add",
        f"{rows} x {hidden}",
        {"x": narrow, "residual": narrow},
        Contestant(OURS, lambda x: gqa_kernels.residual_add(x["x"], x["residual"])),
        lambda x: x["x"] + x["residual"],
    )
    yield _swiglu_case(settings, rows, intermediate)


def _swiglu_case(settings: Settings, rows: int, intermediate: int) -> Case:
    return _case(
        settings,
        "swiglu",
        f"{rows} x {intermediate}",
        {"gate": (rows, intermediate), "up": (rows, intermediate)},
        Contestant(OURS, lambda x: gqa_kernels.swiglu(x["gate"], x["up"])),
        lambda x: functional.silu(x["gate"]) * x["up"],
    )


def _rope_cases(settings: Settings, tokens: int, heads: tuple[int, int, int]) -> Iterator[Case]:
    q_heads, kv_heads, head_dim = heads
    rope_sizes: Sizes = {
        "q": (1, tokens, q_heads, head_dim),
        "k": (1, tokens, kv_heads, head_dim),
        "cos": (tokens, head_dim // 2),
        "sin": (tokens, head_dim // 2),
    }
    name = f"{tokens} tokens {q_heads}:{kv_heads} D{head_dim}"

    def rope(x: Inputs) -> Any:
        return gqa_kernels.rope(x["q"], x["k"], x["cos"], x["sin"])

    yield _case(settings, "rope", name, rope_sizes, Contestant(OURS, rope), _rope)
    norm_sizes = rope_sizes | {"q_weight": (head_dim,), "k_weight": (head_dim,)}
    ours = Contestant(
        OURS,
        lambda x: gqa_kernels.qk_rmsnorm_rope(
            x["q"], x["k"], x["q_weight"], x["k_weight"], x["cos"], x["sin"], eps=EPS
        ),
        aim=Aim(1.1, beside=ROPE_ALONE) if tokens > 1 else None,
    )
    alone = Contestant(ROPE_ALONE, rope, check=_check_against(_rope), host=False)
    yield _case(settings, "qk_rmsnorm_rope", name, norm_sizes, ours, _norm_rope, [alone])
    in_place = peers.flashinfer_op(settings.device, _flashinfer_rope)
    yield _case(settings, "rope_", name, rope_sizes, Contestant(OURS, _rope_in_place), _rope, in_place, eager_too=False)


def _flashinfer_add_norm(flashinfer: Any) -> Callable[[Inputs], Any]:
    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        flashinfer.fused_add_rmsnorm(x["x"], x["residual"], x["weight"], EPS)
        return x["x"], x["residual"]

    return call


def _flashinfer_rope(flashinfer: Any) -> Callable[[Inputs], Any]:
    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        key = x["cos"].data_ptr()
        if key not in prepared:
            table = torch.cat([x["cos"], x["sin"]], -1).float()
            prepared[key] = torch.arange(len(table), device=table.device), table
        positions, table = prepared[key]
        q, k = x["q"][0].flatten(1), x["k"][0].flatten(1)
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, x["q"].shape[-1], table, True)
        return x["q"], x["k"]

    return call


def _dtype(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.cuda else torch.float32


def _check_against(eager: Callable[[Inputs], Any]) -> Callable[[Inputs, Any], None]:
    def check(x: Inputs, out: Any) -> None:
        reference = eager({n: value.float() for n, value in x.items()})
        assert_close(out, reference if isinstance(reference, tuple) else [reference])

    return check


def _case(
    settings: Settings,
    op: str,
    shape: str,
    sizes: Sizes,
    ours: Contestant,
    eager: Callable[[Inputs], Any],
    others: list[Contestant] | tuple[()] = (),
    *,
    eager_too: bool = True,
) -> Case:
    dtype = _dtype(settings)

    def make() -> Inputs:
        values = {n: torch.randn(size, device=settings.device) for n, size in sizes.items()}
        if "cos" in values:
            angle = values["cos"]
            values["cos"], values["sin"] = angle.cos(), angle.sin()
        scale = {n: size[-1] ** -0.5 if n.startswith("w_") else 1.0 for n, size in sizes.items()}
        return {
            n: (value * scale[n]).to(torch.float32 if n in ("cos", "sin") else dtype) for n, value in values.items()
        }

    made = make()
    result = eager(made)
    outputs = result if isinstance(result, tuple) else (result,)
    moved = sum(tensor.nbytes for tensor in (*made.values(), *outputs))
    large = settings.cuda and op not in ("swiglu_ffn", "linear") and moved >= LARGE
    contestants = [replace(ours, aim=AS_A_COPY) if large and ours.aim is None else ours]
    if shape.startswith("1 ") and op in ONE_ROW:
        contestants = ordinary(ours, 1, settings)
    contestants += others
    if eager_too:
        found = [Contestant("torch eager", eager), *peers.compiled(eager, settings.device)]
        contestants += [replace(peer, host=not settings.cuda) for peer in found]
    return Case(
        group="ops",
        op=op,
        shape=shape,
        make=make,
        contestants=contestants,
        check=_check_against(eager),
        limit="copy",
        traffic=moved,
        most_copies=WARM_COPIES,
        cold_too=True,
        goal_us=shapes.OPS_GOALS.get(f"{op} {shape}"),
    )
