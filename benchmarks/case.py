"""One thing to measure: its inputs, who competes, how a result is checked, what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import copy_us, matmul_flops, read_us
from benchmarks.report import Goal, Row
from benchmarks.timing import Settings, call_us, kernel_us

OURS = "gqa_kernels"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[Inputs], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    capturing: Callable[[Inputs], AbstractContextManager[Any]] = nullcontext  # inputs as a graph is captured with them
    flops: float | None = None  # where it does other work than the case: its rate is what is compared
    check: Callable[[Inputs, Any], None] | None = None  # and of its own result


@dataclass
class Case:
    group: str
    op: str
    shape: str
    make: Callable[[], Inputs]
    contestants: list[Contestant]  # ours first
    check: Callable[[Inputs, Any], None]  # against float32; raises
    limit: str  # "read", "copy" or "matmul"
    traffic: int  # bytes that must cross the memory bus
    flops: float = 0.0
    most_copies: int = 1024
    cold_too: bool = False  # the copies may fit the L2: also measure ours with copies that do not
    goals: tuple[Goal, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def clone(inputs: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def limit_us(case: Case, settings: Settings, most_copies: int) -> float:
    if case.limit == "matmul":
        return case.flops / matmul_flops(settings) * 1e6
    return (read_us if case.limit == "read" else copy_us)(case.traffic, settings, most_copies)


def measure(case: Case, settings: Settings) -> list[Row]:
    """Checks, then times every contestant. A peer that refuses the shape is left out; a wrong result raises."""
    with torch.no_grad():
        untouched = case.make()  # for the checks: an op in place changes what it is timed on
        copies = settings.copies(case.traffic, case.most_copies)
        inputs = [case.make() for _ in range(copies)]
        limit = limit_us(case, settings, case.most_copies)
        rows = []
        for contestant in case.contestants:
            with contestant.context():
                row = _measure(case, contestant, untouched, inputs, limit, settings)
            if row is not None:
                rows.append(row)
        if case.cold_too and settings.copies(case.traffic, 4096) > copies:
            inputs += [case.make() for _ in range(settings.copies(case.traffic, 4096) - copies)]
            us = kernel_us(case.contestants[0].call, inputs, settings)
            rows.append(_row(case, OURS + " (cold)", us, None, limit_us(case, settings, 4096)))
    peers = [row for row in rows if not row.impl.startswith(OURS)]
    for row in rows:
        if row.impl == OURS and peers:
            best = min(peers, key=lambda peer: peer.us)
            row.best_peer, row.vs_best_peer = best.impl, best.us / row.us
    return rows


def _measure(
    case: Case, contestant: Contestant, untouched: Inputs, inputs: list[Inputs], limit: float, settings: Settings
) -> Row | None:
    try:
        result = contestant.call(clone(untouched))
    except Exception as error:
        if contestant.name == OURS:
            raise
        case.skipped[contestant.name] = str(error).strip().splitlines()[0][:120]
        return None
    try:
        (contestant.check or case.check)(untouched, result)
    except AssertionError as error:
        raise AssertionError(f"{case.name}: {contestant.name} is wrong: {error}") from error
    del result
    kernel = kernel_us(contestant.call, inputs, settings, contestant.capturing) if settings.cuda else None
    call = call_us(contestant.call, inputs[0], settings)
    if contestant.flops is None:
        return _row(case, contestant.name, kernel, call, limit)
    row = Row(case.group, case.op, case.shape, contestant.name, kernel_us=kernel, call_us=call)
    row.tflops = contestant.flops / row.us * 1e-6
    return row


def _row(case: Case, impl: str, kernel: float | None, call: float | None, limit: float) -> Row:
    row = Row(case.group, case.op, case.shape, impl, kernel_us=kernel, call_us=call, limit=case.limit, limit_us=limit)
    row.share = limit / row.us
    row.tflops = case.flops / row.us * 1e-6 if case.flops else None
    row.bytes_per_s = case.traffic / row.us * 1e6
    return row
