"""What patch() did to a model, and what the patched model later sent back to transformers."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, field
from typing import Any

logger = logging.getLogger("gqa_kernels.hf")


@dataclass
class ModuleReport:
    """One module: ``name`` in the model, its class, whether it was replaced, by what or why not."""

    name: str
    kind: str
    replaced: bool
    reason: str


@dataclass
class PatchReport:
    """``print(report)`` for people, ``report.to_dict()`` for programs."""

    model: str
    modules: list[ModuleReport] = field(default_factory=list)
    #: Reasons for which a replaced module used its original forward for some call, with the class that gave it first.
    fallbacks: dict[str, str] = field(default_factory=dict)
    #: Reasons for which generate() took transformers' own loop instead of one CUDA graph per token.
    own_loops: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[ModuleReport]:
        return [module for module in self.modules if module.replaced]

    @property
    def left_alone(self) -> list[ModuleReport]:
        return [module for module in self.modules if not module.replaced]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def note_fallback(self, kind: str, reason: str) -> None:
        """Logs a reason the first time this model meets it."""
        if reason not in self.fallbacks:
            self.fallbacks[reason] = kind
            logger.warning("%s uses its original forward: %s", kind, reason)

    def note_generation(self, reason: str) -> None:
        if reason not in self.own_loops:
            self.own_loops.append(reason)
            logger.info("generate() of %s takes transformers' own loop: %s", self.model, reason)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} modules replaced, {len(self.left_alone)} left alone"]
        for title, modules in (("replaced", self.replaced), ("left alone", self.left_alone)):
            lines += [f"  {title:10}  {line}" for line in _grouped(modules)]
        lines += [f"  fell back   {kind}: {reason}" for reason, kind in self.fallbacks.items()]
        lines += [f"  own loop    generate(): {reason}" for reason in self.own_loops]
        return "\n".join(lines)


def _grouped(modules: list[ModuleReport]) -> list[str]:
    """One line for the modules that differ in their layer number only."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for module in modules:
        number = re.search(r"\.(\d+)\.|\.(\d+)$", module.name)
        pattern = module.name.replace(number[0], number[0].replace(number[1] or number[2], "{}"), 1) if number else None
        key = (pattern or module.name, module.kind, module.reason)
        groups.setdefault(key, []).extend([int(number[1] or number[2])] if number else [])
    return [f"{name.format(_ranges(layers))}  {kind}: {reason}" for (name, kind, reason), layers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
