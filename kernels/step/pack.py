"""Slices of many tensors, copied and cast in one launch.

    gather   full[out][:, into] -> narrow     parameters on their way into a narrow forward
    scatter  narrow -> full[out][:, into]     their gradients on the way back; frozen values after an optimizer's step

A tensor is a grid of rows and columns: a conv weight is (n_out * kh * kw, n_in), a vector (1, n). As in
kernels/table.py, a program finds its copy through an owner array (row << 32 | tile) and a table with a row for each
copy. One side of all copies of a launch lies in one buffer, and states offsets in bytes in place of addresses: so the
table stays the same when only the buffer is a new one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from reprune_triton.kernels.clustering import table
from reprune_triton.kernels.clustering.table import pick
from reprune_triton.kernels.configuration import Configuration

# The columns of the table: a side has an address (or offset), a kind of number, index lists (0: all), and strides.
_SIDE = ("address", "kind", "out", "into", "stride_out", "stride_h", "stride_w", "stride_in")
NAMES = (*(f"{end}_{name}" for end in ("source", "target") for name in _SIDE), "rows", "columns", "area", "width")
FIELDS = tl.constexpr(len(NAMES))
SOURCE, TARGET = tl.constexpr(0), tl.constexpr(len(_SIDE))
ADDRESS, KIND, OUT, INTO = (tl.constexpr(_SIDE.index(name)) for name in ("address", "kind", "out", "into"))
STRIDE_OUT, STRIDE_H = tl.constexpr(_SIDE.index("stride_out")), tl.constexpr(_SIDE.index("stride_h"))
STRIDE_W, STRIDE_IN = tl.constexpr(_SIDE.index("stride_w")), tl.constexpr(_SIDE.index("stride_in"))
COUNT_ROWS, COUNT_COLUMNS = tl.constexpr(NAMES.index("rows")), tl.constexpr(NAMES.index("columns"))
AREA, WIDTH = tl.constexpr(NAMES.index("area")), tl.constexpr(NAMES.index("width"))  # kh * kw, and kw

NOTHING = -1  # the kind of a source that is zero everywhere
KINDS = table.KINDS | {torch.float64: 3}
ROWS, COLUMNS = 8, 64  # of a tile; with twice as many the 64-bit offsets spill

_LAUNCHED: set[tuple[torch.device, bool, bool]] = set()  # in which form the kernel is on the device


@triton.jit
def place(row_ptr, SIDE: tl.constexpr, rows, columns):
    """Where the tile stands in a side's tensor, in elements: [ROWS, COLUMNS]."""
    side_ptr = row_ptr + SIDE
    area, width = tl.load(row_ptr + AREA).to(tl.int32), tl.load(row_ptr + WIDTH).to(tl.int32)
    out, k = rows // area, rows % area
    down = pick(tl.load(side_ptr + OUT), out, rows < tl.load(row_ptr + COUNT_ROWS)) * tl.load(side_ptr + STRIDE_OUT)
    down += (k // width) * tl.load(side_ptr + STRIDE_H) + (k % width) * tl.load(side_ptr + STRIDE_W)
    into = pick(tl.load(side_ptr + INTO), columns, columns < tl.load(row_ptr + COUNT_COLUMNS))
    return down[:, None] + (into * tl.load(side_ptr + STRIDE_IN))[None, :]


@triton.jit
def read(address, kind, offs, inside, WIDE: tl.constexpr):
    """Numbers as float32, or float64 if WIDE; zero for a kind of none."""
    value = tl.zeros(offs.shape, tl.float64 if WIDE else tl.float32)
    if kind == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offs, mask=inside, other=0.0).to(value.dtype)
    elif kind == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offs, mask=inside, other=0.0).to(value.dtype)
    elif kind == 2:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offs, mask=inside, other=0.0).to(value.dtype)
    if WIDE:
        if kind == 3:
            value = tl.load(address.to(tl.pointer_type(tl.float64)) + offs, mask=inside, other=0.0)
    return value


@triton.jit
def write(address, kind, offs, value, inside, WIDE: tl.constexpr):
    """Numbers, rounded to the nearest of that kind; from float64 by way of float32, as torch does."""
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offs, value.to(tl.float32), mask=inside)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offs, value.to(tl.float32).to(tl.float16), mask=inside)
    elif kind == 2:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offs, value.to(tl.float32).to(tl.bfloat16), mask=inside)
    if WIDE:
        if kind == 3:
            tl.store(address.to(tl.pointer_type(tl.float64)) + offs, value, mask=inside)


@table.kernel
def copy_kernel(
    table_ptr, owner_ptr, buffer_ptr, TO_BUFFER: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """target[...] = source[...] for one tile of one copy."""
    entry = tl.load(owner_ptr + tl.program_id(0))
    row_ptr, tile = table_ptr + (entry >> 32) * FIELDS, (entry & 0xFFFFFFFF).to(tl.int32)
    blocks = tl.cdiv(tl.load(row_ptr + COUNT_COLUMNS).to(tl.int32), COLUMNS)
    rows = (tile // blocks) * ROWS + tl.arange(0, ROWS)
    columns = (tile % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < tl.load(row_ptr + COUNT_ROWS))[:, None] & (columns < tl.load(row_ptr + COUNT_COLUMNS))[None, :]
    source, target = tl.load(row_ptr + SOURCE + ADDRESS), tl.load(row_ptr + TARGET + ADDRESS)
    if TO_BUFFER:
        target += buffer_ptr.to(tl.int64)
    else:
        source += buffer_ptr.to(tl.int64)
    at = place(row_ptr, SOURCE, rows, columns)
    value = read(source, tl.load(row_ptr + SOURCE + KIND), at, inside, WIDE)
    at = place(row_ptr, TARGET, rows, columns)
    write(target, tl.load(row_ptr + TARGET + KIND), at, value, inside, WIDE)


@functools.cache
def configuration(to_buffer: bool, wide: bool) -> Configuration:
    flags = (("TO_BUFFER", int(to_buffer)), ("WIDE", int(wide)))
    return Configuration(copy_kernel, (*flags, ("ROWS", ROWS), ("COLUMNS", COLUMNS)), 4)


# Addresses (or offsets), dtypes (None: zeros, or nothing) and strides of tensors.
Forms = tuple[Sequence[int], Sequence[torch.dtype | None], Sequence[Sequence[int]]]


class Near(NamedTuple):
    """The end of a copy that lies in the buffer."""

    shape: Sequence[int]  # of what is copied: (n,), (n_out, n_in) or (n_out, n_in, kh, kw)
    offset: int  # bytes
    dtype: torch.dtype | None  # None: nothing is there, and zeros are copied
    strides: Sequence[int]  # of the tensor, in elements


class Copies:
    """Copies that are made in one launch, between tensors and a buffer.

    Args:
        near: their ends in the buffer.
        lists: for each copy the index lists (on the device) of the full tensor's dimensions 0 and 1; None: all.
        full: whether the full tensors, to which the lists belong, are "near" or "far".
        to_buffer: the direction.
        capturing: whether a CUDA graph is captured: what is read then must be there in a replay.
    """

    def __init__(
        self, near: Sequence[Near], lists: Sequence[tuple[Tensor | None, Tensor | None]], full: str, to_buffer: bool,
        device: torch.device, capturing: bool,
    ):  # fmt: skip
        self._device, self._to_buffer = device, to_buffer
        lists = [(_index(out), _index(into)) for out, into in lists]
        self._captured: list[Tensor] = []  # what replays of graphs read
        self._lists = lists  # their addresses are in the table
        grids = [_grid(part.shape) for part in near]
        tiles = [triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS) for rows, columns, *_ in grids]
        self._owner = self._to_device(table.owners(range(len(tiles)), [0] * len(tiles), tiles), capturing)
        self._rows = np.zeros((len(near), FIELDS.value), dtype=np.int64)
        self._rows[:, COUNT_ROWS.value :] = np.array(grids).reshape(-1, 4)
        self._filled: dict[int, tuple[Sequence[torch.dtype | None], Sequence[Sequence[int]]]] = {}
        ends = (SOURCE.value, TARGET.value)
        self._far, self._near = ends if to_buffer else ends[::-1]
        self._rows[:, self._near + ADDRESS.value] = [part.offset for part in near]
        self._fill(self._near, [part.dtype for part in near], [part.strides for part in near])
        indexed = self._near if full == "near" else self._far
        # A vector's dimension 0 runs along the columns.
        placed = [(None, x[0]) if len(part.shape) == 1 else x for part, x in zip(near, lists, strict=True)]
        addresses = [[0 if index is None else index.data_ptr() for index in pair] for pair in placed]
        self._rows[:, indexed + OUT.value : indexed + INTO.value + 1] = np.array(addresses).reshape(-1, 2)
        self._wide = any(part.dtype == torch.float64 for part in near)
        self._known: Forms = [], [], []
        self._table: Tensor | None = None

    def run(self, far: Forms, buffer: Tensor, capturing: bool) -> bool:
        """Launch. The table goes to the device anew if these are not the tensors of the last time.

        far: the other ends; the full tensors have more than what is copied.
        buffer: (bytes,) uint8.
        Returns:
            False, and nothing is launched, if a graph is captured and the kernel, which it cannot load, is not loaded.
        """
        found = self._table
        if far != self._known or found is None:
            addresses, dtypes, strides = far
            self._rows[:, self._far + ADDRESS.value] = addresses
            self._fill(self._far, dtypes, strides)
            self._wide = self._wide or torch.float64 in dtypes
            found = self._to_device(self._rows, capturing)
            if not capturing:  # else it is there in a replay only
                self._table, self._known = found, far
        elif capturing:
            self._captured.append(found)
        kernel = self._device, self._to_buffer, self._wide
        if not capturing:
            _LAUNCHED.add(kernel)
        elif kernel not in _LAUNCHED:
            return False
        configuration(self._to_buffer, self._wide).run(len(self._owner), found, self._owner, buffer)
        return True

    def _to_device(self, numbers: np.ndarray, capturing: bool) -> Tensor:
        """Integers, on the device; the host does not wait. While a graph is captured, it is in a replay that they go
        there: so they stay in pinned memory to which nothing else is written."""
        host = torch.empty(numbers.size, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        host.numpy()[:] = numbers.ravel()
        if capturing:
            self._captured.append(host)
        return host.to(self._device, non_blocking=True)

    def _fill(self, end: int, dtypes: Sequence[torch.dtype | None], strides: Sequence[Sequence[int]]) -> None:
        """Write one end of all copies into the table, but for the addresses."""
        if self._filled.get(end) != (dtypes, strides):
            rows = self._rows
            rows[:, end + KIND.value] = [NOTHING if dtype is None else KINDS[dtype] for dtype in dtypes]
            rows[:, end + STRIDE_OUT.value : end + STRIDE_IN.value + 1] = [_strides(each) for each in strides]
            self._filled[end] = dtypes, strides


def _index(index: Tensor | None) -> Tensor | None:
    """As the kernel reads it."""
    return index if index is None else index.to(torch.int64).contiguous()


def _grid(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Rows, columns, kh * kw and kw."""
    if len(shape) == 1:
        return 1, shape[0], 1, 1
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    return shape[0] * height * width, shape[1], height * width, width


def _strides(strides: Sequence[int]) -> Sequence[int]:
    """From one output to the next, between the lines of a kernel, along a line, from one input to the next."""
    if len(strides) == 1:
        return 0, 0, 0, strides[0]
    return strides[0], *(strides[2:] if len(strides) == 4 else (0, 0)), strides[1]

