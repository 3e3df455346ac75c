"""Markdown tables of a run's JSON: ours beside the limit and every peer, and times judged by others of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.decode import ABOVE_FLOOR, RAGGED_ABOVE_FLOOR
from benchmarks.published import FLASHINFER, SOURCE, TIMES
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


def ops(rows: Rows) -> list[str]:
    """The memory-bound ops beside a copy, their peers and another run's; then calls judged by others of this run."""
    found = list(_plain(rows))
    peers = list(dict.fromkeys(peer for _, times in found for peer in times))
    heads = [OURS, "goal", "copy", "of it", *peers, FLASHINFER]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for mine, times in found:
        name = f"{mine['op']} {mine['shape']}"
        share = "" if mine["share"] is None else f"{mine['share']:.2f}"
        others = (number(us) for us in (*(times.get(peer) for peer in peers), TIMES.get(name)))
        cells = [number(mine["kernel_us"]), number(mine.get("goal_us")), number(mine["limit_us"]), share, *others]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    judged = {(row["op"], row["shape"], row["impl"]): row["kernel_us"] for row in rows}
    beside = [row for row in rows if row.get("beside") and row["aim_us"] is not None]
    lines += ["", SOURCE]
    lines += ["", "| | us | beside | us | at most |", "|---|---|---|---|---|"] if beside else []
    for row in beside:
        other = number(judged[row["op"], row["shape"], row["beside"]])
        name = row["beside"].removeprefix(OURS).strip(" ()")
        cells = [
            number(row["kernel_us"]),
            name,
            other,
            number(row["aim_us"]),
            _verdict(row["kernel_us"], row["aim_us"]),
        ]
        lines.append(f"| {row['op']} {row['shape']} | {' | '.join(cells[:3])} | {cells[3]} {cells[4]} |")
    return lines


def _verdict(us: float, most: float | None) -> str:
    return "" if most is None else "met" if us <= most else f"+{us - most:.2f}"


def _ratio(row: dict[str, Any] | None, base: float | None, most: float | None = None) -> str:
    """Bold where it is more than it should be."""
    if row is None or base is None:
        return ""
    us, bound = _us(row), most if most is not None else row.get("aim_us")
    text = f"{us - base:+.2f}" if "append" in row["impl"] else f"{us / base:.2f}"
    return f"**{text}**" if bound is not None and us > bound else text


def _us(row: dict[str, Any]) -> float:
    us: float = row["kernel_us"] or row["call_us"]
    return us


def _named(rows: Rows, mine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All rows of a shape by what is in the brackets behind our name, or by the peer's."""
    same = (row for row in rows if (row["op"], row["shape"]) == (mine["op"], mine["shape"]))
    return {_way(row["impl"]): row for row in same}


def _way(impl: str) -> str:
    return impl[len(OURS) + 2 : -1] if impl.startswith(OURS + " (") else impl.removeprefix(OURS)


def decode_aims(rows: Rows) -> list[str]:
    """The plain calls: where they should be by the floor and the peers of the run, and what was set in advance."""
    lines = [
        "| shape | floor | ours | SDPA flash | SDPA cuDNN | aim | | goal | | captured at 1 | portable / flash |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mine, times in _plain(rows):
        if not mine["op"].startswith("gqa_attention") or "cache" in mine["shape"]:
            continue
        us, floor, goal = mine["kernel_us"], mine["limit_us"], DECODE_GOALS.get(mine["shape"])
        above = RAGGED_ABOVE_FLOOR if "lengths" in mine["shape"] else ABOVE_FLOOR
        aim = min(bound for bound in (above.us(floor), *times.values()) if bound is not None)
        peers, named = (number(times.get(peer)) for peer in ("SDPA flash", "SDPA cuDNN")), _named(rows, mine)
        cells = [number(floor), number(us), *peers, number(aim), _verdict(us, aim), number(goal), _verdict(us, goal)]
        flash = times.get("SDPA flash")
        cells += [_ratio(named.get("captured at 1"), us, 1.1 * us), _ratio(named.get("portable kernel"), flash, flash)]
        lines.append(f"| {mine['shape']} | {' | '.join(cells)} |")
    return lines


def decode_ways(rows: Rows) -> list[str]:
    """The other ways to run a call, each over the plain one."""
    found = [(mine, _named(rows, mine)) for mine, _ in _plain(rows)]
    found = [(mine, named) for mine, named in found if "append" in named]
    if not found:
        return []
    ways = [name for name, row in found[0][1].items() if row.get("beside") == OURS and name != "captured at 1"]
    lines = [f"| shape | plain us | {' | '.join(ways)} |", "|---" * (2 + len(ways)) + "|"]
    for mine, named in found:
        cells = [_ratio(named.get(way), mine["kernel_us"]) for way in ways]
        lines.append(f"| {mine['shape']} | {number(mine['kernel_us'])} | {' | '.join(cells)} |")
    return lines


def decode_quantised(rows: Rows) -> list[str]:
    lines = ["| shape | bfloat16 us | float8_e4m3fn | int8 |", "|---|---|---|---|"]
    for mine, _ in _plain(rows):
        named = _named(rows, mine)
        if (plain := named.get("bfloat16 cache")) is not None:
            cells = [number(_us(plain)), _ratio(mine, _us(plain)), _ratio(named.get("int8 cache"), _us(plain))]
            lines.append(f"| {mine['shape'].removesuffix(' float8_e4m3fn cache')} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def decode_others(rows: Rows) -> list[str]:
    """What surrounds the kernel, judged by another time of its shape: chains of launches, the host's time."""
    lines = ["| | us | beside | us |", "|---|---|---|---|"]
    for row in rows:
        if row.get("beside") is None or row["op"].startswith("gqa_attention"):
            continue
        other, us = _named(rows, row)[_way(row["beside"])], _us(row)
        text = number(us) if us <= (row["aim_us"] or us) else f"**{number(us)}**"
        lines.append(f"| {row['op']}, {row['shape']} | {text} | {_way(row['beside'])} | {number(_us(other))} |")
    return lines if len(lines) > 2 else []
