"""The kinds of layers that can run on part of their channels: what states their width, and how each is cut."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprune_triton.errors import RepruneError

# Modules that treat every channel alone and hold only per-channel vectors.
CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
# The attributes that state a width, per direction.
OUT_WIDTHS = ("out_channels", "out_features", "num_features", "num_parameters")
IN_WIDTHS = ("in_channels", "in_features")
READ_WIDTHS = (*IN_WIDTHS, "num_features", "num_parameters")  # how many channels a module reads
_STATISTICS = ("running_mean", "running_var")


class Slice(NamedTuple):
    """The active channels of one module: sorted int64 indices, or None where all are active."""

    out: Tensor | None = None  # (active output channels,)
    in_: Tensor | None = None  # (active input channels,) or input features


Slices = dict[str, Slice]  # by module name
Cuts = list[tuple[int, Tensor]]  # (dimension, indices to keep or to freeze)


def is_depthwise(module: nn.Module) -> bool:
    """True for a convolution whose every output channel reads its own input channel only."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def cuts(module: nn.Module, part: Slice) -> dict[str, Cuts]:
    """Which dimensions of which tensors (parameters and buffers) of `module` are sliced, and by which indices."""
    present = {name for name, _ in tensors_of(module)}
    return {name: where for name, where in possible_cuts(module, part).items() if name in present}


def possible_cuts(module: nn.Module, part: Slice) -> dict[str, Cuts]:
    """`cuts`, also of a bias that is None: folding a BatchNorm into a copy gives it one."""
    out: Cuts = [] if part.out is None else [(0, part.out)]
    into: Cuts = [] if part.in_ is None else [(1, part.in_)]
    if isinstance(module, CHANNELWISE):
        channels = (width_of(module, OUT_WIDTHS),)
        own = {*module._parameters, *_STATISTICS}
        found = {name: out for name, tensor in tensors_of(module) if name in own and tensor.shape == channels}
    elif is_depthwise(module):
        found = {"weight": out, "bias": out}
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        found = {"weight": out + into, "bias": out}
    elif isinstance(module, nn.Identity):  # of a copy whose norm has been folded into its convolution
        found = {}
    else:
        raise RepruneError(f"a {type(module).__name__} cannot run on part of its channels")
    own = {*module._parameters, *module._buffers}
    return {name: where for name, where in found.items() if where and name in own}


def gather(tensor: Tensor, where: Cuts) -> Tensor:
    """The slices of `tensor` at `where`, in its memory format; differentiable, the gradient is zero elsewhere."""
    part = tensor
    for dim, index in where:
        part = part.index_select(dim, index.to(tensor.device))
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    return part


def narrow_widths(module: nn.Module, part: Slice) -> Iterator[tuple[str, int]]:
    """The attributes of a module that state a width, and what they state when it is narrow."""
    depthwise = is_depthwise(module)
    into = IN_WIDTHS if not depthwise else ()
    across = ("groups", "in_channels") if depthwise else ()
    for attributes, index in ((OUT_WIDTHS + across, part.out), (into, part.in_)):
        for attribute in attributes:
            if index is not None and hasattr(module, attribute):
                yield attribute, len(index)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (module._parameters, module._buffers):
        for name, tensor in named.items():
            if tensor is not None:
                yield name, tensor


def width_of(module: nn.Module, attributes: tuple[str, ...]) -> int:
    """How many channels the module has in this direction, if it has a width at all."""
    return next((getattr(module, name) for name in attributes if hasattr(module, name)), 0)


def others(index: Tensor, size: int) -> Tensor:
    """The indices in [0, size) that are not in `index`, sorted."""
    rest = torch.ones(size, dtype=torch.bool, device=index.device)
    rest[index] = False
    return rest.nonzero().flatten()
