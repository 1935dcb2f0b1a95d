"""Convolution of channels_last activations as a matrix product, with a normalisation before it and statistics after.

    y[m, co] = sum over r, s, ci of a[pixel(m, r, s), ci] * w[co, r, s, ci],   a = act((x - mean) * rstd * gamma + beta)

Activations hold only active channels, and the weight only the rows and columns of these (it is gathered once a step):
a channel that is pruned costs nothing here. Rows are pixels, M = B * P * Q of the output or B * H * W of the input. The
sum runs over R * S taps of CI channels in one loop, tile by tile, without a copy of x that is R * S times as large.
A 1x1 convolution of stride 1 is the matrix product of x and w. What padding adds is zero after the activation.

The gradient of the input is the same sum over dy, that of the weight one over pixels. The former can go on through the
activation of the BatchNorm before, and count what that needs. The latter is shared by programs whose float32 parts are
added in a fixed order: the same bits every time. All products are accumulated in float32, in float64 for float64.
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
from reprune_triton.kernels.step.norm_act import total, vector

RANGES = {"none": (float("-inf"), float("inf")), "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
PROGRAMS = 512  # that work on a weight's gradient: about four for each SM of the largest GPUs
_FEW = 132  # programs that leave SMs idle: then tiles are smaller
Pair = tuple[int, ...]  # of height and width
Moves = tuple[Pair, Pair, Pair]  # stride, padding and dilation
SIZES = ("M", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")
# The interpreter takes the bits of bfloat16 for integers when it multiplies matrices.
_WIDEN = tl.constexpr(norm_act.INTERPRETED)


@triton.jit
def rounded(x):
    """The nearest TF32 number, of two the one further from zero, as cuBLAS and CUTLASS round: tensor cores cut off the
    last 13 bits. NaN stays as it is; to its bits nothing may be added."""
    nearest = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def product(a, b, acc, TF32: tl.constexpr):
    """acc + a b."""
    if TF32:
        a, b = rounded(a), rounded(b)
    if _WIDEN:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "ieee", out_dtype=acc.dtype)


@triton.jit
def activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE: tl.constexpr):
    """act((x - mean) * rstd * gamma + beta) of a tile [rows, channels], rounded to its type; 0 where not `inside`."""
    scale = vector(rstd_ptr, channels, CI, WIDE) * vector(gamma_ptr, channels, CI, WIDE)
    value = x.to(scale.dtype) - vector(mean_ptr, channels, CI, WIDE)[None, :]
    value = tl.fma(value, scale[None, :], vector(beta_ptr, channels, CI, WIDE)[None, :])
    low, high = tl.cast(low, scale.dtype), tl.cast(high, scale.dtype)
    value = tl.clamp(value, low, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside[:, None], value, 0.0).to(x.dtype)


@triton.jit
def window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w):
    """Where the windows of these output pixels begin in the input: top, left, and the number of that pixel."""
    line = rows // Q
    image = line // P
    left = (rows - line * Q) * stride_w - pad_w
    top = (line - image * P) * stride_h - pad_h
    return top, left, (image * H + top) * W + left


@triton.jit
def following(block, r, s, blocks, S):
    """The block of channels and the tap (r, s) that come next in a sum: counters, as dividing is slow."""
    block += 1
    s += (block == blocks).to(tl.int32)
    block = tl.where(block == blocks, 0, block)
    r += (s == S).to(tl.int32)
    s = tl.where(s == S, 0, s)
    return block, r, s


@triton.jit
def within(top, left, H, W):
    return (top >= 0) & (top < H) & (left >= 0) & (left < W)


@triton.jit(do_not_specialize=(*SIZES, "low", "high"))
def forward_kernel(
    x_ptr, w_ptr, y_ptr, partial_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, M, CI, CO, H, W, P, Q, R, S,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, POINTWISE: tl.constexpr, NORM: tl.constexpr, STATS: tl.constexpr,
    TF32: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, CO), and partial[tile of rows, 0 | 1, CO] = mean of y, and sum of squared deviations from it."""
    across = tl.cdiv(CO, BLOCK_N)
    part = tl.program_id(0) // across
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    filters = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    top, left, pixel = window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w)
    x_at = x_ptr + (rows if POINTWISE else pixel).to(tl.int64) * CI
    w_at = w_ptr + filters.to(tl.int64) * (CI if POINTWISE else R * S * CI)
    blocks = tl.cdiv(CI, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)
    block, r, s = 0, 0, 0
    for step in range(blocks if POINTWISE else R * S * blocks):
        if POINTWISE:
            channels = step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside, x_from, w_from = rows < M, 0, 0
        else:
            channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = r * S + s
            down, right = r * dil_h, s * dil_w
            block, r, s = following(block, r, s, blocks, S)
            inside = (rows < M) & within(top + down, left + right, H, W)
            x_from, w_from = (down * W + right) * CI, tap * CI
        some = channels < CI
        x = tl.load(x_at[:, None] + (x_from + channels)[None, :], mask=inside[:, None] & some[None, :], other=0.0)
        w_mask = some[:, None] & (filters < CO)[None, :]
        w = tl.load(w_at[None, :] + (w_from + channels)[:, None], mask=w_mask, other=0.0)
        if NORM:
            x = activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE)
        acc = product(x, w, acc, TF32)
    y = acc.to(y_ptr.dtype.element_ty)
    y_at = y_ptr + rows.to(tl.int64)[:, None] * CO + filters[None, :]
    tl.store(y_at, y, mask=(rows < M)[:, None] & (filters < CO)[None, :])
    if STATS:
        value = y.to(acc.dtype)
        mean = tl.sum(value, 0) / tl.minimum(M - part * BLOCK_M, BLOCK_M).to(acc.dtype)
        off = tl.where((rows < M)[:, None], value - mean[None, :], 0.0)
        at = partial_ptr + part.to(tl.int64) * 2 * CO + filters
        tl.store(at, mean, mask=filters < CO)
        tl.store(at + CO, total(off, off), mask=filters < CO)


@triton.jit(do_not_specialize=(*SIZES, "low", "high"))
def input_gradient_kernel(
    grad_ptr, w_ptr, grad_x_ptr, other_ptr, x_ptr, y_ptr, partial_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low,
    high, M, CI, CO, H, W, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, POINTWISE: tl.constexpr,
    NORM: tl.constexpr, FROM_Y: tl.constexpr, OTHER: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da[m, ci] = sum over r, s, co of dy[pixel, co] * w[co, r, s, ci], where the window of `pixel` has m at (r, s).

    With NORM g, which is da (and another gradient of it) where the activation before lets it through, and
    partial[tile of rows, 0 | 1, CI] = sums of g * x_hat and of g: what the BatchNorm before needs of it.
    """
    across = tl.cdiv(CI, BLOCK_N)
    part = tl.program_id(0) // across
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    # Tap (r, s) of the window at (p, q) is at p * stride + r * dil - pad: p = (h + pad) // stride - r * dil // stride
    # where the remainders agree, and else no window has m there.
    below, beyond = rows // W % H + pad_h, rows % W + pad_w
    bottom, last = below // stride_h, beyond // stride_w
    pixel = (rows // W // H * P + bottom) * Q + last
    grad_at = grad_ptr + (rows if POINTWISE else pixel).to(tl.int64) * CO
    blocks = tl.cdiv(CO, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)
    block, r, s = 0, 0, 0
    for step in range(blocks if POINTWISE else R * S * blocks):
        if POINTWISE:
            filters = step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside, grad_from, w_from, each = rows < M, 0, 0, CI
        else:
            filters = block * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = r * S + s
            down, right = r * dil_h, s * dil_w
            block, r, s = following(block, r, s, blocks, S)
            up, back = down // stride_h, right // stride_w
            inside = (below - bottom * stride_h == down - up * stride_h) & within(bottom - up, last - back, P, Q)
            inside = (rows < M) & (beyond - last * stride_w == right - back * stride_w) & inside
            grad_from, w_from, each = -(up * Q + back) * CO, tap * CI, R * S * CI
        some = filters < CO
        grad_mask = inside[:, None] & some[None, :]
        grad = tl.load(grad_at[:, None] + (grad_from + filters)[None, :], mask=grad_mask, other=0.0)
        w_at = w_ptr + filters.to(tl.int64)[:, None] * each + (w_from + channels)[None, :]
        w = tl.load(w_at, mask=some[:, None] & (channels < CI)[None, :], other=0.0)
        acc = product(grad, w, acc, TF32)
    at = rows.to(tl.int64)[:, None] * CI + channels[None, :]
    mask = (rows < M)[:, None] & (channels < CI)[None, :]
    if NORM:
        if OTHER:
            acc += tl.load(other_ptr + at, mask=mask, other=0.0).to(acc.dtype)
        mean, rstd = vector(mean_ptr, channels, CI, WIDE), vector(rstd_ptr, channels, CI, WIDE)
        normal = (tl.load(x_ptr + at, mask=mask, other=0.0).to(acc.dtype) - mean[None, :]) * rstd[None, :]
        if FROM_Y:
            value = tl.load(y_ptr + at, mask=mask, other=0.0).to(acc.dtype)
        else:
            gamma, beta = vector(gamma_ptr, channels, CI, WIDE), vector(beta_ptr, channels, CI, WIDE)
            value = normal * gamma[None, :] + beta[None, :]
        stopped = (value <= tl.cast(low, acc.dtype)) | (value >= tl.cast(high, acc.dtype))
        acc = tl.where(stopped, 0.0, acc)
        sums_at = partial_ptr + part.to(tl.int64) * 2 * CI + channels
        tl.store(sums_at, total(acc, normal), mask=channels < CI)
        tl.store(sums_at + CI, tl.sum(acc, 0), mask=channels < CI)
    tl.store(grad_x_ptr + at, acc.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*SIZES, "low", "high", "each"))
def weight_gradient_kernel(
    grad_ptr, x_ptr, partial_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, each, M, CI, CO, H, W, P, Q, R, S,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, POINTWISE: tl.constexpr, NORM: tl.constexpr, TF32: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[chunk, co, r, s, ci] = sum over `each` output pixels m of dy[m, co] * a[pixel(m, r, s), ci]."""
    across = tl.cdiv(CI, BLOCK_N)
    taps = 1 if POINTWISE else R * S
    share = tl.cdiv(CO, BLOCK_M) * taps * across  # programs of a chunk
    chunk, number = tl.program_id(0) // share, tl.program_id(0) % share
    channels = number % across * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = number // across % taps
    filters = number // across // taps * BLOCK_M + tl.arange(0, BLOCK_M)
    down, right = tap // S * dil_h, tap % S * dil_w
    begin = chunk * each
    end = tl.minimum(begin + each, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if WIDE else tl.float32)
    for first in range(begin, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        if POINTWISE:
            inside, pixel = rows < end, rows
        else:
            top, left, pixel = window(rows, H, W, P, Q, stride_h, stride_w, pad_h, pad_w)
            inside = (rows < end) & within(top + down, left + right, H, W)
            pixel += down * W + right
        grad_at = grad_ptr + rows.to(tl.int64)[:, None] * CO + filters[None, :]
        grad = tl.load(grad_at, mask=(rows < end)[:, None] & (filters < CO)[None, :], other=0.0)
        x_at = x_ptr + pixel.to(tl.int64)[:, None] * CI + channels[None, :]
        x = tl.load(x_at, mask=inside[:, None] & (channels < CI)[None, :], other=0.0)
        if NORM:
            x = activated(x, inside, channels, CI, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, low, high, WIDE)
        acc = product(tl.trans(grad), x, acc, TF32)
    at = partial_ptr + ((chunk.to(tl.int64) * CO + filters) * taps + tap)[:, None] * CI + channels[None, :]
    tl.store(at, acc, mask=(filters < CO)[:, None] & (channels < CI)[None, :])


class Tile(NamedTuple):
    """Of the output, and of the sum, of one program."""

    rows: int
    columns: int
    inner: int  # for 16 bits; half as many for 32
    warps: int
    stages: int = 3


# What the registers hold on every GPU. Only plain matrix products have 8 warps: loops over taps and channels have been
# miscompiled with so many, and with 4 warps a tile of 128 x 128 spills on sm_80 and sm_100.
WIDE = Tile(128, 128, 64, 8)
TALL = Tile(128, 64, 64, 4)
SHALLOW = Tile(128, 64, 32, 4)  # of gradients with taps, where the loop keeps more in registers
SMALL = Tile(64, 64, 64, 4)
SPREAD = Tile(128, 64, 64, 8)  # of gradients that go on through a BatchNorm, whose numbers lie in registers too
LOW = Tile(64, 64, 32, 4)  # of these with taps
EXACT = Tile(32, 32, 16, 4, 2)  # float32 without TF32, and float64


class Prologue(NamedTuple):
    """What is done to the input first: act((x - mean) * rstd * gamma + beta)."""

    mean: Tensor  # (CI,) each
    rstd: Tensor
    gamma: Tensor
    beta: Tensor
    act: str


class Before(NamedTuple):
    """The BatchNorm that made the input of a convolution, and what its gradient is made of."""

    norm: Prologue
    x: Tensor  # (B, CI, H, W), channels_last: what it normalised
    y: Tensor | None  # what it made, if it has a residual and an activation
    other: Tensor | None  # the gradient of another reader of y


class Geometry(NamedTuple):
    """Height and width of input, output and kernel, and how it moves, in the order of the kernels' arguments."""

    H: int
    W: int
    P: int
    Q: int
    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int

    @property
    def pointwise(self) -> bool:
        """Is the output the product of input and weight, pixel by pixel?"""
        return self[4:10] == (1, 1, 1, 1, 0, 0)


def geometry(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Geometry:
    """Of (height, width) each; P or Q is less than 1 where the kernel does not fit."""
    P, Q = (
        (s + 2 * pad - dil * (k - 1) - 1) // step + 1
        for s, k, step, pad, dil in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return Geometry._make((*size, P, Q, *kernel, *stride, *padding, *dilation))


def tile(rows: int, columns: int, pointwise: bool, tall: Tile = TALL) -> Tile:
    """For an output of this many pixels and channels: as large as it fills, unless SMs would be idle."""
    found = WIDE if pointwise and columns > tall.columns else tall
    few = cdiv(rows, found.rows) * cdiv(columns, found.columns) < _FEW
    return SMALL if few else found


def input_tile(rows: int, columns: int, pointwise: bool, norm: bool = False) -> Tile:
    """For the gradient of an input; with `norm` it goes on through a BatchNorm."""
    if not norm:
        return tile(rows, columns, pointwise, TALL if pointwise else SHALLOW)
    if not pointwise:
        return LOW
    few = cdiv(rows, SPREAD.rows) * cdiv(columns, SPREAD.columns) < _FEW
    return SMALL if few else SPREAD


def weight_tile(filters: int, channels: int, pointwise: bool) -> Tile:
    """For the gradient of a weight."""
    if not pointwise:
        return SHALLOW
    return WIDE if min(filters, channels) > SMALL.rows else SMALL


def configuration(kernel: Any, flags: dict[str, int], dtype: torch.dtype, tf32: bool, tile: Tile) -> Configuration:
    """Of a kernel for activations of this type; float32 goes through TF32 or is exact."""
    tf32 = tf32 and dtype == torch.float32
    if dtype.itemsize > 2 and not tf32:
        tile = EXACT
    inner = tile.inner // 2 if tf32 else tile.inner
    precision = (("TF32", int(tf32)), ("WIDE", int(dtype == torch.float64)))
    blocks = (("BLOCK_M", tile.rows), ("BLOCK_N", tile.columns), ("BLOCK_K", inner))
    return Configuration(kernel, (*flags.items(), *precision, *blocks), tile.warps, stages=tile.stages)


def configurations(dtype: torch.dtype = torch.bfloat16, tf32: bool = False) -> Iterator[Configuration]:
    """Every configuration there can be for activations of this type."""
    found = []
    for pointwise, norm in itertools.product((0, 1), (0, 1)):
        flags = {"POINTWISE": pointwise, "NORM": norm}
        for shape in (WIDE, TALL, SMALL) if pointwise else (TALL, SMALL):
            found += [(forward_kernel, flags | {"STATS": stats}, shape) for stats in (0, 1)]
        shapes = [(SHALLOW, SMALL), (WIDE, TALL, SMALL), (LOW,), (SPREAD, SMALL)][pointwise + 2 * norm]
        for shape in shapes:
            for from_y, other in itertools.product((0, 1), (0, 1)) if norm else ((0, 0),):
                behind = {"NORM": norm, "FROM_Y": from_y, "OTHER": other}
                found.append((input_gradient_kernel, {"POINTWISE": pointwise} | behind, shape))
        for shape in (WIDE, SMALL) if pointwise else (SHALLOW,):
            found.append((weight_gradient_kernel, flags, shape))
    yield from dict.fromkeys(configuration(kernel, flags, dtype, tf32, shape) for kernel, flags, shape in found)


def uses_tf32() -> bool:
    """As PyTorch's own convolutions."""
    # torch.backends.cudnn.conv.fp32_precision, which takes ten times longer to say so.
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prologue(x: Tensor, norm: Prologue | None) -> tuple[Tensor | float, ...]:
    """The arguments for it; without one they are not read."""
    return (x, x, x, x, *RANGES["none"]) if norm is None else (*norm[:4], *RANGES[norm.act])


class _Plan(NamedTuple):
    """How a kernel is launched for tensors of certain shapes, and what it writes."""

    config: Configuration
    programs: int
    numbers: tuple[int, ...]  # its arguments behind the tensors and RANGES
    each: int  # rows that one part of `partial` is of
    output: tuple[int, ...]  # (B, C, H, W); of a weight's gradient none
    partial: tuple[int, ...]
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
    """before: whether it has y, and another gradient."""
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
    """y (B, CO, P, Q), channels_last, and its mean, 1 / sqrt(variance + eps) and unbiased variance, (CO,) each.

    x: (B, CI, H, W), channels_last. w: (CO, CI, R, S), channels_last, of the same type.
    """
    moves, counted = (tuple(stride), tuple(padding), tuple(dilation)), stats_eps is not None
    plan = _forward_plan(x.shape, w.shape, moves, x.dtype, uses_tf32(), norm is not None, counted)
    y, partial = empty(x, *plan.output), x.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(plan.programs, x, w, y, partial, *_prologue(x, norm), *plan.numbers)
    return y, None if stats_eps is None else norm_act.merge(partial, plan.numbers[0], plan.each, stats_eps)


def input_gradient(
    grad: Tensor, w: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], before: Before | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient (B, CI, H, W), channels_last, of what the convolution read, from that of y. size: (H, W).

    before: then it is the gradient behind the activation of this BatchNorm, and with it come the sums (2, CI) that
    `norm_act.gradient` goes on with, which are also the gradients of gamma and beta.
    """
    norm, x, y, other = before or (None, grad, None, None)
    moves, extra = (tuple(stride), tuple(padding), tuple(dilation)), (y is not None, other is not None)
    plan = _input_plan(grad.shape, w.shape, tuple(size), moves, grad.dtype, uses_tf32(), extra if before else None)
    found, partial = empty(grad, *plan.output), grad.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(
        plan.programs, grad, w, found, x if other is None else other, x, x if y is None else y, partial,
        *_prologue(x, norm), *plan.numbers,
    )  # fmt: skip
    return found, partial.sum(0) if before else None


def weight_gradient(
    grad: Tensor, x: Tensor, norm: Prologue | None, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The gradient (CO, CI, R, S), channels_last, of the weight. kernel: (R, S)."""
    moves = tuple(stride), tuple(padding), tuple(dilation)
    plan = _weight_plan(grad.shape, x.shape, tuple(kernel), moves, x.dtype, uses_tf32(), norm is not None)
    partial = x.new_empty(plan.partial, dtype=plan.float)
    plan.config.run(plan.programs, grad, x, partial, *_prologue(x, norm), *plan.numbers)
    return partial.sum(0).to(x.dtype).permute(0, 3, 1, 2)


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised, channels_last."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
