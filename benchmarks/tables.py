"""Markdown tables of a run's JSON: ours beside the limit and every peer, and times judged by others of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.decode import ABOVE_FLOOR, RAGGED_ABOVE_FLOOR
from benchmarks.shapes import DECODE_GOALS

Rows = list[dict[str, Any]]
OURS = "gqa_kernels"


def number(us: float | None) -> str:
    return "" if us is None else f"{us:.4g}"


def _plain(rows: Rows) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Each shape's row of ours with the peers' times, without the other ways to run the same call."""
    for mine in rows:
        if mine["impl"] == OURS and mine["kernel_us"] is not None:
            same = (row for row in rows if (row["op"], row["shape"]) == (mine["op"], mine["shape"]))
            yield mine, {row["impl"]: row["kernel_us"] for row in same if not row["impl"].startswith(OURS)}


def side_by_side(rows: Rows) -> list[str]:
    found = list(_plain(rows))
    peers = list(dict.fromkeys(peer for _, times in found for peer in times))
    head = " | ".join([f"{OURS} us", "limit us", *(f"{peer} us" for peer in peers)])
    lines = [f"| | {head} |", "|---" * (3 + len(peers)) + "|"]
    for mine, times in found:
        name = mine["shape"] if mine["op"].startswith("gqa_attention") else f"{mine['op']} {mine['shape']}"
        cells = [number(us) for us in (mine["kernel_us"], mine["limit_us"], *(times.get(peer) for peer in peers))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _verdict(us: float, most: float | None) -> str:
    return "" if most is None else "met" if us <= most else f"+{us - most:.2f}"


def decode_aims(rows: Rows) -> list[str]:
    """The plain calls: where they should be by the floor and the peers of the run, and what was set in advance."""
    lines = [
        "| shape | floor | ours | SDPA flash | SDPA cuDNN | aim | | goal | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mine, times in _plain(rows):
        if not mine["op"].startswith("gqa_attention") or "cache" in mine["shape"]:
            continue
        us, floor, goal = mine["kernel_us"], mine["limit_us"], DECODE_GOALS.get(mine["shape"])
        above = RAGGED_ABOVE_FLOOR if "lengths" in mine["shape"] else ABOVE_FLOOR
        aim = min(bound for bound in (above.us(floor), *times.values()) if bound is not None)
        peers = (number(times.get(peer)) for peer in ("SDPA flash", "SDPA cuDNN"))
        cells = [number(floor), number(us), *peers, number(aim), _verdict(us, aim), number(goal), _verdict(us, goal)]
        lines.append(f"| {mine['shape']} | {' | '.join(cells)} |")
    return lines


def ratios(rows: Rows) -> list[str]:
    """One row for each shape and yardstick: what each way to run the call takes of the yardstick's time."""
    lines = ["| shape | beside, us | times that, and at most |", "|---|---|---|"]
    judged: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.get("beside") is None:
            continue
        times = {(o["op"], o["shape"], o["impl"]): o["kernel_us"] or o["call_us"] for o in rows}
        base, us = times[row["op"], row["shape"], row["beside"]], row["kernel_us"] or row["call_us"]
        name = row["impl"].removeprefix(OURS).strip(" ()") or "plain"
        most = f" ({row['aim_us'] / base:.2f})" if row["aim_us"] is not None else ""
        op = "" if row["op"].startswith("gqa_attention") else f"{row['op']} "
        key = op + row["shape"], row["beside"].removeprefix(OURS).strip(" ()") or "plain", number(base)
        judged.setdefault(key, []).append(f"{name} {us / base:.2f}{most}")
    lines += [f"| {shape} | {beside}, {base} | {'; '.join(cells)} |" for (shape, beside, base), cells in judged.items()]
    return lines if judged else []
