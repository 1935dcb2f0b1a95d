"""The channels that state_dicts, copies and averages of a model belong to.

    state_dict   names its channels in its metadata; loading it brings them back
    a copy       runs on the channels that it was copied with, as a best model that is kept should
    an average   is a copy that is written to after an event: it runs on the model's channels from then on
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reprune_triton import capture
from reprune_triton.running.channels import Channels
from reprune_triton.running.narrow import Narrowing

_KEY = "reprune_triton"  # in the metadata of a state_dict


class Owner(Protocol):
    """The part of a pruner that its model knows."""

    @property
    def active(self) -> dict[str, Tensor]:
        """The channels that the model runs on."""

    def run_on(self, active: Mapping[str, Tensor]) -> None:
        """Make the model run on these channels."""

    def settle(self) -> None:
        """Put back what an interrupted step has changed."""

    def expect_weights(self) -> None:
        """Note that weights are about to be loaded."""


class Belonging:
    """The channels that a model, or a copy of one, runs on, as hooks of it. A deep copy of the model has its own.

    Args:
        owner: the pruner of the model; None for a copy.
        active: for a copy: of every prunable conv, by name, the sorted int64 indices of the active filters (width,).
        origin: for an average: the `Belonging` of the model that it averages, whose events it follows.
    """

    def __init__(
        self, model: nn.Module, channels: Channels, impl: str, owner: Owner | None = None,
        active: Mapping[str, Tensor] | None = None, origin: Belonging | None = None,
    ):  # fmt: skip
        remove(model)
        self.model, self.channels, self.impl, self.owner = model, channels, impl, owner
        self._active: Mapping[str, Tensor] = {} if active is None else active
        self.copies: weakref.WeakSet[Belonging] = weakref.WeakSet()
        self.average = origin is not None
        self._cached: tuple[Any, dict[str, list[int]]] = (None, {})
        self._link(origin)
        model.register_state_dict_post_hook(self)
        model.register_load_state_dict_pre_hook(self.load)
        model.register_forward_pre_hook(self.enter)

    def _link(self, origin: Belonging | None) -> None:
        self.origin = origin
        self._stale, self._values = self.average, dict[str, float]()  # has the origin changed its channels since?
        if origin is not None:
            origin.copies.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Belonging:
        twin: Belonging = object.__new__(Belonging)
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())
        twin.model = copy.deepcopy(self.model, memo)
        twin.owner = memo.get(id(self.owner))  # a pruner that is copied with its model
        twin._link(None if twin.owner is not None else self.origin if self.owner is None else self)
        return twin

    def __getstate__(self) -> dict[str, Any]:  # without the pruner, which does not come with its model
        alone: dict[str, Any] = {"owner": None, "origin": None, "copies": None, "average": False, "_stale": False}
        return self.__dict__ | alone | {"_active": dict(self.active)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"copies": weakref.WeakSet()}

    @property
    def active(self) -> Mapping[str, Tensor]:
        """The channels that this model runs on."""
        return self._active if self.owner is None else self.owner.active

    def change(self) -> None:
        """Note that the model is about to run on other channels: averages follow when they are written to next."""
        for twin in self.copies:
            if "_modules" in twin.model.__dict__:  # not so in what a deepcopy that failed has left
                twin._stale, twin._values = True, twin._look()

    def follow(self) -> None:
        """Run on the origin's channels, if this is an average and has been written to since they changed.

        While a CUDA graph is captured nothing changes, as that cannot wait for the device.
        """
        if self._stale and self.origin is not None and not capture.capturing():
            if self.average or self._written():
                self._run_on(self.origin.active)

    def __call__(self, model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        """Name the channels in the metadata of a state_dict; a hook of `state_dict`."""
        if self.owner is not None:
            self.owner.settle()
        self.follow()
        if self._cached[0] is not self.active:
            self._cached = self.active, {name: index.tolist() for name, index in self.active.items()}
        metadata[_KEY] = self._cached[1]

    def load(self, model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        """Run on the channels of the state_dict that is loaded, if it names them; a hook of `load_state_dict`."""
        if self.owner is not None:
            self.owner.expect_weights()
        found, sizes = metadata.get(_KEY, {}), {layer.name: layer.n_out for layer in self.channels.prunable}
        if found.keys() == sizes.keys() and all(index and index[-1] < sizes[name] for name, index in found.items()):
            devices = {name: index.device for name, index in self.active.items()}
            self._run_on({name: torch.tensor(index, device=devices[name]) for name, index in found.items()})

    def enter(self, model: nn.Module, args: Any) -> None:
        """Follow the origin; a hook of the forward."""
        if self.owner is None and not torch.compiler.is_compiling():
            if model.training and torch.is_grad_enabled() and not self.average:
                self.origin = None  # a copy that is trained is no average
            self.follow()

    def _run_on(self, active: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self.owner is not None:
                self.owner.run_on(active)
            else:
                Narrowing(self.model, None, self.impl).set(self.channels.slices(active))
                self._active, self._stale = active, False

    def _written(self) -> bool:
        now = self._look()
        return any(now.get(name, value) != value for name, value in self._values.items())

    @torch.no_grad()
    def _look(self) -> dict[str, float]:
        """Return a number for each prunable conv that changes when the model is written to, by module.

        It is the sum of the norm's scale or of the conv's weight: a copy may have folded its norms into the convs, or
        have lost some modules.
        """
        modules, found = dict(self.model.named_modules()), dict[str, Tensor]()
        for layer in self.channels.prunable:
            for name in (layer.norm, layer.name):
                weight = modules[name]._parameters.get("weight") if name in modules else None
                if name is not None and weight is not None:
                    found[name] = (weight if weight.is_cuda else weight.cpu()).double().sum()  # MPS has no float64
                    break
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True)) if found else {}


def of(model: nn.Module) -> Belonging | None:
    """Return the `Belonging` of this model; None if it is neither a pruner's nor a copy of one."""
    return next((hook for hook in model._state_dict_hooks.values() if isinstance(hook, Belonging)), None)


def remove(model: nn.Module) -> None:
    """Remove from the model what makes it a pruner's or a copy of one."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks, model._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            function = getattr(hook, "hook", hook)  # torch wraps some
            if isinstance(hook, Belonging) or isinstance(getattr(function, "__self__", None), Belonging):
                del hooks[key]
