"""The steps of one pruning event over some layers of a network, by the reference and by Triton.

    layers -> cluster -> cut -> labels -> cover -> kept filters

Both classes have the same methods, with the same arguments and results. With Triton every step only launches kernels,
and nothing waits for the device. The reference runs wherever its tensors are.

A process may cluster a share of the problems and choose the filters of some layers. Between the steps the processes put
their results together: cut heights by the maximum; all else by the sum, as a process has 0 for what is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """The part of an event that a process does: the arguments of `launch.prepare`."""

    layers: Sequence[Layer]
    linkage: str = "ward"
    algorithm: str = "auto"  # for Triton
    shares: Sequence[tuple[int, int]] | None = None  # per layer the problems to cluster here; None: all
    chosen: Sequence[int] | None = None  # layers whose filters are chosen here; None: all
    seeds: Sequence[tuple[int, int]] | None = None  # per layer: for the ties and for the draw

    @property
    def points(self) -> int:
        return sum(layer.n * layer.problems for layer in self.layers)

    @property
    def filters(self) -> int:
        return sum(len(layer.weight) for layer in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device

    def parts(self) -> Iterator[tuple[Layer, slice, slice]]:
        """Yield every layer with its places among the points and among the filters of all layers."""
        point = first = 0
        for layer in self.layers:
            points, filters = layer.n * layer.problems, layer.n_out
            yield layer, slice(point, point + points), slice(first, first + filters)
            point, first = point + points, first + filters


def blank_cut(work: Work, by_triton: bool) -> Tensor:
    """Return what `Steps.cut` does, for a process that has failed: no other process has less."""
    if by_triton:
        from reprune_triton.kernels.clustering import table

        return torch.zeros(len(work.layers), table.REPORT.value, dtype=torch.int32, device=work.device)
    return torch.full((len(work.layers),), -1.0, dtype=torch.float64, device=work.device)


def blank_labels(work: Work) -> Tensor:
    """Return labels (points,) of a process that has clustered nothing."""
    return torch.zeros(work.points, dtype=torch.int32, device=work.device)


def by_score(work: Work, labels: Tensor, keep: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `Steps.cover` does, but keep the filters with the largest scores (filters,), the lowest on ties.

    labels: (points,) int32, clusters at the cut. Nothing here waits for the device.
    """

    def largest(number: int, own: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        order = score[active].argsort(descending=True, stable=True)
        taken = torch.empty_like(order, dtype=torch.int32)
        taken[order] = (torch.arange(len(order), device=work.device) < keep[number]).int()
        blank, own = torch.zeros_like(own, dtype=torch.int32), own.long()
        # The clusters in which the taken filters have kernels, and those in which any filter has.
        found = (blank.scatter_reduce(1, own, x.expand_as(own), "amax").sum() for x in (taken, torch.ones_like(taken)))
        return taken, torch.stack(list(found))

    return _chosen(work, labels, largest)


def _chosen(
    work: Work, labels: Tensor, choose: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return what `Steps.cover` does.

    choose: maps a layer's number, its labels (P, n) and the places (n,) of its active filters among all filters to
        (n,) int32, 1 where kept, and (2,), covered clusters and clusters.
    """
    kept = torch.zeros(work.filters, dtype=torch.int32, device=work.device)
    totals = torch.zeros(len(work.layers), 2, dtype=torch.int32, device=work.device)
    for number, (layer, points, filters) in enumerate(work.parts()):
        if work.chosen is None or number in work.chosen:
            active = torch.arange(layer.n_out, device=kept.device) if layer.filters is None else layer.filters.long()
            active = filters.start + active
            kept[active], totals[number] = choose(number, labels[points].view(layer.problems, layer.n), active)
    return kept, totals


class Steps(Protocol):
    """The steps over L layers, to be called in this order."""

    def cluster(self) -> None:
        """Cluster this process's share of the problems."""

    def cut(self, keep: Tensor) -> Tensor:
        """Find the cut height of every layer, which leaves each problem at most keep[layer] (L,) int32 clusters.

        Returns:
            (L, ...) in a form of the implementation's own. The maximum over all processes is the cut of whole layers;
            written into this tensor it is what the next steps read.
        """

    def labels(self) -> Tensor:
        """Return the clusters at the cut: (points,) int32, problem after problem; 0 in the shares of others."""

    def membership(self, labels: Tensor) -> None:
        """Take the labels (points,) of all problems."""

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose filters.

        Args:
            order: (filters,) integers for tie="norm" and "gamma": of equally good filters the largest goes first.
        Returns:
            (filters,) int32, 1 where kept; and (L, 2) int32, covered clusters and clusters.
        """

    def bits(self) -> Tensor:
        """Return random bits for the draw, one word for every filter of these layers: (filters,) int64 in [0, 2^32)."""

    def heights(self, numbers: Sequence[float]) -> list[float]:
        """Return the cut height of each layer in true units. numbers: the result of `cut`, read by the host, flat.

        Raises:
            RepruneError: if a layer could not be clustered, by name.
        """

    def results(self, labels: Tensor | None) -> list[tuple[Merges, Clusters | None]]:
        """Return every layer's merges, and its clusters if it was cut. All problems are this process's own.

        Waits for the device once.
        """


class Reference:
    """`reprune_triton.selection.reference`, layer by layer."""

    def __init__(self, work: Work):
        self.work = work
        self._merges: list[Merges | None] = [None] * len(work.layers)
        self._cut = blank_cut(work, by_triton=False)

    def cluster(self) -> None:
        """Cluster layers of one shape together, unless their magnitudes need different scaling."""
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

    def cut(self, keep: Tensor) -> Tensor:
        """Return cut heights in true units: (L,) float64, -1 where nothing merges."""
        self._cut = blank_cut(self.work, by_triton=False)  # an event may be launched again
        for number, merges in enumerate(self._merges):
            if merges is not None and len(merges.parent):
                h = reference.cut_height(merges.height, int(keep[number]))
                self._cut[number] = h * merges.scale if h >= 0 else -1.0
        return self._cut

    def labels(self) -> Tensor:
        labels = blank_labels(self.work)
        for number, (layer, points, _) in enumerate(self.work.parts()):
            merges = self._merges[number]
            if merges is not None and len(merges.parent):
                first = points.start + layer.n * (0 if self.work.shares is None else self.work.shares[number][0])
                h = float(self._cut[number])
                own = reference.labels(merges.parent, merges.height, h / merges.scale if h >= 0 else h)
                labels[first : first + own.numel()] = own.flatten().int()
        return labels

    def membership(self, labels: Tensor) -> None:
        self._labels = labels

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        def greedy(number: int, own: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
            score = None if order is None else order[active]
            seed = 0 if self.work.seeds is None else self.work.seeds[number][0]
            taken, _, *counts = reference.cover(own, int(keep[number]), tie, seed, score)
            return torch.zeros_like(active, dtype=torch.int32).index_fill_(0, taken, 1), torch.tensor(counts)

        return _chosen(self.work, self._labels, greedy)

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
        for merges, h, (_, points, _) in zip(
            self._merges, self.heights(self._cut.tolist()), self.work.parts(), strict=True
        ):
            assert merges is not None
            found.append((merges, None if labels is None else Clusters(labels[points].view_as(merges.parent), h)))
        return found


class Triton:
    """The kernels: all layers, which are on one device, in a handful of launches."""

    def __init__(self, work: Work):
        from reprune_triton.kernels.clustering import launch

        self.work, self._launch = work, launch
        self._plan = launch.prepare(*work)

    def cluster(self) -> None:
        self._forests = self._launch.cluster(self._plan)

    def cut(self, keep: Tensor) -> Tensor:
        """Return the reports of the kernels: (L, 3) int32."""
        self._launch.cut_height(self._plan, self._forests, keep)
        return self._forests.report

    def labels(self) -> Tensor:
        return self._launch.label(self._plan, self._forests)[0]

    def membership(self, labels: Tensor) -> None:
        self._members = self._launch.membership(self._plan, self._forests.report, labels)

    def cover(self, keep: Tensor, tie: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
        if tie == "index":  # all equal: the lowest goes first
            order = torch.zeros(self.work.filters, dtype=torch.int32, device=self.work.device)
        found = self._launch.cover(self._plan, self._forests.report, self._members, keep, order)
        return found.kept, found.totals

    def bits(self) -> Tensor:
        return self._launch.draw_bits(self._plan).long() & 0xFFFFFFFF

    def heights(self, numbers: Sequence[float]) -> list[float]:
        reports = self._reports(numbers)
        return [report.h * self._scale(report) for report in reports]

    def _scale(self, report: Report) -> float:
        return 2.0 ** (2 * report.exponent if self.work.linkage == "ward" else report.exponent)

    def _reports(self, numbers: Sequence[float]) -> list[Report]:
        """Read what the kernels report on every layer.

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
        shapes = [(layer.problems, layer.n) for layer in self.work.layers]
        sizes = [problems * n for problems, n in shapes]
        parents, heights = self._forests.parent.split(sizes), self._forests.height.split(sizes)
        own = None if labels is None else labels.split(sizes)
        found: list[tuple[Merges, Clusters | None]] = []
        for number, report in enumerate(self._reports(self._forests.report.flatten().tolist())):
            shape, scale = shapes[number], self._scale(report)
            merges = Merges(parents[number].view(shape), heights[number].view(shape), self.work.linkage, scale)
            clusters = None if own is None else Clusters(own[number].view(shape), report.h * scale)
            found.append((merges, clusters))
        return found
