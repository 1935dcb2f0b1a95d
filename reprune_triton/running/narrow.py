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
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reprune_triton import capture
from reprune_triton.errors import RepruneError
from reprune_triton.fused.fusion import Blind
from reprune_triton.running.layers import (
    IN_WIDTHS,
    OUT_WIDTHS,
    Cuts,
    Slice,
    Slices,
    cuts,
    gather,
    is_depthwise,
    others,
    possible_cuts,
    width_of,
)
from reprune_triton.running.optimizers import Optimizers, State
from reprune_triton.running.pack import Pack

Entries = list[tuple[nn.Parameter, int, Tensor]]  # (parameter, dimension, indices)


class Setting(NamedTuple):
    """What an event changes. One assignment puts it in force, so an interrupt finds all of it done or nothing."""

    number: int  # hooks of other plans do nothing
    frozen: Entries
    freezer: Pack
    forgotten: Entries  # whose momentum is still to be zeroed
    state: Any  # of the caller, what goes with these channels


class Current:
    """The setting in force, as the hooks of one model see it."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.unfinished: Callable[[], None] | None = None  # the end of narrowing, until it is done

    def finish(self) -> None:
        """Do what may have been interrupted; it can be done again."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model runs on the same channels, and freezes nothing
        return Current, (Setting(self.setting.number, [], Pack([], "torch"), [], None),)


class Held(NamedTuple):
    """What is frozen, from before an optimizer's step until after it."""

    optimizer: Any
    frozen: Entries
    freezer: Pack
    values: Any  # of the freezer, or one by one
    together: bool
    captured: bool  # they are there only in a replay


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
        self.current = Current(Setting(0, [], Pack([], impl), [], None))
        self._held: Held | None = None
        self._sample = min(model.parameters(), key=lambda p: (not p.requires_grad, p.numel()))
        self._used: tuple[Tensor, int] | None = None  # its gradient in the last step, and the version of that
        self._step_handles: list[Any] = []
        self.follow(optimizer if isinstance(optimizer, Optimizers) else Optimizers(optimizer, model.parameters()))

    def follow(self, optimizers: Optimizers) -> None:
        """Freeze in the steps of these optimizers, in place of those before."""
        self._unhook_steps()
        self._optimizers = optimizers
        self._step_handles = optimizers.hook(self._hold, self._put_back)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"setting": self.current.setting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        setting = state.pop("setting")
        self.__dict__ |= state
        self.current.setting = setting

    def set(self, slices: Slices, frozen: Slices | None = None) -> None:
        """Make exactly these modules narrow, in place of what was narrow before.

        Args:
            slices: the channels they run on.
            frozen: the others, which keep their values from now on, and whose momentum every step leaves at zero.
                Without it they are found here, and the device is waited for.
        """
        self.enforce(self.prepare(slices, frozen))

    def prepare(
        self, slices: Slices, frozen: Slices | None = None, forgotten: Slices | None = None, state: Any = None
    ) -> Setting:
        """What `enforce` puts in force: as for `set`; and whose momentum is to be zeroed then. Until then nothing
        changes."""
        self.settle()
        number = self.current.setting.number + 1
        gathering = _Gathering(self._impl, number, self.current)
        if slices:
            self._register(self._model, gathering)
        for name, module in self._modules.items() if slices else ():
            where = possible_cuts(module, slices[name]) if name in slices else {}
            if gathering.casts(module):
                where = {key: [] for key in ("weight", "bias") if module._parameters.get(key) is not None} | where
            if name in slices or where:
                self._register(module, gathering.shadow(module, where, slices.get(name, Slice()).out))
        entries = self._parameters(self._others(slices) if frozen is None else frozen)
        freezer = Pack([[(dim, index)] for _, dim, index in entries], self._impl)
        forget_compiled()
        return Setting(number, entries, freezer, self._parameters(forgotten or {}), state)

    def enforce(self, setting: Setting) -> None:
        self.current.setting = setting
        self.settle()

    def end(self, change: Callable[[], None], optimizer_only: bool = False) -> None:
        """Close, and make `change` with it. If that is interrupted it is made again, at the latest before the next
        forward or step; so it must come out the same when it is made twice."""
        self.settle()
        ended = self.current.setting._replace(frozen=[], freezer=Pack([], self._impl))
        ended = ended if optimizer_only else ended._replace(number=ended.number + 1)

        def end() -> None:
            self.current.setting = ended
            change()
            self.close(optimizer_only)

        self.current.unfinished = end
        self.current.finish()

    @property
    def state(self) -> Any:
        return self.current.setting.state

    @state.setter
    def state(self, state: Any) -> None:
        self.current.setting = self.current.setting._replace(state=state)

    def settle(self) -> None:
        """Finish what an interrupt has left undone, in a step of the optimizer, in an event, or in a forward."""
        self.settle_step()
        number = self.current.setting.number
        for module in self._modules.values():
            uncover(module)
            _remove_hooks(module, lambda hook: hook.current is not self.current or hook.number != number)

    def settle_step(self) -> None:
        """`settle`, without a look at the modules."""
        self.current.finish()
        self._put_back()
        self._forget()

    def _forget(self) -> None:
        setting = self.current.setting
        if setting.forgotten:
            self._clear(setting.forgotten, self._states(setting.forgotten))
            self.current.setting = setting._replace(forgotten=[])

    def _register(self, module: nn.Module, hooks: "_Gathering | _Shadow") -> None:
        module.register_forward_pre_hook(hooks.enter)
        # always_call: an exception inside forward must not leave the slices in place
        module.register_forward_hook(hooks.leave, always_call=True)
        _move_inside(module)

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
            sizes = (width_of(module, OUT_WIDTHS), width_of(module, IN_WIDTHS))
            found[name] = Slice(*(i if i is None else others(i, n) for i, n in zip(part, sizes, strict=True)))
        return found

    def close(self, optimizer_only: bool = False) -> None:
        """Take the hooks out again: all of them, or only those on the optimizer."""
        self._unhook_steps()
        for module in self._modules.values() if not optimizer_only else ():
            _remove_hooks(module)

    def _unhook_steps(self) -> None:
        while self._step_handles:
            self._step_handles.pop().remove()

    @torch.no_grad()
    def _hold(self, optimizer: Any, *_: object) -> None:
        self.current.finish()
        held, capturing = self._held, capture.capturing()
        if held is not None and held.optimizer is not optimizer and not self._left(held):  # a step within a wrapper's
            return
        if held is not None and held.captured:  # by a capture that has failed
            self._held = None
        self._put_back()  # of a step that was interrupted
        self._forget()
        # Read at every step, not once per event: so it does not matter in which order a checkpoint is loaded.
        frozen, freezer = self.current.setting.frozen, self.current.setting.freezer
        parameters = [p for p, _, _ in frozen]
        together = freezer.hold(parameters)
        apart = (p.index_select(dim, index.to(p.device)) for p, dim, index in frozen)
        values = tuple(apart) if together is None else together
        self._held = Held(optimizer, frozen, freezer, values, together is not None, capturing)

    @torch.no_grad()
    def _put_back(self, optimizer: Any = None, *_: object) -> None:
        """Put back what is held; again where that was interrupted."""
        if self._held is None or self._left(self._held):
            self._held = None
            return
        holder, frozen, freezer, values, together = self._held[:5]
        states = self._states(frozen)
        if together:
            targets: list[tuple[int, Tensor, bool]] = [(i, p, False) for i, (p, _, _) in enumerate(frozen)]
            quick = [freezer.takes(tensor) and fresh in (None, 0.0) for _, (tensor, fresh) in states]
            targets += [(i, x.tensor, x.fresh is not None) for (i, x), fits in zip(states, quick, strict=True) if fits]
            freezer.put_back(values, targets)
            states = [state for state, fits in zip(states, quick, strict=True) if not fits]
        else:
            for (p, dim, index), value in zip(frozen, values, strict=True):
                p.index_copy_(dim, index.to(p.device), value)
        self._clear(frozen, states)
        if optimizer is None or optimizer is holder:  # and not after a step within a wrapper's
            self._held, self._used = None, self._gradient()

    def spent(self) -> bool:
        """Whether the gradients of the model are those of the last step, and nothing has been added since."""
        now = self._gradient()
        return now is not None and self._used is not None and now[0] is self._used[0] and now[1] == self._used[1]

    def _gradient(self) -> tuple[Tensor, int] | None:
        grad = self._sample.grad
        return None if grad is None else (grad, grad._version)

    @staticmethod
    def _left(held: Held) -> bool:
        """Whether it was held by a capture that has failed."""
        return held.captured and not capture.capturing()

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


class _Turn:
    """One thread at a time is inside of something. An interrupt may keep it from leaving: it can go inside again."""

    def __init__(self) -> None:
        self._lock, self.thread = threading.RLock(), 0  # 0: nobody is inside

    def __reduce__(self) -> tuple[Any, ...]:  # nobody is inside of a copy
        return _Turn, ()

    def take(self, patience: float) -> bool:
        """Go inside; False if another thread has not left for so many seconds."""
        thread = threading.get_ident()
        if self.thread != thread:
            # A free one is had ten times sooner without a timeout.
            if not self._lock.acquire(blocking=False) and not self._lock.acquire(timeout=patience):
                return False
            self.thread = thread
        return True

    def seize(self) -> None:
        """Go inside, whoever was there."""
        self._lock = threading.RLock()
        self._lock.acquire()
        self.thread = threading.get_ident()

    def mine(self) -> bool:
        return self.thread == threading.get_ident()

    def leave(self) -> None:
        if self.thread == threading.get_ident():
            self.thread = 0
            self._lock.release()

    def others(self) -> bool:
        """Whether another thread is inside, and still running."""
        return not self.mine() and any(thread.ident == self.thread for thread in threading.enumerate())


class _Run(NamedTuple):
    """A forward of the whole model, for which the slices of all its modules were gathered."""

    slices: Sequence[Tensor]
    full: Sequence[Tensor]  # what they were taken of, and the versions of its values
    versions: Sequence[int]
    cast: torch.dtype | None  # what autocast casts to
    thread: int  # that runs it: others gather their own


class _Shadow(Blind):
    """Lets a module's forward see slices of its tensors: an instance attribute hides the parameter of the same name.

    One thread at a time runs the module, as another one would find slices that are not its own. An interrupt may leave
    it hidden; the next forward hides it anew.
    """

    PATIENCE = 10.0  # seconds, longer than any module runs: after these, what is inside was interrupted there

    def __init__(self, where: dict[str, Cuts], widths: dict[str, tuple[int, int]], number: int, current: Current):
        self.where, self.widths = where, widths  # widths: attribute -> (narrow, full)
        self.narrow: dict[str, Any] = {key: narrow for key, (narrow, _) in widths.items()}
        self.full = {key: full for key, (_, full) in widths.items()}
        self.number, self.current = number, current
        self.turn = _Turn()
        self.run: _Run | None = None  # while it lasts, and where the module's slices are in it
        self.numbers: list[tuple[str, int]] = []
        self.casts = False  # whether autocast would cast them

    def __reduce__(self) -> tuple[Any, ...]:  # what is gathered already is the model's own, not its copy's
        return _Shadow, (self.where, self.widths, self.number, self.current)

    def enter(self, module: nn.Module, args: object) -> None:
        compiling = torch.compiler.is_compiling()
        if self.current.setting.number != self.number:
            if not compiling:
                self.current.finish()
            return
        if not compiling and "_is_replica" not in module.__dict__:
            if not self.turn.take(self.PATIENCE):
                self.turn.seize()
        parts = None if compiling or self.run is None else self._served(module, self.run)
        if parts is None:
            parts = self.narrow.copy()
            if not compiling:
                _move_inside(module)  # it may run without the whole model
            with _unseen():
                for name, cut in self.where.items():
                    full = _whole(module, name)
                    if full is None and "_is_replica" in module.__dict__:  # DataParallel's, with attributes instead
                        full = module.__dict__.get(name)
                    if full is not None:
                        parts[name] = gather(full, cut)
        if compiling:
            for name, part in parts.items():
                module.__dict__[name] = part
        else:
            module.__dict__.update(parts)  # |= would assign to it, which a module takes long for

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        apart = torch.compiler.is_compiling() or "_is_replica" in module.__dict__
        if self.current.setting.number != self.number if apart else not self.turn.mine():
            return
        together = not apart and self.run is not None and self.run.thread == self.turn.thread
        for name, cut in self.where.items() if module.training and not together else ():
            part, full = module.__dict__.get(name), module._buffers.get(name)
            if full is not None and part is not None:  # BatchNorm updated its statistics
                for dim, index in cut:
                    full.index_copy_(dim, index.to(full.device), part)
        self._uncover(module)
        if not apart:
            self.turn.leave()

    def _served(self, module: nn.Module, run: _Run) -> dict[str, Any] | None:
        """What was gathered for the whole model, if it is what the module needs now: of the same values, and in a type
        that its operations take now."""
        slices, whole, versions, cast, thread = run
        parameters, buffers, parts = module._parameters, module._buffers, self.narrow.copy()
        right = thread == self.turn.thread and (not self.casts or _autocast_dtype(whole[0].device) == cast)
        for name, number in self.numbers:
            full, own = whole[number], parameters if name in parameters else buffers
            right = right and own.get(name) is full and full._version == versions[number]
            parts[name] = slices[number]
        if not right:
            self.run = None  # nor does it go back with the others
            return None
        return parts

    def uncover(self, module: nn.Module) -> None:
        """Show the module's own tensors again, if an interrupt has left them hidden."""
        if not self.turn.others():
            self._uncover(module)
            self.turn.leave()

    def _uncover(self, module: nn.Module) -> None:
        own = module.__dict__
        own.update(self.full)
        for name in self.where:
            own.pop(name, None)


class _Plan(NamedTuple):
    """What is gathered for a forward of the whole model: with autocast more than without."""

    pack: Pack
    places: list[tuple[Mapping[str, Tensor | None], str, bool]]  # of each tensor; whether autocast would cast it
    shadows: list[tuple[_Shadow, list[tuple[str, int]], bool]]  # with the names and numbers of their tensors
    statistics: list[tuple[int, nn.Module, _Shadow]]  # the numbers of buffers


class _Gathering(Blind):
    """Around the forward of the whole model: gathers for all its shadows at once, where `Pack` can.

    The slices are there as long as that forward runs. What runs again in a backward (activation checkpointing) gathers
    its own: kept slices would keep autograd's graph, whose nodes belong to the stream they were made on, and a graph of
    CUDA could not hold the next step.

    Under autocast convolutions and linears get their weights in the type they compute in, whole ones too: autocast has
    nothing left to cast.
    """

    def __init__(self, impl: str, number: int, current: Current):
        self.impl, self.number, self.current = impl, number, current
        self.shadows: list[tuple[nn.Module, _Shadow]] = []
        self.plans: dict[bool, _Plan] = {}  # whether there is autocast
        self.running: tuple[_Plan, _Run] | None = None
        self.turn = _Turn()
        # Nodes of earlier forwards whose graphs may still be there, each with the stream on which autograd adds up
        # gradients: while one of these graphs lives, it stays the stream of the first.
        self.graphs: list[tuple[weakref.ref[Any], int | None]] = []

    def __getstate__(self) -> dict[str, Any]:  # of a copy; what is gathered is the model's own
        return {**vars(_Gathering(self.impl, self.number, self.current)), "shadows": self.shadows}

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
        shadow = _Shadow(where, widths, self.number, self.current)
        self.shadows.append((module, shadow))
        return shadow

    def enter(self, model: nn.Module, args: object) -> None:
        if "_is_replica" in model.__dict__:  # of DataParallel's: the tensors here are not its own
            return
        # Each module gathers its own where streams and weak references would break a graph, and in a second thread.
        if torch.compiler.is_compiling() or not self.turn.take(0):
            return
        self._let_go()  # an interrupt may have kept the last forward from it
        self.current.finish()
        for module, _ in self.shadows:
            if len(module._forward_pre_hooks) > 1 or len(module._forward_hooks) > 1:
                _move_inside(module)
        first = next((_whole(module, name) for module, shadow in self.shadows for name in shadow.where), None)
        if first is None or self.current.setting.number != self.number:
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
        run = _Run(parts, full, [tensor._version for tensor in full], cast, self.turn.thread)
        self.running = plan, run
        for shadow, numbers, casts in plan.shadows:
            shadow.run, shadow.numbers, shadow.casts = run, numbers, casts

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or "_is_replica" in model.__dict__ or not self.turn.mine():
            return
        if self.running is not None:
            plan, run = self.running
            updated = [n for n, module, shadow in plan.statistics if shadow.run is not None and module.training]
            plan.pack.put_back(run.slices[0], [(number, run.full[number], False) for number in updated])
        self._let_go()
        self.turn.leave()

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
                if (autocast or cut) and _whole(module, name) is not None:
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


def forget_compiled() -> None:
    """Compiled code does not look at hooks that come or go after it: it would go on with the old channels. From now on
    it looks for hooks at least, so that a narrow model never runs on the code of another one of its class."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.config.skip_nnmodule_hook_guards = False


def _shadows(hooks: Mapping[int, Any]) -> list[int]:
    """The keys of our own among a module's hooks."""
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (_Shadow, _Gathering))]


def uncover(module: nn.Module) -> None:
    for key in _shadows(module._forward_pre_hooks):
        hook = module._forward_pre_hooks[key].__self__  # type: ignore[attr-defined]
        if isinstance(hook, _Shadow):
            hook.uncover(module)


def _remove_hooks(
    module: nn.Module, which: "Callable[[_Shadow | _Gathering], bool]" = lambda hook: True
) -> None:  # fmt: skip
    """Of ours those which `which` says."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in _shadows(hooks):
            if which(hooks[key].__self__):  # type: ignore[attr-defined]
                module._forward_hooks_always_called.pop(key, None)
                del hooks[key]


def remove_hooks(model: nn.Module) -> None:
    """All of ours, on all its modules."""
    for module in model.modules():
        _remove_hooks(module)


def _move_inside(module: nn.Module) -> None:
    """Our hooks next to the forward, so that all others of the module see whole tensors. Global forward hooks do not:
    PyTorch calls them before those of the module."""
    for hooks, last in ((module._forward_pre_hooks, True), (module._forward_hooks, False)):
        if len(hooks) > 1:
            for key in _shadows(hooks):
                hooks.move_to_end(key, last)  # type: ignore[attr-defined]


