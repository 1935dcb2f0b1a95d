"""Freeze what is pruned: a step of the optimizer leaves its values as they are, and its momentum at zero.

    before the step    the values are copied
    after it           they are put back, and what the optimizer remembers of them is made as if they had no past
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprune_triton import capture
from reprune_triton.running.optimizers import Optimizers, State
from reprune_triton.running.pack import Pack
from reprune_triton.running.setting import Current, Entries


class _Held(NamedTuple):
    """Copies of what is frozen, from before an optimizer's step until after it."""

    optimizer: Any
    frozen: Entries
    freezer: Pack
    values: Any  # the freezer's buffer, or one tensor for each entry
    together: bool  # whether it is the buffer
    captured: bool  # the copies are made only when a CUDA graph is replayed


class Freezing:
    """Hooks on the steps of `optimizers` that freeze what the setting in force says.

    Args:
        sample: a parameter whose gradient tells whether there has been a backward since the last step.
    """

    def __init__(self, current: Current, optimizers: Optimizers, sample: Tensor):
        self.current = current
        self._sample = sample
        self._used: tuple[Tensor, int] | None = None  # its gradient in the last step, and the version of that
        self._held: _Held | None = None
        self._handles: list[Any] = []
        self.follow(optimizers)

    def follow(self, optimizers: Optimizers) -> None:
        """Freeze in the steps of these optimizers, and no longer in those of the ones before."""
        self.close()
        self.optimizers = optimizers
        self._handles = optimizers.hook(self._hold, self._put_back)

    def close(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def settle_step(self) -> None:
        """Finish what an interrupt has left undone: an end, a step, or the forgetting of momentum."""
        self.current.finish()
        self._put_back()
        self._forget()

    def spent(self) -> bool:
        """Whether the gradients of the model are those of the last step, and nothing has been added since."""
        now = self._gradient()
        return now is not None and self._used is not None and now[0] is self._used[0] and now[1] == self._used[1]

    def _gradient(self) -> tuple[Tensor, int] | None:
        grad = self._sample.grad
        return None if grad is None else (grad, grad._version)

    @torch.no_grad()
    def _hold(self, optimizer: Any, *_: object) -> None:
        """Copy what is frozen, before a step."""
        self.current.finish()
        held, capturing = self._held, capture.capturing()
        if held is not None and held.optimizer is not optimizer and not _failed(held):  # a step within a wrapper's
            return
        if held is not None and held.captured:  # by a capture that has failed
            self._held = None
        self._put_back()  # after a step that was interrupted
        self._forget()
        # Read at every step, not once per event: so it does not matter in which order a checkpoint is loaded.
        frozen, freezer = self.current.setting.frozen, self.current.setting.freezer
        parameters = [p for p, _, _ in frozen]
        together = freezer.hold(parameters)
        apart = (p.index_select(dim, index.to(p.device)) for p, dim, index in frozen)
        values = tuple(apart) if together is None else together
        self._held = _Held(optimizer, frozen, freezer, values, together is not None, capturing)

    @torch.no_grad()
    def _put_back(self, optimizer: Any = None, *_: object) -> None:
        """Put back what is held, after a step. If that is interrupted, it is done again."""
        if self._held is None or _failed(self._held):
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
        _clear(frozen, states)
        if optimizer is None or optimizer is holder:  # and not after a step within a wrapper's
            self._held, self._used = None, self._gradient()

    def _forget(self) -> None:
        """Set to zero the momentum of the filters that coverage did not choose at the last event."""
        setting = self.current.setting
        if setting.forgotten:
            _clear(setting.forgotten, self._states(setting.forgotten))
            self.current.setting = setting._replace(forgotten=[])

    def _states(self, entries: Entries) -> list[tuple[int, State]]:
        """Return what the optimizers remember of these parameters, each with its entry's number."""
        return self.optimizers.states([parameter for parameter, _, _ in entries])


def _failed(held: _Held) -> bool:
    """Whether it was held by a capture that has failed."""
    return held.captured and not capture.capturing()


@torch.no_grad()
def _clear(entries: Entries, states: Iterable[tuple[int, State]]) -> None:
    """Set these states, at the indices of their entries, to what they are for a channel without a past."""
    for number, (tensor, fresh) in states:
        parameter, dim, index = entries[number]
        if fresh is None:
            values = parameter.index_select(dim, index.to(parameter.device))
            tensor.index_copy_(dim, index.to(tensor.device), values.to(tensor))
        else:
            tensor.index_fill_(dim, index.to(tensor.device), fresh)
