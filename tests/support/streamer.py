"""A streamer that keeps what generation shows it."""

from __future__ import annotations

from torch import Tensor


class Recorder:
    """Fails at the value of that number, if asked to."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.values: list[Tensor] = []
        self.fail_at, self.error, self.ended = fail_at, error, False

    def put(self, value: Tensor) -> None:
        if len(self.values) == self.fail_at:
            raise self.error
        assert value.device.type == "cpu" and not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended = True
