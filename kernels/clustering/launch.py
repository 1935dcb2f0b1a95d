"""One event's launches: which kernel clusters which layer, and all layers of a network in a handful of launches.

    weights of all layers -> magnitude -> chain | line | reciprocal -> forests -> level -> label -> labels
    labels -> membership -> cover -> kept filters

`prepare` carries all that the host knows to the device. Every other step is launches alone, the same ones whatever the
values are: nothing waits for the device, and a CUDA graph can hold them. What the host must know afterwards is in the
report and in what `cover` counts.
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
UNROLLED = (1, 4, 9)  # areas whose loops over coordinates are unrolled
SCRATCH_BYTES = 256 << 20  # of one launch; more problems than fit are clustered in several launches


MAGNITUDE = Configuration(magnitude.magnitude_kernel, (("BLOCK", 1024),), 4)
LEVEL = Configuration(cut.level_kernel, (("BLOCK", 128),), 1)
LABEL = Configuration(cut.label_kernel, (("BLOCK", 128),), 1)
MEMBERSHIP = Configuration(coverage.membership_kernel, (("BLOCK", 128),), 1)
# One program chooses all filters of a layer, one after another: the more lanes, the fewer waits for memory.
_COVER = (("FILTERS", 512), ("COLUMNS", 1024), ("MEMBERS", 4))
COVER_AT_RANDOM = Configuration(coverage.cover_kernel, (("RANDOM", 1), *_COVER), 16, max_registers=96)
COVER_IN_ORDER = Configuration(coverage.cover_kernel, (("RANDOM", 0), *_COVER), 16, max_registers=96)
BITS = Configuration(coverage.bits_kernel, (("BLOCK", 256),), 4)
FIXED = (MAGNITUDE, LEVEL, LABEL, MEMBERSHIP, COVER_AT_RANDOM, COVER_IN_ORDER, BITS)  # of any linkage and size


def configuration(n: int, d: int, linkage: str = "ward", algorithm: str = "auto") -> Configuration:
    """The kernel for a layer of n filters with kernels of d numbers."""
    constants: tuple[tuple[str, int], ...]
    unrolled = d if d in UNROLLED else 0
    if linkage != "ward" or algorithm == "chain" or (algorithm == "auto" and d > 1 and n <= SMALL):
        # Without a limit ptxas decides for as many registers on sm_80, and then spills some.
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
    """Every configuration there can be: what must compile, without spills, wherever we claim to run."""
    sizes = [n for n in (2**k for k in range(13)) for n in (n, n + 1) if n <= MAX_FILTERS]
    cases = [("ward", algorithm) for algorithm in ALGORITHMS] + [(linkage, "auto") for linkage in chain.LINKAGES]
    found = dict.fromkeys(
        configuration(n, d, *case) for case in cases for d in range(1, MAX_AREA + 1) for n in sizes
    )  # fmt: skip
    yield from (*FIXED, *found)


def scratch(kernel: Any, n: int, d: int, linkage: str) -> tuple[int, int]:
    """Floats and ints of scratch memory for one problem."""
    if kernel is chain.chain_kernel:
        return chain.floats_of_problem(linkage, n, d), n * chain.INTS_PER_POINT
    if kernel is line.line_kernel:
        return line.scratch(n)
    return reciprocal.scratch(n, d)


class Layer(Protocol):
    """A conv weight whose kernels are to be clustered, one problem for every active input channel."""

    @property
    def weight(self) -> Tensor: ...  # (n_out, n_in, kh, kw), any strides
    @property
    def filters(self) -> Tensor | None: ...  # (n,) the active filters; None: all
    @property
    def inputs(self) -> Tensor | None: ...  # (columns,) the active input channels; None: all
    @property
    def n(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def d(self) -> int: ...  # kh * kw


def why_not(layer: Layer) -> str | None:
    """Why the kernels, where they run at all (see `availability`), cannot cluster this layer; None if they can."""
    if layer.weight.dtype not in table.KINDS:
        return f"it is {layer.weight.dtype}, and the kernels read float32, float16 and bfloat16"
    if layer.n > MAX_FILTERS or layer.d > MAX_AREA:
        return (
            f"it has {layer.n} filters of {layer.d} numbers, and the kernels take at most {MAX_FILTERS} of {MAX_AREA}"
        )
    return None


class Plan(NamedTuple):
    """All that the host says about an event, on the device: what follows is launches alone, always the same ones."""

    table: Tensor
    programs: Tensor  # the owner array of the magnitudes: every active filter
    problems: Tensor  # ... of all problems that are this process's share
    launches: list[tuple[Configuration, Tensor]]  # the clustering kernels, each with its owner array
    layers: list[Tensor]  # owner arrays with one program per layer: of all, then of those whose filters are chosen here
    columns: Tensor  # the owner array of all problems of those layers
    sizes: Sizes
    read: list[Tensor]  # weights and index lists: the table has their addresses, so they must live as long as it does


class Sizes(NamedTuple):
    """What is to be allocated."""

    layers: int
    filters: int  # all of the network
    points: int
    problems: int
    floats: int  # scratch memory
    ints: int


class Forests(NamedTuple):
    """The dendrograms of all layers, one after the other. Layer l has columns[l] problems of n[l] points."""

    parent: Tensor  # (points,) int32
    height: Tensor  # (points,) float32, in units of the layer's scale
    report: Tensor  # (layers, REPORT) int32: see kernels/table.py
    work: Tensor  # (problems, 2) int32: rounds (chain: searches), and tiles (line, chain: blocks) of distances


class Members(NamedTuple):
    """The clusters of every channel: see kernels/coverage.py."""

    cluster: Tensor  # (points,) int32
    place: Tensor  # (points,) int16
    member: Tensor  # (points,) int16
    totals: Tensor  # (layers, TOTALS) int32


class Covers(NamedTuple):
    """The filters chosen in every layer; rows and columns of layers that are not chosen here are 0 or undefined."""

    order: Tensor  # (filters,) int32, from where the layer begins: numbers among its active filters
    gains: Tensor  # (filters,) int32
    kept: Tensor  # (filters,) int32: 1 for a chosen filter, at its own number
    totals: Tensor  # (layers, TOTALS) int32: covered clusters, clusters


class Report(NamedTuple):
    """What the host learns about a layer."""

    clustered: bool  # False: a weight is not finite, or an index list names one that does not exist
    finished: bool  # False: a kernel gave up, which only a defect can bring about
    exponent: int  # the kernels worked on weights * 2^-exponent
    h: float  # height of the cut, in those units; 0 without one


class Launch(NamedTuple):
    """A launch of one configuration: the problems begins[i] .. ends[i] - 1 of each rows[i] of the table."""

    configuration: Configuration
    rows: list[int]
    begins: list[int]
    ends: list[int]
    floats: int  # scratch memory
    ints: int


Shares = Sequence[tuple[int, int]]  # for every layer the problems first .. last - 1 that a process has to cluster


def rows_and_launches(
    layers: Sequence[Layer],
    linkage: str = "ward",
    algorithm: str = "auto",
    shares: Shares | None = None,
    seeds: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[list[int]], list[Launch]]:
    """The table, with a row for every layer, and the launches that cluster them: one per kernel area and size bucket,
    largest problems first, in parts where the scratch memory would pass its bound (such a layer has more rows).

    seeds: for every layer of its ties and of its draw.
    """
    table_rows: list[list[int]] = []
    groups: dict[tuple[Configuration, int], list[tuple[int, int, int, int]]] = {}  # n, layer, and its problems
    problem = forest = filters = 0
    for number, layer in enumerate(layers):
        weight, n, d, columns = layer.weight, layer.n, layer.d, layer.columns
        config = configuration(n, d, linkage, algorithm)
        table_rows.append([
            weight.data_ptr(), table.KINDS[weight.dtype],
            0 if layer.filters is None else layer.filters.data_ptr(),
            0 if layer.inputs is None else layer.inputs.data_ptr(),
            *weight.stride(), weight.shape[3], *weight.shape[:2], n, d, columns,
            number, problem, forest, filters, *((0, 0) if seeds is None else seeds[number]),
            0, 0, *scratch(config.kernel, n, d, linkage),
        ])  # fmt: skip
        begin, end = (0, columns) if shares is None else shares[number]
        if begin < end:
            groups.setdefault((config, d), []).append((n, number, begin, end))
        problem += columns
        forest += columns * n
        filters += weight.shape[0]

    launches = []
    for (config, _), group in groups.items():
        launch = Launch(config, [], [], [], 0, 0)
        for _, number, begin, last in sorted(group, key=lambda entry: -entry[0]):
            floats_each, ints_each = table_rows[number][-2:]
            row: int | None = number
            while begin < last:
                room = (SCRATCH_BYTES // 4 - launch.floats - launch.ints) // (floats_each + ints_each)
                if room < 1 and launch.rows:
                    launches.append(launch)
                    launch = Launch(config, [], [], [], 0, 0)
                    continue
                end = min(last, begin + max(room, 1))
                if row is None:
                    row = len(table_rows)
                    table_rows.append(list(table_rows[number]))
                table_rows[row][-4:-2] = launch.floats - begin * floats_each, launch.ints - begin * ints_each
                launch = launch._replace(
                    rows=[*launch.rows, row], begins=[*launch.begins, begin], ends=[*launch.ends, end],
                    floats=launch.floats + (end - begin) * floats_each, ints=launch.ints + (end - begin) * ints_each,
                )  # fmt: skip
                begin, row = end, None
        launches.append(launch)
    return table_rows, launches


def prepare(
    layers: Sequence[Layer],
    linkage: str = "ward",
    algorithm: str = "auto",
    shares: Shares | None = None,
    chosen: Sequence[int] | None = None,
    seeds: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """Plan an event over layers that are all on one device and such as `why_not` has nothing against. One transfer to
    the device, and none of the steps that follow has another.

    shares: which problems are clustered and cut here; all by default.
    chosen: the layers whose filters are chosen here; all by default.
    seeds: for every layer of its ties and of its draw.
    """
    device = layers[0].weight.device
    ns, columns = [layer.n for layer in layers], [layer.columns for layer in layers]
    rows, launches = rows_and_launches(layers, linkage, algorithm, shares, seeds)
    everyone, none = range(len(layers)), [0] * len(layers)
    begins, ends = (none, columns) if shares is None else ([s[0] for s in shares], [s[1] for s in shares])
    # The layer with most steps and columns goes first: it is the last to end.
    some = sorted(everyone if chosen is None else chosen, key=lambda number: -ns[number] * columns[number])
    arrays = [table.owners(everyone, none, ns), table.owners(everyone, begins, ends)]
    arrays += [table.owners(numbers, [0] * len(numbers), [1] * len(numbers)) for numbers in (everyone, some)]
    arrays += [table.owners(some, [0] * len(some), [columns[number] for number in some])]
    arrays += [table.owners(launch.rows, launch.begins, launch.ends) for launch in launches]
    own_table, programs, problems, all_layers, few_layers, of_few, *owners = table.tables_to_device(
        rows, arrays, device
    )
    sizes = Sizes(
        layers=len(layers),
        filters=sum(layer.weight.shape[0] for layer in layers),
        points=sum(n * count for n, count in zip(ns, columns, strict=True)),
        problems=sum(columns),
        # Launches follow each other on one stream, so they can share their scratch memory.
        floats=max((launch.floats for launch in launches), default=0),
        ints=max((launch.ints for launch in launches), default=0),
    )
    configured = [(launch.configuration, owner) for launch, owner in zip(launches, owners, strict=True)]
    read = [x for layer in layers for x in (layer.weight, layer.filters, layer.inputs) if x is not None]
    return Plan(own_table, programs, problems, configured, [all_layers, few_layers], of_few, sizes, read)


def cluster(plan: Plan) -> Forests:
    """Cluster this process's share of every layer."""
    device, sizes = plan.table.device, plan.sizes
    parent = torch.empty(sizes.points, dtype=torch.int32, device=device)
    height = torch.empty(sizes.points, dtype=torch.float32, device=device)
    work = torch.empty(sizes.problems, 2, dtype=torch.int32, device=device)
    report = torch.zeros(sizes.layers, table.REPORT.value, dtype=torch.int32, device=device)
    floats = torch.empty(sizes.floats, dtype=torch.float32, device=device)
    ints = torch.empty(sizes.ints, dtype=torch.int32, device=device)
    MAGNITUDE.run(len(plan.programs), plan.table, plan.programs, report)
    for config, owner in plan.launches:
        config.run(len(owner), plan.table, owner, report, parent, height, work, floats, ints)
    return Forests(parent, height, report, work)


def level(plan: Plan, forests: Forests, keep: Tensor) -> None:
    """The height of the cut of every layer, into the report: the lowest that leaves each problem of this share at most
    keep[layer] clusters. keep: (layers,) int32 on the device. The layer's is the largest over all shares."""
    LEVEL.run(len(plan.problems), plan.table, plan.problems, forests.report, keep, forests.height)


def label(plan: Plan, forests: Forests) -> tuple[Tensor, Tensor]:
    """The clusters at the cut. Returns labels (points,) and how many clusters each problem has (problems,), both int32
    and 0 for problems of other shares."""
    labels, clusters = (forests.parent.new_zeros(count) for count in (plan.sizes.points, plan.sizes.problems))
    LABEL.run(
        len(plan.problems), plan.table, plan.problems, forests.report, forests.parent, forests.height, labels,
        clusters,
    )  # fmt: skip
    return labels, clusters


def membership(plan: Plan, report: Tensor, labels: Tensor) -> Members:
    """The members of every cluster, from labels (points,) int32, which are numbers under n."""
    cluster = torch.empty_like(labels)
    place, member = (torch.empty_like(labels, dtype=torch.int16) for _ in range(2))
    totals = torch.zeros(plan.sizes.layers, coverage.TOTALS.value, dtype=torch.int32, device=labels.device)
    count = torch.empty_like(labels)
    MEMBERSHIP.run(
        len(plan.columns), plan.table, plan.columns, report, labels, count, cluster, place, member, totals
    )
    return Members(cluster, place, member, totals)


def cover(plan: Plan, report: Tensor, members: Members, keep: Tensor, order: Tensor | None) -> Covers:
    """Choose keep[layer] filters of every layer that is chosen here; the clusters of `members` are used up.

    order: (filters,) int32, which of equally good filters goes first, the larger; None: random bits.
    """
    device, few_layers = plan.table.device, plan.layers[1]
    empty = [torch.empty(plan.sizes.filters, dtype=torch.int32, device=device) for _ in range(3)]
    gain, taken, gains = empty
    kept = torch.zeros_like(gain)
    config = COVER_AT_RANDOM if order is None else COVER_IN_ORDER
    config.run(
        len(few_layers), plan.table, few_layers, report, keep, kept if order is None else order, members.cluster,
        members.place, members.member, gain, taken, gains, kept, members.totals,
    )  # fmt: skip
    return Covers(taken, gains, kept, members.totals)


def draw_bits(plan: Plan) -> Tensor:
    """Random bits for every filter of the network, from the seed of its layer's draw: (filters,) int32."""
    bits = torch.empty(plan.sizes.filters, dtype=torch.int32, device=plan.table.device)
    BITS.run(len(plan.layers[0]), plan.table, plan.layers[0], bits)
    return bits


def cut_layer(parent: Tensor, height: Tensor, keep: int) -> tuple[Tensor, float]:
    """Cut the problems (P, n) of one layer: labels (P, n) int32, and h in the units of height. Waits for the device."""
    parent, height = parent.contiguous(), height.contiguous()
    plan, report = layer_plan(parent.shape, parent.device)
    forests = Forests(parent.view(-1), height.view(-1), report, work=parent.new_empty(0, 2))  # done by someone else
    level(plan, forests, torch.tensor([keep], dtype=torch.int32, device=parent.device))
    labels, _ = label(plan, forests)
    return labels.view_as(parent), read_report(report)[0].h


def cover_layer(labels: Tensor, keep: int, seed: int, order: Tensor | None) -> Covers:
    """Choose keep filters of one layer with labels (P, n) int32, numbers under n."""
    plan, report = layer_plan(labels.shape, labels.device, seed)
    members = membership(plan, report, labels.contiguous().view(-1))
    return cover(plan, report, members, torch.tensor([keep], dtype=torch.int32, device=labels.device), order)


def layer_plan(shape: Sequence[int], device: torch.device, seed: int = 0) -> tuple[Plan, Tensor]:
    """An event over one layer without weights of this many problems and filters, and its report: all is clustered."""
    columns, n = shape
    row = [{"n": n, "n_out": n, "columns": columns, "tie_seed": seed}.get(name, 0) for name in table.NAMES]
    arrays = [table.owners([0], [0], [columns]), table.owners([0], [0], [1])]
    own_table, problems, one = table.tables_to_device([row], arrays, device)
    sizes = Sizes(layers=1, filters=n, points=columns * n, problems=columns, floats=0, ints=0)
    report = torch.zeros(1, table.REPORT.value, dtype=torch.int32, device=device)
    return Plan(own_table, problems, problems, [], [one, one], problems, sizes, []), report


def read_report(report: Tensor) -> list[Report]:
    """Wait for the device, and read the report."""
    return [read_row(row) for row in report.tolist()]


def read_row(row: Sequence[float]) -> Report:
    """What a layer's row of the report says."""
    magnitude, unfinished, over = (int(row[field.value]) for field in (table.MAGNITUDE, table.UNFINISHED, table.CUT))
    h = struct.unpack("f", struct.pack("i", over - 1))[0] if over else 0.0
    return Report(magnitude < table.INFINITY_BITS.value, not unfinished, table.exponent(magnitude), h)
