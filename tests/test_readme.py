"""The README's figures are those of the rows in bench/results/."""

import json
import statistics
from pathlib import Path

from reprune_triton.bench import ablate, arms
from reprune_triton.bench.arms import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def rows(name):
    return [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]


def line(label, *cells):
    return f"| {label} | {' | '.join(cells)} |"


def test_demo_table():
    found = [row for row in rows("demo.jsonl") if (row["model"], row["data"]) == ("resnet20", "digits")]
    arms = {arm: sorted((r for r in found if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ("dense", "pruned")}
    assert len(arms["dense"]) == len(arms["pruned"]) == 3

    def cells(key, form, scale=1.0):
        return [form.format(statistics.mean(row[key] for row in arms[arm]) * scale) for arm in arms]

    change = [(b["accuracy"] - a["accuracy"]) * 100 for a, b in zip(*arms.values(), strict=True)]
    spread = f"{statistics.mean(change):+.2f} ± {statistics.stdev(change):.2f} points"
    assert line("test accuracy, mean of 3 seeds", *cells("accuracy", "{:.2%}")) in README
    assert f"Paired difference in accuracy: {spread}" in README
    assert line("multiply-adds per image", *cells("macs", "{:,.0f}")) in README
    assert line("parameters", *cells("parameters", "{:,.0f}")) in README
    assert line("forward, batch 256, one CPU thread", *cells("latency_ms_batch256", "{:.1f} ms")) in README
    events = statistics.mean(row["event_seconds"] / row["events"] for row in arms["pruned"])
    assert line("one pruning event", "-", f"{events:.2f} s") in README
    seconds = [f"{statistics.mean(row['train_seconds'] for row in arms[arm]):.0f} s {arm}" for arm in arms]
    assert ", ".join(seconds) in README
    assert arms["dense"][0]["cpu"] in README and f"torch {arms['dense'][0]['torch']}" in README


def test_event_table():
    totals = {row["row"]: row for row in rows("event.jsonl") if row["model"] == "resnet50" and row["row"] != "layer"}
    for part, label in (("1x1", "1x1 convs"), ("KxK", "3x3 convs"), ("total", "all")):
        row = totals[part]
        assert row["checked"] and not row["extrapolated"] and row["threads"] == 1
        times = [row[key] for key in ("cluster_s", "select_s", "scipy_s", "fastcluster_s")]
        assert line(label, f"{row['problems']:,}", *(f"{seconds:.1f} s" for seconds in times)) in README
    small = next(row for row in rows("event.jsonl") if (row["model"], row["row"]) == ("resnet20", "total"))
    whole = " ".join(README.split())
    assert f"takes {totals['total']['event_s']:.1f} s there, and {small['event_s']:.2f} s for ResNet-20" in whole


def test_estimates_table():
    totals = [row for row in rows("cost.jsonl") if row["row"] == "total"]
    assert len(totals) == 4
    for row in totals:
        assert row["estimated"] and row["target"] == "sm_90" and not row["dirty"]
        layers = f"{row['layers']} {'convs' if row['rule'] == 'all' else 'prunable'}"
        assert line(row["model"], layers, f"{row['problems']:,}", f"{row['estimated_ms']:.2f} ms") in README


def test_step_table():
    found = {(row["threads"], row["net"]): row for row in rows("step.jsonl")}
    assert len(found) == 6
    for row in found.values():
        assert row["result"] == "measured" and not row["dirty"] and (row["model"], row["batch"]) == ("resnet18", 32)
    for threads in (1, 2):
        dense, *others = (found[threads, net] for net in ("dense", "narrow", "compact"))
        cells = [f"{row['ms'] / 1e3:.2f} s ({row['ratio_dense']:.2f}x)" for row in others]
        assert line(str(threads), f"{dense['ms'] / 1e3:.2f} s", *cells) in README
    spreads = [row["spread"] for row in found.values()]
    assert f"Runs are {min(spreads):.0%} to {max(spreads):.0%} apart" in README


def test_roofline_table():
    for sparsity in (0.0, 0.3, 0.51, 0.75):
        found = [row for row in rows("roofline.jsonl") if row["sparsity"] == sparsity]
        assert [row["level"] for row in found] == ["eager", "compiled", "fused", "fused 1x1"]
        assert all(row["estimated"] and not row["dirty"] and row["model"] == "resnet50" for row in found)
        cut = f"{1 - found[0]['flops_left']:.1%}"
        assert line(f"{sparsity:.0%}", cut, *(f"{row['roofline_ms']:.1f} ms" for row in found)) in README


def test_ablation_table():
    known = ablate.load(ROOT / "bench" / "results" / "ablate.jsonl")
    assert not any(row["dirty"] for row in known.values())
    lines = [text for text in README.splitlines() if text.startswith(("| linkage: ", "| coverage: ", "| random: "))]
    for question in ("linkage", "coverage", "random"):
        found = arms.of(ablate.plan(question, "digits", range(5), device="cpu"), known)
        if question == "coverage":
            assert max(found, key=lambda arm: float(COLUMNS["mean coverage"](arm).rstrip("%"))).name == "coverage"
        for arm in found:
            columns = ("accuracy", "difference", "FLOPs left", "mean coverage", "overlap")
            cells = [COLUMNS[column](arm) for column in columns]
            assert len(arm.rows) == 5
            if arm.baseline:
                own = line("the paper's: Ward, coverage, random ties", *cells).replace("|  |", "| |")
                assert own in README
            else:
                lines.remove(line(f"{question}: {arm.name}", *cells))
                mean, half = (float(number) for number in COLUMNS["difference"](arm).split(" ± "))
                assert abs(mean) < half, "every interval holds zero"
    assert not lines
