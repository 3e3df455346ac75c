"""Notices that a model is no longer what was read of it, in a fraction of the time that reading it again takes."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor, nn

from gqa_kernels.hf.generation.record import ModelWeights

#: Attributes of instances that say how a module computes, beside its parts.
SETTINGS = ("scaling", "sliding_window", "variance_epsilon")


class Watch:
    """The modules of a model as they are now. Holds the parts of the model, but not the model."""

    def __init__(self, model: nn.Module, record: ModelWeights) -> None:
        self._attributes = [module.__dict__ for module in model.modules() if module is not model]
        self._named = [(own, name) for own in self._attributes for name in SETTINGS if name in own]
        self._parts, self._settings, _ = self._look(model)
        self._tensors = list(record.tensors())
        self._places = [*map(Tensor.data_ptr, self._tensors)]

    def unchanged(self, model: nn.Module) -> bool:
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        parts, settings, hooked = self._look(model)
        same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts)) and settings == self._settings
        return same and not hooked and [*map(Tensor.data_ptr, self._tensors)] == self._places

    def _look(self, model: nn.Module) -> tuple[list[Any], list[Any], bool]:
        """Children and parameters of every module in order; the forwards of instances, and other settings; whether
        there are hooks. A call waits for this, so the loop is one."""
        parts: list[Any] = []
        settings: list[Any] = [model.training]
        hooked = False
        for own in (model.__dict__, *self._attributes):
            hooked = hooked or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
            parts += own["_modules"].values()
            parts += own["_parameters"].values()
            settings.append(own.get("forward"))
        settings += [own.get(name) for own, name in self._named]
        return parts, settings, hooked
