"""Ctrl-C, SystemExit and handlers that raise, at every line: an event is done or not, and training goes on.

A trace function raises where Python would run a signal handler: before any line of the package.
"""

import copy
import functools
import importlib
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reprune_triton
from reprune_triton import REPrune
from reprune_triton.running import shadows

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
PARTS = ("pruner", *(f"running/{name}" for name in ("narrow", "setting", "freezing", "shadows", "compact", "pack")))
OURS = tuple(f"{reprune_triton.__path__[0]}/{part}.py" for part in PARTS)


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.0)
    return model


class Training:
    """A model that is half pruned, with momentum, and weight decay that would move what is frozen."""

    def __init__(self, **options):
        self.model = network()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.1, momentum=0.9, weight_decay=0.1, foreach=False
        )  # fmt: skip
        options = {"sparsity": 0.5, "every": 1, "until": 4, "regrow": 0.4, "impl": "reference"} | options
        self.pruner = REPrune(self.model, self.optimizer, example_inputs=X[:2], **options)
        for _ in range(2):
            self.train()
            self.pruner.step()
        self.train()

    def train(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model.train()(X), Y).backward()
        self.optimizer.step()

    def state(self):
        pruner = self.pruner.state_dict()
        pruner["history"] = [{k: v for k, v in e.items() if k not in ("ms", "stages")} for e in pruner["history"]]
        return flat({"pruner": pruner, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def frozen(self):
        """What must not move while it is pruned."""
        found = {}
        for layer in self.pruner.channels.prunable:
            gone = [i for i in range(layer.n_out) if i not in self.pruner.active[layer.name].tolist()]
            for name in (layer.name, *layer.followers):
                for key, tensor in self.model.get_submodule(name).state_dict().items():
                    if tensor.dim():
                        found[f"{name}.{key}"] = tensor[gone].clone()
            reader = self.model.get_submodule(layer.readers[0].name)
            found[f"read of {layer.name}"] = reader.weight[:, gone].detach().clone()
        return found

    def works(self):
        """Whether the model runs on the pruner's channels, forgets nothing and freezes what it should."""
        before = self.frozen()
        out = self.model.eval()(X)
        assert torch.equal(self.pruner.compact()(X), out)
        self.train()
        assert same(self.frozen(), before)
        assert not any("weight" in vars(module) for module in self.model.modules())
        return True


def flat(state):
    """Every leaf by its path, copied."""
    paths, _ = torch.utils._pytree.tree_flatten_with_path(state)
    return {str(path): copy.deepcopy(leaf) for path, leaf in paths}


def same(a, b):
    def equal(x, y):
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


class Interrupt:
    """Raises before the n-th line that `work` reaches in these functions of the package, each line counted once."""

    def __init__(self, work, n, error, functions):
        self.seen, self.n, self.error, self.functions, self.came = set(), n, error, functions, False
        sys.settrace(self.trace)
        try:
            work()
        except error:
            self.came = True
        finally:
            sys.settrace(None)

    def trace(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.endswith(OURS) or (self.functions and code.co_name not in self.functions):
            return None
        if event == "line" and (code, frame.f_lineno) not in self.seen:
            self.seen.add((code, frame.f_lineno))
            if len(self.seen) == self.n:
                raise self.error
        return self.trace


def interrupts(work, *functions, error=KeyboardInterrupt):
    """The numbers of all lines at which `Interrupt` came, one after another, until `work` comes to its end."""
    n = 1
    while Interrupt(work, n, error, functions).came:
        yield n
        n += 1
    assert n > 3, "it never came there"


EVENT = ("step", "_event", "prepare", "add", "register", "enforce", "settle_step", "_forget", "_clear")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_event_is_done_wholly_or_not_at_all(error):
    run = Training()
    saved = {name: copy.deepcopy(getattr(run, name).state_dict()) for name in ("pruner", "model", "optimizer")}

    def rewind():
        for name, state in saved.items():
            getattr(run, name).load_state_dict(copy.deepcopy(state))

    before = run.state()
    run.pruner.step()
    after = run.state()
    rewind()
    assert same(run.state(), before) and not same(before, after)
    seen = []
    for line in interrupts(run.pruner.step, *EVENT, error=error):
        found = run.state()
        seen.append(same(found, after))
        assert seen[-1] or same(found, before), f"half an event, interrupted at line {line}"
        assert run.works(), line
        rewind()
    assert same(run.state(), after)
    assert seen == sorted(seen) and set(seen) == {True, False}, "first not, then wholly"


def test_an_interrupted_step_of_the_optimizer_moves_nothing_that_is_frozen():
    run = Training()
    before = run.frozen()
    momentum = {p: s["momentum_buffer"].clone() for p, s in run.optimizer.state.items()}
    for line in interrupts(run.optimizer.step, "_hold", "_put_back", "settle_step", "_clear", "_states"):
        F.cross_entropy(run.model.train()(X), Y).backward()
        if line % 2:
            run.optimizer.step()
        run.pruner.state_dict()
        assert same(run.frozen(), before)
    assert any(not torch.equal(run.optimizer.state[p]["momentum_buffer"], value) for p, value in momentum.items())


def test_what_moved_in_an_interrupted_step_is_put_back(monkeypatch):
    """By whatever comes next: a step, an event, saving the model, or another optimizer."""
    module = importlib.import_module("torch.optim.sgd")
    inside = module.sgd

    def interrupted(*args, **kwargs):
        inside(*args, **kwargs)
        raise KeyboardInterrupt

    for following in ("state_dict", "train", "step", "compact", "another"):
        run = Training()
        before = run.frozen()
        active = {name: index.clone() for name, index in run.pruner.active.items()}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "sgd", interrupted)
            run.optimizer.step()
        assert not same(run.frozen(), before)
        if following == "step":
            run.pruner.step()
            for layer in run.pruner.channels.prunable:
                gone = [i for i in range(layer.n_out) if i not in active[layer.name].tolist()]
                now = run.model.get_submodule(layer.norm).weight[gone]
                assert torch.equal(now, before[f"{layer.norm}.weight"])
        else:
            another = functools.partial(setattr, run.pruner, "optimizer", torch.optim.SGD(run.model.parameters(), 0.1))
            come = {"state_dict": run.model.state_dict, "train": run.train, "compact": run.pruner.compact}
            (come | {"another": another})[following]()
            assert same(run.frozen(), before)


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_works_after_one_that_was_interrupted(training):
    run = Training()
    model = run.model.train(training)
    expected = run.pruner.compact().train(training)(X)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for line in interrupts(lambda: model(X), error=KeyboardInterrupt):
        if line % 3 == 0:
            run.pruner.state_dict()  # shows the model's own tensors again
            assert not any("weight" in vars(module) for module in model.modules())
        if line % 3 == 1:
            assert torch.allclose(run.pruner.compact().train(training)(X), expected, atol=1e-6)
        assert torch.allclose(model(X), expected, atol=1e-6), line
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        assert not any("weight" in vars(module) for module in model.modules())


def test_other_threads_go_on_after_a_forward_that_was_interrupted(monkeypatch):
    """They wait for a while, as it might still be inside of the module."""
    monkeypatch.setattr(shadows.Shadow, "PATIENCE", 0.1)
    run, found = Training(), []
    model = run.model.eval()
    expected = model(X)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(X)
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join(5)
    assert len(found) == 2 and all(torch.equal(y, expected) for y in (*found, model(X)))


@pytest.mark.filterwarnings("ignore:.* before the last pruning event")
@pytest.mark.parametrize("how", ["off", "auto"])
def test_an_interrupted_finalize_goes_on(how):
    wanted = Training(compact=how, until=9).pruner.finalize().eval()(X)
    n, came = 1, True
    while came:
        run = Training(compact=how, until=9)
        came = Interrupt(run.pruner.finalize, n, KeyboardInterrupt, ("end", "change", "__call__", "finish")).came
        if came and n % 2:
            assert torch.allclose(run.model.eval()(X), wanted, atol=1e-6)
            run.train()
        found = run.pruner.finalize() if came else run.model
        if came:
            own = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
            assert own == {id(p) for p in found.parameters()}
            assert all(run.optimizer.state[p]["momentum_buffer"].shape == p.shape for p in found.parameters())
        if came and not n % 2:
            assert torch.allclose(found.eval()(X), wanted, atol=1e-6)
        n += 1
    assert n > 4
