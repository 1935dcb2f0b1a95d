"""BatchNorm, residual add and activation as one operation.

    x -> statistics -> Norm -> normalise(x, norm, residual) = act((x - mean) * rstd * gamma + beta + residual)

BatchNorm, ReLU and addition each read and write whole activations. Fused they read them twice in the forward and twice
in the backward. The convolution after them can also do a `Norm` as it reads (`conv.norm_act_conv2d`). `fusion` does
both to a whole network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reprune_triton import availability
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.fused.library import operator

IMPLS = ("auto", "torch", "triton")
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
Stats = tuple[Tensor, Tensor, Tensor]  # mean, 1 / sqrt(variance + eps) and unbiased variance: (C,) each


class Norm(NamedTuple):
    """act((x - mean) * rstd * gamma + beta)."""

    mean: Tensor  # (C,); mean and rstd are float32, or float64 if x is
    rstd: Tensor  # (C,): 1 / sqrt(variance + eps)
    gamma: Tensor  # (C,); gamma and beta are of any floating type
    beta: Tensor  # (C,)
    act: str  # "none", "relu" or "relu6"
    batch: bool  # True: mean and rstd are functions of x, whose gradient goes through them; False: constants


class BatchNorm(NamedTuple):
    """The tensors and numbers of a BatchNorm, as F.batch_norm takes them, and the activation after it."""

    weight: Tensor | None  # (C,); weight and bias are of any floating type, usually float32 whatever x is
    bias: Tensor | None  # (C,)
    running_mean: Tensor | None  # (C,); both averages are updated in place while training
    running_var: Tensor | None  # (C,); None: statistics of the batch always
    training: bool  # normalise by this batch, and update the running averages
    momentum: float  # the weight of this batch in the running averages
    eps: float
    act: str

    @property
    def batch(self) -> bool:
        """Whether x is normalised by its own statistics."""
        return self.training or self.running_mean is None or self.running_var is None


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None = None, act: str = "none", training: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return act(batch_norm(x) + residual), differentiable in x, weight, bias and residual.

    Args:
        x: (B, C, H, W); float32, float16 or bfloat16 (float64 to check gradients).
        weight, bias: (C,), of any floating type; usually float32 whatever x is.
        running_mean, running_var: (C,), updated in place while training; None: statistics of the batch always.
        residual: None, or of x's shape and dtype.
        act: "none", "relu" or "relu6".
        training: normalise by this batch, and update the running averages.
        momentum: the weight of this batch in the running averages.
        impl: "torch": batch_norm, add and activation one after the other. "triton": the kernels. "auto": on CUDA
            whichever is faster for this shape (see `dispatch`), torch elsewhere.
    Returns:
        (B, C, H, W) in x's dtype; channels_last from the kernels.
    Raises:
        RepruneError: for an unknown act or impl, or if impl="triton" cannot run.
        ValueError: as batch_norm, if training on one value per channel.
    """
    bn = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps, act)
    if choose(x, residual, bn, impl) == "torch":
        return by_pytorch(x, residual, bn)
    return normalise(x, normaliser(x, bn), residual)


def choose(
    x: Tensor, residual: Tensor | None, bn: BatchNorm, impl: str, stats: Stats | None = None, twice: bool = False
) -> str:
    """Return "torch" or "triton"; see `batch_norm_act`.

    Args:
        stats: those of x, if they are known.
        twice: whether it is for `normalise_twice`.
    """
    if bn.act not in ACTIVATIONS:
        raise RepruneError(f"act must be one of {', '.join(ACTIVATIONS)}; got {bn.act!r}")
    if impl not in IMPLS:
        raise RepruneError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    if impl == "auto" and torch.compiler.is_compiling():
        return "torch"  # torch.compile fuses by itself
    key, has_stats = None, stats is not None
    if impl == "auto" and (residual is None or isinstance(residual, Tensor)):
        key = _key(x, residual, bn, has_stats, twice)
        known = dispatch.recall(x.device, key)
        if known is not None:
            return known
    why_not = _why_not(x, residual, bn)
    if impl == "triton" and why_not:
        message = f'impl="triton" cannot run: {why_not}. Use impl="torch" or "auto".'
        raise availability.refusal(message, x.device)
    if impl != "auto" or why_not:
        return "torch" if why_not else impl
    case = _case(x, residual, bn, has_stats, twice)
    return dispatch.choose(
        x, case, lambda: _candidates(x, residual, bn, _differentiable(x, bn), has_stats, twice), key
    )


def _key(x: Tensor, residual: Tensor | None, bn: BatchNorm, has_stats: bool, twice: bool) -> tuple[Any, ...]:
    """Return all that decides whether the kernels can do it, and which case it is."""
    last, (weight, bias, mean, variance, training, _, _, act) = torch.channels_last, bn
    return (
        "norm", type(x), x.dtype, x.shape, x.is_contiguous(memory_format=last), x.requires_grad, act, training,
        has_stats, twice, weight is not None and (weight.shape, weight.requires_grad),
        bias is not None and bias.shape, mean is not None and mean.shape, variance is not None and variance.shape,
        residual is not None and (residual.shape, residual.dtype, residual.is_contiguous(memory_format=last)),
        dispatch.state(),
    )  # fmt: skip


def _case(x: Tensor, residual: Tensor | None, bn: BatchNorm, has_stats: bool, twice: bool) -> dispatch.Case:
    last = [t is not None and dispatch.is_channels_last(t) for t in (x, residual)]
    act = list(ACTIVATIONS).index(bn.act)
    flags = (residual is not None, act, bn.batch, _differentiable(x, bn), has_stats, twice, *last)
    form = tuple(map(int, (len(x), *x.shape[2:], *flags)))
    return dispatch.Case("norm_act", str(x.dtype), form, (x.shape[1],), dispatch.settings(x.dtype))


def _differentiable(x: Tensor, bn: BatchNorm) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bn.weight is not None and bn.weight.requires_grad))


def by_pytorch(x: Tensor, residual: Tensor | None, bn: BatchNorm) -> Tensor:
    """Return what `batch_norm_act` does, by PyTorch: batch_norm, addition and activation one after the other."""
    y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    return ACTIVATIONS[bn.act](y if residual is None else y + residual)


def normaliser(x: Tensor, bn: BatchNorm, stats: Stats | None = None) -> Norm:
    """Return the `Norm` of x by this BatchNorm, and update the running averages.

    Args:
        stats: those of x, if they are known.
    Raises:
        ValueError: as batch_norm, if training on one value per channel.
    """
    assert bn.weight is not None and bn.bias is not None
    weight, bias = bn.weight.contiguous(), bn.bias.contiguous()  # the kernels take no strides for them
    if bn.training or bn.running_mean is None or bn.running_var is None:
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        mean, rstd, unbiased = stats or measure(x.detach(), bn.eps)
        if bn.running_mean is not None and bn.running_var is not None:
            for average, of_batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
                average.lerp_(of_batch if of_batch.dtype == average.dtype else of_batch.to(average.dtype), bn.momentum)
        return Norm(mean, rstd, weight, bias, bn.act, True)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = bn.running_mean.to(wide).contiguous(), (bn.running_var.to(wide) + bn.eps).rsqrt().contiguous()
    return Norm(mean, rstd, weight, bias, bn.act, False)


def normalise(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    """Return act((x - mean) * rstd * gamma + beta + residual) by the kernels.

    It is differentiable in all but mean and rstd; x and residual are (B, C, H, W).
    """
    return _NormAct.apply(_channels_last(x), _channels_last(residual), *norm, False)


def normalise_twice(x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`normalise` for two readers: return the same values as two tensors, whose gradients the kernels add up."""
    if torch.compiler.is_compiling():
        return (normalise(x, norm, residual),) * 2
    return _NormAct.apply(_channels_last(x), _channels_last(residual), *norm, True)


def _channels_last(x: MaybeTensor) -> MaybeTensor:
    return x if x is None else x.contiguous(memory_format=torch.channels_last)


def _candidates(
    x: Tensor, residual: Tensor | None, bn: BatchNorm, grad: bool, has_stats: bool, twice: bool
) -> dispatch.Candidates:
    """Return what `dispatch` runs to compare the implementations, on numbers that it makes up."""
    shape, c, act, batch, eps, has_residual = x.shape, x.shape[1], bn.act, bn.batch, bn.eps, residual is not None
    last, residual_last = (t is not None and dispatch.is_channels_last(t) for t in (x, residual))
    x = x.new_empty(0)  # `make` may be called much later, and must not hold these activations

    def make() -> dict[str, Callable[[], list[Tensor]]]:
        draw = dispatch.numbers(x)
        value = draw(*shape, grad=grad, last=last)
        given = draw(*shape, scale=1 / 8, grad=grad, last=residual_last) if has_residual else None
        weight, bias = made_up(draw, c, act, grad)
        mean, variance = (None, None) if batch else (torch.zeros(c, device=x.device), torch.ones(c, device=x.device))
        backs = [draw(*shape, scale=1 / 16, last=last) for _ in range(1 + twice)]
        inputs = [value, weight, bias, *(() if given is None else (given,))]
        own = BatchNorm(weight, bias, mean, variance, batch, 0.0, eps, act)
        stats = measure(value.detach(), eps) if has_stats else None

        def run(impl: str) -> list[Tensor]:
            if impl == "torch":
                ys: tuple[Tensor, ...] = (by_pytorch(value, given, own),) * len(backs)
            else:
                norm = normaliser(value, own, stats)
                ys = normalise_twice(value, norm, given) if twice else (normalise(value, norm, given),)
            return dispatch.with_gradients(ys, inputs, backs, grad)

        return {impl: functools.partial(run, impl) for impl in ("torch", "triton")}

    return make


def made_up(draw: Callable[..., Tensor], channels: int, act: str, grad: bool) -> tuple[Tensor, Tensor]:
    """Return a gamma and a beta, (channels,) each, that bring no number of `dispatch.numbers` near a bend of `act`."""
    gamma, beta = (draw(channels, scale=scale, dtype=torch.float32) for scale in (1.0, 1 / 16))
    if act == "relu6":
        gamma[::2] *= 16  # these results go beyond 6, the others stay below
    return gamma.requires_grad_(grad), beta.requires_grad_(grad)


def refuses(x: Tensor) -> str | None:
    """Return why the kernels cannot take these activations; None if they can."""
    if why_not := availability.why_not(x.device):
        return why_not
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    return None if x.dtype in _KERNEL_DTYPES else f"x is {x.dtype}"


def _why_not(x: Tensor, residual: Tensor | None, bn: BatchNorm) -> str | None:
    """Return why the kernels cannot do this; None if they can."""
    if reason := refuses(x):
        return reason
    if x.numel() == 0:
        return "x is empty"
    if bn.weight is None or bn.bias is None:
        return "this BatchNorm has no weight and bias"
    for vector in bn[:4]:
        if vector is not None and vector.shape != x.shape[1:2]:
            return f"x has {x.shape[1]} channels, and the BatchNorm {len(vector)}"
    if residual is not None and not isinstance(residual, Tensor):
        return f"what is added is {residual!r}"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return f"the residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}"
    return None


@functools.cache
def _kernels() -> Any:
    """Return the module of kernels, which can be imported only where Triton is."""
    from reprune_triton.kernels.step import norm_act

    return norm_act


@operator("reprune::statistics")
def measure(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, 1 / sqrt(biased variance + eps) and the unbiased variance of every channel, (C,) each."""
    return _kernels().statistics(_channels_last(x), eps)


@operator("reprune::norm_act")
def apply_norm(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str
) -> Tensor:
    """Return y (B, C, H, W), channels_last as x and the residual are."""
    return _kernels().apply(x, residual, mean, rstd, weight, bias, act)


@operator("reprune::norm_act_backward")
def norm_act_backward(
    grad: Tensor, other: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, act: str, batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, g (empty where it is not written), and d(weight), d(bias) (2, C); see `norm_act.backward`."""
    grad, other = _channels_last(grad), _channels_last(other)
    grad_x, g, sums = _kernels().backward(grad, other, x, y, mean, rstd, weight, bias, act, batch)
    return grad_x, x.new_empty(0) if g is None else g, sums


@operator("reprune::norm_gradient")
def norm_gradient(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, batch: bool
) -> Tensor:
    """Return dx, from the gradient of the activation's input and its sums (2, C)."""
    return _kernels().gradient(grad, x, mean, rstd, weight, bias, sums, "none", batch)


def wide(x: Tensor, *shape: int) -> Tensor:
    """Return an empty tensor in the type of statistics of x: float64 if x is, float32 if not."""
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@measure.register_fake
def _(x, eps):
    return tuple(wide(x, x.shape[1]) for _ in range(3))


@apply_norm.register_fake
def _(x, residual, mean, rstd, weight, bias, act):
    return torch.empty_like(x)


@norm_act_backward.register_fake
def _(grad, other, x, y, mean, rstd, weight, bias, act, batch):
    written = y is not None or other is not None
    return torch.empty_like(x), torch.empty_like(x) if written else x.new_empty(0), wide(x, 2, x.shape[1])


@norm_gradient.register_fake
def _(grad, x, mean, rstd, weight, bias, sums, batch):
    return torch.empty_like(x)


class _NormAct(torch.autograd.Function):
    """y; if `twice` also a second tensor of the same memory, with a gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
        act: str, batch: bool, twice: bool,
    ) -> Any:  # fmt: skip
        y = apply_norm(x, residual, mean, rstd, weight, bias, act)
        ctx.act, ctx.batch, ctx.has_residual = act, batch, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y if ctx.has_residual and act != "none" else None, mean, rstd, weight, bias)
        return (y, y.detach()) if twice else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 9
        grad, other = given[0], given[1] if len(given) > 1 else None
        x, y, mean, rstd, weight, bias = ctx.saved_tensors
        grad_x, g, sums = norm_act_backward(grad, other, x, y, mean, rstd, weight, bias, ctx.act, ctx.batch)
        grad_residual = None
        if ctx.has_residual:
            grad_residual = grad if y is None and other is None else g
        for_weight, for_bias = sums.unbind()
        return grad_x, grad_residual, None, None, for_weight.to(weight.dtype), for_bias.to(bias.dtype), None, None, None
