"""The report: rows become tables, pictures and text."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from reprune_triton.bench.__main__ import main
from reprune_triton.bench.study import ablate, document, report, tables
from reprune_triton.errors import RepruneError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def row_of(run, accuracy, **more):
    """A row of an ablation, made up."""
    layers = {"a": 0.25, "b": 0.75}
    return {
        "benchmark": "ablate", "tier": run.tier, "seed": run.options.seed, "options": ablate.saved(run.options),
        "accuracy": accuracy, "flops": 0.5, "sparsity": 0.5, "seconds": 1, "parameters": 7, "coverage": [0.5, 0.75],
        "events": [2, 4], "active": {"a": [0, 1, 2], "b": [3]}, "layers": layers, "epochs": 4, "training_flops": 0.5,
        "layer_coverage": {name: [0.5, 0.75] for name in layers}, "dirty": False, "device": "cpu", "cpu": "a CPU",
        "threads": 1, "torch": "2.14", "commit": "c" * 40, "command": ablate.command(run.options), "note": None,
    } | more  # fmt: skip


def study(question, accuracies, tier="digits"):
    """The arms of a question; accuracies in points by arm, one for every seed."""
    known = {}
    for run in ablate.plan(question, tier, range(10)):
        own = accuracies.get(run.arm, ())
        if run.options.seed < len(own):
            known[run.key] = row_of(run, own[run.options.seed] / 100)
    return ablate.arms_of(ablate.plan(question, tier, range(10)), known)


def verdicts(question, accuracies):
    return [arm.verdict for arm in study(question, accuracies)]


def test_the_verdict_is_that_of_the_interval():
    same = {"ward": [90, 91, 92], "single": [91, 90, 92.5], "average": [89, 92, 92]}
    assert verdicts("linkage", same) == ["", "not told apart", "not told apart"]
    apart = {"ward": [90, 91, 92], "single": [88, 89.1, 90.2], "average": [91, 92.1, 93.2]}
    assert verdicts("linkage", apart) == ["", "below", "above"]
    equal = {"ward": [90, 91, 92], "single": [90.5, 91.5, 92.5], "average": [90, 91, 92]}
    assert verdicts("linkage", equal) == ["", "no spread", "not told apart"]
    for seeds in (1, 2):
        assert verdicts("linkage", {"ward": [90] * seeds, "single": [80] * seeds}) == ["", "too few seeds"]
    found = ablate.table("linkage", "digits", study("linkage", apart))
    assert next(list(column.cells) for column in found.columns if column.header == "verdict") == ["", "below", "above"]


def test_a_run_is_repeated_by_the_shared_command_and_its_own_options():
    found = study("baseline", {"REPrune": [90, 91], "L1 norm": [90], "dense": [95]})
    line, table = report.runs(found)
    shared = report.options(line.partition("`")[2].rstrip("`"))
    rows = [row for arm in found for row in arm.rows]
    assert shared[0] == "python -m reprune_triton.train" and "--model resnet20" in shared
    for cells, row in zip(table.rows, rows, strict=True):
        own = report.options(cells[-1].strip("`"))[1:]
        assert len(own) <= 3 and f"--seed {row['seed']}" in own
        assert sorted(shared + own) == sorted(report.options(row["command"]))
    assert [list(cells[:2]) for cells in table.rows] == [
        ["REPrune", "0"], ["REPrune", "1"], ["L1 norm", "0"], ["dense", "0"]
    ]  # fmt: skip


def test_rows_of_an_earlier_version_and_arms_without_a_baseline(tmp_path):
    for question in ("until", "regrow", "paradigm"):
        planned = ablate.plan(question, "digits", [0, 1, 2])
        known = {run.key: row_of(run, 0.9) for run in planned}
        for run in planned:
            if run.baseline:
                del known[run.key]["training_flops"], known[run.key]["epochs"]
        found = ablate.arms_of(planned, known)
        cells = {column.header: list(column.cells) for column in ablate.table(question, "digits", found).columns}
        assert "" in cells["training FLOPs"] and "50.0%" in cells["training FLOPs"]
    alone = [row_of(run, 0.9) for run in ablate.plan("linkage", "digits", [0, 1, 2]) if not run.baseline]
    assert [section.title for section in report.report({"ablate": alone})] == ["The method's questions on digits"]
    for row in alone:
        row["commit"] = None
    assert "commit unknown" in report.report({"ablate": alone})[0].parts[0]


def cells_of(block, *made):
    (table, *text) = report.BLOCKS[block]({row["benchmark"]: list(made) for row in made})
    return [list(row) for row in table.rows], " ".join(text)


def test_cells_of_every_table():
    """Of made-up rows, so that a column that took another's place would show."""
    here = {"device": "cpu", "cpu": "a CPU", "torch": "2.14", "dirty": False, "commit": "c", "threads": 1}
    row = here | {"benchmark": "demo", "model": "resnet20", "data": "digits", "accuracy": 0.9, "parameters": 2000}
    row |= {"macs": 3000, "latency_ms_batch256": 4.0, "event_seconds": 0.0, "events": 0, "train_seconds": 17.0}
    pruned = {"arm": "pruned", "accuracy": 0.92, "parameters": 20, "macs": 30, "latency_ms_batch256": 1.25}
    pruned |= {"event_seconds": 1.0, "events": 4, "train_seconds": 16.0}
    rows = [row | {"arm": "dense", "seed": 0}, row | pruned | {"seed": 0}, row | pruned | {"seed": 5, "accuracy": 0.1}]
    found, text = cells_of("demo", *rows)
    assert [line[1:] for line in found] == [
        ["90.00%", "92.00%"], ["3,000", "30"], ["2,000", "20"], ["4.0 ms", "1.2 ms"], ["-", "0.25 s"],
    ]  # fmt: skip
    assert "+2.00 points" in text and "17 s dense, 16 s pruned" in text, "seed 5 has no partner"

    row = here | {"benchmark": "event", "model": "resnet50", "cluster_s": 1.0, "select_s": 2.0, "scipy_s": 3.0}
    row |= {"fastcluster_s": 4.0, "event_s": 5.0, "problems": 1234}
    rows = [row | {"row": part} for part in ("1x1", "KxK", "total")]
    found, text = cells_of("event", *rows, rows[2] | {"model": "resnet20", "event_s": 0.25})
    assert found == [[name, "1,234", "1.0 s", "2.0 s", "3.0 s", "4.0 s"] for name in ("1x1 convs", "3x3 convs", "all")]
    assert "takes 5.0 s there, and 0.25 s for ResNet-20" in text

    row = here | {"benchmark": "step", "model": "resnet18", "batch": 32, "size": 224, "dtype": "float32", "spread": 0.1}
    row |= {"result": "measured", "flops_left": 0.43, "threads": 2}
    times = {"dense": (3000.0, 1.0), "narrow": (1500.0, 2.0), "compact": (1000.0, 3.0)}
    rows = [row | {"net": n, "variant": n, "ms": ms, "ratio_dense": ratio} for n, (ms, ratio) in times.items()]
    rows[0]["flops_left"] = 1.0
    others = [rows[1] | {"flops_left": 0.1, "ms": 1.0}, rows[1] | {"dtype": "bfloat16", "ms": 1.0}]
    found, text = cells_of("step", *rows, *others)
    assert found == [["2", "3.00 s", "1.50 s (2.00x)", "1.00 s (3.00x)"]] and text == "Runs are 10% to 10% apart."

    row = here | {"benchmark": "host", "model": "resnet50", "amp": "off", "launches": 5, "host_ms": 9.0}
    old, new = ({"variant": "narrow", "ratio": ratio} for ratio in (2.0, 1.5))
    found, _ = cells_of("host", row | old, row | new, row | new | {"amp": "bf16", "ratio": 9.0})
    assert found == [["narrow", "9.0 ms", "1.50x", "5"]], "the newest"

    row = here | {"benchmark": "roofline", "model": "resnet50", "sparsity": 0.3, "flops_left": 0.75}
    levels = enumerate(("eager", "compiled", "fused", "fused 1x1"))
    found, _ = cells_of("roofline", *(row | {"level": level, "roofline_ms": 40.0 - n} for n, level in levels))
    assert found == [["30%", "25.0%", "40.0 ms", "39.0 ms", "38.0 ms", "37.0 ms"]]

    row = here | {"benchmark": "cost", "row": "total", "target": "sm_90", "model": "m", "layers": 3, "problems": 4567}
    found, _ = cells_of("cost", row | {"rule": "all", "estimated_ms": 1.5}, row | {"target": "sm_80"})
    assert found == [["m", "3 convs", "4,567", "1.50 ms"]]

    row = here | {"benchmark": "suites", "group": "g", "side": "ours", "peer": "SciPy", "ratio": 2.0}
    row |= {"median_s": 0.001, "peer_median_s": 0.002}
    assert tables.suites({"suites": [row | {"ratio": 9.0}, row]})[0].rows == [
        ["g", "ours", "1.0 ms", "SciPy", "2.0 ms", "2.00"]
    ]


def test_a_folder_of_rows_becomes_a_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    for name in ("event", "step", "roofline", "cost", "demo"):
        shutil.copy(RESULTS / f"{name}.jsonl", results)
    made = [
        row_of(run, 0.9 + 0.01 * run.options.seed + 0.001 * (run.arm == "single"))
        for question in ("linkage", "baseline") for run in ablate.plan(question, "fashion", [0, 1])
    ]  # fmt: skip
    made.append(row_of(ablate.plan("width", "digits", [0])[1], 0.1, dirty=True))
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (tmp_path / "README.md").write_text("before\n<!-- table ablations -->\noutdated\n<!-- end -->\nafter\n")
    assert main(["report", "--results", "results", "--out", "out"]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- table ablations -->\nResNet-8 on Fashion-MNIST") and "outdated" not in readme
    assert "| `linkage`: Is Ward the right linkage? | 2 | 90.50% ± 0.71 | complete: +0.00 ± 0.00 |" in readme
    assert readme.endswith("<!-- end -->\nafter\n") and "digits" not in readme, "a row of uncommitted code is no row"

    text = (tmp_path / "out" / "report.md").read_text()
    assert "### Is Ward the right linkage? (Table 5; fashion)" in text
    assert "\n| single | 1 | 91.10% | 50.0% | a CPU | cccccccccc |  | `--seed 1 --linkage single` |\n" in text
    assert ablate.QUESTIONS["linkage"].note in text
    drawn = re.findall(r"!\[.*?\]\((.*?)\.svg\)", text)
    for name in drawn:
        assert (tmp_path / "out" / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    assert len(drawn) >= 6


def test_rows_that_are_none(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "holds no rows (*.jsonl)" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"benchmark": "demo", "dirty": false}\n{"half"\n')
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert "bad.jsonl, line 2, is not a row" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"benchmark": "demo", "dirty": true}\n')
    assert main(["report", "--results", str(tmp_path)]) == 1
    (tmp_path / "bad.jsonl").write_text('{"benchmark": "other", "dirty": false}\n')
    (tmp_path / "README.md").write_text("<!-- table unknown -->\n<!-- end -->\n")
    words = ["report", "--results", str(tmp_path), "--out", str(tmp_path), "--pages", str(tmp_path / "README.md")]
    assert main(words) == 1
    assert "a table 'unknown': there are demo, event" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "reprune_triton.bench.study.pictures", None)
    with pytest.raises(RepruneError, match="report draws with matplotlib: pip install"):
        report.picture("step_parts", "", [])


def test_parts_of_a_document():
    table = document.Table(["arm", "n", "paper"], [["a|b", "1", "x"]], left=("paper",))
    text = "| arm | n | paper |\n| --- | ---: | --- |\n| a\\|b | 1 | x |"
    assert document.block(table) == text
    folded = document.Folded("All", ["line", table])
    picture = document.Picture("name", "What it shows", "<svg></svg>")
    made = document.markdown("T", [document.Section("A", ["**bold**", picture]), document.Section("B", [folded], 3)])
    assert made == (
        "# T\n\n## A\n\n**bold**\n\n![What it shows](name.svg)\n\n### B\n\n"
        f"<details><summary>All</summary>\n\nline\n\n{text}\n\n</details>\n"
    )


def test_lines_of_a_text():
    text = report.wrapped("word " * 40 + "`python -m a b c d`\n\n| " + "x" * 200 + " |")
    first, second = text.split("\n\n")
    assert max(map(len, first.split("\n"))) <= 120 and "`python -m a b c d`" in first and len(second) == 204
