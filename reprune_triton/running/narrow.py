"""Run a network on its active channels only, while it trains.

Parameters keep their full shape: state_dict keys, optimizer, DDP and EMA see no difference. A narrow module gathers the
slices of its tensors just before its forward and drops them just after (`shadows`), so that activations between layers
are narrow, and autograd scatters the gradients back. On CUDA one launch gathers the slices of the whole network, and
one scatters their gradients (`pack`). What is pruned is frozen in the steps of the optimizer (`freezing`).

    weight (n_out, n_in, kh, kw) --gather--> (active out, active in, kh, kw) --conv--> narrow activations

This equals training the dense network with the mask applied after BatchNorm and activation (docs/method.md).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from reprune_triton.running.freezing import Freezing
from reprune_triton.running.layers import Slices, cuts, others
from reprune_triton.running.optimizers import Optimizers
from reprune_triton.running.pack import Pack
from reprune_triton.running.setting import Current, Entries, Setting
from reprune_triton.running.shadows import Gathering, forget_compiled, register, remove_own, uncover


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
        optimizers = optimizer if isinstance(optimizer, Optimizers) else Optimizers(optimizer, model.parameters())
        sample = min(model.parameters(), key=lambda p: (not p.requires_grad, p.numel()))
        self.freezing = Freezing(self.current, optimizers, sample)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"setting": self.current.setting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        setting = state.pop("setting")
        self.__dict__ |= state
        self.current.setting = setting

    def set(self, slices: Slices, frozen: Slices | None = None) -> None:
        """Make exactly these modules narrow, in place of those that were narrow before.

        Args:
            slices: the channels they run on.
            frozen: the others, which keep their values from now on, and whose momentum every step leaves at zero.
                Without it they are found here, and the device is waited for.
        """
        self.enforce(self.prepare(slices, frozen))

    def prepare(
        self, slices: Slices, frozen: Slices | None = None, forgotten: Slices | None = None, state: Any = None
    ) -> Setting:
        """Return the setting for these channels, as in `set`. Nothing changes until `enforce` is given it.

        Args:
            forgotten: the channels whose momentum is set to zero once.
            state: anything to keep with these channels.
        """
        self.settle()
        number = self.current.setting.number + 1
        gathering = Gathering(self._impl, number, self.current)
        if slices:
            register(self._model, gathering)
            for name, module in self._modules.items():
                gathering.add(module, slices.get(name))
        if frozen is None:
            entries = [(p, dim, others(index, p.shape[dim])) for p, dim, index in self._entries(slices)]
        else:
            entries = self._entries(frozen)
        freezer = Pack([[(dim, index)] for _, dim, index in entries], self._impl)
        forget_compiled()
        return Setting(number, entries, freezer, self._entries(forgotten or {}), state)

    def enforce(self, setting: Setting) -> None:
        """Run on the channels of this setting from now on."""
        self.current.setting = setting
        self.settle()

    def end(self, change: Callable[[], None], optimizer_only: bool = False) -> None:
        """Close, and make `change` with it.

        If that is interrupted it is made again, before the next forward or step at the latest; so `change` must come
        out the same when it is made twice.
        """
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
        """The caller's own state, which goes with the channels in force."""
        return self.current.setting.state

    @state.setter
    def state(self, state: Any) -> None:
        self.current.setting = self.current.setting._replace(state=state)

    def settle(self) -> None:
        """Finish what an interrupt has left undone, in a step of the optimizer, in an event, or in a forward."""
        self.freezing.settle_step()
        number = self.current.setting.number
        for module in self._modules.values():
            uncover(module)
            remove_own(module, lambda hook: hook.current is not self.current or hook.number != number)

    def close(self, optimizer_only: bool = False) -> None:
        """Remove the hooks: all of them, or only those on the optimizer."""
        self.freezing.close()
        for module in self._modules.values() if not optimizer_only else ():
            remove_own(module)

    def _entries(self, slices: Slices) -> Entries:
        """Return which indices of which parameters belong to these channels."""
        found = []
        for name, part in slices.items():
            module = self._modules[name]
            for tensor, cut in cuts(module, part).items():
                parameter = module._parameters.get(tensor)
                if parameter is not None:
                    found += [(parameter, dim, index) for dim, index in cut]
        return found
