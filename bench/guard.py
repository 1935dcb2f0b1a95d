"""Guard the time of our side of some work, as a ratio to a peer's in the same run (`make bench`).

Times differ from machine to machine, and so do ratios, but less. One that is worse than the recorded one by more than
TOLERANCE is a regression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from reprune_triton.bench import rows, terminal

TOLERANCE = 1.3  # the ratios of one code differ by up to 1.23 from run to run, beside other work
Recorded = dict[tuple[str, str, str], float]  # group, side, peer: the ratio


class Timed(NamedTuple):
    """One side of some work."""

    group: str
    side: str
    peer: bool  # not ours
    median: float  # seconds of the process
    rounds: int


class Ratio(NamedTuple):
    """The speed of our side, in times of a peer's."""

    ours: Timed
    peer: Timed

    @property
    def value(self) -> float:
        return self.peer.median / self.ours.median

    @property
    def key(self) -> tuple[str, str, str]:
        return self.ours.group, self.ours.side, self.peer.side


def ratios(found: Sequence[Timed]) -> list[Ratio]:
    """Return the ratios of all our sides to all peers in the same work."""
    return [
        Ratio(ours, peer) for ours in found if not ours.peer for peer in found if peer.peer and peer.group == ours.group
    ]


def row(ratio: Ratio) -> dict[str, Any]:
    """Return the row for bench/results/, without the environment."""
    group, side, peer = ratio.key
    return {
        "benchmark": "suites", "group": group, "side": side, "peer": peer, "ratio": ratio.value,
        "median_s": ratio.ours.median, "peer_median_s": ratio.peer.median, "rounds": ratio.ours.rounds,
        "command": "make bench",
    }  # fmt: skip


def recorded(path: str | Path) -> Recorded:
    """Return the last ratio of each kind in a file of rows; none if there is no file."""
    return {(row["group"], row["side"], row["peer"]): row["ratio"] for row in rows.read(path)}


def regressions(found: Iterable[Ratio], before: Recorded) -> list[str]:
    """Return a sentence for every ratio that has got worse."""
    return [
        f"{ratio.ours.group}: {ratio.ours.side} was {before[ratio.key]:.2f} times as fast as {ratio.peer.side} and now "
        f"is {ratio.value:.2f} times."
        for ratio in found
        if ratio.key in before and ratio.value * TOLERANCE < before[ratio.key]
    ]


def table(found: Iterable[Ratio], before: Recorded) -> Table:
    columns = ("work", "our side", "time", "peer", "its time", "times as fast", "recorded")
    made = terminal.table("Our side and its peers, median times of this run", columns, ("work", "our side", "peer"))
    for ratio in found:
        was = before.get(ratio.key)
        made.add_row(
            ratio.ours.group, ratio.ours.side, f"{1e3 * ratio.ours.median:.2f} ms", ratio.peer.side,
            f"{1e3 * ratio.peer.median:.2f} ms", f"{ratio.value:.2f}", f"{was:.2f}" if was else "",
        )  # fmt: skip
    return made
