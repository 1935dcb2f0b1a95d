"""The changes that an event makes to a narrow model, put in force by one assignment."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from reprune_triton.running.pack import Pack

Entries = list[tuple[nn.Parameter, int, Tensor]]  # (parameter, dimension, indices)


class Setting(NamedTuple):
    """The changes of an event. One assignment puts them in force, so an interrupt finds all of them made or none."""

    number: int  # of the event: hooks of other numbers do nothing
    frozen: Entries
    freezer: Pack  # of the frozen slices
    forgotten: Entries  # whose momentum is still to be set to zero
    state: Any  # what the caller keeps with these channels


class Current:
    """The setting in force, which all hooks of one model share."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.unfinished: Callable[[], None] | None = None  # the end of narrowing, until it is done

    def finish(self) -> None:
        """Finish the end of narrowing where an interrupt has left it undone. It can be done again."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model runs on the same channels, and freezes nothing
        return Current, (Setting(self.setting.number, [], Pack([], "torch"), [], None),)
