"""The model inside what is wrapped around it, and the copy of it inside an average."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from reprune_triton.errors import RepruneError


def opened(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the model inside DataParallel, DistributedDataParallel, AveragedModel (EMA) and torch.compile.

    Also return what these put before the names of its modules, from outside to inside.
    """
    prefixes: list[str] = []
    while True:
        wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel))
        inside = "module" if wrapped else "_orig_mod"
        if inside not in model._modules:
            return model, prefixes
        model = model.get_submodule(inside)
        prefixes.append(f"{inside}.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers."""
    return opened(model)[0]


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the process group of the DistributedDataParallel in `model`; None without one."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    return None


def average_in(given: Any, model: nn.Module) -> nn.Module:
    """Return the copy of `model` in an average of it: a module of the average, or of what it holds.

    Raises:
        RepruneError: if there is none.
    """
    own = shapes(model)
    held = (given,) if isinstance(given, nn.Module) else getattr(given, "__dict__", {}).values()
    for outer in held:
        for module in outer.modules() if isinstance(outer, nn.Module) else ():
            if module is not model and shapes(module) == own:
                return module
    raise RepruneError(
        f"ema= holds a {type(given).__name__} without a copy of this {type(model).__name__}: give the module whose "
        "parameters and buffers have the model's names and shapes, ema.module for instance"
    )


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all parameters and buffers, by name."""
    return {name: x.shape for named in (model.named_parameters(), model.named_buffers()) for name, x in named}
