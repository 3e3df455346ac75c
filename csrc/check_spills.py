"""Reads ptxas' reports of a build and fails if a kernel spills registers: none does.

usage: python csrc/check_spills.py BUILD_FOLDER [--table TEXT ...]

With --table it prints instead, as Markdown, what the sm_90a kernels of sources whose names contain a TEXT take.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Kernel:
    source: str
    name: str
    arch: str
    spilled: int = 0  # bytes
    registers: int = 0
    shared: int = 0  # bytes, those that a launch asks for not among them


def kernels_of(log: Path) -> Iterator[Kernel]:
    kernel = None
    for line in log.read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = Kernel(log.name.split(".")[0], match[1], match[2])
        elif kernel and (match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            kernel.spilled = int(match[1]) + int(match[2])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
            yield kernel
            kernel = None


def plain_names(kernels: list[Kernel]) -> list[str]:
    """norm_dense_rows for its mangled name."""
    if shutil.which("c++filt") is None:
        return [kernel.name for kernel in kernels]
    names = "\n".join(kernel.name for kernel in kernels)
    found = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    found = found.replace("(anonymous namespace)::", "")
    return [re.split(r"[<(]", line.removeprefix("void "))[0].split("::")[-1] for line in found.splitlines()]


def span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def table(kernels: list[Kernel]) -> list[str]:
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel, name in zip(kernels, plain_names(kernels)):
        groups.setdefault((kernel.source, name), []).append(kernel)
    lines = ["| source | kernel | instances | registers | shared bytes | spills |", "|---|---|---|---|---|---|"]
    for (source, name), group in sorted(groups.items()):
        numbers = [span([kernel.registers for kernel in group]), span([kernel.shared for kernel in group])]
        numbers.append(str(sum(kernel.spilled for kernel in group)))
        lines.append(f"| {source} | `{name}` | {len(group)} | {' | '.join(numbers)} |")
    return lines


def main(folder: Path, wanted: list[str]) -> int:
    logs = sorted(folder.rglob("*.cu.o.log"))
    kernels = [kernel for log in logs for kernel in kernels_of(log)]
    if wanted:
        shown = [k for k in kernels if k.arch == "sm_90a" and any(text in k.source for text in wanted)]
        print("\n".join(table(shown)))
        return 0
    spilled = [kernel for kernel in kernels if kernel.spilled]
    for kernel in spilled:
        print(f"{kernel.spilled} bytes spilled, {kernel.registers} registers: {kernel.name} ({kernel.arch})")
    print(f"{len(kernels)} kernel instances in {len(logs)} files, {len(spilled)} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[3:] if "--table" in sys.argv else []))
