"""Convolution of channels_last activations as a matrix product, with a normalisation before it and statistics after.

    y[m, co] = sum over r, s, ci of a[pixel(m, r, s), ci] * w[co, r, s, ci],   a = act((x - mean) * rstd * gamma + beta)

Activations and weight are narrow: pruned channels are not in them and cost nothing. Rows are pixels, M = B * P * Q of
the output or B * H * W of the input. The sum runs over R * S taps of CI channels in one loop, tile by tile, and needs
no copy of x that is R * S times as large. A 1x1 convolution of stride 1 is the matrix product of x and w. Padding is
zero after the activation.

The gradient of the input is such a sum over dy. It can go on through the activation of the BatchNorm before, and then
the sums that the BatchNorm needs come with it. The gradient of the weight is a sum over pixels. Programs share it, and
their parts are added in a fixed order: the same bits every time. Sums are float32, or float64 for float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprune_triton.kernels.configuration import Configuration, cdiv
from reprune_triton.kernels.step import norm_act
from reprune_triton.kernels.step.norm_act import store_tile, total, vector

RANGES = {"none": (float("-inf"), float("inf")), "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
PROGRAMS = 512  # that share a weight's gradient: about four for each SM of the largest GPUs
_FEW = 132  # with fewer programs SMs would be idle, and tiles are smaller
Pair = tuple[int, ...]  # of height and width
Moves = tuple[Pair, Pair, Pair]  # stride, padding and dilation
# One binary for all of these; multiples of 16 for CI and CO have others, faster ones.
SIZES = ("M", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")
# The interpreter takes the bits of bfloat16 for integers when it multiplies matrices.
_WIDEN = tl.constexpr(norm_act.INTERPRETED)


# Tiles are [BLOCK_M, BLOCK_N], the sum of products of [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]. WIDE: for float64.
@triton.jit
def rounded(x):
    """Round to the nearest TF32 number, of two to the one further from zero, as cuBLAS and CUTLASS do.

    Tensor cores alone cut off the last 13 bits. NaN stays as it is: added to its bits, the carry could make a number.
    """
    nearest = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def product(a, b, acc, TF32: tl.constexpr):
    """Return acc [BLOCK_M, BLOCK_N] + a [BLOCK_M, BLOCK_K] b [BLOCK_K, BLOCK_N]."""
    if TF32:
        a, b = rounded(a), rounded(b)
    if _WIDEN:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee", out_dtype=acc.dtype)


@triton.jit
def activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE: tl.constexpr):
    """Return act((x - mean) * rstd * gamma + beta) of a tile x [rows, channels], in its type; 0 where not inside.

    inside: [rows].
    low, high: of the clamp that the activation is, as in RANGES.
    """
    scale = vector(rstd_ptr, channels, CI, WIDE) * vector(gamma_ptr, channels, CI, WIDE)  # [channels]
    # [rows, channels]
    value = x.to(scale.dtype) - vector(mean_ptr, channels, CI, WIDE)[None, :]
    value = tl.fma(value, scale[None, :], vector(beta_ptr, channels, CI, WIDE)[None, :])
    low, high = tl.cast(low, scale.dtype), tl.cast(high, scale.dtype)
    value = tl.clamp(value, low, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside[:, None], value, 0.0).to(x.dtype)


@triton.jit
def window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w):
    """Return where the windows of output pixels begin in the input: top, left, and number of the pixel, as rows."""
    line = rows // Q
    image = line // P
    left = (rows - line * Q) * stride_w - pad_w
    top = (line - image * P) * stride_h - pad_h
    return top, left, (image * H + top) * W + left


@triton.jit
def following(block, r, s, blocks, S):
    """Return the block of channels and the tap (r, s) that come next in a sum, by counting: dividing is slow."""
    block += 1
    s += (block == blocks).to(tl.int32)
    block = tl.where(block == blocks, 0, block)
    r += (s == S).to(tl.int32)
    s = tl.where(s == S, 0, s)
    return block, r, s


@triton.jit
def within(top, left, H, W):
    """Return whether pixels are in an image of H x W; a window can begin outside it."""
    return (top >= 0) & (top < H) & (left >= 0) & (left < W)


@triton.jit(do_not_specialize=(*SIZES, "low", "high"))
def forward_kernel(
    x_ptr, w_ptr, y_ptr, partial_ptr,
    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high,  # of the normalisation before
    M, CI, CO,
    H, W, P, Q, R, S,  # of input, output and kernel
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    POINTWISE: tl.constexpr,  # a matrix product
    NORM: tl.constexpr,  # normalise and activate x
    STATS: tl.constexpr,  # store `partial`
    TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, CO), and partial[tile of rows, 0 | 1, CO] = mean of y, and sum of squared deviations from it."""
    across = tl.cdiv(CO, BLOCK_N)
    part = tl.program_id(0) // across
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    filters = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    top, left, pixel = window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w)  # [BLOCK_M] each
    x_at = x_ptr + (rows if POINTWISE else pixel).to(tl.int64) * CI  # [BLOCK_M]
    w_at = w_ptr + filters.to(tl.int64) * (CI if POINTWISE else R * S * CI)  # [BLOCK_N]
    blocks = tl.cdiv(CI, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)  # [BLOCK_M, BLOCK_N]
    block, r, s = 0, 0, 0
    for step in range(blocks if POINTWISE else R * S * blocks):
        if POINTWISE:
            channels = step * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            inside, x_from, w_from = rows < M, 0, 0
        else:
            channels = block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            tap = r * S + s
            down, right = r * dil_h, s * dil_w
            block, r, s = following(block, r, s, blocks, S)
            inside = (rows < M) & within(top + down, left + right, H, W)  # [BLOCK_M]
            x_from, w_from = (down * W + right) * CI, tap * CI
        some = channels < CI  # [BLOCK_K]
        x_mask = inside[:, None] & some[None, :]
        x = tl.load(x_at[:, None] + (x_from + channels)[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        w_mask = some[:, None] & (filters < CO)[None, :]
        w = tl.load(w_at[None, :] + (w_from + channels)[:, None], mask=w_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        if NORM:
            x = activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE)
        acc = product(x, w, acc, TF32)
    y = acc.to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    store_tile(y_ptr, rows, filters, M, CO, y)
    if STATS:
        value = y.to(acc.dtype)  # [BLOCK_M, BLOCK_N]
        mean = tl.sum(value, 0) / tl.minimum(M - part * BLOCK_M, BLOCK_M).to(acc.dtype)  # [BLOCK_N]
        off = tl.where((rows < M)[:, None], value - mean[None, :], 0.0)  # [BLOCK_M, BLOCK_N]
        at = partial_ptr + part.to(tl.int64) * 2 * CO + filters  # [BLOCK_N]
        tl.store(at, mean, mask=filters < CO)
        tl.store(at + CO, total(off, off), mask=filters < CO)


@triton.jit(do_not_specialize=(*SIZES, "low", "high"))
def input_gradient_kernel(
    grad_ptr, w_ptr, grad_x_ptr,
    other_ptr, x_ptr, y_ptr, partial_ptr,  # with NORM
    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high,  # of the BatchNorm before
    M, CI, CO,
    H, W, P, Q, R, S,  # of input, output and kernel
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    POINTWISE: tl.constexpr,  # a matrix product
    NORM: tl.constexpr,  # go on through the activation before
    FROM_Y: tl.constexpr,  # tell by y where that was active
    OTHER: tl.constexpr,  # add another gradient
    TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da[m, ci] = sum over r, s, co of dy[pixel, co] * w[co, r, s, ci], where the window of `pixel` has m at (r, s).

    With NORM it is g = da (plus another gradient) where the activation before was active, else 0; and
    partial[tile of rows, 0 | 1, CI] = sums of g * x_hat and of g, which the BatchNorm before needs.
    """
    across = tl.cdiv(CI, BLOCK_N)
    part = tl.program_id(0) // across
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    channels = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Tap (r, s) of the window at (p, q) is at p * stride + r * dil - pad: p = (h + pad) // stride - r * dil // stride
    # where the remainders agree, and else no window has m there.
    below, beyond = rows // W % H + pad_h, rows % W + pad_w  # [BLOCK_M] each
    bottom, last = below // stride_h, beyond // stride_w  # [BLOCK_M] each
    pixel = (rows // W // H * P + bottom) * Q + last  # [BLOCK_M]
    grad_at = grad_ptr + (rows if POINTWISE else pixel).to(tl.int64) * CO  # [BLOCK_M]
    blocks = tl.cdiv(CO, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)  # [BLOCK_M, BLOCK_N]
    block, r, s = 0, 0, 0
    for step in range(blocks if POINTWISE else R * S * blocks):
        if POINTWISE:
            filters = step * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            inside, grad_from, w_from, each = rows < M, 0, 0, CI
        else:
            filters = block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            tap = r * S + s
            down, right = r * dil_h, s * dil_w
            block, r, s = following(block, r, s, blocks, S)
            up, back = down // stride_h, right // stride_w
            # [BLOCK_M]
            inside = (below - bottom * stride_h == down - up * stride_h) & within(bottom - up, last - back, P, Q)
            inside = (rows < M) & (beyond - last * stride_w == right - back * stride_w) & inside
            grad_from, w_from, each = -(up * Q + back) * CO, tap * CI, R * S * CI
        some = filters < CO  # [BLOCK_K]
        grad_mask = inside[:, None] & some[None, :]
        # [BLOCK_M, BLOCK_K]
        grad = tl.load(grad_at[:, None] + (grad_from + filters)[None, :], mask=grad_mask, other=0.0)
        w_at = w_ptr + filters.to(tl.int64)[:, None] * each + (w_from + channels)[None, :]
        w = tl.load(w_at, mask=some[:, None] & (channels < CI)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = product(grad, w, acc, TF32)
    at = rows.to(tl.int64)[:, None] * CI + channels[None, :]  # [BLOCK_M, BLOCK_N]
    mask = (rows < M)[:, None] & (channels < CI)[None, :]  # [BLOCK_M, BLOCK_N]
    if NORM:
        if OTHER:
            acc += tl.load(other_ptr + at, mask=mask, other=0.0).to(acc.dtype)
        mean, rstd = vector(mean_ptr, channels, CI, WIDE), vector(rstd_ptr, channels, CI, WIDE)  # [BLOCK_N]
        # [BLOCK_M, BLOCK_N] each
        normal = (tl.load(x_ptr + at, mask=mask, other=0.0).to(acc.dtype) - mean[None, :]) * rstd[None, :]
        if FROM_Y:
            value = tl.load(y_ptr + at, mask=mask, other=0.0).to(acc.dtype)
        else:
            gamma, beta = vector(gamma_ptr, channels, CI, WIDE), vector(beta_ptr, channels, CI, WIDE)  # [BLOCK_N]
            value = normal * gamma[None, :] + beta[None, :]
        stopped = (value <= tl.cast(low, acc.dtype)) | (value >= tl.cast(high, acc.dtype))
        acc = tl.where(stopped, 0.0, acc)
        sums_at = partial_ptr + part.to(tl.int64) * 2 * CI + channels  # [BLOCK_N]
        tl.store(sums_at, total(acc, normal), mask=channels < CI)
        tl.store(sums_at + CI, tl.sum(acc, 0), mask=channels < CI)
    tl.store(grad_x_ptr + at, acc.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*SIZES, "low", "high", "each"))
def weight_gradient_kernel(
    grad_ptr, x_ptr, partial_ptr,
    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high,  # of the normalisation before
    each, M, CI, CO,
    H, W, P, Q, R, S,  # of input, output and kernel
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    POINTWISE: tl.constexpr,  # a matrix product
    NORM: tl.constexpr,  # normalise and activate x
    TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[chunk, co, r, s, ci] = sum over `each` output pixels m of dy[m, co] * a[pixel(m, r, s), ci]."""
    across = tl.cdiv(CI, BLOCK_N)
    taps = 1 if POINTWISE else R * S
    share = tl.cdiv(CO, BLOCK_M) * taps * across  # programs of a chunk
    chunk, number = tl.program_id(0) // share, tl.program_id(0) % share
    channels = number % across * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tap = number // across % taps
    filters = number // across // taps * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    down, right = tap // S * dil_h, tap % S * dil_w
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)  # [BLOCK_M, BLOCK_N]
    for first in range(begin, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        if POINTWISE:
            inside, pixel = rows < end, rows
        else:
            top, left, pixel = window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w)  # [BLOCK_K] each
            inside = (rows < end) & within(top + down, left + right, H, W)  # [BLOCK_K]
            pixel += down * W + right
        grad_at = grad_ptr + rows.to(tl.int64)[:, None] * CO + filters[None, :]  # [BLOCK_K, BLOCK_M]
        grad = tl.load(grad_at, mask=(rows < end)[:, None] & (filters < CO)[None, :], other=0.0)
        x_at = x_ptr + pixel.to(tl.int64)[:, None] * CI + channels[None, :]  # [BLOCK_K, BLOCK_N]
        x = tl.load(x_at, mask=inside[:, None] & (channels < CI)[None, :], other=0.0)
        if NORM:
            x = activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE)
        acc = product(tl.trans(grad), x, acc, TF32)
    # [BLOCK_M, BLOCK_N]
    at = partial_ptr + ((chunk.to(tl.int64) * CO + filters) * taps + tap)[:, None] * CI + channels[None, :]
    tl.store(at, acc, mask=(filters < CO)[:, None] & (channels < CI)[None, :])


class Tile(NamedTuple):
    """The sizes of a program: of its tile of the output, and of one step of its sum."""

    rows: int  # BLOCK_M
    columns: int  # BLOCK_N
    inner: int  # BLOCK_K for 16 bits; half as many for 32
    warps: int
    stages: int = 3


# Tiles that fit in registers on every GPU. Only plain matrix products have 8 warps: with so many, loops over taps and
# channels have been miscompiled; with 4 warps a tile of 128 x 128 spills on sm_80 and sm_100.
WIDE = Tile(128, 128, 64, 8)
TALL = Tile(128, 64, 64, 4)
SHALLOW = Tile(128, 64, 32, 4)  # for gradients with taps: their loops keep more in registers
SMALL = Tile(64, 64, 64, 4)
SPREAD = Tile(128, 64, 64, 8)  # for gradients that go on through a BatchNorm, whose numbers take registers too
LOW = Tile(64, 64, 32, 4)  # for these with taps
EXACT = Tile(32, 32, 16, 4, 2)  # for float32 without TF32, and float64


class Prologue(NamedTuple):
    """The normalisation and activation of a convolution's input: act((x - mean) * rstd * gamma + beta)."""

    mean: Tensor  # (CI,) each
    rstd: Tensor
    gamma: Tensor
    beta: Tensor
    act: str


class Before(NamedTuple):
    """The BatchNorm before a convolution, with activation, and what its backward needs. Tensors are channels_last."""

    norm: Prologue
    x: Tensor  # (B, CI, H, W), its input
    y: Tensor | None  # (B, CI, H, W), its output, if it has a residual and an activation
    other: Tensor | None  # (B, CI, H, W), the gradient of its output from another reader


class Geometry(NamedTuple):
    """The shape of a convolution without batch and channels, in the order of the kernels' arguments."""

    H: int  # height and width of the input,
    W: int
    P: int  # of the output,
    Q: int
    R: int  # and of the kernel
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int

    @property
    def pointwise(self) -> bool:
        """Whether the output is the matrix product of input and weight."""
        return self[4:10] == (1, 1, 1, 1, 0, 0)


def geometry(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """Return the geometry, from (height, width) of each; P or Q is less than 1 if the kernel does not fit."""
    P, Q = (
        (s + 2 * pad - dil * (k - 1) - 1) // step + 1
        for s, k, step, pad, dil in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return Geometry._make((*size, P, Q, *kernel, *stride, *padding, *dilation))


def tile(rows: int, columns: int, pointwise: bool, tall: Tile = TALL) -> Tile:
    """Choose the tile for an output of this many pixels and channels: the largest that leaves no SM idle."""
    return _unless_idle(WIDE if pointwise and columns > tall.columns else tall, rows, columns)


def input_tile(rows: int, columns: int, pointwise: bool, norm: bool = False) -> Tile:
    """Choose the tile for an input's gradient; norm: it goes on through the activation of a BatchNorm."""
    if not norm:
        return tile(rows, columns, pointwise, TALL if pointwise else SHALLOW)
    return _unless_idle(SPREAD, rows, columns) if pointwise else LOW


def _unless_idle(tile: Tile, rows: int, columns: int) -> Tile:
    """Return this tile; or a small one, if so few programs would leave SMs idle."""
    return SMALL if cdiv(rows, tile.rows) * cdiv(columns, tile.columns) < _FEW else tile


def weight_tile(filters: int, channels: int, pointwise: bool) -> Tile:
    """Choose the tile for a weight's gradient."""
    if not pointwise:
        return SHALLOW
    return WIDE if min(filters, channels) > SMALL.rows else SMALL


def configuration(kernel: Any, flags: dict[str, int], dtype: torch.dtype, tf32: bool, tile: Tile) -> Configuration:
    """Return how a kernel is compiled for activations of this type. tf32: whether products of float32 are in TF32."""
    tf32 = tf32 and dtype == torch.float32
    if dtype.itemsize > 2 and not tf32:
        tile = EXACT
    inner = tile.inner // 2 if tf32 else tile.inner
    precision = (("TF32", int(tf32)), ("WIDE", int(dtype == torch.float64)))
    blocks = (("BLOCK_M", tile.rows), ("BLOCK_N", tile.columns), ("BLOCK_K", inner))
    return Configuration(kernel, (*flags.items(), *precision, *blocks), tile.warps, stages=tile.stages)


def configurations(dtype: torch.dtype = torch.bfloat16, tf32: bool = False) -> Iterator[Configuration]:
    """Yield every configuration there can be for activations of this type."""
    found = []
    for pointwise, norm in itertools.product((0, 1), (0, 1)):
        flags = {"POINTWISE": pointwise, "NORM": norm}
        for shape in (WIDE, TALL, SMALL) if pointwise else (TALL, SMALL):
            found += [(forward_kernel, flags | {"STATS": stats}, shape) for stats in (0, 1)]
        shapes = [(SHALLOW, SMALL), (WIDE, TALL, SMALL), (LOW,), (SPREAD, SMALL)][pointwise + 2 * norm]
        for shape in shapes:
            for from_y, other in itertools.product((0, 1), (0, 1)) if norm else ((0, 0),):
                found.append((input_gradient_kernel, flags | {"FROM_Y": from_y, "OTHER": other}, shape))
        for shape in (WIDE, SMALL) if pointwise else (SHALLOW,):
            found.append((weight_gradient_kernel, flags, shape))
    yield from dict.fromkeys(configuration(kernel, flags, dtype, tf32, shape) for kernel, flags, shape in found)


def uses_tf32() -> bool:
    """Whether PyTorch's own convolutions use TF32: then these do."""
    # This is torch.backends.cudnn.conv.fp32_precision, ten times as fast.
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prologue(x: Tensor, norm: Prologue | None) -> tuple[Tensor | float, ...]:
    """Return mean, rstd, gamma, beta, low and high for a kernel; without a normalisation it does not read them."""
    return (x, x, x, x, *RANGES["none"]) if norm is None else (*norm[:4], *RANGES[norm.act])


class _Plan(NamedTuple):
    """A launch for tensors of certain shapes, and the tensors that it writes."""

    config: Configuration
    programs: int
    numbers: tuple[int, ...]  # the kernel's arguments after low and high
    each: int  # rows in a part of `partial`
    output: tuple[int, ...]  # its shape (B, C, H, W); () for a weight's gradient
    partial: tuple[int, ...]  # its shape
    float: torch.dtype  # of `partial`


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    x: torch.Size, w: torch.Size, moves: Moves, dtype: torch.dtype, tf32: bool, norm: bool, stats: bool
) -> _Plan:
    sizes = geometry(x[2:], w[2:], *moves)
    CI, CO, output = x[1], w[0], (x[0], w[0], sizes.P, sizes.Q)
    M = x[0] * sizes.P * sizes.Q
    if stats and M == 1:
        raise ValueError(f"Expected more than 1 value per channel for statistics, got output size {output}")
    flags = {"POINTWISE": int(sizes.pointwise), "NORM": int(norm), "STATS": int(stats)}
    config = configuration(forward_kernel, flags, dtype, tf32, tile(M, CO, sizes.pointwise))
    blocks = dict(config.constants)
    parts, each = cdiv(M, blocks["BLOCK_M"]), blocks["BLOCK_M"]
    programs = parts * cdiv(CO, blocks["BLOCK_N"])
    return _Plan(config, programs, (M, CI, CO, *sizes), each, output, (parts if stats else 0, 2, CO), _float(dtype))


@functools.lru_cache(maxsize=4096)
def _input_plan(
    grad: torch.Size, w: torch.Size, size: tuple[int, ...], moves: Moves, dtype: torch.dtype, tf32: bool,
    before: tuple[bool, bool] | None,
) -> _Plan:  # fmt: skip
    """before: whether there are y and another gradient, as in `Before`; None without one."""
    sizes = geometry(size, w[2:], *moves)
    CO, CI = w[:2]
    M = grad[0] * sizes.H * sizes.W
    from_y, other = before or (False, False)
    flags = {
        "POINTWISE": int(sizes.pointwise), "NORM": int(before is not None), "FROM_Y": int(from_y), "OTHER": int(other)
    }  # fmt: skip
    shape = input_tile(M, CI, sizes.pointwise, before is not None)
    config = configuration(input_gradient_kernel, flags, dtype, tf32, shape)
    blocks = dict(config.constants)
    parts, each = cdiv(M, blocks["BLOCK_M"]), blocks["BLOCK_M"]
    programs, partial = parts * cdiv(CI, blocks["BLOCK_N"]), (parts if before else 0, 2, CI)
    return _Plan(config, programs, (M, CI, CO, *sizes), each, (grad[0], CI, *size), partial, _float(dtype))


@functools.lru_cache(maxsize=4096)
def _weight_plan(
    grad: torch.Size, x: torch.Size, kernel: tuple[int, ...], moves: Moves, dtype: torch.dtype, tf32: bool, norm: bool
) -> _Plan:
    sizes = geometry(x[2:], kernel, *moves)
    CI, CO = x[1], grad[1]
    M = grad.numel() // CO
    flags = {"POINTWISE": int(sizes.pointwise), "NORM": int(norm)}
    config = configuration(weight_gradient_kernel, flags, dtype, tf32, weight_tile(CO, CI, sizes.pointwise))
    blocks = dict(config.constants)
    share = cdiv(CO, blocks["BLOCK_M"]) * sizes.R * sizes.S * cdiv(CI, blocks["BLOCK_N"])
    steps = cdiv(M, blocks["BLOCK_K"])
    each = cdiv(steps, cdiv(PROGRAMS, share)) * blocks["BLOCK_K"]
    chunks = cdiv(M, each)
    partial = chunks, CO, sizes.R, sizes.S, CI
    return _Plan(config, chunks * share, (each, M, CI, CO, *sizes), each, (), partial, _float(dtype))


def forward(
    x: Tensor, w: Tensor, norm: Prologue | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    stats_eps: float | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:  # fmt: skip
    """Return y (B, CO, P, Q), channels_last, and what `norm_act.statistics` returns of it, if `stats_eps` is given.

    x: (B, CI, H, W), channels_last.
    w: (CO, CI, R, S), channels_last, of the same type.
    norm: done to x first.
    stride, padding, dilation: (height, width) each.
    """
    moves, counted = (tuple(stride), tuple(padding), tuple(dilation)), stats_eps is not None
    plan = _forward_plan(x.shape, w.shape, moves, x.dtype, uses_tf32(), norm is not None, counted)
    y, partial = empty(x, *plan.output), x.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(
        plan.programs,
        x, w, y, partial,
        *_prologue(x, norm),
        *plan.numbers,
    )  # fmt: skip
    return y, None if stats_eps is None else norm_act.merge(partial, plan.numbers[0], plan.each, stats_eps)


def input_gradient(
    grad: Tensor, w: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], before: Before | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradient (B, CI, H, W), channels_last, of the convolution's input, from that of y. size: (H, W).

    before: the gradient goes on through the activation of this BatchNorm, and becomes g of `norm_act.sums`; returned
        with it are the sums (2, CI), the gradients of gamma and beta.
    """
    norm, x, y, other = before or (None, grad, None, None)
    moves, extra = (tuple(stride), tuple(padding), tuple(dilation)), (y is not None, other is not None)
    plan = _input_plan(grad.shape, w.shape, tuple(size), moves, grad.dtype, uses_tf32(), extra if before else None)
    found, partial = empty(grad, *plan.output), grad.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(
        plan.programs,
        grad, w, found,
        x if other is None else other, x, x if y is None else y, partial,
        *_prologue(x, norm),
        *plan.numbers,
    )  # fmt: skip
    return found, partial.sum(0) if before else None


def weight_gradient(
    grad: Tensor, x: Tensor, norm: Prologue | None, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return the gradient (CO, CI, R, S), channels_last, of the weight. kernel: (R, S)."""
    moves = tuple(stride), tuple(padding), tuple(dilation)
    plan = _weight_plan(grad.shape, x.shape, tuple(kernel), moves, x.dtype, uses_tf32(), norm is not None)
    partial = x.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(
        plan.programs,
        grad, x, partial,
        *_prologue(x, norm),
        *plan.numbers,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype).permute(0, 3, 1, 2)


def empty(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised channels_last tensor."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
