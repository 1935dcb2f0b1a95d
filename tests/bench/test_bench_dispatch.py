"""The benchmark of dispatch's choices: its rows, and that a biased clock is seen."""

import argparse
import json

import pytest
import torch
from played import MS, play

from reprune_triton.bench.__main__ import main
from reprune_triton.bench.measure import dispatch as bench_dispatch
from reprune_triton.fused import dispatch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` runs it there")
CASES = [dispatch.Case("conv", "torch.bfloat16", (number,), (16, 32), (0,)) for number in range(4)]


@pytest.fixture
def two_adders(monkeypatch):
    """Cases of which both implementations add two tensors; the runs by name."""
    runs = {name: lambda: [torch.ones(2) + 1] for name in ("torch", "triton")}
    monkeypatch.setattr(bench_dispatch, "met", lambda args, device: {case: lambda: runs for case in CASES})
    return runs


def compare(path, *arguments: str) -> tuple[int, list[dict]]:
    code = main(["dispatch", "--model", "resnet8", "--device", "cpu", "--shapes", "2", "--json", str(path), *arguments])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_a_biased_clock_is_seen(tmp_path, capsys, monkeypatch, two_adders):
    """It takes ours for twice as long as it is."""
    clock, replay = {"torch": 3.0, "triton": 4.0}, {"torch": 3.0, "triton": 2.0}
    monkeypatch.setattr(bench_dispatch, "clock_of", lambda device: lambda run: clock[of(run)])
    monkeypatch.setattr(bench_dispatch, "replayed", lambda run, device: replay[of(run)])

    def of(run) -> str:
        return next(name for name, known in two_adders.items() if known is run)

    code, rows = compare(tmp_path / "rows")
    assert code == 0 and [tuple(row["form"]) for row in rows] == [(0,), (2,)], "from all over the network"
    for row in rows:
        assert (row["chosen"], row["faster"], row["right"], row["loss"]) == ("torch", "triton", False, 0.5)
        assert row["clock_ms"] == clock and row["replay_ms"] == replay
    printed = capsys.readouterr().out
    assert "torch, 50% slower than the other" in printed
    assert "0 of 2 choices are right" in printed and "ours takes 2.000 times as long" in printed


def test_on_a_gpu(tmp_path, monkeypatch, two_adders):
    played = play(monkeypatch)
    path = tmp_path / "rows"
    assert main(["dispatch", "--model", "resnet8", "--device", "cuda", "--shapes", "9", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(CASES) and played.device == 0 and played.replays == 2 * len(CASES) * bench_dispatch.REPLAYS
    for row in rows:
        assert row["clock_ms"] == {"torch": MS, "triton": MS}
        assert row["replay_ms"] == {name: MS / bench_dispatch.RUNS for name in two_adders} and row["right"]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda self, *pool, **options: 1 / 0)
    assert main(["dispatch", "--model", "resnet8", "--device", "cuda", "--shapes", "1", "--json", str(path)]) == 1
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["result"] == "failed" and last["why"].startswith("no CUDA graph: ZeroDivisionError")


def test_what_a_step_asks_for():
    args = argparse.Namespace(model="resnet8", batch=2, size=8, seed=0)
    found = bench_dispatch.met(args, torch.device("cpu"))
    assert {case.operation for case in found} == {*bench_dispatch.OPERATIONS} and len(found) > 6
    assert all(set(candidates()) == {*bench_dispatch.NAMES} for candidates in found.values())


def test_results_that_differ_are_no_comparison(tmp_path, capsys, two_adders):
    two_adders["triton"] = lambda: [torch.ones(2)]
    with pytest.warns(UserWarning, match="disagree"):
        code, rows = compare(tmp_path / "rows")
    assert code == 1 and [row["result"] for row in rows] == ["failed"] * 2
    assert "2 shapes could not be compared" in capsys.readouterr().err
