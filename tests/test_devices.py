"""P24: another device than the current one, several threads, an interpreter that ends with work under way."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from support.calls import random_call
from support.contract import flat, lacks_sm90, require_sm90
from support.guard import same_bytes
from torch import Tensor

import gqa_kernels
from gqa_kernels.explain import OPS

SEEDS = range(3)


def call(op: str, seed: int, device: str) -> list[Tensor]:
    """What a seeded call returns, and its arguments after it."""
    args, options = random_call(op, seed, device)
    result = getattr(gqa_kernels, op)(*args, **options)
    tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    return [*([] if result is None else flat(result)), *tensors]


@pytest.mark.parametrize("op", OPS)
def test_p24_another_device(gpu: str, op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    if op == "decoder_step":
        require_sm90()
    for seed in SEEDS:
        expected = call(op, seed, "cuda:0")
        actual = call(op, seed, "cuda:1")
        assert torch.cuda.current_device() == 0
        assert all(x.device.index == 1 for x in actual)
        assert all(same_bytes(a.cpu(), b.cpu()) for a, b in zip(actual, expected))


def test_p24_threads(device: str) -> None:
    """Each on its own stream, all at once: nothing that carries state is shared."""
    ops = [op for op in OPS if op != "decoder_step" or device == "cpu" or not lacks_sm90()]
    expected = {op: [[x.clone() for x in call(op, seed, device)] for seed in SEEDS] for op in ops}
    wrong: list[str] = []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
            for op in ops[first:] + ops[:first]:
                for seed in SEEDS:
                    if not all(same_bytes(a, b) for a, b in zip(call(op, seed, device), expected[op][seed])):
                        wrong.append(f"{op} {seed}")

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_p24_interpreter_exit(device: str) -> None:
    """A process may end right behind a call, with nothing waited for and nothing to complain about."""
    code = f"""
import torch, gqa_kernels
x = torch.randn(4096, 4096, device={device!r})
for _ in range(50):
    y = gqa_kernels.rmsnorm(x, x[0])
q = torch.randn(1, 64, 8, 64, device={device!r}, dtype=torch.bfloat16)
out = gqa_kernels.gqa_attention_prefill(q, q, q, causal=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
