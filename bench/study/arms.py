"""The statistics of a question's arms, from the rows of `ablate`: means, spreads, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

APART, TOO_FEW = ("above", "below"), "too few seeds"  # verdicts


class Arm(NamedTuple):
    """One arm and what is known of it."""

    name: str
    baseline: bool
    rows: list[dict[str, Any]]  # one for every seed
    differences: list[float]  # in accuracy, points, to the same seeds of the baseline
    overlaps: list[float]  # of the filters left, with the same seeds of the baseline
    paper: str

    @property
    def verdict(self) -> str:
        """Whether the 95% interval of three differences or more leaves out zero.

        Accuracy comes in steps of one test image, so a few seeds may have the same difference by chance: then there is
        no spread to judge it by.
        """
        if self.baseline:
            return ""
        if len(self.differences) < 3:
            return TOO_FEW
        mean, half = statistics.mean(self.differences), half_width(self.differences)
        if half == 0 and mean != 0:
            return "no spread"
        return "not told apart" if abs(mean) <= half else APART[mean < 0]

    def mean(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(map(value, self.rows))

    def has(self, field: str) -> bool:
        """Whether all rows have this field; those of an earlier version may lack it."""
        return all(field in row for row in self.rows)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _of_coverage(arm: Arm, number: Callable[[list[float]], float]) -> str:
    return _percent(arm.mean(lambda row: number(row["coverage"]))) if all(r["coverage"] for r in arm.rows) else ""


# The columns of a table. Coverage is the mean of all events: the last one hardly has a choice, as all but a few of the
# filters that are active then are kept.
COLUMNS: dict[str, Callable[[Arm], str]] = {
    "runs": lambda arm: str(len(arm.rows)),
    "accuracy": lambda arm: spread([100 * row["accuracy"] for row in arm.rows], "%"),
    "difference": lambda arm: interval(arm.differences),
    "verdict": lambda arm: arm.verdict,
    "FLOPs left": lambda arm: _percent(arm.mean(lambda row: row["flops"])),
    "channels pruned": lambda arm: _percent(arm.mean(lambda row: row["sparsity"])),
    "parameters": lambda arm: f"{arm.mean(lambda row: row['parameters']):,.0f}",
    "first coverage": lambda arm: _of_coverage(arm, lambda rates: rates[0]),
    "mean coverage": lambda arm: _of_coverage(arm, statistics.mean),
    "last coverage": lambda arm: _of_coverage(arm, lambda rates: rates[-1]),
    "overlap": lambda arm: _percent(statistics.mean(arm.overlaps)) if arm.overlaps else "",
    "epochs": lambda arm: f"{arm.mean(lambda row: row['epochs']):.0f}" if arm.has("epochs") else "",
    "training FLOPs": lambda arm: (
        _percent(arm.mean(lambda row: row["training_flops"])) if arm.has("training_flops") else ""
    ),
    "seconds": lambda arm: f"{arm.mean(lambda row: row['seconds']):.0f}",
    "paper": lambda arm: arm.paper,
}
MEANING = {
    "difference": "to the baseline, seed by seed, in points, with the 95% confidence interval",
    "verdict": "above or below the baseline if that interval leaves out zero, as one in twenty does where nothing "
    "differs",
    "mean coverage": "of an arm's own clusters, over all events, those at which hardly a filter had to go too",
    "overlap": "of the filters that this arm or the baseline has left, the share that both have",
    "training FLOPs": "multiply-adds of the whole training, relative to the dense network in one run of the schedule",
}


def overlap(some: dict[str, list[int]], others: dict[str, list[int]]) -> float:
    """Return the share of the filters in either of two networks that is in both."""
    pairs = [(set(some[name]), set(others[name])) for name in some]
    return sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs)


def spread(values: list[float], unit: str = "") -> str:
    """Format the mean, and the standard deviation if there is one."""
    more = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{unit}{more}"


def interval(values: list[float]) -> str:
    """Format the mean of differences with its 95% confidence interval by Student's t."""
    if not values:
        return ""
    mean = round(statistics.mean(values), 2) + 0.0  # no -0.00
    return f"{mean:+.2f}" + (f" ± {half_width(values):.2f}" if len(values) > 1 else "")


def half_width(values: list[float]) -> float:
    """Return half the 95% confidence interval of the mean of two values or more, by Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
