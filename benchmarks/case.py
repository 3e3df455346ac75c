"""One thing to measure: its inputs, who competes, how a result is checked, what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import copy_us, matmul_flops, read_us
from benchmarks.report import Aim, Goal, Row
from benchmarks.timing import Settings, call_us, kernel_us

OURS = "gqa_kernels"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[Inputs], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    capturing: Callable[[Inputs], AbstractContextManager[Any]] = nullcontext  # inputs as a graph is captured with them
    edit: Callable[[torch.cuda.CUDAGraph], None] | None = None  # changes the graph before it is made ready
    check: Callable[[Inputs, Any], None] | None = None  # in place of the case's
    flops: float | None = None  # of one that does other work than the case: only rates can be compared
    aim: Aim | None = None
    host: bool = True  # also time the call as Python makes it
    is_peer: bool = True  # if not ours


@dataclass
class Case:
    group: str
    op: str
    shape: str
    make: Callable[[], Inputs]
    contestants: list[Contestant]  # ours first
    check: Callable[[Inputs, Any], None]  # against float32; raises
    limit: str  # "read", "copy", "matmul" or, where only the host's time counts, "host"
    traffic: int  # bytes that must cross the memory bus
    flops: float = 0.0
    most_copies: int = 1024
    cold_too: bool = False  # the copies may fit the L2: also measure ours with copies that do not
    goals: tuple[Goal, ...] = ()
    goal_us: float | None = None  # set in advance
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def clone(inputs: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def limit_us(case: Case, settings: Settings, most_copies: int) -> float | None:
    if case.limit == "host":
        return None
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
        rows = {}
        for contestant in case.contestants:
            with contestant.context():
                row = _measure(case, contestant, untouched, inputs, limit, settings)
            if row is not None:
                rows[contestant] = row
        if case.cold_too and settings.copies(case.traffic, 4096) > copies:
            inputs += [case.make() for _ in range(settings.copies(case.traffic, 4096) - copies)]
            us = kernel_us(case.contestants[0].call, inputs, settings)
            cold = Contestant(OURS + " (cold)", case.contestants[0].call)
            rows[cold] = _row(case, cold.name, us, None, limit_us(case, settings, 4096))
    _compare(case, rows, settings)
    return list(rows.values())


def _compare(case: Case, rows: dict[Contestant, Row], settings: Settings) -> None:
    """What can be said of a row when the others are there: the best peer and, on a GPU, what is aimed at."""
    named = {row.impl: row for row in rows.values()}
    peers = [row for contestant, row in rows.items() if contestant.is_peer and not row.impl.startswith(OURS)]
    for contestant, row in rows.items():
        if row.impl == OURS:
            row.goal_us = case.goal_us
            if peers:
                best = min(peers, key=lambda peer: peer.us)
                row.best_peer, row.vs_best_peer = best.impl, best.us / row.us
        aim = contestant.aim
        if aim is None or not settings.cuda:
            continue
        if aim.beside in named:
            row.beside, row.aim_us = aim.beside, aim.us(named[aim.beside].us)
        elif not aim.beside:
            bounds = [aim.us(row.limit_us or 0.0), *(peer.us for peer in peers)]
            row.aim_us = min(us for us in bounds if us is not None)


def _measure(
    case: Case, contestant: Contestant, untouched: Inputs, inputs: list[Inputs], limit: float | None, settings: Settings
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
    kernel = call = None
    if settings.cuda and case.limit != "host":
        kernel = kernel_us(contestant.call, inputs, settings, contestant.capturing, contestant.edit)
    if contestant.host or kernel is None:
        call = call_us(contestant.call, inputs[0], settings)
    if contestant.flops is None:
        return _row(case, contestant.name, kernel, call, limit)
    row = Row(case.group, case.op, case.shape, contestant.name, kernel_us=kernel, call_us=call)
    row.tflops = contestant.flops / row.us * 1e-6
    return row


def _row(case: Case, impl: str, kernel: float | None, call: float | None, limit: float | None) -> Row:
    row = Row(case.group, case.op, case.shape, impl, kernel_us=kernel, call_us=call, limit=case.limit, limit_us=limit)
    row.share = limit / row.us if limit else None
    row.tflops = case.flops / row.us * 1e-6 if case.flops else None
    row.bytes_per_s = case.traffic / row.us * 1e6 if case.traffic else None
    return row
