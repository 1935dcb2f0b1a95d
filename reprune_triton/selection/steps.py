"""The steps of one pruning event over some layers of a network, by the reference and by Triton.

    layers -> cluster -> level -> labels -> cover -> kept filters

Both classes have the same methods, which take and give the same things. With Triton every step is launches alone, and
nothing waits for the device; the reference runs wherever its tensors are.

A process may cluster a share of the problems and choose the filters of some layers. Between the steps the processes put
their results together: levels by the maximum, all others by the sum, as what is not a process's own is 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from reprune_triton.errors import RepruneError
from reprune_triton.selection import reference, rng
from reprune_triton.selection.problems import (
    Clusters,
    Layer,
    Merges,
    check_finite,
    check_indices,
    scale_of,
    working_dtype,
)

if TYPE_CHECKING:
    from reprune_triton.kernels.clustering.launch import Report


class Work(NamedTuple):
    """What of an event is to be done: the arguments of `launch.prepare`."""

    layers: Sequence[Layer]
    linkage: str = "ward"
    algorithm: str = "auto"  # of Triton
    shares: Sequence[tuple[int, int]] | None = None  # per layer the problems to cluster here; None: all
    chosen: Sequence[int] | None = None  # layers whose filters are chosen here; None: all
    seeds: Sequence[tuple[int, int]] | None = None  # per layer: of the ties and of the draw

    @property
    def points(self) -> int:
        return sum(layer.n * layer.columns for layer in self.layers)

    @property
    def filters(self) -> int:
        return sum(len(layer.weight) for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device


def blank_level(work: Work, by_triton: bool) -> Tensor:
    """Of a process that could not begin: what it gives to the maximum."""
    if by_triton:
        from reprune_triton.kernels.clustering import table

        return torch.zeros(len(work.layers), table.REPORT.value, dtype=torch.int32, device=work.device)
    return torch.full((len(work.layers),), -1.0, dtype=torch.float64, device=work.device)


def blank_labels(work: Work) -> Tensor:
    """... and to the sum of labels."""
    return torch.zeros(work.points, dtype=torch.int32, device=work.device)


def by_score(work: Work, labels: Tensor, keep: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """What `Steps.cover` returns, of the filters with the largest scores (filters,) instead; the lowest on ties.

    labels: (points,) int32, clusters at the cut. Nothing here waits for the device.
    """
    kept = torch.zeros(work.filters, dtype=torch.int32, device=work.device)
    totals = torch.zeros(len(work.layers), 2, dtype=torch.int32, device=work.device)
    start = first = 0
    for number, layer in enumerate(work.layers):
        points, n_out = layer.n * layer.columns, len(layer.weight)
        if work.chosen is None or number in work.chosen:
            own = labels[start : start + points].view(layer.columns, layer.n).long()
            active = torch.arange(n_out, device=kept.device) if layer.filters is None else layer.filters.long()
            order = score[first : first + n_out][active].argsort(descending=True, stable=True)
            taken = torch.empty_like(order, dtype=torch.int32)  # of the active filters, as the labels are
            taken[order] = (torch.arange(len(order), device=kept.device) < keep[number]).int()
            kept[first + active] = taken
            for column, those in enumerate((taken, torch.ones_like(taken))):  # clusters that any of them is in
                found = torch.zeros_like(own, dtype=torch.int32).scatter_reduce(1, own, those.expand_as(own), "amax")
                totals[number, column] = found.sum()
        start, first = start + points, first + n_out
    return kept, totals


class Steps(Protocol):
    """What both have in common. `cluster` comes first, then one after another; L layers."""

    def cluster(self) -> None:
        """Cluster this process's share of the problems."""

    def level(self, keep: Tensor) -> Tensor:
        """The height of the cut of every layer that leaves each problem at most keep[layer] (L,) int32 clusters, in
        numbers of the implementation's own, whose maximum over all processes is the level of the whole layer. What is
        written into them goes on to the next steps."""

    def labels(self) -> Tensor:
        """Clusters at the cut: (points,) int32, problem after problem; 0 for the shares of others."""

    def membership(self, labels: Tensor) -> None:
        """Take the labels of all problems."""

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose filters: kept (filters,) int32, 1 where chosen; and (L, 2) int32, covered clusters and clusters.

        order: (filters,) integers, which of equally good filters goes first, the larger; for tie="norm" and "gamma".
        """

    def bits(self) -> Tensor:
        """Random bits for the draw, of every filter of these layers: (filters,) int64 in [0, 2^32)."""

    def heights(self, numbers: Sequence[float]) -> list[float]:
        """The height of each layer's cut in true units, from the levels as the host has read them, row by row.

        Raises:
            RepruneError: if a layer could not be clustered, by name.
        """

    def results(self, labels: Tensor | None) -> list[tuple[Merges, Clusters | None]]:
        """Merges of every layer, and its clusters if it was cut; without shares. Waits for the device once."""


class Reference:
    """`reprune_triton.selection.reference`, layer by layer."""

    def __init__(self, work: Work):
        self.work = work
        self._merges: list[Merges | None] = [None] * len(work.layers)
        self._level = blank_level(work, by_triton=False)

    def cluster(self) -> None:
        """Layers of one shape are clustered together, unless their magnitudes need different scaling."""
        groups: dict[tuple[int, int, int, torch.dtype], list[tuple[int, Tensor]]] = {}
        for number, layer in enumerate(self.work.layers):
            points = layer.points()
            check_finite(layer.name, points)
            exponent = scale_of(points)
            if abs(exponent) > 500:
                raise RepruneError(f"{layer.name}: beyond 1e-150 or 1e+150 squares leave float64; rescale it first.")
            first, last = (0, len(points)) if self.work.shares is None else self.work.shares[number]
            key = layer.n, layer.d, exponent, working_dtype(points)
            groups.setdefault(key, []).append((number, points[first:last]))
        for (_, _, exponent, dtype), group in groups.items():
            points = torch.cat([points for _, points in group])
            if exponent:
                points = points.double() * 2.0**-exponent  # exact
            linkage = self.work.linkage
            parent, height = reference.forest(points.to(dtype), linkage)
            merges = Merges(parent, height, linkage, 2.0 ** (2 * exponent if linkage == "ward" else exponent))
            start = 0
            for number, points in group:
                self._merges[number] = merges.problems(start, start + len(points))
                start += len(points)

    def level(self, keep: Tensor) -> Tensor:
        """In true units: (L,) float64, -1 where nothing merges."""
        self._level = blank_level(self.work, by_triton=False)  # an event may be launched again
        for number, merges in enumerate(self._merges):
            if merges is not None and len(merges.parent):
                level = reference.level(merges.height, int(keep[number]))
                self._level[number] = level * merges.scale if level >= 0 else -1.0
        return self._level

    def labels(self) -> Tensor:
        labels, start = blank_labels(self.work), 0
        for number, (layer, merges) in enumerate(zip(self.work.layers, self._merges, strict=True)):
            if merges is not None and len(merges.parent):
                first = start + layer.n * (0 if self.work.shares is None else self.work.shares[number][0])
                h = float(self._level[number])
                own = reference.labels(merges.parent, merges.height, h / merges.scale if h >= 0 else h)
                labels[first : first + own.numel()] = own.flatten().int()
            start += layer.n * layer.columns
        return labels

    def membership(self, labels: Tensor) -> None:
        self._labels = labels

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = torch.zeros(self.work.filters, dtype=torch.int32, device=self.work.device)
        totals = torch.zeros(len(self.work.layers), 2, dtype=torch.int32, device=self.work.device)
        start = first = 0
        for number, layer in enumerate(self.work.layers):
            points, n_out = layer.n * layer.columns, len(layer.weight)
            if self.work.chosen is None or number in self.work.chosen:
                labels = self._labels[start : start + points].view(layer.columns, layer.n)
                active = torch.arange(n_out, device=kept.device) if layer.filters is None else layer.filters.long()
                score = None if order is None else order[first : first + n_out][active]
                seed = 0 if self.work.seeds is None else self.work.seeds[number][0]
                taken, _, *counts = reference.cover(labels, int(keep[number]), tie, seed, score)
                kept[first + active[taken]] = 1
                totals[number] = torch.tensor(counts)
            start, first = start + points, first + n_out
        return kept, totals

    def bits(self) -> Tensor:
        assert self.work.seeds is not None
        return torch.cat([
            rng.random_bits(seed, 0, len(layer.weight), self.work.device)
            for layer, (_, seed) in zip(self.work.layers, self.work.seeds, strict=True)
        ])  # fmt: skip

    def heights(self, numbers: Sequence[float]) -> list[float]:
        return [max(h, 0.0) for h in numbers]

    def results(self, labels: Tensor | None) -> list[tuple[Merges, Clusters | None]]:
        found: list[tuple[Merges, Clusters | None]] = []
        heights, start = self.heights(self._level.tolist()), 0
        for layer, merges, h in zip(self.work.layers, self._merges, heights, strict=True):
            assert merges is not None
            own = None if labels is None else labels[start : start + merges.parent.numel()].view_as(merges.parent)
            found.append((merges, None if own is None else Clusters(own, h)))
            start += layer.n * layer.columns
        return found


class Triton:
    """The kernels, all layers in a handful of launches. Layers are on one device."""

    def __init__(self, work: Work):
        from reprune_triton.kernels.clustering import launch

        self.work, self._launch = work, launch
        self._event = launch.prepare(*work)

    def cluster(self) -> None:
        self._forests = self._launch.cluster(self._event)

    def level(self, keep: Tensor) -> Tensor:
        """The report of the kernels: (L, 3) int32."""
        self._launch.level(self._event, self._forests, keep)
        return self._forests.report

    def labels(self) -> Tensor:
        return self._launch.label(self._event, self._forests)[0]

    def membership(self, labels: Tensor) -> None:
        self._members = self._launch.membership(self._event, self._forests.report, labels)

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        if tie == "index":  # all equal: the lowest goes first
            order = torch.zeros(self.work.filters, dtype=torch.int32, device=self.work.device)
        found = self._launch.cover(self._event, self._forests.report, self._members, keep, order)
        return found.kept, found.totals

    def bits(self) -> Tensor:
        return self._launch.draw_bits(self._event).long() & 0xFFFFFFFF

    def heights(self, numbers: Sequence[float]) -> list[float]:
        reports = self._reports(numbers)
        return [report.h * self._scale(report) for report in reports]

    def _scale(self, report: Report) -> float:
        return 2.0 ** (2 * report.exponent if self.work.linkage == "ward" else report.exponent)

    def _reports(self, numbers: Sequence[float]) -> list[Report]:
        """What the kernels say of every layer.

        Raises:
            RepruneError: if a layer could not be clustered, by name.
        """
        width = len(numbers) // len(self.work.layers)
        found = []
        for number, layer in enumerate(self.work.layers):
            report = self._launch.read_row(numbers[number * width : (number + 1) * width])
            if not report.clustered:
                check_indices(layer)
                check_finite(layer.name, layer.points())
            if not report.finished:
                raise RepruneError(
                    f"{layer.name}: the clustering did not come to an end. This is a defect in the kernels; please "
                    'report it. impl="reference" goes on without them.'
                )
            found.append(report)
        return found

    def results(self, labels: Tensor | None) -> list[tuple[Merges, Clusters | None]]:
        shapes = [(layer.columns, layer.n) for layer in self.work.layers]
        sizes = [columns * n for columns, n in shapes]
        parents, heights = self._forests.parent.split(sizes), self._forests.height.split(sizes)
        own = None if labels is None else labels.split(sizes)
        found: list[tuple[Merges, Clusters | None]] = []
        for number, report in enumerate(self._reports(self._forests.report.flatten().tolist())):
            shape, scale = shapes[number], self._scale(report)
            merges = Merges(parents[number].view(shape), heights[number].view(shape), self.work.linkage, scale)
            clusters = None if own is None else Clusters(own[number].view(shape), report.h * scale)
            found.append((merges, clusters))
        return found
