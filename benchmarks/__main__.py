"""``python -m benchmarks [decode|prefill|ops|sample|model ...] [--shapes TEXT] [--out DIR] [--device D] [--quick]
[--seconds S] [--commit SHA] [--compile [PATTERN]]``"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import decode, ops, peers, prefill, sample
from benchmarks.case import Case, measure
from benchmarks.limits import reader_name
from benchmarks.report import Row, aims_table, circumstances, file_stem, ratios_table, table, write_json, write_plot
from benchmarks.timing import Settings

CASES: dict[str, Callable[[Settings, bool], Iterator[Case]]] = {
    "decode": decode.cases,
    "prefill": prefill.cases,
    "ops": ops.cases,
    "sample": sample.cases,
}
GROUPS = [*CASES, "model"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measures the ops against limits and peers.")
    parser.add_argument("groups", nargs="*", metavar="group", help=f"any of {', '.join(GROUPS)}; all by default")
    parser.add_argument(
        "--shapes", default="", metavar="TEXT", help="only cases whose op and shape contain TEXT, or one of TEXT,TEXT"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.0, help="for each measurement; 0.1 on CUDA, 0.02 on a CPU")
    parser.add_argument("--quick", action="store_true", help="a few cases: on CUDA those with a promised floor")
    parser.add_argument("--commit", metavar="SHA", help="what to record as the commit, for a tree without git")
    compiled = "model: also transformers' compiled steps, of models in whose name PATTERN is found; half a minute each"
    parser.add_argument("--compile", nargs="?", const="", metavar="PATTERN", help=compiled)
    options = parser.parse_args(argv)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no GPU")
    options.groups = options.groups or GROUPS
    return options


def run_group(
    group: str, settings: Settings, options: argparse.Namespace
) -> tuple[list[Row], dict[str, dict[str, str]], list[str]]:
    """Rows, the peers that refused (with their words), and the verdicts on promised floors."""
    rows: list[Row] = []
    skipped: dict[str, dict[str, str]] = {}
    verdicts: list[str] = []
    if group == "model":
        from benchmarks import model  # transformers take seconds to import

        models = [m for m in model.wanted(settings, options.quick) if options.shapes in m.name]
        try:
            for wanted in tqdm(models, desc=group, disable=None):
                compiled = options.compile is not None and re.search(options.compile, wanted.name) is not None
                rows += model.measure(wanted, settings, compiled)
        except KeyboardInterrupt:  # as below
            print(f"interrupted after {len(rows)} rows")
        return rows, skipped, verdicts
    wanted_names = options.shapes.split(",")
    cases = [case for case in CASES[group](settings, options.quick) if any(name in case.name for name in wanted_names)]
    progress = tqdm(cases, desc=group, disable=None)
    try:
        for case in progress:
            progress.set_postfix_str(case.name)
            measured = measure(case, settings)
            rows += measured
            if case.skipped:
                skipped[case.name] = case.skipped
            verdicts += [goal.verdict(measured) for goal in case.goals]
            if settings.cuda:
                torch.cuda.empty_cache()
    except KeyboardInterrupt:  # a long run, of which the cases before are worth keeping
        print(f"interrupted after {len(rows)} rows")
    return rows, skipped, verdicts


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.manual_seed(0)
    settings = Settings(options.device, seconds=options.seconds or (0.02 if options.device == "cpu" else 0.1))
    about = circumstances(options.device, reader_name(settings), options.commit) | {"peers": peers.available()}
    suffix = "quick" if options.quick else "partial" if options.shapes else ""
    for group in options.groups:
        rows, skipped, verdicts = run_group(group, settings, options)
        if not rows:
            continue
        title = f"{group} on {about.get('gpu', 'the CPU')}, torch {about['torch']}"
        print(f"\n{title}\n" + "\n\n".join(filter(None, (table(rows), aims_table(rows), ratios_table(rows)))))
        for case, reasons in skipped.items():
            print(f"{case}: " + "; ".join(f"{peer} refused ({reason})" for peer, reason in reasons.items()))
        for verdict in verdicts:
            print(verdict)
        path = options.out / file_stem(group, options.device, suffix)
        write_json(path.with_suffix(".json"), rows, about, skipped)
        plotted = write_plot(path.with_suffix(".png"), rows, title)
        print(
            f"written: {path}.json" + (f", {path.name}.png" if plotted else " (no plot: matplotlib is not installed)")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
