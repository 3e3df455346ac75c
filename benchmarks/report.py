"""A table on stdout, JSON with the circumstances, and a plot."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

COLUMNS = ["shape", "by", "kernel us", "call us", "TFLOP/s", "GB/s", "limit us", "share", "vs best peer"]


@dataclass
class Row:
    group: str
    op: str
    shape: str
    impl: str
    kernel_us: float | None = None  # device time, from a CUDA graph
    call_us: float | None = None  # a call from Python
    limit: str = ""  # what bounds it: "read", "copy" or "matmul"
    limit_us: float | None = None
    share: float | None = None  # limit_us / us
    tflops: float | None = None
    bytes_per_s: float | None = None
    tokens_per_s: float | None = None
    best_peer: str | None = None
    vs_best_peer: float | None = None  # the best peer's time over ours
    beside: str | None = None  # whose time it is judged by, if not the limit
    aim_us: float | None = None  # what it should take at most, from other times of the same run
    goal_us: float | None = None  # the same, as it was set in advance

    @property
    def us(self) -> float:
        return self.kernel_us or self.call_us or float("nan")


@dataclass(frozen=True)
class Aim:
    """At most ``factor`` times the limit's time, or ``plus`` microseconds more, whichever is longer; or, instead of the
    limit, than another contestant's ``beside`` it. Without either it is only compared."""

    factor: float | None = None
    plus: float | None = None
    beside: str = ""

    def us(self, base: float) -> float | None:
        bounds = [base * self.factor] if self.factor is not None else []
        bounds += [base + self.plus] if self.plus is not None else []
        return max(bounds, default=None)


@dataclass(frozen=True)
class Goal:
    """A floor under our speed: ``share`` of the limit, ``rate`` in bytes/s, or ``peer`` x that peer's speed; or, for
    another way to run the same call, ``at_most`` x our time; or ours is at most a share of the time ``beside`` it; or
    at least ``rate_of`` x the operations per second of one that does other work."""

    share: float | None = None
    rate: float | None = None
    peer: tuple[str, float] | None = None
    at_most: tuple[str, float] | None = None
    beside: tuple[str, float] | None = None
    rate_of: tuple[str, float] | None = None

    def verdict(self, rows: list[Row]) -> str:
        ours = rows[0]
        if self.share is not None:
            share = ours.share or 0.0
            text, met = f"{1 / max(share, 1e-9):.2f} x the floor, at most {1 / self.share:.1f} x", share >= self.share
        elif self.rate is not None:
            rate = ours.bytes_per_s or 0.0
            text, met = f"{rate / 1e12:.2f} TB/s, at least {self.rate / 1e12:.1f}", rate >= self.rate
        else:
            name, factor = self.peer or self.at_most or self.beside or self.rate_of or ("", 0.0)
            other = next((row for row in rows if row.impl == name), None)
            if other is None:
                return f"{ours.op} {ours.shape}: {name} did not run"
            ratio = other.us / ours.us
            if self.rate_of is not None:
                ratio = (ours.tflops or 0.0) / (other.tflops or float("inf"))
                text, met = f"{ratio:.3f} x the rate of {name}, at least {factor:.3f} x", ratio >= factor
            elif self.peer is not None:
                text, met = f"{ratio:.2f} x {name}, at least {factor:.2f} x", ratio >= factor
            elif self.beside is not None:
                text, met = f"{1 / ratio:.3f} x the time of {name}, at most {factor} x", 1 / ratio <= factor
            else:
                text, met = f"{name} takes {ratio:.2f} x the time, at most {factor:.2f} x", ratio <= factor
        return f"{ours.op} {ours.shape}: {text}: {'met' if met else 'MISSED'}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def _cells(row: Row) -> list[str]:
    share = f"{row.share:.0%} of {row.limit}" if row.share is not None else "-"
    peer = f"{row.vs_best_peer:.2f} x {row.best_peer}" if row.vs_best_peer is not None else "-"
    if row.tokens_per_s is not None:
        share = f"{row.tokens_per_s:.1f} tok/s"
    rate = row.bytes_per_s / 1e9 if row.bytes_per_s is not None else None
    numbers = [row.kernel_us, row.call_us, row.tflops, rate, row.limit_us]
    return [f"{row.op} {row.shape}", row.impl, *(_number(value) for value in numbers), share, peer]


def table(rows: list[Row]) -> str:
    return _aligned(COLUMNS, [_cells(row) for row in rows])


def _verdict(us: float, most: float | None) -> str:
    return "-" if most is None else "met" if us <= most else f"missed by {us - most:.2g}"


def aims_table(rows: list[Row]) -> str:
    """One line for each shape that has an aim: ours and the peers side by side, and whether it is met. "" without."""
    plain = [row for row in rows if "(" not in row.impl and not row.beside]
    judged = [row for row in plain if row.aim_us is not None]
    if not judged:
        return ""
    others = [row for row in plain if row.impl != judged[0].impl]
    peers = list(dict.fromkeys(row.impl for row in others))
    head = ["shape", "", "limit us", judged[0].impl, *peers, "aim us", "", "goal us", ""]
    lines = []
    for row in judged:
        times = {other.impl: other.us for other in others if (other.op, other.shape) == (row.op, row.shape)}
        numbers = [row.limit_us, row.us, *(times.get(peer) for peer in peers)]
        ends = [_number(row.aim_us), _verdict(row.us, row.aim_us), _number(row.goal_us), _verdict(row.us, row.goal_us)]
        lines.append([f"{row.op} {row.shape}", "", *(_number(number) for number in numbers), *ends])
    return _aligned(head, lines)


def ratios_table(rows: list[Row]) -> str:
    """One line for each time that is judged by another one of its shape. "" if none is."""
    head = ["shape", "by", "us", "beside", "us", "ratio", "at most", ""]
    lines = []
    for row in rows:
        other = next((o for o in rows if (o.op, o.shape, o.impl) == (row.op, row.shape, row.beside)), None)
        if other is not None:
            most = "-" if row.aim_us is None else f"{row.aim_us / other.us:.3f}"
            times = _number(row.us), other.impl, _number(other.us), f"{row.us / other.us:.3f}"
            lines.append([f"{row.op} {row.shape}", row.impl, *times, most, _verdict(row.us, row.aim_us)])
    return _aligned(head, lines) if lines else ""


def _aligned(head: list[str], cells: list[list[str]]) -> str:
    """A first cell that repeats the one above is left empty; all but the first two are set to the right."""
    lines = [head, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for i, line in enumerate(lines):
        repeated = i > 1 and line[0] == lines[i - 1][0]
        cells = ["" if repeated else line[0], *line[1:]]
        text.append("  ".join(c.ljust(w) if j < 2 else c.rjust(w) for j, (c, w) in enumerate(zip(cells, widths))))
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


def _without_out(arguments: list[str]) -> list[str]:
    """Where the files went says nothing about the run."""
    at = arguments.index("--out") if "--out" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def circumstances(device: str, reader: str, commit: str | None = None) -> dict[str, Any]:
    """Where and how the numbers came to be. Which files were changed is known where git knows the commit."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *_without_out(sys.argv[1:])]),
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "read_floor": reader,
        "data": "randn",
    }
    if commit is None:
        found["changed_files"] = (_output("git", "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda,
        }
    return found


def file_stem(group: str, device: str, suffix: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return "-".join(filter(None, [name.lower().replace(" ", "-"), group, suffix]))


def write_json(path: Path, rows: list[Row], about: dict[str, Any], skipped: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "skipped": skipped, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def write_plot(path: Path, rows: list[Row], title: str) -> bool:
    """Bars of time per shape and contestant, the limit as a line across; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "(" not in row.impl]  # not the other ways to run the same call
    shapes = list(dict.fromkeys(f"{row.op}\n{row.shape}" for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    width = 0.8 / len(impls)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.5 + 0.9 * len(shapes)), 5))
    for i, impl in enumerate(impls):
        mine = [(shapes.index(f"{row.op}\n{row.shape}"), row.us) for row in rows if row.impl == impl]
        axes.bar([at - 0.4 + (i + 0.5) * width for at, _ in mine], [us for _, us in mine], width, label=impl)
    for row in rows:
        if row.limit_us is not None:
            at = shapes.index(f"{row.op}\n{row.shape}")
            axes.hlines(row.limit_us, at - 0.45, at + 0.45, colors="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("us (black line: limit of the machine)")
    axes.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", fontsize=7)
    axes.set_title(title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
