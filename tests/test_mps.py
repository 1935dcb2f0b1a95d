"""A GPU without float64, as Apple's are: the model stays there, events run on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The device is played by a subclass of Tensor: on the outside it is there, and refuses float64 and a meeting with
# tensors from elsewhere; inside it is on the CPU. In a process of its own, since a kind of device is made for good.
PROGRAM = """
import copy

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from reprune_triton import REPrune
from reprune_triton.training import models

WHERE = torch.device("privateuseone", 0)


class Module(backend_registration._DummyBackendModule):
    def get_rng_state(self):  # as in torch.mps, of no device
        return torch.get_rng_state()

    def set_rng_state(self, state):
        torch.set_rng_state(state)


class There(Tensor):
    @staticmethod
    def __new__(cls, own):
        form = dict(strides=own.stride(), dtype=own.dtype, device=WHERE)
        return Tensor._make_wrapper_subclass(cls, own.size(), **form)

    def __init__(self, own):
        self.own = own

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class Play(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    here = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in here if isinstance(x, There)]
    moves = any(name in str(operation) for name in ("copy", "aten.index.", "index_put"))  # indices may be on the CPU
    if there and not moves and any(not isinstance(x, There) and x.dim() for x in here):
        raise RuntimeError(f"{operation}: Expected all tensors to be on the same device")

    def inside(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.own if isinstance(x, There) else x

    args, named = tree_map(inside, (args, kwargs))
    found = operation(*args, **named)
    device = kwargs.get("device")
    on = bool(there) if device is None else torch.device(device).type == WHERE.type

    def back(x):
        if not isinstance(x, Tensor) or not on:
            return x
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a Tensor to float64: the framework does not support it")
        known = [own for own in there if own.own is x]
        return known[0] if known else There(x)

    return tree_map(back, found)


def network():
    torch.manual_seed(0)
    model = models.build("resnet8", 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model, torch.randn(4, 3, 8, 8)


def pruned(model, x, **options):
    pruner = REPrune(model, None, example_inputs=x, every=1, until=2, seed=3, **options)
    for _ in range(2):
        pruner.step()
        model(x)
        kept = copy.deepcopy(model)
    active = {name: index.tolist() for name, index in pruner.active.items()}
    slim, y = pruner.finalize().eval(), model.eval()(x)
    assert torch.allclose(slim(x).cpu(), y.cpu(), atol=1e-5) and y.device == x.device
    assert torch.allclose(kept.eval()(x).cpu(), y.cpu(), atol=1e-5)
    return active, [event.layers for event in pruner.history], slim


backend_registration._setup_privateuseone_for_python_backend(backend_module=Module())
for options in {"sparsity": 0.5, "tie": "norm"}, {"flops": 0.6, "tie": "gamma", "regrow_by": "coverage"}:
    expected = pruned(*network(), **options)
    with Play():
        model, x = network()
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = There(tensor.detach())
                        tensors[name] = nn.Parameter(moved) if tensors is module._parameters else moved
        try:
            next(model.parameters()).double()
        except TypeError:
            found = pruned(model, There(x), **options)
        else:
            raise AssertionError("this device has float64")
        assert all(p.device == WHERE for p in found[2].parameters())
    assert found[:2] == expected[:2], options
"""


def test_events_run_on_the_cpu_and_choose_the_same():
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
