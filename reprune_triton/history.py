"""Records of pruning events, and tables of them on the screen."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from reprune_triton.selection.event import STAGES


@dataclass(frozen=True)
class LayerEvent:
    """One layer at one event."""

    name: str
    n_out: int
    kept: int  # kept filters
    width: int  # active filters: kept and regrown
    sparsity: float  # 1 - width / n_out
    coverage: float  # covered clusters / all clusters, by the kept filters (paper, Fig. 3)
    h: float  # cut height
    flops: float  # share of this conv's dense FLOPs


@dataclass(frozen=True)
class Event:
    """One pruning event over the whole network."""

    epoch: int
    target: float | None  # the sparsity asked for, or found for the FLOPs budget; None with sparsities per layer
    sparsity: float  # share of all prunable channels that is pruned, after regrowth
    flops: float  # share of the dense network's FLOPs
    coverage: float  # covered clusters / all clusters, of all layers
    ms: float  # the whole event, by the host's clock
    stages: dict[str, float]  # ms of `event.STAGES`, on a GPU by the device's time; and of "apply", by the host's clock
    layers: tuple[LayerEvent, ...]


def show(history: Sequence[Event], console: Console) -> None:
    """Print all events, and the layers at the last one."""
    if not history:
        return
    table = functools.partial(Table, box=box.SIMPLE, padding=(0, 1, 0, 0))  # lines between columns take room
    events = table("epoch", "sparsity", "FLOPs", "coverage", "ms", title="Pruning events")
    stages = table("epoch", *STAGES, "apply", title="Milliseconds of their stages")
    for e in history:
        epoch = str(e.epoch)
        events.add_row(epoch, *(f"{share:.1%}" for share in (e.sparsity, e.flops, e.coverage)), f"{e.ms:.1f}")
        stages.add_row(epoch, *(f"{e.stages[str(column.header)]:.1f}" for column in stages.columns[1:]))
    last = history[-1]
    headings = ("layer", "filters", "kept", "active", "sparsity", "coverage", "h", "FLOPs")
    layers = table(*headings, title=f"Layers at epoch {last.epoch}")
    for x in last.layers:
        layers.add_row(
            x.name, str(x.n_out), str(x.kept), str(x.width), f"{x.sparsity:.1%}", f"{x.coverage:.1%}",
            f"{x.h:.3g}", f"{x.flops:.1%}",
        )  # fmt: skip
    for found in (events, stages, layers):
        for column in found.columns:
            column.justify, column.no_wrap = "right", True
        name = layers.columns[0]
        name.justify, name.no_wrap, name.overflow = "left", False, "fold"
        console.print(found)
