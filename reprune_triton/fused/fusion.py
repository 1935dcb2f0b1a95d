"""Fuse the BatchNorms of a whole network with the additions and activations after them, and with the convolutions.

    model = reprune_triton.fuse(model)       # in place; keys, classes, optimizer and pruner see no difference

What is fused, in a Bottleneck of a ResNet:

    y1 = conv1(x)                     sums up the statistics of y1 as it writes it
    n1 = bn1, ReLU                    not computed: handed on as `Pending`
    y2 = conv2(n1)                    normalises y1 as it reads it; PyTorch's convolution needs n1 written first
    n2 = bn2, ReLU                    as n1
    y3 = conv3(n2)                    as y2
    x  = bn3(y3), + shortcut, ReLU    one pass; read by the next conv1 and by its shortcut, whose gradients bn3 adds up

The kernels do a convolution or a BatchNorm where they are faster than PyTorch, by measurement (see `dispatch`).
Elsewhere PyTorch does it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reprune_triton.errors import RepruneError
from reprune_triton.fused import conv, norm
from reprune_triton.fused.norm import IMPLS, BatchNorm, Norm, Stats

IN_PLACE = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FUSED = "_reprune_impl"  # an attribute of modules whose forward `fuse` has replaced


class Blind:
    """A class whose methods, as hooks, do not look at activations: these may come as `Measured` or `Pending`."""


class Measured(NamedTuple):
    """The output of a convolution for the BatchNorm after it, with the statistics that this needs."""

    y: Tensor
    stats: Stats
    eps: float


class Pending:
    """The input of a BatchNorm, for the convolution after it, which normalises it.

    If another reads the output of the BatchNorm too, the convolution, which is called first, writes it to `written`.

    Args:
        shared: whether there is another reader.
    """

    def __init__(self, x: Tensor, norm: Norm, residual: Tensor | None, shared: bool):
        self.given: tuple[Tensor, Norm, Tensor | None] | None = (x, norm, residual)
        self.shared = shared
        self.written: Tensor | None = None

    def take(self) -> tuple[Tensor, Norm, Tensor | None]:
        """Return x, norm and residual to the convolution. They are not held for the second reader."""
        assert self.given is not None
        given, self.given = self.given, None
        return given


def fuse(model: nn.Module, impl: str = "auto") -> nn.Module:
    """Make every BatchNorm2d of `model` one operation with the addition and the ReLU or ReLU6 after it, and with the
    convolutions before and after it where that is faster.

    The model is changed in place and returned. Only the forwards of the model, its Conv2ds and BatchNorm2ds are
    replaced, that of the model by one that torch.fx has traced. Modules, their classes, state_dict keys, and hooks on
    convolutions and BatchNorms stay; modules with hooks of yours hand on plain activations, as without `fuse`. Hooks on
    modules that only call others (a block, a stage), and on a fused ReLU, no longer run. The outputs are the same up to
    rounding.

    Fuse before DistributedDataParallel or torch.compile wraps the model (DataParallel cannot run it). Before you change
    modules, undo it with `unfuse`. A model that is pickled is not fused when it is loaded.

    Args:
        impl: as in `batch_norm_act`.
    Raises:
        RepruneError: if the forward cannot be traced: it depends on values, has optional arguments, checkpoints
            activations, or calls other operations in training than in evaluation.
    """
    if impl not in IMPLS:
        raise RepruneError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    unfuse(model)
    graph, modules = trace(model), dict(model.named_modules())
    norms = take_in(graph, modules)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    convs = [node for node in graph.nodes if calls[node.target] == 1 and _takes_a_norm(node, modules)]
    for node in norms:
        _replace_forward(modules[str(node.target)], _norm_forward, impl)
        _tell_readers(graph, node, convs, modules)
    for node in convs:
        _replace_forward(modules[str(node.target)], _conv_forward, impl)
    graph.lint()
    traced = fx.GraphModule(model, graph)
    model.__dict__ |= {_FUSED: impl, "forward": _Traced(model, type(traced).forward)}
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place, and return the model."""
    for module in model.modules():
        if module.__dict__.pop(_FUSED, None) is not None:
            del module.__dict__["forward"]
    return model


class _Forward:
    """A function in the place of a module's forward. A copy of the module has its own; a pickle has the class's."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        self.module, self.function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return type(self)(copy.deepcopy(self.module, memo), self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.module,)


class _Traced(_Forward):
    """The forward of a whole model that torch.fx has traced, which finds every module by its name."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        super().__init__(module, function)
        self._names: _Names | None = None
        self._dicts: list[dict[str, nn.Module | None]] = []  # the children of all modules, by name
        self._known: list[nn.Module | None] = []  # the values of these when `_names` was made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        inside = [child for named in self._dicts for child in named.values()]
        same = len(inside) == len(self._known) and all(map(operator.is_, inside, self._known))
        if self._names is None or not same:  # a module may have been exchanged
            self._names, self._dicts = _Names(self.module), [module._modules for module in self.module.modules()]
            self._known = [child for named in self._dicts for child in named.values()]
        return self.function(self._names, *args, **kwargs)


class _Names:
    """A module whose children are plain attributes, which are found in a tenth of the time."""

    def __init__(self, module: nn.Module):
        inside = {name: child for name, child in module._modules.items() if child is not None}
        found = {name: _Names(child) if child._modules else child for name, child in inside.items()}
        self.__dict__ |= found | {"_reprune_module": module}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reprune_module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reprune_module(*args, **kwargs)


def _own_forward(module: nn.Module) -> Any:
    """Return the forward of the module's class."""
    return types.MethodType(type(module).forward, module)


def _replace_forward(module: nn.Module, forward: Callable[..., Any], impl: str) -> None:
    module.__dict__ |= {_FUSED: impl, "forward": _Forward(module, forward)}


# ---------------------------------------------------------------------- the forwards


def _conv_forward(self: nn.Conv2d, x: Tensor | Pending, reader: nn.BatchNorm2d | None = None) -> Tensor | Measured:
    """The forward of a fused Conv2d.

    Args:
        reader: the BatchNorm that is the only one to read its output, if so.
    """
    impl, weight = self.__dict__[_FUSED], _tensor(self, "weight")
    assert weight is not None
    pending = x if isinstance(x, Pending) and x.given is not None else None
    value, before, residual = pending.take() if pending else (_whole(x), None, None)
    if pending is None and (impl == "torch" or (impl == "auto" and norm.refuses(value))):
        return nn.Conv2d.forward(self, value)
    padding: Any = self.padding  # no string: see _takes_a_norm
    moves = tuple(self.stride), tuple(padding), tuple(self.dilation)
    extra = residual, pending is not None and pending.shared
    eps = None
    by_batch = reader is not None and (reader.training or _tensor(reader, "running_mean") is None)
    if reader is not None and by_batch and not _watched(self, reader):
        eps = reader.eps
    how = conv.choose(value, weight, before, moves, eps, impl, *extra)
    # PyTorch's convolution gives no statistics: then the BatchNorm computes them, if it needs them.
    found = conv.run(value, weight, before, moves, eps if how == "triton" else None, how, *extra)
    if pending:
        pending.written = found.normalised
    return found.y if found.stats is None or eps is None else Measured(found.y, found.stats, eps)


def _norm_forward(
    self: nn.BatchNorm2d, x: Tensor | Measured, residual: Tensor | Pending | None = None, act: str = "none",
    readers: tuple[nn.Module, ...] = (),
) -> Tensor | Pending:  # fmt: skip
    """The forward of a fused BatchNorm2d.

    Args:
        readers: all modules that read its output, a convolution first, if they can take a `Pending`.
    """
    value, stats, eps = x if isinstance(x, Measured) else (x, None, self.eps)
    stats = stats if eps == self.eps else None
    added = None if residual is None else _whole(residual)
    counted = _tensor(self, "num_batches_tracked") if self.training and self.track_running_stats else None
    if counted is not None:
        counted.add_(1)
    bn = _batch_norm(self, act)
    readers = () if readers and _watched(self, *readers) else readers
    if norm.choose(value, added, bn, self.__dict__[_FUSED], stats, len(readers) > 1) == "torch":
        return norm.by_pytorch(value, added, bn)
    own = norm.normaliser(value, bn, stats)
    return Pending(value, own, added, len(readers) > 1) if readers else norm.normalise(value, own, added)


def _whole(x: Tensor | Pending) -> Tensor:
    """Return the activations; for the second reader of a `Pending` the first one has written them."""
    if isinstance(x, Pending):
        assert x.written is not None
        return x.written
    return x


def _batch_norm(self: nn.BatchNorm2d, act: str) -> BatchNorm:
    """Return the tensors and numbers of this BatchNorm2d: those with which torch's own forward calls F.batch_norm."""
    momentum = self.momentum or 0.0
    if self.momentum is None and self.training and self.track_running_stats and self.num_batches_tracked is not None:
        momentum = 1.0 / float(self.num_batches_tracked)  # the plain average of all batches
    mean, variance = _tensor(self, "running_mean"), _tensor(self, "running_var")
    batch = self.training or (mean is None and variance is None)
    if self.training and not self.track_running_stats:
        mean = variance = None
    return BatchNorm(
        _tensor(self, "weight"), _tensor(self, "bias"), mean, variance, batch, momentum, self.eps, act
    )


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer, or the slice that hides it while the module is narrow.

    This is `getattr`, in a fraction of the time.
    """
    own = module.__dict__
    named = own if name in own else own["_parameters"]
    if name not in named:
        named = own["_buffers"]
    found: Tensor | None = named[name] if name in named else getattr(module, name)
    return found


def _watched(*some: nn.Module) -> bool:
    """Whether a hook that is not `Blind` would see the input or output of one of these modules."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    for module in some:
        own = module.__dict__
        for name in _HOOKS:
            if any(not isinstance(getattr(hook, "__self__", None), Blind) for hook in own[name].values()):
                return True
    return False


# ---------------------------------------------------------------------- the graph


def trace(model: nn.Module) -> fx.Graph:
    """Return the graph of the calls in the forward of `model`.

    Raises:
        RepruneError: if torch.fx cannot trace it, or the graph would not do the same; see `fuse`.
    """
    optional = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is not p.empty]
    if optional:
        raise RepruneError(
            f"{type(model).__name__}.forward has the optional argument {optional[0]}, and a traced forward would take "
            "it as given always: put the model into a module whose forward takes the images alone."
        )
    graphs = []
    states = {module: module.training for module in model.modules()}
    try:
        for mode in (False, True):
            model.train(mode)
            with _without_checkpoints():
                graphs.append(_Tracer().trace(model))
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
    return graphs[1]


class _Proxy(fx.Proxy):
    """Keeps x += y in place; torch.fx would make it x = x + y, which others that hold x do not see."""


def _in_place_method(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place_method(_name))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@contextlib.contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Refuse torch.utils.checkpoint: a trace would go through it and lose it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RepruneError("it checkpoints activations: checkpoint the whole fused model instead")

    checkpoint = torch.utils.checkpoint
    names = ("_checkpoint_impl", "_checkpoint_without_reentrant_generator")  # by version of torch
    own = {name: getattr(checkpoint, name) for name in names if hasattr(checkpoint, name)}
    try:
        for name in own:
            setattr(checkpoint, name, refuse)
        checkpoint.CheckpointFunction.apply = refuse  # hides the one that it inherits
        yield
    finally:
        for name, function in own.items():
            setattr(checkpoint, name, function)
        del checkpoint.CheckpointFunction.apply


def take_in(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Let the call of every BatchNorm2d do the addition and the activation after it; return the calls of BatchNorms."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in list(graph.nodes):
        known = node.op == "call_module" and type(modules[node.target]) is nn.BatchNorm2d and calls[node.target] == 1
        if known and len(node.args) == 1 and not node.kwargs:
            found.append(_take_in(graph, node, modules))
    return found


def _take_in(graph: fx.Graph, norm: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Return a call of this BatchNorm that also does the addition and the activation after it.

    It does an operation only where nothing else reads the input of that.
    """
    last, residual, act = norm, None, "none"
    add = _only_user(last)
    if add is not None and _is_add(add, last) and not any(_in_place(node, modules) for node in _between(last, add)):
        (other,) = (x for x in add.args if x is not last)
        last, residual = add, other
    # The fused call stands here, before anything writes in place to what it reads.
    place, following = last, _only_user(last)
    found = _activation(following, modules) if following is not None else None
    if following is not None and found is not None:
        last, act = following, found
    if last is norm:
        return norm
    with graph.inserting_before(place):
        kwargs: dict[str, Any] = {} if residual is None else {"residual": residual}
        kwargs |= {} if act == "none" else {"act": act}
        fused = graph.call_module(str(norm.target), (norm.args[0],), kwargs)
    last.replace_all_uses_with(fused)
    for node in dict.fromkeys((last, place, norm)):
        graph.erase_node(node)
    return fused


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes after the first and before the last."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this may write to what it reads."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return name.endswith("_") or name in IN_PLACE or name == "setitem"


def _takes_a_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this is the call of a convolution that `conv` can do."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if type(module) is not nn.Conv2d or len(node.args) != 1 or node.kwargs:
        return False
    plain = module.groups == 1 and module.bias is None and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def _tell_readers(graph: fx.Graph, norm: fx.Node, convs: list[fx.Node], modules: dict[str, nn.Module]) -> None:
    """Give a BatchNorm, and the convolution before it, the modules that read their outputs as arguments."""

    def tell(node: fx.Node, readers: list[fx.Node]) -> tuple[fx.Node, ...]:
        with graph.inserting_before(node):
            return tuple(graph.get_attr(str(reader.target)) for reader in readers)

    before, readers = norm.args[0], sorted(norm.users)
    alone = isinstance(before, fx.Node) and _only_user(before) is norm and norm.kwargs.get("residual") is not before
    if isinstance(before, fx.Node) and before in convs and alone:
        before.kwargs = {"reader": tell(before, [norm])[0]}
    known = 1 <= len(readers) <= 2 and readers[0] in convs
    if known and all(_reads(user, norm, convs, modules) for user in readers) and not any(
        _in_place(node, modules) for node in _between(norm, readers[0])
    ):
        norm.kwargs = {**norm.kwargs, "readers": tell(norm, readers)}


def _reads(user: fx.Node, norm: fx.Node, convs: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether this can read a `Pending`, and does not write to it: the other reader has the same memory."""
    module = modules[str(user.target)] if user.op == "call_module" else None
    adds = type(module) is nn.BatchNorm2d and user.kwargs.get("residual") is norm and user.args[0] is not norm
    return user in convs or adds


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node, norm: fx.Node) -> bool:
    """Whether this adds two different tensors, and writes to neither or to the output of the norm."""
    named = node.op == "call_method" and node.target in ("add", "add_")
    called = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    both = len(node.args) == 2 and not node.kwargs and all(isinstance(x, fx.Node) for x in node.args)
    writes = node.target in ("add_", operator.iadd) and node.args[0] is not norm
    return (named or called) and both and node.args[0] is not node.args[1] and not writes


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return "relu" or "relu6"; None for another call."""
    if node.op == "call_module":
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(modules[str(node.target)]))
    names: Iterable[Any] = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
    if node.op in ("call_function", "call_method") and node.target in names:
        return "relu"
    return "relu6" if node.op == "call_function" and node.target is F.relu6 else None
