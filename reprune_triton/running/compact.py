"""Make a network compact: a copy of the model, or the model itself, with smaller tensors and no hooks of ours.

    parameters (n_out, ...) --gather--> parameters (active, ...), with gradients, hooks and the optimizer's state
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reprune_triton.errors import RepruneError
from reprune_triton.running.layers import Cuts, Slices, cuts, gather, narrow_widths, tensors_of
from reprune_triton.running.optimizers import Optimizers
from reprune_triton.running.shadows import forget_compiled, remove_hooks, uncover

# Full parameter -> the compact one (which may be the same object), and the indices that it keeps.
Moves = dict[nn.Parameter, tuple[nn.Parameter, Cuts]]


class _Copying(TorchFunctionMode):
    """Lets deepcopy copy tensors that autograd has made, detached: a feature map that a model keeps, say.

    Args:
        tensors: False: no tensor is copied, the copy of the model has the same ones.
    """

    def __init__(self, tensors: bool):
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not (self.tensors and args[0].is_leaf):
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone() if self.tensors else tensor
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model that keeps tensors of autograd."""
    with _Copying(tensors=True):
        return copy.deepcopy(model)


def check_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with the same tensors.

    Raises:
        RepruneError: if it cannot be copied, as `compact` does.
    """
    try:
        with _Copying(tensors=False):
            return copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:
        raise RepruneError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), which making it narrow "
            "needs: take off the model what has been put on it since the pruner was built"
        ) from error


def compact(model: nn.Module, slices: Slices) -> nn.Module:
    """Return a compact copy of `model`: an ordinary module with smaller parameters and no hooks of ours.

    Raises:
        RepruneError: if `model` lacks one of the modules in `slices`.
    """
    absent = set(slices) - {name for name, _ in model.named_modules()}
    if absent:
        raise RepruneError(
            f"this {type(model).__name__} has no module {min(absent)}: give a model of the structure that is pruned "
            "(of a wrapper the module inside, such as ema.module)"
        )
    for module in model.modules():
        uncover(module)
    slim = copied(model)
    remove_hooks(slim)
    for name, module in slim.named_modules():
        if name in slices:
            part, full = slices[name], dict(tensors_of(module))
            resize(module, {key: gather(full[key].detach(), cut) for key, cut in cuts(module, part).items()})
            for attribute, width in narrow_widths(module, part):
                setattr(module, attribute, width)
    return slim


class Shrinking:
    """Makes `model` compact in place, when it is called.

    Its tensors stay the same objects: an optimizer, or a list for clipping, that holds them goes on with them, and they
    keep their hooks and attributes. Called again it does only what is not done yet.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, slices: Slices):
        self.parts: list[tuple[Tensor, Tensor, Cuts]] = []  # a tensor, its slice, and the indices of that
        self.widths: list[tuple[nn.Module, str, int]] = []
        for name, part in slices.items():
            module = model.get_submodule(name)
            tensors = dict(tensors_of(module))
            self.parts += [(tensors[key], gather(tensors[key], cut), cut) for key, cut in cuts(module, part).items()]
            self.widths += [(module, attribute, width) for attribute, width in narrow_widths(module, part)]

    def moves(self) -> "Moves":
        """Return the moves of the parameters that are not compact yet."""
        return {p: (p, cut) for p, part, cut in self.parts if isinstance(p, nn.Parameter) and p.shape != part.shape}

    def __call__(self) -> None:
        forget_compiled()
        for tensor, part, cut in self.parts:
            grad = tensor.grad if tensor.is_leaf and tensor.shape != part.shape else None
            if grad is not None:
                tensor.grad = None
            if tensor.shape != part.shape:
                vars(tensor).update(_attached(tensor, cut))
            if tensor.requires_grad:
                torch.autograd.graph.get_gradient_edge(tensor).node.register_prehook(_refuse)
                # A change of type makes autograd drop the node that has the old shape.
                other = torch.float32 if part.dtype == torch.float64 else torch.float64
                tensor.data = torch.empty(0, dtype=other, device=part.device)
            tensor.data = part
            if grad is not None:
                tensor.grad = gather(grad, cut)
        for module, attribute, width in self.widths:
            setattr(module, attribute, width)


def _refuse(*_: object) -> None:
    raise RepruneError(
        'this backward is of a forward from before compact="auto" made the model narrow: call step() after backward()'
    )


def resize(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors`, of any shape, in the place of the module's parameters and buffers of those names."""
    for name, tensor in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            module._parameters[name] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
        else:
            module._buffers[name] = tensor


def moves(model: nn.Module, slim: nn.Module, slices: Slices) -> Moves:
    """Return the moves from the parameters of `model` to those of its compact copy `slim`."""
    where: dict[str, Cuts] = {}
    for name, part in slices.items():
        prefix = f"{name}." if name else ""
        where |= {prefix + key: cut for key, cut in cuts(model.get_submodule(name), part).items()}
    new = dict(slim.named_parameters())
    return {old: (new[name], where.get(name, [])) for name, old in model.named_parameters()}


def _attached(tensor: Tensor, cut: Cuts) -> dict[str, Tensor]:
    """Return the slices of those attributes of a tensor that are tensors of its shape: some optimizers make such."""
    found = {name: value for name, value in vars(tensor).items() if torch.is_tensor(value)}
    return {name: gather(value, cut) for name, value in found.items() if value.shape == tensor.shape}


def carry(moves: Moves, gradients: bool) -> None:
    """Give the compact parameters the attributes and hooks of the full ones, and slices of the gradients if asked."""
    for old, (new, cut) in moves.items():
        vars(new).update(vars(old) | _attached(old, cut))
        # The same dicts: the handles of the hooks still remove them.
        new._backward_hooks = old._backward_hooks
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
        if gradients and old.grad is not None:
            new.grad = gather(old.grad, cut)


def carry_optimizers(optimizers: Optimizers, moves: Moves) -> None:
    """Make the optimizers train the compact parameters: same groups and options, states sliced like the weights."""
    optimizers.carry({old: (new, functools.partial(gather, where=cut)) for old, (new, cut) in moves.items()})
