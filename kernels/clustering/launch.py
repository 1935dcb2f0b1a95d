"""All layers of a network clustered, cut and covered in a handful of launches.

    weights of all layers -> magnitude -> chain | line | reciprocal -> forests -> cut_height -> label -> labels
    labels -> membership -> cover -> kept filters

`prepare` makes a plan: all that the host knows, on the device. Every other step is launches alone, the same ones
whatever the weights are: the host does not wait for the device, and a CUDA graph can hold them. What the host must know
afterwards is in the report and in the totals.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from reprune_triton.kernels.clustering import chain, coverage, cut, line, magnitude, reciprocal, table
from reprune_triton.kernels.configuration import Configuration

MAX_FILTERS = 4096
MAX_AREA = 121  # kh * kw of 11x11
ALGORITHMS = ("auto", "chain", "reciprocal")
SMALL = 64  # filters up to which a chain in one warp is as quick as rounds
UNROLLED = (1, 4, 9)  # kh * kw for which loops over coordinates are unrolled
SCRATCH_BYTES = 256 << 20  # of one launch; more problems than fit are clustered in several launches

MAGNITUDE = Configuration(magnitude.magnitude_kernel, (("BLOCK", 1024),), 4)
CUT_HEIGHT = Configuration(cut.cut_height_kernel, (("BLOCK", 128),), 1)
LABEL = Configuration(cut.label_kernel, (("BLOCK", 128),), 1)
MEMBERSHIP = Configuration(coverage.membership_kernel, (("BLOCK", 128),), 1)
# One program chooses all filters of a layer, one after another: with more lanes it waits for memory less often.
_COVER = (("FILTERS", 512), ("COLUMNS", 1024), ("MEMBERS", 4))
COVER_AT_RANDOM = Configuration(coverage.cover_kernel, (("RANDOM", 1), *_COVER), 16, max_registers=96)
COVER_IN_ORDER = Configuration(coverage.cover_kernel, (("RANDOM", 0), *_COVER), 16, max_registers=96)
BITS = Configuration(coverage.bits_kernel, (("BLOCK", 256),), 4)
FIXED = (MAGNITUDE, CUT_HEIGHT, LABEL, MEMBERSHIP, COVER_AT_RANDOM, COVER_IN_ORDER, BITS)  # of any linkage and size


def configuration(n: int, d: int, linkage: str = "ward", algorithm: str = "auto") -> Configuration:
    """Return the clustering kernel for a layer of n filters with kernels of d numbers."""
    constants: tuple[tuple[str, int], ...]
    unrolled = d if d in UNROLLED else 0
    if linkage != "ward" or algorithm == "chain" or (algorithm == "auto" and d > 1 and n <= SMALL):
        # Without this limit ptxas decides for as many registers on sm_80, too, but then spills some.
        block, warps, registers = (64, 1, None) if n <= SMALL else (256, 4, 64)
        unrolled = unrolled if linkage == "ward" else 0
        constants = (("LINKAGE", chain.LINKAGES[linkage]), ("D", unrolled), ("BLOCK", block))
        return Configuration(chain.chain_kernel, constants, warps, max_registers=registers)
    if algorithm == "auto" and d == 1:
        width = max(64, triton.next_power_of_2(n))
        warps = max(1, width // 512)
        return Configuration(line.line_kernel, (("WIDTH", width), ("BLOCK", 32 * warps)), warps, max_registers=128)
    constants = (("D", unrolled), ("ROWS", 16), ("COLS", reciprocal.COLS), ("BLOCK", 128))
    return Configuration(reciprocal.reciprocal_kernel, constants, 4, max_registers=96)  # 5 programs at once per SM


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that a layer can get, and those of the other steps."""
    sizes = [n for n in (2**k for k in range(13)) for n in (n, n + 1) if n <= MAX_FILTERS]
    cases = [("ward", algorithm) for algorithm in ALGORITHMS] + [(linkage, "auto") for linkage in chain.LINKAGES]
    found = dict.fromkeys(
        configuration(n, d, *case) for case in cases for d in range(1, MAX_AREA + 1) for n in sizes
    )  # fmt: skip
    yield from (*FIXED, *found)


def scratch(kernel: Any, n: int, d: int, linkage: str) -> tuple[int, int]:
    """Return how much scratch memory one problem needs: numbers of float32, and of int32."""
    if kernel is chain.chain_kernel:
        return chain.scratch(linkage, n, d)
    if kernel is line.line_kernel:
        return line.scratch(n)
    return reciprocal.scratch(n, d)


class Layer(Protocol):
    """A conv weight whose kernels are to be clustered, one problem for every active input channel."""

    @property
    def weight(self) -> Tensor: ...  # (n_out, n_in, kh, kw), float32, float16 or bfloat16, any strides
    @property
    def filters(self) -> Tensor | None: ...  # (n,) int64, the active filters; None: all
    @property
    def inputs(self) -> Tensor | None: ...  # (problems,) int64, the active input channels; None: all
    @property
    def n(self) -> int: ...
    @property
    def problems(self) -> int: ...  # active input channels
    @property
    def d(self) -> int: ...  # kh * kw


def why_not(layer: Layer) -> str | None:
    """Return why the kernels cannot cluster this layer, on a device where they run; None if they can."""
    if layer.weight.dtype not in table.KINDS:
        return f"it is {layer.weight.dtype}, and the kernels read float32, float16 and bfloat16"
    if layer.n > MAX_FILTERS or layer.d > MAX_AREA:
        return (
            f"it has {layer.n} filters of {layer.d} numbers, and the kernels take at most {MAX_FILTERS} of {MAX_AREA}"
        )
    return None


class Plan(NamedTuple):
    """The table of layers and an owner array for each launch, on the device."""

    table: Tensor
    # Owner arrays: which programs a launch has.
    filters: Tensor  # one for every active filter
    problems: Tensor  # one for every problem of this process's share
    layers: Tensor  # one for every layer
    chosen_layers: Tensor  # one for every layer whose filters are chosen here
    chosen_problems: Tensor  # one for every problem of those layers
    clustering: list[tuple[Configuration, Tensor]]  # the clustering kernels, each with its own
    sizes: Sizes
    read: list[Tensor]  # weights and index lists: the table has their addresses, so they must live as long as it does


class Sizes(NamedTuple):
    """Sums over all layers of a plan, by which memory is allocated."""

    layers: int
    filters: int  # active or not
    points: int
    problems: int
    floats: int  # of scratch memory, float32
    ints: int  # of scratch memory, int32


class Forests(NamedTuple):
    """The merges of all problems, one layer after the other."""

    parent: Tensor  # (points,) int32, the point that a point merges into
    height: Tensor  # (points,) float32, merge heights of the scaled weights
    report: Tensor  # (layers, REPORT) int32: see `table`
    work: Tensor  # (problems, 2) int32: rounds (chain: searches), and tiles (line, chain: blocks) of distances


class Members(NamedTuple):
    """The members of all clusters: see `coverage`."""

    cluster: Tensor  # (points,) int32
    place: Tensor  # (points,) int16
    member: Tensor  # (points,) int16
    totals: Tensor  # (layers, TOTALS) int32


class Covers(NamedTuple):
    """The filters chosen in every layer. For layers not chosen here kept and totals are 0, the others undefined."""

    order: Tensor  # (filters,) int32: chosen filters, as numbers among the active ones, from where the layer begins
    gains: Tensor  # (filters,) int32: how many clusters each of them was first to cover
    kept: Tensor  # (filters,) int32: 1 for a chosen filter, at its own number
    totals: Tensor  # (layers, TOTALS) int32: covered clusters, clusters


class Report(NamedTuple):
    """A layer's row of the report, as the host reads it."""

    clustered: bool  # False: a weight is not finite, or an index list has a number that the weight has not
    finished: bool  # False: a kernel gave up, which only a defect can bring about
    exponent: int  # the kernels worked on weights * 2^-exponent
    h: float  # cut height of those weights; 0 if nothing merges


class Launch(NamedTuple):
    """A launch of one clustering kernel."""

    configuration: Configuration
    parts: list[tuple[int, int, int]]  # (row, begin, end): problems begin .. end - 1 of a row of the table
    floats: int  # of scratch memory, float32
    ints: int  # of scratch memory, int32


Shares = Sequence[tuple[int, int]]  # (begin, end) for every layer: the problems that a process clusters


def rows_and_launches(
    layers: Sequence[Layer],
    linkage: str = "ward",
    algorithm: str = "auto",
    shares: Shares | None = None,
    seeds: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[table.Row], list[Launch]]:
    """Return the table, with a row for every layer, and the launches that cluster the layers.

    There is a launch for each kernel and area, with the largest problems first; and more where its scratch memory would
    be larger than SCRATCH_BYTES. A layer that is divided among launches has a row for each, after those of all layers.
    """
    if shares is None:
        shares = [(0, layer.problems) for layer in layers]
    rows: list[table.Row] = []
    groups: dict[tuple[Configuration, int], list[int]] = {}
    problem = forest = first = 0
    for number, layer in enumerate(layers):
        weight, n, d, columns = layer.weight, layer.n, layer.d, layer.problems
        config = configuration(n, d, linkage, algorithm)
        groups.setdefault((config, d), []).append(number)
        stride_out, stride_in, stride_h, stride_w = weight.stride()
        floats_each, ints_each = scratch(config.kernel, n, d, linkage)
        tie_seed, draw_seed = (0, 0) if seeds is None else seeds[number]
        row = table.Row(
            weight=weight.data_ptr(), kind=table.KINDS[weight.dtype],
            filters=table.address(layer.filters), inputs=table.address(layer.inputs),
            stride_out=stride_out, stride_in=stride_in, stride_h=stride_h, stride_w=stride_w,
            kernel_w=weight.shape[3], n_out=weight.shape[0], n_in=weight.shape[1],
            n=n, d=d, columns=columns,
            layer=number, problem=problem, forest=forest, filter=first,
            tie_seed=tie_seed, draw_seed=draw_seed,
            floats_each=floats_each, ints_each=ints_each,
        )  # fmt: skip
        rows.append(row)
        problem, forest, first = problem + columns, forest + columns * n, first + row.n_out

    launches = []
    for (config, _), group in groups.items():
        parts: list[tuple[int, int, int]] = []
        floats = ints = 0
        for number in sorted(group, key=lambda number: -rows[number].n):
            row, (begin, end) = rows[number], shares[number]
            at = number
            while begin < end:
                room = (SCRATCH_BYTES // 4 - floats - ints) // (row.floats_each + row.ints_each)
                if room < 1 and parts:
                    launches.append(Launch(config, parts, floats, ints))
                    parts, floats, ints = [], 0, 0
                    continue
                count = min(end - begin, max(room, 1))
                parts.append((at, begin, begin + count))
                rows[at : at + 1] = [
                    row._replace(floats=floats - begin * row.floats_each, ints=ints - begin * row.ints_each)
                ]
                begin, floats, ints = begin + count, floats + count * row.floats_each, ints + count * row.ints_each
                at = len(rows)  # of the layer's next part
        if parts:
            launches.append(Launch(config, parts, floats, ints))
    return rows, launches


def prepare(
    layers: Sequence[Layer],
    linkage: str = "ward",
    algorithm: str = "auto",
    shares: Shares | None = None,
    chosen: Sequence[int] | None = None,
    seeds: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """Plan the launches for layers that are all on one device and that `why_not` accepts.

    This copies to the device once; the steps that follow copy nothing.

    shares: which problems are clustered and cut here; all by default.
    chosen: the layers whose filters are chosen here; all by default.
    seeds: (tie_seed, draw_seed) for every layer, of random bits in its coverage and its regrowth; 0 by default.
    """
    if shares is None:
        shares = [(0, layer.problems) for layer in layers]
    rows, launches = rows_and_launches(layers, linkage, algorithm, shares, seeds)
    everyone = range(len(layers))
    # The layer with most steps and problems goes first: it is the last to end.
    chosen = sorted(everyone if chosen is None else chosen, key=lambda number: -rows[number].n * rows[number].columns)
    arrays = [
        table.owners((number, 0, layer.n) for number, layer in enumerate(layers)),
        table.owners((number, *share) for number, share in enumerate(shares)),
        table.owners((number, 0, 1) for number in everyone),
        table.owners((number, 0, 1) for number in chosen),
        table.owners((number, 0, layers[number].problems) for number in chosen),
        *(table.owners(launch.parts) for launch in launches),
    ]
    own_table, filters, problems, all_layers, chosen_layers, chosen_problems, *owners = table.tables_to_device(
        rows, arrays, layers[0].weight.device
    )
    sizes = Sizes(
        layers=len(layers),
        filters=sum(layer.weight.shape[0] for layer in layers),
        points=sum(layer.n * layer.problems for layer in layers),
        problems=sum(layer.problems for layer in layers),
        # Launches follow each other on one stream, so they can share their scratch memory.
        floats=max((launch.floats for launch in launches), default=0),
        ints=max((launch.ints for launch in launches), default=0),
    )
    clustering = [(launch.configuration, owner) for launch, owner in zip(launches, owners, strict=True)]
    read = [x for layer in layers for x in (layer.weight, layer.filters, layer.inputs) if x is not None]
    return Plan(own_table, filters, problems, all_layers, chosen_layers, chosen_problems, clustering, sizes, read)


def cluster(plan: Plan) -> Forests:
    """Cluster this process's share of the problems; those of others are undefined."""
    device, sizes = plan.table.device, plan.sizes
    report = torch.zeros(sizes.layers, table.REPORT.value, dtype=torch.int32, device=device)
    parent = torch.empty(sizes.points, dtype=torch.int32, device=device)
    height = torch.empty(sizes.points, dtype=torch.float32, device=device)
    work = torch.empty(sizes.problems, 2, dtype=torch.int32, device=device)
    floats = torch.empty(sizes.floats, dtype=torch.float32, device=device)
    ints = torch.empty(sizes.ints, dtype=torch.int32, device=device)
    MAGNITUDE.run(len(plan.filters), plan.table, plan.filters, report)
    for config, owner in plan.clustering:
        config.run(
            len(owner),
            plan.table, owner, report,
            parent, height, work,
            floats, ints,
        )  # fmt: skip
    return Forests(parent, height, report, work)


def cut_height(plan: Plan, forests: Forests, keep: Tensor) -> None:
    """Write the cut height of every layer into the report: the lowest that leaves each problem of this share at most
    keep[layer] clusters. The layer's is the largest over all shares.

    keep: (layers,) int32 on the device.
    """
    CUT_HEIGHT.run(len(plan.problems), plan.table, plan.problems, forests.report, keep, forests.height)


def label(plan: Plan, forests: Forests) -> tuple[Tensor, Tensor]:
    """Return the labels of the clusters at the cut (points,), and how many each problem has (problems,).

    Both are int32, and 0 for problems of other shares.
    """
    labels, clusters = (forests.parent.new_zeros(count) for count in (plan.sizes.points, plan.sizes.problems))
    LABEL.run(
        len(plan.problems),
        plan.table, plan.problems, forests.report,
        forests.parent, forests.height,
        labels, clusters,
    )  # fmt: skip
    return labels, clusters


def membership(plan: Plan, report: Tensor, labels: Tensor) -> Members:
    """Return the members of every cluster, from labels (points,) int32 that are less than n."""
    cluster, count = torch.empty_like(labels), torch.empty_like(labels)
    place, member = (torch.empty_like(labels, dtype=torch.int16) for _ in range(2))
    totals = torch.zeros(plan.sizes.layers, coverage.TOTALS.value, dtype=torch.int32, device=labels.device)
    MEMBERSHIP.run(
        len(plan.chosen_problems),
        plan.table, plan.chosen_problems, report,
        labels,
        count, cluster, place, member, totals,
    )  # fmt: skip
    return Members(cluster, place, member, totals)


def cover(plan: Plan, report: Tensor, members: Members, keep: Tensor, score: Tensor | None) -> Covers:
    """Choose filters of the chosen layers. This uses up `members`.

    keep: (layers,) int32, how many filters of each layer, on the device.
    score: (filters,) int32, of equally good filters the larger goes first, then the lowest; None: by random bits.
    """
    device, layers = plan.table.device, plan.chosen_layers
    gain, order, gains = (torch.empty(plan.sizes.filters, dtype=torch.int32, device=device) for _ in range(3))
    kept = torch.zeros_like(gain)
    config = COVER_AT_RANDOM if score is None else COVER_IN_ORDER
    config.run(
        len(layers),
        plan.table, layers, report,
        keep, kept if score is None else score,
        members.cluster, members.place, members.member,
        gain, order, gains, kept, members.totals,
    )  # fmt: skip
    return Covers(order, gains, kept, members.totals)


def draw_bits(plan: Plan) -> Tensor:
    """Return random bits for every filter, from the draw seed of its layer: (filters,) int32."""
    bits = torch.empty(plan.sizes.filters, dtype=torch.int32, device=plan.table.device)
    BITS.run(len(plan.layers), plan.table, plan.layers, bits)
    return bits


def cut_layer(parent: Tensor, height: Tensor, keep: int) -> tuple[Tensor, float]:
    """Cut the problems of one layer, parent and height (P, n), so that each has at most `keep` clusters.

    Returns labels (P, n) int32, and the cut height in the units of `height`. Waits for the device.
    """
    parent, height = parent.contiguous(), height.contiguous()
    plan, report = layer_plan(parent.shape, parent.device)
    forests = Forests(parent.view(-1), height.view(-1), report, work=parent.new_empty(0, 2))  # nothing reads the work
    cut_height(plan, forests, torch.tensor([keep], dtype=torch.int32, device=parent.device))
    labels, _ = label(plan, forests)
    return labels.view_as(parent), read_report(report)[0].h


def cover_layer(labels: Tensor, keep: int, seed: int, score: Tensor | None) -> Covers:
    """Choose `keep` filters of one layer, from labels (P, n) int32 that are less than n. See `cover`."""
    plan, report = layer_plan(labels.shape, labels.device, seed)
    members = membership(plan, report, labels.contiguous().view(-1))
    return cover(plan, report, members, torch.tensor([keep], dtype=torch.int32, device=labels.device), score)


def layer_plan(shape: Sequence[int], device: torch.device, tie_seed: int = 0) -> tuple[Plan, Tensor]:
    """Return a plan for one layer of this shape (P, n) without weights, and a report that says it is clustered."""
    columns, n = shape
    rows = [table.Row(n=n, n_out=n, columns=columns, tie_seed=tie_seed)]
    arrays = [table.owners([(0, 0, columns)]), table.owners([(0, 0, 1)])]
    own_table, problems, layer = table.tables_to_device(rows, arrays, device)
    sizes = Sizes(layers=1, filters=n, points=columns * n, problems=columns, floats=0, ints=0)
    report = torch.zeros(1, table.REPORT.value, dtype=torch.int32, device=device)
    plan = Plan(
        own_table, filters=problems[:0], problems=problems, layers=layer, chosen_layers=layer, chosen_problems=problems,
        clustering=[], sizes=sizes, read=[],
    )  # fmt: skip
    return plan, report


def read_report(report: Tensor) -> list[Report]:
    """Wait for the device, and read the report (layers, REPORT)."""
    return [read_row(row) for row in report.tolist()]


def read_row(row: Sequence[float]) -> Report:
    """Read a layer's row of the report."""
    magnitude, unfinished, over = (int(row[field.value]) for field in (table.MAGNITUDE, table.UNFINISHED, table.CUT))
    h = struct.unpack("f", struct.pack("i", over - 1))[0] if over else 0.0
    return Report(magnitude < table.INFINITY_BITS.value, not unfinished, table.exponent(magnitude), h)
