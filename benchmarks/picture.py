"""The README's picture: every shape of the last run as a dot, at our speed over the best peer's."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "speed.svg"
TITLES = {
    "decode": "decode attention",
    "prefill": "prefill attention",
    "ops": "norms, RoPE, SwiGLU, FFN",
    "sample": "sampling",
    "model": "HuggingFace generate()",
}
LEFT, WIDTH, ROW, TOP = 215, 540, 62, 40
LOWEST, HIGHEST = 0.25, 32.0  # of the axis, which is logarithmic


def at(ratio: float) -> float:
    """Where a ratio lies on the axis."""
    share = math.log(max(LOWEST, min(HIGHEST, ratio)) / LOWEST) / math.log(HIGHEST / LOWEST)
    return LEFT + WIDTH * share


def dots(rows: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """(our speed over the best peer's, what it was) of every shape that a peer could serve."""
    found = []
    for row in rows:
        if row["impl"] == "gqa_kernels" and row["vs_best_peer"] is not None:
            found.append((row["vs_best_peer"], f"{row['op']} {row['shape']}: {row['vs_best_peer']:.2f} x"))
    return found


def group_lines(index: int, title: str, found: list[tuple[float, str]]) -> list[str]:
    middle = TOP + ROW * index + ROW // 2
    faster = sum(ratio > 1 for ratio, _ in found)
    lines = [
        f'<text x="10" y="{middle - 3}" class="title">{escape(title)}</text>',
        f'<text x="10" y="{middle + 13}" class="note">ahead in {faster} of {len(found)} shapes</text>',
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{middle}" y2="{middle}" class="rule"/>',
    ]
    for i, (ratio, what) in enumerate(found):
        kind, y = ("ahead" if ratio > 1 else "behind"), middle + 6 * (i % 5 - 2)
        lines.append(
            f'<circle cx="{at(ratio):.1f}" cy="{y}" r="4" class="{kind}"><title>{escape(what)}</title></circle>'
        )
    return lines


def render() -> str:
    results = {group: json.loads((RESULTS / f"nvidia-h200-{group}.json").read_text()) for group in TITLES}
    about = results["decode"]
    commits = ", ".join(dict.fromkeys(result["commit"][:10] for result in results.values()))
    bottom = TOP + ROW * len(TITLES)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {bottom + 74}" font-size="13"'
        ' font-family="system-ui, sans-serif">',
        "<style>.title{font-weight:600}.note{fill:#666;font-size:11px}.rule{stroke:#ddd}.grid{stroke:#eee}"
        ".one{stroke:#222}.ahead{fill:#1a7f37;fill-opacity:.75}.behind{fill:#cf222e;fill-opacity:.75}</style>",
        f'<rect width="{LEFT + WIDTH + 30}" height="{bottom + 74}" fill="white"/>',
        f'<text x="{LEFT}" y="20" class="title">Our speed over that of the best peer, one dot per shape: '
        "right of the line we are faster</text>",
    ]
    for ratio in (0.25, 0.5, 1, 2, 4, 8, 16, 32):
        x, kind = at(ratio), "one" if ratio == 1 else "grid"
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}" class="{kind}"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" class="note">{ratio:g} x</text>')
    for index, (group, title) in enumerate(TITLES.items()):
        lines += group_lines(index, title, dots(results[group]["rows"]))
    lines.append(
        f'<text x="10" y="{bottom + 44}" class="note">{escape(about["gpu"])}, torch {escape(about["torch"])}, '
        f"{about['date'][:10]}, commit {commits}</text>"
    )
    lines.append(
        f'<text x="10" y="{bottom + 60}" class="note">peers: FlashAttention-3, SDPA (cuDNN, flash) · '
        "torch.compile, torch eager · sort and argmax of torch · transformers unpatched</text>"
    )
    return "\n".join([*lines, "</svg>"]) + "\n"
