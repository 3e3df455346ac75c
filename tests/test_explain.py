"""explain() names what the launch log then shows, and computes nothing."""

from __future__ import annotations

import pytest
import torch
from support.calls import random_call
from support.contract import require_sm90
from support.guard import same_bytes
from torch import Tensor

import gqa_kernels
from gqa_kernels import explain, record_launches
from gqa_kernels._library import C, ops
from gqa_kernels.explain import H200, OPS


def test_every_registered_op_is_explained() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gqa_kernels::")
    }
    assert set(OPS) == registered


@pytest.mark.abi
@pytest.mark.parametrize("op", OPS)
def test_names_the_kernels_that_are_launched(device: str, op: str) -> None:
    if device == "cuda" and op == "decoder_step":
        require_sm90()
    for seed in range(12):
        args, kwargs = random_call(op, seed, device)
        plan = explain(op, *args, **kwargs)
        with record_launches() as launches:
            getattr(gqa_kernels, op)(*args, **kwargs)
        assert plan.device == device
        assert [dict(launch) for launch in plan.launches] == launches, (op, seed)
        assert plan.kernel == " + ".join(launch["kernel"] for launch in launches), (op, seed)


@pytest.mark.parametrize("op", OPS)
def test_plans_for_cuda_without_a_gpu(op: str) -> None:
    for seed in range(12):
        args, kwargs = random_call(op, seed, "cpu")
        plan = explain(op, *args, device="cuda", **kwargs)
        assert plan.device == "cuda" and plan.launches and plan.reason
        for launch in plan.launches:
            assert launch["kernel"] != "cpu" and launch["kernel"] in plan.kernel
            threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
            assert 32 <= threads <= 1024 or launch["kernel"] == "torch"
            assert 0 <= launch["shared_memory"] <= H200["max_shared_memory"]
            assert launch["grid"][0] >= 1 and all(1 <= size <= 65535 for size in launch["grid"][1:])
        assert plan.kernel in str(plan)


@pytest.mark.parametrize("op", OPS)
def test_the_device_argument_decides(device: str, op: str) -> None:
    if device == "cuda" and op == "decoder_step":
        require_sm90()
    args, kwargs = random_call(op, 0, device)
    assert explain(op, *args, device="cpu", **kwargs).kernel == "cpu"
    assert explain(op, *args, device="cuda", **kwargs).kernel != "cpu"
    assert explain(op, *args, device=torch.device(device), **kwargs) == explain(op, *args, **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_computes_and_launches_nothing(device: str, op: str) -> None:
    args, kwargs = random_call(op, 1, device)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with record_launches() as launches:
        for where in (None, "cpu", "cuda"):
            explain(op, *args, device=where, **kwargs)
    assert launches == []
    assert all(same_bytes(a, b) for a, b in zip(tensors, before))


def test_empty_calls_launch_nothing(device: str) -> None:
    plan = explain("rmsnorm", torch.empty(0, 64, device=device), torch.empty(64, device=device), device="cuda")
    assert (plan.kernel, plan.launches, plan.reason) == ("", (), "nothing to launch")
    assert "no launch" in str(plan)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"op must be one of add_rmsnorm, .*swiglu_ffn, got 'softmax'"):
        explain("softmax")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        explain("rmsnorm", torch.ones(2, 4), torch.ones(4), device="meta")


def test_a_refused_call_leaves_nothing_behind(device: str) -> None:
    """After an error the next call computes again, and its own plan is the only one."""
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(RuntimeError, match="rmsnorm: weight must have shape"):
        explain("rmsnorm", x, weight[:5], device="cuda")
    with pytest.raises(TypeError):
        explain("rmsnorm", x, weight, no_such_argument=1)
    with record_launches() as launches:
        out = gqa_kernels.rmsnorm(x, weight)
    assert len(launches) == 1 and not out.isnan().any()
    assert len(explain("rmsnorm", x, weight).launches) == 1


def test_explaining_is_per_thread() -> None:
    """Another thread computes while this one explains."""
    import threading

    x, weight, results = torch.randn(3, 64), torch.ones(64), []
    C.explain_begin("cuda", *H200.values())
    try:
        thread = threading.Thread(target=lambda: results.append(ops.rmsnorm(x, weight, 1e-6)))
        thread.start()
        thread.join()
    finally:
        plans = C.explain_end()
    assert plans == [] and same_bytes(results[0], gqa_kernels.rmsnorm(x, weight))
