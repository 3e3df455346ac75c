"""``python docs/generate.py`` writes what the docs say of the code from the code itself.

A page for each op from its docstring (docs/ops/), and the README's tables of what is served and of what is promised.
tests/test_docs.py holds all of it true.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))

from promises import PROMISES  # noqa: E402
from served import support_tables  # noqa: E402

import gqa_kernels  # noqa: E402
from gqa_kernels.explain import OPS  # noqa: E402

README, PAGES = ROOT / "README.md", ROOT / "docs" / "ops"
NOTE = "<!-- written by python docs/generate.py from the docstring in {} -->"
#: Ops that share the files of another name.
FILES = {
    "add_rmsnorm": "rmsnorm",
    "rope_": "rope",
    "gqa_attention_decode": "gqa_attention",
    "gqa_attention_prefill": "gqa_attention",
}
SECTIONS = ("Args", "Returns", "Raises")
EQUIVALENT = "PyTorch equivalent: "


def markdown(text: str) -> str:
    """reStructuredText's code and cross-references as Markdown's."""
    text = re.sub(r":func:`(?:gqa_kernels\.)?(\w+)`", lambda m: link(m[1]), text)
    text = re.sub(r":class:`(?:gqa_kernels\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def link(name: str) -> str:
    return f"[`{name}`]({name}.md)" if name in OPS else f"`{name}`"


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sections_of(doc: str) -> list[tuple[str, str]]:
    """(title, body) of a docstring in order; the title is empty for what stands outside of Args, Returns and Raises."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            found.append((line.rstrip(":"), []))
        elif line and not line.startswith(" ") and found[-1][0]:
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return [(title, inspect.cleandoc("\n" + "\n".join(lines))) for title, lines in found if any(lines)]


def items(body: str) -> list[str]:
    """``name: text`` entries of Args and Raises, whose continuation lines are indented, as a list."""
    entries: list[str] = []
    open_name = ""  # names that go on on the next line
    for line in body.splitlines():
        starts = re.match(r"[\w, ]+:( |$)", line)
        if starts and not line.startswith(" "):
            entries.append(open_name + line.strip())
            open_name = ""
        elif re.fullmatch(r"[\w ,]+,", line):
            open_name += line.strip() + " "
        else:
            entries[-1] += " " + line.strip()
    split = (entry.partition(":") for entry in entries)
    return [f"- **{name.strip()}**: {text.strip()}" for name, _, text in split]


def signature(name: str) -> str:
    """One argument a line where one line is too short, without types: the text says them."""
    parameters = inspect.signature(getattr(gqa_kernels, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = str(inspect.Signature(bare))
    if len(text) > 100:
        text = "(\n    " + ",\n    ".join(text[1:-1].split(", ")) + ",\n)"
        text = re.sub(r"\(-1,\n\s+-1\)", "(-1, -1)", text)
    return f"gqa_kernels.{name}{text}"


def is_of_another(stem: str, op: str) -> bool:
    """Whether a file that the patterns find is named after another op: swiglu_ffn's among swiglu's."""
    others = (name for name in OPS if name not in (op, FILES.get(op)))
    return any(name in stem and (name.startswith(op) or op not in stem) for name in others)


def files_of(op: str) -> list[str]:
    """The op's files, room by room."""
    stem = FILES.get(op, op)
    lines = []
    for room, patterns in {
        "checks and params": [f"csrc/ops/{op}.cpp", f"csrc/ops/{stem}.cpp"],
        "CPU twin": [f"csrc/cpu/{op}.cpp", f"csrc/cpu/{stem}.cpp"],
        "choice of kernel": [f"csrc/plan/{stem}*.cpp"],
        "CUDA": [f"csrc/cuda/{stem}.cu", f"csrc/cuda/{stem}_*sm90.cu", f"csrc/cuda/{op}_sm90"],
        "tests": [f"tests/test_{op}*.py", f"tests/test_{stem}.py"],
    }.items():
        paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
        paths = [path for path in paths if not is_of_another(path.stem.removeprefix("test_"), op)]
        if paths:
            links = (f"[{path.relative_to(ROOT)}](../../{path.relative_to(ROOT)})" for path in paths)
            lines.append(f"- {room}: {', '.join(links)}")
    return lines


def page(op: str) -> str:
    function = getattr(gqa_kernels, op)
    source = Path(inspect.getfile(function)).resolve()
    lines = [f"# {op}", "", NOTE.format(f"gqa_kernels/{source.name}"), "", "```python", signature(op), "```", ""]
    for title, body in sections_of(inspect.getdoc(function) or ""):
        if title:
            lines += [f"## {title}", ""]
        if title in ("Args", "Raises"):
            lines += [*items(markdown(body)), ""]
            continue
        for text in paragraphs(markdown(body)):
            if text.startswith(EQUIVALENT):
                lines += [f"## {EQUIVALENT[:-2]}", ""]
            elif not title and f"## {SECTIONS[0]}" in lines and lines[-2].startswith("- "):
                lines += ["## Notes", ""]
            lines += [text.removeprefix(EQUIVALENT), ""]
    c_name = op.removeprefix("gqa_").rstrip("_")
    lines += ["## In this repository", "", *files_of(op)]
    lines.append(
        f"- C: `gqa_{c_name}_params`, `gqa_{c_name}_cuda`, `gqa_{c_name}_cpu`, `gqa_{c_name}_rows`, "
        f"`gqa_{c_name}_plan` in [gqa_kernels.h](../../csrc/include/gqa_kernels.h)"
    )
    return "\n".join(lines) + "\n"


def index() -> str:
    lines = ["# The ops", "", "<!-- written by python docs/generate.py -->", ""]
    for op in OPS:
        first = paragraphs(markdown(inspect.getdoc(getattr(gqa_kernels, op)) or ""))[0]
        lines.append(f"- [`{op}`]({op}.md): {first}")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    return {PAGES / f"{op}.md": page(op) for op in OPS} | {PAGES / "README.md": index()}


def promise_table() -> str:
    """Each promise, and the files whose tests hold it."""
    lines = ["| | promise | tests |", "|---|---|---|"]
    for number, (promise, files) in PROMISES.items():
        for name in files:
            if not re.search(rf"^def test_(\w+_)?p{number}_", (ROOT / f"tests/test_{name}.py").read_text(), re.M):
                raise SystemExit(f"tests/test_{name}.py has no test of promise P{number}: {promise}")
        links = (f"[{name}](tests/test_{name}.py)" for name in files)
        lines.append(f"| P{number} | {promise} | {', '.join(links)} |")
    return "\n".join(lines)


def replaced(text: str) -> str:
    """The README with its generated parts written anew."""
    for name, part in {"support": support_tables(), "promises": promise_table()}.items():
        begin, end = f"<!-- {name}: python docs/generate.py -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"README.md must hold {begin.strip()} and {end.strip()}")
        text = before + begin + "\n" + part + "\n" + end + after
    return text


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
    README.write_text(replaced(README.read_text()))


if __name__ == "__main__":
    main()
