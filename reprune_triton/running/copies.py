"""Which channels belong to which weights: of a model's state_dicts, of its copies, and of averages of it.

    state_dict   says which channels it is of, in its metadata; loading it brings them back
    a copy       runs on the channels that it was copied with, as a best model that is kept should
    an average   a copy that is written to after an event: it runs on the model's channels from then on
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
    """A pruner, as its model knows it."""

    @property
    def active(self) -> dict[str, Tensor]:
        """The channels that the model runs on."""

    def run_on(self, active: Mapping[str, Tensor]) -> None:
        """Have the model run on these filters."""

    def settle(self) -> None:
        """Put back what an interrupted step has changed."""

    def expect_weights(self) -> None:
        """Weights are about to be loaded."""


class Belonging:
    """What a model, or a copy of it, knows of the channels that it runs on. A deep copy of the model has its own.

    Args:
        active: per prunable conv the sorted indices of the active filters, of a model without an owner.
        origin: that of the model which this one is an average of; it follows every event.
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
        self._stale, self._values = self.average, dict[str, float]()  # has the model changed its channels since?
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
        """The channels that the model runs on."""
        return self._active if self.owner is None else self.owner.active

    def change(self) -> None:
        """The model is about to run on other channels: its averages will follow when they are written to next."""
        for twin in self.copies:
            if "_modules" in twin.model.__dict__:  # else it is what a copy that failed has left
                twin._stale, twin._values = True, twin._look()

    def follow(self) -> None:
        """Run on the model's channels, if this is an average of it and has been written to since they changed. While a
        graph is captured, which cannot wait for the device, all stays as it is."""
        if self._stale and self.origin is not None and not capture.capturing():
            if self.average or self._written():
                self._run_on(self.origin.active)

    # ------------------------------------------------------------------ hooks of the model

    def __call__(self, model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        """Of its state_dict: say which channels it is of."""
        if self.owner is not None:
            self.owner.settle()
        self.follow()
        if self._cached[0] is not self.active:
            self._cached = self.active, {name: index.tolist() for name, index in self.active.items()}
        metadata[_KEY] = self._cached[1]

    def load(self, model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        """Of its load_state_dict: bring back the channels that the state is of, if it says so."""
        if self.owner is not None:
            self.owner.expect_weights()
        found, sizes = metadata.get(_KEY, {}), {layer.name: layer.n_out for layer in self.channels.prunable}
        if found.keys() == sizes.keys() and all(index and index[-1] < sizes[name] for name, index in found.items()):
            devices = {name: index.device for name, index in self.active.items()}
            self._run_on({name: torch.tensor(index, device=devices[name]) for name, index in found.items()})

    def enter(self, model: nn.Module, args: Any) -> None:
        """Of its forward."""
        if self.owner is None and not torch.compiler.is_compiling():
            if model.training and torch.is_grad_enabled() and not self.average:
                self.origin = None  # a copy that is trained apart
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
        """Numbers that change when the model is written to, by module. A copy may have lost some, or folded its norms
        into the convolutions."""
        modules, found = dict(self.model.named_modules()), dict[str, Tensor]()
        for layer in self.channels.prunable:
            for name in (layer.norm, layer.name):
                weight = modules[name]._parameters.get("weight") if name in modules else None
                if name is not None and weight is not None:
                    found[name] = (weight if weight.is_cuda else weight.cpu()).double().sum()  # MPS has no float64
                    break
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True)) if found else {}


def of(model: nn.Module) -> Belonging | None:
    """What this model knows of its channels; None if it is neither a pruner's nor a copy of one."""
    return next((hook for hook in model._state_dict_hooks.values() if isinstance(hook, Belonging)), None)


def remove(model: nn.Module) -> None:
    """Let the model forget that it is a pruner's or a copy of one."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks, model._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            function = getattr(hook, "hook", hook)  # torch wraps some
            if isinstance(hook, Belonging) or isinstance(getattr(function, "__self__", None), Belonging):
                del hooks[key]
