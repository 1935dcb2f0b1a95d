"""The cost model: loops of the machine code, rounds as the kernels make them, and that an estimate is called one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import apart
import pytest
import torch
from families import gaussian, problems

from reprune_triton import ops
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.estimate import cost
from reprune_triton.errors import RepruneError
from reprune_triton.kernels.clustering import launch

ROOT = Path(__file__).resolve().parents[2]

CODE = """
MOV R1
.L_x_0:
LDG R2
.L_x_1:
MUFU.RSQ R3
FFMA R4
@P0 BRA `(.L_x_1)
.L_x_2:
IADD3 R5
@!P1 BRA `(.L_x_2)
@P2 BRA `(.L_x_4)
FADD R6
@P3 FADD R7
@P3 BRA `(.L_x_7)
.L_x_4:
BRA.DIV UR4, `(.L_x_5)
.L_x_6:
@P0 BRA `(.L_x_0)
EXIT
.L_x_7:
CALL.REL.NOINC `($slow)
BRA `(.L_x_4)
.L_x_5:
SHFL.BFLY R7
BRA `(.L_x_6)
.L_x_3:
BRA `(.L_x_3)
""".split("\n")[1:-1]


def test_loops_are_found_by_what_branches_back():
    code = cost.parse(CODE)
    assert code.once == 3  # MOV, EXIT and the call; neither what follows a call, nor a warp that parts, nor the end
    (outer,) = code.loops
    assert (outer.own, outer.least) == (7, 4), "LDG and three branches; FADD twice and a branch can be skipped"
    assert [(loop.own, loop.least) for loop in outer.inside] == [(3, 3), (2, 2)]
    assert outer.has("MUFU") and not outer.count("MUFU") and outer.inside[0].count("MUFU") == 1
    assert outer.count("FADD") == 2, "predicates are left out"


def test_calls_of_labels_are_branches():
    """As the compiler writes the end of a loop for sm_80."""
    code = cost.parse([".L_x_0:", "FADD R1", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:", "EXIT"])
    assert code.once == 1 and [loop.own for loop in code.loops] == [3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["BRX R2 -0x10", "EXIT"], "does not know"),
        (["@P0 BRA `(.L_x_9)", "EXIT"], "no label"),
        (["@P0 BRA `(.L_x_1)", ".L_x_0:", "MOV", ".L_x_1:", "FADD", "@P1 BRA `(.L_x_0)", "EXIT"], "in the middle"),
    ],
)
def test_machine_code_that_is_not_understood_is_refused(lines, message):
    with pytest.raises(RepruneError, match=message):
        cost.parse(lines)


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (cost._reciprocal, {"work": [[(4, 4)]], "n": 4, "d": 9, "D": 9, "ROWS": 16, "COLS": 32, "BLOCK": 128}),
        (cost._line, {"work": [[4, 2]], "n": 4, "d": 1, "WIDTH": 64, "BLOCK": 32}),
        (cost._chain, {"work": [9], "n": 4, "d": 9, "LINKAGE": 1, "D": 0, "BLOCK": 64}),
        (cost._magnitude, {"size": 9, "BLOCK": 1024}),
        (cost._cut_height, {"n": 4, "BLOCK": 128}),
        (cost._label, {"climbs": [[1]]}),
    ],
)
def test_other_loops_are_refused(count, arguments):
    for loops in ([], [cost.Loop(9, 9, [], ["IADD3"] * 9)]):
        with pytest.raises(RepruneError, match="does not have the loops"):
            count(cost.Code(1, loops), **arguments)


def loop(own: int, *inside: cost.Loop, text: str = "", least: int | None = None) -> cost.Loop:
    return cost.Loop(own, own if least is None else least, list(inside), text.split())


def test_counts_multiply():
    """A kernel of known loops: 100 once, 5 to pad a copy, 10 a round, 7 a block."""
    code = cost.Code(100, [loop(5), loop(10, loop(7, text="MUFU.RSQ" + " STG" * 7))])
    counted = {"n": 64, "d": 1, "WIDTH": 64, "BLOCK": 32}
    assert cost._line(code, work=[[70, 30, 2]], **counted) == 110 + 3 * 10 + (3 + 1 + 1) * 7
    assert cost._line(code, work=[[70, 30, 2], [2]], **counted) == 110 + (3 + 1) / 2 * 10 + (5 + 1) / 2 * 7
    halvings = cost.Code(60, [loop(10, loop(3, text="LDG"))])
    assert cost._cut_height(halvings, 200, BLOCK=128) == 60 + 31 * (10 + 2 * 3)
    label = cost.Code(60, [loop(9, text="SHFL"), loop(10, loop(3, text="LDG"))])
    assert cost._label(label, [[1, 4], [2, 2]]) == 60 + 2 * (9 + 10) + (5 + 4) / 2 * 3
    searches = cost.Code(60, [loop(9, loop(2), text="STG"), loop(50, loop(30, text="REDUX FFMA"), least=20)])
    found = cost._chain(searches, work=[10, 12], n=4, d=1, LINKAGE=0, D=1, BLOCK=64)
    assert found == 60 + 9 + 2 + 11 * (20 + 30) + 3 * (50 - 20)


def test_loops_over_coordinates_may_be_unrolled():
    single, four = loop(5, text="FFMA"), loop(12, text="FFMA " * 4)
    assert cost._coordinates([four, single], 9, "") == 2 * 12 + 5
    assert cost._coordinates([single], 9, "") == 45
    move, moves = loop(3, text="STG"), loop(8, text="STG " * 4)
    assert cost._coordinates([single, moves, move], 9, "") == 45 + 2 * 8 + 3, "threads that part go both ways"
    with pytest.raises(RepruneError):
        cost._coordinates([single, single], 9, "")


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled in this process")


@needs_interpreter
@pytest.mark.parametrize(("n", "d"), [(40, 1), (40, 9), (70, 1), (70, 4), (130, 1), (130, 4), (130, 9)])
def test_rounds_are_those_of_the_kernels(n, d):
    points = torch.from_numpy(problems(gaussian, 1, n, d, n)).float()
    layer = ops.Layer(points.transpose(0, 1).unsqueeze(2))
    work = launch.cluster(launch.prepare([layer], "ward", "auto" if d == 1 else "reciprocal")).work[0].tolist()
    if d == 1:
        (live,) = cost.count_line_rounds(points)
        assert work == [len(live), sum(-(-count // 32) for count in live)]
    else:
        (rounds,) = cost.count_rounds(points)
        constants = dict(launch.configuration(n, d, "ward", "reciprocal").constants)
        tiles = [-(-stale // constants["ROWS"]) * -(-count // constants["COLS"]) for stale, count in rounds]
        assert work == [len(rounds), sum(tiles)]


@needs_interpreter
@pytest.mark.parametrize(("n", "d", "linkage"), [(30, 4, "ward"), (40, 9, "ward"), (30, 9, "average")])
def test_searches_are_those_of_the_chain(n, d, linkage):
    points = torch.from_numpy(problems(gaussian, 1, n, d, n)).float()
    layer = ops.Layer(points.transpose(0, 1).unsqueeze(2))
    work = launch.cluster(launch.prepare([layer], linkage, "chain")).work[0].tolist()
    assert [work[0]] == cost.count_searches(points, linkage)


def test_climbing_ends_at_the_cut():
    """Points on a line, two and two together: at half of them each second point climbs one step."""
    points = torch.tensor([0.0, 1, 10, 11, 20, 21, 30, 31])[None, :, None]
    sample = cost._sample(ops.Layer(points.transpose(0, 1).unsqueeze(2)), "ward", launch.configuration(8, 1))
    assert sample.climbs == [[2]] and [live[0] for live in sample.work] == [8]


SHAPES = [(50, 49), (80, 25), (30, 9), (64, 9), (130, 9), (256, 9), (512, 9), (40, 4), (130, 4), (30, 1), (250, 1)]
OTHERS = [linkage for linkage in ops.LINKAGES if linkage != "ward"]
SHAPES += [(500, 1), (1000, 1), (2000, 1), (4000, 1)]


@pytest.fixture(scope="module")
def layers() -> list[ops.Layer]:
    generator = torch.Generator().manual_seed(0)
    sides = [(n, round(d**0.5)) for n, d in SHAPES]
    return [ops.Layer(torch.randn(n, 2, k, k, generator=generator)) for n, k in sides]


BUILD = """
import importlib, json, sys
from reprune_triton.bench.estimate import cost
from reprune_triton.kernels.configuration import Configuration
for module, name, constants, *others in json.loads(sys.argv[1]):
    config = Configuration(getattr(importlib.import_module(module), name), tuple(map(tuple, constants)), *others)
    print(json.dumps(cost.machine_code(config, "sm_90")))
"""


@pytest.fixture(scope="module", autouse=True)
def machine_code():
    """Of all kernels that the tests estimate; it is compiled apart from this process, which interprets."""
    cases = [*((n, d, "ward") for n, d in SHAPES), *((n, 9, other) for n in (30, 64, 130) for other in OTHERS)]
    cases += [(130, 4, other) for other in OTHERS]
    configs = [launch.MAGNITUDE, launch.CUT_HEIGHT, launch.LABEL, *(launch.configuration(*case) for case in cases)]
    configs = list(dict.fromkeys(configs))
    if torch.cuda.is_available():
        yield {config: cost.machine_code(config, "sm_90") for config in configs}
        return
    words = [
        (x.kernel.fn.__module__, x.kernel.__name__, x.constants, x.warps, x.max_registers, x.stages) for x in configs
    ]
    codes = dict(zip(configs, apart.run(BUILD, json.dumps(words)), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_known", {(config, "sm_90"): cost.parse(lines) for config, lines in codes.items()})
        yield codes


@pytest.fixture(scope="module")
def estimated(layers) -> list[cost.Part]:
    """Every kernel and area there is for Ward."""
    return cost.estimate(layers)


def per_problem(found: list[cost.Part]) -> dict[tuple[int, int], float]:
    numbers = [[int(word) for word in part.shape.replace(",", "").split() if word.isdigit()] for part in found]
    return {(x[1], x[2]): p.instructions / p.problems for x, p in zip(numbers, found, strict=True) if x}


def test_every_kernel_has_an_estimate(estimated):
    assert {part.kernel.split()[0] for part in estimated} == {
        "magnitude", "chain", "reciprocal", "line", "cut_height", "label"
    }  # fmt: skip
    assert all(part.instructions > 0 and part.ms > 0 for part in estimated)
    assert set(per_problem(estimated)) == set(SHAPES)


def test_estimates_grow_with_n_and_d(estimated):
    found = per_problem(estimated)
    for some in ([(30, 9), (64, 9)], [(130, 9), (256, 9), (512, 9)], [shape for shape in SHAPES if shape[1] == 1]):
        costs = [found[shape] for shape in some]
        assert costs == sorted(costs)
    assert found[130, 4] < found[130, 9] and 2 < found[512, 9] / found[256, 9] < 5, "about n^2"
    assert found[500, 1] < found[512, 9] / 20, "points on a line are cheap"


@pytest.mark.parametrize("linkage", OTHERS)
def test_other_linkages_have_an_estimate(layers, linkage):
    found = per_problem(cost.estimate([layers[2], layers[3], layers[4], layers[8]], linkage))
    assert found[30, 9] < found[64, 9] < found[130, 9] and found[130, 4] < found[130, 9]


def test_doctored_machine_code_is_refused(layers, machine_code, monkeypatch):
    """Of the kernel that matters most. Any of these would give a number, if nobody looked."""
    config = launch.configuration(512, 9)
    lines = machine_code[config]
    assert cost.estimate([layers[6]])
    rsqrt = max(at for at, line in enumerate(lines) if line.startswith("MUFU.RSQ"))
    back = next(at for at in range(rsqrt, len(lines)) if "BRA" in lines[at])
    doctored = {
        "no loop": [line if at != back else "NOP" for at, line in enumerate(lines)],
        "no arithmetic": [line.replace("MUFU.RSQ", "MUFU.EX2") for line in lines],
        "no sums": [line.replace("SHFL", "MOV") for line in lines],
        "other areas": [line.replace("FFMA", "FADD") for line in lines],
        "cut short": [*lines[:back], "EXIT"],
    }
    for other in doctored.values():
        assert other != lines
        with monkeypatch.context() as patch, pytest.raises(RepruneError, match="machine code"):
            patch.setitem(cost._known, (config, "sm_90"), cost.parse(other))
            cost.estimate([layers[6]])


@needs_interpreter
def test_interpreted_kernels_have_no_machine_code(capsys):
    assert main(["cost", "--model", "resnet8", "--target", "sm_80"]) == 1
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_estimates_say_that_they_are(tmp_path):
    """The command, in a process that does not interpret."""
    pytest.importorskip("torchvision")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "reprune_triton.bench", "cost", "--json", str(tmp_path / "rows")]
    command += ["--model", "resnet18", "--layers", "all", "--target", "sm_90"]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert "Estimated, not measured" in done.stdout
    assert all(row["estimated"] and "cluster_s" not in row and row["target"] == "sm_90" for row in rows)
    *parts, total = rows
    assert total["row"] == "total" and total["estimated_ms"] == pytest.approx(sum(row["estimated_ms"] for row in parts))
    assert all(row["estimated_ms"] > 0 for row in parts) and total["layers"] == 20


def test_reciprocal_is_for_ward():
    arguments = ["--model", "resnet8", "--linkage", "average", "--algorithm", "reciprocal"]
    command = [sys.executable, "-m", "reprune_triton.bench", "cost", *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and "is for Ward" in done.stderr
