"""One event's launches: which kernel clusters which layer, and all layers of a network in a handful of launches.

    weights of all layers -> magnitude -> chain | line | reciprocal -> forests -> level -> label -> labels

Nothing here waits for the device. What the host must know afterwards is in the report, which `ops` reads once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from reprune_triton.kernels import chain, cut, line, magnitude, reciprocal, table

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
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.warps, "num_stages": 1, **limit}

    def run(self, programs: int, *arguments: Tensor) -> None:
        if programs:
            self.kernel[(programs,)](*arguments, **dict(self.constants), **self.options())


MAGNITUDE = Configuration(magnitude.magnitude_kernel, (("BLOCK", 1024),), 4)
LEVEL = Configuration(cut.level_kernel, (("BLOCK", 128),), 1)
LABEL = Configuration(cut.label_kernel, (("BLOCK", 128),), 1)


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
        warps = {64: 1, 128: 1, 256: 2, 512: 4, 1024: 4}.get(width, 8)
        return Configuration(line.line_kernel, (("WIDTH", width), ("BLOCK", 64 * warps)), warps, max_registers=128)
    constants = (("D", unrolled), ("ROWS", 16), ("COLS", reciprocal.COLS), ("BLOCK", 256))
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
        return n * line.FLOATS_PER_POINT, n * line.INTS_PER_POINT
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


def _fields(layer: Layer) -> dict[str, int]:
    w = layer.weight
    return {
        "weight": w.data_ptr(), "kind": table.KINDS[w.dtype],
        "filters": 0 if layer.filters is None else layer.filters.data_ptr(),
        "inputs": 0 if layer.inputs is None else layer.inputs.data_ptr(),
        "stride_out": w.stride(0), "stride_in": w.stride(1), "stride_h": w.stride(2), "stride_w": w.stride(3),
        "kernel_w": w.shape[3], "n_out": w.shape[0], "n_in": w.shape[1],
        "n": layer.n, "d": layer.d, "columns": layer.columns,
    }  # fmt: skip


class Forests(NamedTuple):
    """The dendrograms of all layers, one after the other. Layer l has columns[l] problems of n[l] points."""

    parent: Tensor  # (points,) int32
    height: Tensor  # (points,) float32, in units of the layer's scale
    report: Tensor  # (layers, REPORT) int32: see kernels/table.py
    work: Tensor  # (problems, 2) int32: rounds (chain: searches), and tiles (line, chain: blocks) of distances
    shapes: list[tuple[int, int]]  # (columns, n)


class Report(NamedTuple):
    """What the host learns about a layer."""

    clustered: bool  # False: a weight is not finite, or an index list names one that does not exist
    finished: bool  # False: a kernel gave up, which only a defect can bring about
    exponent: int  # the kernels worked on weights * 2^-exponent
    h: float  # height of the cut, in those units; 0 without one


def read_report(forests: Forests) -> list[Report]:
    """Wait for the device, and read the report: the only transfer of an event."""
    found = []
    for row in forests.report.tolist():
        magnitude, unfinished, over = (row[field.value] for field in (table.MAGNITUDE, table.UNFINISHED, table.CUT))
        h = struct.unpack("f", struct.pack("i", over - 1))[0] if over else 0.0
        found.append(Report(magnitude < table.INFINITY_BITS.value, not unfinished, table.exponent(magnitude), h))
    return found


class _Launch(NamedTuple):
    configuration: Configuration
    rows: table.Rows
    floats: int
    ints: int


def _plan(layers: Sequence[Layer], linkage: str, algorithm: str) -> list[_Launch]:
    """Launches for all layers: one per kernel area and size bucket, largest problems first, cut where the scratch
    memory of a launch would pass its bound."""
    groups: dict[tuple[Configuration, int], list[tuple[Layer, dict[str, int]]]] = {}
    problem = forest = 0
    for number, layer in enumerate(layers):
        key = configuration(layer.n, layer.d, linkage, algorithm), layer.d
        fields = _fields(layer) | {"layer": number, "problem": problem, "forest": forest}
        groups.setdefault(key, []).append((layer, fields))
        problem += layer.columns
        forest += layer.columns * layer.n

    launches = []
    for (config, _), group in groups.items():
        rows, floats, ints = table.Rows(), 0, 0
        for layer, fields in sorted(group, key=lambda pair: -pair[0].n):
            floats_each, ints_each = scratch(config.kernel, layer.n, layer.d, linkage)
            column = 0
            while column < layer.columns:
                room = (SCRATCH_BYTES // 4 - floats - ints) // (floats_each + ints_each)
                if room < 1 and rows.programs:
                    launches.append(_Launch(config, rows, floats, ints))
                    rows, floats, ints = table.Rows(), 0, 0
                    continue
                count = min(layer.columns - column, max(room, 1))
                part = {
                    "column": column, "problem": fields["problem"] + column,
                    "forest": fields["forest"] + column * layer.n,
                    "floats": floats, "ints": ints, "floats_each": floats_each, "ints_each": ints_each,
                }  # fmt: skip
                rows.add(count, fields | part)
                floats, ints, column = floats + count * floats_each, ints + count * ints_each, column + count
        launches.append(_Launch(config, rows, floats, ints))
    return launches


def cluster(layers: Sequence[Layer], linkage: str = "ward", algorithm: str = "auto") -> Forests:
    """Cluster every layer, all on one device and such as `why_not` has nothing against."""
    device = layers[0].weight.device
    shapes = [(layer.columns, layer.n) for layer in layers]
    points, problems = sum(columns * n for columns, n in shapes), sum(columns for columns, _ in shapes)
    parent = torch.empty(points, dtype=torch.int32, device=device)
    height = torch.empty(points, dtype=torch.float32, device=device)
    work = torch.empty(problems, 2, dtype=torch.int32, device=device)
    report = torch.zeros(len(layers), table.REPORT.value, dtype=torch.int32, device=device)

    filters = table.Rows()
    for number, layer in enumerate(layers):
        filters.add(layer.n, _fields(layer) | {"layer": number})
    launches = _plan(layers, linkage, algorithm)
    tables = table.to_device([filters, *(launch.rows for launch in launches)], device)
    MAGNITUDE.run(filters.programs, *tables[0], report)
    # Launches follow each other on one stream, so they can share their scratch memory.
    floats = torch.empty(max(launch.floats for launch in launches), dtype=torch.float32, device=device)
    ints = torch.empty(max(launch.ints for launch in launches), dtype=torch.int32, device=device)
    for launch, own_table in zip(launches, tables[1:], strict=True):
        launch.configuration.run(launch.rows.programs, *own_table, report, parent, height, work, floats, ints)
    return Forests(parent, height, report, work, shapes)


def cut_layer(parent: Tensor, height: Tensor, merges: int) -> tuple[Tensor, float]:
    """Cut the problems (P, n) of one layer: labels (P, n) int32, and h in the units of height. Waits for the device."""
    parent, height = parent.contiguous(), height.contiguous()
    report = torch.zeros(1, table.REPORT.value, dtype=torch.int32, device=parent.device)
    forests = Forests(parent.view(-1), height.view(-1), report, report, [(len(parent), parent.shape[1])])
    labels, _ = cut_forests(forests, [merges])
    return labels.view_as(parent), read_report(forests)[0].h


def cut_forests(forests: Forests, merges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut every layer of the network at the lowest height that gives all its problems merges[l] merges or more.

    Returns labels (points,) and how many clusters each problem has (problems,), both int32. h is in the report.
    """
    rows = table.Rows()
    problem = forest = 0
    for number, ((columns, n), wanted) in enumerate(zip(forests.shapes, merges, strict=True)):
        rows.add(columns, {"n": n, "layer": number, "problem": problem, "forest": forest, "merges": wanted})
        problem += columns
        forest += columns * n
    (own_table,) = table.to_device([rows], forests.parent.device)
    labels = torch.empty_like(forests.parent)
    clusters = torch.empty(problem, dtype=torch.int32, device=labels.device)
    LEVEL.run(rows.programs, *own_table, forests.report, forests.height)
    LABEL.run(rows.programs, *own_table, forests.report, forests.parent, forests.height, labels, clusters)
    return labels, clusters
