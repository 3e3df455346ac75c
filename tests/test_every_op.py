"""Promises that every registered op keeps, on seeded random calls: memory, fakes, capture, allocation, leaks."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calls import random_call
from support.contract import assert_compiles_once, assert_same, capture, flat, require_sm90
from support.guard import Comparison, Guard
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gqa_kernels
from gqa_kernels.explain import OPS

every_op = pytest.mark.parametrize("op", OPS)
WRITTEN = {"rope_": (0, 1), "kv_cache_append": (2, 3), "gqa_attention_decode": (1, 2), "gqa_attention_prefill": (3, 4)}
WRITTEN |= {"decoder_step": (1, 2)}
# What a call may allocate: its outputs, the workspace of attention, and what torch's products take and give.
ALLOCATIONS = {"rope_": 0, "kv_cache_append": 0, "rope": 2, "add_rmsnorm": 2, "merge_attention_states": 2, "sample": 3}
ALLOCATIONS |= {
    "gqa_attention_decode": 3,
    "gqa_attention_prefill": 3,
    "swiglu_ffn": 8,
    "linear": 8,
    "qk_rmsnorm_rope": 2,
    "decoder_step": 2,
}


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """decoder_step alone has no portable kernel."""
    params = request.node.callspec.params
    on_gpu = params.get("device") == "cuda" or "gpu" in request.fixturenames
    if params["op"] == "decoder_step" and on_gpu:
        require_sm90()


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Call:
    """A seeded random call; its tensors may be replaced and changed in place."""

    def __init__(self, op: str, seed: int, device: str) -> None:
        args, self.options = random_call(op, seed, device)
        self.op, self.args = op, list(args)

    def __call__(self) -> list[Tensor]:
        result = getattr(gqa_kernels, self.op)(*self.args, **self.options)
        return [] if result is None else flat(result)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.args, self.options = tree_map_only(Tensor, change, (self.args, self.options))

    @property
    def written(self) -> list[Tensor]:
        return tensors_of([self.args[i] for i in WRITTEN.get(self.op, ()) if i < len(self.args)])

    @property
    def read(self) -> list[Tensor]:
        return [x for x in tensors_of((self.args, self.options)) if all(x is not y for y in self.written)]

    def effect(self) -> list[Tensor]:
        """Outputs and what was written, as copies."""
        return [x.clone() for x in (*self(), *self.written)]


@every_op
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_p2_p3_between_the_strides(guard: Guard, op: str, poison: float) -> None:
    """What lies between the elements of an argument is neither read nor written, and what is read stays as it was."""
    for seed in range(6):
        expected = Call(op, seed, guard.device).effect()
        call, buffers = Call(op, seed, guard.device), []

        dense = tensors_of(call.args[1:]) if op == "decoder_step" else []  # it refuses strided weights and caches

        def spread(x: Tensor, buffers: list[tuple[Tensor, float]] = buffers, dense: list[Tensor] = dense) -> Tensor:
            if x.dim() < 2 or not x.is_floating_point() or any(x is y for y in dense):
                return guard.place(x, writable=True)
            value = poison if x.element_size() > 1 else float("nan")  # float8 has no infinity
            buffer = guard.place(torch.full((*x.shape[:-1], 2 * x.shape[-1]), value, dtype=x.dtype), writable=True)
            buffers.append((buffer[..., x.shape[-1] :], value))
            inside = buffer[..., : x.shape[-1]]
            inside.copy_(x)
            return inside

        call.map(spread)
        before = [x.clone() for x in call.read]
        assert_same(call.effect(), expected, f"{seed}: output")
        assert_same(call.read, before, f"{seed}: input")
        between = [x for x, _ in buffers]
        assert_same(between, [torch.full_like(x, value) for x, value in buffers], f"{seed}: memory between strides")


@every_op
@pytest.mark.parametrize("payload", [0x7F, 0xFF])
def test_p4_every_output_byte_is_written(device: str, op: str, payload: int) -> None:
    """What the memory of the outputs held before does not show."""
    for seed in range(6):
        expected = Call(op, seed, device).effect()
        call = Call(op, seed, device)
        torch.utils.deterministic.fill_uninitialized_memory = False
        stale = [torch.full((x.nbytes,), payload, dtype=torch.uint8, device=device) for x in expected for _ in range(2)]
        del stale
        assert_same(call.effect(), expected, str(seed))
        torch.utils.deterministic.fill_uninitialized_memory = True


@every_op
def test_p19_fake_equals_real(device: str, op: str) -> None:
    """Shape, dtype, strides and device."""
    for seed in range(20):
        call = Call(op, seed, device)
        real = call()
        with FakeTensorMode() as mode:
            call.map(mode.from_tensor)
            fake = call()
        assert len(fake) == len(real)
        for a, b in zip(fake, real):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device), seed


def sized(op: str, guard: Guard, n: int) -> tuple[Tensor, ...]:
    """Arguments whose sizes grow with ``n``."""
    if op == "decoder_step":
        return sized_step(guard, n)
    x, q, k = guard.randn(n, 3 * n), guard.randn(n, 5, 4, 8 * n), guard.randn(n, 5, 2, 8 * n)
    cache, lengths = torch.zeros(n, 10 * n, 2, 8 * n, device=guard.device), guard.ints(list(range(n)))
    cos, sin = guard.randn(9 * n, 4 * n), guard.randn(9 * n, 4 * n)
    return {
        "residual_add": (x, x.clone()),
        "rmsnorm": (x, x[0].clone()),
        "add_rmsnorm": (x, x.clone(), x[0].clone()),
        "swiglu": (x, x.clone()),
        "swiglu_ffn": (x, guard.randn(5 * n, 3 * n), guard.randn(5 * n, 3 * n), guard.randn(2 * n, 5 * n)),
        "linear": (x, guard.randn(5 * n, 3 * n), guard.randn(2 * n, 3 * n)),
        "merge_attention_states": (guard.randn(n, n + 1, 5, 4, 8), guard.randn(n, n + 1, 4, 5)),
        "rope": (q, k, cos, sin),
        "rope_": (q.clone(), k.clone(), cos, sin),
        "qk_rmsnorm_rope": (q, k, q[0, 0, 0].clone(), k[0, 0, 0].clone(), cos, sin),
        "sample": (x,),
        "kv_cache_append": (k, k.clone(), cache, cache.clone(), lengths),
        "gqa_attention_prefill": (q, k, k.clone()),
        "gqa_attention_decode": (q, cache, cache.clone(), k, k.clone(), lengths),
    }[op]


def sized_step(guard: Guard, n: int) -> tuple[Tensor, ...]:
    """Two layers, one after the other."""
    rows, hidden, intermediate = n, 16 * n, 48 * n
    shapes = [(rows, 10 * n, 2, 64), (rows, 10 * n, 2, 64), (256, hidden), (128, hidden), (128, hidden), (hidden, 256)]
    shapes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,), (hidden,)]
    layers = [guard.randn(*shape, dtype=torch.float16, scale=0.1, writable=True) for shape in (*shapes, *shapes)]
    ends = [guard.randn(*shape, dtype=torch.float16) for shape in ((rows, hidden), (hidden,), (7 * n, hidden))]
    return ends[0], *layers, *ends[1:], guard.ints(list(range(n)))


@every_op
def test_p17_compiles_once(guard: Guard, op: str) -> None:
    """Every size and length through one compilation."""

    def function(*args: Tensor) -> Any:
        if op == "decoder_step":
            hidden, *layers, norm, head, lengths = args
            lists = [[layers[i], layers[i + 11]] for i in range(11)]
            return gqa_kernels.decoder_step(hidden, *lists, norm, head, cache_seqlens=lengths, eps=1e-5)
        if op in ("kv_cache_append", "gqa_attention_decode"):
            result = getattr(gqa_kernels, op)(*args[:-1], cache_seqlens=args[-1])
        else:
            result = getattr(gqa_kernels, op)(*args)
        return () if result is None else result

    assert_compiles_once(function, [sized(op, guard, n) for n in (3, 5, 8, 2)])


@every_op
def test_p17_export_round_trip(device: str, op: str) -> None:
    """Exported, saved, loaded and run: the bytes of eager."""

    class Module(torch.nn.Module):
        def forward(self, args: list[Any], options: dict[str, Any]) -> Any:
            result = getattr(gqa_kernels, op)(*args, **options)
            return args[0] + 1 if result is None else result

    for seed in range(2):
        call, other, file = Call(op, seed, device), Call(op, seed, device), io.BytesIO()
        with torch.no_grad():
            torch.export.save(torch.export.export(Module(), (call.args, call.options)), file)
            file.seek(0)
            loaded = torch.export.load(file).module()
            assert_same(loaded(call.args, call.options), Module()(other.args, other.options))
        assert_same(call.written, other.written)


@every_op
def test_grad_is_refused_under_compile(device: str, op: str) -> None:
    """As outside: no silent graph break, no output that forgets its inputs."""
    call = Call(op, 0, device)

    def function(x: Tensor) -> Any:
        return getattr(gqa_kernels, op)(x, *call.args[1:], **call.options)

    x = call.args[0].requires_grad_()
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=fullgraph, backend="eager")
        with pytest.raises(Exception, match=rf"{op}: \w+ must not require grad, got requires_grad=True"):
            compiled(x)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_p22_neither_synchronises_nor_allocates(gpu: str, op: str) -> None:
    """No synchronisation; no memory but the outputs and a workspace."""
    for seed in range(12):
        call = Call(op, seed, gpu)
        call()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with no_synchronisation():
            call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= ALLOCATIONS.get(op, 1), seed


@every_op
def test_p23_thousand_replays(gpu: str, op: str) -> None:
    """Captured once, replayed with other values and lengths in place: every replay the bytes of eager."""
    for seed in range(4):
        call = Call(op, seed, gpu)
        graph, outputs = capture(call)
        longest = call.options["cache_seqlens"].clone() if "cache_seqlens" in call.options else None
        same = Comparison(gpu)
        for _ in range(250):
            if longest is not None:
                call.options["cache_seqlens"].copy_(longest * torch.rand(longest.shape, device=gpu))
            for offsets in (x for name, x in call.options.items() if name.startswith("cu_seqlens")):
                offsets[1:-1] = (torch.rand(len(offsets) - 2, device=gpu) * offsets[-1]).sort().values
            call.args[0].normal_()
            before = [x.clone() for x in call.written]
            graph.replay()
            replayed = [x.clone() for x in (*outputs, *call.written)]
            for x, old in zip(call.written, before):
                x.copy_(old)
            same.add(replayed, call.effect())
        same.check(f"{seed}: a replay has other bytes than eager")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@every_op
def test_p25_memory_is_flat(device: str, op: str) -> None:
    """10,000 calls on a GPU, fewer on the CPU."""
    calls = [Call(op, seed, device) for seed in range(4)]

    def usage(times: int) -> tuple[int, int, int]:
        for _ in range(times):
            for call in calls:
                call()
        gc.collect()
        if device == "cpu":
            return 0, 0, resident_bytes()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident_bytes()

    before = usage(50)
    after = usage(2500 if device == "cuda" else 150)
    assert after[:2] == before[:2], "device memory grew"
    assert after[2] - before[2] < 4 << 20, "host memory grew by 4 MiB or more"
