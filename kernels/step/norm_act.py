"""BatchNorm, residual add and activation in one pass over channels_last activations.

    forward   x -> partial statistics -> mean, rstd -> y = act((x - mean) * rstd * gamma + beta + residual)
    backward  dy -> partial sums of g and g * x_hat -> dx, d(residual) = g,   g = dy where act lets it through

Eager PyTorch makes three operations of it, and their backward five: here x is read twice forward, and twice backward.
Whether the activation was active is computed again from x; with a residual, from y, which the next layer keeps anyway.
The gradients of two readers of y are added as they are read. Where g is a tensor of its own, because the residual needs
it or because it is such a sum, the first pass writes it and the second reads it in place of all that it was made of.

Activations are rows: (M, C) with M = B * H * W. Statistics and sums are float32 (float64 for float64), taken in chunks
of rows by one program each, around the mean of each tile, and merged by Chan's formula: as exact as two passes over x,
and the same bits every time, since nothing is added up atomically.
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
CHUNKS = 256  # the most programs that share the rows of a channel: two for each SM of the largest GPUs
SIZES = ("M", "each", "chunks")  # compiled once for all; only that C is a multiple of 16 makes faster code
_ELEMENTS = 2048  # of a tile; with twice as many the gradient's registers spill


@triton.jit
def place(C, BLOCK_C: tl.constexpr):
    """The chunk of rows and the channels [BLOCK_C] of this program; those of one chunk follow each other."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    channels = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // blocks, channels


@triton.jit
def tile(ptr, rows, channels, M, C, WIDE: tl.constexpr):
    """Rows x channels of a tensor as float32, or float64 if WIDE; 0 outside it."""
    inside = (rows < M)[:, None] & (channels < C)[None, :]
    found = tl.load(ptr + rows.to(tl.int64)[:, None] * C + channels[None, :], mask=inside, other=0.0)
    return found.to(tl.float64) if WIDE else found.to(tl.float32)


@triton.jit
def vector(ptr, channels, C, WIDE: tl.constexpr):
    """A value for each of these channels, as float32 or float64."""
    found = tl.load(ptr + channels, mask=channels < C, other=0.0)
    return found.to(tl.float64) if WIDE else found.to(tl.float32)


@triton.jit
def total(a, b):
    """The sum of a * b over the rows of a tile, of products that are rounded: fused into the first addition between two
    lanes, which both go on with the sum, a product would leave them with different bits."""
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), 0)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr, partial_ptr, M, C, each, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """partial[chunk, 0 | 1, C] = mean, and sum of squared deviations from it, of `each` rows."""
    chunk, channels = place(C, BLOCK_C)
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    mean = tl.zeros((BLOCK_C,), tl.float64 if WIDE else tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float64 if WIDE else tl.float32)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        value = tile(x_ptr, rows, channels, end, C, WIDE)
        new = tl.minimum(end - first, BLOCK_M).to(mean.dtype)
        before = (first - begin).to(mean.dtype)
        own = tl.sum(value, 0) / new
        off = tl.where((rows < end)[:, None], value - own[None, :], 0.0)
        apart = own - mean
        mean += apart * (new / (before + new))
        squares += total(off, off) + apart * apart * (before * new / (before + new))
    at = partial_ptr + chunk.to(tl.int64) * 2 * C + channels
    tl.store(at, mean, mask=channels < C)
    tl.store(at + C, squares, mask=channels < C)


@triton.jit
def merged(partial_ptr, chunk, channels, M, C, each, chunks, WIDE: tl.constexpr):
    """Mean, and sum of squared deviations from it, of these chunks [N] together, and how many rows they are."""
    mean = tile(partial_ptr, 2 * chunk, channels, 2 * chunks, C, WIDE)
    squares = tile(partial_ptr, 2 * chunk + 1, channels, 2 * chunks, C, WIDE)
    count = tl.minimum(tl.maximum(M - chunk.to(tl.int64) * each, 0), each).to(mean.dtype)
    rows = tl.sum(count, 0)
    whole = tl.sum(mean * count[:, None], 0) / rows
    off = mean - whole[None, :]
    return whole, tl.sum(squares + off * off * count[:, None], 0), rows


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    partial_ptr, combined_ptr, M, C, each, chunks, WIDE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """combined[group, 0 | 1, C] = mean, and sum of squared deviations from it, of CHUNKS chunks of `each` rows."""
    group, channels = place(C, BLOCK_C)
    chunk = group * CHUNKS + tl.arange(0, CHUNKS)
    mean, squares, _ = merged(partial_ptr, chunk, channels, M, C, each, chunks, WIDE)
    at = combined_ptr + group.to(tl.int64) * 2 * C + channels
    tl.store(at, mean, mask=channels < C)
    tl.store(at + C, squares, mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial_ptr, mean_ptr, rstd_ptr, unbiased_ptr, M, C, each, chunks, eps, WIDE: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / sqrt(variance + eps), and the unbiased variance, of every channel, from those of its chunks."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, squares, rows = merged(partial_ptr, tl.arange(0, CHUNKS), channels, M, C, each, chunks, WIDE)
    tl.store(mean_ptr + channels, mean, mask=channels < C)
    tl.store(rstd_ptr + channels, 1.0 / tl.sqrt(squares / rows + eps), mask=channels < C)
    tl.store(unbiased_ptr + channels, squares / (rows - 1), mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, M, C, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * rstd * weight + bias + residual)."""
    chunk, channels = place(C, BLOCK_C)
    rows = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = vector(rstd_ptr, channels, C, WIDE) * vector(weight_ptr, channels, C, WIDE)
    value = tile(x_ptr, rows, channels, M, C, WIDE) - vector(mean_ptr, channels, C, WIDE)[None, :]
    value = value * scale[None, :] + vector(bias_ptr, channels, C, WIDE)[None, :]
    if RESIDUAL:
        value += tile(residual_ptr, rows, channels, M, C, WIDE)
    if ACT == 1:
        value = tl.where(value < 0.0, 0.0, value)  # NaN goes through, as in PyTorch
    if ACT == 2:
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    inside = (rows < M)[:, None] & (channels < C)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * C + channels[None, :], value.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def through(grad, value, ACT: tl.constexpr):
    """The gradient behind the activation: 0 where that was not active. value: in front of it, or after it."""
    if ACT != 0:
        grad = tl.where(value <= 0.0, 0.0, grad)
    if ACT == 2:
        grad = tl.where(value >= 6.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    grad_ptr, other_ptr, x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, partial_ptr, g_ptr, M, C, each,
    ACT: tl.constexpr, FROM_Y: tl.constexpr, OTHER: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[chunk, 0 | 1, C] = sums of g * x_hat and of g over `each` rows; g itself if it is a tensor of its own."""
    chunk, channels = place(C, BLOCK_C)
    mean, rstd = vector(mean_ptr, channels, C, WIDE), vector(rstd_ptr, channels, C, WIDE)
    weight, bias = vector(weight_ptr, channels, C, WIDE), vector(bias_ptr, channels, C, WIDE)
    with_normal, alone = tl.zeros_like(mean), tl.zeros_like(mean)
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        grad = tile(grad_ptr, rows, channels, end, C, WIDE)
        if OTHER:
            grad += tile(other_ptr, rows, channels, end, C, WIDE)
        normal = (tile(x_ptr, rows, channels, end, C, WIDE) - mean[None, :]) * rstd[None, :]
        if FROM_Y:
            grad = through(grad, tile(y_ptr, rows, channels, end, C, WIDE), ACT)
        else:
            grad = through(grad, normal * weight[None, :] + bias[None, :], ACT)
        if FROM_Y or OTHER:
            at = g_ptr + rows.to(tl.int64)[:, None] * C + channels[None, :]
            tl.store(at, grad.to(g_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (channels < C)[None, :])
        with_normal += total(grad, normal)
        alone += tl.sum(grad, 0)
    at = partial_ptr + chunk.to(tl.int64) * 2 * C + channels
    tl.store(at, with_normal, mask=channels < C)
    tl.store(at + C, alone, mask=channels < C)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr, grad_x_ptr, M, C, ACT: tl.constexpr,
    BATCH: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (g - mean(g) - x_hat * mean(g * x_hat)), without the means if not BATCH."""
    chunk, channels = place(C, BLOCK_C)
    rows = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, rstd = vector(mean_ptr, channels, C, WIDE), vector(rstd_ptr, channels, C, WIDE)
    weight, bias = vector(weight_ptr, channels, C, WIDE), vector(bias_ptr, channels, C, WIDE)
    normal = (tile(x_ptr, rows, channels, M, C, WIDE) - mean[None, :]) * rstd[None, :]
    grad = through(tile(grad_ptr, rows, channels, M, C, WIDE), normal * weight[None, :] + bias[None, :], ACT)
    if BATCH:
        with_normal = vector(sums_ptr, channels, C, WIDE) / M
        alone = vector(sums_ptr + C, channels, C, WIDE) / M
        grad = grad - alone[None, :] - normal * with_normal[None, :]
    grad *= (rstd * weight)[None, :]
    inside = (rows < M)[:, None] & (channels < C)[None, :]
    at = grad_x_ptr + rows.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)


def blocks(channels: int) -> tuple[tuple[str, int], ...]:
    """Of a tile: the fewer the channels, the more rows."""
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    return (("BLOCK_M", _ELEMENTS // block_c), ("BLOCK_C", block_c))


def configurations(wide: bool = False) -> Iterator[Configuration]:
    """Every configuration there can be, for float64 if `wide`."""
    always = (("WIDE", int(wide)),)
    for kernel in (combine_kernel, merge_kernel):
        yield Configuration(kernel, (*always, ("CHUNKS", CHUNKS), ("BLOCK_C", 16)), 4)
    for channels in (16, 32, 64):
        tiles = (*always, *blocks(channels))
        yield Configuration(statistics_kernel, tiles, 4)
        for act, flag in itertools.product(ACTIVATIONS.values(), (0, 1)):
            yield Configuration(apply_kernel, (("ACT", act), ("RESIDUAL", flag), *tiles), 4)
            yield Configuration(gradient_kernel, (("ACT", act), ("BATCH", flag), *tiles), 4)
            for from_y in (0, 1) if act else (0,):
                yield Configuration(sums_kernel, (("ACT", act), ("FROM_Y", from_y), ("OTHER", flag), *tiles), 4)


class _Rows:
    """How the M rows of C channels of an x (B, C, H, W) are cut up, and how a kernel is launched on them."""

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
        config = self._configurations.get((id(kernel), flags))
        if config is None:
            config = self._configurations[id(kernel), flags] = Configuration(kernel, (*flags, *self.constants), 4)
        config.run(chunks * self.blocks, *arguments)


_rows = functools.lru_cache(maxsize=4096)(_Rows)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(biased variance + eps) and unbiased variance of every channel, (C,) each.

    x: (B, C, H, W), channels_last, with more than one value a channel.
    """
    rows = _rows(x.shape, x.dtype)
    partial = x.new_empty((rows.chunks, 2, rows.C), dtype=rows.float)
    rows.run(statistics_kernel, (), rows.chunks, x, partial, rows.M, rows.C, rows.each)
    return merge(partial, rows.M, rows.each, eps)


def merge(partial: Tensor, M: int, each: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `statistics` returns, from partial (chunks, 2, C): of `each` rows, the last of the rest of M rows."""
    chunks, _, C = partial.shape
    combine, finish = _merging(partial.dtype == torch.float64)
    blocks = cdiv(C, 16)
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
    constants = (("WIDE", int(wide)), ("CHUNKS", CHUNKS), ("BLOCK_C", 16))
    return Configuration(combine_kernel, constants, 4), Configuration(merge_kernel, constants, 4)


def apply(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str
) -> Tensor:
    """y, like x."""
    rows, y = _rows(x.shape, x.dtype), torch.empty_like(x)
    flags = ("ACT", ACTIVATIONS[act]), ("RESIDUAL", int(residual is not None))
    rows.run(
        apply_kernel, flags, rows.tiles, x, x if residual is None else residual, y, mean, rstd, weight, bias, rows.M,
        rows.C,
    )  # fmt: skip
    return y


def sums(
    grad: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, act: str,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """g, the gradient behind the activation, or None where it was not written; and the sums (2, C) over all rows of
    g * x_hat and of g, which are d(weight) and d(bias).

    other: another gradient of y, to be added to `grad`.
    y: what `apply` returned, if it had a residual and an activation.
    """
    rows = _rows(x.shape, x.dtype)
    g = torch.empty_like(x) if y is not None or other is not None else None
    partial = x.new_empty((rows.chunks, 2, rows.C), dtype=rows.float)
    flags = ("ACT", ACTIVATIONS[act]), ("FROM_Y", int(y is not None)), ("OTHER", int(other is not None))
    rows.run(
        sums_kernel, flags, rows.chunks, grad, grad if other is None else other, x, x if y is None else y, mean, rstd,
        weight, bias, partial, x if g is None else g, rows.M, rows.C, rows.each,
    )  # fmt: skip
    return g, partial.sum(0)


def gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, act: str,
    batch: bool,
) -> Tensor:  # fmt: skip
    """dx. act: "none" if grad is behind the activation already. batch: mean and rstd are those of x."""
    rows, grad_x = _rows(x.shape, x.dtype), torch.empty_like(x)
    flags = ("ACT", ACTIVATIONS[act]), ("BATCH", int(batch))
    rows.run(gradient_kernel, flags, rows.tiles, grad, x, mean, rstd, weight, bias, sums, grad_x, rows.M, rows.C)
    return grad_x


def backward(
    grad: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, act: str, batch: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dx, and what `sums` returns of the same arguments."""
    g, found = sums(grad, other, x, y, mean, rstd, weight, bias, act)
    grad, act = (grad, act) if g is None else (g, "none")
    return gradient(grad, x, mean, rstd, weight, bias, found, act, batch), g, found
