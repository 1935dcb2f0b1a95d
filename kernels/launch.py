"""One event's launches: which kernel clusters which layer, and all layers of a network in a handful of launches.

    weights of all layers -> magnitude -> chain | line | reciprocal -> forests -> level -> label -> labels

Nothing here waits for the device. What the host must know afterwards is in the report, which `ops` reads once.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from reprune_triton.kernels import chain, level, line, magnitude, reciprocal, table

if TYPE_CHECKING:
    from reprune_triton.ops import Layer

MAX_FILTERS = 4096
MAX_AREA = 121  # kh * kw of 11x11
ALGORITHMS = ("auto", "chain", "reciprocal")
SMALL = 64  # filters up to which a chain in one warp is as quick as rounds
UNROLLED = (1, 4, 9)  # areas whose loops over coordinates are unrolled
SCRATCH_BYTES = 256 << 20  # of one launch; more problems than fit are clustered in several launches


class Configuration(NamedTuple):
    """A kernel as it is compiled. On one GPU architecture there is one binary for each."""

    kernel: Any
    constants: tuple[tuple[str, int], ...]
    warps: int
    max_registers: int | None = None  # per thread, on NVIDIA

    def options(self) -> dict[str, int]:
        # Loads are not pipelined: one copy of the state is all a barrier protects.
        nvidia = torch.version.hip is None
        limit = {"maxnreg": self.max_registers} if nvidia and self.max_registers is not None else {}
        return {"num_warps": self.warps, "num_stages": 1, **limit}

    def run(self, programs: int, *arguments: Tensor) -> None:
        """Launch on the device of the arguments, which Triton takes to be the current one."""
        device = arguments[0].device
        if programs:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                self.kernel[(programs,)](*arguments, **dict(self.constants), **self.options())


MAGNITUDE = Configuration(magnitude.magnitude_kernel, (("BLOCK", 1024),), 4)
LEVEL = Configuration(level.level_kernel, (("BLOCK", 128),), 1)
LABEL = Configuration(level.label_kernel, (("BLOCK", 128),), 1)


def configuration(n: int, d: int, linkage: str = "ward", algorithm: str = "auto") -> Configuration:
    """The kernel for a layer of n filters with kernels of d numbers."""
    constants: tuple[tuple[str, int], ...]
    unrolled = d if d in UNROLLED else 0
    if linkage != "ward" or algorithm == "chain" or (algorithm == "auto" and d > 1 and n <= SMALL):
        block, warps = (64, 1) if n <= SMALL else (256, 4)
        unrolled = unrolled if linkage == "ward" else 0
        constants = (("LINKAGE", chain.LINKAGES[linkage]), ("D", unrolled), ("BLOCK", block))
        return Configuration(chain.chain_kernel, constants, warps)
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
    yield from (MAGNITUDE, *found, LEVEL, LABEL)


def scratch(kernel: Any, n: int, d: int, linkage: str) -> tuple[int, int]:
    """Floats and ints of scratch memory for one problem."""
    if kernel is chain.chain_kernel:
        return chain.floats_of_problem(linkage, n, d), n * chain.INTS_PER_POINT
    if kernel is line.line_kernel:
        return line.scratch(n)
    return reciprocal.scratch(n, d)


def why_not(layer: Layer) -> str | None:
    """Why the kernels cannot cluster this layer; None if they can."""
    interpreted = not isinstance(chain.chain_kernel, triton.JITFunction)
    if layer.weight.device.type != "cuda" and not interpreted:
        return f"it is on {layer.weight.device}, and the kernels run on a GPU (move it to cuda)"
    if layer.weight.dtype not in table.KINDS:
        return f"it is {layer.weight.dtype}, and the kernels read float32, float16 and bfloat16"
    if layer.n > MAX_FILTERS or layer.d > MAX_AREA:
        return (
            f"it has {layer.n} filters of {layer.d} numbers, and the kernels take at most {MAX_FILTERS} of {MAX_AREA}"
        )
    return None


class Forests(NamedTuple):
    """The dendrograms of all layers, one after the other. Layer l has columns[l] problems of n[l] points."""

    parent: Tensor  # (points,) int32
    height: Tensor  # (points,) float32, in units of the layer's scale
    report: Tensor  # (layers, REPORT) int32: see kernels/table.py
    work: Tensor  # (problems, 2) int32: rounds (chain: searches), and tiles (line, chain: blocks) of distances
    table: Tensor  # the event's table
    problems: Tensor  # the owner array of all problems


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


def plan(
    layers: Sequence[Layer], linkage: str = "ward", algorithm: str = "auto", merges: Sequence[int] | None = None
) -> tuple[list[list[int]], list[Launch]]:
    """The table, with a row for every layer, and the launches that cluster them: one per kernel area and size bucket,
    largest problems first, in parts where the scratch memory would pass its bound (such a layer has more rows)."""
    table_rows: list[list[int]] = []
    groups: dict[tuple[Configuration, int], list[tuple[int, int, int]]] = {}  # n, number and columns of the layers
    problem = forest = 0
    for number, layer in enumerate(layers):
        weight, n, d, columns = layer.weight, layer.n, layer.d, layer.columns
        config = configuration(n, d, linkage, algorithm)
        table_rows.append([
            weight.data_ptr(), table.KINDS[weight.dtype],
            0 if layer.filters is None else layer.filters.data_ptr(),
            0 if layer.inputs is None else layer.inputs.data_ptr(),
            *weight.stride(), weight.shape[3], *weight.shape[:2], n, d, columns,
            number, problem, forest, 0 if merges is None else merges[number],
            0, 0, *scratch(config.kernel, n, d, linkage),
        ])  # fmt: skip
        groups.setdefault((config, d), []).append((n, number, columns))
        problem += columns
        forest += columns * n

    launches = []
    for (config, _), group in groups.items():
        launch = Launch(config, [], [], [], 0, 0)
        for _, number, columns in sorted(group, key=lambda entry: -entry[0]):
            floats_each, ints_each = table_rows[number][-2:]
            begin, row = 0, number
            while begin < columns:
                room = (SCRATCH_BYTES // 4 - launch.floats - launch.ints) // (floats_each + ints_each)
                if room < 1 and launch.rows:
                    launches.append(launch)
                    launch = Launch(config, [], [], [], 0, 0)
                    continue
                end = min(columns, begin + max(room, 1))
                if begin > 0:
                    row = len(table_rows)
                    table_rows.append(list(table_rows[number]))
                table_rows[row][-4:-2] = launch.floats - begin * floats_each, launch.ints - begin * ints_each
                launch = launch._replace(
                    rows=[*launch.rows, row], begins=[*launch.begins, begin], ends=[*launch.ends, end],
                    floats=launch.floats + (end - begin) * floats_each, ints=launch.ints + (end - begin) * ints_each,
                )  # fmt: skip
                begin = end
        launches.append(launch)
    return table_rows, launches


def cluster(
    layers: Sequence[Layer], linkage: str = "ward", algorithm: str = "auto", merges: Sequence[int] | None = None
) -> Forests:
    """Cluster every layer, all on one device and such as `why_not` has nothing against.

    merges: for `cut`, how many merges it is to make at least in every problem of each layer.
    """
    device = layers[0].weight.device
    ns, columns = [layer.n for layer in layers], [layer.columns for layer in layers]
    points, problems = sum(n * count for n, count in zip(ns, columns, strict=True)), sum(columns)
    parent = torch.empty(points, dtype=torch.int32, device=device)
    height = torch.empty(points, dtype=torch.float32, device=device)
    work = torch.empty(problems, 2, dtype=torch.int32, device=device)
    report = torch.zeros(len(layers), table.REPORT.value, dtype=torch.int32, device=device)

    rows, launches = plan(layers, linkage, algorithm, merges)
    everyone, first = range(len(layers)), [0] * len(layers)
    arrays = [table.owners(everyone, first, columns), table.owners(everyone, first, ns)]
    arrays += [table.owners(launch.rows, launch.begins, launch.ends) for launch in launches]
    own_table, of_problems, of_filters, *owners = table.to_device(rows, arrays, device)
    MAGNITUDE.run(len(of_filters), own_table, of_filters, report)
    # Launches follow each other on one stream, so they can share their scratch memory.
    floats = torch.empty(max(launch.floats for launch in launches), dtype=torch.float32, device=device)
    ints = torch.empty(max(launch.ints for launch in launches), dtype=torch.int32, device=device)
    for launch, owner in zip(launches, owners, strict=True):
        launch.configuration.run(len(owner), own_table, owner, report, parent, height, work, floats, ints)
    return Forests(parent, height, report, work, own_table, of_problems)


def cut(forests: Forests) -> tuple[Tensor, Tensor]:
    """Cut every layer at the lowest height that gives all its problems the merges that `cluster` was told.

    Returns labels (points,) and how many clusters each problem has (problems,), both int32. h is in the report.
    """
    parent, height, report, _, own_table, owner = forests
    labels = torch.empty_like(parent)
    clusters = torch.empty(len(owner), dtype=torch.int32, device=parent.device)
    LEVEL.run(len(owner), own_table, owner, report, height)
    LABEL.run(len(owner), own_table, owner, report, parent, height, labels, clusters)
    return labels, clusters


def cut_layer(parent: Tensor, height: Tensor, merges: int) -> tuple[Tensor, float]:
    """Cut the problems (P, n) of one layer: labels (P, n) int32, and h in the units of height. Waits for the device."""
    parent, height = parent.contiguous(), height.contiguous()
    columns, n = parent.shape
    row = [{"n": n, "merges": merges}.get(name, 0) for name in table.NAMES]
    tables = table.to_device([row], [table.owners([0], [0], [columns])], parent.device)
    report = torch.zeros(1, table.REPORT.value, dtype=torch.int32, device=parent.device)
    forests = Forests(parent.view(-1), height.view(-1), report, report, *tables)
    labels, _ = cut(forests)
    return labels.view_as(parent), read_report(report)[0].h


def read_report(report: Tensor) -> list[Report]:
    """Wait for the device, and read the report: the only transfer of an event."""
    found = []
    for row in report.tolist():
        magnitude, unfinished, over = (row[field.value] for field in (table.MAGNITUDE, table.UNFINISHED, table.CUT))
        h = struct.unpack("f", struct.pack("i", over - 1))[0] if over else 0.0
        found.append(Report(magnitude < table.INFINITY_BITS.value, not unfinished, table.exponent(magnitude), h))
    return found
