"""The tables of docs/generation.md, from the last run of ``python -m benchmarks model --compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.model import COMPILED, EAGER, FLOOR, HF_GENERATE, PROMPT_ALONE, SHORT_PROMPT
from benchmarks.shapes import MODELS, Model

Times = dict[tuple[str, str, str], float]  # ms of (op, shape, by)
PATCHED = "gqa_kernels"
COLUMNS = {EAGER: "eager", COMPILED: "compile", PATCHED: "model.generate, patched", HF_GENERATE: "hf.generate"}

#: What the project set out for, ms: a prompt of 10 tokens, and each further token.
AIMS: dict[str, tuple[float | None, float]] = {
    "Qwen2.5-0.5B shape": (173.0, 97.0),
    "Phi-3-mini shape": (230.0, 145.0),
    "Llama-3.1-8B shape": (None, 10.0),
}


def times(rows: Sequence[dict[str, Any]]) -> Times:
    return {(row["op"], row["shape"], row["impl"]): row["call_us"] / 1e3 for row in rows}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line("", cells), "|---" * (len(cells) + 1) + "|"]


def steps(found: Times, op: str) -> list[str]:
    """Every way to generate side by side; for further tokens the floor too."""
    shapes = {model.name: f"{model.name} at {model.prompt}" for model in MODELS}
    columns = COLUMNS | {FLOOR: "floor"}
    if op == "prefill":
        shapes = {model.name: f"{model.name}, {model.prompt} tokens" for model in MODELS}
        columns = COLUMNS
    used = [by for by in columns if any((op, shape, by) in found for shape in shapes.values())]
    lines = _head([columns[by] for by in used])
    return lines + [_line(n, [_ms(found.get((op, shape, by))) for by in used]) for n, shape in shapes.items()]


def first_tokens(found: Times) -> list[str]:
    """A warm call's first token beside what the device takes for the prompt and for a step."""
    lines = _head(["first token", "prompt alone", "a step", "of 1.1 x prompt + step"])
    for model in MODELS:
        shape = f"{model.name}, {model.prompt} tokens"
        first, prompt = (found.get(("prefill", shape, by)) for by in (HF_GENERATE, PROMPT_ALONE))
        step = found.get(("decode", f"{model.name} at {model.prompt}", HF_GENERATE))
        if first is not None and prompt is not None and step is not None:
            lines.append(
                _line(model.name, [_ms(first), _ms(prompt), _ms(step), f"{first / (1.1 * prompt + step):.2f}"])
            )
    return lines if len(lines) > 2 else []


def aims(found: Times) -> list[str]:
    lines = _head([f"{SHORT_PROMPT} tokens in, ms", "set out for", "a token, ms", "set out for"])
    for model in MODELS:
        first, each = (found.get((op, shape, HF_GENERATE)) for op, shape in _short(model))
        if model.name in AIMS and first is not None and each is not None:
            wanted, further = AIMS[model.name]
            asked = "" if wanted is None else f"{wanted:g}"
            lines.append(_line(model.name, [_ms(first), asked, _ms(each), f"{further:g}"]))
    return lines if len(lines) > 2 else []


def _short(model: Model) -> list[tuple[str, str]]:
    return [("prefill", f"{model.name}, {SHORT_PROMPT} tokens"), ("decode", f"{model.name} at {SHORT_PROMPT}")]


def render(result: dict[str, Any]) -> str:
    """What stands between the markers."""
    found = times(result["rows"])
    about = f"{result['gpu']}, torch {result['torch']}, driver {result['driver']}, commit {result['commit'][:10]}"
    command = result["command"].partition(" --commit")[0]
    floor = "; the floor is every weight, key and value read once" * any(by == FLOOR for *_, by in found)
    parts = [
        [f"`{command}` on one {about}:", "bfloat16, random weights, batch 1 unless said."],
        [f"Milliseconds a token after 2048{floor}; eager and compile are transformers' own:"],
        steps(found, "decode"),
        ["Milliseconds to the first token after 2048:"],
        steps(found, "prefill"),
    ]
    if first_tokens(found):
        parts += [["A second call's first token, beside the prompt's forward on the device and a step, in ms:"]]
        parts += [first_tokens(found)]
    if aims(found):
        parts += [["What the project set out for, and `hf.generate`:"], aims(found)]
    return "\n" + "\n\n".join("\n".join(part) for part in parts) + "\n\n"
