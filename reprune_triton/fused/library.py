"""Our operators in torch.library: torch.compile, fake tensors and dispatch modes see them; eager calls pass them by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """A function of tensors, the first of which decides where it runs, and the custom operator that it is.

    The call of an operator written in Python takes longer than most of our kernels run. So where nothing looks at
    operators, the function is called directly. Autograd does not see it then: call it inside an autograd function.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.op.register_fake
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if unseen(args[0]) else self.op(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that makes a function an `Operator` of this name."""
    return lambda function: Operator(name, function)


def unseen(x: Tensor) -> bool:
    """Whether nothing looks at the operators that are called with x: no compiler, tensor subclass or mode."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not _functorch() and not _modes()


_functorch, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
