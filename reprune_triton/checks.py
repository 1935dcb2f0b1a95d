"""Checks of what a pruner is given and of what has to stay as it was, each with an error that says the way out."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprune_triton.config import Config, matching
from reprune_triton.errors import RepruneError
from reprune_triton.running import layers
from reprune_triton.running.channels import Channels, Prunable, matches
from reprune_triton.running.optimizers import Optimizers
from reprune_triton.selection.widths import round_up


def restricted(found: Channels, config: Config, model: nn.Module) -> Channels:
    """Leave out the layers that have no sparsity: neither one of their own, nor scales to share out a global one by.

    Raises:
        RepruneError: if no layer is left, or an option names or needs what the model does not have.
    """
    own = config.sparsity if isinstance(config.sparsity, Mapping) else None
    for option, patterns in (("ignore", config.ignore), ("sparsity", own or ())):
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in found.reasons):
                raise RepruneError(
                    f"{option}= names {pattern!r}, which fits no conv of this {type(model).__name__}; "
                    f"its convs are {', '.join(found.reasons)}"
                )
    if own is not None:
        found = found.only(lambda x: None if matching(x.name, own) else "sparsity= names no ratio for it")
        hint = "The names and patterns in sparsity= match none of the prunable convs."
    else:
        without = [layer.name for layer in found.prunable if layer.norm is None]
        found = found.only(
            lambda x: "no BatchNorm with a scale follows it: give sparsity per layer" if x.norm is None else None
        )
        hint = ""
        if without:
            hint = (
                "Without BatchNorm scales a global sparsity cannot be shared out between layers. Give each its "
                f"own: REPrune(..., sparsity={{{without[0]!r}: 0.5, ...}}); patterns such as 'features.*' work."
            )
    if any(layer.norm is None for layer in found.prunable):
        for option, others in (("tie", '"norm" or "random"'), ("select", '"coverage" or "l1"')):
            if getattr(config, option) == "gamma":
                raise RepruneError(
                    f'{option}="gamma" needs a BatchNorm after every prunable conv: use {option}={others}'
                )
    if not found.prunable:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in found.reasons.items())
        raise RepruneError(f"nothing to prune in {type(model).__name__}. {hint}\n{listing}")
    return found


def check_budget(channels: Channels, config: Config) -> None:
    """Raise RepruneError if the narrowest network is over the FLOPs budget."""
    if config.flops is not None:
        assert config.round_to is not None
        widths = {x.name: round_up(0, x.n_out, config.round_to, config.min_keep) for x in channels.prunable}
        least = channels.flops(widths)
        if least > config.flops:
            raise RepruneError(
                f"flops={config.flops} is out of reach: with one group of channels left in every prunable "
                f"conv the network still has {least:.3f} of its FLOPs. Raise it, or lower round_to and min_keep."
            )


def check_state(state: Mapping[str, Any], config: Mapping[str, Any], prunable: Iterable[Prunable]) -> None:
    """Raise RepruneError if this `REPrune.state_dict` is of another run: of a finished one, another model or options.

    config: the pruner's options as plain values.
    """
    if state["finished"] and state["config"]["compact"] != "auto":
        raise RepruneError("this state was saved after finalize(): load the narrow model instead")
    here = {layer.name: layer.n_out for layer in prunable}
    there = {name: layer["n_out"] for name, layer in state["layers"].items()}
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise RepruneError(
                f"this is the state of another model: {name} has {here.get(name, 'no prunable')} filters here "
                f"and {there.get(name, 'no prunable')} in the state"
            )
    for option, value in state["config"].items():
        own = config.get(option)
        same = own == value
        if same and isinstance(value, Mapping) and isinstance(own, Mapping):
            same = list(own) == list(value)  # the first pattern that fits wins, so their order counts
        if not same:
            raise RepruneError(
                f"this state was saved with {option}={value!r}, and this pruner has {option}={own!r}: "
                "give the same options to go on"
            )


def check_finite(tensors: Mapping[str, Tensor], epoch: int) -> None:
    """Raise RepruneError with the name of the first tensor that is not finite; waits for the device."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RepruneError(
                f"{name} holds NaN or inf at epoch {epoch}: the training has diverged. "
                "Go back to an earlier checkpoint, with a lower learning rate."
            )


class Watch:
    """A watch that the model stays as the pruner found it, and that only the pruner's optimizers train it."""

    def __init__(self, model: nn.Module, channels: Channels):
        self._model, self._names = model, [layer.name for layer in channels.prunable]
        # All that can be frozen or narrow: modules with all of their channels that can go.
        self._slices = channels.frozen({x.name: torch.arange(x.n_out) for x in channels.prunable})
        self._modules = {name: _made_of(model.get_submodule(name), part) for name, part in self._slices.items()}
        self._before: tuple[list[tuple[int, int]], Tensor] | None = None

    def check_optimizers(self, optimizers: Optimizers) -> None:
        """Raise RepruneError if these optimizers do not train all that can be frozen, or cannot follow channels."""
        self._check_trained(optimizers)
        optimizers.check(self._sliced())
        optimizers.try_out(self._sliced())

    def check(self, optimizers: Optimizers) -> None:
        """Raise RepruneError if the model or its optimizers are no longer what they were, or others have trained it."""
        modules = dict(self._model.named_modules())
        for name, then in self._modules.items():
            now = _made_of(modules[name], self._slices[name]) if name in modules else None
            if now != then:
                kind = "gone" if now is None else f"a {now[1].__name__}"
                if now is not None and now[1] is then[1]:
                    kind = f"another {now[1].__name__}" if now[0] is not then[0] else "one with other tensors"
                raise RepruneError(
                    f"{name} was a {then[1].__name__} when the pruner was built, and is {kind} now: change the model "
                    "first, and build the optimizer and the pruner then"
                )
        self._check_trained(optimizers)
        optimizers.check(self._sliced())
        if self._trained_by_others(optimizers):
            given = None if optimizers.given is None else type(optimizers.given).__name__
            raise RepruneError(
                f"the model was trained, and not by the optimizer that was given ({given}): pruned channels were not "
                "frozen. Name the one that trains it: pruner.optimizer = optimizer"
            )

    def await_training(self, optimizers: Optimizers) -> None:
        """Note weights and gradients: `check` asks who has trained the model since."""
        optimizers.stepped = False
        self._before = _gradients(self._model), self._norms()

    def pause(self) -> None:
        """Let the weights change without a step, until `await_training`."""
        self._before = None

    def _sliced(self) -> dict[nn.Parameter, str]:
        """Return the parameters that can be frozen in part or narrow, with their names."""
        found: dict[nn.Parameter, str] = {}
        for name, part in self._slices.items():
            module = self._model.get_submodule(name)
            for key in layers.cuts(module, part):
                parameter = module._parameters.get(key)
                if parameter is not None:
                    found[parameter] = f"{name}.{key}"
        return found

    def _check_trained(self, optimizers: Optimizers) -> None:
        """Raise RepruneError if a parameter that can be frozen is not theirs: another would go on changing it."""
        own = optimizers.parameters
        for name in self._slices if optimizers.members else ():
            for key, p in self._model.get_submodule(name).named_parameters(recurse=False):
                if p.requires_grad and p not in own:
                    raise RepruneError(
                        f"the optimizer does not train {name}.{key}, so it could not be frozen while pruned: give all "
                        "optimizers in a list (pruner.optimizer = [...] if pruning is under way), leave the layer out "
                        "with ignore=, or set requires_grad_(False)"
                    )

    def _norms(self) -> Tensor:
        """Return the norms of the prunable weights, which differ after training."""
        with torch.no_grad():
            weights = [self._model.get_submodule(name)._parameters["weight"] for name in self._names]
            return torch.stack(torch._foreach_norm(weights))  # type: ignore[arg-type]

    def _trained_by_others(self, optimizers: Optimizers) -> bool:
        """Whether there are other weights and new gradients, but no step of these optimizers that could be seen.

        A loaded checkpoint has no new gradients, and a step that is skipped leaves the weights as they are.
        """
        if self._before is None or optimizers.stepped or optimizers.replayed:
            return False
        gradients, norms = self._before
        now = _gradients(self._model)
        return bool(now) and now != gradients and not torch.equal(norms, self._norms())


def warn_if_thrown_away(model: nn.Module, slim: nn.Module, optimizers: Optimizers) -> None:
    """Warn when an optimizer of `slim` steps but `model`, from which it was made, is what was trained."""
    watched = [(model, slim, _gradients(model))]  # until one of them has been trained: a hook cannot remove itself

    def look(*_: object) -> None:
        for model, slim, before in watched:
            if any(p.grad is not None for p in slim.parameters()):
                watched.clear()
            elif _gradients(model) != before:
                watched.clear()
                warnings.warn(
                    "the model from before finalize() is being trained, which changes nothing: the optimizer has the "
                    "parameters of the module that finalize() returned. Train that one: model = pruner.finalize()",
                    stacklevel=4,
                )

    optimizers.hook(look, lambda *_: None)


def _gradients(model: nn.Module) -> list[tuple[int, int]]:
    """Return numbers that change with every backward."""
    return [(id(p.grad), p.grad._version) for p in model.parameters() if p.grad is not None]


def _made_of(module: nn.Module, part: layers.Slice) -> tuple[nn.Module, type, tuple[str, ...]]:
    """Return what a module is as long as it stays the same: itself, its class, and its tensors that can be cut."""
    try:
        return module, type(module), tuple(layers.cuts(module, part))
    except RepruneError:  # nothing can be cut in a module of this class
        return module, type(module), ()
