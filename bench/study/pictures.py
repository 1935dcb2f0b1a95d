"""Draw the pictures of the report, by matplotlib, from rows as they stand in bench/results.

Every picture has one message, units on its axes, colours that the colour-blind can tell apart, and no text that lies on
other text. Rows that lack what a picture shows are left out; where none is left, that is an error.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reprune_triton.bench.study import arms as statistic
from reprune_triton.errors import RepruneError

Row = dict[str, Any]
ByArm = Mapping[str, Sequence[Row]]
Key = TypeVar("Key", bound=Hashable)
# Okabe and Ito's, without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")
WIDTH, LETTER = 7.2, 0.07  # inches: of a picture, and of a letter of 9 points
STYLE: dict[str, Any] = {
    "svg.hashsalt": "reprune_triton", "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e3e3",
    "axes.axisbelow": True, "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip
# Operations of `estimate.roofline`, as parts of a step. What is in none of them is "the rest", and is drawn too.
PARTS = {
    "convolution, forward": ("conv", "conv norm"),
    "convolution, gradients": ("conv input", "conv weights", "conv backward"),
    "BatchNorm": ("norm", "norm backward"),
    "activation, addition": ("act", "act backward", "add", "add backward"),
    "optimizer": ("optimizer",),
}
NOT_BUILT = ("fused 1x1",)  # levels of `estimate.roofline` that nothing here reaches

_styled = matplotlib.style.context(["default", STYLE])  # whatever the user's own settings are


@_styled
def svg(figure: Figure) -> str:
    """Return the same text for the same drawing, whenever it is made."""
    if figure.get_layout_engine() is not None:  # laid out once: every further time would move things by a hair
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    # Verdana is as wide, and other fonts are narrower: text keeps its room.
    return file.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


@_styled
def coverage(by_arm: ByArm) -> Figure:
    """Draw coverage at every event, one line an arm: the mean of its seeds, within a standard deviation."""
    figure, (axes,) = _panels()
    axes.set(title="Coverage at every event: mean, and one standard deviation over the seeds", xlabel="epoch")
    axes.set_ylabel("clusters covered, %")
    for number, (arm, rows) in enumerate(_having(by_arm, "events", "coverage").items()):
        if not (epochs := _epochs(rows)):
            continue
        rates = 100 * np.array([[row["coverage"][row["events"].index(epoch)] for epoch in epochs] for row in rows])
        mean, spread = rates.mean(0), rates.std(0, ddof=1) if len(rates) > 1 else 0 * rates[0]
        look = _look(number)
        axes.plot(epochs, mean, markersize=4, label=arm, **look)
        axes.fill_between(epochs, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)
    if not axes.lines:
        _nothing("no run has had an event")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _legend(axes)
    return figure


@_styled
def layer_coverage(rows: Sequence[Row]) -> Figure:
    """Draw coverage of every layer at every event, the mean of the seeds."""
    rows = _having({"": rows}, "events", "layer_coverage").get("", [])
    if not rows or not (epochs := _epochs(rows)):
        _nothing("no row has the coverage of its layers, or none at an event that all have")
    values = _means(rows, "layer_coverage", lambda row, rates: [rates[row["events"].index(epoch)] for epoch in epochs])
    title = "Coverage of every layer at every event"
    return _heat(100 * np.array(list(values.values())), list(values), epochs, title, "epoch", "clusters covered, %")


@_styled
def layer_sparsity(by_arm: ByArm) -> Figure:
    """Draw the share of its channels that every layer has lost, in every arm, the mean of the seeds."""
    shares = {arm: _means(rows, "layers", lambda _, share: [share]) for arm, rows in _having(by_arm, "layers").items()}
    if not shares:
        _nothing("no run has pruned anything")
    layers = list(dict.fromkeys(layer for own in shares.values() for layer in own))
    values = np.array([[float(own[layer][0]) if layer in own else np.nan for own in shares.values()]
                       for layer in layers])  # fmt: skip
    return _heat(100 * values, layers, list(shares), "Where channels go", "", "channels pruned, %")


@_styled
def accuracy(by_arm: ByArm, baseline: str) -> Figure:
    """Draw differences in accuracy to the same seeds of the baseline, with their 95% confidence intervals.

    A single seed has no interval.
    """
    known = _having(by_arm, "seed", "accuracy")
    base = {row["seed"]: row["accuracy"] for row in known.get(baseline, ())}
    found = {}
    for arm, rows in known.items():
        values = [100 * (row["accuracy"] - base[row["seed"]]) for row in rows if row["seed"] in base]
        if arm != baseline and values:
            found[arm] = values
    if not found:
        _nothing(f"no arm has a seed in common with {baseline}, the baseline")
    figure, (axes,) = _panels(1.3 + 0.34 * len(found))
    axes.set_xlabel("difference in accuracy, points")
    axes.axvline(0, color="#888888", linewidth=1)
    for at, values in enumerate(found.values()):
        half = statistic.half_width(values) if len(values) > 1 else None
        fill = COLOURS[0] if half is not None else "white"
        axes.errorbar(
            statistics.mean(values), at, xerr=half, fmt="o", color=COLOURS[0], markerfacecolor=fill, capsize=3,
            markersize=5,
        )  # fmt: skip
        if half is not None:  # below the interval, which would hide them
            axes.plot(values, [at + 0.25] * len(values), "o", color="#888888", markersize=3, fillstyle="none")
    names = [arm if len(values) > 1 else f"{arm} (1 seed)" for arm, values in found.items()]
    axes.set_yticks(range(len(found)), names)
    _title(axes, f"Accuracy against {baseline}: mean and 95% interval; a ring is a seed")
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure


@_styled
def accuracy_flops(by_arm: ByArm) -> Figure:
    """Draw accuracy against FLOPs left: every run a dot, every arm a mark with its standard deviations."""
    figure, (axes,) = _panels()
    axes.set(title="Accuracy and FLOPs left: a dot is a run, a mark the mean with one standard deviation")
    axes.set(xlabel="FLOPs left, %", ylabel="test accuracy, %")
    for number, (arm, rows) in enumerate(_having(by_arm, "flops", "accuracy").items()):
        left, right = ([100 * row[key] for row in rows] for key in ("flops", "accuracy"))
        look = _look(number) | {"linestyle": "none"}
        axes.plot(left, right, ".", color=look["color"], alpha=0.35, markersize=5)
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (left, right)]
        axes.errorbar(
            statistics.mean(left), statistics.mean(right), xerr=spread[0], yerr=spread[1], capsize=2, label=arm, **look
        )
    if not axes.lines:
        _nothing("no runs")
    _legend(axes)
    return figure


@_styled
def event_time(rows: Iterable[Row]) -> Figure:
    """Draw the time of one clustering problem against its number of points, ours and the libraries' (rows of `event`).

    What was measured elsewhere or otherwise has its own panel.
    """
    rows = [row for row in rows if row.get("row") == "layer"]
    if not rows:
        _nothing("no row of a layer")
    kinds = _grouped(rows, lambda row: (row["linkage"], row["impl"], _place(row), row["cpu"]))
    figure, panels = _panels(*[3.8] * len(kinds))
    for axes, ((linkage, impl, place, cpu), own) in zip(panels, kinds.items(), strict=True):
        axes.set(xlabel="kernels (filters of the layer)", ylabel="time per input channel, ms")
        series: dict[tuple[str, tuple[int, int]], dict[int, list[float]]] = {}
        for row in own:
            ours = "ours" if row["algorithm"] == "auto" else f"ours, {row['algorithm']}"
            times = {ours: row["cluster_s"], "SciPy": row.get("scipy_s"), "fastcluster": row.get("fastcluster_s")}
            for side, spent in times.items():
                if spent:
                    of_size = series.setdefault((side, (row["kh"], row["kw"])), {})
                    of_size.setdefault(row["n_out"], []).append(1e3 * spent / row["n_in"])
        sides, kernels = list(dict.fromkeys(side for side, _ in series)), sorted({kernel for _, kernel in series})
        for (side, kernel), medians in sorted(series.items(), key=lambda item: (sides.index(item[0][0]), item[0][1])):
            look, shape = _look(sides.index(side)), _look(kernels.index(kernel))
            axes.plot(
                sorted(medians), [statistics.median(medians[n]) for n in sorted(medians)], color=look["color"],
                markersize=4, marker=shape["marker"], linestyle=LINES[kernels.index(kernel) % len(LINES)],
                label=f"{side}, {kernel[0]}x{kernel[1]}",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _legend(axes)
        others = " and ".join(side for side in sides if not side.startswith("ours"))
        title = f"Clustering ({linkage}) and cut of one input channel"
        title += "; the others without the cut" if others else ""
        there = f"; {others}: 1 thread of {cpu}" if others and place != f"1 thread of {cpu}" else ""
        _title(axes, title, f"Ours: {impl}, {place}{there}" if there else f"{place}; ours: {impl}")
    return figure


@_styled
def step_parts(rows: Iterable[Row]) -> Figure:
    """Draw the computed time of a step by part (rows of `roofline`). Every model, batch and device has a panel."""
    part_of = {kind: part for part, kinds in PARTS.items() for kind in kinds}

    def parts(row: Row) -> dict[str, float]:
        found = dict.fromkeys((*PARTS, "the rest"), 0.0)
        for kind, ms in row["kinds_ms"].items():
            found[part_of.get(kind, "the rest")] += ms
        return found

    def title(row: Row) -> str:
        limits = row["ceilings"]
        how = "assumed of" if limits["assumed"] else "measured on"
        return (
            f"{'Computed: roofline, not measured' if row['estimated'] else 'Measured'}\n{row['model']}, "
            f"{row['batch']} images of {row['size']}x{row['size']}; {limits['flops'] / 1e12:.4g} TFLOP/s and "
            f"{limits['bandwidth'] / 1e12:.3g} TB/s, {how} {limits['name']}"
        )

    def bar(row: Row) -> str:
        return f"{row['level']}{' (not built)' if row['level'] in NOT_BUILT else ''}, {row['sparsity']:.0%} pruned"

    last = {(title(row), bar(row)): row for row in rows if row.get("kinds_ms")}  # computed again: the same, or mended
    found = sorted(last.values(), key=lambda row: row["sparsity"])
    return _stacked(found, parts, bar, title, lambda row: row["sparsity"])


@_styled
def step_measured(rows: Iterable[Row]) -> Figure:
    """Draw the measured time of a step by part (rows of `step`). Every model, batch and device has a panel."""
    names = ("forward", "backward", "optimizer")
    return _stacked(
        [row for row in rows if row.get("parts_ms")],
        lambda row: {name: row["parts_ms"][name] for name in names},
        lambda row: f"{row['net']}, {_threads(row)}",
        lambda row: f"{row['model']}, {row['batch']} images on {_device(row)}, measured",
        lambda row: row["threads"],
    )


def _stacked(
    rows: Sequence[Row], parts: Callable[[Row], dict[str, float]], bar: Callable[[Row], str],
    title: Callable[[Row], str], group: Callable[[Row], Any],
) -> Figure:  # fmt: skip
    """Draw a panel for every title; a bar for every row, with a gap where the group changes."""
    if not rows:
        _nothing("no row has the parts of a step")
    kinds = _grouped(rows, title)
    figure, panels = _panels(*[1.4 + 0.33 * len(own) for own in kinds.values()])
    for axes, (name, own) in zip(panels, kinds.items(), strict=True):
        places, at = [], 0.0
        for row, before in zip(own, [own[0], *own], strict=False):
            at += 1 + 0.6 * (group(row) != group(before))
            places.append(at)
        left = np.zeros(len(own))
        for number, part in enumerate(parts(own[0])):
            lengths = np.array([parts(row)[part] for row in own])
            if lengths.any():
                axes.barh(places, lengths, 0.8, left, color=COLOURS[number % len(COLOURS)], label=part)
                left += lengths
        for place, whole in zip(places, left, strict=True):
            text = f"{whole:.1f}" if whole < 100 else f"{whole:.0f}"
            axes.annotate(text, (whole, place), (3, 0), textcoords="offset points", va="center")
        axes.set_xlabel("time of a step, ms")
        axes.set_yticks(places, [bar(row) for row in own])
        _title(axes, *name.splitlines())
        axes.set_ylim(places[-1] + 0.7, places[0] - 0.7)
        axes.set_xlim(0, 1.12 * left.max())
        axes.grid(visible=False, axis="y")
        _legend(axes)
    return figure


def _heat(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[object], title: str, x: str, unit: str
) -> Figure:  # fmt: skip
    """Draw a table of numbers (rows, columns) as colours, and as figures where there is room. NaN: there is none."""
    labels = [str(column) for column in columns]
    longest = max(map(len, labels))
    room = (WIDTH - 1.1 - LETTER * max(map(len, rows))) / len(columns)  # of a column, beside names and colours
    shown = range(0, len(labels), math.ceil(0.18 / room))  # every one, unless they are many
    aslant = LETTER * (longest + 1) > room * shown.step
    figure, (axes,) = _panels(max(1.5, 0.26 * len(rows)) + 0.9 + aslant * 0.65 * LETTER * longest)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#eeeeee")
    image = axes.imshow(values, cmap=colours, aspect="auto", vmin=low, vmax=max(high, low + 1))
    for (row, column), value in np.ndenumerate(values):
        if room > 0.22 and not np.isnan(value):
            dark = value < (low + high) / 2
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="w" if dark else "k")
    axes.set_xticks(shown, [labels[number] for number in shown])
    if aslant:
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(title=title, xlabel=x)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=unit, pad=0.02)
    return figure


def _panels(*heights: float) -> tuple[Figure, list[Axes]]:
    """Make panels one below the other; heights in inches."""
    heights = heights or (3.8,)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(grid[:, 0])


def _look(number: int) -> dict[str, Any]:
    """Return colour and marker of a line; no question has more arms than there are."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _legend(axes: Axes) -> None:
    """Put the legend beside the picture, where nothing is below it."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _title(axes: Axes, *texts: str) -> None:
    """Set a title in lines that do not run out of the picture; they begin where the names beside the axes end."""
    beside = max((len(label.get_text()) for label in axes.get_yticklabels()), default=0)
    lines = [line for text in texts for line in textwrap.wrap(text, int((WIDTH - 0.6 - LETTER * beside) / 0.075))]
    axes.set_title("\n".join(lines))


def _having(by_arm: ByArm, *fields: str) -> dict[str, list[Row]]:
    """Return the rows that have all of these fields, and the arms that have such rows."""
    found = {
        arm: [row for row in rows if all(row.get(field) not in (None, [], {}) for field in fields)]
        for arm, rows in by_arm.items()
    }  # fmt: skip
    return {arm: rows for arm, rows in found.items() if rows}


def _epochs(rows: Sequence[Row]) -> list[int]:
    """Return the epochs after which all runs had an event."""
    return [epoch for epoch in rows[0]["events"] if all(epoch in row["events"] for row in rows)]


def _means(rows: Sequence[Row], field: str, numbers: Callable[[Row, Any], Any]) -> dict[str, np.ndarray]:
    """Return the mean of `numbers` over the rows, for every layer that all of them have."""
    layers = [layer for layer in rows[0][field] if all(layer in row[field] for row in rows)]
    return {layer: np.mean([numbers(row, row[field][layer]) for row in rows], axis=0) for layer in layers}


def _grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _device(row: Row) -> str:
    return str(row["cpu"] if row.get("device", "cpu") == "cpu" else row["device"])


def _place(row: Row) -> str:
    return f"{_threads(row)} of {row['cpu']}" if row["device"] == "cpu" else str(row["device"])


def _nothing(why: str) -> NoReturn:
    raise RepruneError(f"there is nothing to draw: {why}")
