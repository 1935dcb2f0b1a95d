"""Run, and finally build, a network on its active channels only.

While training, parameters keep their full shape: state_dict keys, optimizer, DDP and EMA see no difference. A narrowed
module gathers the active slices of its tensors just before its forward and drops them just after, so activations
between layers are narrow, and autograd scatters the gradients back. On CUDA one launch gathers the slices of the whole
network, and one scatters their gradients (pack.py). What is pruned is frozen: an optimizer step leaves its values as
they are and its momentum at zero.

    weight (n_out, n_in, kh, kw) --gather--> (active out, active in, kh, kw) --conv--> narrow activations

This equals training the full network with the mask applied after BatchNorm and activation (SPEC, "the invariant").
"""

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import capture
from .errors import RepruneError
from .optimizers import Optimizers, State
from .pack import Pack

# Modules that treat every channel alone and hold only per-channel vectors.
CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
# The attributes that state a width, per direction.
_OUT_WIDTHS = ("out_channels", "out_features", "num_features", "num_parameters")
_IN_WIDTHS = ("in_channels", "in_features")
_STATISTICS = ("running_mean", "running_var")


class Slice(NamedTuple):
    """The active channels of one module: sorted int64 indices, or None where all are active."""

    out: Tensor | None = None  # (active output channels,)
    in_: Tensor | None = None  # (active input channels,) or input features


Slices = dict[str, Slice]  # by module name
Cuts = list[tuple[int, Tensor]]  # (dimension, indices to keep or to freeze)
Entries = list[tuple[nn.Parameter, int, Tensor]]  # (parameter, dimension, indices)


def is_depthwise(module: nn.Module) -> bool:
    """True for a convolution whose every output channel reads its own input channel only."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def cuts(module: nn.Module, part: Slice) -> dict[str, Cuts]:
    """Which dimensions of which tensors (parameters and buffers) of `module` are sliced, and by which indices."""
    out: Cuts = [] if part.out is None else [(0, part.out)]
    into: Cuts = [] if part.in_ is None else [(1, part.in_)]
    if isinstance(module, CHANNELWISE):
        channels = (_width(module, _OUT_WIDTHS),)
        own = {*module._parameters, *_STATISTICS}
        found = {name: out for name, tensor in _tensors(module) if name in own and tensor.shape == channels}
    elif is_depthwise(module):
        found = {"weight": out, "bias": out}
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        found = {"weight": out + into, "bias": out}
    else:
        raise RepruneError(f"a {type(module).__name__} cannot run on part of its channels")
    present = {name for name, _ in _tensors(module)}
    return {name: where for name, where in found.items() if where and name in present}


def gather(tensor: Tensor, where: Cuts) -> Tensor:
    """The slices of `tensor` at `where`, in its memory format; differentiable, the gradient is zero elsewhere."""
    part = tensor
    for dim, index in where:
        part = part.index_select(dim, index.to(tensor.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    return part


class Narrowing:
    """Keeps `model` narrow: forward hooks on its modules, and step hooks on its optimizers that freeze what is pruned.

    A deep copy of the model (an EMA, say) has hooks of its own, and is narrow in the same way.

    Args:
        optimizer: what trains the model, see `Optimizers`.
        impl: how slices are gathered and scattered: "triton", "torch", or "auto"; see `pack.Pack`.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, impl: str = "auto"):
        self._model, self._impl = model, impl
        self._modules = dict(model.named_modules())
        self._handles: list[Any] = []
        self._frozen: Entries = []
        self._freezer = Pack([], impl)
        self._held: tuple[Tensor, ...] = ()  # what is frozen, from before an optimizer's step until after it
        self._together = False  # whether the freezer holds it
        self._holder: Any = None  # the optimizer that steps
        self._captured = False  # whether what is held is there only in a replay
        self._step_handles: list[Any] = []
        self.follow(optimizer if isinstance(optimizer, Optimizers) else Optimizers(optimizer, model.parameters()))

    def follow(self, optimizers: Optimizers) -> None:
        """Freeze in the steps of these optimizers, in place of those before."""
        self._remove(self._step_handles)
        self._optimizers = optimizers
        self._step_handles = optimizers.hook(self._hold, self._restore)

    def set(self, slices: Slices, frozen: Slices | None = None) -> None:
        """Make exactly these modules narrow, in place of what was narrow before.

        Args:
            slices: the channels they run on.
            frozen: the others, which keep their values from now on, and whose momentum every step leaves at zero.
                Without it they are found here, and the device is waited for.
        """
        self._remove(self._handles)
        gathering = _Gathering(self._impl)
        if slices:
            self._register(self._model, gathering)
        for name, module in self._modules.items() if slices else ():
            where = cuts(module, slices[name]) if name in slices else {}
            if gathering.casts(module):
                where = {key: [] for key in ("weight", "bias") if module._parameters.get(key) is not None} | where
            if name in slices or where:
                self._register(module, gathering.shadow(module, where, slices.get(name, Slice()).out))
        self._frozen = self._parameters(self._others(slices) if frozen is None else frozen)
        self._freezer = Pack([[(dim, index)] for _, dim, index in self._frozen], self._impl)
        _forget_compiled()

    def forget(self, slices: Slices) -> None:
        """Make the optimizer remember no more of these channels than of new ones."""
        entries = self._parameters(slices)
        self._clear(entries, self._states(entries))

    def _register(self, module: nn.Module, hooks: "_Gathering | _Shadow") -> None:
        self._handles += [
            module.register_forward_pre_hook(hooks.enter),
            # always_call: an exception inside forward must not leave the slices in place
            module.register_forward_hook(hooks.leave, always_call=True),
        ]

    def _parameters(self, slices: Slices) -> Entries:
        """Where they stand."""
        found = []
        for name, part in slices.items():
            module = self._modules[name]
            for tensor, cut in cuts(module, part).items():
                parameter = module._parameters.get(tensor)
                if parameter is not None:
                    found += [(parameter, dim, index) for dim, index in cut]
        return found

    def _others(self, slices: Slices) -> Slices:
        """The channels that `slices` leaves out."""
        found = {}
        for name, part in slices.items():
            module = self._modules[name]
            sizes = (_width(module, _OUT_WIDTHS), _width(module, _IN_WIDTHS))
            found[name] = Slice(*(i if i is None else _others(i, n) for i, n in zip(part, sizes, strict=True)))
        return found

    def close(self, optimizer_only: bool = False) -> None:
        """Take the hooks out again: all of them, or only those on the optimizer."""
        self._remove(self._step_handles)
        if not optimizer_only:
            self._remove(self._handles)

    @staticmethod
    def _remove(handles: list[Any]) -> None:
        while handles:
            handles.pop().remove()

    @torch.no_grad()
    def _hold(self, optimizer: Any, *_: object) -> None:
        capturing = capture.capturing()
        left = self._captured and (optimizer is self._holder or not capturing)  # by a capture that has failed
        if self._held and not left:  # a step within a wrapper's
            return
        # Read at every step, not once per event: so it does not matter in which order a checkpoint is loaded.
        parameters = [p for p, _, _ in self._frozen]
        together = self._freezer.hold(parameters)
        apart = (p.index_select(dim, index.to(p.device)) for p, dim, index in self._frozen)
        self._together, self._held = together is not None, tuple(apart) if together is None else (together,)
        self._holder, self._captured = optimizer, capturing

    @torch.no_grad()
    def _restore(self, optimizer: Any, *_: object) -> None:
        states = self._states(self._frozen)
        if self._together:
            targets: list[tuple[int, Tensor, bool]] = [(i, p, False) for i, (p, _, _) in enumerate(self._frozen)]
            quick = [self._freezer.takes(tensor) and fresh in (None, 0.0) for _, (tensor, fresh) in states]
            targets += [(i, x.tensor, x.fresh is not None) for (i, x), fits in zip(states, quick, strict=True) if fits]
            self._freezer.put_back(self._held[0], targets)
            states = [state for state, fits in zip(states, quick, strict=True) if not fits]
        else:
            for (p, dim, index), held in zip(self._frozen, self._held, strict=True):
                p.index_copy_(dim, index.to(p.device), held)
        self._clear(self._frozen, states)
        if optimizer is self._holder:
            self._held, self._holder = (), None

    @staticmethod
    @torch.no_grad()
    def _clear(entries: Entries, states: Iterable[tuple[int, State]]) -> None:
        for number, (tensor, fresh) in states:
            parameter, dim, index = entries[number]
            if fresh is None:
                held = parameter.index_select(dim, index.to(parameter.device))
                tensor.index_copy_(dim, index.to(tensor.device), held.to(tensor))
            else:
                tensor.index_fill_(dim, index.to(tensor.device), fresh)

    def _states(self, entries: Entries) -> list[tuple[int, State]]:
        """What the optimizers remember of these parameters, each with its entry's number."""
        return self._optimizers.states([parameter for parameter, _, _ in entries])


class _Run(NamedTuple):
    """A forward of the whole model, for which the slices of all its modules were gathered."""

    slices: Sequence[Tensor]
    full: Sequence[Tensor]  # what they were taken of, and the versions of its values
    versions: Sequence[int]
    cast: torch.dtype | None  # what autocast casts to


class _Shadow:
    """Lets a module's forward see slices of its tensors: an instance attribute hides the parameter of the same name."""

    def __init__(self, where: dict[str, Cuts], widths: dict[str, tuple[int, int]]):
        self.where, self.widths = where, widths  # widths: attribute -> (narrow, full)
        self.run: _Run | None = None  # while it lasts, and where the module's slices are in it
        self.numbers: list[tuple[str, int]] = []
        self.casts = False  # whether autocast would cast them

    def __reduce__(self) -> tuple[Any, ...]:  # what is gathered already is the model's own, not its copy's
        return _Shadow, (self.where, self.widths)

    def enter(self, module: nn.Module, args: object) -> None:
        if not self._served(module):
            with _unseen():
                for name, cut in self.where.items():
                    full = _whole(module, name)  # a replica of DataParallel's has it as an attribute
                    module.__dict__[name] = gather(getattr(module, name) if full is None else full, cut)
        for name, (narrow, _) in self.widths.items():
            module.__dict__[name] = narrow

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        for name, (_, width) in self.widths.items():
            module.__dict__[name] = width
        together = not torch.compiler.is_compiling() and self.run is not None
        for name, cut in self.where.items():
            part = module.__dict__.pop(name, None)
            full = None if together else module._buffers.get(name)
            if full is not None and part is not None and module.training:  # BatchNorm updated its statistics
                for dim, index in cut:
                    full.index_copy_(dim, index.to(full.device), part)

    def _served(self, module: nn.Module) -> bool:
        """Install what was gathered for the whole model, if there is such, and it is what the module needs now: of the
        same values, and in a type that its operations take now."""
        if torch.compiler.is_compiling() or self.run is None:
            return False
        slices, whole, versions, cast = self.run
        parameters, buffers, attributes = module._parameters, module._buffers, module.__dict__
        right = not self.casts or _autocast_dtype(whole[0].device) == cast
        for name, number in self.numbers:
            full = whole[number]
            right = right and parameters.get(name, buffers.get(name)) is full and full._version == versions[number]
            attributes[name] = slices[number]
        if not right:
            self.run = None  # nor does it go back with the others
        return right


class _Plan(NamedTuple):
    """What is gathered for a forward of the whole model: with autocast more than without."""

    pack: Pack
    places: list[tuple[Mapping[str, Tensor | None], str, bool]]  # of each tensor; whether autocast would cast it
    shadows: list[tuple[_Shadow, list[tuple[str, int]], bool]]  # with the names and numbers of their tensors
    statistics: list[tuple[int, nn.Module, _Shadow]]  # the numbers of buffers


class _Gathering:
    """Around the forward of the whole model: gathers for all its shadows at once, where `Pack` can.

    The slices are there as long as that forward runs. What runs again in a backward (activation checkpointing) gathers
    its own: kept slices would keep autograd's graph, whose nodes belong to the stream they were made on, and a graph of
    CUDA could not hold the next step.

    Under autocast convolutions and linears get their weights in the type they compute in, whole ones too: autocast has
    nothing left to cast.
    """

    def __init__(self, impl: str):
        self.impl = impl
        self.shadows: list[tuple[nn.Module, _Shadow]] = []
        self.plans: dict[bool, _Plan] = {}  # whether there is autocast
        self.running: tuple[_Plan, _Run] | None = None
        # Of forwards before, of which something is still there: their nodes, and the stream on which autograd adds up
        self.graphs: list[tuple[weakref.ref[Any], int | None]] = []  # gradients, which is that of the oldest.

    def __getstate__(self) -> dict[str, Any]:  # of a copy; what is gathered is the model's own
        return {**vars(_Gathering(self.impl)), "shadows": self.shadows}

    def casts(self, module: nn.Module) -> bool:
        """Whether under autocast this module's tensors are gathered even if all channels are active."""
        weight = module._parameters.get("weight")
        asked = weight is not None and (self.impl == "triton" or (self.impl == "auto" and weight.is_cuda))
        return asked and type(module) in (nn.Conv2d, nn.Linear)

    def shadow(self, module: nn.Module, where: dict[str, Cuts], out: Tensor | None) -> _Shadow:
        """A shadow for this module, of whose output channels `out` are active (None: all)."""
        widths = {}
        if out is not None:  # what forward itself looks at
            names = ("groups",) if is_depthwise(module) else ("num_features",)
            widths = {key: (len(out), getattr(module, key)) for key in names if hasattr(module, key)}
        shadow = _Shadow(where, widths)
        self.shadows.append((module, shadow))
        return shadow

    def enter(self, model: nn.Module, args: object) -> None:
        self._let_go()  # an interrupt may have kept the last forward from it
        first = next((_whole(module, name) for module, shadow in self.shadows for name in shadow.where), None)
        if first is None or "_is_replica" in model.__dict__:  # of DataParallel's: the tensors here are not its own
            return
        cast = _autocast_dtype(first.device)
        plan = self.plans.get(cast is not None)
        if plan is None:
            plan = self.plans[cast is not None] = self._plan(cast is not None)
        found = [tensors.get(name) for tensors, name, _ in plan.places]
        full = [tensor for tensor in found if tensor is not None]
        if len(full) < len(found):
            return
        dtypes = [tensor.dtype for tensor in full]
        if cast is not None:
            dtypes = [
                cast if casts and dtype != torch.float64 else dtype
                for (_, _, casts), dtype in zip(plan.places, dtypes, strict=True)
            ]
        stream = self._stream()
        parts = plan.pack.gather(full, dtypes)
        if parts is None:
            return
        part = next((part for part in parts if part.grad_fn is not None), None)
        if part is not None:
            self.graphs.append((weakref.ref(part.grad_fn), stream))
        run = _Run(parts, full, [tensor._version for tensor in full], cast)
        self.running = plan, run
        for shadow, numbers, casts in plan.shadows:
            shadow.run, shadow.numbers, shadow.casts = run, numbers, casts

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        if self.running is not None and "_is_replica" not in model.__dict__:
            plan, run = self.running
            updated = [n for n, module, shadow in plan.statistics if shadow.run is not None and module.training]
            plan.pack.put_back(run.slices[0], [(number, run.full[number], False) for number in updated])
            self._let_go()

    def _stream(self) -> int | None:
        """The stream on which autograd will add up the gradients of this forward; None without CUDA.

        Raises:
            RepruneError: if a graph is captured and it is the default stream, which no graph can hold.
        """
        self.graphs = [(node, stream) for node, stream in self.graphs if node() is not None]
        if not torch.cuda.is_initialized():
            return None
        stream = self.graphs[0][1] if self.graphs else torch.cuda.current_stream().stream_id
        if stream == 0 and torch.is_grad_enabled() and capture.capturing():
            raise RepruneError(
                "a CUDA graph of this narrow network is captured while something of a forward on the default stream is "
                "still there, and its gradients would be added up on that stream: delete what holds it, such as the "
                "loss, or do what comes before the capture on another stream (reprune_triton.capture.warm_up)"
            )
        return stream

    def _let_go(self) -> None:
        for shadow, *_ in self.running[0].shadows if self.running is not None else ():
            shadow.run = None
        self.running = None

    def _plan(self, autocast: bool) -> _Plan:
        plan, cuts = _Plan(Pack([], self.impl), [], [], []), list[Cuts]()
        for module, shadow in self.shadows:
            # A class of its own may compute with its weight before autocast would cast it.
            casts = autocast and type(module) in (nn.Conv2d, nn.Linear)
            numbers = []
            for name, cut in shadow.where.items():
                if autocast or cut:
                    numbers.append((name, len(cuts)))
                    if name in module._buffers:
                        plan.statistics.append((len(cuts), module, shadow))
                    tensors = module._buffers if name in module._buffers else module._parameters
                    plan.places.append((tensors, name, casts))
                    cuts.append(cut)
            plan.shadows.append((shadow, numbers, casts))
        return plan._replace(pack=Pack(cuts, self.impl))


def _whole(module: nn.Module, name: str) -> Tensor | None:
    """The tensor, whatever hides it."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _unseen() -> contextlib.AbstractContextManager[None]:
    """For activation checkpointing, which counts what a forward saves: gathering tensor by tensor saves what gathering
    for the whole model does not."""
    hooks = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() or not hooks():  # functorch allows none
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def check_whole(model: nn.Module) -> None:
    """Raise RepruneError if `model` is narrow already: another pruner's hooks are on it."""
    if any(_shadows(module._forward_pre_hooks) for module in model.modules()):
        raise RepruneError(
            f"this {type(model).__name__} runs on part of its channels already: a model has one pruner. "
            "Take the module that finalize() returned, or build the model afresh and load its weights."
        )


class _Copying(TorchFunctionMode):
    """Lets deepcopy copy tensors that autograd has made, without their past: a feature map that a model keeps, say."""

    def __init__(self, tensors: bool):
        super().__init__()
        self.tensors = tensors  # False: no tensor is copied, the copy has the same

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not (self.tensors and args[0].is_leaf):
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone() if self.tensors else tensor
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy."""
    with _Copying(tensors=True):
        return copy.deepcopy(model)


def check_copy(model: nn.Module) -> None:
    """Raise RepruneError if `model` cannot be copied, as `compact` does. No tensor is copied for it."""
    try:
        with _Copying(tensors=False):
            copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:
        raise RepruneError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), which making it narrow "
            "needs: take off the model what has been put on it since the pruner was built"
        ) from error


def compact(model: nn.Module, slices: Slices) -> nn.Module:
    """A physically narrow copy of `model`: an ordinary module with smaller parameters and no hooks of ours."""
    absent = set(slices) - {name for name, _ in model.named_modules()}
    if absent:
        raise RepruneError(
            f"this {type(model).__name__} has no module {min(absent)}: give a model of the structure that is pruned "
            "(of a wrapper the module inside, such as ema.module)"
        )
    slim = copied(model)
    for name, module in slim.named_modules():
        _remove_shadows(module)
        if name in slices:
            part, full, depthwise = slices[name], dict(_tensors(module)), is_depthwise(module)
            resize(module, {key: gather(full[key].detach(), cut) for key, cut in cuts(module, part).items()})
            into = _IN_WIDTHS if not depthwise else ()
            across = ("groups", "in_channels") if depthwise else ()
            for attributes, index in ((_OUT_WIDTHS + across, part.out), (into, part.in_)):
                for attribute in attributes:
                    if index is not None and hasattr(module, attribute):
                        setattr(module, attribute, len(index))
    return slim


def swap_in(model: nn.Module, slim: nn.Module) -> None:
    """Give `model` the parameters, buffers and widths of `slim`, its compacted copy: from now on they share them."""
    modules = dict(model.named_modules())
    for name, narrow in slim.named_modules():
        module = modules[name]
        module._parameters.update(narrow._parameters)
        module._buffers.update(narrow._buffers)
        for attribute in (*_OUT_WIDTHS, *_IN_WIDTHS, "groups"):
            if hasattr(narrow, attribute):
                setattr(module, attribute, getattr(narrow, attribute))
        _remove_shadows(module)
    _forget_compiled()


def resize(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors` in the place of the module's own parameters and buffers of those names, whatever their shape."""
    for name, tensor in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            module._parameters[name] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
        else:
            module._buffers[name] = tensor


def carry_optimizers(optimizers: Optimizers, model: nn.Module, slim: nn.Module, slices: Slices) -> None:
    """Make the optimizers train `slim` in place of `model`: same groups and options, states sliced like the weights."""
    new = dict(slim.named_parameters())
    where: dict[str, Cuts] = {}
    for name, part in slices.items():
        prefix = f"{name}." if name else ""
        where |= {prefix + key: cut for key, cut in cuts(model.get_submodule(name), part).items()}
    optimizers.carry({
        old: (new[name], functools.partial(gather, where=where.get(name, [])))
        for name, old in model.named_parameters()
    })  # fmt: skip


def _forget_compiled() -> None:
    """Compiled code does not look at hooks that come or go after it: it would go on with the old channels. From now on
    it looks for hooks at least, so that a narrow model never runs on the code of another one of its class."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.config.skip_nnmodule_hook_guards = False


def _shadows(hooks: Mapping[int, Any]) -> list[int]:
    """The keys of our own among a module's hooks."""
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (_Shadow, _Gathering))]


def _remove_shadows(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in _shadows(hooks):
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (module._parameters, module._buffers):
        for name, tensor in named.items():
            if tensor is not None:
                yield name, tensor


def _width(module: nn.Module, attributes: tuple[str, ...]) -> int:
    """How many channels the module has in this direction, if it has a width at all."""
    return next((getattr(module, name) for name in attributes if hasattr(module, name)), 0)


def _others(index: Tensor, size: int) -> Tensor:
    """The indices in [0, size) that are not in `index`, sorted."""
    rest = torch.ones(size, dtype=torch.bool, device=index.device)
    rest[index] = False
    return rest.nonzero().flatten()
