"""Which kernel an op would run for given arguments, and why, without running it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gqa_kernels._library import C

OPS = (
    "add_rmsnorm",
    "decoder_step",
    "gqa_attention_decode",
    "gqa_attention_prefill",
    "kv_cache_append",
    "linear",
    "merge_attention_states",
    "qk_rmsnorm_rope",
    "residual_add",
    "rmsnorm",
    "rope",
    "rope_",
    "sample",
    "swiglu",
    "swiglu_ffn",
)

# What plans are made for where there is no GPU: an H200.
H200 = {"compute_capability": 90, "num_sms": 132, "max_shared_memory": 232448, "l2_size": 62914560}


@dataclass(frozen=True)
class Explanation:
    """The plan of one call.

    Attributes:
        op: name of the op.
        device: ``"cpu"`` or ``"cuda"``.
        kernel: names of the kernels in order of launch, joined by ``" + "``; empty where there is nothing to do.
        launches: op, kernel, dtype, grid, block, shared_memory and num_splits of each, as the launch log shows them.
        reason: one sentence: why this kernel and not another.
        workspace_size: bytes the op needs as workspace.
        num_splits: parts the keys are divided into; 1 where that means nothing.
    """

    op: str
    device: str
    kernel: str
    launches: tuple[dict[str, Any], ...]
    reason: str
    workspace_size: int
    num_splits: int

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.kernel or 'no launch'} ({self.reason})"]
        lines += [
            "  {kernel} {dtype} grid={grid} block={block} shared_memory={shared_memory} num_splits={num_splits}".format(
                **launch
            )
            for launch in self.launches
        ]
        if self.workspace_size:
            lines.append(f"  workspace: {self.workspace_size} bytes")
        return "\n".join(lines)


def explain(op: str, *args: Any, device: str | torch.device | None = None, **kwargs: Any) -> Explanation:
    """Says which kernel ``gqa_kernels.<op>(*args, **kwargs)`` would run. Validates as the op does, computes nothing.

    Args:
        op: name of an op: ``"rmsnorm"``, ``"gqa_attention_decode"``, ...
        args, kwargs: what the op would be called with.
        device: plan for ``"cpu"`` or ``"cuda"`` wherever the tensors are; None plans for the device they are on. With
            ``"cuda"`` and no GPU the plan is that of an H200.

    Returns:
        An :class:`Explanation`; print it to read it.

    Raises:
        ValueError: no op has this name, or ``device`` is neither cpu nor cuda.
        RuntimeError: what the op itself would refuse.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    wanted = "" if device is None else torch.device(device).type
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"explain: device must be cpu or cuda, got {device}")
    function = getattr(importlib.import_module("gqa_kernels"), op)
    found = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    chosen = torch.device(device) if device is not None else found or torch.device("cpu")

    plans: list[dict[str, Any]] = []
    C.explain_begin(wanted, *_properties(chosen).values())
    try:
        function(*args, **kwargs)
    finally:
        plans = C.explain_end()
    launches = tuple(launch for plan in plans for launch in plan["launches"])
    return Explanation(
        op=op,
        device=chosen.type,
        kernel=" + ".join(launch["kernel"] for launch in launches),
        launches=launches,
        reason=plans[0]["reason"] if plans else "nothing to launch",
        workspace_size=max((plan["workspace_size"] for plan in plans), default=0),
        num_splits=max((launch["num_splits"] for launch in launches), default=1),
    )


def _properties(device: torch.device) -> dict[str, int]:
    """Of this GPU where there is one, else of an H200."""
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            found: dict[str, int] | None = C.current_device()
        if found is not None:
            return {key: found[key] for key in H200}
    return H200
