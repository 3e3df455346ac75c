"""``out=``: the bytes of a call without it, in the caller's memory and nowhere else; under opcheck and compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.calls import random_call
from support.contract import assert_compiles, assert_same, capture, flat, opcheck
from support.guard import Guard
from torch import Tensor

import gqa_kernels
from gqa_kernels._library import ops

OPS = ["add_rmsnorm", "gqa_attention_decode", "gqa_attention_prefill", "rmsnorm", "rope", "swiglu"]
every_op = pytest.mark.parametrize("op", OPS)
# Arguments that a result may be: each element is read before it is written.
IN_PLACE: dict[str, list[tuple[int, ...]]] = {
    "add_rmsnorm": [(0, 1), (1, 0)],  # arguments that the first and the second result are
    "rmsnorm": [(0,)],
    "rope": [(0, 1)],
    "swiglu": [(0,), (1,)],
}


def shaped(result: Any, guard: Guard) -> Any:
    """Like what a call returns, elsewhere."""
    placed = [guard.place(torch.full_like(x, float("nan"), device="cpu"), writable=True) for x in flat(result)]
    return tuple(placed) if isinstance(result, tuple) else placed[0]


def call(op: str, args: Any, options: Any, **more: Any) -> Any:
    return getattr(gqa_kernels, op)(*args, **options, **more)


@every_op
def test_the_bytes_of_a_call_without(guard: Guard, op: str) -> None:
    for seed in range(12):
        args, options = random_call(op, seed, guard.device)
        again, _ = random_call(op, seed, guard.device)  # caches are written
        expected = call(op, args, options)
        if op.startswith("gqa_attention"):
            out = shaped(expected[0] if options.get("return_lse") else expected, guard)
            result = call(op, again, options, out=out)
            assert (result[0] if options.get("return_lse") else result) is out
        else:
            out = shaped(expected, guard)
            result = call(op, again, options, out=out)
            assert all(x is y for x, y in zip(flat(result), flat(out)))
        assert_same(result, expected, str(seed))
        assert_same([x for x in again if isinstance(x, Tensor)], [x for x in args if isinstance(x, Tensor)], "inputs")


@pytest.mark.parametrize("op", IN_PLACE)
def test_a_result_may_be_an_input(guard: Guard, op: str) -> None:
    for seed in range(12):
        for places in IN_PLACE[op]:
            args, options = random_call(op, seed, guard.device)
            if any(args[i] is None for i in places):
                continue
            expected = call(op, args, options)
            out = tuple(args[i] for i in places)
            assert_same(call(op, args, options, out=out if len(out) > 1 else out[0]), expected, f"{seed} {places}")


def test_wide_rows_in_place(guard: Guard) -> None:
    """Rows that do not fit on chip are read twice."""
    for width in (40_000, 131_072):
        x, residual, weight = (torch.randn(n, width, device=guard.device) for n in (3, 3, 1))
        weight = weight[0]
        expected = gqa_kernels.add_rmsnorm(x, residual, weight)
        assert_same(gqa_kernels.add_rmsnorm(x, residual, weight, out=(x, residual)), expected)
        expected_norm = gqa_kernels.rmsnorm(residual, weight)
        assert_same(gqa_kernels.rmsnorm(residual, weight, out=residual), expected_norm)


def overloads(op: str, args: Any, options: Any, result: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The registered op, and its arguments, that a call with ``out`` comes down to."""
    outs = flat(result)
    names = {"add_rmsnorm": ("out", "residual_out"), "rope": ("q_out", "k_out")}.get(op, ("out",))
    options = {**options, **dict(zip(names, (torch.empty_like(x) for x in outs)))}
    if not op.startswith("gqa_attention"):
        return getattr(ops, op).out, args, options
    if "window_size" in options:
        options["window_left"], options["window_right"] = options.pop("window_size")
    if op == "gqa_attention_decode":
        return ops.gqa_attention_decode.default, args, options
    return ops.gqa_attention_prefill.default, args, options


@every_op
def test_p16_opcheck(device: str, op: str) -> None:
    for seed in range(3):
        args, options = random_call(op, seed, device)
        overload, args, options = overloads(op, args, options, call(op, args, options))
        opcheck(overload, tuple(args), options)


@every_op
def test_p17_compile(device: str, op: str) -> None:
    args, options = random_call(op, 1, device)
    result = call(op, args, options)
    shape = flat(result)

    def function(*given: Any) -> Any:
        outs = [torch.empty_like(x) for x in shape]
        if op.startswith("gqa_attention"):
            return call(op, given, options, out=outs[0])
        return call(op, given, options, out=tuple(outs) if isinstance(result, tuple) else outs[0])

    assert_compiles(function, *args)


@every_op
def test_p22_allocates_nothing(gpu: str, op: str) -> None:
    """Where the workspace is given too; attention returns an empty tensor beside it."""
    for seed in range(6):
        args, options = random_call(op, seed, gpu)
        options.pop("return_lse", None)
        result = call(op, args, options)
        out = tuple(map(torch.empty_like, result)) if isinstance(result, tuple) else torch.empty_like(result)
        if op.startswith("gqa_attention"):
            size = getattr(gqa_kernels, f"{op}_workspace_size")(*args, **options)
            options["workspace"] = torch.empty(max(size, 1), dtype=torch.uint8, device=gpu)
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        call(op, args, options, out=out)
        assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == before, seed


@every_op
def test_p23_replays_into_the_same_memory(gpu: str, op: str) -> None:
    args, options = random_call(op, 2, gpu)
    options.pop("return_lse", None)
    result = call(op, args, options)
    out = tuple(map(torch.empty_like, result)) if isinstance(result, tuple) else torch.empty_like(result)
    graph, _ = capture(lambda: call(op, args, options, out=out))
    args[0].normal_()
    graph.replay()
    replayed = [x.clone() for x in flat(out)]
    assert_same(replayed, flat(call(op, args, options)))


def refusals() -> list[tuple[str, str, Any]]:
    x, weight, q = torch.randn(2, 3, 16), torch.randn(16), torch.randn(2, 3, 4, 16)
    k, cos, cache = torch.randn(2, 3, 2, 16), torch.randn(3, 8), torch.zeros(2, 8, 2, 16)
    lengths, wide = torch.zeros(2, dtype=torch.int32), torch.randn(2, 3, 32)
    big = torch.randn(200)
    g, narrow, inside = gqa_kernels, x[..., 0], cache.view(-1)[:192].view(2, 3, 2, 16)
    return [
        ("out must have shape of the result = [2, 3, 16], got [2, 3]", "rmsnorm",
         lambda: g.rmsnorm(x, weight, out=narrow)),
        ("out must have the dtype of x (float32), got float16", "rmsnorm", lambda: g.rmsnorm(x, weight, out=x.half())),
        ("out must be contiguous, got strided", "rmsnorm", lambda: g.rmsnorm(x, weight, out=wide[..., :16])),
        ("out must lie apart from x in memory, or be the contiguous x itself", "rmsnorm",
         lambda: g.rmsnorm(big[:96].view(6, 16), weight, out=big[8:104].view(6, 16))),
        ("out must lie apart from weight", "rmsnorm", lambda: g.rmsnorm(big[:16], big[16:32], out=big[16:32])),
        ("residual_out must lie apart from out", "add_rmsnorm",
         lambda: g.add_rmsnorm(x, x.clone(), weight, out=(wide.view(-1)[:96].view(2, 3, 16),) * 2)),
        ("out must lie apart from gate", "swiglu", lambda: g.swiglu(wide, out=wide.view(-1)[:96].view(2, 3, 16))),
        ("out must have shape of the result", "swiglu", lambda: g.swiglu(wide, out=torch.empty(2, 3, 32))),
        ("out must be one tensor for each of q and k", "rope", lambda: g.rope(q, k, cos, cos, out=torch.empty_like(q))),
        ("q_out must lie apart from k", "rope",
         lambda: g.rope(q[:, :, :2].contiguous(), k, cos, cos, out=(k, torch.empty_like(k)))),
        ("out must lie apart from q", "gqa_attention_prefill", lambda: g.gqa_attention_prefill(q, k, k, out=q)),
        ("out must have shape", "gqa_attention_prefill", lambda: g.gqa_attention_prefill(q, k, k, out=k)),
        ("out must be aligned to 16 bytes", "gqa_attention_prefill",
         lambda: g.gqa_attention_prefill(q, k, k, out=torch.empty(385)[1:].view(2, 3, 4, 16))),
        ("out must lie apart from k_cache", "gqa_attention_decode",
         lambda: g.gqa_attention_decode(k, cache, cache.clone(), cache_seqlens=lengths, out=inside)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(14))
def test_p20_refused(case: int) -> None:
    words, op, act = refusals()[case]
    with pytest.raises(RuntimeError) as caught:
        act()
    assert f"{op}: {words}" in str(caught.value)


@pytest.mark.parametrize("count", [None, 1, 3])
def test_p20_not_a_pair(count: int | None) -> None:
    x, q, table = torch.randn(3, 16), torch.randn(1, 2, 2, 8), torch.randn(4, 4)
    given = "one tensor" if count is None else f"{count} of them"
    with pytest.raises(RuntimeError, match=rf"^add_rmsnorm: out must be two tensors, \(normed, .*\), got {given}$"):
        gqa_kernels.add_rmsnorm(x, x, x[0], out=x if count is None else (x,) * count)  # type: ignore[arg-type]
    if count is not None:
        with pytest.raises(RuntimeError, match=f"^rope: out must be two tensors, one for q .*, got {given}$"):
            gqa_kernels.rope(q, q, table, table, out=(q,) * count)  # type: ignore[call-overload]


def test_grad_is_refused() -> None:
    x, weight = torch.randn(2, 16), torch.randn(16)
    with pytest.raises(RuntimeError, match="rmsnorm: out must not require grad"):
        gqa_kernels.rmsnorm(x, weight, out=torch.empty(2, 16, requires_grad=True))
