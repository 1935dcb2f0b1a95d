"""Make a report of the rows in bench/results: tables and pictures, as Markdown.

The tables of README and docs/ come from the same functions; they stand between the marks `<!-- table NAME -->` and
`<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from reprune_triton.bench import rows
from reprune_triton.bench.study import ablate, arms, tables
from reprune_triton.bench.study.arms import Arm
from reprune_triton.bench.study.document import Folded, Part, Picture, Section, Table, block, markdown
from reprune_triton.bench.study.tables import Results, Row
from reprune_triton.errors import RepruneError

TITLE = "reprune_triton: what was measured"
WIDTH = 120  # of a line of text
PAGES = ("README.md", "docs/performance.md", "docs/ablations.md")  # of a checkout, with tables

ABOUT = {
    "digits": "ResNet-20 on scikit-learn's handwritten digits, 40 epochs. The images are 8x8 and grey, and 360 of them "
    "are to test on: one image is 0.28 points. The paper's tables are of ResNet-56 on CIFAR-10 (93.4%) and ResNet-18 "
    "on ImageNet; accuracies here cannot be held against those, only what differs from arm to arm.",
    "fashion": "ResNet-8 on Fashion-MNIST, 5 epochs, with an event after each of the first three. The images are 28x28 "
    "and grey, 10,000 of them are to test on. The paper trains 160 epochs, on CIFAR-10.",
    "cifar": "ResNet-56 on CIFAR-10 in the setting of the paper's tables: 160 epochs, batch 256, s_bar 0.55. Epochs "
    "between events, augmentation and the schedule of the learning rate are not given there and are ours.",
}


# Title, table, what it is of, and the picture with the field that its rows need.
BENCHMARKS: tuple[tuple[str, Callable[[Results], list[Part]], str, str, str], ...] = (
    ("What pruning gives", tables.demo, "", "", ""),
    (
        "What an event costs", tables.event, "One event over the prunable layers of ResNet-50 at sparsity 0.5.",
        "event_time", "layer",
    ),
    (
        "What a training step costs", tables.step,
        "ResNet-18 with 57% of its FLOPs cut, 32 images of 224x224, float32: forward, backward and SGD with momentum. "
        "Each variant first computes the same as the masked network.",
        "step_measured", "parts_ms",
    ),
    (
        "What the host does in a step", tables.host,
        "Python, PyTorch and Triton asking for the operations of one eager step of ResNet-50 in float32, with nothing "
        "left for a device to do; all choices go to our kernels, which is the way with the most calls.",
        "", "",
    ),
    (
        "The least time of a step on an H100, computed", tables.roofline,
        "ResNet-50 at batch 256 in bfloat16: the time if every kernel reached 790 TFLOP/s or 3 TB/s, whichever it "
        "needs longer for. **No claim of a speed.**",
        "step_parts", "kinds_ms",
    ),
    (
        "The clustering of an event on an H100, estimated", tables.cost,
        "The time in which an H100 could issue the instructions of the kernels' machine code. **No claim of a speed**: "
        "a measured time will be longer.",
        "", "",
    ),
    ("Beside other libraries, in one run", tables.suites, "", "", ""),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", default="bench/results", metavar="DIR", help="the rows (default: %(default)s)")
    parser.add_argument("--out", default="bench/results/report", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--pages", nargs="*", default=PAGES, metavar="FILE", help="tables to renew (default: those of README and docs/)"
    )


def run(args: argparse.Namespace) -> None:
    results, out = load(args.results), Path(args.out)
    sections = report(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(wrapped(markdown(TITLE, sections)), encoding="utf-8")
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                (out / f"{part.name}.svg").write_text(part.svg, encoding="utf-8")
    pages = [page for page in map(Path, args.pages) if page.exists()]
    for page in pages:
        page.write_text(renewed(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    names = ", ".join(map(str, (out / "report.md", *pages)))
    Console().print(f"{names}: all tables are up to date.")


def load(folder: str | Path) -> Results:
    """Return the rows of all files of a folder by benchmark, without those of code that was not committed.

    Raises:
        RepruneError: if there are none.
    """
    found: Results = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for row in rows.read(path):
            if not row["dirty"]:  # None: there is no checkout to ask
                found.setdefault(row["benchmark"], []).append(row)
    if not found:
        raise RepruneError(f"{folder} holds no rows (*.jsonl) of committed code: run a benchmark with --json first")
    return found


def renewed(text: str, results: Results) -> str:
    """Return a page with its tables as the rows have them."""

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise RepruneError(f"a page asks for a table {name!r}: there are {', '.join(BLOCKS)}")
        inside = wrapped("\n\n".join(map(block, BLOCKS[name](results))))
        return f"<!-- table {name} -->\n{inside}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def wrapped(text: str) -> str:
    """Break paragraphs into lines, code in one piece; tables, headings and HTML stay as they are."""

    def fill(paragraph: str) -> str:
        if paragraph.startswith(("|", "#", "<", "!")):
            return paragraph
        whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), paragraph)
        return textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")

    return "\n\n".join(map(fill, text.split("\n\n")))


def report(results: Results) -> list[Section]:
    """Return all sections for which there are rows."""
    made = []
    for tier in ablate.TIERS:
        made += questions(tier, results)
    for title, tabled, about, drawing, needs in BENCHMARKS:
        parts, own = tabled(results), results.get(tabled.__name__, [])
        if not parts:
            continue
        parts.insert(0, f"{about} {environment(own)}".strip())
        drawn = [row for row in own if row.get(needs)]
        if drawn:
            parts.append(picture(drawing, title, drawn))
        made.append(Section(title, parts))
    return made


def picture(name: str, alt: str, *arguments: Any, of: str | None = None) -> Picture:
    """Draw `pictures.of(*arguments)`."""
    try:
        import reprune_triton.bench.study.pictures as pictures
    except ImportError as error:
        raise RepruneError("report draws with matplotlib: pip install 'reprune-triton[bench]'") from error

    figure = getattr(pictures, of or name)(*arguments)
    return Picture(name, alt, pictures.svg(figure))


def questions(tier: str, results: Results) -> list[Section]:
    """Return the sections of a tier: one for all questions, and one for each that has a baseline and another arm."""
    known = {ablate.key_of(row["options"]): row for row in results.get("ablate", []) if row["tier"] == tier}
    if not known:
        return []
    about = (
        f"{ABOUT[tier]} {len(known)} runs. {environment(known.values())} A CPU may have had other work at the same "
        "time: training FLOPs compare better than seconds. Most questions have the same baseline, and share its runs: "
        "their differences rise and fall together."
    )
    made = [Section(f"The method's questions on {ablate.TIERS[tier].data}", [about, *summary(tier, known)])]
    for name, question in ablate.QUESTIONS.items():
        found = answered(name, tier, known)
        if len(found) < 2 or not any(arm.baseline for arm in found):
            continue
        parts: list[Part] = [
            Table([name, *ablate.headings(name)], ablate.cells(name, found), left=("paper",)),
            ablate.notes(name),
            *([question.note] if question.note else []),
            *pictures_of(name, tier, found),
            Folded(f"Every run, and how to repeat it ({name})", runs(found)),
        ]
        made.append(Section(f"{question.text} ({question.source}; {tier})", parts, level=3))
    return made


def answered(question: str, tier: str, known: Mapping[str, Row]) -> list[Arm]:
    """Return the arms of a question that have rows."""
    seeds = sorted({row["seed"] for row in known.values()})
    return ablate.arms_of(ablate.plan(question, tier, seeds), known)


def pictures_of(question: str, tier: str, found: list[Arm]) -> list[Picture]:
    """Draw what can be drawn for a question."""
    by_arm = {arm.name: arm.rows for arm in found}
    (baseline,) = (arm.name for arm in found if arm.baseline)
    name = f"{tier}-{question}"
    made = []
    if any(len(arm.differences) > 1 for arm in found):
        alt = f"Differences in accuracy to {baseline}, with 95% confidence intervals"
        made.append(picture(f"{name}-accuracy", alt, by_arm, baseline, of="accuracy"))
    if question == "coverage":
        made.append(picture(f"{name}-over-epochs", "Coverage over the epochs, by selection", by_arm, of="coverage"))
        alt = "Coverage of every layer at every event"
        made.append(picture(f"{name}-layers", alt, by_arm[baseline], of="layer_coverage"))
    if question == "linkage":
        alt = "The share of the channels that every layer loses, by linkage"
        made.append(picture(f"{name}-layers", alt, by_arm, of="layer_sparsity"))
    if question == "baseline":
        made.append(picture(f"{name}-flops", "Accuracy against FLOPs left", by_arm, of="accuracy_flops"))
    return made


def runs(found: Iterable[Arm]) -> list[str | Table]:
    """Return the command that all runs share, and a table of every run with its own options."""
    some = [(arm.name, row) for arm in found for row in sorted(arm.rows, key=lambda row: row["seed"])]
    split = [options(row["command"]) for _, row in some]
    shared = [option for option in split[0] if all(option in own for own in split)]
    cells = [
        [
            name, str(row["seed"]), f"{row['accuracy']:.2%}", f"{row['flops']:.1%}", row["cpu"] if row["device"] ==
            "cpu" else row["device"], (row["commit"] or "unknown")[:10], row.get("note") or "",
            f"`{' '.join(option for option in own if option not in shared)}`",
        ]
        for (name, row), own in zip(some, split, strict=True)
    ]  # fmt: skip
    header = ["arm", "seed", "accuracy", "FLOPs left", "device", "commit", "note", "options"]
    return [
        f"This command, followed by the options of a run, repeats it: `{' '.join(shared)}`",
        Table(header, cells, left=("device", "commit", "note", "options")),
    ]


def options(command: str) -> list[str]:
    """Split a command into what is called and its options, each with its values."""
    found: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return [shlex.join(words) for words in found]


def environment(rows: Iterable[Row]) -> str:
    """Say where the rows were made."""
    rows = list(rows)
    places = sorted({row["cpu"] if row["device"] == "cpu" else row["device"] for row in rows})
    threads = sorted({row["threads"] for row in rows if row["device"] == "cpu"})
    by = f", {' and '.join(map(str, threads))} thread{'s' if threads != [1] else ''}" if threads else ""
    versions = sorted({f"torch {row['torch']}" for row in rows})
    commits = sorted({(row["commit"] or "unknown")[:10] for row in rows})
    made = "Computed" if all(row.get("estimated") for row in rows) else "Measured"
    return f"{made} on {', '.join(places)}{by}; {', '.join(versions)}; commit {', '.join(commits)}."


def summary(tier: str, known: Mapping[str, Row]) -> list[Part]:
    """Return a table of all questions of a tier, a line each."""
    rows = []
    for name, question in ablate.QUESTIONS.items():
        found = answered(name, tier, known)
        others = [arm for arm in found if arm.differences]
        if not others:  # without a baseline there are none
            continue
        sure = [arm.verdict for arm in others if arm.verdict != arms.TOO_FEW]
        (base,) = (arm for arm in found if arm.baseline)
        low, high = (pick(others, key=lambda arm: round(statistics.mean(arm.differences), 6)) for pick in (min, max))
        rows.append([
            f"`{name}`: {question.text}", str(len(base.rows)), arms.COLUMNS["accuracy"](base),
            f"{low.name}: {arms.interval(low.differences)}",
            f"{high.name}: {arms.interval(high.differences)}" if high is not low else "",
            f"{sum(verdict in arms.APART for verdict in sure)} of {len(sure)}" if sure else arms.TOO_FEW,
        ])  # fmt: skip
    header = ["question", "seeds", "baseline", "lowest arm, points", "highest arm, points", "arms told apart"]
    return [Table(header, rows, left=("lowest arm, points", "highest arm, points"))] if rows else []


def ablations(results: Results) -> list[Part]:
    parts: list[Part] = []
    for tier in ablate.TIERS:
        known = {ablate.key_of(row["options"]): row for row in results.get("ablate", []) if row["tier"] == tier}
        parts += [ABOUT[tier], *summary(tier, known)] if known else []
    return parts


BLOCKS: dict[str, Callable[[Results], list[Part]]] = {
    "demo": tables.demo, "event": tables.event, "step": tables.step, "host": tables.host, "roofline": tables.roofline,
    "cost": tables.cost, "ablations": ablations,
}  # fmt: skip
