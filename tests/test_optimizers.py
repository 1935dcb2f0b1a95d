"""Whatever optimizer trains: pruned channels stay as they are, come back without a past, and the narrow model goes on
with the same groups and states."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from reprune_triton import REPrune, RepruneError
from reprune_triton.narrow import Narrowing, Slice
from reprune_triton.optimizers import Optimizers

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def network(kind=Net, **options):
    torch.manual_seed(0)
    model = kind(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1)


def pruner_of(model, optimizer, **options):
    return REPrune(model, optimizer, example_inputs=X[:1], **{"sparsity": 0.5, "every": 1, "until": 3, **options})


def train(model, optimizer, steps=3):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure) if getattr(optimizer, "wants_closure", False) else optimizer.step()


def pruned(pruner):
    """Of all that is pruned: name, parameter, dimension and indices."""
    for layer in pruner.channels.prunable:
        gone = [i for i in range(layer.n_out) if i not in pruner.active[layer.name].tolist()]
        for name in (layer.name, *layer.followers):
            for key, p in pruner.model.get_submodule(name).named_parameters(recurse=False):
                yield f"{name}.{key}", p, 0, torch.tensor(gone)
        for reader in layer.readers:
            yield f"{reader.name}.weight", pruner.model.get_submodule(reader.name).weight, 1, torch.tensor(gone)


def values(pruner):
    return [p.detach().index_select(dim, index) for _, p, dim, index in pruned(pruner)]


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def leaves(state):
    if isinstance(state, dict):
        return [x for value in state.values() for x in leaves(value)]
    if isinstance(state, (list, tuple)):
        return [x for value in state for x in leaves(value)]
    return [state] if torch.is_tensor(state) else []


def kept_for(optimizer, p):
    """All tensors that it keeps for this parameter, wherever."""

    def look(value):
        if not isinstance(value, dict):
            return []
        return leaves(value.get(p)) + [x for key, item in value.items() if isinstance(key, str) for x in look(item)]

    return look({key: value for key, value in vars(optimizer).items() if key != "param_groups"})


# ---------------------------------------------------------------------- optimizers as people write them


class Unhooked(torch.optim.Optimizer):
    """Wraps an optimizer, and leaves out the base class's __init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Duck:
    """Wraps an optimizer, and is none of torch's."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self):
        self.inner.step()


class SharedDict:
    """Shares what the optimizer inside has, and imitates its class (as Lightning's do)."""

    def __init__(self, inner):
        self.__dict__ = {key: value for key, value in vars(inner).items() if key != "step"}
        self.__class__ = type(f"Shared{type(inner).__name__}", (SharedDict, type(inner)), {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Imitating:
    """Imitates the class too, and asks the optimizer inside for all else."""

    def __init__(self, inner):
        self.inner = inner
        self.__class__ = type(f"Imitating{type(inner).__name__}", (Imitating, type(inner)), {})

    def __getattr__(self, name):
        return getattr(vars(self)["inner"], name)

    def step(self, closure=None):
        return self.inner.step(closure)


class Decaying(Duck):
    """Changes the weights itself, after the step of the optimizer inside."""

    def step(self):
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)


class Lookahead(Unhooked):
    """Every third step, half the way back to slow weights."""

    def __init__(self, base_optimizer):
        self.base_optimizer, self.count = base_optimizer, 0

    optimizer = property(lambda self: self.base_optimizer)

    @torch.no_grad()
    def step(self, closure=None):
        self.base_optimizer.step(closure)
        self.count += 1
        for p in self.param_groups[0]["params"] if self.count % 3 == 0 else ():
            slow = self.state[p].setdefault("slow", p.clone())
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class SAM(torch.optim.Optimizer):
    """Two gradients a step; shares groups and state with the optimizer inside."""

    wants_closure = True

    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, 0.05, momentum=0.9, weight_decay=0.1)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @torch.no_grad()
    def step(self, closure):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()


class Several:
    """Steps several optimizers at once."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    param_groups = property(lambda self: [group for x in self.optimizers for group in x.param_groups])

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


class Named(Duck):
    """Steps several optimizers at once, which it keeps by name."""

    param_groups = property(lambda self: [group for x in self.inner.values() for group in x.param_groups])

    def zero_grad(self):
        for optimizer in self.inner.values():
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.inner.values():
            optimizer.step()


class Own:
    """An optimizer of one's own from the ground up."""

    def __init__(self, parameters):
        self.param_groups, self.state = [{"params": list(parameters), "lr": 0.05}], {}

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            average = self.state.setdefault(p, {}).setdefault("average", torch.zeros_like(p))
            average.mul_(0.9).add_(p.grad + 0.1 * p)
            p.sub_(average, alpha=0.05)


class Rule(torch.optim.Optimizer):
    """An optimizer whose step is `self.update(p, state)`."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, {"lr": 0.05, "weight_decay": 0.1, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p])

    def update(self, p, state):
        p.sub_(p.grad + 0.1 * p, alpha=0.05)


class OtherNames(Rule):
    """Averages in lists and dicts and under names of their own; one is another tensor after every step."""

    def update(self, p, state):
        if not state:
            state.update(count=0, velocities={0.5: torch.zeros_like(p), 0.9: torch.zeros_like(p)}, past=[p.clone() * 0])
        state["count"] += 1
        for beta, velocity in state["velocities"].items():
            velocity.mul_(beta).add_(p.grad + 0.1 * p)
            p.sub_(velocity, alpha=0.02)
        state["past"][0] = p.grad.clone()


class ScheduleFree(Rule):
    """The parameter stands between a fast iterate z and the average x of z; `eval` moves it to x."""

    def update(self, p, state):
        z = state.setdefault("z", p.clone())
        p.lerp_(z, 0.2).sub_(p.grad, alpha=0.01)
        z.sub_(p.grad + 0.1 * p, alpha=0.05)

    @torch.no_grad()
    def eval(self):
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.state[p]["z"], 1 - 1 / 0.9)


class Elsewhere(Rule):
    """Keeps first weights and averages by parameter, but not in the state of the parameter."""

    def __init__(self, parameters):
        super().__init__(parameters)
        first = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.averages, self.state["all"] = {}, {"count": 0, "first": first}

    def update(self, p, state):
        self.state["all"]["count"] += 1
        average = self.averages.setdefault(p, torch.zeros_like(p))
        average.mul_(0.9).add_(p.grad + 0.1 * p)
        p.sub_(average, alpha=0.02).lerp_(self.state["all"]["first"][p], 0.01)


class OnesFirst(Rule):
    """Its average begins at one."""

    def update(self, p, state):
        square = state.setdefault("square", torch.ones_like(p))
        square.lerp_(p.grad.square(), 0.1)
        p.sub_(p.grad / (square + 1e-8).sqrt(), alpha=0.02)


class Divides(Rule):
    """Divides by an average that is never zero."""

    def update(self, p, state):
        square = state.setdefault("square", torch.ones_like(p))
        p.sub_(p.grad / square.sqrt(), alpha=0.02)
        square.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)


class DualAverages(Rule):
    """Weights are the first ones less a sum of all gradients."""

    def update(self, p, state):
        if not state:
            state.update(first=p.clone(), sum_of_gradients=torch.zeros_like(p))
        state["sum_of_gradients"].add_(p.grad)
        p.copy_(state["first"] - 0.05 * state["sum_of_gradients"])


class Factored(Rule):
    def update(self, p, state):
        if p.dim() > 1:
            state["row"] = p.grad.square().mean(1)
            state["column"] = p.grad.square().mean(0)
        super().update(p, state)


class Eightbit(Rule):
    def update(self, p, state):
        state["average"] = p.grad.mul(100).clamp(-127, 127).to(torch.int8)
        state["scale"] = p.grad.new_ones(-(-p.numel() // 16))
        super().update(p, state)


class Matrices(Rule):
    def update(self, p, state):
        state["factors"] = [torch.eye(n) for n in p.shape]
        super().update(p, state)


class Projector:
    def __init__(self, p):
        self.basis = torch.eye(p.shape[0])


class Objects(Rule):
    def update(self, p, state):
        state["projector"] = Projector(p)
        super().update(p, state)


class OneForAll(Rule):
    """Keeps one vector over all parameters with the first of them, as L-BFGS does."""

    def update(self, p, state):
        everything = self.param_groups[0]["params"]
        self.state[everything[0]]["direction"] = torch.zeros(sum(q.numel() for q in everything))
        super().update(p, state)


class Beside(Rule):
    """Keeps slow weights in a list of its own."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Late(Rule):
    """Factored, but from its tenth step on: no trial shows it."""

    def update(self, p, state):
        state["count"] = state.get("count", 0) + 1
        if state["count"] >= 10 and p.dim() > 1:
            state["row"] = p.grad.square().mean(1)
        super().update(p, state)


WRAPPERS = {
    "torch's": lambda p: sgd(p),
    "unhooked": lambda p: Unhooked(sgd(p)),
    "duck": lambda p: Duck(sgd(p)),
    "decaying": lambda p: Decaying(sgd(p)),
    "wrapped twice": lambda p: Duck(Unhooked(sgd(p))),
    "shared dict": lambda p: SharedDict(sgd(p)),
    "imitating": lambda p: Imitating(sgd(p)),
    "lookahead": lambda p: Lookahead(sgd(p)),
    "sam": lambda p: SAM(p),
    "several": lambda p: Several([sgd(p[:3]), torch.optim.AdamW(p[3:], 0.01)]),
    "several in a dict": lambda p: Named({"first": sgd(p[:5]), "second": sgd(p[5:])}),
    "own": lambda p: Own(p),
    "other names": lambda p: OtherNames(p),
    "schedule free": lambda p: ScheduleFree(p),
    "dual averages": lambda p: DualAverages(p),
    "elsewhere": lambda p: Elsewhere(p),
    "ones first": lambda p: OnesFirst(p),
}


def check_all(model, optimizer, given=None):
    """Freezing, states of the frozen, and handing over."""
    pruner = pruner_of(model, optimizer if given is None else given)
    members = pruner._optimizers.members
    train(model, optimizer)
    pruner.step()
    before = values(pruner)
    train(model, optimizer, 4)
    assert same(values(pruner), before)
    for _ in range(2):
        train(model, optimizer, 2)
        pruner.step()
    train(model, optimizer, 2)
    kept = 0
    for member in members:
        for name, p, dim, index in pruned(pruner):
            for value in kept_for(member, p):
                if value.shape == p.shape:
                    left = value.index_select(dim, index)
                    assert torch.equal(left, p.detach().index_select(dim, index)) or left.abs().max() == 0, name
                    kept += 1
    assert kept
    old = {name: [x.clone() for m in members for x in kept_for(m, p)]
           for name, p in model.named_parameters()}  # fmt: skip
    expected = model.eval()(X)
    slim = pruner.finalize()
    assert torch.allclose(slim.eval()(X), expected, atol=1e-6)
    own = {id(p) for p in slim.parameters()}
    for member in members:
        assert {id(p) for group in member.param_groups for p in group["params"]} <= own
        assert {id(p) for p in getattr(member, "state", {}) if p != "all"} <= own
    assert {id(p) for m in members for group in m.param_groups for p in group["params"]} == own
    active = pruner.active
    for name, p in slim.named_parameters():
        now = [x for m in members for x in kept_for(m, p)]
        assert len(now) == len(old[name])
        for value, wide in zip(now, old[name], strict=True):
            rows = {"conv1": active["conv1"], "bn1": active["conv1"]}.get(name.split(".")[0])
            if value.dim() and rows is not None:
                assert torch.equal(value, wide[rows])
    weights = [p.detach().clone() for p in slim.parameters()]
    train(slim.train(), optimizer, 4)
    for (name, p), weight in zip(slim.named_parameters(), weights, strict=True):
        assert not torch.equal(p, weight) or name == "conv2.bias"  # BatchNorm takes it off again


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_optimizer_freezes_forgets_and_goes_on(name):
    model = network()
    check_all(model, WRAPPERS[name](list(model.parameters())))


@pytest.mark.parametrize("as_given", [list, tuple, lambda x: {"body": x[0], "head": x[1]}])
def test_several_optimizers_are_given_together(as_given):
    model = network()
    parameters = list(model.parameters())
    both = [sgd(parameters[:4]), torch.optim.AdamW(parameters[4:], 0.01)]
    check_all(model, Several(both), as_given(both))
    with pytest.raises(RepruneError, match="does not train conv2.bias"):
        model = network()
        pruner_of(model, sgd(list(model.parameters())[:4]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_sharded_optimizer(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        check_all(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05, nesterov=True, foreach=True),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05, fused=True),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True, amsgrad=True),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1),
    lambda p: torch.optim.ASGD(p, 0.01, weight_decay=0.1),
])  # fmt: skip
def test_every_optimizer_of_torch(make):
    model = network()
    check_all(model, make(model.parameters()))


def test_a_penalty_on_scales_moves_nothing_that_is_pruned():
    """As network slimming adds it to the gradients (Liu et al., ICCV 2017)."""
    model = network(width=16)
    with torch.no_grad():
        model.bn1.weight[::2] *= -1
        model.bn2.weight[:4] = 0
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer, regrow=0.0)

    def slim_down(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            for norm in (model.bn1, model.bn2):
                norm.weight.grad += 1e-2 * norm.weight.detach().sign()
            optimizer.step()

    slim_down(2)
    for _ in range(3):
        pruner.step()
        before, weight = values(pruner), model.bn1.weight.detach().clone()
        slim_down(3)
        assert same(values(pruner), before) and not torch.equal(model.bn1.weight, weight)
    expected = model.eval()(X)
    assert torch.allclose(pruner.finalize().eval()(X), expected, atol=1e-6)


def test_what_a_new_channel_starts_with_is_no_average():
    """Step sizes and first sums stand at a number that is not zero, and come back to it."""
    for make, key, fresh in (
        (lambda p: torch.optim.Rprop(p, 0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, 0.02, initial_accumulator_value=0.5), "sum", 0.5),
    ):
        model = network()
        optimizer = make(model.parameters())
        pruner = pruner_of(model, optimizer)
        train(model, optimizer)
        pruner.step()
        train(model, optimizer)
        assert not torch.all(optimizer.state[model.conv1.weight][key] == fresh)
        for _, p, dim, index in pruned(pruner):
            assert torch.all(optimizer.state[p][key].index_select(dim, index) == fresh)


@pytest.mark.parametrize("name", ["other names", "lookahead", "schedule free", "dual averages", "torch's"])
def test_channels_come_back_without_a_past(name):
    model = network(width=16)
    optimizer = WRAPPERS[name](list(model.parameters()))
    pruner = pruner_of(model, optimizer, until=20, regrow=0.4, every=1)
    back = 0
    train(model, optimizer, 4)
    for _ in range(6):
        active = {layer: set(index.tolist()) for layer, index in pruner.active.items()}
        train(model, optimizer, 2)
        pruner.step()
        states = next(x.state for x in reversed(pruner._optimizers.members))
        for layer, index in pruner.active.items():
            weight = model.get_submodule(layer).weight
            for channel in set(index.tolist()) - active[layer]:
                for value in leaves(states[weight]):
                    if value.shape == weight.shape:
                        own = value[channel]
                        assert own.abs().max() == 0 or torch.equal(own, weight[channel])
                        back += 1
    assert back > 10


@pytest.mark.parametrize("make", [
    ScheduleFree, lambda p: torch.optim.Rprop(p, 0.02), lambda p: Decaying(sgd(list(p))),
])  # fmt: skip
def test_the_kernels_put_back_what_the_reference_does(make):
    found = []
    for impl in ("torch", "triton"):
        model = network()
        optimizer = make(model.parameters())
        narrowing = Narrowing(model, optimizer, impl)
        train(model, optimizer, 1)
        part = Slice(torch.arange(0, 8, 2))
        narrowing.set({"conv1": part, "bn1": part, "conv2": Slice(in_=torch.arange(0, 8, 2))})
        train(model, optimizer, 1)
        states = [x for p in model.parameters() for y in narrowing._optimizers.members for x in kept_for(y, p)]
        found.append([*model.parameters(), *states])
    assert len(found[0]) > 8 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_fast_iterate_of_frozen_weights_is_the_weight():
    model = network()
    optimizer = ScheduleFree(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    pruner.step()
    before = values(pruner)
    train(model, optimizer)
    optimizer.eval()
    assert same(values(pruner), before)


@pytest.mark.parametrize("make, message", [
    (Factored, r"Factored keeps a state row \(4,\) for fc.weight \(4, 8\), which cannot follow .*: use SGD, AdamW"),
    (Eightbit, r"Eightbit keeps a state average \(8,\) of Tensor int8 for \w+.\w+ \(8,\)"),
    (Matrices, r"Matrices keeps a state factors.0 \(8, 8\) for \w+.\w+ \(8,\)"),
    (Divides, r"Divides makes NaN of \w+.\w+ when its averages are set to zero"),
    (Objects, r"Objects keeps a state projector.basis \(\d, \d\) for"),
    (OneForAll, r"OneForAll keeps a state direction \(\d+,\) for conv1.weight"),
    (Beside, r"Beside keeps a tensor for \w+.weight in slow.0.\d, and not by parameter"),
    (lambda p: Duck(Factored(p)), "Factored keeps a state row"),
    (lambda p: [Matrices(p)], "Matrices keeps a state"),
    (torch.optim.LBFGS, r"LBFGS keeps a state \w+ \(\d+,\) for conv1.weight"),
    (torch.optim.Adafactor, "Adafactor keeps a state"),
])  # fmt: skip
def test_a_state_that_cannot_follow_channels_is_refused_before_the_training(make, message):
    model = network()
    with pytest.raises(RepruneError, match=message):
        pruner_of(model, make(model.parameters()))


@pytest.mark.parametrize("make", [OneForAll, torch.optim.LBFGS])
def test_a_state_for_all_parameters_is_refused_wherever_it_is_kept(make):
    model = network()
    parameters = [model.fc.bias, *(p for p in model.parameters() if p is not model.fc.bias)]
    with pytest.raises(RepruneError, match=f"{make.__name__} keeps a state .* for all parameters together"):
        pruner_of(model, make(parameters))


@pytest.mark.parametrize("compact", ["off", "auto"])
def test_a_state_that_comes_late_is_refused_at_the_next_step(compact):
    model = network()
    optimizer = Late(model.parameters())
    pruner = pruner_of(model, optimizer, compact=compact)
    train(model, optimizer)
    pruner.step()
    train(model, optimizer, 8)
    with pytest.raises(RepruneError, match="Late keeps a state row"):
        pruner.step()
    assert pruner.epoch == 1 and len(pruner.history) == 1
    pruner.optimizer = optimizer = sgd(model.parameters())
    for _ in range(2):
        train(model, optimizer)
        pruner.step()
    slim = pruner.finalize()
    assert slim.conv1.out_channels == len(pruner.active["conv1"]) < 8
    train(slim, optimizer)


def test_trying_an_optimizer_leaves_no_trace():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    weights, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    pruner_of(model, optimizer)
    assert not optimizer.state and not calls and torch.equal(generator, torch.get_rng_state())
    assert optimizer.state_dict()["param_groups"] == groups and scheduler.last_epoch == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_optimizers_and_pruners_can_be_pickled():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    assert pickle.loads(pickle.dumps(pruner)).epoch == 0 and pickle.loads(pickle.dumps(optimizer)).state


def test_schedulers_do_not_mind_a_wrapped_step():
    model = network()
    optimizer = Unhooked(sgd(model.parameters()))
    before = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, 0.5)
    pruner = pruner_of(model, optimizer)
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer)
    before.step(), after.step()
    pruner._narrowing.close()
    train(model, optimizer)  # the second scheduler's step holds ours, which is off
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 4)


def test_groups_schedulers_scaler_and_accumulation_go_on():
    model = network()
    decay, rest = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.003}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.006], total_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    pruner = pruner_of(model, optimizer, until=2)

    def loop(model, infinite=False):
        optimizer.zero_grad(set_to_none=False)
        for part in (slice(0, 4), slice(4, 8)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(X[part]), Y[part]) / 2
            scaler.scale(loss).backward()
        if infinite:
            model.conv2.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer), scaler.update(), scheduler.step()

    loop(model)
    pruner.step()
    before, weight = values(pruner), model.fc.weight.detach().clone()
    loop(model, infinite=True)
    assert torch.equal(model.fc.weight, weight)
    loop(model)
    assert same(values(pruner), before) and not torch.equal(model.fc.weight, weight)
    pruner.step()
    lengths = [len(group["params"]) for group in optimizer.param_groups]
    steps = {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    average = optimizer.state[model.conv2.weight]["exp_avg"].clone()
    slim = pruner.finalize()
    assert [len(group["params"]) for group in optimizer.param_groups] == lengths
    assert {name: float(optimizer.state[p]["step"]) for name, p in slim.named_parameters()} == steps
    rows, columns = pruner.active["conv2"], pruner.active["conv1"]
    assert torch.equal(optimizer.state[slim.conv2.weight]["exp_avg"], average[rows][:, columns])
    rates = [group["lr"] for group in optimizer.param_groups]
    loop(slim)
    assert rates != [group["lr"] for group in optimizer.param_groups]


def test_a_closure_that_fails_leaves_the_frozen_as_they_are():
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    pruner.step()
    before = values(pruner)

    def closure():
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(closure)
    train(model, optimizer)
    assert same(values(pruner), before)


# ---------------------------------------------------------------------- checked again while training


def test_another_optimizer_that_takes_over_is_noticed():
    model = network()
    first = sgd(model.parameters())
    pruner = pruner_of(model, first, until=9)
    for _ in range(2):
        train(model, first)
        pruner.step()
    second = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, second)
    with pytest.raises(RepruneError, match=r"not by the optimizer that was given \(SGD\)"):
        pruner.step()
    assert pruner.epoch == 2
    pruner.optimizer = second
    before = values(pruner)
    train(model, second)
    assert same(values(pruner), before)
    pruner.step()
    with pytest.warns(UserWarning, match="before the last pruning event"):
        slim = pruner.finalize()
    assert {id(p) for p in second.param_groups[0]["params"]} == {id(p) for p in slim.parameters()}


def test_training_without_an_optimizer_given_is_noticed():
    model = network()
    pruner, optimizer = pruner_of(model, None), sgd(model.parameters())
    pruner.step()
    model.load_state_dict(network().state_dict())  # no training
    pruner.step()
    train(model, optimizer)
    with pytest.raises(RepruneError, match=r"not by the optimizer that was given \(None\)"):
        pruner.step()


def test_an_epoch_without_a_step_is_none_of_another_optimizer():
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    for _ in range(2):
        pruner.step()
        F.cross_entropy(model(X), Y).backward()  # every step of this epoch was skipped, say


@pytest.mark.parametrize("order", [("model", "pruner"), ("pruner", "model"), ("model",)])
def test_a_checkpoint_that_is_taken_up_is_no_training(order):
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer, until=1)
    train(model, optimizer)
    pruner.step()
    parts = {"model": model, "pruner": pruner}
    best = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    train(model, optimizer)
    pruner.step()
    for name in order:
        parts[name].load_state_dict(best[name])
    pruner.finalize()


def test_layers_that_are_unfrozen_need_an_optimizer():
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("fc"))
    head = sgd([p for p in model.parameters() if p.requires_grad])
    pruner = pruner_of(model, head)
    train(model, head)
    pruner.step()
    body = sgd([p for p in model.parameters() if not p.requires_grad])
    model.requires_grad_(True)
    both = Several([head, body])
    train(model, both)
    with pytest.raises(RepruneError, match="does not train conv1.weight.*pruner.optimizer = "):
        pruner.step()
    pruner.optimizer = [head, body]
    before = values(pruner)
    train(model, both)
    assert same(values(pruner), before) and pruner.step().epoch == 2


def to_sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def new_head(model):
    model.fc = nn.Linear(8, 7)


def normalised(model):
    nn.utils.parametrizations.weight_norm(model.conv2)


def masked(model):
    prune.l1_unstructured(model.conv1, "weight", 0.5)


def headless(model):
    del model.fc


@pytest.mark.parametrize("change, message", [
    (to_sync, "bn1 was a BatchNorm2d when the pruner was built, and is a SyncBatchNorm now"),
    (new_head, "fc was a Linear .* and is another Linear now"),
    (normalised, "conv2 was a Conv2d .* and is a ParametrizedConv2d now"),
    (masked, "conv1 was a Conv2d .* and is one with other tensors now"),
    (headless, "fc was a Linear .* and is gone now"),
])  # fmt: skip
def test_modules_that_are_not_the_analysed_ones_any_more(change, message):
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    pruner.step()
    change(model)
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(RepruneError, match=message):
            call()
    assert pruner.epoch == 1


def test_what_profilers_leave_on_modules_is_no_change_of_theirs():
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    pruner.step()
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros((), dtype=torch.float64))
    train(model, optimizer)
    assert pruner.step().epoch == 2
    model.bn1.register_parameter("importance", nn.Parameter(torch.ones(8)))  # an entry a channel: it would be narrow
    with pytest.raises(RepruneError, match="bn1 was a BatchNorm2d .* and is one with other tensors now"):
        pruner.step()


class Keeps(Net):
    """Keeps feature maps on itself, for a picture or a loss."""

    def forward(self, x):
        self.features = {"first": [F.relu(self.bn1(self.conv1(x)))]}
        self.again = self.features["first"][0]
        return self.fc(F.relu(self.bn2(self.conv2(self.again))).mean((2, 3)))


def spectral(**options):
    model = Net(**options)
    nn.utils.spectral_norm(model.fc)
    return model


@pytest.mark.parametrize("kind", [Keeps, spectral])
@pytest.mark.parametrize("compact", ["off", "auto"])
def test_a_model_that_keeps_tensors_of_autograd_is_made_narrow(kind, compact):
    model = network(kind)
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer, until=1, ema=AveragedModel(model), compact=compact)
    train(model, optimizer)
    pruner.step()
    expected = model.eval()(X)
    assert torch.allclose(pruner.compact().eval()(X), expected, atol=1e-6)
    slim = pruner.finalize().eval()
    assert torch.allclose(slim(X), expected, atol=1e-6)
    if kind is Keeps and compact == "off":
        assert slim.again.shape[1] == len(pruner.active["conv1"])


def test_a_model_that_cannot_be_copied_any_more_is_refused_at_the_next_step():
    model = network()
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer)
    train(model, optimizer)
    pruner.step()
    model.lock = threading.Lock()
    with pytest.raises(RepruneError, match="Net cannot be copied .*lock"):
        pruner.step()
    del model.lock
    assert pruner.step().epoch == 2


class Average(nn.Module):
    """An average of a model as a module around a copy."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, other in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(other if not mine.is_floating_point() else mine.lerp(other, 0.5))


class PlainAverage:
    """The same, and no module."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)


def test_averages_are_found_in_what_holds_them():
    model = network()
    optimizer = sgd(model.parameters())
    average, plain, swa = Average(model), PlainAverage(model), AveragedModel(model)
    pruner = pruner_of(model, optimizer, until=2, compact="auto", ema=[average, plain, swa, copy.deepcopy(model)])
    for _ in range(3):
        train(model, optimizer)
        average.update(model)
        swa.update_parameters(model)
        pruner.step()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes["conv1.weight"][0] < 8
    for copied in (average.module, plain.ema, swa.module):
        assert {name: p.shape for name, p in copied.named_parameters()} == shapes
    for _ in range(40):
        average.update(model)
    assert torch.allclose(average.module.eval()(X), model.eval()(X), atol=1e-5)
    assert pruner.compact(swa).conv1.weight.shape == shapes["conv1.weight"]


def in_a_list(model):
    kept = [p.detach().clone() for p in model.parameters()]
    return lambda: [mine.lerp_(p.detach(), 0.5) for mine, p in zip(kept, model.parameters(), strict=True)]


def in_a_list_at_once(model):
    kept = [p.detach().clone() for p in model.parameters()]
    return lambda: torch._foreach_lerp_(kept, [p.detach() for p in model.parameters()], 0.5)


def swapped_in(model):
    kept = [p.detach().clone() for p in model.parameters()]
    return lambda: [p.data.copy_(mine) for mine, p in zip(kept, model.parameters(), strict=True)]


def averaged(model):
    average = AveragedModel(model)
    return lambda: average.update_parameters(model)


def averaged_by_timm(model):
    average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)
    return lambda: average.update(model)


@pytest.mark.parametrize("make", [in_a_list, in_a_list_at_once, swapped_in, averaged, averaged_by_timm])
def test_an_average_that_was_not_given_keeps_its_shapes_and_says_so(make):
    model = network()
    optimizer, update = sgd(model.parameters()), make(model)
    pruner = pruner_of(model, optimizer, until=1, compact="auto")
    train(model, optimizer)
    update()
    pruner.step()
    train(model, optimizer)
    with pytest.raises(RuntimeError, match="must match"):
        update()


@pytest.mark.parametrize("make", [
    lambda model: nn.Sequential(nn.Conv2d(3, 8, 3)),
    lambda model: Average(network(width=16)),
    lambda model: [p.detach().clone() for p in model.parameters()],
    lambda model: model,
])  # fmt: skip
def test_what_is_no_average_of_the_model_is_refused_at_once(make):
    model = network()
    with pytest.raises(RepruneError, match="without a copy of this Net"):
        pruner_of(model, sgd(model.parameters()), compact="auto", ema=make(model))


def test_an_average_that_has_changed_is_refused_before_anything_is_narrow():
    model = network()
    optimizer, average = sgd(model.parameters()), Average(model)
    pruner = pruner_of(model, optimizer, until=1, compact="auto", ema=average)
    train(model, optimizer)
    average.module.fc = nn.Linear(8, 7)
    with pytest.raises(RepruneError, match="without a copy of this Net"):
        pruner.step()
    assert pruner.epoch == 0 and model.conv1.weight.shape[0] == 8


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("compact", ["off", "auto"])
@pytest.mark.parametrize("share", [{"sparsity": 0.5}, {"sparsity": None, "flops": 0.4}])
def test_ending_before_the_target_is_met_says_so(compact, share):
    model = network(width=16)
    optimizer = sgd(model.parameters())
    pruner = pruner_of(model, optimizer, until=9, every=2, compact=compact, **share)
    asked = "sparsity=0.5" if share["sparsity"] else "flops=0.4"
    for _ in range(3):
        train(model, optimizer)
        pruner.step()
    pruned = f"{pruner.history[-1].sparsity:.1%}"
    with pytest.warns(UserWarning, match=f"after epoch 3, .*until=9: {pruned} .*{asked} was asked for"):
        pruner.finalize()


def test_a_result_that_is_thrown_away_is_noticed():
    for wrap in (lambda x: x, Unhooked):
        model = network()
        optimizer = wrap(sgd(model.parameters()))
        pruner = pruner_of(model, optimizer, until=1)
        train(model, optimizer)
        pruner.step()
        pruner.finalize()
        with pytest.warns(UserWarning, match=r"from before finalize\(\) is being trained, which changes nothing"):
            train(model, optimizer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, 1)  # once is enough


def test_a_result_that_is_taken_is_not():
    model = network()
    optimizer, old = sgd(model.parameters()), weakref.ref(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for _ in range(2):  # the narrow model is pruned again
        pruner = pruner_of(model, optimizer, until=1, sparsity=0.2)
        train(model, optimizer)
        pruner.step()
        slim = pruner.finalize()
        optimizer.step()  # nothing to do, and nobody trained
        with torch.no_grad():
            model(X)  # a teacher, say
        train(slim, optimizer)
        scheduler.step()
        model = slim
    del pruner
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("compact", ["off", "auto"])
def test_tensors_attached_to_parameters_are_made_narrow_with_them(compact):
    class Attaching(Rule):
        def update(self, p, state):
            p.average = getattr(p, "average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
            p.sub_(p.average, alpha=0.05)

    model = network()
    optimizer = Attaching(model.parameters())
    pruner = pruner_of(model, optimizer, until=1, compact=compact)
    train(model, optimizer)
    average = model.conv2.weight.average.clone()
    pruner.step()
    slim = pruner.finalize()
    rows, columns = pruner.active["conv2"], pruner.active["conv1"]
    assert torch.equal(slim.conv2.weight.average, average[rows][:, columns])
    train(slim, optimizer)


def test_what_is_no_optimizer_or_trains_another_model():
    model = network()
    for wrong in ("sgd", model, torch.optim.SGD, []):
        with pytest.raises(RepruneError, match="is no optimizer: it has no param_groups"):
            pruner_of(model, wrong)
    with pytest.raises(RepruneError, match="trains none of this model's parameters"):
        Optimizers([sgd(network().parameters())], model.parameters())
