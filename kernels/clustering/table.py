"""Which clustering problem a program works on.

All layers of a network share one launch. Its programs find their problem through two arrays of int64 on the device:

    owner  (programs,)     row << 32 | number: a row of the table, and the layer's problem (of `magnitude`: filter)
    table  (rows, FIELDS)  for every layer where its weights and results are

Weights are read where they are: any strides, float32, float16 or bfloat16, and only the active filters and inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from reprune_triton.kernels.host import to_device

# The columns of the table, in order. Offsets and strides count elements, addresses bytes; an index address 0 is "all".
NAMES = (
    "weight", "kind", "filters", "inputs", "stride_out", "stride_in", "stride_h", "stride_w", "kernel_w",
    "n_out", "n_in", "n", "d", "columns",  # n and columns: active filters and inputs; d = kh * kw
    "layer",  # row of the report
    "problem",  # number of the layer's first problem among all of the network
    "forest",  # where the layer's parents, heights and labels begin
    "filter",  # where the layer's filters begin among all of the network, active or not
    "tie_seed", "draw_seed",  # of the random bits in the layer's coverage and regrowth
    "floats", "ints",  # where the scratch memory of problem 0 begins, or would begin if this launch had it
    "floats_each", "ints_each",  # how much each problem has
)  # fmt: skip

FIELDS = tl.constexpr(len(NAMES))
WEIGHT, KIND, FILTERS, INPUTS = (tl.constexpr(NAMES.index(name)) for name in ("weight", "kind", "filters", "inputs"))
STRIDE_OUT, STRIDE_IN = tl.constexpr(NAMES.index("stride_out")), tl.constexpr(NAMES.index("stride_in"))
STRIDE_H, STRIDE_W = tl.constexpr(NAMES.index("stride_h")), tl.constexpr(NAMES.index("stride_w"))
N_OUT, N_IN, N = (tl.constexpr(NAMES.index(name)) for name in ("n_out", "n_in", "n"))
KERNEL_W, D, COLUMNS = (tl.constexpr(NAMES.index(name)) for name in ("kernel_w", "d", "columns"))
LAYER, PROBLEM, FOREST = (tl.constexpr(NAMES.index(name)) for name in ("layer", "problem", "forest"))
FILTER, FLOATS, INTS = (tl.constexpr(NAMES.index(name)) for name in ("filter", "floats", "ints"))
TIE_SEED, DRAW_SEED = tl.constexpr(NAMES.index("tie_seed")), tl.constexpr(NAMES.index("draw_seed"))
FLOATS_EACH, INTS_EACH = tl.constexpr(NAMES.index("floats_each")), tl.constexpr(NAMES.index("ints_each"))

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The report, int32 (layers, REPORT), zero at first: what the host reads after the event, in one transfer.
REPORT = tl.constexpr(3)
MAGNITUDE = tl.constexpr(0)  # bits of the largest |weight|; from INFINITY_BITS on: not to be clustered
UNFINISHED = tl.constexpr(1)  # 1 if a problem of the layer did not come to an end
CUT = tl.constexpr(2)  # 1 + bits of the height of the cut; 0: nothing merges

# Magnitudes whose squares stay normal float32 numbers, as powers of two. Others are scaled, exactly.
SMALLEST, LARGEST = tl.constexpr(-40), tl.constexpr(50)
INFINITY_BITS = tl.constexpr(0x7F800000)  # as integers, the bits of infinity and NaN are above those of all numbers


def kernel(function: Callable[..., None]) -> Any:
    """A Triton kernel that is compiled once, wherever its pointers point: views of one buffer share a launch."""
    pointers = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize_on_alignment=pointers)


def exponent(bits: int) -> int:
    """e such that the kernels work on weights * 2^-e, from the bits of the largest |weight|; see `working_scale`."""
    e = (bits >> 23) - 126
    return 0 if bits == 0 or SMALLEST.value <= e <= LARGEST.value else min(e, 126)


def owners(rows: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> np.ndarray:
    """The owner array of a launch that has the problems begins[i] .. ends[i] - 1 of each rows[i], in this order."""
    parts = [np.arange(begin, end) + (row << 32) for row, begin, end in zip(rows, begins, ends, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def tables_to_device(
    rows: Sequence[Sequence[int]], owner_arrays: Sequence[np.ndarray], device: torch.device
) -> list[Tensor]:
    """The table and all owner arrays, in one transfer for which the host does not wait."""
    parts = [np.array(rows, dtype=np.int64).ravel(), *owner_arrays]
    return list(to_device(np.concatenate(parts), device).split([len(part) for part in parts]))


@triton.jit
def locate(table_ptr, owner_ptr):
    """The program's row in the table, and its number in that layer."""
    entry = tl.load(owner_ptr + tl.program_id(0))
    return table_ptr + (entry >> 32) * FIELDS, (entry & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def whole(row_ptr, FIELD: tl.constexpr):
    """A field that is a small number."""
    return tl.load(row_ptr + FIELD).to(tl.int32)


@triton.jit
def working_scale(magnitude):
    """2^-e for the bits of a largest |weight| (finite): 1 unless squares would leave the normal range."""
    e = (magnitude >> 23) - 126
    e = tl.where((magnitude == 0) | ((e >= SMALLEST) & (e <= LARGEST)), 0, tl.minimum(e, 126))
    return ((127 - e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pick(index_address, i, mask):
    """index[i], or i itself where there is no index: a list of active filters or inputs."""
    found = i.to(tl.int64)
    if index_address != 0:
        found = tl.load(index_address.to(tl.pointer_type(tl.int64)) + i, mask=mask, other=0)
    return found


@triton.jit
def read(row_ptr, offs, mask):
    """Weights at these offsets, as float32. mask and offs may have any one shape."""
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
    """Where number k of a kernel stands, from the kernel's first one."""
    kw = tl.load(row_ptr + KERNEL_W)
    return (k // kw) * tl.load(row_ptr + STRIDE_H) + (k % kw) * tl.load(row_ptr + STRIDE_W)


@triton.jit
def point_offsets(row_ptr, number, i, mask):
    """Where the points i [BLOCK] of the layer's problem `number` begin."""
    column = pick(tl.load(row_ptr + INPUTS), number, number >= 0)
    rows = pick(tl.load(row_ptr + FILTERS), i, mask)
    return rows * tl.load(row_ptr + STRIDE_OUT) + column * tl.load(row_ptr + STRIDE_IN)


@triton.jit
def points_to_cluster(row_ptr, report_ptr):
    """n, or 0 if the layer has NaN or a wrong index: such a layer is not clustered, and there is nothing to cut."""
    magnitude = tl.load(report_ptr + whole(row_ptr, LAYER) * REPORT + MAGNITUDE)
    return tl.where(magnitude < INFINITY_BITS, whole(row_ptr, N), 0)


@triton.jit
def begin_problem(table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr):
    """What a clustering kernel starts with: its row and number, n, d, the scale for the weights, and where this
    problem's parents, heights and scratch memory begin."""
    row_ptr, number = locate(table_ptr, owner_ptr)
    magnitude = tl.load(report_ptr + whole(row_ptr, LAYER) * REPORT + MAGNITUDE)
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
    """What a clustering kernel ends with: how much work it was, and whether more than one cluster is left."""
    problem = whole(row_ptr, PROBLEM) + number
    tl.store(work_ptr + 2 * problem, rounds)
    tl.store(work_ptr + 2 * problem + 1, tiles)
    if clusters > 1:
        tl.atomic_max(report_ptr + whole(row_ptr, LAYER) * REPORT + UNFINISHED, 1)
