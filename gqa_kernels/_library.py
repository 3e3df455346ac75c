"""Loads the extension. Importing this module registers every op under ``torch.ops.gqa_kernels``."""

from __future__ import annotations

from typing import Any

import torch

try:
    from gqa_kernels import _C
except ImportError as error:
    raise ImportError(
        f"gqa_kernels could not load its extension ({error}). It needs torch>=2.11 (this is {torch.__version__}); "
        "in a source tree, build it first: pip install ."
    ) from error

ops: Any = torch.ops.gqa_kernels
C: Any = _C

__all__ = ["C", "ops", "pair_of", "refuse_grad"]


def refuse_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises where autograd would expect a backward: these are inference kernels."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} must not require grad, got requires_grad=True with grad enabled: "
                "these are inference kernels without a backward; call them under torch.no_grad()"
            )


def pair_of(op: str, names: str, out: Any) -> tuple[Any, Any]:
    """The two tensors of an ``out=``, or a refusal that says what was wanted."""
    if isinstance(out, torch.Tensor) or len(out) != 2:
        given = "one tensor" if isinstance(out, torch.Tensor) else f"{len(out)} of them"
        raise RuntimeError(f"{op}: out must be two tensors, {names}, got {given}")
    return out[0], out[1]
