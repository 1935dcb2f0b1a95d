"""Convolution as one operation with the BatchNorm and activation before it, and with the statistics of its output.

    y, statistics = norm_act_conv2d(x, weight, norm, padding=1, stats_eps=1e-5)      # x, weight, y: active channels

PyTorch's own convolution is one implementation, the kernels of `masked_conv` are the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reprune_triton import availability
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.fused.library import operator, unseen
from reprune_triton.fused.norm import (
    ACTIVATIONS,
    IMPLS,
    Norm,
    Stats,
    apply_norm,
    made_up,
    measure,
    norm_act_backward,
    norm_gradient,
    normalise,
    normalise_twice,
    refuses,
    wide,
)

Size = int | Sequence[int]


def norm_act_conv2d(
    x: Tensor, weight: Tensor, norm: Norm | None, stride: Size = 1, padding: Size = 0, dilation: Size = 1,
    stats_eps: float | None = None, impl: str = "auto",
) -> tuple[Tensor, Stats | None]:  # fmt: skip
    """Return conv2d(act(normalised x), weight), differentiable in x, weight, gamma and beta, and its statistics.

    Args:
        x: (B, n_in, H, W), before the normalisation.
        weight: (n_out, n_in, kh, kw), of the active channels.
        norm: the normalisation and activation; None: neither. Padding adds zeros after them.
        stride, padding, dilation, impl: as in `ops.masked_conv2d`.
        stats_eps: None, or the eps of the BatchNorm that follows.
    Returns:
        y (B, n_out, P, Q); and the statistics of y, which have no gradient, or None without stats_eps.
    Raises:
        RepruneError: as `ops.masked_conv2d`, and for an unknown activation.
        ValueError: as batch_norm, for statistics of one value per channel.
    """
    if impl not in IMPLS:
        raise RepruneError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    if norm is not None and norm.act not in ACTIVATIONS:
        raise RepruneError(f"act must be one of {', '.join(ACTIVATIONS)}; got {norm.act!r}")
    if weight.dim() != 4 or x.dim() < 3 or x.shape[-3] != weight.shape[1]:
        raise RepruneError(
            f"x {tuple(x.shape)} and the active part of the weight {tuple(weight.shape)} do not fit: both must have "
            "the active input channels. Grouped and depthwise convolutions stay with torch.nn.functional.conv2d."
        )
    moves = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))
    if norm is not None:
        mean, rstd, gamma, beta = (vector.contiguous() for vector in norm[:4])
        norm = norm._replace(mean=mean, rstd=rstd, gamma=gamma, beta=beta)
    return run(x, weight, norm, moves, stats_eps, choose(x, weight, norm, moves, stats_eps, impl))[:2]


class Output(NamedTuple):
    """The result of `run`."""

    y: Tensor  # (B, n_out, P, Q)
    stats: Stats | None  # of y; None without stats_eps
    normalised: Tensor | None  # the input of the convolution itself, if it is shared


Pair = tuple[int, ...]
Moves = tuple[Pair, Pair, Pair]  # stride, padding and dilation, of height and width each


def choose(
    x: Tensor, weight: Tensor, norm: Norm | None, moves: Moves, stats_eps: float | None, impl: str,
    residual: Tensor | None = None, shared: bool = False,
) -> str:  # fmt: skip
    """Return `how` for `run`: "torch", "mixed" or "triton".

    Args:
        impl: one of norm.IMPLS; "auto": whichever of "mixed" and "triton" is faster, by measurement.
    """
    if impl == "auto" and torch.compiler.is_compiling():
        return "torch"  # torch.compile fuses by itself
    key = None
    if impl == "auto":
        device = x.device
        key = _key(x, device.type, weight, norm, moves, stats_eps is not None, residual, shared)
        known = dispatch.recall(device, key)
        if known is not None:
            return "mixed" if known == dispatch.UNKNOWN else known
    dtype = x.dtype if norm is not None else _type(x)
    why_not = _why_not(x, dtype, weight, norm, moves)
    if impl == "triton" and why_not:
        message = f'impl="triton" cannot run: {why_not}. Use impl="torch" or "auto".'
        raise availability.refusal(message, x.device)
    if impl != "auto":
        return impl
    plain = x.numel() == 0 or refuses(x)
    other = "torch" if plain and residual is None and not shared else "mixed"
    if why_not or other == "torch":
        return other

    def candidates() -> dispatch.Candidates:
        return _candidates(x, dtype, weight, norm, moves, stats_eps, residual, shared, _differentiable(x, weight, norm))

    case = _case(x, dtype, weight, norm, moves, stats_eps is not None, residual, shared)
    found = dispatch.choose(x, case, candidates, key)
    if found == dispatch.UNKNOWN:
        return "torch" if dtype == torch.float64 and residual is None and not shared else "mixed"
    return found


def _key(
    x: Tensor, device: str, weight: Tensor, norm: Norm | None, moves: Moves, has_stats: bool, residual: Tensor | None,
    shared: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Return all that decides whether the kernels can do it, and which case it is.

    Args:
        device: the type of x's device.
    """
    of_norm, last = None, torch.channels_last
    if norm is not None:
        mean, rstd, gamma, beta, act, batch = norm
        of_norm = mean.shape, rstd.shape, gamma.shape, beta.shape, gamma.requires_grad, act, batch
    return (
        "conv", type(x), x.dtype, x.shape, x.is_contiguous(memory_format=last), x.requires_grad,
        weight.dtype, weight.shape, weight.is_contiguous(memory_format=last), weight.requires_grad,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None, moves, has_stats, shared,
        of_norm, None if residual is None else residual.is_contiguous(memory_format=last), dispatch.state(),
    )  # fmt: skip


def _case(
    x: Tensor, dtype: torch.dtype, weight: Tensor, norm: Norm | None, moves: Moves, has_stats: bool,
    residual: Tensor | None, shared: bool,
) -> dispatch.Case:  # fmt: skip
    prologue = 0 if norm is None else 1 + list(ACTIVATIONS).index(norm.act) + len(ACTIVATIONS) * norm.batch
    numbers = (len(x), *x.shape[2:], *weight.shape[2:], *(n for pair in moves for n in pair))
    last = (t is not None and dispatch.is_channels_last(t) for t in (x, weight, residual))
    flags = (has_stats, residual is not None, shared, *_differentiable(x, weight, norm), *last)
    form, channels = (*numbers, prologue, *map(int, flags)), (x.shape[1], len(weight))
    return dispatch.Case("conv", str(dtype), form, channels, dispatch.settings(dtype))


def _differentiable(x: Tensor, weight: Tensor, norm: Norm | None) -> tuple[bool, bool]:
    """Return whether x, or the norm before it, needs a gradient, and whether the weight does."""
    on = torch.is_grad_enabled()
    before = x.requires_grad or (norm is not None and norm.gamma.requires_grad)
    return on and before, on and weight.requires_grad


def run(
    x: Tensor, weight: Tensor, norm: Norm | None, moves: Moves, stats_eps: float | None, how: str,
    residual: Tensor | None = None, shared: bool = False,
) -> Output:  # fmt: skip
    """Do what `norm_act_conv2d` does.

    Args:
        x, weight, norm, stats_eps: as there; the vectors of norm are contiguous.
        how: "torch": by PyTorch. "triton": by the kernels. "mixed": by PyTorch's convolution and the kernels of `norm`.
        residual: like x; the normalisation adds it before its activation.
        shared: whether another reads the output of the normalisation. With this or a residual that output is written,
            and `how` must not be "torch".
    """
    assert how != "torch" or (residual is None and not shared)
    written: Tensor | None = None
    if how == "triton":
        near = (x if norm is not None else x.to(_type(x))).contiguous(memory_format=torch.channels_last)
        if weight.dtype != near.dtype:
            weight = weight.to(near.dtype)  # as autocast would; `_why_not` refuses other differences
        weight = weight.contiguous(memory_format=torch.channels_last)
        if norm is not None and (shared or residual is not None):
            residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
            written, y, *found = _Written.apply(near, residual, *norm, weight, *moves, stats_eps)
        else:
            call = _Conv.apply if unseen(near) else _conv
            y, *found = call(near, weight, *(norm or (None, None, None, None, "none", False)), *moves, stats_eps)
        return Output(y, None if stats_eps is None else (found[0], found[1], found[2]), written if shared else None)
    if norm is not None and how == "torch":
        x = _normalised(x, norm)
    elif norm is not None and shared:
        x, written = normalise_twice(x, norm, residual)
    elif norm is not None:
        x = normalise(x, norm, residual)
    y = F.conv2d(x, weight, None, *moves)
    if stats_eps is None:
        return Output(y, None, written)
    if y.numel() == y.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel for statistics, got output size {tuple(y.shape)}")
    return Output(y, (measure if how == "mixed" else _statistics)(y.detach(), stats_eps), written)


def _candidates(
    x: Tensor, dtype: torch.dtype, weight: Tensor, norm: Norm | None, moves: Moves, stats_eps: float | None,
    residual: Tensor | None, shared: bool, grads: tuple[bool, bool],
) -> dispatch.Candidates:  # fmt: skip
    """Return what `dispatch` runs to compare the implementations, on numbers that it makes up.

    Args:
        grads: as `_differentiable` returns.
    """
    shapes, act, batch = (x.shape, weight.shape), norm and norm.act, norm is not None and norm.batch
    has_residual = residual is not None
    last, weight_last, residual_last = (t is not None and dispatch.is_channels_last(t) for t in (x, weight, residual))
    x = x.new_empty(0, dtype=dtype)  # `make` may be called much later, and must not hold these activations

    def make() -> dict[str, Callable[[], list[Tensor]]]:
        draw = dispatch.numbers(x)
        value, kernel = draw(*shapes[0], last=last), draw(*shapes[1], last=weight_last)
        own = None
        if act is not None:
            own = Norm(*_statistics(value, 1e-5)[:2], *made_up(draw, shapes[0][1], act, grads[0]), act, batch)
        value.requires_grad_(grads[0])
        kernel.requires_grad_(grads[1])
        given = draw(*shapes[0], scale=1 / 8, grad=grads[0], last=residual_last) if has_residual else None
        inputs = [value, kernel, *(() if own is None else own[2:4]), *(() if given is None else (given,))]
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        form = F.conv2d(value.detach().to("meta"), kernel.detach().to("meta"), None, *moves)
        backs = [draw(*shape, scale=1 / 16, last=last) for shape in (form.shape, shapes[0])[: 1 + shared]]

        def once(how: str) -> list[Tensor]:
            y, stats, written = run(value, kernel, own, moves, stats_eps, how, given, shared)
            ys = [y] if written is None else [y, written]
            return dispatch.with_gradients(ys, inputs, backs, any(grads)) + list(stats or ())

        return {dispatch.UNKNOWN: functools.partial(once, "mixed"), "triton": functools.partial(once, "triton")}

    return make


def _pair(name: str, size: Size) -> Pair:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    least = 0 if name == "padding" else 1
    if len(pair) != 2 or any(not isinstance(number, int) or number < least for number in pair):
        raise RepruneError(f"{name} must be one or two whole numbers, at least {least}; got {size!r}")
    return pair


def _type(x: Tensor) -> torch.dtype:
    """Return the type in which conv2d reads x: that of autocast, where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _why_not(x: Tensor, dtype: torch.dtype, weight: Tensor, norm: Norm | None, moves: Moves) -> str | None:
    """Return why the kernels cannot do this, with x in this dtype; None if they can."""
    if reason := refuses(x):
        return reason
    if dtype != _type(weight):
        return f"x is {dtype}, and the weight {_type(weight)}"
    if x.shape[1] != weight.shape[1]:
        return f"x has {x.shape[1]} channels, and the convolution reads {weight.shape[1]}"
    from reprune_triton.kernels.step import masked_conv

    sizes = masked_conv.geometry(x.shape[2:], weight.shape[2:], *moves)
    if 0 in (x.numel(), weight.numel()) or sizes.P < 1 or sizes.Q < 1:
        return "there is nothing to compute: x, the weight or the output is empty"
    pixels = max(sizes.H * sizes.W, sizes.P * sizes.Q)
    if pixels * max(len(x), *weight.shape[:2]) >= 1 << 30:
        return "x or the output has 2^30 or more pixels in all, or numbers in one image"
    if norm is not None and any(vector.shape != x.shape[1:2] for vector in norm[:4]):
        return f"mean, rstd, gamma and beta must have {x.shape[1]} numbers each"
    return None


# ---------------------------------------------------------------------- in PyTorch


class _BatchNorm(torch.autograd.Function):
    """(x - mean) * rstd * gamma + beta, where mean and rstd are given, but are differentiated as functions of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, gamma)
        return _by_constants(x, mean, rstd, gamma, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            grad, x, gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
        )
        return found[0], None, None, found[1], found[2]


def _by_constants(x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return (x - mean) * rstd * gamma + beta."""
    # rstd has eps in it already, but torch before 2.12 refuses an eps of 0.
    return F.batch_norm(x, mean, rstd.pow(-2), gamma, beta, False, 0.0, torch.finfo(torch.float64).tiny)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    y = (_BatchNorm.apply if norm.batch else _by_constants)(x, *norm[:4])
    return ACTIVATIONS[norm.act](y)


def _statistics(y: Tensor, eps: float) -> Stats:
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    return mean, (variance + eps).rsqrt(), variance * (count / (count - 1))


# ---------------------------------------------------------------------- in Triton


@functools.cache
def _kernels() -> Any:
    """Return the module of kernels, which can be imported only where Triton is."""
    from reprune_triton.kernels.step import masked_conv

    return masked_conv


@operator("reprune::conv")
def _conv(
    x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    act: str, batch: bool, stride: list[int], padding: list[int], dilation: list[int], stats_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, and its mean, rstd and unbiased variance, empty without stats_eps; only the gradient uses `batch`."""
    y, stats = _kernels().forward(
        x, weight, _prologue(mean, rstd, gamma, beta, act), stride, padding, dilation, stats_eps
    )
    return y, *(stats or (wide(x, 0) for _ in range(3)))


@operator("reprune::conv_input_gradient")
def _input_gradient(
    grad: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Return the gradient of the convolution's own input, of this height and width."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    return _kernels().input_gradient(grad, weight, size, stride, padding, dilation)[0]


@operator("reprune::conv_norm_gradient")
def _before_gradient(
    grad: Tensor, weight: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor,
    gamma: Tensor, beta: Tensor, act: str, stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of the input of the activation before the convolution, and its sums (2, C).

    Args:
        other: the gradient that another reader of the activation's output has for that.
        y: the activation's output, if there is a residual in it.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    other = None if other is None else other.contiguous(memory_format=torch.channels_last)
    before = _kernels().Before(_kernels().Prologue(mean, rstd, gamma, beta, act), x, y, other)
    g, sums = _kernels().input_gradient(grad, weight, x.shape[2:], stride, padding, dilation, before)
    assert sums is not None
    return g, sums


@operator("reprune::conv_weight_gradient")
def _weight_gradient(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    act: str, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """Return the gradient of the weight, of this height and width; x is the input of the normalisation."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    prologue = _prologue(mean, rstd, gamma, beta, act)
    return _kernels().weight_gradient(grad, x, prologue, kernel, stride, padding, dilation)


def _prologue(mean: Tensor | None, rstd: Tensor | None, gamma: Tensor | None, beta: Tensor | None, act: str) -> Any:
    if mean is None or rstd is None or gamma is None or beta is None:
        return None
    return _kernels().Prologue(mean, rstd, gamma, beta, act)


@_conv.register_fake
def _(x, weight, mean, rstd, gamma, beta, act, batch, stride, padding, dilation, stats_eps):
    sizes = _kernels().geometry(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = _kernels().empty(x, x.shape[0], weight.shape[0], sizes.P, sizes.Q)
    return y, *(wide(x, weight.shape[0] if stats_eps is not None else 0) for _ in range(3))


@_input_gradient.register_fake
def _(grad, weight, size, stride, padding, dilation):
    return _kernels().empty(grad, grad.shape[0], weight.shape[1], *size)


@_before_gradient.register_fake
def _(grad, weight, other, x, y, mean, rstd, gamma, beta, act, stride, padding, dilation):
    return torch.empty_like(x), wide(x, 2, x.shape[1])


@_weight_gradient.register_fake
def _(grad, x, mean, rstd, gamma, beta, act, kernel, stride, padding, dilation):
    return _kernels().empty(x, grad.shape[1], x.shape[1], *kernel)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.act, ctx.batch, *ctx.moves, _ = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, *vectors = ctx.saved_tensors
    mean, rstd, gamma, beta = vectors
    wanted, grad_x, grad_weight, grad_gamma, grad_beta = ctx.needs_input_grad, None, None, None, None
    if wanted[1]:
        grad_weight = _weight_gradient(grad, x, *vectors, ctx.act, weight.shape[2:], *ctx.moves)
    if mean is None and wanted[0]:
        grad_x = _input_gradient(grad, weight, x.shape[2:], *ctx.moves)
    if mean is not None and (wanted[0] or wanted[4] or wanted[5]):
        g, sums = _before_gradient(grad, weight, None, x, None, *vectors, ctx.act, *ctx.moves)
        grad_x = norm_gradient(g, x, *vectors, sums, ctx.batch)
        for_gamma, for_beta = sums.unbind()
        grad_gamma, grad_beta = for_gamma.to(gamma.dtype), for_beta.to(beta.dtype)
    return grad_x, grad_weight, None, None, grad_gamma, grad_beta, *[None] * 6


torch.library.register_autograd(_conv.op, _gradients, setup_context=_save)


class _Conv(torch.autograd.Function):
    """`_conv` without the operator around it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _conv.function(*inputs)  # `run` has asked `unseen`
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


class _Written(torch.autograd.Function):
    """Normalisation and convolution, where the output of the normalisation is written.

    That is so where it has a residual or another reader: `_Conv` keeps it in registers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, act: str,
        batch: bool, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int],
        stats_eps: float | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        read = apply_norm(x, residual, mean, rstd, gamma, beta, act)
        moves = stride, padding, dilation
        y, *stats = _conv(read, weight, None, None, None, None, "none", False, *moves, stats_eps)
        ctx.act, ctx.batch, ctx.moves, ctx.has_residual = act, batch, moves, residual is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        ctx.save_for_backward(x, read, weight, mean, rstd, gamma, beta)
        return read, y, *stats

    @staticmethod
    def backward(ctx: Any, other: Tensor | None, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, read, weight, *vectors = ctx.saved_tensors
        if grad is None and other is None:
            return (None,) * 13
        y, grad_weight = read if ctx.has_residual and ctx.act != "none" else None, None
        if grad is None:  # the loss does not depend on the convolution
            grad_x, g, sums = norm_act_backward(other, None, x, y, *vectors, ctx.act, ctx.batch)
            g = other if y is None else g
        else:
            if ctx.needs_input_grad[8]:
                nothing = (None, None, None, None, "none")
                grad_weight = _weight_gradient(grad, read, *nothing, list(weight.shape[2:]), *ctx.moves)
            g, sums = _before_gradient(grad, weight, other, x, y, *vectors, ctx.act, *ctx.moves)
            grad_x = norm_gradient(g, x, *vectors, sums, ctx.batch)
        gamma, beta = vectors[2:]
        grad_residual = g if ctx.has_residual else None
        for_gamma, for_beta = sums.unbind()
        parts = for_gamma.to(gamma.dtype), for_beta.to(beta.dtype)
        return grad_x, grad_residual, None, None, *parts, None, None, grad_weight, None, None, None, None
