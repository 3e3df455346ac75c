"""What every registered op promises to torch: opcheck, compile, capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from support.guard import raw_bytes


def lacks_sm90() -> bool:
    """Whether the GPU is one that decoder_step, which has no portable kernel, refuses."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


def require_sm90() -> None:
    if lacks_sm90():
        pytest.skip("no sm_90")


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, skip: str = "") -> None:
    """The four utilities of torch.library.opcheck, less ``skip``: of float8 tensors torch can't check the schema."""
    # opcheck compares two runs of the op; its own tensors must not be NaN-filled padding of ours.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, kwargs or {}, test_utils=[name for name in utilities if name != skip])


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def assert_same(actual: Any, expected: Any, what: Any = "output") -> None:
    got, want = flat(actual), flat(expected)
    assert len(got) == len(want)
    assert [(a.shape, a.dtype) for a in got] == [(b.shape, b.dtype) for b in want], what
    same = [(raw_bytes(a) == raw_bytes(b.to(a.device))).all() for a, b in zip(got, want)]
    # All at once: a GPU is waited for one time.
    different = [i for i, alike in enumerate(torch.stack(same).tolist() if same else []) if not alike]
    assert not different, f"{what} {different} differs"


def assert_compiles(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """fullgraph compile with dynamic shapes gives the bytes of eager."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(*args, **kwargs), function(*args, **kwargs))


def assert_compiles_once(function: Any, arguments: list[tuple[Any, ...]]) -> None:
    """fullgraph, every set of arguments through one compilation, the bytes of eager."""
    first, counter = 0, CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that happen to be equal in the first call are not meant to stay so.
    with torch.no_grad(), torch.fx.experimental._config.patch(use_duck_shape=False):
        for i, given in enumerate(arguments):
            copies = [[x.clone() if isinstance(x, Tensor) else x for x in given] for _ in range(2)]
            assert_same(compiled(*copies[0]), function(*copies[1]))
            for mine, other in zip(*copies):
                if isinstance(mine, Tensor):
                    assert_same(mine, other)
            first = counter.frame_count if i == 0 else first
    assert counter.frame_count == first, f"compiled {counter.frame_count - first} times again"


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """``function`` as a CUDA graph, after one call on a side stream, and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    return graph, flat(captured)


def assert_graph_replays(function: Callable[[], Any], change: Callable[[], None]) -> None:
    """Captures ``function``, lets ``change`` alter its inputs in place, and compares a replay with eager."""
    graph, captured = capture(function)
    change()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.clone() for tensor in captured]
    assert_same(replayed, function())
