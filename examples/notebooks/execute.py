"""Runs notebooks in this process and writes their outputs into them: ``python examples/notebooks/execute.py``.

Needs no Jupyter, so it runs wherever the package does, on a machine with a GPU too. Each cell's text and figures are
kept; a cell that raises ends the run with its traceback and leaves the file as it was.

    python examples/notebooks/execute.py                                     all of them, in place
    python examples/notebooks/execute.py --out DIR 02_patch_a_model.ipynb    one of them, written to DIR
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run_cell(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs of one cell, in the notebook format's words."""
    import matplotlib.pyplot as plt

    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {number}>", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines_of(printed.getvalue())})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": lines_of(repr(value))}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    for figure in map(plt.figure, plt.get_fignums()):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=80, bbox_inches="tight")
        data = {
            "image/png": base64.b64encode(png.getvalue()).decode(),
            "text/plain": [f"<Figure with {len(figure.axes)} axes>"],
        }
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def execute(notebook: dict[str, Any]) -> None:
    """Runs all cells in order, in the notebooks' folder, and replaces their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["outputs"] = run_cell("".join(cell["source"]), namespace, number)
            cell["execution_count"] = number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="names in this folder (default: all)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: in place)")
    options = parser.parse_args(argv)
    os.environ["MPLBACKEND"] = "Agg"
    out = (options.out or FOLDER).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(FOLDER)
    for name in options.notebooks or sorted(path.name for path in FOLDER.glob("*.ipynb")):
        notebook, start = json.loads((FOLDER / name).read_text()), time.perf_counter()
        execute(notebook)
        (out / name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
