"""The benchmark over sizes: rows, time budget, and that wrong results show no times."""

import json

import pytest
import torch

from reprune_triton import ops
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.measure import peers
from reprune_triton.bench.measure import scaling as scaling_bench

SMALL = ("--d", "1", "9", "--sizes", "8", "32", "--problems", "2", "--size", "16", "--counts", "1", "4")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scaling(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    path = tmp_path / "rows"
    code = main(["scaling", "--seconds", "0.5", "--json", str(path), *arguments])
    return code, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_rows(tmp_path, capsys, linkage):
    code, rows = scaling(tmp_path, *SMALL, "--linkage", linkage)
    assert code == 0
    cells = [(row["sweep"], row["d"], row["n"], row["problems"]) for row in rows]
    by_size, by_count = "2 problems, by size", "16 points, by number of problems"
    assert cells == [(by_size, d, n, 2) for d in (1, 9) for n in (8, 32)] + [
        (by_count, d, 16, count) for d in (1, 9) for count in (1, 4)
    ]
    for row in rows:
        assert row["impl"] == "reference" and row["algorithm"] == "auto" and row["rounds"] is None
        assert row["linkage"] == linkage and row["checked"] == row["problems"] and row["scipy_problem_s"] > 0
        assert row["problem_s"] == pytest.approx(row["cluster_s"] / row["problems"])
        assert row["pairs_per_s"] == pytest.approx(row["n"] ** 2 / row["problem_s"])
        assert row["torch"] == torch.__version__ and "commit" in row
    printed = capsys.readouterr().out
    assert by_size in printed and by_count in printed and "Left out" not in printed


def test_triton_has_three_algorithms(tmp_path):
    arguments = ("--d", "4", "--sizes", "8", "--problems", "1", "--counts", "1", "--size", "8", "--impl", "triton")
    if torch.cuda.is_available():
        arguments += ("--device", "cuda")
    code, rows = scaling(tmp_path, *arguments)
    assert code == 0 and [row["algorithm"] for row in rows] == ["auto", "chain", "reciprocal"] * 2
    assert all(row["impl"] == "triton" and row["rounds"] >= 3 and row["checked"] == 1 for row in rows)


def test_too_slow_is_left_out_and_said(tmp_path, capsys):
    arguments = ("--d", "9", "--sizes", "16", "4096", "--problems", "1", "--counts", "1", "--size", "16")
    code, rows = scaling(tmp_path, *arguments)
    assert code == 0 and [row["n"] for row in rows] == [16, 16]
    assert "Left out, beyond --seconds: auto, d = 9, n = 4096" in capsys.readouterr().out


def test_without_scipy_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_peers", lambda linkage: {})
    code, rows = scaling(tmp_path, *SMALL)
    assert code == 0 and all(row["checked"] == 0 and row["scipy_problem_s"] is None for row in rows)


def test_no_times_for_wrong_results(tmp_path, capsys, monkeypatch):
    cluster = ops.cluster_network

    def wrong(*given):
        return [(merges._replace(height=merges.height * 1.001), clusters) for merges, clusters in cluster(*given)]

    monkeypatch.setattr(ops, "cluster_network", wrong)
    code, rows = scaling(tmp_path, *SMALL)
    printed = capsys.readouterr()
    assert code == 1 and not rows and "no times are shown" in printed.err and "pairs" not in printed.out


def test_refused_settings(tmp_path, capsys):
    for arguments in (("--sizes", "0"), ("--seconds", "0"), ("--d", "-1")):
        assert scaling(tmp_path, *arguments)[0] == 1
    assert "must be positive" in capsys.readouterr().err


def test_a_row_is_on_disk_as_soon_as_it_is_known(tmp_path, monkeypatch):
    path, known, check = tmp_path / "rows", [], scaling_bench.against_scipy

    def stopped(*given):
        known.append(len(path.read_text().splitlines()) if path.exists() else 0)
        if len(known) == 3:
            raise KeyboardInterrupt
        return check(*given)

    monkeypatch.setattr(scaling_bench, "against_scipy", stopped)
    with pytest.raises(KeyboardInterrupt):
        scaling(tmp_path, *SMALL)
    assert known == [0, 1, 2] and len(path.read_text().splitlines()) == 2
