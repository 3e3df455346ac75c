"""What the documents say of the code is what the code says, and what they show runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402

from benchmarks import picture  # noqa: E402
from gqa_kernels.explain import OPS  # noqa: E402

README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
STALE = "run python docs/generate.py"


@pytest.mark.parametrize("path", sorted(generate.pages()), ids=lambda path: path.name)
def test_op_pages_are_current(path: Path) -> None:
    assert path.read_text() == generate.pages()[path], STALE


def test_every_op_has_a_page_and_no_page_is_left_over() -> None:
    assert {path.stem for path in (ROOT / "docs/ops").glob("*.md")} == {*OPS, "README"}


def test_pages_say_all_that_docstrings_say() -> None:
    """Each argument of an op has its entry, and each page names the op's files and PyTorch equivalent."""
    for op in OPS:
        page = (ROOT / f"docs/ops/{op}.md").read_text()
        entries = {name for line in re.findall(r"^- \*\*(.*?)\*\*:", page, re.M) for name in line.split(", ")}
        names = re.findall(r"(\w+)(?==|,|\)|\n)", re.sub(r"=\([^)]*\)", "", generate.signature(op).partition("(")[2]))
        wanted = {name for name in names if name not in ("None", "True", "False", "weights", "named")}
        wanted = {name for name in wanted if not name[0].isdigit()}
        assert wanted <= entries, (op, wanted - entries)
        for part in ("## PyTorch equivalent", "csrc/ops/", "csrc/cpu/", "csrc/plan/", "csrc/cuda/", "tests/test_"):
            assert part in page, (op, part)


def test_c_names_are_those_of_the_header() -> None:
    header = (ROOT / "csrc/include/gqa_kernels.h").read_text()
    declared = {f"gqa_{op}_{end}" for op in re.findall(r"GQA_DECLARE_OP\((\w+), ", header) for end in
                ("cuda", "cpu", "rows", "plan")}  # fmt: skip
    for op in OPS:
        line = next(text for text in generate.page(op).splitlines() if text.startswith("- C: "))
        params, *functions = re.findall(r"`(gqa_\w+)`", line)
        assert set(functions) <= declared and re.search(rf"\b{params};", header), (op, functions, params)


def test_readme_tables_are_current() -> None:
    assert generate.replaced(README.read_text()) == README.read_text(), STALE


def test_picture_is_current() -> None:
    assert picture.PICTURE.read_text() == picture.render(), "run python -m benchmarks.readme"
    ElementTree.fromstring(picture.render())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if target.startswith("#"):
            assert target[1:] in titles, target
        elif "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_readme_examples_run() -> None:
    """Each Python block by itself, in the repository's root."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    program = "\n".join(f"exec({block!r}, {{}})" for block in blocks)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert "modules replaced" in output and "85" in output and "gqa_attention_prefill on cuda: " in output


def test_readme_commands_are_those_that_are_checked() -> None:
    """The first line that holds each marker is the whole command."""
    lines = README.read_text().splitlines()
    for marker, command in {
        'pip install ".[hf]"': 'pip install ".[hf]" && python examples/generate.py',
        'pip install ".[test]"': 'pip install ".[test]" && pytest -n auto --maxprocesses 8',
    }.items():
        assert next(line for line in lines if marker in line) == command
        assert marker in (ROOT / ".ci/run").read_text()
