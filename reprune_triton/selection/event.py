"""One pruning event over a whole network: a fixed sequence of steps on the device, which the host reads once.

    scales -> widths -> forests -> cut heights -> labels -> cover -> regrow -> active filters

Making a `PreparedEvent` carries to the device what the host knows: shapes, addresses, seeds. `launch` starts the steps
and does not wait for the device: no size depends on a weight. So all events of the same shapes are the same sequence of
launches, which a CUDA graph can hold. `read` waits for the result, in one transfer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from reprune_triton.errors import RepruneError
from reprune_triton.kernels.host import to_device
from reprune_triton.selection import ranks, regrow, steps
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.problems import Layer, checked, grouped
from reprune_triton.selection.ranks import Ranks
from reprune_triton.selection.widths import Widths

STAGES = ("sparsity", "cluster", "cut", "membership", "cover", "regrow")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """The inputs of an event.

    Attributes:
        layers: the prunable convs, in the pool's order.
        pool: all their filters, active or not.
        widths: returns how many filters each layer is to have; called on every launch.
        seeds: per layer, for the ties and for the draw.
        linkage, impl, tie: see `ops.cluster_network` and `ops.cover`.
        select: "coverage"; with any other value the filters with the largest scores are kept.
        scores: returns (T,); called on every launch, for tie="norm" and "gamma" and for selections by score.
        regrow: whether `widths` may ask for more filters than it keeps.
        regrow_by: which filters come back, one of `regrow.RULES`.
        watched: tensors that must be finite.
        check: raises the error that names what is wrong with the watched tensors or the scales. It is called only when
            something is, and may wait for the device.
    """

    layers: Sequence[Layer]
    pool: Pool
    widths: Callable[[], Widths]
    seeds: Sequence[tuple[int, int]]
    linkage: str = "ward"
    impl: str = "auto"
    tie: str = "random"
    select: str = "coverage"
    scores: Callable[[], Tensor] | None = None
    regrow: bool = True
    regrow_by: str = "residual"
    watched: Sequence[Tensor] = ()
    check: Callable[[], None] = lambda: None


class LayerOutcome(NamedTuple):
    """The result of an event for one layer."""

    kept: int  # kept filters
    width: int  # active filters
    covered: int  # covered clusters
    clusters: int  # all clusters
    h: float  # cut height, in true units


class Outcome(NamedTuple):
    """The result of an event."""

    layers: list[LayerOutcome]
    rank: int  # of the threshold of the scales, see `Widths`
    active: Tensor  # (T,) bool on the device
    kept: Tensor  # (T,) bool on the device


class Clock:
    """A stopwatch of an event's stages: on a GPU by the device's time, elsewhere by the host's."""

    def __init__(self, device: torch.device):
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self("")

    def __call__(self, stage: str) -> None:
        """Note that this stage has been launched."""
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
        self._marks.append((stage, mark if self._cuda else time.perf_counter()))

    def ms(self) -> dict[str, float]:
        """Return the milliseconds of every stage. The device must have been waited for."""
        found = {}
        for (_, begin), (stage, end) in zip(self._marks, self._marks[1:], strict=False):
            found[stage] = begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3
        return found


class PreparedEvent:
    """An event, ready to be launched. `launch` it, then `read` it; both again for another of the same shapes and seeds.

    Raises:
        RepruneError: for layers that cannot be clustered; see `ops.cluster_network`.
    """

    def __init__(self, request: Request, share: Ranks | None = None):
        self.request, self.ranks, self.device = request, share or Ranks(), request.pool.device
        self._failure: Exception | None = None
        parts = grouped(request.layers, request.impl)
        self._groups = [
            _Group(request, by_triton, None if len(parts) == 1 else numbers, self.ranks)
            for (by_triton, _), numbers in parts.items()
        ]
        mine = [False] * len(request.layers)
        for group in self._groups:
            for number in group.chosen:
                mine[number] = True
        # The most filters that a layer can keep, and that it can have by this process's draw.
        limits = [(layer.n, layer.n_out * own) for layer, own in zip(request.layers, mine, strict=True)]
        self._candidates, self._mine = to_device(limits, self.device).T.unbind()
        for group in self._groups:
            self._try(group.prepare, _nothing)

    @torch.no_grad()
    def launch(self, mark: Callable[[str], None] = lambda stage: None) -> None:
        """Start all steps. mark is called after each of STAGES.

        After a first call a CUDA graph can hold this, if every layer goes through the kernels (the reference looks at
        values on the host) and the processes talk by NCCL. The graph is good for other weights at the same addresses,
        as long as the same channels are active; so it does not outlast an event.
        """
        pool = self.request.pool
        self._widths = self._try(self.request.widths, self._no_widths)
        # The scales of pruned filters count as 0, so no layer is to keep more filters than are active. Scales that are
        # NaN may count as more: the event then fails when it is read, but until then needs valid sizes.
        self._keep = torch.minimum(self._widths.keep, self._candidates).int()
        finite = self._try(self._finite, self._true)
        mark("sparsity")
        for group in self._groups:
            self._try(group.cluster, _nothing)
        mark("cluster")
        for group in self._groups:
            group.heights = self._try(partial(group.cut, self._keep), group.blank_cut)
            self.ranks.maximum(group.heights)
        for group in self._groups:
            group.labels = self._try(group.label, group.blank_labels)
            self.ranks.total(group.labels)
        mark("cut")
        for group in self._groups:
            self._try(group.membership, _nothing)
        mark("membership")
        kept = torch.zeros_like(pool.layer, dtype=torch.int32)
        totals = torch.zeros(len(pool.sizes), 2, dtype=torch.int32, device=self.device)
        self._try(partial(self._cover, kept, totals), _nothing)
        mark("cover")
        active = self._try(partial(self._regrow, kept > 0), lambda: kept > 0)
        mark("regrow")
        self._result = self._assemble(finite, kept, totals, active)
        self.ranks.total(self._result)

    def read(self) -> Outcome:
        """Wait for the device, once, and return what it found.

        Raises:
            RepruneError: if a layer could not be clustered, or another process failed.
        """
        L, T = len(self.request.layers), self.request.pool.total
        head, active, kept = self._result.split([4 + 4 * L, T, T])
        cuts = [group.heights.flatten().double() for group in self._groups]
        numbers = torch.cat([head.double(), *cuts]).tolist()
        failed, infinite, flat, rank = (int(x) for x in numbers[:4])
        if failed:
            failure, self._failure = self._failure, None
            self.ranks.raise_failure(failure, self.device)
        if infinite or flat:
            self.request.check()
            what = "weights or scales that are not finite" if infinite else "scales that are all equal"
            raise RepruneError(f"another process has {what}: its model is not the one of this process.")
        heights, at = [0.0] * L, 4 + 4 * L
        for group, own in zip(self._groups, cuts, strict=True):
            for number, h in zip(group.numbers, group.steps.heights(numbers[at : at + len(own)]), strict=True):
                heights[number] = h
            at += len(own)
        found = []
        for i, h in enumerate(heights):
            chosen, width, covered, clusters = (int(x) for x in numbers[4 + 4 * i : 8 + 4 * i])
            found.append(LayerOutcome(chosen, width, covered, clusters, h))
        return Outcome(found, rank, active > 0, kept > 0)

    def _finite(self) -> Tensor:
        """Whether all watched tensors are finite, as their largest magnitude is: () bool."""
        if not self.request.watched:
            return self._true()
        finite = torch.nn.utils.get_total_norm(self.request.watched, float("inf")).isfinite()
        if not all(group.by_triton for group in self._groups) and not finite:
            self.request.check()  # now: the reference, which waits for the device anyway, would fail less clearly
        return finite

    def _true(self) -> Tensor:
        return self.request.pool.n_out[0] > 0

    def _cover(self, kept: Tensor, totals: Tensor) -> None:
        """Write this process's layers into kept (T,) and totals (L, 2), covered clusters and clusters."""
        order = None
        if self.request.scores is not None:
            scores = self.request.scores()
            order = self.request.pool.ranked(scores) if self.request.select == "coverage" else scores
        for group in self._groups:
            found, counts = group.cover(self._keep, order)
            group.filters.put(kept, found)
            group.index.put(totals, counts)

    def _regrow(self, kept: Tensor) -> Tensor:
        """Return kept filters (T,) bool, with those that come back in this process's layers."""
        request = self.request
        if not request.regrow:
            return kept
        bits = torch.zeros_like(request.pool.layer)
        chosen: list[Layer | None] = [None] * len(request.layers)
        for group in self._groups:
            group.filters.put(bits, group.steps.bits())
            for number in group.chosen:
                chosen[number] = request.layers[number]
        residual = torch.zeros_like(kept, dtype=torch.float64)
        if request.regrow_by == "residual":
            residual = regrow.residuals([layer and layer.rows() for layer in chosen], kept, request.pool)
        elif request.regrow_by == "coverage":
            kernels = [layer and layer._replace(filters=None).points() for layer in chosen]
            residual = regrow.distances(kernels, kept, request.pool)
        width = torch.minimum(self._widths.width, self._mine)  # 0 in the layers of other processes
        return regrow.draw(residual, kept, width, bits, request.pool)

    def _assemble(self, finite: Tensor, kept: Tensor, totals: Tensor, active: Tensor) -> Tensor:
        """Return all that the processes tell each other and the host, int32: failed, not finite, flat, rank; per layer
        kept, width, covered, clusters; active (T,); kept (T,)."""
        pool, first = self.request.pool, self.ranks.rank == 0
        head = torch.stack([
            torch.full_like(pool.start[0], self._failure is not None),
            (~finite).long(), self._widths.flat.long(), self._widths.rank * first,
        ])  # fmt: skip
        rows = torch.stack([pool.count(kept), pool.count(active), *totals.long().unbind(1)], 1)
        return torch.cat([head, rows.flatten(), active.long(), kept.long()]).int()

    def _no_widths(self) -> Widths:
        zero = torch.zeros_like(self.request.pool.n_out)
        return Widths(zero, zero, zero[0], zero[0], zero[0] > 0)

    def _try(self, step: Callable[[], Result], instead: Callable[[], Result]) -> Result:
        """Return the step's result. If it or one before it has failed, note the error and return that of `instead`: of
        the same shape, as the other processes wait for it. A process alone raises the error."""
        if self._failure is None:
            try:
                return step()
            except Exception as error:
                if self.ranks.size == 1:
                    raise
                self._failure = error
        return instead()


def _nothing() -> None:
    pass


class _Some:
    """A choice of entries of a tensor's first dimension; None: all."""

    def __init__(self, index: Sequence[int] | None, device: torch.device):
        self._index = None if index is None else to_device(index, device)

    def put(self, whole: Tensor, part: Tensor) -> None:
        whole.copy_(part) if self._index is None else whole.index_copy_(0, self._index, part.to(whole.dtype))

    def of(self, whole: Tensor) -> Tensor:
        return whole if self._index is None else whole[self._index]


class _Group:
    """The layers of an event that one implementation works on."""

    heights: Tensor  # result of `Steps.cut`
    labels: Tensor  # (points,) int32
    steps: steps.Steps

    def __init__(self, request: Request, by_triton: bool, numbers: list[int] | None, share: Ranks):
        self._request, self.by_triton = request, by_triton
        self.numbers = list(range(len(request.layers))) if numbers is None else numbers
        layers = [checked(request.layers[number]) for number in self.numbers]
        size, problems = share.size, [layer.problems for layer in layers]
        cost = [_cost(layer, request.linkage) for layer in layers]
        owner = ranks.owners([layer.n * layer.problems + request.regrow * layer.n_out**3 for layer in layers], size)
        chosen = [local for local, rank in enumerate(owner) if rank == share.rank]
        self.chosen = [self.numbers[local] for local in chosen]
        self.work = steps.Work(
            layers, request.linkage,
            shares=None if size == 1 else ranks.shares(problems, cost, share.rank, size),
            chosen=None if size == 1 else chosen,
            seeds=[request.seeds[number] for number in self.numbers],
        )  # fmt: skip
        pool = request.pool
        filters = None if numbers is None else [pool.starts[i] + k for i in numbers for k in range(pool.sizes[i])]
        self.index, self.filters = _Some(numbers, pool.device), _Some(filters, pool.device)

    def prepare(self) -> None:
        self.steps = (steps.Triton if self.by_triton else steps.Reference)(self.work)

    def cluster(self) -> None:
        self.steps.cluster()

    def cut(self, keep: Tensor) -> Tensor:
        return self.steps.cut(self.index.of(keep))

    def blank_cut(self) -> Tensor:
        return steps.blank_cut(self.work, self.by_triton)

    def label(self) -> Tensor:
        return self.steps.labels()

    def blank_labels(self) -> Tensor:
        return steps.blank_labels(self.work)

    def membership(self) -> None:
        self.steps.membership(self.labels)

    def cover(self, keep: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        order = None if order is None else self.filters.of(order)
        if self._request.select != "coverage":
            assert order is not None
            return steps.by_score(self.work, self.labels, self.index.of(keep), order)
        return self.steps.cover(self.index.of(keep), self._request.tie, order)


def _cost(layer: Layer, linkage: str) -> int:
    """Estimate the work of one problem of the layer, in any unit: sorted lines take n, all others n^2."""
    return 40 * layer.n if layer.d == 1 and linkage == "ward" else layer.n**2 * (4 + layer.d)
