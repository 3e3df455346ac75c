"""Reads ptxas' reports of a build and prints registers and spills; fails on a spill in a kernel that promises none.

usage: python csrc/check_spills.py BUILD_FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Kernels whose every instance must keep its values in registers.
NO_SPILLS: tuple[str, ...] = ("decode_ring",)


def main(folder: Path) -> int:
    entry = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
    spills = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
    used = re.compile(r"Used (\d+) registers")
    kernels, spilled, failed = 0, 0, 0
    logs = sorted(folder.rglob("*.cu.o.log"))
    for log in logs:
        name, arch, stored = "", "", 0
        for line in log.read_text().splitlines():
            if match := entry.search(line):
                name, arch = match[1], match[2]
            elif match := spills.search(line):
                stored = int(match[1]) + int(match[2])
            elif (match := used.search(line)) and name:
                kernels += 1
                if stored:
                    spilled += 1
                    promised = any(kernel in name for kernel in NO_SPILLS)
                    failed += promised
                    print(f"{'FAIL ' if promised else ''}{stored} bytes spilled, {match[1]} registers: {name} ({arch})")
                name = ""
    print(f"{kernels} kernel instances in {len(logs)} files, {spilled} with spills")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
