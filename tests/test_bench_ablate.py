"""Ablations: every run once, an interrupted one goes on, each row has the command that repeats it."""

import argparse
import json
import shlex
import statistics

import pytest
from scipy import stats

from reprune_triton import train
from reprune_triton.bench import ablate
from reprune_triton.bench.__main__ import main
from reprune_triton.errors import RepruneError

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
    monkeypatch.setattr(train, "train", None)
    assert call(tmp_path, "--arms", "ward", "single") == made
    assert "4 runs, 4 known already" in (printed := capsys.readouterr().out) and "Table 5" in printed


def test_questions_share_the_baseline(tmp_path, small):
    made = call(tmp_path, "--arms", "ward", seeds=[0])
    assert call(tmp_path, "--arms", "72%", question="until", seeds=[0]) == made
    assert call(tmp_path, "--arms", "1", question="width", seeds=[0]) == made
    assert len(call(tmp_path, "--arms", "16", question="width", seeds=[0])) == 2


def test_the_draw_alone_can_be_another(tmp_path, small):
    arms = ["random", "random, another draw", "index"]
    one, other, index = call(tmp_path, "--arms", *arms, question="random", seeds=[0])
    assert one["active"] != other["active"] != index["active"] and abs(one["flops"] - other["flops"]) < 0.1
    assert 0 < ablate.overlap(one["active"], other["active"]) < 1 == ablate.overlap(one["active"], one["active"])


def test_a_row_of_before_an_option_was_there_still_counts(tmp_path):
    options = ablate.saved(train.recipe("digits"))
    for gone in ("prune_seed", "tie"):
        row = {"benchmark": "ablate", "options": {name: value for name, value in options.items() if name != gone}}
        (tmp_path / "rows").write_text(json.dumps(row))
        assert list(ablate.load(tmp_path / "rows")) == [ablate.key_of(options)]


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
    args = argparse.Namespace(question=question, tier=tier, seeds=[0], arms=None, data_dir=None, device="cpu",
                              threads=1, epochs=None)  # fmt: skip
    runs, baseline = ablate.plan(args)
    found = {run.arm: ablate.saved(run.options) for run in runs}
    base = found[baseline]
    assert base == ablate.saved(train.recipe(ablate.TIERS[tier].data, **ablate.TIERS[tier].changes))
    until = "72%" if tier == "digits" else "60%"
    usual = {"linkage": "ward", "until": until, "width": "1", "random": "random", "select": "coverage"}
    assert baseline == usual[question]
    assert len({json.dumps(options) for options in found.values()}) == len(found)
    for options in found.values():
        assert sum(options[key] != base[key] for key in base) <= 1


def test_differences_are_paired():
    def row(arm, seed, accuracy):
        numbers = {"accuracy": accuracy, "flops": 0.5, "sparsity": 0.5, "seconds": 1, "coverage": [0.5, 0.75]}
        numbers["active"] = {"a": [0, 1], "b": [0, seed + 1 if arm == "ward" else 9]}
        return arm, numbers | {"seed": seed}

    found = [row("ward", s, 0.9 + s / 100) for s in range(3)] + [row("single", s, 0.89 + s / 50) for s in range(4)]
    table = ablate.table("linkage", "digits", "ward", found)
    cells = [list(column.cells) for column in table.columns]
    differences = [-1, 0, 1]  # in points; seed 3 has no partner
    half = stats.t.ppf(0.975, 2) * statistics.stdev(differences) / 3**0.5
    assert cells[0] == ["ward", "single"] and cells[1] == ["3", "4"]
    assert cells[3] == ["", f"+0.00 ± {half:.2f}"] and cells[2][0] == "91.00% ± 1.00" and cells[6] == ["62.5%"] * 2
    assert cells[7] == ["", "60.0%"], "of five filters in either, three are in both"
    assert ablate.interval([1.5]) == "+1.50" and ablate.interval([]) == ""


def test_refusals(tmp_path, capsys):
    for more, said in ((("--arms", "centroid"), "no arm 'centroid': there are ward"), (("--budget", "9"), "9m or 2h")):
        assert main(["ablate", "linkage", "--json", str(tmp_path / "rows"), *more]) == 1
        assert said in capsys.readouterr().err
    for text, wanted in (("90s", 90), ("9m", 540), ("2h", 7200), ("0.5m", 30)):
        assert ablate.seconds(text) == wanted
    for text in ("", "m", "-1s", "1d"):
        with pytest.raises(RepruneError, match="must be a time"):
            ablate.seconds(text)
