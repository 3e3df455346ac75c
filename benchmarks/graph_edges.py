"""Programmatic dependent launches of a captured graph turned into ordinary ones, to see what they gain.

A launch that may start early is an edge of its own kind between two kernels of the graph; here such edges are replaced
by those that wait for the first kernel's end.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

PROGRAMMATIC = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


class _Edge(ctypes.Structure):
    _fields_ = [("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte * 6)]


class _Kernel(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("pointers", ctypes.c_void_p * 2),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


def _driver(name: str, *arguments: Any) -> None:
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name} returned {status}")


def _name(node: int) -> str:
    params, name = _Kernel(), ctypes.c_char_p()
    _driver("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
    if params.function:
        _driver("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(params.function))
    else:
        _driver("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(params.kernel))
    return (name.value or b"").decode()


def make_ordinary(graph: torch.cuda.CUDAGraph, kernel: str = "") -> None:
    """For kernels whose name contains ``kernel``. Raises where none was launched programmatically."""
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    _driver("cuGraphGetEdges_v2", raw, None, None, None, ctypes.byref(count))
    before, after = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    edges = (_Edge * count.value)()
    _driver("cuGraphGetEdges_v2", raw, before, after, edges, ctypes.byref(count))
    changed = 0
    for i in range(count.value):
        if edges[i].type[0] != PROGRAMMATIC or kernel not in _name(after[i]):
            continue
        pair = (ctypes.c_void_p * 1)(before[i]), (ctypes.c_void_p * 1)(after[i])
        _driver("cuGraphRemoveDependencies_v2", raw, *pair, ctypes.byref(edges[i]), ctypes.c_size_t(1))
        _driver("cuGraphAddDependencies_v2", raw, *pair, None, ctypes.c_size_t(1))
        changed += 1
    if changed == 0:
        raise RuntimeError(f"no {kernel or 'kernel'} in the graph is launched programmatically")
