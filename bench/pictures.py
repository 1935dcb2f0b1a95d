"""The pictures of the report, by matplotlib: each function takes rows as they stand in bench/results, and draws.

Every picture has one message, units on its axes, colours that the colour-blind can tell apart, and no text that lies on
other text.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from reprune_triton.bench import arms as statistic
from reprune_triton.errors import RepruneError

Row = dict[str, Any]
ByArm = Mapping[str, Sequence[Row]]
# Okabe and Ito's, without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = "osD^vPX"
STYLE = {
    "svg.hashsalt": "reprune_triton", "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e3e3",
    "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip
# Operations of bench/roofline.py, as parts of a step.
PARTS = {
    "convolution, forward": ("conv", "conv norm"),
    "convolution, gradients": ("conv input", "conv weights", "conv backward"),
    "BatchNorm": ("norm", "norm backward"),
    "activation, addition": ("act", "act backward", "add", "add backward"),
    "optimizer": ("optimizer",),
}

_styled = matplotlib.rc_context(STYLE)  # type: ignore[arg-type]


@_styled
def svg(figure: Figure) -> str:
    """The same text for the same drawing, whenever it is made."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    # Verdana is as wide, and other fonts are narrower: text keeps its room.
    return file.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


@_styled
def png(figure: Figure) -> bytes:
    """For those who cannot show SVG; 150 dots an inch."""
    file = io.BytesIO()
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


@_styled
def coverage(by_arm: ByArm) -> Figure:
    """Coverage at every event, one line an arm: the mean of its seeds, within a standard deviation."""
    figure, axes = _axes("Coverage rises while channels go", "epoch", "clusters covered, %")
    for number, (arm, rows) in enumerate(by_arm.items()):
        rows = [row for row in rows if row["coverage"]]
        if not rows:
            continue
        epochs = [epoch for epoch in rows[0]["events"] if all(epoch in row["events"] for row in rows)]
        rates = 100 * np.array([[row["coverage"][row["events"].index(epoch)] for epoch in epochs] for row in rows])
        mean, spread = rates.mean(0), rates.std(0, ddof=1) if len(rates) > 1 else 0 * rates[0]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(epochs, mean, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=3.5, label=arm)
        axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    if not axes.lines:
        _nothing("no run has had an event")
    axes.legend(title="kept by", loc="lower right")
    return figure


@_styled
def layer_coverage(rows: Sequence[Row]) -> Figure:
    """Coverage of every layer at every event, the mean of the seeds."""
    rows = [row for row in rows if row.get("layer_coverage")]
    if not rows:
        _nothing("no row has the coverage of its layers")
    layers, epochs = list(rows[0]["layer_coverage"]), rows[0]["events"]
    values = 100 * np.mean([[row["layer_coverage"][layer] for layer in layers] for row in rows], axis=0)
    return _heat(values, layers, epochs, "Coverage of every layer at every event", "epoch", "clusters covered, %")


@_styled
def layer_sparsity(by_arm: ByArm) -> Figure:
    """The share of its channels that every layer has lost, in every arm, the mean of the seeds."""
    by_arm = {arm: [row for row in rows if row["layers"]] for arm, rows in by_arm.items()}
    by_arm = {arm: rows for arm, rows in by_arm.items() if rows}
    if not by_arm:
        _nothing("no run has pruned anything")
    layers = list(next(iter(by_arm.values()))[0]["layers"])
    values = 100 * np.array([
        [statistics.mean(row["layers"][layer] for row in rows) for rows in by_arm.values()] for layer in layers
    ])  # fmt: skip
    return _heat(values, layers, list(by_arm), "Where channels go", "", "channels pruned, %")


@_styled
def accuracy(by_arm: ByArm, baseline: str) -> Figure:
    """Differences in accuracy to the same seeds of the baseline, with their 95% confidence intervals."""
    base = {row["seed"]: row["accuracy"] for row in by_arm[baseline]}
    found = {}
    for arm, rows in by_arm.items():
        values = [100 * (row["accuracy"] - base[row["seed"]]) for row in rows if row["seed"] in base]
        if arm != baseline and len(values) > 1:
            found[arm] = values
    if not found:
        _nothing("no arm has two seeds in common with the baseline")
    title = f"Accuracy against {baseline}: mean and 95% interval; a dot is a seed"
    figure, axes = _axes(title, "difference in accuracy, points", "", height=1.3 + 0.32 * len(found))
    axes.axvline(0, color="#888888", linewidth=1)
    for at, values in enumerate(found.values()):
        mean = statistics.mean(values)
        axes.plot(values, [at + 0.25] * len(values), "o", color="#888888", markersize=3, fillstyle="none")
        half = statistic.half_width(values)
        axes.errorbar(mean, at, xerr=half, fmt="o", color=COLOURS[0], capsize=3, markersize=5)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure


@_styled
def accuracy_flops(by_arm: ByArm) -> Figure:
    """Accuracy against FLOPs left: every run a dot, every arm a mark with its standard deviations."""
    figure, axes = _axes("What is left of the accuracy, and of the FLOPs", "FLOPs left, %", "test accuracy, %")
    for number, (arm, rows) in enumerate(by_arm.items()):
        left, right = ([100 * row[key] for row in rows] for key in ("flops", "accuracy"))
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(left, right, ".", color=colour, alpha=0.35, markersize=5)
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (left, right)]
        axes.errorbar(
            statistics.mean(left), statistics.mean(right), xerr=spread[0], yerr=spread[1], capsize=2, color=colour,
            fmt=MARKERS[number % len(MARKERS)], label=arm,
        )  # fmt: skip
    if not axes.lines:
        _nothing("no runs")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_styled
def event_time(rows: Iterable[Row]) -> Figure:
    """Time of clustering one input channel against the number of its kernels: ours and the libraries'."""
    rows = [row for row in rows if row["row"] == "layer" and row["device"] == "cpu"]
    if not rows:
        _nothing("no row of a layer")
    title = f"Clustering and cut of one input channel, on one thread of an {rows[0]['cpu']}"
    figure, axes = _axes(title, "kernels (filters of the layer)", "time per input channel, ms")
    sides = (("cluster_s", "ours"), ("scipy_s", "SciPy"), ("fastcluster_s", "fastcluster"))
    for number, (key, name) in enumerate(sides):
        for kernel, marker, line in ((1, "o", "--"), (3, "s", "-")):
            times: dict[int, list[float]] = {}
            for row in rows:
                if row["kh"] == row["kw"] == kernel and row[key]:
                    times.setdefault(row["n_out"], []).append(1e3 * row[key] / (row["inputs"] or row["n_in"]))
            if times:
                sizes = sorted(times)
                axes.plot(
                    sizes, [statistics.median(times[n]) for n in sizes], line, marker=marker, markersize=4,
                    color=COLOURS[number], label=f"{name}, {kernel}x{kernel}",
                )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_styled
def step_parts(rows: Iterable[Row]) -> Figure:
    """The time of a training step by part, computed (rows of `roofline`)."""
    rows = [row for row in rows if row.get("kinds_ms")]
    if not rows:
        _nothing("no row has the parts of a step")
    part_of = {kind: part for part, kinds in PARTS.items() for kind in kinds}
    heights: dict[str, list[float]] = {part: [0.0] * len(rows) for part in (*PARTS, "the rest")}
    for number, row in enumerate(rows):
        for kind, ms in row["kinds_ms"].items():
            heights[part_of.get(kind, "the rest")][number] += ms
    title = f"{rows[0]['model']}, {rows[0]['batch']} images: computed by the roofline, not measured"
    bars = [f"{row['level']}\n{row['sparsity']:.0%} pruned" for row in rows]
    return _stacked(heights, bars, title, [row["sparsity"] for row in rows])


@_styled
def step_measured(rows: Iterable[Row]) -> Figure:
    """The time of a training step by part, measured (rows of `step`)."""
    rows = [row for row in rows if row.get("parts_ms")]
    if not rows:
        _nothing("no row has the parts of a step")
    heights = {part: [row["parts_ms"][part] for row in rows] for part in ("forward", "backward", "optimizer")}
    title = f"{rows[0]['model']}, {rows[0]['batch']} images on {rows[0]['cpu']}, measured"
    return _stacked(heights, [f"{row['net']}\n{_threads(row)}" for row in rows], title, [r["threads"] for r in rows])


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _stacked(heights: Mapping[str, Sequence[float]], bars: Sequence[str], title: str, groups: Sequence[Any]) -> Figure:
    """Bars on end, with a gap where the group changes."""
    figure, axes = _axes(title, "time of a step, ms", "", height=1.4 + 0.33 * len(bars))
    places, at = [], 0.0
    for number in range(len(bars)):
        at += 1 + 0.6 * (number > 0 and groups[number] != groups[number - 1])
        places.append(at)
    left = np.zeros(len(bars))
    for number, (part, lengths) in enumerate(heights.items()):
        if any(lengths):
            axes.barh(places, lengths, 0.8, left, color=COLOURS[number % len(COLOURS)], label=part)
            left += np.array(lengths)
    for place, whole in zip(places, left, strict=True):
        axes.text(whole, place, f" {whole:.1f}" if whole < 100 else f" {whole:.0f}", va="center")
    axes.set_yticks(places, [bar.replace("\n", ", ") for bar in bars])
    axes.set_ylim(places[-1] + 0.7, places[0] - 0.7)
    axes.set_xlim(0, 1.1 * left.max())
    axes.grid(visible=False, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _axes(title: str, x: str, y: str, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y)


def _heat(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[object], title: str, x: str, unit: str
) -> Figure:  # fmt: skip
    """A table of numbers (rows, columns) as colours, and as figures."""
    figure, axes = _axes(title, x, "", height=1.4 + 0.26 * len(rows))
    low, high = float(values.min()), float(values.max())
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=max(high, low + 1))
    for (row, column), value in np.ndenumerate(values):
        dark = value < (low + high) / 2
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="w" if dark else "k")
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=unit, pad=0.02)
    return figure


def _nothing(why: str) -> NoReturn:
    raise RepruneError(f"there is nothing to draw: {why}")


