"""BatchNorm, residual add and activation in one pass over channels_last activations.

    forward   x -> partial statistics -> mean, rstd -> y = act((x - mean) * rstd * gamma + beta + residual)
    backward  dy -> partial sums of g and g * x_hat -> dx, d(residual) = g,   g = dy where act lets it through

Eager PyTorch makes three operations of it, and five of the backward. Here x is read twice forward and twice backward.
Where the activation was active is computed again from x; with a residual, from y, which the next layer keeps anyway.
If y has two readers, their gradients are added as they are read. If g must be stored, since the residual needs it or
since it is such a sum, the first backward pass stores it, and the second reads it and not what it was made of.

Activations are rows: (M, C) with M = B * H * W. Statistics and sums are float32 (float64 for float64). A chunk of rows
belongs to one program, which takes deviations from the mean of each tile; chunks are merged by Chan's formula. This is
as exact as two passes over x, and the same bits every time, since no sum is atomic.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprune_triton.kernels.configuration import Configuration, cdiv

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
NONE, RELU, RELU6 = (tl.constexpr(number) for number in ACTIVATIONS.values())
CHUNKS = 256  # the most programs that share the rows of a channel: two for each SM of the largest GPUs
SIZES = ("M", "each", "chunks")  # one binary for all of these; multiples of 16 for C have another, faster one
_ELEMENTS = 2048  # of a tile; with twice as many the gradient's registers spill
_MERGED = 16  # channels of a program that merges chunks


# Tiles are [BLOCK_M, BLOCK_C]: rows and channels. WIDE: computed in float64, not float32.


@triton.jit
def place(C, BLOCK_C: tl.constexpr):
    """Return the chunk of rows and the channels [BLOCK_C] of this program. Programs of one chunk are neighbours."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    channels = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    return program // blocks, channels


@triton.jit
def tile(ptr, rows, channels, M, C, WIDE: tl.constexpr):
    """Load a tile of a tensor (M, C), as float32 or float64; 0 outside the tensor."""
    inside = (rows < M)[:, None] & (channels < C)[None, :]  # [BLOCK_M, BLOCK_C]
    found = tl.load(ptr + rows.to(tl.int64)[:, None] * C + channels[None, :], mask=inside, other=0.0)
    return found.to(tl.float64) if WIDE else found.to(tl.float32)


@triton.jit
def store_tile(ptr, rows, channels, M, C, value):
    """Store a tile of a tensor (M, C), rounded to its type."""
    at = ptr + rows.to(tl.int64)[:, None] * C + channels[None, :]  # [BLOCK_M, BLOCK_C]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(rows < M)[:, None] & (channels < C)[None, :])


@triton.jit
def vector(ptr, channels, C, WIDE: tl.constexpr):
    """Load a number for each channel [BLOCK_C], as float32 or float64."""
    found = tl.load(ptr + channels, mask=channels < C, other=0.0)
    return found.to(tl.float64) if WIDE else found.to(tl.float32)


@triton.jit
def store_pair(ptr, part, channels, C, first, second):
    """Store two numbers for each channel [BLOCK_C]: first in ptr[part, 0], second in ptr[part, 1], of (parts, 2, C)."""
    at = ptr + part.to(tl.int64) * 2 * C + channels
    tl.store(at, first, mask=channels < C)
    tl.store(at + C, second, mask=channels < C)


@triton.jit
def total(a, b):
    """Return the sum of a * b over the rows of a tile: [BLOCK_C].

    Products are rounded before they are added. In a reduction two lanes add each other's products; a product that was
    fused into the addition would be rounded in the other lane only, and they would go on with different bits.
    """
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), 0)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr, partial_ptr,
    M, C, each,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[chunk, 0 | 1, C] = mean, and sum of squared deviations from it, of `each` rows of x."""
    chunk, channels = place(C, BLOCK_C)
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    mean = tl.zeros((BLOCK_C,), tl.float64 if WIDE else tl.float32)  # [BLOCK_C]
    squares = tl.zeros((BLOCK_C,), tl.float64 if WIDE else tl.float32)  # [BLOCK_C]
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        value = tile(x_ptr, rows, channels, end, C, WIDE)  # [BLOCK_M, BLOCK_C]
        new = tl.minimum(end - first, BLOCK_M).to(mean.dtype)
        before = (first - begin).to(mean.dtype)
        own = tl.sum(value, 0) / new  # [BLOCK_C]
        off = tl.where((rows < end)[:, None], value - own[None, :], 0.0)  # [BLOCK_M, BLOCK_C]
        apart = own - mean  # [BLOCK_C]
        mean += apart * (new / (before + new))
        squares += total(off, off) + apart * apart * (before * new / (before + new))
    store_pair(partial_ptr, chunk, channels, C, mean, squares)


@triton.jit
def merged(partial_ptr, chunk, channels, M, C, each, chunks, WIDE: tl.constexpr):
    """Merge these chunks [CHUNKS]: return mean, sum of squared deviations from it [BLOCK_C], and number of rows."""
    mean = tile(partial_ptr, 2 * chunk, channels, 2 * chunks, C, WIDE)  # [CHUNKS, BLOCK_C]
    squares = tile(partial_ptr, 2 * chunk + 1, channels, 2 * chunks, C, WIDE)  # [CHUNKS, BLOCK_C]
    count = tl.minimum(tl.maximum(M - chunk.to(tl.int64) * each, 0), each).to(mean.dtype)  # [CHUNKS]
    rows = tl.sum(count, 0)
    whole = tl.sum(mean * count[:, None], 0) / rows  # [BLOCK_C]
    off = mean - whole[None, :]  # [CHUNKS, BLOCK_C]
    return whole, tl.sum(squares + off * off * count[:, None], 0), rows


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    partial_ptr, combined_ptr,
    M, C, each, chunks,
    WIDE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """combined[group, 0 | 1, C] = mean, and sum of squared deviations from it, of CHUNKS chunks of `each` rows."""
    group, channels = place(C, BLOCK_C)
    chunk = group * CHUNKS + tl.arange(0, CHUNKS)  # [CHUNKS]
    mean, squares, _ = merged(partial_ptr, chunk, channels, M, C, each, chunks, WIDE)
    store_pair(combined_ptr, group, channels, C, mean, squares)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial_ptr,
    mean_ptr, rstd_ptr, unbiased_ptr,
    M, C, each, chunks, eps,
    WIDE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store mean, 1 / sqrt(variance + eps) and unbiased variance of every channel, from at most CHUNKS chunks."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mean, squares, rows = merged(partial_ptr, tl.arange(0, CHUNKS), channels, M, C, each, chunks, WIDE)
    tl.store(mean_ptr + channels, mean, mask=channels < C)
    tl.store(rstd_ptr + channels, 1.0 / tl.sqrt(squares / rows + eps), mask=channels < C)
    tl.store(unbiased_ptr + channels, squares / (rows - 1), mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr, residual_ptr, y_ptr,  # (M, C)
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # (C,)
    M, C,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr,  # is there one?
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * rstd * weight + bias + residual)."""
    chunk, channels = place(C, BLOCK_C)
    rows = chunk * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    scale = vector(rstd_ptr, channels, C, WIDE) * vector(weight_ptr, channels, C, WIDE)  # [BLOCK_C]
    # [BLOCK_M, BLOCK_C]
    value = tile(x_ptr, rows, channels, M, C, WIDE) - vector(mean_ptr, channels, C, WIDE)[None, :]
    value = value * scale[None, :] + vector(bias_ptr, channels, C, WIDE)[None, :]
    if RESIDUAL:
        value += tile(residual_ptr, rows, channels, M, C, WIDE)
    if ACT == RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays, as in PyTorch
    if ACT == RELU6:
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    store_tile(y_ptr, rows, channels, M, C, value)


@triton.jit
def through(grad, value, ACT: tl.constexpr):
    """Return the gradient of the activation's input, from that of its output: 0 where the activation was not active.

    value: the activation's input or output, which tell the same.
    """
    if ACT != NONE:
        grad = tl.where(value <= 0.0, 0.0, grad)  # [BLOCK_M, BLOCK_C]
    if ACT == RELU6:
        grad = tl.where(value >= 6.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    grad_ptr, other_ptr, x_ptr, y_ptr,  # (M, C)
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # (C,)
    partial_ptr, g_ptr,  # (chunks, 2, C) and (M, C)
    M, C, each,
    ACT: tl.constexpr,
    FROM_Y: tl.constexpr,  # tell by y where the activation was active
    OTHER: tl.constexpr,  # add another gradient
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[chunk, 0 | 1, C] = sums of g * x_hat and of g over `each` rows. With FROM_Y or OTHER, stores g, too."""
    chunk, channels = place(C, BLOCK_C)
    mean, rstd = vector(mean_ptr, channels, C, WIDE), vector(rstd_ptr, channels, C, WIDE)  # [BLOCK_C]
    weight, bias = vector(weight_ptr, channels, C, WIDE), vector(bias_ptr, channels, C, WIDE)  # [BLOCK_C]
    with_normal, alone = tl.zeros_like(mean), tl.zeros_like(mean)  # [BLOCK_C]
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        grad = tile(grad_ptr, rows, channels, end, C, WIDE)  # [BLOCK_M, BLOCK_C]
        if OTHER:
            grad += tile(other_ptr, rows, channels, end, C, WIDE)
        normal = (tile(x_ptr, rows, channels, end, C, WIDE) - mean[None, :]) * rstd[None, :]  # [BLOCK_M, BLOCK_C]
        if FROM_Y:
            grad = through(grad, tile(y_ptr, rows, channels, end, C, WIDE), ACT)
        else:
            grad = through(grad, normal * weight[None, :] + bias[None, :], ACT)
        if FROM_Y or OTHER:
            store_tile(g_ptr, rows, channels, end, C, grad)
        with_normal += total(grad, normal)
        alone += tl.sum(grad, 0)
    store_pair(partial_ptr, chunk, channels, C, with_normal, alone)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    grad_ptr, x_ptr,  # (M, C)
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # (C,)
    sums_ptr, grad_x_ptr,  # (2, C) and (M, C)
    M, C,
    ACT: tl.constexpr,
    BATCH: tl.constexpr,  # mean and rstd depend on x
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (g - mean(g) - x_hat * mean(g * x_hat)), without the means if not BATCH."""
    chunk, channels = place(C, BLOCK_C)
    rows = chunk * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mean, rstd = vector(mean_ptr, channels, C, WIDE), vector(rstd_ptr, channels, C, WIDE)  # [BLOCK_C]
    weight, bias = vector(weight_ptr, channels, C, WIDE), vector(bias_ptr, channels, C, WIDE)  # [BLOCK_C]
    # [BLOCK_M, BLOCK_C] each
    normal = (tile(x_ptr, rows, channels, M, C, WIDE) - mean[None, :]) * rstd[None, :]
    grad = through(tile(grad_ptr, rows, channels, M, C, WIDE), normal * weight[None, :] + bias[None, :], ACT)
    if BATCH:
        with_normal = vector(sums_ptr, channels, C, WIDE) / M  # [BLOCK_C]
        alone = vector(sums_ptr + C, channels, C, WIDE) / M  # [BLOCK_C]
        grad = grad - alone[None, :] - normal * with_normal[None, :]
    grad *= (rstd * weight)[None, :]
    store_tile(grad_x_ptr, rows, channels, M, C, grad)


INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)


def blocks(channels: int) -> tuple[tuple[str, int], ...]:
    """Return the size of a tile: the fewer the channels, the more rows."""
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    return (("BLOCK_M", _ELEMENTS // block_c), ("BLOCK_C", block_c))


def configurations(wide: bool = False) -> Iterator[Configuration]:
    """Yield every configuration there can be, for float64 if `wide`."""
    yield from _merging(wide)
    for channels in (16, 32, 64):
        tiles = (("WIDE", int(wide)), *blocks(channels))
        yield Configuration(statistics_kernel, tiles, 4)
        for act, flag in itertools.product(ACTIVATIONS.values(), (0, 1)):
            yield Configuration(apply_kernel, (("ACT", act), ("RESIDUAL", flag), *tiles), 4)
            yield Configuration(gradient_kernel, (("ACT", act), ("BATCH", flag), *tiles), 4)
            for from_y in (0, 1) if act else (0,):
                yield Configuration(sums_kernel, (("ACT", act), ("FROM_Y", from_y), ("OTHER", flag), *tiles), 4)


class _Rows:
    """The tiles and chunks of an x (B, C, H, W) as M rows of C channels, and launches of kernels on them."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        self.C = shape[1]
        self.M = shape.numel() // self.C
        self.float = torch.float64 if dtype == torch.float64 else torch.float32
        self.constants = (("WIDE", int(dtype == torch.float64)), *blocks(self.C))
        block_m, block_c = (size for _, size in blocks(self.C))
        self.tiles, self.blocks = cdiv(self.M, block_m), cdiv(self.C, block_c)
        self.each = block_m * cdiv(self.tiles, CHUNKS)  # rows of a chunk
        self.chunks = cdiv(self.M, self.each)
        self._configurations: dict[Any, Configuration] = {}

    def run(self, kernel: object, flags: tuple[tuple[str, int], ...], chunks: int, *arguments: Tensor | int) -> None:
        """Launch with a program for each block of channels in each chunk (or tile)."""
        config = self._configurations.get((id(kernel), flags))
        if config is None:
            config = self._configurations[id(kernel), flags] = Configuration(kernel, (*flags, *self.constants), 4)
        config.run(chunks * self.blocks, *arguments)


_rows = functools.lru_cache(maxsize=4096)(_Rows)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, 1 / sqrt(biased variance + eps) and unbiased variance of every channel, (C,) each.

    x: (B, C, H, W), channels_last, with more than one value a channel.
    """
    rows = _rows(x.shape, x.dtype)
    partial = x.new_empty((rows.chunks, 2, rows.C), dtype=rows.float)
    rows.run(statistics_kernel, (), rows.chunks, x, partial, rows.M, rows.C, rows.each)
    return merge(partial, rows.M, rows.each, eps)


def merge(partial: Tensor, M: int, each: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `statistics` does, from partial (chunks, 2, C): mean and squared deviations of chunks of M rows.

    each: rows of a chunk; the last has the rest.
    """
    chunks, _, C = partial.shape
    combine, finish = _merging(partial.dtype == torch.float64)
    blocks = cdiv(C, _MERGED)
    while chunks > CHUNKS:
        groups = cdiv(chunks, CHUNKS)
        combined = partial.new_empty(groups, 2, C)
        combine.run(groups * blocks, partial, combined, M, C, each, chunks)
        partial, chunks, each = combined, groups, each * CHUNKS
    mean = partial.new_empty(C)
    rstd, unbiased = torch.empty_like(mean), torch.empty_like(mean)
    finish.run(blocks, partial, mean, rstd, unbiased, M, C, each, chunks, eps)
    return mean, rstd, unbiased


@functools.cache
def _merging(wide: bool) -> tuple[Configuration, Configuration]:
    constants = (("WIDE", int(wide)), ("CHUNKS", CHUNKS), ("BLOCK_C", _MERGED))
    return Configuration(combine_kernel, constants, 4), Configuration(merge_kernel, constants, 4)


def apply(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str
) -> Tensor:
    """Return y, like x (B, C, H, W), channels_last. The vectors are (C,)."""
    rows, y = _rows(x.shape, x.dtype), torch.empty_like(x)
    flags = ("ACT", ACTIVATIONS[act]), ("RESIDUAL", int(residual is not None))
    rows.run(
        apply_kernel, flags, rows.tiles,
        x, x if residual is None else residual, y,
        mean, rstd, weight, bias,
        rows.M, rows.C,
    )  # fmt: skip
    return y


def sums(
    grad: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, act: str,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Return g, and the sums (2, C) over all rows of g * x_hat and of g, which are d(weight) and d(bias).

    g is the gradient of the activation's input, like x; None if it is not stored, as there is no y and no other.

    grad: the gradient of y.
    other: another gradient of y, which is added.
    y: what `apply` returned, if it had a residual and an activation.
    """
    rows = _rows(x.shape, x.dtype)
    g = torch.empty_like(x) if y is not None or other is not None else None
    partial = x.new_empty((rows.chunks, 2, rows.C), dtype=rows.float)
    flags = ("ACT", ACTIVATIONS[act]), ("FROM_Y", int(y is not None)), ("OTHER", int(other is not None))
    rows.run(
        sums_kernel, flags, rows.chunks,
        grad, grad if other is None else other, x, x if y is None else y,
        mean, rstd, weight, bias,
        partial, x if g is None else g,
        rows.M, rows.C, rows.each,
    )  # fmt: skip
    return g, partial.sum(0)


def gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, act: str,
    batch: bool,
) -> Tensor:  # fmt: skip
    """Return dx, like x.

    grad: the gradient of y; or g, with act="none".
    sums: (2, C), as `sums` returns them.
    batch: whether mean and rstd are statistics of x, and not running ones.
    """
    rows, grad_x = _rows(x.shape, x.dtype), torch.empty_like(x)
    flags = ("ACT", ACTIVATIONS[act]), ("BATCH", int(batch))
    rows.run(
        gradient_kernel, flags, rows.tiles,
        grad, x,
        mean, rstd, weight, bias,
        sums, grad_x,
        rows.M, rows.C,
    )  # fmt: skip
    return grad_x


def backward(
    grad: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, act: str, batch: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return dx, and g and the sums, from the arguments of `sums` and `gradient`."""
    g, found = sums(grad, other, x, y, mean, rstd, weight, bias, act)
    grad, act = (grad, act) if g is None else (g, "none")
    return gradient(grad, x, mean, rstd, weight, bias, found, act, batch), g, found
