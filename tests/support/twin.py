"""Prints a digest of what each op whose bytes are defined gives on the CPU, over seeded calls: run as a script."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

import gqa_kernels
from support.calls import random_call
from support.guard import raw_bytes

#: The op, and how many calls of it.
OPS = {"sample": 60, "kv_cache_append": 24}


def digest(op: str, count: int) -> str:
    found = hashlib.sha256()
    for seed in range(count):
        args, options = random_call(op, seed, "cpu")
        if op == "sample":
            options |= {"return_valid": True, "return_logprob": True}
        result = getattr(gqa_kernels, op)(*args, **options)
        for value in (*args, *(result if isinstance(result, tuple) else (result,))):
            if isinstance(value, Tensor):
                found.update(raw_bytes(value).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for op, count in OPS.items():
        print(op, digest(op, count))
