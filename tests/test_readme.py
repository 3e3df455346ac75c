"""The README's and docs/decode.md's numbers are those of the last run that the repository keeps."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import readme  # noqa: E402


def test_numbers_come_from_the_results() -> None:
    for path, rendered in readme.pages():
        text = path.read_text()
        assert readme.BEGIN in text and readme.END in text
        assert readme.replaced(text, rendered) == text, path


def test_every_op_is_listed() -> None:
    from gqa_kernels.explain import OPS

    text = (ROOT / "README.md").read_text()
    assert all(f"`{op}`" in text for op in OPS)
