"""What is kept for a model between calls: its record, buffers by batch size, and the captured step of each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gqa_kernels.hf.generation.drawing import Drawing
from gqa_kernels.hf.generation.prefill import Prefill
from gqa_kernels.hf.generation.record import ModelWeights, Unserved
from gqa_kernels.hf.generation.state import State, batch_bucket, capacity_bucket, own_cache
from gqa_kernels.hf.generation.step import embed, forward, logits_of
from gqa_kernels.hf.generation.watch import Watch
from gqa_kernels.hf.generation.weights import read_weights
from gqa_kernels.hf.generation.whole_step import whole_step
from gqa_kernels.kv_cache import BaseCache
from gqa_kernels.validation import validating

#: Batch sizes whose buffers are kept; a further one takes the place of the one used longest ago.
KEPT_STATES = 4


class Kind(NamedTuple):
    """What tells captured steps of one state apart."""

    active: tuple[str, ...] | None  # settings of the draw; None leaves the logits and the draw to the caller
    padded: bool


class Stepper:
    """One cache of a model: its state, and steps over it, replayed from a CUDA graph or run as they are."""

    def __init__(self, weights: ModelWeights, cache: BaseCache, pool: Any) -> None:
        self.weights, self._pool = weights, pool
        self.state = State(weights, cache)
        self.drawing = Drawing(cache.batch, weights.device)
        self.prefill = Prefill(weights, self.state, pool)
        self._captured: dict[Kind, torch.cuda.CUDAGraph] = {}

    def prepare(self, kind: Kind) -> Callable[[], None]:
        """A function that makes one step. It may run steps itself, so the state is set after it."""
        shape, device = (self.state.batch, self.weights.head.weights[0].shape[0]), self.weights.device
        if kind.active is None:
            if self.state.logits is None:
                self.state.logits = torch.zeros(shape, dtype=self.weights.dtype, device=device)
        elif "repetition_penalty" in kind.active and self.state.token_counts is None:
            self.state.token_counts = torch.zeros(shape, dtype=torch.int32, device=device)
        if device.type != "cuda" or validating():  # which asks the device, as no captured step can
            return lambda: self._step(kind)
        graph = self._captured.get(kind)
        if graph is None:
            graph = self._captured[kind] = self._capture(kind)
        return graph.replay

    def finish(self, kind: Kind, logits: Tensor) -> None:
        """Draws a token of each row of logits and takes it, or leaves that to the caller."""
        state, rows = self.state, logits.shape[0]
        if kind.active is None:
            assert state.logits is not None
            state.logits[:rows].copy_(logits)
            return
        ids = self.drawing.draw(kind.active, logits, state.step, state.token_counts)
        if "repetition_penalty" in kind.active and state.token_counts is not None:
            state.token_counts[:rows].scatter_(1, ids[:, None], 1)
        self.take(ids)

    def take(self, ids: Tensor) -> None:
        """Keeps the token drawn for each row, and makes it the next step's input."""
        state, rows = self.state, ids.shape[0]
        state.drawn[:, :rows].index_copy_(0, state.step, ids[None])
        state.advance()
        embed(self.weights, ids, out=state.hidden[:rows, 0])

    def _step(self, kind: Kind) -> None:
        logits = whole_step(self.weights, self.state, padded=kind.padded)
        if logits is None:
            normed = forward(self.weights, self.state, self.state.hidden, padded=kind.padded)
            logits = logits_of(self.weights, normed)
        self.finish(kind, logits)

    def _capture(self, kind: Kind) -> torch.cuda.CUDAGraph:
        self.drawing.reserve(kind.active or ())
        self.state.begin(0, None)  # what is written meanwhile, a prompt takes the place of
        streams: Any = torch.cuda
        side = streams.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what libraries do at their first call must not be captured
            self._step(kind)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            self._step(kind)
        return graph


class Kept:
    """All that is kept for one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights: ModelWeights | None = None
        self._fingerprint: tuple[object, ...] = ()
        self._watch: Watch | None = None
        self._steppers: OrderedDict[int, Stepper] = OrderedDict()  # by batch size
        self._over: WeakKeyDictionary[BaseCache, Stepper] = WeakKeyDictionary()  # caches of callers
        self._pool: Any = None
        self._done: torch.Event | None = None  # on the device, behind the last call

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """One thread at a time, and on the device one call after the other, on whatever streams."""
        if not self._lock.acquire(blocking=False):
            raise Unserved("another generation of this model is running, and its buffers are in use")
        try:
            if self._done is not None:
                self._done.wait(torch.cuda.current_stream(self._done.device))
            yield
        finally:
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self._done.device))
            self._lock.release()

    def weights(self, model: nn.Module) -> ModelWeights:
        """The model's record as it is now; what was captured for other weights is dropped."""
        if self._weights is None or self._watch is None or not self._watch.unchanged(model):
            record = read_weights(model)
            fingerprint = record.fingerprint()
            if fingerprint != self._fingerprint:
                self.release()
                record.pack()
                self._weights, self._fingerprint = record, fingerprint
            self._watch = Watch(model, record)
        assert self._weights is not None
        self._weights.refresh()
        return self._weights

    def stepper(self, rows: int, tokens: int, cache: BaseCache | None) -> Stepper:
        """A stepper over the caller's cache, or for so many rows and tokens: a kept one, or one in its place."""
        weights = self._weights
        assert weights is not None
        on_gpu = weights.device.type == "cuda"
        if on_gpu and self._pool is None:
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.Event(weights.device)
        if cache is not None:
            over = self._over.pop(cache, None)
            if over is None or not over.state.is_over(cache):
                over = None  # the buffers that the cache has left
                over = Stepper(weights, cache, self._pool)
            self._over[cache] = over
            return over
        batch = batch_bucket(rows) if on_gpu else rows
        stepper = self._steppers.pop(batch, None)
        if stepper is None or stepper.state.capacity < tokens:
            stepper = None  # its memory, before more is asked for
            while len(self._steppers) >= KEPT_STATES:
                self._steppers.popitem(last=False)
            stepper = Stepper(weights, own_cache(weights, batch, capacity_bucket(tokens)), self._pool)
        self._steppers[batch] = stepper
        return stepper

    def release(self) -> None:
        self._weights, self._watch, self._fingerprint = None, None, ()
        self._steppers.clear()
        self._over.clear()
        self._pool = None


_kept: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept_for(model: nn.Module) -> Kept:
    return _kept.setdefault(model, Kept())


def release(model: nn.Module) -> None:
    """Frees the caches and graphs that :func:`generate` keeps for ``model``; its next call makes them anew."""
    _kept.pop(model, None)  # a call that is running keeps its own to its end
