"""One generation: a prompt, then a token of each row per step, and what the device has drawn so far."""

from __future__ import annotations

import torch
from torch import Tensor

from gqa_kernels.hf.generation.drawing import Settings
from gqa_kernels.hf.generation.graphs import Kept, Kind
from gqa_kernels.hf.generation.rotary import switch_of
from gqa_kernels.kv_cache import BaseCache


class Session:
    """After construction the first token is drawn; ``step`` draws the next one. Nothing here waits for the device.

    Without settings the caller draws: it looks at ``logits``, gives its tokens to ``take``, and then calls ``step``.
    """

    def __init__(
        self,
        kept: Kept,
        input_ids: Tensor,
        leftpad: Tensor | None,
        settings: Settings | None,
        max_new_tokens: int,
        cache: BaseCache | None,
    ) -> None:
        self.input_ids = input_ids
        self.rows, self.prompt = input_ids.shape
        self.drawn = 0
        self._cached = cache.length_bound if cache is not None else 0
        self._stepper = kept.stepper(self.rows, self.prompt + max_new_tokens, cache)
        self._kind = Kind(settings.active() if settings is not None else None, leftpad is not None)
        self._replay = self._stepper.prepare(self._kind)
        self._switch = switch_of(self._stepper.weights.rotary)
        self._stepper.state.begin(self.rows, leftpad)
        if settings is not None:
            self._stepper.drawing.set(settings, self.rows)
        counts = self._stepper.state.token_counts
        if counts is not None and "repetition_penalty" in (self._kind.active or ()):
            counts.zero_()[: self.rows].scatter_(1, input_ids, -1)
        self._prefill(input_ids)

    def step(self) -> None:
        if self._switch is not None and self._cached + self.prompt + self.drawn == self._switch + 1:
            self._prefill(self.sequences())  # other frequencies from here on: the cached keys have the old ones
            return
        self._replay()
        self.drawn += self._kind.active is not None

    @property
    def logits(self) -> Tensor:
        """``[rows, vocabulary]`` of the token to be drawn; the next step writes over them."""
        logits = self._stepper.state.logits
        assert logits is not None
        return logits[: self.rows]

    def take(self, ids: Tensor) -> None:
        self._stepper.take(ids)
        self.drawn += 1

    def tokens(self, start: int = 0) -> Tensor:
        """The tokens drawn from ``start`` on, int64 ``[rows, tokens]``, a view of the buffer."""
        return self._stepper.state.drawn[start : self.drawn, : self.rows].T

    def sequences(self) -> Tensor:
        return torch.cat([self.input_ids, self.tokens()], dim=1)

    def _prefill(self, ids: Tensor) -> None:
        stepper, length = self._stepper, ids.shape[1]
        stepper.state.tables.fill(self._cached + length)
        logits = stepper.prefill(ids, padded=self._kind.padded)
        stepper.state.set_place(self.rows, length - 1, self.drawn)
        stepper.finish(self._kind, logits)
        self.drawn += self._kind.active is not None
