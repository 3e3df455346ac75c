"""The C interface of ops whose CPU twins nobody calls from Python: there the ops leave products to torch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gqa_kernels


class _Params(ctypes.Structure):
    def __init__(self, dtype: int, **fields: Any) -> None:
        super().__init__(ctypes.sizeof(self), dtype, **fields)


class LinearParams(_Params):
    """gqa_linear_params."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("struct_size", "dtype")),
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("weight_scale", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "in_features")),
        ("out_features", ctypes.c_int64 * 3),
        ("x_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64 * 3),
        ("residual_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("static_weights", ctypes.c_int32),
    ]


class FfnParams(_Params):
    """gqa_swiglu_ffn_params."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("struct_size", "dtype")),
        *((name, ctypes.c_void_p) for name in ("x", "w_gate", "w_up", "w_down")),
        *((name, ctypes.c_void_p) for name in ("w_gate_scale", "w_up_scale", "w_down_scale")),
        *((name, ctypes.c_void_p) for name in ("residual", "activation", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "intermediate", "out_features")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("x", "w_gate", "w_up", "w_down", "residual")),
        ("static_weights", ctypes.c_int32),
    ]


def call_twin(name: str, params: _Params, first: int, last: int) -> None:
    """Rows first ... last of an op on the CPU."""
    library = ctypes.CDLL(str(Path(gqa_kernels.__file__).parent / "libgqa_kernels.so"))
    status = getattr(library, name)(ctypes.byref(params), ctypes.c_int64(first), ctypes.c_int64(last))
    assert status == 0, status
