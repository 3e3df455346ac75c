"""The launch log: ``logging.getLogger("gqa_kernels").setLevel(logging.DEBUG)`` shows every launch.

The C++ side reports launches only while the level is DEBUG or lower, so that the log costs nothing when off.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gqa_kernels._library import C

Launch = dict[str, Any]


class _LaunchLogger(logging.Logger):
    def setLevel(self, level: int | str) -> None:
        super().setLevel(level)
        _install()


logger = logging.getLogger("gqa_kernels")
logger.__class__ = _LaunchLogger

_recorders: list[list[Launch]] = []
_installed = False


def _report(launch: Launch) -> None:
    for recorder in _recorders:
        recorder.append(launch)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "%(op)s: %(kernel)s %(dtype)s grid=%(grid)s block=%(block)s shared_memory=%(shared_memory)d "
            "num_splits=%(num_splits)d",
            launch,
        )


def _install() -> None:
    global _installed
    wanted = bool(_recorders) or logger.isEnabledFor(logging.DEBUG)
    if wanted != _installed:
        C.set_launch_log(_report if wanted else None)
        _installed = wanted


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects the launches made inside the block: op, kernel, dtype, grid, block, shared_memory, num_splits."""
    launches: list[Launch] = []
    _recorders.append(launches)
    _install()
    try:
        yield launches
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not launches]
        _install()


_install()
