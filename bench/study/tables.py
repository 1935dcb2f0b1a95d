"""Make tables of rows, with the sentences that belong to them, for the report, the README and docs/."""

from __future__ import annotations

import statistics
from typing import Any

from reprune_triton.bench import guard
from reprune_triton.bench.study import arms
from reprune_triton.bench.study.document import Part, Table

Row = dict[str, Any]
Results = dict[str, list[Row]]  # by benchmark


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


def host(results: Results) -> list[Part]:
    some = (row for row in _on_cpu(results, "host") if (row["model"], row["amp"]) == ("resnet50", "off"))
    found = {row["variant"]: row for row in some}
    rows = [
        [row["variant"], f"{row['host_ms']:.1f} ms", f"{row['ratio']:.2f}x", str(row["launches"])]
        for row in found.values() if row["ratio"] is not None
    ]  # fmt: skip
    return [Table(["step", "host", "to dense", "launches of our kernels"], rows)] if rows else []


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
