"""BatchNorm, residual add and activation as one operation, and `fuse`, which makes a network use it.

    model = reprune_triton.fuse(model)       # in place; keys, classes, optimizer and pruner see no difference

Convolutions are less than a third of a ResNet's eager training step on a modern GPU: most of the rest is BatchNorm,
ReLU and addition, each of which reads and writes whole activations. Fused they are read twice forward, twice backward.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from . import dispatch
from .errors import RepruneError

IMPLS = ("auto", "torch", "triton")
ACTIVATIONS = ("none", "relu", "relu6")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED = "_reprune_impl"  # on a module whose forward `fuse` has replaced


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None = None, act: str = "none", training: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """act(batch_norm(x) + residual), differentiable in x, weight, bias and residual.

    Args:
        x: (B, C, H, W); float32, float16 or bfloat16 (float64 to check gradients).
        weight, bias: (C,), of any floating type; usually float32 whatever x is.
        running_mean, running_var: (C,), updated in place while training; None: statistics of the batch always.
        residual: like x.
        act: "none", "relu" or "relu6".
        training: normalise by this batch, and update the running averages.
        momentum: the weight of this batch in the running averages.
        impl: "torch": batch_norm, add and activation one after the other. "triton": the kernels. "auto": on CUDA
            whichever is faster for this shape (see `dispatch`), torch elsewhere.
    Returns:
        (B, C, H, W) in x's dtype; channels_last from the kernels.
    Raises:
        RepruneError: for an unknown act or impl, or if impl="triton" cannot run.
        ValueError: as batch_norm, if training on one value a channel.
    """
    for name, choice, known in (("act", act, ACTIVATIONS), ("impl", impl, IMPLS)):
        if choice not in known:
            raise RepruneError(f"{name} must be one of {', '.join(known)}; got {choice!r}")
    why_not = _why_not(x, residual, weight, bias)
    if impl == "triton" and why_not:
        raise RepruneError(f'impl="triton" cannot run: {why_not}. Use impl="torch" or "auto".')
    batch = training or running_mean is None or running_var is None
    if impl == "auto" and not why_not:
        grad = torch.is_grad_enabled()
        form = (len(x), *x.shape[2:], residual is not None, ACTIVATIONS.index(act), batch, grad)
        case = dispatch.Case("norm_act", str(x.dtype), tuple(map(int, form)), (x.shape[1],))
        impl = dispatch.choose(x, case, _candidates(x, residual is not None, act, batch, eps, grad))
    if impl == "torch" or why_not:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        return {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[act](y)
    if batch and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if not batch:
        assert running_mean is not None and running_var is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, rstd = running_mean.to(wide), (running_var.to(wide) + eps).rsqrt()
        return _normalise(x, residual, mean, rstd, weight, bias, act)
    y, mean, _, unbiased = _norm_act(x, residual, weight, bias, eps, act)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def _candidates(x: Tensor, has_residual: bool, act: str, batch: bool, eps: float, grad: bool) -> dispatch.Candidates:
    """What `dispatch` runs to compare the implementations, on numbers of its own."""
    shape, c = x.shape, x.shape[1]
    x = x.new_empty(0)  # what is measured later must not hold on to the activations of today

    def make() -> dict[str, Callable[[], list[Tensor]]]:
        draw = dispatch.numbers(x)
        value, residual = (draw(*shape, grad=grad) for _ in range(2))
        weight, bias = (draw(c, dtype=torch.float32, grad=grad) for _ in range(2))
        mean, variance = (None, None) if batch else (torch.zeros(c, device=x.device), torch.ones(c, device=x.device))
        back = draw(*shape)
        inputs = [value, weight, bias, residual][: 4 if has_residual else 3]
        given = residual if has_residual else None

        def run(impl: str) -> list[Tensor]:
            y = batch_norm_act(value, weight, bias, mean, variance, given, act, batch, 0.0, eps, impl)
            return dispatch.with_gradients(y, inputs, back, grad)

        return {impl: functools.partial(run, impl) for impl in ("torch", "triton")}

    return make


def refuses(x: Tensor) -> str | None:
    """Why the kernels cannot take these activations; None if they can."""
    try:
        from reprune_triton.kernels import norm_act
    except ImportError:
        return "Triton is not installed"
    if x.device.type != "cuda" and not norm_act.INTERPRETED:
        return f"x is on {x.device}, and the kernels run on a GPU"
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    return None if x.dtype in _KERNEL_DTYPES else f"x is {x.dtype}"


def _why_not(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why the kernels cannot do this; None if they can."""
    if reason := refuses(x):
        return reason
    if x.numel() == 0:
        return "x is empty"
    if weight is None or bias is None:
        return "this BatchNorm has no weight and bias"
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return f"the residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}"
    return None


@torch.library.custom_op("reprune::norm_act", mutates_args=())
def _norm_act(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and the batch's mean, 1 / sqrt(variance + eps), and unbiased variance."""
    from reprune_triton.kernels import norm_act

    mean, rstd, unbiased = norm_act.statistics(x, eps)
    return norm_act.apply(x, residual, mean, rstd, weight, bias, act), mean, rstd, unbiased


@torch.library.custom_op("reprune::normalise", mutates_args=())
def _normalise(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str
) -> Tensor:
    """y, by a mean and 1 / sqrt(variance + eps) that are given."""
    from reprune_triton.kernels import norm_act

    return norm_act.apply(x, residual, mean, rstd, weight, bias, act)


@torch.library.custom_op("reprune::norm_act_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, d(residual) where it is neither absent nor `grad` itself, else empty, and d(weight), d(bias) (2, C)."""
    from reprune_triton.kernels import norm_act

    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x, grad_residual, sums = norm_act.backward(grad, x, y, mean, rstd, weight, bias, act, training)
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, sums


def _wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@_norm_act.register_fake
def _(x, residual, weight, bias, eps, act):
    return torch.empty_like(x), *(_wide(x, x.shape[1]) for _ in range(3))


@_normalise.register_fake
def _(x, residual, mean, rstd, weight, bias, act):
    return torch.empty_like(x)


@_backward.register_fake
def _(grad, x, y, mean, rstd, weight, bias, act, training):
    whole = y is not None and act != "none"
    return torch.empty_like(x), torch.empty_like(x) if whole else x.new_empty(0), _wide(x, 2, x.shape[1])


def _save(ctx: Any, x: Tensor, residual: Tensor | None, y: Tensor, *others: Tensor) -> None:
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, y if ctx.has_residual else None, *others)


def _save_batch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.act = inputs
    y, mean, rstd, unbiased = output
    ctx.mark_non_differentiable(mean, rstd, unbiased)
    _save(ctx, x, residual, y, mean, rstd, weight, bias)


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, mean, rstd, weight, bias, ctx.act = inputs
    _save(ctx, x, residual, output, mean, rstd, weight, bias)


def _gradients(ctx: Any, grad: Tensor, training: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Of x, residual, weight and bias."""
    x, y, mean, rstd, weight, bias = ctx.saved_tensors
    grad_x, grad_residual, sums = _backward(grad, x, y, mean, rstd, weight, bias, ctx.act, training)
    residual = None
    if ctx.has_residual:
        residual = grad if ctx.act == "none" else grad_residual
    return grad_x, residual, sums[0].to(weight.dtype), sums[1].to(bias.dtype)


def _backward_batch(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, grad, training=True), None, None


def _backward_given(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, residual, weight, bias = _gradients(ctx, grad, training=False)
    return grad_x, residual, None, None, weight, bias, None


torch.library.register_autograd(_norm_act, _backward_batch, setup_context=_save_batch)
torch.library.register_autograd(_normalise, _backward_given, setup_context=_save_given)


# ---------------------------------------------------------------------- a whole network


def fuse(model: nn.Module, impl: str = "auto") -> nn.Module:
    """Make every BatchNorm2d of `model` take the addition and the ReLU or ReLU6 behind it into one operation.

    In place, and the model is returned. Only `forward` of the model and of its BatchNorms is replaced, by one that
    torch.fx has traced: modules, their classes, state_dict keys and hooks on the modules that do the work stay. Hooks
    on modules that only call others (a block, a stage) no longer run. `unfuse` takes it back. The outputs are the same
    up to rounding. Fuse before DistributedDataParallel or torch.compile wraps the model.

    Args:
        impl: as in `batch_norm_act`.
    Raises:
        RepruneError: if the forward cannot be traced, or takes another way in training than in evaluation.
    """
    if impl not in IMPLS:
        raise RepruneError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    unfuse(model)
    graph = _trace(model)
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if type(norm) is nn.BatchNorm2d and calls[node.target] == 1 and len(node.args) == 1 and not node.kwargs:
            _replace_forward(norm, _forward, impl)
            _take_in(graph, node, modules)
    graph.lint()
    traced = fx.GraphModule(model, graph)
    _replace_forward(model, type(traced).forward, impl)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Take `fuse` back."""
    for module in model.modules():
        if module.__dict__.pop(_FUSED, None) is not None:
            del module.__dict__["forward"]
    return model


def _replace_forward(module: nn.Module, forward: Any, impl: str) -> None:
    module.__dict__ |= {_FUSED: impl, "forward": types.MethodType(forward, module)}  # a deep copy binds it to itself


def _forward(self: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None, act: str = "none") -> Tensor:
    """Of a fused BatchNorm2d. Which average it updates, and by how much, is as in torch."""
    momentum, training = self.momentum, self.training
    if training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)  # the plain average of all batches
    tracked = not training or self.track_running_stats
    batch = training or (self.running_mean is None and self.running_var is None)
    return batch_norm_act(
        x, self.weight, self.bias, self.running_mean if tracked else None, self.running_var if tracked else None,
        residual, act, batch, momentum or 0.0, self.eps, getattr(self, _FUSED),
    )  # fmt: skip


def _trace(model: nn.Module) -> fx.Graph:
    training, graphs = model.training, []
    states = {module: module.training for module in model.modules()}
    try:
        for mode in (False, True):
            model.train(mode)
            graphs.append(fx.Tracer().trace(model))
    except Exception as error:
        raise RepruneError(
            f"torch.fx cannot trace {type(model).__name__} ({error}): train it as it is, or fuse the part of it whose "
            "forward does not depend on values."
        ) from error
    finally:
        for module, state in states.items():
            module.training = state
    if str(graphs[0]) != str(graphs[1]):
        raise RepruneError(
            f"{type(model).__name__}.forward takes another way in training than in evaluation, and a traced forward "
            "can hold only one: use modules for it (nn.Dropout instead of F.dropout), or train it as it is."
        )
    assert model.training is training
    return graphs[1]


def _take_in(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Let the call of a BatchNorm do the addition and the activation that follow it and that nothing else reads."""
    last, residual, act = norm, None, "none"
    add = _only_user(last)
    if add is not None and _is_add(add):
        (other,) = (x for x in add.args if x is not last)
        last, residual = add, other
    following = _only_user(last)
    found = _activation(following, modules) if following is not None else None
    if following is not None and found is not None:
        last, act = following, found
    if last is norm:
        return
    with graph.inserting_before(last):
        kwargs: dict[str, Any] = {}
        kwargs |= {} if residual is None else {"residual": residual}
        kwargs |= {} if act == "none" else {"act": act}
        fused = graph.call_module(str(norm.target), (norm.args[0],), kwargs)
    last.replace_all_uses_with(fused)
    for node in (last, add if last is not add and residual is not None else None, norm):
        if node is not None:
            graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    """An addition of two different tensors of the graph."""
    named = node.op == "call_method" and node.target in ("add", "add_")
    called = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    both = len(node.args) == 2 and not node.kwargs and all(isinstance(x, fx.Node) for x in node.args)
    return (named or called) and both and node.args[0] is not node.args[1]


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(modules[str(node.target)]))
    names: Iterable[Any] = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
    if node.op in ("call_function", "call_method") and node.target in names:
        return "relu"
    return "relu6" if node.op == "call_function" and node.target is F.relu6 else None
