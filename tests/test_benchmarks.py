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

from benchmarks import decode_ways, ops_chain, prefill_options, shapes, tables
from benchmarks.__main__ import CASES, main, parse
from benchmarks.case import OURS, Case, Contestant, measure
from benchmarks.check import assert_close, attention_rows, some_rows
from benchmarks.decode_launches import chain, host
from benchmarks.report import Aim, Goal, Row, aims_table, ratios_table, table
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


def test_prefill_with_options_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case, with fewer tokens and heads: its own check passes, and its goal has what it compares with."""
    small = {"K": 32, "DEVICE": "cpu", "Q_HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64, "DENSE": 128, "FEW_ROWS": (17, 64)}
    small |= {"PREFIXES": (96,), "CHUNK": 32, "PREFIX": 128, "PAGE": 16, "WINDOW": 40, "LENGTHS": (1, 33, 70)}
    for name, value in small.items():
        monkeypatch.setattr(prefill_options, name, value)
    seen = list(prefill_options.cases())
    for one in seen:
        rows = measure(one, CPU)
        assert not one.skipped, one.skipped
        assert all("did not run" not in goal.verdict(rows) for goal in one.goals)
    assert len({one.name for one in seen}) == len(seen)


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


def test_aims() -> None:
    assert Aim(factor=1.03, plus=1.4).us(10.0) == 11.4 and Aim(factor=1.03, plus=1.4).us(100.0) == 103.0
    assert Aim(factor=0.56).us(100.0) == pytest.approx(56.0) and Aim().us(1.0) is None
    ours = Row("g", "gqa_attention", "s", OURS, kernel_us=10.0, limit_us=5.0, aim_us=8.0, goal_us=11.0)
    peer = Row("g", "gqa_attention", "s", "SDPA flash", kernel_us=8.0)
    paged = Row("g", "gqa_attention", "s", OURS + " (paged)", kernel_us=12.0, beside=OURS, aim_us=11.0)
    rows = [ours, paged, peer]
    line = aims_table(rows).splitlines()[2].split()
    assert line[2:] == ["5", "10", "8", "8", "missed", "by", "2", "11", "met"] and "paged" not in aims_table(rows)
    assert ratios_table(rows).splitlines()[2].endswith("1.200    1.100  missed by 1")
    assert aims_table([peer]) == ratios_table([ours, peer]) == ""
    dicts = [vars(row) for row in rows]
    assert tables.decode_aims(dicts)[2:] == ["| s | 5 | 10 | 8 |  | 6.4 | +3.60 |  |  |  |  |"]
    assert tables.side_by_side(dicts)[2:] == ["| s | 10 | 5 | 8 |"]
    assert tables.decode_ways(dicts) == tables.decode_others(dicts) == tables.decode_quantised(dicts) == []
    append = Row("g", "gqa_attention", "s", OURS + " (append)", kernel_us=10.3, beside=OURS, aim_us=10.4)
    early = Row("g", "gqa_attention", "s", OURS + " (captured at 1)", kernel_us=12.0, beside=OURS, aim_us=11.0)
    portable = Row("g", "gqa_attention", "s", OURS + " (portable kernel)", kernel_us=6.0, beside="SDPA flash")
    dicts = [vars(row) for row in (*rows, append, early, portable)]
    assert tables.decode_ways(dicts) == [
        "| shape | plain us | paged | append |",
        "|---|---|---|---|",
        "| s | 10 | **1.20** | +0.30 |",
    ]
    assert tables.decode_aims(dicts)[2].endswith("| **1.20** | 0.75 |")
    host = Row("g", "host time", "s", OURS, call_us=3.0, beside="x.mul_(1)", aim_us=4.0)
    chain = [host, Row("g", "host time", "s", "x.mul_(1)", call_us=2.0)]
    assert tables.decode_others([vars(row) for row in chain])[2:] == ["| host time, s | 3 | x.mul_(1) | 2 |"]
    eights = [
        Row("g", "gqa_attention", "s float8_e4m3fn cache", OURS, kernel_us=6.0, aim_us=5.6),
        Row("g", "gqa_attention", "s float8_e4m3fn cache", OURS + " (int8 cache)", kernel_us=5.0, aim_us=5.6),
        Row("g", "gqa_attention", "s float8_e4m3fn cache", OURS + " (bfloat16 cache)", kernel_us=10.0),
    ]
    assert tables.decode_quantised([vars(row) for row in eights])[2:] == ["| s | 10 | **0.60** | 0.50 |"]


def test_aims_are_judged_by_the_rows_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.case.limit_us", lambda *_: 100.0)
    monkeypatch.setattr("benchmarks.case.kernel_us", lambda *_: 3.0)
    monkeypatch.setattr("benchmarks.timing.Settings.l2_size", 0)
    judged = case(lambda x: x["x"] * 2)
    other = Contestant(OURS + " (other)", lambda x: x["x"] * 2, aim=Aim(1.5, beside=OURS), host=False)
    lost = Contestant(OURS + " (lost)", lambda x: x["x"] * 2, aim=Aim(1.5, beside="nobody"), host=False)
    judged.contestants = [Contestant(OURS, lambda x: x["x"] * 2, aim=Aim(1.1)), other, lost, judged.contestants[1]]
    rows = measure(judged, Settings("cuda", seconds=0.001))
    assert [row.aim_us for row in rows] == [3.0, 4.5, None, None]  # a peer takes less than the limit allows
    assert [row.beside for row in rows] == [None, OURS, None, None]
    assert rows[0].call_us and rows[1].call_us is None


def test_other_ways_to_decode_are_right_and_checked() -> None:
    shape = shapes.Attention(4, 2, 64, 2, 128)
    torch.manual_seed(0)
    caches = {name: torch.randn(2, 128, 2, 64) for name in ("k", "v")}
    lengths = torch.full((2,), 128, dtype=torch.int32)
    made = decode_ways.inputs(shape, "cpu", torch.float32) | decode_ways.shared_inputs(shape, "cpu")
    x = {**caches, "lengths": lengths, **made}
    found = decode_ways.ways(CPU)
    assert len(found) == 10
    for way in found:
        given = {name: tensor.clone() for name, tensor in x.items()}
        out = way.call(given)
        assert way.check is not None
        way.check(x, out)
        with pytest.raises(AssertionError):
            way.check(x, out * 1.01)
    assert not torch.equal(given["k"], x["k"])  # the last one appends


def test_the_chain_and_the_host_s_calls_are_right() -> None:
    for made in (chain(shapes.Attention(4, 2, 64, 1, 128), CPU), host(shapes.Attention(4, 2, 64, 1, 128), CPU)):
        torch.manual_seed(0)
        x = made.make()
        for contestant in made.contestants:
            (contestant.check or made.check)(x, contestant.call({name: tensor.clone() for name, tensor in x.items()}))


def test_the_chain_of_ops_is_right_and_checked() -> None:
    made = ops_chain.case(shapes.Attention(4, 2, 64, 1, 128), 96, CPU)
    torch.manual_seed(0)
    x = made.make()
    out = made.contestants[0].call(x)
    made.check(x, out)
    for i in range(len(out)):
        with pytest.raises(AssertionError):
            made.check(x, tuple(part * 1.1 if j == i else part for j, part in enumerate(out)))


def test_tables_of_ops() -> None:
    shape = "1 x 4096"
    ours = Row("ops", "rmsnorm", shape, OURS, kernel_us=1.0, limit_us=0.5, share=0.5, goal_us=1.25)
    ours.beside, ours.aim_us = ops_chain.ORDINARY, 1.2
    slower = Row("ops", "rmsnorm", shape, ops_chain.ORDINARY, kernel_us=1.4)
    lines = tables.ops([vars(row) for row in (ours, slower, Row("ops", "rmsnorm", shape, "eager", kernel_us=9.0))])
    assert lines[0] == f"| | {OURS} | goal | copy | of it | eager | FlashInfer 0.7.2 |"
    assert lines[2] == "| rmsnorm 1 x 4096 | 1 | 1.25 | 0.5 | 0.50 | 9 | 1.53 |"
    assert lines[-1] == "| rmsnorm 1 x 4096 | 1 | ordinary launches | 1.4 | 1.2 met |"


def test_long_tails_are_drawn_once() -> None:
    drawn = [shape for shape in shapes.DECODE if len(shape.lengths) > 3]
    assert [shape.decode_name for shape in drawn][:2] == [
        "32:8 D128 B16 lengths to 32k",
        "32:8 D128 B64 lengths to 32k",
    ]
    for shape in drawn:
        assert len(shape.lengths) == shape.batch and max(shape.lengths) == shape.seqlen and min(shape.lengths) < 100
    assert set(shapes.DECODE_GOALS) <= {shape.decode_name for shape in shapes.DECODE}
    assert set(shapes.DECODE_WAYS) <= set(shapes.DECODE)


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(case: Case, settings: Settings) -> list[Row]:
        if measured:
            raise KeyboardInterrupt
        measured.append(case.name)
        return [Row("decode", case.op, case.shape, OURS, call_us=1.0)]

    measured: list[str] = []
    monkeypatch.setattr("benchmarks.__main__.measure", stop)
    assert main(["decode", "--device", "cpu", "--shapes", "S1k,S512", "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "cpu-decode-partial.json").read_text())["rows"]) == 1


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
