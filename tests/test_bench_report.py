"""The report: rows become tables, text and a page, and the text says what the rows say."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from reprune_triton.bench import ablate, arms, document, findings, report
from reprune_triton.bench.__main__ import main
from reprune_triton.errors import RepruneError

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def row_of(run, accuracy, **more):
    """A row of an ablation, made up."""
    layers = {"a": 0.25, "b": 0.75}
    return {
        "benchmark": "ablate", "tier": run.tier, "seed": run.options.seed, "options": ablate.saved(run.options),
        "accuracy": accuracy, "flops": 0.5, "sparsity": 0.5, "seconds": 1, "parameters": 7, "coverage": [0.5, 0.75],
        "events": [2, 4], "active": {"a": [0, 1, 2], "b": [3]}, "layers": layers, "epochs": 4, "training_flops": 0.5,
        "layer_coverage": {name: [0.5, 0.75] for name in layers}, "dirty": False, "device": "cpu", "cpu": "a CPU",
        "threads": 1, "torch": "2.14", "commit": "c" * 40, "command": "python -m x <&>", "note": None,
    } | more  # fmt: skip


def study(question, accuracies, tier="digits"):
    """The arms of a question; accuracies in points by arm, one for every seed."""
    known = {}
    for run in ablate.plan(question, tier, range(10)):
        own = accuracies.get(run.arm, ())
        if run.options.seed < len(own):
            known[run.key] = row_of(run, own[run.options.seed] / 100)
    return arms.of(ablate.plan(question, tier, range(10)), known)


def test_the_verdict_is_that_of_the_intervals():
    same = study("linkage", {"ward": [90, 91, 92], "single": [91, 90, 92.5], "average": [89, 92, 92]})
    text = findings.verdict(same)
    assert text.startswith("**No arm can be told from ward**") and "±2.48 to ±2.59 points" in text
    apart = study("linkage", {"ward": [90, 91, 92], "single": [88, 89.1, 90.2], "average": [91, 91, 91.5]})
    text = findings.verdict(apart)
    assert text.startswith("**single is 1.90 ± 0.25 points below ward** (95% interval, 3 seeds). The other intervals")
    assert "Of 2 such intervals" in text and "10% of studies" in text
    above = study("paradigm", {"concurrent": [90, 91, 92], "three-stage": [91, 92.1, 93.2]})
    assert findings.verdict(above) == "**three-stage is 1.10 ± 0.25 points above concurrent** (95% interval, 3 seeds)."
    alike = study("linkage", {"ward": [90, 91, 92], "single": [90.5, 91.5, 92.5], "average": [91, 91, 91.5]})
    text = findings.verdict(alike)
    assert text.startswith("**No arm can be told from ward**: every other 95% interval holds zero.")
    assert text.endswith("single differs by +0.50 points in every seed: there is no spread to judge that by.")
    for seeds in (1, 2):
        few = study("linkage", {"ward": [90] * seeds, "single": [80] * seeds})
        assert findings.verdict(few).startswith("With fewer than three seeds")


def test_every_question_has_something_to_say():
    for question in ablate.QUESTIONS:
        names = [run.arm for run in ablate.plan(question, "digits", [0])]
        found = study(question, {name: [90 + k, 91, 92] for k, name in enumerate(names)})
        said = " ".join(findings.SAYS[question]({arm.name: arm for arm in found}))
        assert said.endswith(".") and "nan" not in said
        findings.SAYS[question]({arm.name: arm for arm in found[:2]})  # of a study that is not finished
    found = study("linkage", {"ward": [90, 91], "single": [91, 93], "complete": [80, 81], "average": [70, 80]})
    said = " ".join(findings.SAYS["linkage"]({arm.name: arm for arm in found}))
    assert "Ward comes second of 4" in said and "`b` loses most of its channels (75%), `a` least (25%)" in said
    for three, ahead in ((92, "here three stages have the higher mean"), (88, "here it has the higher mean")):
        found = study("paradigm", {"concurrent": [90, 91], "three-stage": [three, three]})
        assert ahead in " ".join(findings.SAYS["paradigm"]({arm.name: arm for arm in found}))
    found = study("coverage", {"coverage": [90, 91], "random": [91, 93]})
    for arm, rates in zip(found, ([0.6, 0.9], [0.5, 0.95]), strict=True):
        for row in arm.rows:
            row["coverage"] = rates
    said = " ".join(findings.SAYS["coverage"]({arm.name: arm for arm in found}))
    assert "from 60% at the first event to 90% at the last, and is higher there in 2 of 2 runs" in said
    assert "greedy coverage covers 75.0%, more than any other (random: 72.5%)" in said


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

    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "### Is Ward the right linkage? (Table 5; fashion)" in text and "`python -m x <&>`" in text
    assert "<code>python -m x &lt;&amp;&gt;</code>" in page and "**" not in document.without_pictures(page)
    for name in re.findall(r"!\[.*?\]\((.*?)\.svg\)", text):
        assert (tmp_path / "out" / f"{name}.svg").read_text().lstrip().startswith("<?xml")
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<svg") == text.count(".svg)") >= 6
    assert not re.search(r'(src|href)="(?!#)', document.without_pictures(page)), "the page needs no other file"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "no two drawings share a name"
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert used and set(used) <= set(ids)


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
    words = ["report", "--results", str(tmp_path), "--out", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    assert main(words) == 1
    assert "a table 'unknown': there are demo, event" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "reprune_triton.bench.pictures", None)
    with pytest.raises(RepruneError, match="report draws with matplotlib: pip install"):
        report.picture("step_parts", "", [])


def test_tables_of_a_document():
    table = document.Table(["arm", "n", "paper"], [["a|b", "1", "x"]], left=("paper",))
    assert document.markdown_table(table) == "| arm | n | paper |\n| --- | ---: | --- |\n| a\\|b | 1 | x |"
    page = document.html("T", [document.Section("A & b", [table, "**bold** `x < y` [here](there)"])])
    assert '<td>a|b</td><td class="n">1</td><td>x</td>' in page and '<h2 id="a-b">A &amp; b</h2>' in page
    assert '<strong>bold</strong> <code>x &lt; y</code> <a href="there">here</a>' in page


def test_lines_of_a_text():
    text = report.wrapped("word " * 40 + "`python -m a b c d`\n\n| " + "x" * 200 + " |")
    first, second = text.split("\n\n")
    assert max(map(len, first.split("\n"))) <= 120 and "`python -m a b c d`" in first and len(second) == 204
