"""The launch log: off by default, at DEBUG one line per launch, record_launches for programs."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from support.calls import random_call
from support.contract import require_sm90

import gqa_kernels
from gqa_kernels import launch_log, record_launches
from gqa_kernels.explain import OPS

KEYS = {"op", "kernel", "dtype", "grid", "block", "shared_memory", "num_splits"}


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("gqa_kernels")
    level = logger.level
    yield logger
    logger.setLevel(level)


@pytest.mark.abi
@pytest.mark.parametrize("op", OPS)
def test_every_op_reports_its_launches(device: str, op: str) -> None:
    if device == "cuda" and op == "decoder_step":
        require_sm90()
    args, kwargs = random_call(op, 0, device)
    with record_launches() as launches:
        getattr(gqa_kernels, op)(*args, **kwargs)
    assert launches
    for launch in launches:
        assert set(launch) == KEYS
        # On CUDA rope_ is rope onto itself; swiglu_ffn may be swiglu between torch's products.
        assert launch["op"] in (op, op.rstrip("_"), op.removesuffix("_ffn"))
        assert (launch["kernel"] == "cpu") == (device == "cpu")
        assert launch["dtype"].split(",")[0] == str(args[0].dtype).removeprefix("torch.")
        assert all(isinstance(size, int) and size >= 1 for size in (*launch["grid"], *launch["block"]))


def test_debug_shows_a_line_per_launch(device: str, logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    logger.setLevel(logging.DEBUG)
    gqa_kernels.rmsnorm(x, weight)
    gqa_kernels.rmsnorm(x, weight)
    lines = [record.getMessage() for record in caplog.records if record.name == "gqa_kernels"]
    assert len(lines) == 2
    assert lines[0].startswith("rmsnorm: ") and "float32" in lines[0]
    assert all(part in lines[0] for part in ("grid=(", "block=(", "shared_memory=", "num_splits=1"))
    logger.setLevel(logging.INFO)
    gqa_kernels.rmsnorm(x, weight)
    assert len([record for record in caplog.records if record.name == "gqa_kernels"]) == 2


def test_off_by_default(logger: logging.Logger) -> None:
    """Nothing is installed on the C++ side until somebody asks, and nothing afterwards."""
    logger.setLevel(logging.WARNING)
    assert not launch_log._installed
    with record_launches():
        assert launch_log._installed
    assert not launch_log._installed
    code = "import gqa_kernels.launch_log as log; assert not log._installed"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recorders_nest_and_end(logger: logging.Logger) -> None:
    x, weight = torch.randn(3, 64), torch.ones(64)
    with record_launches() as outer:
        gqa_kernels.rmsnorm(x, weight)
        with record_launches() as inner:
            gqa_kernels.rmsnorm(x, weight)
        gqa_kernels.rmsnorm(x, weight)
    gqa_kernels.rmsnorm(x, weight)
    assert (len(outer), len(inner)) == (3, 1)
    with pytest.raises(KeyError), record_launches() as broken:
        gqa_kernels.rmsnorm(x, weight)
        raise KeyError
    gqa_kernels.rmsnorm(x, weight)
    assert len(broken) == 1 and not launch_log._installed


def test_a_refused_call_reports_nothing(device: str) -> None:
    with record_launches() as launches, pytest.raises(RuntimeError):
        gqa_kernels.rmsnorm(torch.randn(3, 64, device=device), torch.ones(5, device=device))
    assert launches == []


def test_a_raising_log_does_not_break_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_kernels._library import C

    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: unraisable.append(info.exc_value))

    def broken(launch: dict[str, object]) -> None:
        raise ValueError("log")

    C.set_launch_log(broken)
    try:
        out = gqa_kernels.rmsnorm(torch.ones(1, 4), torch.ones(4))
    finally:
        C.set_launch_log(None)
    assert torch.isfinite(out).all() and len(unraisable) == 1
