"""``python -m benchmarks.readme`` writes the tables of README, docs/decode.md and docs/generation.md, a picture and a
notebook from the last run's results.

No number is typed by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import generation, picture, tables
from benchmarks.model import COMPILED, EAGER, HF_GENERATE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DECODE, GENERATION = ROOT / "README.md", ROOT / "docs" / "decode.md", ROOT / "docs" / "generation.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.readme -->\n", "<!-- end of numbers -->\n"
OURS = "gqa_kernels"
TITLES = {
    "decode": "Decode attention, bfloat16, one query, cold cache; the limit is a kernel that only reads the cache",
    "prefill": "Prefill attention, bfloat16; the limit is a matrix product of as many operations",
    "ops": "Memory-bound ops, bfloat16, us; the limit is a copy of as many bytes, or reading the weights",
    "sample": "Sampling, bfloat16 logits; the limit is a kernel that only reads them",
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Kernel microseconds of each shape: ours, the limit, the best peer."""
    lines = ["| | gqa_kernels us | limit us | best peer us |", "|---|---|---|---|"]
    for mine in rows:
        if mine["impl"] != OURS or mine["kernel_us"] is None:
            continue
        name = mine["shape"] if mine["op"].startswith("gqa_attention") else f"{mine['op']} {mine['shape']}"
        peer = next((row for row in rows if is_peer(row, mine)), None)
        best = "" if peer is None else f"{peer['kernel_us']:.4g} ({peer['impl']})"
        lines.append(f"| {name} | {mine['kernel_us']:.4g} | {mine['limit_us']:.4g} | {best} |")
    return lines


def is_peer(row: dict[str, Any], mine: dict[str, Any]) -> bool:
    return all(row[key] == mine[key] for key in ("op", "shape")) and row["impl"] == mine["best_peer"]


def model_table(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens a second of each way to generate."""
    ways = [way for way in (HF_GENERATE, OURS, COMPILED, EAGER) if any(row["impl"] == way for row in rows)]
    names = {HF_GENERATE: "hf.generate", OURS: "patched", COMPILED: "transformers, compiled", EAGER: "transformers"}
    lines = [f"| tokens/s | {' | '.join(names[way] for way in ways)} |", "|---" * (len(ways) + 1) + "|"]
    for mine in rows:
        if mine["impl"] == OURS:
            same = {row["impl"]: row for row in rows if (row["op"], row["shape"]) == (mine["op"], mine["shape"])}
            speeds = " | ".join(f"{same[way]['tokens_per_s']:.4g}" if way in same else "" for way in ways)
            lines.append(f"| {mine['op']}, {mine['shape']} | {speeds} |")
    return lines


def path_of(group: str) -> Path:
    return RESULTS / f"nvidia-h200-{group}.json"


def render() -> str:
    """The README's part between the markers, markers included."""
    titles = {**TITLES, "model": "Whole models with random weights"}
    results = {group: json.loads(path_of(group).read_text()) for group in titles if path_of(group).exists()}
    runs: dict[str, list[str]] = {}
    for group, result in results.items():
        about = f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}, commit {result['commit'][:10]}"
        runs.setdefault(about, []).append(group)
    where = "; ".join(f"{' '.join(groups)}: {about}" for about, groups in runs.items())
    lines = [
        f"By `python -m benchmarks` on an H200 ({where}). Kernel times are of CUDA graphs over rotating inputs; every "
        "result was checked against float32 before it was timed.",
        "",
    ]
    for group, result in results.items():
        write = {
            "model": model_table,
            "decode": tables.side_by_side,
            "prefill": tables.side_by_side,
            "ops": tables.ops,
        }.get(group, table)
        lines += [titles[group] + ":", "", *write(result["rows"]), ""]
    return BEGIN + "\n" + "\n".join(lines) + END


def render_decode() -> str:
    """The same part of docs/decode.md."""
    result = json.loads(path_of("decode").read_text())
    about = f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}, commit {result['commit'][:10]}"
    lines = [f"`{result['command']}`, {about}:", ""]
    for write in (tables.decode_aims, tables.decode_ways, tables.decode_quantised, tables.decode_others):
        found = write(result["rows"])
        lines += [*found, ""] if found else []
    return BEGIN + "\n" + "\n".join(lines) + END


def replaced(text: str, rendered: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + rendered + rest.partition(END)[2]


def render_generation() -> str:
    return BEGIN + generation.render(json.loads(path_of("model").read_text())) + END


def pages() -> list[tuple[Path, str]]:
    """Each page that has tables of measured numbers, with these tables."""
    return [(README, render()), (DECODE, render_decode()), (GENERATION, render_generation())]


if __name__ == "__main__":
    for path, rendered in pages():
        path.write_text(replaced(path.read_text(), rendered))
    picture.PICTURE.write_text(picture.render())
    subprocess.run([sys.executable, ROOT / "examples/notebooks/execute.py", "04_benchmarks.ipynb"], check=True)
