"""The tables of README and docs/, and the report, are those of the rows in bench/results/."""

import json
import re
from pathlib import Path

import pytest

from reprune_triton.bench.study import ablate, document, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in report.PAGES}
RESULTS = ROOT / "bench" / "results"
AGAIN = "run python -m reprune_triton.bench report, and commit what it writes"


@pytest.fixture(scope="module")
def results():
    return report.load(RESULTS)


@pytest.fixture
def undrawn(monkeypatch):
    """Drawings have a test of their own; and their strokes depend on the version of the library."""
    monkeypatch.setattr(report, "picture", lambda name, alt, *_, of=None: document.Picture(name, alt, "<svg></svg>"))


def test_the_pages_have_the_tables_of_the_rows(results):
    for name, text in PAGES.items():
        assert report.renewed(text, results) == text, f"the tables of {name} are out of date: {AGAIN}"
        assert all("| --- |" in block for block in re.findall(r"<!-- table.*?<!-- end -->", text, flags=re.DOTALL))
    everything = "".join(PAGES.values())
    asked = re.findall(r"<!-- table (\w+) -->", everything)
    assert sorted(asked) == sorted(report.BLOCKS) and everything.count("<!-- end -->") == len(asked)
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_report_is_that_of_the_rows(results, undrawn):
    sections = report.report(results)
    written = (RESULTS / "report" / "report.md").read_text(encoding="utf-8")
    assert report.wrapped(document.markdown(report.TITLE, sections)) == written, f"report.md is out of date: {AGAIN}"
    drawn = {part.name for section in sections for part in section.parts if isinstance(part, document.Picture)}
    there = {path.name for path in (RESULTS / "report").iterdir()}
    assert drawn and there == {"report.md", *(f"{name}.svg" for name in drawn)}


def test_the_rows_are_of_checked_results_and_of_committed_code():
    for path in RESULTS.glob("*.jsonl"):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert row["dirty"] is False and row["commit"] and row["torch"] and row["device"], path
            assert row.get("checked", True) and not row.get("extrapolated", False), path


def test_digits_are_complete(results):
    """Every question, five seeds; the text of the README leans on it."""
    known = {ablate.key_of(row["options"]): row for row in results["ablate"]}
    for question in ablate.QUESTIONS:
        found = ablate.arms_of(ablate.plan(question, "digits", range(5)), known)
        assert [len(arm.rows) for arm in found] == [5] * len(ablate.plan(question, "digits", [0])), question
