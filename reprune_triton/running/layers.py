"""The table of the kinds of layers that can run on part of their channels.

    kind          follows   cut by output channels          cut by input channels   states its width in
    norm, PReLU   yes       every vector of one entry per channel                   num_features, num_parameters
    depthwise     yes       weight, bias                                            out_channels, in_channels, groups
    conv                    weight, bias                    weight, dimension 1     out_channels; in_channels
    linear                  weight, bias                    weight, dimension 1     out_features; in_features

`analysis` and `chains` ask it which modules follow and read channels, `narrow` and `compact` how to cut them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from reprune_triton.errors import RepruneError

CHANNELWISE = (_BatchNorm, _InstanceNorm, nn.PReLU)  # they treat every channel alone, and hold only vectors
READERS = (nn.Conv2d, nn.Linear)
FORWARD_WIDTHS = ("num_features", "groups")  # attributes that a forward looks at
_STATISTICS = ("running_mean", "running_var")


class Slice(NamedTuple):
    """The active channels of one module: sorted int64 indices, or None where all are active."""

    out: Tensor | None = None  # (active output channels,)
    in_: Tensor | None = None  # (active input channels,) or input features


Slices = dict[str, Slice]  # by module name
Cuts = list[tuple[int, Tensor]]  # (dimension, indices to keep or to freeze)


class Kind(NamedTuple):
    """A row of the table."""

    out: tuple[str, ...]  # attributes that state how many channels it writes
    into: tuple[str, ...]  # and how many it reads, where that is another number
    follows: bool = False  # has one entry for each channel that it reads, and loses those that the conv before it loses

    @staticmethod
    def of(module: nn.Module) -> Kind | None:
        """Return the kind of a module; None if it cannot run on part of its channels."""
        if isinstance(module, CHANNELWISE):
            return _PRELU if isinstance(module, nn.PReLU) else _NORM
        if isinstance(module, nn.Conv2d):
            return _DEPTHWISE if is_depthwise(module) else _CONV
        return _LINEAR if isinstance(module, nn.Linear) else None


_NORM = Kind(("num_features",), (), follows=True)
_PRELU = Kind(("num_parameters",), (), follows=True)
_DEPTHWISE = Kind(("out_channels", "in_channels", "groups"), (), follows=True)
_CONV = Kind(("out_channels",), ("in_channels",))
_LINEAR = Kind(("out_features",), ("in_features",))


def is_depthwise(module: nn.Module) -> bool:
    """Whether this is a convolution whose every output channel reads its own input channel only."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def has_one_slope(module: nn.Module) -> bool:
    """Whether this is a PReLU with one slope for all channels: nothing of it belongs to one channel."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def ranking_norm(following: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Return the name of the BatchNorm whose scale ranks the channels of a conv; None if there is none.

    It is the first of the modules that follow the conv, but for other norms and PReLUs, and it has a scale.
    """
    for name, module in following:
        if isinstance(module, _BatchNorm):
            return None if module.weight is None else name
        if not isinstance(module, CHANNELWISE):
            return None
    return None


def width_read(module: nn.Module, kind: Kind) -> int:
    """Return how many channels, or features, a module of this kind reads."""
    width: int = getattr(module, (kind.into or kind.out)[0])
    return width


def cuts(module: nn.Module, part: Slice) -> dict[str, Cuts]:
    """Return which dimensions of which tensors (parameters and buffers) of `module` are cut, and by which indices.

    Raises:
        RepruneError: if the module cannot run on part of its channels.
    """
    present = {name for name, _ in tensors_of(module)}
    return {name: where for name, where in possible_cuts(module, part).items() if name in present}


def possible_cuts(module: nn.Module, part: Slice) -> dict[str, Cuts]:
    """Return `cuts`, also of a bias that is None: folding a BatchNorm into a copy gives it one."""
    if isinstance(module, nn.Identity):  # what folding leaves of the norm
        return {}
    kind = Kind.of(module)
    if kind is None:
        raise RepruneError(f"a {type(module).__name__} cannot run on part of its channels")
    own = {*module._parameters, *module._buffers}
    out: Cuts = [] if part.out is None else [(0, part.out)]
    into: Cuts = [] if part.in_ is None or kind.follows else [(1, part.in_)]
    if isinstance(module, CHANNELWISE):
        channels, vectors = (width_read(module, kind),), {*module._parameters, *_STATISTICS}
        found = {name: out for name, x in tensors_of(module) if name in vectors and x.shape == channels}
    else:
        found = {"weight": out + into, "bias": out}
    return {name: where for name, where in found.items() if where and name in own}


def narrow_widths(module: nn.Module, part: Slice) -> Iterator[tuple[str, int]]:
    """Yield the attributes that state a width of `module`, and what they state when it is narrow."""
    kind = Kind.of(module) or Kind((), ())
    for attributes, index in ((kind.out, part.out), (kind.into, part.in_)):
        if index is not None:
            yield from ((attribute, len(index)) for attribute in attributes)


def gather(tensor: Tensor, where: Cuts) -> Tensor:
    """Return the slice of `tensor` at `where`, in its memory format; differentiable, the gradient is zero elsewhere."""
    part = tensor
    for dim, index in where:
        part = part.index_select(dim, index.to(tensor.device))
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    return part


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of the module itself, by name."""
    for named in (module._parameters, module._buffers):
        for name, tensor in named.items():
            if tensor is not None:
                yield name, tensor


def others(index: Tensor, size: int) -> Tensor:
    """Return the indices in [0, size) that are not in `index`, sorted."""
    rest = torch.ones(size, dtype=torch.bool, device=index.device)
    rest[index] = False
    return rest.nonzero().flatten()
