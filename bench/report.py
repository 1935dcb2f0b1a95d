"""From the rows of bench/results to a report: tables, pictures and what they say, as Markdown and as one HTML page.

    rows -> sections (tables, text, pictures) -> report.md, report.html, README.md

The README's tables are the same, between the marks `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from reprune_triton.bench import ablate, arms, findings, guard, rows
from reprune_triton.bench.arms import Arm
from reprune_triton.bench.document import Folded, Part, Picture, Section, Table, html, markdown, markdown_table
from reprune_triton.errors import RepruneError

Row = dict[str, Any]
Results = dict[str, list[Row]]  # by benchmark
TITLE = "reprune_triton: what was measured"
WIDTH = 120  # of a line of text

ABOUT = {
    "digits": "ResNet-20 on scikit-learn's handwritten digits, 40 epochs. The images are 8x8 and grey, and 360 of them "
    "are to test on: one image is 0.28 points. The paper's tables are of ResNet-56 on CIFAR-10 (93.4%) and ResNet-18 "
    "on ImageNet; accuracies here cannot be held against those, only what differs from arm to arm.",
    "fashion": "ResNet-8 on Fashion-MNIST, 5 epochs, with an event after each of the first three. The images are 28x28 "
    "and grey, 10,000 of them are to test on. The paper trains 160 epochs, on CIFAR-10.",
    "cifar": "ResNet-56 on CIFAR-10 in the setting of the paper's tables: 160 epochs, batch 256, s_bar 0.55. Epochs "
    "between events, augmentation and the schedule of the learning rate are not given there and are ours.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", default="bench/results", metavar="DIR", help="the rows (default: %(default)s)")
    parser.add_argument("--out", default="bench/results/report", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--readme", default="README.md", metavar="FILE", help="tables to renew (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    results, out = load(args.results), Path(args.out)
    sections = report(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(wrapped(markdown(TITLE, sections)), encoding="utf-8")
    (out / "report.html").write_text(html(TITLE, sections), encoding="utf-8")
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                (out / f"{part.name}.svg").write_text(part.svg, encoding="utf-8")
                (out / f"{part.name}.png").write_bytes(part.png)
    readme = Path(args.readme)
    if readme.exists():
        readme.write_text(renewed(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    Console().print(f"{out / 'report.html'}, {out / 'report.md'} and the tables of {readme} are up to date.")


def load(folder: str | Path) -> Results:
    """The rows of all files of a folder, by benchmark; those of code that was not committed are left out.

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


# ---------------------------------------------------------------------- the README


def renewed(text: str, results: Results) -> str:
    """A README with its tables as the rows have them."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise RepruneError(f"the README asks for a table {name!r}: there are {', '.join(BLOCKS)}")
        parts = [markdown_table(part) if isinstance(part, Table) else part for part in BLOCKS[name](results)]
        inside = wrapped("\n\n".join(map(str, parts)))
        return f"<!-- table {name} -->\n{inside}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def wrapped(text: str) -> str:
    """Paragraphs in lines of equal length, code in one piece; tables, headings and HTML as they are."""

    def fill(block: str) -> str:
        if block.startswith(("|", "#", "<", "!")):
            return block
        whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), block)
        return textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")

    return "\n\n".join(map(fill, text.split("\n\n")))


# ---------------------------------------------------------------------- the report


def report(results: Results) -> list[Section]:
    """All sections for which there are rows."""
    made = []
    for tier in ablate.TIERS:
        made += questions(tier, results)
    for title, block, about, drawing, needs in (
        ("What pruning gives", demo, "", "", ""),
        (
            "What an event costs", event, "One event over the prunable layers of ResNet-50 at sparsity 0.5.",
            "event_time", "layer",
        ),
        (
            "What a training step costs", step, "ResNet-18 with 57% of its FLOPs cut, 32 images of 224x224, float32: "
            "forward, backward and SGD with momentum. Each variant first computes the same as the masked network.",
            "step_measured", "parts_ms",
        ),
        (
            "The least time of a step on an H100, computed", roofline, "ResNet-50 at batch 256 in bfloat16: the time "
            "if every kernel reached 790 TFLOP/s or 3 TB/s, whichever it needs longer for. **No claim of a speed.**",
            "step_parts", "kinds_ms",
        ),
        (
            "The clustering of an event on an H100, estimated", cost, "The time in which an H100 could issue the "
            "instructions of the kernels' machine code. **No claim of a speed**: a measured time will be longer.",
            "", "",
        ),
        ("Beside other libraries, in one run", suites, "", "", ""),
    ):  # fmt: skip
        parts, rows = block(results), results.get(block.__name__, [])
        if not parts:
            continue
        parts.insert(0, f"{about} {environment(rows)}".strip())
        drawn = [row for row in rows if row.get(needs)]
        if drawn:
            parts.append(picture(drawing, title, drawn))
        made.append(Section(title, parts))
    return made


def picture(name: str, alt: str, *arguments: Any, of: str | None = None) -> Picture:
    """`pictures.of(*arguments)`, drawn."""
    try:
        import reprune_triton.bench.pictures as pictures
    except ImportError as error:
        raise RepruneError("report draws with matplotlib: pip install 'reprune-triton[bench]'") from error

    figure = getattr(pictures, of or name)(*arguments)
    return Picture(name, alt, pictures.svg(figure), pictures.png(figure))


def questions(tier: str, results: Results) -> list[Section]:
    """The ablations of a tier, as far as they were run."""
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
        columns = ablate.headings(name)
        rows = [[arm.name, *(arms.COLUMNS[column](arm) for column in columns)] for arm in found]
        parts: list[Part] = [
            Table([name, *columns], rows, left=("paper",)),
            " ".join(f"{heading[0].upper()}{heading[1:]}: {text}." for heading, text in arms.MEANING.items()
                     if heading in columns),
            " ".join([findings.verdict(found), *findings.SAYS[name]({arm.name: arm for arm in found})]),
            *pictures_of(name, tier, found),
            Folded(f"Every run, and the command that repeats it ({name})", runs(found)),
        ]  # fmt: skip
        made.append(Section(f"{question.text} ({question.source}; {tier})", parts, level=3))
    return made


def answered(question: str, tier: str, known: Mapping[str, Row]) -> list[Arm]:
    """The arms of a question that have rows."""
    seeds = sorted({row["seed"] for row in known.values()})
    return arms.of(ablate.plan(question, tier, seeds), known)


def pictures_of(question: str, tier: str, found: list[Arm]) -> list[Picture]:
    """What can be drawn of a question."""
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


def runs(found: Iterable[Arm]) -> Table:
    """Every run with the command that repeats it."""
    rows = [
        [
            arm.name, str(row["seed"]), f"{row['accuracy']:.2%}", f"{row['flops']:.1%}", row["cpu"] if row["device"] ==
            "cpu" else row["device"], (row["commit"] or "unknown")[:10], row.get("note") or "", f"`{row['command']}`",
        ]
        for arm in found for row in sorted(arm.rows, key=lambda row: row["seed"])
    ]  # fmt: skip
    header = ["arm", "seed", "accuracy", "FLOPs left", "device", "commit", "note", "command"]
    return Table(header, rows, left=("device", "commit", "note", "command"))


def environment(rows: Iterable[Row]) -> str:
    """Where the rows were made."""
    rows = list(rows)
    places = sorted({row["cpu"] if row["device"] == "cpu" else row["device"] for row in rows})
    threads = sorted({row["threads"] for row in rows if row["device"] == "cpu"})
    by = f", {' and '.join(map(str, threads))} thread{'s' if threads != [1] else ''}" if threads else ""
    versions = sorted({f"torch {row['torch']}" for row in rows})
    commits = sorted({(row["commit"] or "unknown")[:10] for row in rows})
    made = "Computed" if all(row.get("estimated") for row in rows) else "Measured"
    return f"{made} on {', '.join(places)}{by}; {', '.join(versions)}; commit {', '.join(commits)}."


# ---------------------------------------------------------------------- tables, also for the README


def summary(tier: str, known: Mapping[str, Row]) -> list[Part]:
    """All questions of a tier at a glance."""
    rows = []
    for name, question in ablate.QUESTIONS.items():
        found = answered(name, tier, known)
        others = [arm for arm in found if arm.differences]
        if not others:  # without a baseline there are none
            continue
        sure = [arm for arm in others if len(arm.differences) > 2]
        (base,) = (arm for arm in found if arm.baseline)
        low, high = (pick(others, key=lambda arm: round(statistics.mean(arm.differences), 6)) for pick in (min, max))
        rows.append([
            f"`{name}`: {question.text}", str(len(base.rows)), arms.COLUMNS["accuracy"](base),
            f"{low.name}: {arms.interval(low.differences)}",
            f"{high.name}: {arms.interval(high.differences)}" if high is not low else "",
            f"{sum(arm.apart for arm in sure)} of {len(sure)}" if sure else "too few seeds",
        ])  # fmt: skip
    header = ["question", "seeds", "baseline", "lowest arm, points", "highest arm, points", "arms told apart"]
    return [Table(header, rows, left=("lowest arm, points", "highest arm, points"))] if rows else []


def ablations(results: Results) -> list[Part]:
    parts: list[Part] = []
    for tier in ablate.TIERS:
        known = {ablate.key_of(row["options"]): row for row in results.get("ablate", []) if row["tier"] == tier}
        parts += [ABOUT[tier], *summary(tier, known)] if known else []
    return parts


def demo(results: Results) -> list[Part]:
    found = [row for row in results.get("demo", []) if (row["model"], row["data"]) == ("resnet20", "digits")]
    both = {arm: {row["seed"]: row for row in found if row["arm"] == arm} for arm in ("dense", "pruned")}
    pairs = [(both["dense"][seed], both["pruned"][seed]) for seed in sorted(both["dense"]) if seed in both["pruned"]]
    if not pairs:
        return []
    dense, pruned = zip(*pairs, strict=True)

    def line(label: str, key: str, form: str) -> list[str]:
        return [label, *(form.format(statistics.mean(row[key] for row in own)) for own in (dense, pruned))]

    change = [100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs]
    event = statistics.mean(row["event_seconds"] / row["events"] for row in pruned)
    seconds = [statistics.mean(row["train_seconds"] for row in own) for own in (dense, pruned)]
    lines = [
        line(f"test accuracy, mean of {len(pairs)} seeds", "accuracy", "{:.2%}"),
        line("multiply-adds per image", "macs", "{:,.0f}"),
        line("parameters", "parameters", "{:,.0f}"),
        line("forward, batch 256, one CPU thread", "latency_ms_batch256", "{:.1f} ms"),
        ["one pruning event", "-", f"{event:.2f} s"],
    ]
    return [
        Table(["ResNet-20 on scikit-learn's handwritten digits", "dense", "pruned"], lines),
        f"Paired difference in accuracy: {arms.interval(change)} points (95% interval, {len(pairs)} seeds; 360 test "
        f"images, one is 0.28 points). Measured on one thread of an {dense[0]['cpu']}, torch {dense[0]['torch']}; rows "
        "in `bench/results/demo.jsonl`. Images of 8x8 are too small for narrow layers to save training time: "
        f"{seconds[0]:.0f} s dense, {seconds[1]:.0f} s pruned, without the events.",
    ]


def _on_cpu(results: Results, benchmark: str) -> list[Row]:
    return [row for row in results.get(benchmark, []) if row["device"] == "cpu"]


def event(results: Results) -> list[Part]:
    found = {(row["model"], row["row"]): row for row in _on_cpu(results, "event")}
    parts = {"1x1": "1x1 convs", "KxK": "3x3 convs", "total": "all"}
    rows = [found.get(("resnet50", part)) for part in parts]
    if None in rows or ("resnet20", "total") not in found:
        return []
    cells = []
    for label, row in zip(parts.values(), rows, strict=True):
        assert row is not None
        times = (row[key] for key in ("cluster_s", "select_s", "scipy_s", "fastcluster_s"))
        cells.append([label, f"{row['problems']:,}", *(f"{seconds:.1f} s" for seconds in times)])
    header = ["layers", "clustering problems", "our clustering and cut", "selection", "SciPy, clustering alone",
              "fastcluster, clustering alone"]  # fmt: skip
    big, small = found["resnet50", "total"], found["resnet20", "total"]
    return [
        Table(header, cells),
        f"The whole event, `pruner.step()` with regrowth and all, takes {big['event_s']:.1f} s there, and "
        f"{small['event_s']:.2f} s for ResNet-20. `python -m reprune_triton.bench event --model resnet50` measures it "
        "stage by stage, after checking that every merge height, every cluster and every chosen filter is right.",
    ]


def step(results: Results) -> list[Part]:
    # What the caption says, and no other step.
    about = ("model", "batch", "size", "dtype", "result")
    found = {
        (row["threads"], row["net"]): row for row in _on_cpu(results, "step")
        if [row[key] for key in about] == ["resnet18", 32, 224, "float32", "measured"] and row["variant"] == row["net"]
        and abs(row["flops_left"] - (1.0 if row["net"] == "dense" else 0.43)) < 0.01
    }  # fmt: skip
    rows = []
    for threads in sorted({threads for threads, _ in found}):
        dense, *others = (found.get((threads, net)) for net in ("dense", "narrow", "compact"))
        if dense is not None and None not in others:
            cells = [f"{row['ms'] / 1e3:.2f} s ({row['ratio_dense']:.2f}x)" for row in others if row is not None]
            rows.append([str(threads), f"{dense['ms'] / 1e3:.2f} s", *cells])
    if not rows:
        return []
    spreads = [row["spread"] for row in found.values()]
    header = ["threads", "dense", "narrow, as it trains between events", "physically narrow, as after the last"]
    return [Table(header, rows), f"Runs are {min(spreads):.0%} to {max(spreads):.0%} apart."]


def roofline(results: Results) -> list[Part]:
    found = [row for row in results.get("roofline", []) if row["model"] == "resnet50"]
    levels = ("eager", "compiled", "fused", "fused 1x1")
    rows = []
    for sparsity in sorted({row["sparsity"] for row in found}):
        own = {row["level"]: row for row in found if row["sparsity"] == sparsity}
        if set(levels) <= set(own):
            times = [f"{own[level]['roofline_ms']:.1f} ms" for level in levels]
            rows.append([f"{sparsity:.0%}", f"{1 - own['eager']['flops_left']:.1%}", *times])
    header = ["channels pruned inside blocks", "FLOPs cut", "eager", "compiled", "`fuse`",
              "all of the backward in the 1x1 convs"]  # fmt: skip
    return [Table(header, rows)] if rows else []


def cost(results: Results) -> list[Part]:
    rows = [
        [
            row["model"], f"{row['layers']} {'convs' if row['rule'] == 'all' else 'prunable'}",
            f"{row['problems']:,}", f"{row['estimated_ms']:.2f} ms",
        ]
        for row in results.get("cost", []) if row["row"] == "total" and row["target"] == "sm_90"
    ]  # fmt: skip
    header = ["network", "layers", "clustering problems", "estimated, not measured"]
    return [Table(header, rows, left=("layers",))] if rows else []


def suites(results: Results) -> list[Part]:
    last = {(row["group"], row["side"], row["peer"]): row for row in _on_cpu(results, "suites")}
    rows = [
        [group, side, f"{1e3 * row['median_s']:.1f} ms", peer, f"{1e3 * row['peer_median_s']:.1f} ms",
         f"{row['ratio']:.2f}"]
        for (group, side, peer), row in last.items()
    ]  # fmt: skip
    if not rows:
        return []
    header = ["work", "our side", "time", "peer", "its time", "times as fast"]
    return [
        Table(header, rows, left=("our side", "peer")),
        "Medians of the process's time; `make bench` measures them again, and "
        f"fails where a ratio is more than {guard.TOLERANCE} times worse.",
    ]


BLOCKS: dict[str, Callable[[Results], list[Part]]] = {
    "demo": demo, "event": event, "step": step, "roofline": roofline, "cost": cost, "ablations": ablations,
}  # fmt: skip
