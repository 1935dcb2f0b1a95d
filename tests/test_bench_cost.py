"""The cost model: loops of the machine code, rounds as the kernels make them, and that an estimate is called one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import gaussian, problems

from reprune_triton import ops
from reprune_triton.bench import cost
from reprune_triton.errors import RepruneError
from reprune_triton.kernels import launch

ROOT = Path(__file__).resolve().parents[1]

CODE = """
MOV R1
.L_x_0:
LDG R2
.L_x_1:
MUFU.RSQ R3
FFMA R4
BRA `(.L_x_1)
.L_x_2:
IADD3 R5
BRA `(.L_x_2)
BRA P0, `(.L_x_0)
FADD R6
BRA `(.L_x_0)
EXIT
.L_x_3:
BRA `(.L_x_3)
""".split("\n")[1:-1]


def test_loops_are_found_by_what_branches_back():
    code = cost.parse(CODE)
    assert code.once == 3  # MOV, EXIT and the branch to itself
    (outer,) = code.loops
    assert outer.own == 4 and [loop.own for loop in outer.inside] == [3, 2] and outer.turn == 9
    assert "MUFU" in outer.inside[0].text and "MUFU" not in outer.text
    assert cost._coordinates(outer.inside, 5) == 10


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (cost._reciprocal, {"rounds": [[(4, 4)]], "n": 4, "d": 9, "D": 9, "ROWS": 16, "COLS": 32, "BLOCK": 128}),
        (cost._line, {"rounds": [[4, 2]], "BLOCK": 32}),
        (cost._chain, {"n": 4, "d": 9, "LINKAGE": 1, "D": 0, "BLOCK": 64}),
        (cost._magnitude, {"filter_size": 9.0}),
        (cost._level, {"n": 4.0}),
        (cost._label, {"n": 4.0}),
    ],
)
def test_other_machine_code_is_refused(count, arguments):
    with pytest.raises(RepruneError, match="does not have the loops"):
        count(cost.Code(1, []), **arguments)


def test_counts_multiply():
    """A kernel of known loops: 100 once, 10 a round, 7 a block."""
    text = "MUFU.RSQ"
    code = cost.Code(100, [cost.Loop(10, [cost.Loop(7, [], text)], "")])
    assert cost._line(code, rounds=[[70, 30, 2]], BLOCK=32) == 100 + 3 * 10 + (3 + 1 + 1) * 7
    assert cost._line(code, rounds=[[70, 30, 2], [2]], BLOCK=32) == 100 + (3 + 1) / 2 * 10 + (5 + 1) / 2 * 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled in this process")
@pytest.mark.parametrize(("n", "d"), [(40, 9), (70, 4), (130, 9), (45, 1), (150, 1)])
def test_rounds_are_those_of_the_kernels(n, d):
    points = torch.from_numpy(problems(gaussian, 1, n, d, n)).float()
    layer = ops.Layer(points.transpose(0, 1).unsqueeze(2))
    work = launch.cluster([layer], "ward", "auto" if d == 1 else "reciprocal").work[0].tolist()
    if d == 1:
        (live,) = cost.count_line_rounds(points)
        assert work == [len(live), sum(-(-count // 32) for count in live)]
    else:
        (rounds,) = cost.count_rounds(points)
        constants = dict(launch.configuration(n, d, "ward", "reciprocal").constants)
        tiles = [-(-stale // constants["ROWS"]) * -(-count // constants["COLS"]) for stale, count in rounds]
        assert work == [len(rounds), sum(tiles)]


def estimates(tmp_path, *arguments: str) -> tuple[str, list[dict]]:
    """Apart from this process, in which Triton interprets kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "reprune_triton.bench", "cost", "--json", str(tmp_path / "rows"), *arguments]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]


def test_estimates_say_that_they_are(tmp_path):
    pytest.importorskip("torchvision")
    printed, rows = estimates(tmp_path, "--model", "resnet18", "--layers", "all", "--target", "sm_90")
    assert "Estimated, not measured" in printed
    assert all(row["estimated"] and "cluster_s" not in row and row["target"] == "sm_90" for row in rows)
    *parts, total = rows
    assert total["row"] == "total" and total["estimated_ms"] == pytest.approx(sum(row["estimated_ms"] for row in parts))
    assert all(row["estimated_ms"] > 0 for row in parts)
    per_problem = {row["shape"].split(" of ")[1]: row["warp_instructions"] / row["problems"] for row in parts[1:-2]}
    sizes = [per_problem[f"n {n}, d 9"] for n in (128, 256, 512)]
    assert sizes == sorted(sizes) and 2 < sizes[2] / sizes[1] < 5, "about n^2"
    lines = [per_problem[f"n {n}, d 1"] for n in (128, 256, 512)]
    assert lines == sorted(lines) and lines[2] < sizes[2] / 20, "points on a line are cheap"


def test_other_linkages_have_an_estimate(tmp_path):
    _, rows = estimates(tmp_path, "--model", "resnet8", "--linkage", "average")
    assert {row["row"].split()[0] for row in rows} == {"magnitude", "chain", "level", "label", "total"}


def test_an_interpreting_process_cannot_estimate():
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    with pytest.raises(RepruneError, match="unset TRITON_INTERPRET"):
        cost.estimate([ops.Layer(torch.randn(8, 2, 3, 3))])
