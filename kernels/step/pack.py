"""Slices of many tensors, copied and cast in one launch.

    gather   full[out][:, into] -> narrow     parameters, for a narrow forward
    scatter  narrow -> full[out][:, into]     their gradients; frozen values after an optimizer's step

Every tensor is rows and columns here: a conv weight is (n_out * kh * kw, n_in), a vector (1, n). One side of all copies
of a launch lies in one buffer. As in kernels/clustering/table.py, a program finds its tile through an owner array
(row << 32 | tile) and a table with a row for each copy. The table has addresses, but for the side in the buffer offsets
in bytes: so it stays the same when only the buffer is a new one.
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
from reprune_triton.kernels.clustering.table import locate, pick
from reprune_triton.kernels.configuration import Configuration, cdiv

# The columns of the table: 8 for the source, 8 for the target, 4 for both.
SOURCE, TARGET = tl.constexpr(0), tl.constexpr(8)
ADDRESS, KIND = tl.constexpr(0), tl.constexpr(1)  # address or offset in bytes; kind of number
OUT, INTO = tl.constexpr(2), tl.constexpr(3)  # addresses of the index lists of dimensions 0 and 1; 0: all
STRIDE_OUT, STRIDE_H, STRIDE_W, STRIDE_IN = (tl.constexpr(4 + k) for k in range(4))  # in elements
COUNT_ROWS, COUNT_COLUMNS, AREA, WIDTH = (tl.constexpr(16 + k) for k in range(4))  # AREA: kh * kw, WIDTH: kw
FIELDS = tl.constexpr(20)

NOTHING = -1  # the kind of a source that is zeros
KINDS = table.KINDS | {torch.float64: 3}
ROWS, COLUMNS = 8, 64  # of a tile; with twice as many the registers of 64-bit offsets spill

_LAUNCHED: set[tuple[torch.device, bool, bool]] = set()  # device, TO_BUFFER and WIDE of kernels that are loaded


@triton.jit
def place(row_ptr, SIDE: tl.constexpr, rows, columns):
    """Return the offsets [ROWS, COLUMNS] of a tile's elements in the tensor of that side, in elements."""
    side_ptr = row_ptr + SIDE
    area, width = tl.load(row_ptr + AREA).to(tl.int32), tl.load(row_ptr + WIDTH).to(tl.int32)
    out, k = rows // area, rows % area  # [ROWS]
    down = pick(tl.load(side_ptr + OUT), out, rows < tl.load(row_ptr + COUNT_ROWS)) * tl.load(side_ptr + STRIDE_OUT)
    down += (k // width) * tl.load(side_ptr + STRIDE_H) + (k % width) * tl.load(side_ptr + STRIDE_W)  # [ROWS]
    into = pick(tl.load(side_ptr + INTO), columns, columns < tl.load(row_ptr + COUNT_COLUMNS))  # [COLUMNS]
    return down[:, None] + (into * tl.load(side_ptr + STRIDE_IN))[None, :]


@triton.jit
def read(address, kind, offs, inside, WIDE: tl.constexpr):
    """Load a tile as float32, or float64 if WIDE; zeros for the kind NOTHING."""
    value = tl.zeros(offs.shape, tl.float64 if WIDE else tl.float32)  # [ROWS, COLUMNS]
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
    """Store a tile, rounded to the nearest numbers of that kind; from float64 by way of float32, as PyTorch does."""
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
    table_ptr, owner_ptr, buffer_ptr,
    TO_BUFFER: tl.constexpr,  # the targets lie in the buffer, not the sources
    WIDE: tl.constexpr,  # by way of float64
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # of a tile
):  # fmt: skip
    """Copy one tile: target[...] = source[...].

    No race: no two programs have the same tile, nor two copies the same target.
    """
    row_ptr, tile = locate(table_ptr, owner_ptr, FIELDS)
    blocks = tl.cdiv(tl.load(row_ptr + COUNT_COLUMNS).to(tl.int32), COLUMNS)
    rows = (tile // blocks) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = (tile % blocks) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = (rows < tl.load(row_ptr + COUNT_ROWS))[:, None] & (columns < tl.load(row_ptr + COUNT_COLUMNS))[None, :]
    source, target = tl.load(row_ptr + SOURCE + ADDRESS), tl.load(row_ptr + TARGET + ADDRESS)
    if TO_BUFFER:
        target += buffer_ptr.to(tl.int64)
    else:
        source += buffer_ptr.to(tl.int64)
    at = place(row_ptr, SOURCE, rows, columns)  # [ROWS, COLUMNS]
    value = read(source, tl.load(row_ptr + SOURCE + KIND), at, inside, WIDE)
    at = place(row_ptr, TARGET, rows, columns)  # [ROWS, COLUMNS]
    write(target, tl.load(row_ptr + TARGET + KIND), at, value, inside, WIDE)


@functools.cache
def configuration(to_buffer: bool, wide: bool) -> Configuration:
    """Return the kernel that copies to or from the buffer; wide: for tensors of which one is float64."""
    flags = (("TO_BUFFER", int(to_buffer)), ("WIDE", int(wide)))
    return Configuration(copy_kernel, (*flags, ("ROWS", ROWS), ("COLUMNS", COLUMNS)), 4)


# Addresses, dtypes (None: there is no tensor, and zeros are copied) and strides (in elements) of tensors.
Forms = tuple[Sequence[int], Sequence[torch.dtype | None], Sequence[Sequence[int]]]


class Near(NamedTuple):
    """The side of a copy that lies in the buffer."""

    shape: Sequence[int]  # of what is copied: (n,), (n_out, n_in) or (n_out, n_in, kh, kw)
    offset: int  # of the tensor in the buffer, in bytes
    dtype: torch.dtype | None  # None: there is no tensor, and zeros are copied
    strides: Sequence[int]  # of the tensor, in elements


class Copies:
    """Copies in one launch between tensors in a buffer, the near side, and tensors elsewhere, the far side.

    Args:
        near: the near side of each copy.
        lists: the index lists of each copy, on the device, for dimensions 0 and 1 of the full tensor; None: all.
        full: which side has the full tensors, to which the lists belong: "near" or "far".
        to_buffer: whether the near side is the target.
        capturing: whether a CUDA graph is captured. Its replays read the owner array again: it is kept for them.
    """

    def __init__(
        self, near: Sequence[Near], lists: Sequence[tuple[Tensor | None, Tensor | None]], full: str, to_buffer: bool,
        device: torch.device, capturing: bool,
    ):  # fmt: skip
        self._device, self._to_buffer = device, to_buffer
        self._captured: list[Tensor] = []  # memory that replays of graphs read
        # Kept, as the table has their addresses.
        self._lists = [(_index(out), _index(into)) for out, into in lists]
        grids = [_grid(part.shape) for part in near]
        tiles = [cdiv(rows, ROWS) * cdiv(columns, COLUMNS) for rows, columns, *_ in grids]
        self._owner = self._to_device(table.owners((row, 0, count) for row, count in enumerate(tiles)), capturing)
        self._rows = np.zeros((len(near), FIELDS.value), dtype=np.int64)
        self._rows[:, COUNT_ROWS.value :] = np.array(grids).reshape(-1, 4)
        self._filled: dict[int, tuple[Sequence[torch.dtype | None], Sequence[Sequence[int]]]] = {}
        sides = SOURCE.value, TARGET.value
        self._far, self._near = sides if to_buffer else sides[::-1]
        self._rows[:, self._near + ADDRESS.value] = [part.offset for part in near]
        self._fill(self._near, [part.dtype for part in near], [part.strides for part in near])
        indexed = self._near if full == "near" else self._far
        # A vector's dimension 0 runs along the columns.
        placed = [(None, x[0]) if len(part.shape) == 1 else x for part, x in zip(near, self._lists, strict=True)]
        addresses = [[table.address(index) for index in pair] for pair in placed]
        self._rows[:, indexed + OUT.value : indexed + INTO.value + 1] = np.array(addresses).reshape(-1, 2)
        self._wide = any(part.dtype == torch.float64 for part in near)
        self._known: Forms = [], [], []
        self._table: Tensor | None = None

    def run(self, far: Forms, buffer: Tensor, capturing: bool) -> bool:
        """Launch the copies. The table is copied to the device if these are not the tensors of the last time.

        far: the far side of each copy.
        buffer: (bytes,) uint8, in which all near sides lie.
        Returns:
            whether it was launched: not if a graph is captured and the kernel is not on the device yet, as a capture
            cannot load it.
        """
        found = self._table
        if far != self._known or found is None:
            addresses, dtypes, strides = far
            self._rows[:, self._far + ADDRESS.value] = addresses
            self._fill(self._far, dtypes, strides)
            self._wide = self._wide or torch.float64 in dtypes
            found = self._to_device(self._rows, capturing)
            if not capturing:  # else it is on the device in a replay only
                self._table, self._known = found, far
        elif capturing:
            self._captured.append(found)
        loaded = self._device, self._to_buffer, self._wide
        if not capturing:
            _LAUNCHED.add(loaded)
        elif loaded not in _LAUNCHED:
            return False
        configuration(self._to_buffer, self._wide).run(len(self._owner), found, self._owner, buffer)
        return True

    def _to_device(self, numbers: np.ndarray, capturing: bool) -> Tensor:
        """Copy integers to the device; the host does not wait. While a graph is captured the copy happens in its
        replays: so the pinned memory that it reads is kept, and written this once."""
        host = torch.empty(numbers.size, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        host.numpy()[:] = numbers.ravel()
        if capturing:
            self._captured.append(host)
        return host.to(self._device, non_blocking=True)

    def _fill(self, side: int, dtypes: Sequence[torch.dtype | None], strides: Sequence[Sequence[int]]) -> None:
        """Write one side of all copies into the table, without the addresses."""
        if self._filled.get(side) != (dtypes, strides):
            rows = self._rows
            rows[:, side + KIND.value] = [NOTHING if dtype is None else KINDS[dtype] for dtype in dtypes]
            rows[:, side + STRIDE_OUT.value : side + STRIDE_IN.value + 1] = [_strides(each) for each in strides]
            self._filled[side] = dtypes, strides


def _index(index: Tensor | None) -> Tensor | None:
    """Convert an index list to int64 without gaps, as the kernel reads it."""
    return index if index is None else index.to(torch.int64).contiguous()


def _grid(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return rows, columns, kh * kw and kw."""
    if len(shape) == 1:
        return 1, shape[0], 1, 1
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    return shape[0] * height * width, shape[1], height * width, width


def _strides(strides: Sequence[int]) -> Sequence[int]:
    """Return the strides of outputs, of a kernel's lines, along a line, and of inputs; 0 for a missing dimension."""
    if len(strides) == 1:
        return 0, 0, 0, strides[0]
    return strides[0], *(strides[2:] if len(strides) == 4 else (0, 0)), strides[1]
