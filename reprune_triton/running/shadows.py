"""Slices in the forward: hooks that let a module, while it runs, see slices of its tensors in place of the tensors.

`Gathering`, around the forward of the whole model, gathers all slices in one launch where `Pack` can. A `Shadow`,
around the forward of one module, hides the module's tensors with the slices, and gathers those that are not there.
"""

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reprune_triton import capture
from reprune_triton.errors import RepruneError
from reprune_triton.fused.fusion import Blind
from reprune_triton.running.layers import FORWARD_WIDTHS, READERS, Cuts, Slice, gather, narrow_widths, possible_cuts
from reprune_triton.running.pack import Pack
from reprune_triton.running.setting import Current


class _Turn:
    """A lock that the thread which has it may take again: an interrupt may have kept it from leaving."""

    def __init__(self) -> None:
        self._lock, self.thread = threading.RLock(), 0  # 0: no thread has it

    def __reduce__(self) -> tuple[Any, ...]:  # that of a copy is free
        return _Turn, ()

    def take(self, patience: float) -> bool:
        """Take it; return False if another thread keeps it for `patience` seconds."""
        thread = threading.get_ident()
        if self.thread != thread:
            # Without a timeout it takes a tenth of the time to take a free one.
            if not self._lock.acquire(blocking=False) and not self._lock.acquire(timeout=patience):
                return False
            self.thread = thread
        return True

    def seize(self) -> None:
        """Take it from whichever thread has it."""
        self._lock = threading.RLock()
        self._lock.acquire()
        self.thread = threading.get_ident()

    def mine(self) -> bool:
        """Whether this thread has it."""
        return self.thread == threading.get_ident()

    def leave(self) -> None:
        """Let it go, if this thread has it."""
        if self.thread == threading.get_ident():
            self.thread = 0
            self._lock.release()

    def others(self) -> bool:
        """Whether another thread has it, and is still running."""
        return not self.mine() and any(thread.ident == self.thread for thread in threading.enumerate())


class _Run(NamedTuple):
    """A forward of the whole model, for which the slices of all its modules were gathered."""

    slices: Sequence[Tensor]
    full: Sequence[Tensor]  # the tensors they are slices of
    versions: Sequence[int]  # of the values of these
    cast: torch.dtype | None  # the type that autocast casts to
    thread: int  # the one that runs it: others gather their own


class Shadow(Blind):
    """Lets a module's forward see slices of its tensors: an instance attribute hides the parameter of the same name.

    One thread at a time runs the module, as another one would find slices that are not its own. After an interrupt the
    parameters may still be hidden; the next forward hides them anew.

    Args:
        where: the cuts of each tensor.
        narrow, full: the widths that the forward looks at, by attribute, as they are while it runs and else.
    """

    PATIENCE = 10.0  # seconds, longer than any module runs: a thread that takes longer was interrupted inside

    def __init__(
        self, where: dict[str, Cuts], narrow: dict[str, Any], full: dict[str, int], number: int, current: Current
    ):
        self.where, self.narrow, self.full = where, narrow, full
        self.number, self.current = number, current
        self.turn = _Turn()
        self.run: _Run | None = None  # the forward of the whole model, while it lasts
        self.numbers: list[tuple[str, int]] = []  # the module's tensors, and the numbers of their slices in that
        self.casts = False  # whether autocast would cast them

    def __reduce__(self) -> tuple[Any, ...]:  # a copy gathers slices of its own
        return Shadow, (self.where, self.narrow, self.full, self.number, self.current)

    def enter(self, module: nn.Module, args: object) -> None:
        """Hide the module's tensors with their slices, before its forward."""
        compiling = torch.compiler.is_compiling()
        if self.current.setting.number != self.number:
            if not compiling:
                self.current.finish()
            return
        if not compiling and "_is_replica" not in module.__dict__ and not self.turn.take(self.PATIENCE):
            self.turn.seize()
        parts = None if compiling or self.run is None else self._gathered(module, self.run)
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
            module.__dict__.update(parts)  # not |=, which assigns to `__dict__`: slow for a module

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """Keep the running statistics that the forward has updated, and show the module's own tensors again."""
        apart = torch.compiler.is_compiling() or "_is_replica" in module.__dict__
        never_entered = self.current.setting.number != self.number if apart else not self.turn.mine()
        if never_entered:
            return
        together = not apart and self.run is not None and self.run.thread == self.turn.thread
        for name, cut in self.where.items() if module.training and not together else ():
            part, full = module.__dict__.get(name), module._buffers.get(name)
            if full is not None and part is not None:
                for dim, index in cut:
                    full.index_copy_(dim, index.to(full.device), part)
        self._show(module)
        if not apart:
            self.turn.leave()

    def _gathered(self, module: nn.Module, run: _Run) -> dict[str, Any] | None:
        """Return the module's slices from `run`, by name, and its narrow widths; None if they do not fit any more.

        They fit if the module has the same tensors with the same values, and autocast casts to the same type.
        """
        slices, whole, versions, cast, thread = run
        parameters, buffers, parts = module._parameters, module._buffers, self.narrow.copy()
        fits = thread == self.turn.thread and (not self.casts or _autocast_dtype(whole[0].device) == cast)
        for name, number in self.numbers:
            full, own = whole[number], parameters if name in parameters else buffers
            fits = fits and own.get(name) is full and full._version == versions[number]
            parts[name] = slices[number]
        if not fits:
            self.run = None  # so its statistics do not go back with the others
            return None
        return parts

    def uncover(self, module: nn.Module) -> None:
        """Show the module's own tensors again, where an interrupt has left them hidden."""
        if not self.turn.others():
            self._show(module)
            self.turn.leave()

    def _show(self, module: nn.Module) -> None:
        own = module.__dict__
        own.update(self.full)
        for name in self.where:
            own.pop(name, None)


class _Plan(NamedTuple):
    """The tensors to gather for a forward of the whole model: under autocast more than without."""

    pack: Pack
    places: list[tuple[Mapping[str, Tensor | None], str, bool]]  # dict and key of a tensor; would autocast cast it?
    shadows: list[tuple[Shadow, list[tuple[str, int]], bool]]  # names and numbers of its tensors; would it cast them?
    statistics: list[tuple[int, nn.Module, Shadow]]  # the numbers of running statistics


class Gathering(Blind):
    """Gathers, before the forward of the whole model, for all its shadows at once, where `Pack` can.

    The slices last as long as that forward. A module that runs again in the backward (activation checkpointing) gathers
    its own: slices that are kept would keep autograd's graph, whose nodes belong to the stream on which they were made,
    and a CUDA graph could not hold the next step.

    Under autocast convs and linears get their weights in the type they compute in, dense layers too: autocast has
    nothing left to cast.
    """

    def __init__(self, impl: str, number: int, current: Current):
        self.impl, self.number, self.current = impl, number, current
        self.shadows: list[tuple[nn.Module, Shadow]] = []
        self.plans: dict[bool, _Plan] = {}  # by whether autocast is on
        self.running: tuple[_Plan, _Run] | None = None
        self.turn = _Turn()
        # Nodes of autograd's graphs of earlier forwards, and the stream on which it adds up their gradients. As long as
        # one of these graphs lives, later ones use the stream of the first.
        self.graphs: list[tuple[weakref.ref[Any], int | None]] = []

    def __getstate__(self) -> dict[str, Any]:  # a copy gathers slices of its own
        return {**vars(Gathering(self.impl, self.number, self.current)), "shadows": self.shadows}

    def casts(self, module: nn.Module) -> bool:
        """Whether under autocast this module's tensors are gathered even if all channels are active."""
        weight = module._parameters.get("weight")
        packs = weight is not None and (self.impl == "triton" or (self.impl == "auto" and weight.is_cuda))
        return packs and _is_cast(module)

    def add(self, module: nn.Module, part: Slice | None) -> None:
        """Give this module a shadow, if it runs on a part of its channels or its tensors are gathered all the same."""
        where = {} if part is None else possible_cuts(module, part)
        if self.casts(module):
            where = {key: [] for key in ("weight", "bias") if module._parameters.get(key) is not None} | where
        if part is not None or where:
            widths = narrow_widths(module, part or Slice())
            narrow = {attribute: width for attribute, width in widths if attribute in FORWARD_WIDTHS}
            full = {attribute: getattr(module, attribute) for attribute in narrow}
            shadow = Shadow(where, narrow, full, self.number, self.current)
            self.shadows.append((module, shadow))
            register(module, shadow)

    def enter(self, model: nn.Module, args: object) -> None:
        """Gather for all modules, before the forward of the whole model."""
        if "_is_replica" in model.__dict__:  # one of DataParallel's: the tensors here are not its own
            return
        # Each module gathers its own in a second thread, and in torch.compile: streams and weak references would break
        # its graph.
        if torch.compiler.is_compiling() or not self.turn.take(0):
            return
        self._let_go()  # the last forward may have been interrupted before it did so
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
        """Keep the running statistics that the forward has updated, and let go of the slices."""
        if torch.compiler.is_compiling() or "_is_replica" in model.__dict__ or not self.turn.mine():
            return
        if self.running is not None:
            plan, run = self.running
            updated = [n for n, module, shadow in plan.statistics if shadow.run is not None and module.training]
            plan.pack.put_back(run.slices[0], [(number, run.full[number], False) for number in updated])
        self._let_go()
        self.turn.leave()

    def _stream(self) -> int | None:
        """Return the stream on which autograd will add up the gradients of this forward; None without CUDA.

        Raises:
            RepruneError: if a CUDA graph is captured and that is the default stream, which no graph can hold.
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
        """Drop the slices."""
        for shadow, *_ in self.running[0].shadows if self.running is not None else ():
            shadow.run = None
        self.running = None

    def _plan(self, autocast: bool) -> _Plan:
        """Return what to gather, from which dicts, for whom."""
        plan, cuts = _Plan(Pack([], self.impl), [], [], []), list[Cuts]()
        for module, shadow in self.shadows:
            casts = autocast and _is_cast(module)
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


def _is_cast(module: nn.Module) -> bool:
    """Whether autocast casts this module's tensors, and nothing uses them before.

    A subclass may compute with its weight before autocast would cast it.
    """
    return type(module) in READERS


def _whole(module: nn.Module, name: str) -> Tensor | None:
    """Return the module's own parameter or buffer, whatever hides it."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _unseen() -> contextlib.AbstractContextManager[None]:
    """Return a context in which activation checkpointing does not count what autograd saves.

    It compares what a forward saves with what that saves when it runs again. Gathering tensor by tensor saves index
    lists, gathering for the whole model does not.
    """
    hooks = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() or not hooks():  # functorch allows none
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to on this device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def check_whole(model: nn.Module) -> None:
    """Raise RepruneError if `model` is narrow already: another pruner's hooks are on it."""
    if any(own_hooks(module._forward_pre_hooks) for module in model.modules()):
        raise RepruneError(
            f"this {type(model).__name__} runs on part of its channels already: a model has one pruner. "
            "Take the module that finalize() returned, or build the model afresh and load its weights."
        )


def forget_compiled() -> None:
    """Drop the code that torch.compile has made: it does not look at hooks that come or go later, and would go on with
    the old channels.

    From now on its code checks that a module's hooks are the same, so that a narrow model never runs on the code of
    another model of its class.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.config.skip_nnmodule_hook_guards = False


def own_hooks(hooks: Mapping[int, Any]) -> list[int]:
    """Return the keys of the hooks that are ours."""
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (Shadow, Gathering))]


def register(module: nn.Module, hooks: Shadow | Gathering) -> None:
    """Run these hooks just before and after the forward of this module."""
    module.register_forward_pre_hook(hooks.enter)
    # always_call: an exception inside forward must not leave the slices in place
    module.register_forward_hook(hooks.leave, always_call=True)
    _move_inside(module)


def uncover(module: nn.Module) -> None:
    """Show the module's own tensors again, where an interrupt has left them hidden."""
    for key in own_hooks(module._forward_pre_hooks):
        hook = module._forward_pre_hooks[key].__self__  # type: ignore[attr-defined]
        if isinstance(hook, Shadow):
            hook.uncover(module)


def remove_own(module: nn.Module, which: Callable[[Shadow | Gathering], bool] = lambda hook: True) -> None:
    """Remove our hooks from this module: those for which `which` is true."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in own_hooks(hooks):
            if which(hooks[key].__self__):  # type: ignore[attr-defined]
                module._forward_hooks_always_called.pop(key, None)
                del hooks[key]


def remove_hooks(model: nn.Module) -> None:
    """Remove our hooks from the model and all its modules."""
    for module in model.modules():
        remove_own(module)


def _move_inside(module: nn.Module) -> None:
    """Make our pre-hook the last and our hook the first, so that all others of the module see its own tensors.

    Global forward hooks do not: PyTorch calls them before those of the module.
    """
    for hooks, last in ((module._forward_pre_hooks, True), (module._forward_hooks, False)):
        if len(hooks) > 1:
            for key in own_hooks(hooks):
                hooks.move_to_end(key, last)  # type: ignore[attr-defined]
