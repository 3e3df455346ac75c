"""The notebooks of examples/: each runs on the CPU, to the end, and says what the committed one does."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

import gqa_kernels

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parent.parent / "examples/notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
FIGURES = {
    "01_quickstart.ipynb": 1,
    "02_patch_a_model.ipynb": 0,
    "03_write_an_engine.ipynb": 0,
    "04_benchmarks.ipynb": 5,
}
#: What each prints, whatever the machine.
SAYS = {
    "01_quickstart.ipynb": [
        r"largest error: gqa_kernels [\d.e-]+, SDPA [\d.e-]+, plain PyTorch [\d.e-]+",
        r"prefill and ten decode steps: largest error [\d.e-]+",
        r"gqa_attention_decode on cuda: \w+",
    ],
    "02_patch_a_model.ipynb": [
        r"LlamaForCausalLM: \d\d modules replaced, 0 left alone",
        r"calls sent back to transformers: none",
        r"unpatched +[\d.]+ tokens/s\npatched +[\d.]+ tokens/s",
    ],
    "03_write_an_engine.ipynb": [
        r"8\+123=131",
        r"decode step replayed from a CUDA graph|no GPU here: steps ran eagerly",
    ],
    "04_benchmarks.ipynb": [r"NVIDIA H200, driver [\d.]+, torch 2", r"faster than every peer in \d+ of \d+ shapes"],
}


def committed(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def text_of(cell: Any) -> str:
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")


def figures_of(notebook: Any) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def assert_says(name: str, notebook: Any) -> None:
    text = "\n".join(text_of(cell) for cell in notebook.cells)
    for wanted in SAYS[name]:
        assert re.search(wanted, text), f"{wanted} is not in:\n{text}"
    assert figures_of(notebook) == FIGURES[name]


def test_all_are_known() -> None:
    assert sorted(SAYS) == sorted(FIGURES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_with_outputs(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert_says(name, notebook)


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_cpu(name: str) -> None:
    """Cells tagged same-output print the same on every machine."""
    before, notebook = committed(name), committed(name)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    package = str(Path(gqa_kernels.__file__).parents[1])
    client.execute(env=os.environ | {"PYTHONPATH": package, "CUDA_VISIBLE_DEVICES": ""})
    assert_says(name, notebook)
    for cell, known in zip(notebook.cells, before.cells, strict=True):
        if "same-output" in cell.metadata.get("tags", []):
            assert text_of(cell) == text_of(known) != "", cell.source


def test_the_engine_is_short() -> None:
    """The model and the engine, without imports: about 60 lines."""
    sources = [cell.source for cell in committed("03_write_an_engine.ipynb").cells if cell.cell_type == "code"]
    engine = "\n".join(source for source in sources if re.search(r"^(class Engine|def hidden_states)", source, re.M))
    ast.parse(engine)
    assert len([line for line in engine.splitlines() if line.strip()]) <= 72
