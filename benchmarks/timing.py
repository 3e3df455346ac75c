"""Two clocks: torch.utils.benchmark for a call as Python makes it, a CUDA graph over rotating inputs for kernels."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer

T = TypeVar("T")

BLOCKS = 5  # a time is the median of this many blocks of replays
FEWEST_CALLS = 8  # calls in a graph, so that starting it does not count


@dataclass(frozen=True)
class Settings:
    device: str
    seconds: float  # spent on each measurement

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def l2_size(self) -> int:
        return int(torch.cuda.get_device_properties("cuda").L2_cache_size) if self.cuda else 0

    def copies(self, size: int, most: int) -> int:
        """How many inputs of ``size`` bytes exceed four times the L2, so that each finds a cold cache; at most
        ``most``. On the CPU always one."""
        return max(1, min(most, math.ceil(4 * self.l2_size / max(1, size)))) if self.cuda else 1


def call_us(call: Callable[[T], Any], inputs: T, settings: Settings) -> float:
    """Microseconds of one call in a row of calls with the same inputs, host time included."""
    timer = Timer("call(inputs)", globals={"call": call, "inputs": inputs}, num_threads=torch.get_num_threads())
    call(inputs)
    return float(timer.blocked_autorange(min_run_time=settings.seconds).median * 1e6)


def kernel_us(
    call: Callable[[T], Any],
    inputs: Sequence[T],
    settings: Settings,
    capturing: Callable[[T], AbstractContextManager[Any]] = nullcontext,
    edit: Callable[[torch.cuda.CUDAGraph], None] | None = None,
) -> float:
    """Microseconds of device time of one call: a graph of calls, each on the next inputs, is replayed and divided.

    Outputs are kept for one lap, so that writes go to memory that is as cold as the inputs. ``capturing`` may give the
    inputs other values in place for as long as the graph is captured, ``edit`` change what was captured.
    """
    stream = torch.cuda.Stream()
    laps = math.ceil(FEWEST_CALLS / len(inputs))
    kept: deque[Any] = deque(maxlen=len(inputs))
    graph = torch.cuda.CUDAGraph(keep_graph=edit is not None)
    with ExitStack() as changed:
        for values in inputs:
            changed.enter_context(capturing(values))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for values in inputs:
                call(values)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(laps):
                for values in inputs:
                    kept.append(call(values))
    if edit is not None:
        edit(graph)
        graph.instantiate()
    first = _replay_ms(graph, 1)
    times = 1 + int(1000 * settings.seconds / BLOCKS / max(first, 1e-3))
    blocks = sorted(_replay_ms(graph, times) / times for _ in range(BLOCKS))
    return blocks[BLOCKS // 2] * 1000 / (laps * len(inputs))


def _replay_ms(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
