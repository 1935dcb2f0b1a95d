"""The table of layers, by which a program finds its clustering problem, and device functions that read it.

All layers of a network share one launch. Its programs find their problem through two arrays of int64 on the device:

    owner  (programs,)     row << 32 | number: a row of the table, and a problem of that layer (or filter, or 0)
    table  (rows, FIELDS)  a `Row` for every layer, or part of one: where its weights and results are

Weights are read where they are: any strides, float32, float16 or bfloat16, and only the active filters and inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from reprune_triton.kernels.host import to_device


class Row(NamedTuple):
    """A layer in the table, or a part of one. Offsets and strides count elements."""

    # The weight, any strides.
    weight: int = 0  # address
    kind: int = 0  # of number: see KINDS
    filters: int = 0  # address of the list of active filters; 0: all
    inputs: int = 0  # address of the list of active input channels; 0: all
    stride_out: int = 0
    stride_in: int = 0
    stride_h: int = 0
    stride_w: int = 0
    kernel_w: int = 0
    n_out: int = 0
    n_in: int = 0
    # The clustering problems.
    n: int = 0  # active filters: points of a problem
    d: int = 0  # kh * kw: numbers of a point
    columns: int = 0  # active input channels: problems
    # Where the layer begins in what is one after another for the whole network.
    layer: int = 0  # rows of the report
    problem: int = 0  # problems
    forest: int = 0  # parents, heights and labels
    filter: int = 0  # filters, active or not
    # Seeds of random bits.
    tie_seed: int = 0  # in the coverage
    draw_seed: int = 0  # in the regrowth
    # Scratch memory.
    floats: int = 0  # where that of problem 0 begins, or would begin if this launch had problem 0
    ints: int = 0
    floats_each: int = 0  # how much each problem has
    ints_each: int = 0


def _at(*names: str) -> list[Any]:
    """Return the columns of the table with these names, as constants for kernels."""
    return [tl.constexpr(Row._fields.index(name)) for name in names]


FIELDS = tl.constexpr(len(Row._fields))
WEIGHT, KIND, FILTERS, INPUTS = _at("weight", "kind", "filters", "inputs")
STRIDE_OUT, STRIDE_IN, STRIDE_H, STRIDE_W = _at("stride_out", "stride_in", "stride_h", "stride_w")
KERNEL_W, N_OUT, N_IN = _at("kernel_w", "n_out", "n_in")
N, D, COLUMNS = _at("n", "d", "columns")
LAYER, PROBLEM, FOREST, FILTER = _at("layer", "problem", "forest", "filter")
TIE_SEED, DRAW_SEED = _at("tie_seed", "draw_seed")
FLOATS, INTS, FLOATS_EACH, INTS_EACH = _at("floats", "ints", "floats_each", "ints_each")

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The report, int32 (layers, REPORT), zero at first: what the host reads after the launches, in one transfer.
REPORT = tl.constexpr(3)
MAGNITUDE = tl.constexpr(0)  # bits of the largest |weight|; INFINITY_BITS or more: the layer is not clustered
UNFINISHED = tl.constexpr(1)  # 1 if a kernel gave up a problem of the layer
CUT = tl.constexpr(2)  # 1 + bits of the cut height; 0: nothing merges

# Magnitudes whose squares stay normal float32 numbers, as powers of two. Others are scaled, exactly.
SMALLEST, LARGEST = tl.constexpr(-40), tl.constexpr(50)
INFINITY_BITS = tl.constexpr(0x7F800000)  # as integers, the bits of infinity and NaN are above those of all numbers


def kernel(function: Callable[..., None]) -> Any:
    """Make a Triton kernel that is compiled once for all alignments of its pointers, so for all views of a buffer."""
    pointers = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize_on_alignment=pointers)


def exponent(bits: int) -> int:
    """Return e such that the kernels work on weights * 2^-e, from the bits of the largest |weight| (finite).

    The host's twin of `working_scale`.
    """
    e = (bits >> 23) - 126
    return 0 if bits == 0 or SMALLEST.value <= e <= LARGEST.value else min(e, 126)


def address(index: Tensor | None) -> int:
    """Return the address of an index list; 0 without one, which stands for all."""
    return 0 if index is None else index.data_ptr()


def owners(parts: Iterable[tuple[int, int, int]]) -> np.ndarray:
    """Return the owner array of a launch, from parts (row, begin, end): problems begin .. end - 1 of that row."""
    return np.concatenate([np.empty(0, np.int64), *((row << 32) + np.arange(begin, end) for row, begin, end in parts)])


def tables_to_device(
    rows: Sequence[Sequence[int]], owner_arrays: Sequence[np.ndarray], device: torch.device
) -> list[Tensor]:
    """Copy the table and the owner arrays to the device, in one transfer for which the host does not wait."""
    parts = [np.array(rows, dtype=np.int64).ravel(), *owner_arrays]
    return list(to_device(np.concatenate(parts), device).split([len(part) for part in parts]))


@triton.jit
def locate(table_ptr, owner_ptr, WIDTH: tl.constexpr = FIELDS):
    """Return the program's row in a table of WIDTH columns, and its number in that row."""
    entry = tl.load(owner_ptr + tl.program_id(0))
    return table_ptr + (entry >> 32) * WIDTH, (entry & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def whole(row_ptr, FIELD: tl.constexpr):
    """Load a field whose numbers fit in int32."""
    return tl.load(row_ptr + FIELD).to(tl.int32)


@triton.jit
def report_of(row_ptr, report_ptr):
    """Return where the layer's row of the report is."""
    return report_ptr + whole(row_ptr, LAYER) * REPORT


@triton.jit
def working_scale(magnitude):
    """Return 2^-e for the bits of the largest |weight| (finite): 1 unless squares would leave the normal range."""
    e = (magnitude >> 23) - 126
    e = tl.where((magnitude == 0) | ((e >= SMALLEST) & (e <= LARGEST)), 0, tl.minimum(e, 126))
    return ((127 - e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pick(index_address, i, mask):
    """Load index[i], a list of active filters or inputs, or return i where there is no list. i, mask: any one shape."""
    found = i.to(tl.int64)  # as i
    if index_address != 0:
        found = tl.load(index_address.to(tl.pointer_type(tl.int64)) + i, mask=mask, other=0)
    return found


@triton.jit
def read(row_ptr, offs, mask):
    """Load weights at these offsets, as float32. offs, mask: any one shape."""
    address = tl.load(row_ptr + WEIGHT)
    kind = whole(row_ptr, KIND)
    if kind == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offs, mask=mask, other=0.0)
    elif kind == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offs, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def kernel_offset(row_ptr, k):
    """Return the offset of a kernel's number k from its first number."""
    kw = tl.load(row_ptr + KERNEL_W)
    return (k // kw) * tl.load(row_ptr + STRIDE_H) + (k % kw) * tl.load(row_ptr + STRIDE_W)


@triton.jit
def point_offsets(row_ptr, number, i, mask):
    """Return the offsets [BLOCK] of the points i [BLOCK] of the layer's problem `number`, in the weight."""
    column = pick(tl.load(row_ptr + INPUTS), number, number >= 0)
    rows = pick(tl.load(row_ptr + FILTERS), i, mask)  # [BLOCK]
    return rows * tl.load(row_ptr + STRIDE_OUT) + column * tl.load(row_ptr + STRIDE_IN)


@triton.jit
def points_to_cluster(row_ptr, report_ptr):
    """Return n, or 0 if the layer has a weight that is not finite or a wrong index: then it is not clustered."""
    magnitude = tl.load(report_of(row_ptr, report_ptr) + MAGNITUDE)
    return tl.where(magnitude < INFINITY_BITS, whole(row_ptr, N), 0)


@triton.jit
def begin_problem(table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr):
    """Return what a clustering kernel starts with: its row and problem, n, d, the scale for the weights, and where this
    problem's parents, heights and scratch memory begin."""
    row_ptr, number = locate(table_ptr, owner_ptr)
    magnitude = tl.load(report_of(row_ptr, report_ptr) + MAGNITUDE)
    n = points_to_cluster(row_ptr, report_ptr)
    forest = tl.load(row_ptr + FOREST) + number.to(tl.int64) * n
    floats = tl.load(row_ptr + FLOATS) + number * tl.load(row_ptr + FLOATS_EACH)
    ints = tl.load(row_ptr + INTS) + number * tl.load(row_ptr + INTS_EACH)
    return (
        row_ptr, number, n, whole(row_ptr, D), working_scale(magnitude),
        parent_ptr + forest, height_ptr + forest, floats_ptr + floats, ints_ptr + ints,
    )  # fmt: skip


@triton.jit
def end_problem(row_ptr, number, report_ptr, work_ptr, rounds, tiles, clusters):
    """Store how much work a problem was, and report it as unfinished if it has more than one cluster left."""
    problem = whole(row_ptr, PROBLEM) + number
    tl.store(work_ptr + 2 * problem, rounds)
    tl.store(work_ptr + 2 * problem + 1, tiles)
    if clusters > 1:
        tl.atomic_max(report_of(row_ptr, report_ptr) + UNFINISHED, 1)
