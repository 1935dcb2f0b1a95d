"""`make bench`: ratios to peers of the same run, held against recorded ones; and that results are checked first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reprune_triton.bench import guard

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pytest

@pytest.mark.parametrize("name", ["slow", "fast"])
def test_it(side, name):
    side("adding", name, lambda: sum(range(200_000 if name == "slow" else 20_000)), peer=name == "slow")
"""


def timed(group, side, median, peer=False):
    return guard.Timed(group, side, peer, median, 3)


def test_every_side_of_ours_is_held_against_every_peer():
    found = guard.ratios([
        timed("a", "ours", 1.0), timed("a", "scipy", 4.0, True), timed("a", "fast", 0.5, True), timed("b", "ours", 2.0),
        timed("c", "narrow", 2.0), timed("c", "compact", 1.0), timed("c", "dense", 3.0, True),
    ])  # fmt: skip
    assert {ratio.key: ratio.value for ratio in found} == {
        ("a", "ours", "scipy"): 4.0, ("a", "ours", "fast"): 0.5, ("c", "narrow", "dense"): 1.5,
        ("c", "compact", "dense"): 3.0,
    }  # fmt: skip
    before = {("a", "ours", "scipy"): 4.0 * guard.TOLERANCE * 1.01, ("c", "narrow", "dense"): 1.5 * guard.TOLERANCE}
    (said,) = guard.regressions(found, before)
    assert said == "a: ours was 5.25 times as fast as scipy and now is 4.00 times."
    assert guard.regressions(found, {}) == []


def test_the_last_recorded_ratio_counts(tmp_path):
    (ratio,) = guard.ratios([timed("a", "ours", 1.0), timed("a", "peer", 4.0, True)])
    path = tmp_path / "rows"
    assert guard.recorded(path) == {}
    lines = [guard.row(ratio), guard.row(ratio) | {"ratio": 7.0}]
    path.write_text("".join(json.dumps(line | {"dirty": False}) + "\n" for line in lines))
    assert guard.recorded(path) == {("a", "ours", "peer"): 7.0}
    assert lines[0]["median_s"] == 1.0 and lines[0]["peer_median_s"] == 4.0 and lines[0]["ratio"] == 4.0


def test_a_run_records_and_fails_only_when_it_got_worse(tmp_path):
    (tmp_path / "test_sum.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "suites" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def call(*more):
        words = [sys.executable, "-m", "pytest", "-q", *more, "-p", "no:cacheprovider"]
        # pytest-benchmark measures nothing where it takes itself to be one of several processes.
        alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
        environment = {**alone, "PYTHONPATH": str(ROOT)}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = call("--recorded", "none", "--json", "rows")
    assert done.returncode == 0 and "Our side and its peers" in done.stdout, done.stdout + done.stderr
    assert "none holds no ratios: nothing is guarded" in done.stdout
    (row,) = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert (row["benchmark"], row["group"], row["side"], row["peer"]) == ("suites", "adding", "fast", "slow")
    assert row["ratio"] > 0 and row["rounds"] == 40 and row["torch"] and row["threads"] == 1
    (tmp_path / "rows").write_text(json.dumps(row | {"ratio": 1e6}) + "\n")
    done = call("--recorded", "rows", "--json", "rows")
    assert len((tmp_path / "rows").read_text().splitlines()) == 1, "what got worse is not recorded"
    assert done.returncode == 1 and "adding: fast was 1000000.00 times as fast as slow and now" in done.stdout


@pytest.mark.parametrize("broken", ["test_clustering_and_cut", "test_selection", "test_a_whole_event"])
def test_what_computes_something_else_is_not_timed(broken, tmp_path):
    """Each benchmark with its peer's result replaced by another one."""
    break_it = {
        "test_clustering_and_cut": "suite.by_ours = lambda weight, keep: suite.by_library('SciPy', weight, keep + 9)",
        "test_selection": "suite.by_sets = lambda labels, keep: list(range(keep))",
        "test_a_whole_event": "suite.by_sets = lambda labels, keep: list(range(keep))",
    }[broken]
    folder = ROOT / "bench" / "suites"
    (tmp_path / "conftest.py").write_text((folder / "conftest.py").read_text())
    (tmp_path / "suite.py").write_text((folder / "test_event.py").read_text())
    (tmp_path / "test_broken.py").write_text(f"import suite\nfrom suite import {broken}\n{break_it}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "ours and not 3x3", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError" in done.stdout and "Our side and its peers" not in done.stdout
