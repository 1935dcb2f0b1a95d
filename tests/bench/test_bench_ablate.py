"""Ablations: every run once, an interrupted one goes on, each row has the command that repeats it."""

import json
import shlex
import statistics

import pytest
from scipy import stats

from reprune_triton import train
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.study import ablate, arms
from reprune_triton.errors import RepruneError
from reprune_triton.training import loop
from reprune_triton.training.options import recipe

pytest.importorskip("sklearn")


def call(tmp_path, *more, question="linkage", epochs=2, seeds=(0, 1)):
    options = ["--epochs", str(epochs), "--seeds", *map(str, seeds), "--device", "cpu"]
    places = ["--json", str(tmp_path / "rows.jsonl"), "--runs", str(tmp_path / "runs")]
    assert main(["ablate", question, *options, *places, *more]) == 0
    path = tmp_path / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def small(monkeypatch):
    """A smaller network, for speed."""
    tier = ablate.TIERS["digits"]
    monkeypatch.setitem(ablate.TIERS, "digits", tier._replace(changes=tier.changes | {"model": "resnet8"}))


def test_every_run_is_a_row_and_is_made_once(tmp_path, capsys, small, monkeypatch):
    made = call(tmp_path, "--arms", "ward", "single")
    assert [(row["options"]["linkage"], row["seed"]) for row in made] == [
        ("ward", 0), ("single", 0), ("ward", 1), ("single", 1)
    ]  # fmt: skip
    for row in made:
        assert 0.1 < row["accuracy"] <= 1 and 0 < row["flops"] < 1 and row["sparsity"] == pytest.approx(0.5, abs=0.03)
        assert len(row["coverage"]) == len(row["events"]) == 1 and 0 < row["coverage"][0] <= 1
        assert set(row["layer_coverage"]) == set(row["layers"]) and all(
            0 < rate <= 1 for (rate,) in row["layer_coverage"].values()
        )
        assert set(row["layers"]) == {f"stage{n}.0.conv1" for n in (1, 2, 3)} and row["parameters"] < 78042
        assert {name: 16 - len(left) for name, left in row["active"].items()}["stage1.0.conv1"] > 0
        assert row["tier"] == "digits" and row["device"] == "cpu" and row["torch"] and row["seconds"] > 0
    assert not list((tmp_path / "runs").iterdir()), "finished runs leave nothing behind"
    assert "4 runs, 0 known already" in capsys.readouterr().out
    monkeypatch.setattr(loop, "train", None)
    assert call(tmp_path, "--arms", "ward", "single") == made
    assert "4 runs, 4 known already" in (printed := capsys.readouterr().out) and "Table 5" in printed


def test_questions_share_the_baseline(tmp_path, small):
    made = call(tmp_path, "--arms", "ward", seeds=[0])
    assert call(tmp_path, "--arms", "72%", question="until", seeds=[0]) == made
    assert call(tmp_path, "--arms", "1", question="width", seeds=[0]) == made
    assert len(call(tmp_path, "--arms", "16", question="width", seeds=[0])) == 2


def test_the_draw_alone_can_be_another(tmp_path, small):
    names = ["random", "random, another draw", "index"]
    one, other, index = call(tmp_path, "--arms", *names, question="random", seeds=[0])
    assert one["active"] != other["active"] != index["active"] and abs(one["flops"] - other["flops"]) < 0.1
    assert 0 < arms.overlap(one["active"], other["active"]) < 1 == arms.overlap(one["active"], one["active"])


def test_a_row_of_before_an_option_was_there_still_counts(tmp_path):
    options = ablate.saved(recipe("digits"))
    for gone in ("prune_seed", "tie"):
        known = {name: value for name, value in options.items() if name != gone}
        row = {"benchmark": "ablate", "dirty": False, "options": known}
        (tmp_path / "rows").write_text(json.dumps(row))
        assert list(ablate.load(tmp_path / "rows")) == [ablate.key_of(options)]


def test_a_run_that_fails_does_not_keep_others_from_being_made(tmp_path, small, monkeypatch, capsys):
    train_all = loop.train

    def diverging(options, on_epoch, quiet):
        if options.linkage == "single":
            raise RepruneError("the training loss is nan")
        return train_all(options, on_epoch, quiet)

    monkeypatch.setattr(loop, "train", diverging)
    places = ["--json", str(tmp_path / "rows.jsonl"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    words = ["ablate", "linkage", "--arms", "single", "average", "--epochs", "2", "--seeds", "0", "0", *places]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "2 runs, 0 known" in said.out, "a seed that is given twice is one run"
    assert "1 runs failed: single, seed 0: the training loss is nan" in said.err
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["options"]["linkage"] == "average"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"dirty": True}) + "\n")
    assert main(words) == 1
    assert "1 of them are of code that was not committed" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text('{"benchmark": "abl')
    assert main(words) == 1
    assert "rows.jsonl, line 1, is not a row of a benchmark" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on_to_the_same_end(tmp_path, small, capsys):
    for number in range(3):
        made = call(tmp_path / "stopped", "--arms", "ward", "--budget", "0.01s", epochs=3, seeds=[0])
        assert bool(made) == (number == 2), "one epoch at least, each time"
    assert "call it again" in capsys.readouterr().out
    (whole,) = call(tmp_path / "whole", "--arms", "ward", epochs=3, seeds=[0])
    for key in ("accuracy", "flops", "coverage", "layers", "parameters"):
        assert made[0][key] == whole[key]


def test_a_row_is_repeated_by_its_command(tmp_path, small, capsys):
    (row,) = call(tmp_path, "--arms", "average", seeds=[3])
    words = shlex.split(row["command"])
    assert words[:3] == ["python", "-m", "reprune_triton.train"]
    train.main([*words[3:], "--out", str(tmp_path / "again"), "--device", "cpu", "--threads", "1"])
    assert f"accuracy {row['accuracy']:.2%} at {row['flops']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("question", ablate.QUESTIONS)
@pytest.mark.parametrize("tier", ablate.TIERS)
def test_arms_change_one_option_of_the_baseline(question, tier):
    runs = ablate.plan(question, tier, [0], device="cpu", threads=1)
    found = {run.arm: ablate.saved(run.options) for run in runs}
    (baseline,) = (run.arm for run in runs if run.baseline)
    size = ablate.TIERS[tier]
    at = {"sparsity": None, "flops": size.flops} if ablate.QUESTIONS[question].equal_flops else {}
    assert found[baseline] == ablate.saved(recipe(size.data, **size.changes | at))
    until = "72%" if tier == "digits" else "60%"
    usual = {"linkage": "ward", "until": until, "width": "1", "random": "random", "paradigm": "concurrent"}
    assert baseline == (usual | {"coverage": "coverage", "regrow": "0.3", "baseline": "REPrune"})[question]
    assert len({json.dumps(options) for options in found.values()}) == len(found)
    for options in found.values():
        assert sum(options[key] != found[baseline][key] for key in options) <= 1
    assert set(ablate.QUESTIONS[question].paper) <= set(found)


def test_every_question_at_once(tmp_path, small, monkeypatch):
    """Runs that several questions share are made once, seed by seed."""
    made = []

    def train_nothing(options, on_epoch, quiet):
        made.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train_nothing)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, question="all", seeds=[0])
    monkeypatch.setattr(ablate, "perform", lambda one, *_: made.append(one) or row_of(one.options.seed, 0.5))
    call(tmp_path, question="all", epochs=40, seeds=[1, 0])
    runs = made[1:]
    assert [run.options.seed for run in runs] == [0] * (len(runs) // 2) + [1] * (len(runs) // 2)
    assert len({run.key for run in runs}) == len(runs) == 2 * (4 + 6 + 4 + 3 + 4 + 3 + 2 + 4)
    assert {run.epochs for run in runs} == {40, 80}


def row_of(seed, accuracy, **more):
    numbers = {"seed": seed, "accuracy": accuracy, "flops": 0.5, "sparsity": 0.5, "seconds": 1, "parameters": 7}
    return numbers | {"coverage": [0.5, 0.75], "active": {}, "epochs": 4, "training_flops": 0.5} | more


def test_differences_are_paired():
    planned, known = [], {}
    for arm, accuracies in (("ward", [0.9, 0.91, 0.92]), ("single", [0.89, 0.91, 0.93, 0.95])):
        for seed, accuracy in enumerate(accuracies):
            run = ablate.Run("linkage", "digits", arm, recipe(linkage=arm, seed=seed), arm == "ward")
            active = {"a": [0, 1], "b": [0, seed + 1 if arm == "ward" else 9]}
            known[run.key] = row_of(seed, accuracy, active=active)
            planned.append(run)
    planned.append(ablate.Run("linkage", "digits", "average", recipe(linkage="average"), False))  # no row yet
    table = ablate.table("linkage", "digits", ablate.arms_of(planned, known))
    cells = {column.header: list(column.cells) for column in table.columns}
    differences = [-1, 0, 1]  # in points; seed 3 has no partner
    half = stats.t.ppf(0.975, 2) * statistics.stdev(differences) / 3**0.5
    assert cells["linkage"] == ["ward", "single"] and cells["runs"] == ["3", "4"]
    assert cells["difference"] == ["", f"+0.00 ± {half:.2f}"] and cells["accuracy"][0] == "91.00% ± 1.00"
    assert cells["mean coverage"] == ["62.5%"] * 2 and cells["paper"] == ["93.40%", "lower"]
    assert cells["overlap"] == ["", "60.0%"], "of five filters in either, three are in both"
    assert arms.interval([1.5]) == "+1.50" and arms.interval([]) == "" and arms.interval([-0.001]) == "+0.00"


def test_every_column_of_every_question():
    for question, asked in ablate.QUESTIONS.items():
        runs = ablate.plan(question, "digits", [0, 1])
        known = {run.key: row_of(run.options.seed, 0.9, active={"a": [0]}) for run in runs}
        known[runs[-1].key]["coverage"], known[runs[-1].key]["active"] = [], {}  # as of a dense network
        table = ablate.table(question, "digits", ablate.arms_of(runs, known))
        cells = {column.header: list(column.cells) for column in table.columns}
        assert list(cells) == [question, "runs", "accuracy", "difference", "verdict", *asked.columns]
        assert {len(column) for column in cells.values()} == {len(runs) // 2}
        for heading, wanted in (("first coverage", "50.0%"), ("last coverage", "75.0%"), ("training FLOPs", "50.0%")):
            assert heading not in cells or cells[heading][0] == wanted


def test_the_cost_of_a_training_is_that_of_its_widths(tmp_path, small):
    made = call(tmp_path, question="baseline", epochs=4, seeds=[0])
    made += call(tmp_path, question="paradigm", epochs=4, seeds=[0])[len(made) :]
    found = {(row["options"]["paradigm"], row["options"]["select"], row["options"]["flops"]): row for row in made}
    assert len(found) == len(made) == 6
    ours, thin = found["concurrent", "coverage", 0.45], found["scratch", "coverage", 0.45]
    stages, dense = found["three-stage", "coverage", 0.45], found["concurrent", "coverage", None]
    assert ours["events"] == [2, 3] and ours["flops"] <= 0.45 and len(ours["accuracies"]) == ours["epochs"] == 4
    assert 0.25 * (2 + 2 * ours["flops"]) < ours["training_flops"] < 1, "two dense epochs, one with what has grown back"
    assert thin["training_flops"] == thin["flops"] <= 0.45 and thin["active"] == {} and thin["coverage"] == []
    assert stages["training_flops"] == pytest.approx(1 + stages["flops"]) and stages["epochs"] == 8
    assert dense["training_flops"] == dense["flops"] == 1 and dense["parameters"] > ours["parameters"]


def test_refusals(tmp_path, capsys):
    for more, said in ((("--arms", "centroid"), "no arm 'centroid': there are ward"), (("--budget", "9"), "9m or 2h")):
        assert main(["ablate", "linkage", "--json", str(tmp_path / "rows"), *more]) == 1
        assert said in capsys.readouterr().err
    for text, wanted in (("90s", 90), ("9m", 540), ("2h", 7200), ("0.5m", 30)):
        assert ablate.seconds(text) == wanted
    for text in ("", "m", "-1s", "1d", "nans", "infh"):
        with pytest.raises(RepruneError, match="must be a time"):
            ablate.seconds(text)
