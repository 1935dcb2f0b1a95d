"""The result of `analysis`: which output channels can go, who reads them, and what they cost."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reprune_triton.running.layers import Slice, Slices

PRUNABLE = "prunable"


class Reader(NamedTuple):
    """A conv or linear that reads a prunable conv's channels."""

    name: str
    repeat: int  # input features per channel: 1, or height * width after a flatten


@dataclass(frozen=True)
class Prunable:
    """A conv whose output channels can go, with everything that goes with them."""

    name: str
    n_out: int
    n_in: int
    area: int  # kh * kw
    norm: str | None  # the BatchNorm after it, whose scale |gamma| ranks the channels
    followers: tuple[str, ...]  # norms, PReLUs and depthwise convs that lose the same channels
    readers: tuple[Reader, ...]

    @staticmethod
    def of(
        name: str, conv: nn.Conv2d, norm: str | None, followers: Sequence[str], readers: Sequence[Reader]
    ) -> "Prunable":
        """Return `conv` as a prunable conv."""
        area = conv.kernel_size[0] * conv.kernel_size[1]
        return Prunable(name, conv.out_channels, conv.in_channels, area, norm, tuple(followers), tuple(readers))


Finder = Callable[[str, nn.Conv2d], Prunable | str]  # gives what goes with a conv's channels, or why they cannot go


class Cost(NamedTuple):
    """Multiply-adds of one conv or linear for one sample at full width, and which prunable convs set its widths."""

    name: str
    macs: int
    out: str | None  # the prunable conv whose width is this module's output width
    into: str | None  # ... its input width


@dataclass(frozen=True)
class Channels:
    """The result of `analysis.analyse`."""

    prunable: tuple[Prunable, ...]
    reasons: dict[str, str]  # every conv's name -> "prunable", or why not
    costs: tuple[Cost, ...]

    def slices(self, active: Mapping[str, Tensor]) -> Slices:
        """Return the slices that all modules run on when layer `name` has only the channels active[name].

        Args:
            active: of every prunable conv, by name: sorted int64 indices (width,).
        """
        return self._spread({x.name: active[x.name] for x in self.prunable if len(active[x.name]) < x.n_out})

    def frozen(self, pruned: Mapping[str, Tensor]) -> Slices:
        """Return the slices that all modules leave out when layer `name` is without the channels pruned[name].

        Args:
            pruned: of every prunable conv, by name: sorted int64 indices (n_out - width,).
        """
        return self._spread({x.name: pruned[x.name] for x in self.prunable if len(pruned[x.name])})

    def _spread(self, channels: Mapping[str, Tensor]) -> Slices:
        """Return these channels of these layers as slices of every module that writes, follows or reads them."""
        out: dict[str, Tensor] = {}
        into: dict[str, Tensor] = {}
        for layer in self.prunable:
            if layer.name not in channels:
                continue
            index = channels[layer.name]
            out |= dict.fromkeys((layer.name, *layer.followers), index)
            for name, repeat in layer.readers:
                features = index
                if repeat > 1:  # channel c: features c*repeat + 0, 1, ...
                    features = (index[:, None] * repeat + torch.arange(repeat, device=index.device)).flatten()
                into[name] = features
        return {name: Slice(out.get(name), into.get(name)) for name in {**out, **into}}

    def inputs(self, active: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Return the active input channels of every prunable conv; None where all are active."""
        slices = self.slices(active)
        return {layer.name: slices.get(layer.name, Slice()).in_ for layer in self.prunable}

    def macs(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return the multiply-adds per sample of every conv and linear at these widths (the papers' "FLOPs")."""
        full = {layer.name: layer.n_out for layer in self.prunable}
        found = {}
        for cost in self.costs:
            macs = cost.macs
            for name in (cost.out, cost.into):
                if name is not None:
                    macs = macs * widths[name] // full[name]  # exact: macs is a multiple of both widths
            found[cost.name] = macs
        return found

    def flops(self, widths: Mapping[str, int]) -> float:
        """Return the share of the dense network's FLOPs that is left at these widths, in (0, 1]."""
        return sum(self.macs(widths).values()) / sum(cost.macs for cost in self.costs)

    def terms(self) -> list[tuple[int, int | None, int | None]]:
        """Return `macs` as products of widths, for `widths.Budget`.

        Each is (factor, number of a prunable conv or None, number of another or None).
        """
        number = {layer.name: i for i, layer in enumerate(self.prunable)} | {None: None}
        full = {layer.name: layer.n_out for layer in self.prunable} | {None: 1}
        return [(c.macs // (full[c.out] * full[c.into]), number[c.out], number[c.into]) for c in self.costs]

    def only(self, objection: Callable[[Prunable], str | None]) -> "Channels":
        """Return these channels without the layers for which `objection` gives a reason, which is noted."""
        refused = {layer.name: reason for layer in self.prunable if (reason := objection(layer)) is not None}
        return replace(
            self,
            prunable=tuple(layer for layer in self.prunable if layer.name not in refused),
            reasons=self.reasons | refused,
            costs=tuple(
                c._replace(out=None if c.out in refused else c.out, into=None if c.into in refused else c.into)
                for c in self.costs
            ),
        )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the module name is one of the patterns or fits one (`*` and `?` as in file names)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (tuple, list)) else []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(mapped(item, change) for item in value)
    return change(value) if torch.is_tensor(value) else value
