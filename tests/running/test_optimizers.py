"""Whatever optimizer trains: pruned channels stay as they are, come back without a past, and the narrow model goes on
with the same groups and states."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from trained import (
    Rule,
    Several,
    Unhooked,
    X,
    Y,
    after_an_event,
    network,
    pruned,
    pruner_of,
    same,
    sgd,
    train,
    values,
)

from reprune_triton import RepruneError
from reprune_triton.running.layers import Slice
from reprune_triton.running.narrow import Narrowing


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
        states = [x for p in model.parameters() for y in narrowing.freezing.optimizers.members for x in kept_for(y, p)]
        found.append([*model.parameters(), *states])
    assert len(found[0]) > 8 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_fast_iterate_of_frozen_weights_is_the_weight():
    model, optimizer, pruner = after_an_event(ScheduleFree)
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
    model, optimizer, pruner = after_an_event(Late, compact=compact)
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
    model, optimizer, pruner = after_an_event()
    before = values(pruner)

    def closure():
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(closure)
    train(model, optimizer)
    assert same(values(pruner), before)
