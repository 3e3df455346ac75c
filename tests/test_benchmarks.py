"""python -m benchmarks: a quick run on the CPU, and what checks and reports rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import shapes
from benchmarks.__main__ import CASES, parse
from benchmarks.case import OURS, Case, Contestant, measure
from benchmarks.check import assert_close, attention_rows, some_rows
from benchmarks.report import Goal, Row, table
from benchmarks.timing import Settings

ROOT = Path(__file__).parent.parent
CPU = Settings("cpu", seconds=0.001)


def test_quick_run_writes_table_and_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    for group in (*CASES, "model"):
        found = json.loads((tmp_path / f"cpu-{group}-quick.json").read_text())
        assert found["torch"] == torch.__version__ and "--quick" in found["command"] and found["date"]
        ours = [row for row in found["rows"] if row["impl"] == OURS]
        assert ours and all(row["call_us"] > 0 for row in ours)
        assert all(row["vs_best_peer"] > 0 for row in ours if row["op"] != "rope_")  # which has no peer on the CPU
        assert all(f"{row['op']} {row['shape']}" in done.stdout for row in ours)
    assert "vs best peer" in done.stdout


def case(call: object, peer: object = None) -> Case:
    return Case(
        group="ops",
        op="double",
        shape="100",
        make=lambda: {"x": torch.randn(100)},
        contestants=[Contestant(OURS, call), Contestant("peer", peer or (lambda x: x["x"] * 2))],
        check=lambda x, out: assert_close(out, [x["x"] * 2]),
        limit="copy",
        traffic=800,
    )


def test_a_wrong_result_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="double 100: gqa_kernels is wrong: relative error"):
        measure(case(lambda x: x["x"] * 2.001), CPU)
    with pytest.raises(AssertionError, match="double 100: peer is wrong: shape"):
        measure(case(lambda x: x["x"] * 2, lambda x: x["x"][:5]), CPU)


def test_a_peer_may_refuse_but_ours_may_not() -> None:
    def refuse(x: object) -> None:
        raise RuntimeError("no kernel\nand a trace")

    refused = case(lambda x: x["x"] * 2, refuse)
    rows = measure(refused, CPU)
    assert [row.impl for row in rows] == [OURS] and rows[0].vs_best_peer is None
    assert refused.skipped == {"peer": "no kernel"}
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(case(refuse), CPU)


def test_in_place_ops_are_checked_on_a_copy() -> None:
    rows = measure(case(lambda x: x["x"].mul_(2)), CPU)
    assert [row.impl for row in rows] == [OURS, "peer"] and rows[0].vs_best_peer > 0


def test_attention_reference_against_sdpa() -> None:
    for causal in (False, True):
        q, k, v = (torch.randn(2, n, heads, 32) for n, heads in ((300, 6), (300, 2), (300, 2)))
        rows = some_rows(300, "cpu")
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)
        assert_close(attention_rows(q, k, v, rows, causal), [expected[:, rows].float()])


def test_attention_reference_with_options() -> None:
    """Window, softcap and sinks against one row computed by hand."""
    q, k, v, sinks = torch.randn(1, 3, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(4)
    out = attention_rows(q, k, v, torch.tensor([1]), True, window=2, softcap=1.5, sinks=sinks)
    for head in range(4):
        seen = slice(5, 8)  # the row is at position 7
        scores = 1.5 * torch.tanh(k[0, seen, head // 2] @ q[0, 1, head] / 8**0.5 / 1.5)
        weights = torch.cat([scores, sinks[head, None]]).softmax(0)[:-1]
        assert_close(out[0, 0, head], [weights @ v[0, seen, head // 2]])


def test_other_work_is_compared_by_its_rate() -> None:
    case_ = case(lambda x: x["x"] * 2)
    case_.flops = 100.0
    twice = Contestant("twice", lambda x: x["x"] * 3, flops=200.0, check=lambda x, out: assert_close(out, [x["x"] * 3]))
    case_.contestants.append(twice)
    rows = measure(case_, CPU)
    assert rows[-1].impl == "twice" and rows[-1].limit_us is None
    assert rows[-1].tflops == pytest.approx(200e-6 / rows[-1].us)


def test_rows_are_checked_at_both_ends() -> None:
    rows = some_rows(5000, "cpu")
    assert rows[0] == 0 and rows[-1] == 4999 and len(rows.unique()) == len(rows)
    assert torch.equal(some_rows(7, "cpu"), torch.arange(7))


def test_shapes_are_named_apart() -> None:
    assert len({shape.decode_name for shape in shapes.DECODE}) == len(shapes.DECODE)
    assert len({shape.prefill_name for shape in shapes.PREFILL}) == len(shapes.PREFILL)
    names = {shape.decode_name for shape in shapes.DECODE}
    assert {"32:8 D128 B1 S128k", "14:2 D64 B64 S4k", "64:8 D128 B3 lengths 5/777/20000"} <= names


def test_goals() -> None:
    ours = Row("g", "op", "s", OURS, kernel_us=10.0, limit_us=5.0, share=0.5, bytes_per_s=1e12)
    peer = Row("g", "op", "s", "peer", kernel_us=5.0)
    assert Goal(share=1 / 3).verdict([ours, peer]).endswith("2.00 x the floor, at most 3.0 x: met")
    assert Goal(rate=2e12).verdict([ours]).endswith("1.00 TB/s, at least 2.0: MISSED")
    assert Goal(peer=("peer", 0.25)).verdict([ours, peer]).endswith("0.50 x peer, at least 0.25 x: met")
    assert Goal(at_most=("peer", 1.1)).verdict([ours, peer]).endswith("peer takes 0.50 x the time, at most 1.10 x: met")
    assert Goal(at_most=("peer", 0.4)).verdict([ours, peer]).endswith("MISSED")
    assert Goal(peer=("other", 0.25)).verdict([ours, peer]).endswith("other did not run")
    ours.tflops, peer.tflops = 80.0, 100.0
    met = Goal(rate_of=("peer", 0.8)).verdict([ours, peer])
    assert met.endswith("0.800 x the rate of peer, at least 0.800 x: met")
    assert Goal(rate_of=("peer", 0.81)).verdict([ours, peer]).endswith("MISSED")


def test_table_lines_up() -> None:
    rows = [
        Row("g", "op", "s", OURS, call_us=12345.0, share=0.5, limit="read"),
        Row("g", "op", "s", "peer", call_us=1.5),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split()[:2] == ["shape", "by"] and "12345" in lines[2] and "50% of read" in lines[2]
    assert not lines[3].startswith("op") and "1.5" in lines[3]


def test_unknown_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["decode", "backward"])
    assert "no group backward" in capsys.readouterr().err
