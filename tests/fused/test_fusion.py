"""A fused network is the network, whoever does what to whose activations."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from running.test_narrow import Oracle, calm, largest_difference, sgd, some, train_step
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from reprune_triton import REPrune, fuse, unfuse
from reprune_triton.errors import RepruneError
from reprune_triton.fused import fusion, norm
from reprune_triton.running import analysis
from reprune_triton.running.compact import compact
from reprune_triton.running.narrow import Narrowing
from reprune_triton.training import models

NETS = {  # how to build it; how many operations remain behind BatchNorms that are not fused into them
    "resnet8": lambda: models.build("resnet8", num_classes=10),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=10, dropout=0.0).features,
}


@pytest.mark.parametrize("name", NETS)
def test_a_fused_network_is_the_network(name):
    torch.manual_seed(0)
    plain = NETS[name]().double()
    fused = fuse(copy.deepcopy(plain), impl="torch")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        a, b = plain(x), fused(x)
        assert torch.equal(a, b)
        grads = (torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((a, plain), (b, fused)))
        assert all(torch.equal(u, v) for u, v in zip(*grads, strict=True))
    assert list(plain.state_dict()) == list(fused.state_dict()) and repr(plain) == repr(fused)
    assert all(torch.equal(u, v) for u, v in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True))


def calls_of(model, x):
    """(residual?, act) of every BatchNorm, and how many ReLUs run apart from one."""
    calls, apart = [], []
    original = norm.by_pytorch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "by_pytorch", lambda *a: calls.append((a[1] is not None, a[2].act)) or original(*a))
        handles = [
            m.register_forward_hook(lambda *_: apart.append(1)) for m in model.modules() if isinstance(m, nn.ReLU)
        ]
        model(x)
        for handle in handles:
            handle.remove()
    return len(apart), calls


def test_additions_and_activations_are_taken_in():
    model = fuse(torchvision.models.resnet50(num_classes=10), impl="torch")
    apart, calls = calls_of(model, torch.randn(2, 3, 32, 32))
    assert apart == 0
    assert calls.count((True, "relu")) == 16 and calls.count((False, "none")) == 4  # blocks, and their shortcuts
    assert calls.count((False, "relu")) == 33 and len(calls) == 53
    model = fuse(torchvision.models.mobilenet_v2(num_classes=10), impl="torch")
    _, calls = calls_of(model, torch.randn(2, 3, 32, 32))
    assert calls.count((True, "none")) == 10 and calls.count((False, "relu6")) == 35 and len(calls) == 52


# ---------------------------------------------------------------------- through the kernels


class Block(nn.Module):
    """A Bottleneck, or with `groups` an inverted residual."""

    def __init__(self, n_in, width, n_out, stride=1, groups=1, act=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2, self.act = nn.BatchNorm2d(width), act(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = None
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.last = None if groups > 1 else self.act

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act(self.bn2(self.conv2(y)))))
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return y if self.last is None else self.last(y)


class Net(nn.Module):
    def __init__(self, groups=1, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), act())
        one, two, three = (Block(*shape, groups, act) for shape in ((4, 6, 7, 2), (7, 6, 7, 1), (7, 6, 7, 1)))
        self.blocks, self.fc = nn.Sequential(one, two, three), nn.Linear(7, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


TINY = {"bottleneck": Net, "inverted": lambda: Net(6, nn.ReLU6)}


def tiny(name, device, dtype=torch.float64):
    torch.manual_seed(0)
    model = TINY[name]().to(device, dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else nothing is left behind some ReLUs
            nn.init.uniform_(module.weight, -1, 1), nn.init.uniform_(module.bias, 0, 1)
    return model, torch.randn(3, 3, 7, 6, device=device, dtype=dtype)


def outcome(model, x, passes=2):
    """Outputs, gradients and buffers after some passes."""
    found = []
    for _ in range(passes):
        y = model(x)
        found.append(y.detach())
        if y.requires_grad:
            found += torch.autograd.grad(y.square().sum(), list(model.parameters()))
    return [*found, *(b.clone() for b in model.buffers())]


def assert_alike(found, expected, **near):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, **(near or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics"])
def test_the_kernels_make_the_same_network(device, name, mode):
    plain, x = tiny(name, device)
    fused = fuse(copy.deepcopy(plain), impl="triton")
    for model in (plain, fused):
        model.train(mode != "eval")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and mode == "frozen statistics":
                module.eval()
    assert_alike(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("name", TINY)
def test_whichever_implementation_is_chosen(device, name, monkeypatch):
    """Any mixture of kernels and PyTorch, from layer to layer, is the same network."""
    plain, x = tiny(name, device)
    expected = outcome(plain, x, passes=1)
    start = tiny(name, device)[0]
    seen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def choose(x, case, candidates, key, generator=generator):
            found = ("torch", "triton")[int(torch.randint(2, (), generator=generator))]
            seen.add((case.operation, found))
            return found

        monkeypatch.setattr("reprune_triton.fused.dispatch.choose", choose)
        fused = fuse(copy.deepcopy(start))
        assert_alike(outcome(fused, x, passes=1), expected)
    assert len(seen) == 4


def work(model, x, monkeypatch):
    """How often the kernels run over activations, by what they do."""
    from reprune_triton.kernels.step import masked_conv, norm_act

    names = ("statistics", "apply", "prologue", "epilogue", "backward", "backward inside", "two gradients")
    counts = dict.fromkeys(names, 0)

    def count(module, name, note):
        original = getattr(module, name)

        def run(*args):
            note(*args)
            return original(*args)

        monkeypatch.setattr(module, name, run)

    def note_conv(x, w, prologue, stride, padding, dilation, eps):
        counts["prologue"] += prologue is not None
        counts["epilogue"] += eps is not None

    def note_gradient(grad, w, size, stride, padding, dilation, before=None):
        counts["backward inside"] += before is not None
        counts["two gradients"] += before is not None and before.other is not None

    count(norm_act, "statistics", lambda *_: counts.update(statistics=counts["statistics"] + 1))
    count(norm_act, "apply", lambda *_: counts.update(apply=counts["apply"] + 1))
    count(masked_conv, "forward", note_conv)
    count(norm_act, "backward", lambda *_: counts.update(backward=counts["backward"] + 1))
    count(masked_conv, "input_gradient", note_gradient)
    model(x).square().sum().backward()
    return counts


def test_what_is_left_of_the_passes_over_activations(device, monkeypatch):
    """Bottlenecks: only their ends are written. Depthwise convolutions need what they read, and count nothing."""
    model, x = tiny("bottleneck", device)
    found = work(fuse(model, impl="triton"), x, monkeypatch)
    # 11 BatchNorms: the stem, 3 in each of three blocks, one in a shortcut. That and the last have no conv behind them.
    assert found == {"statistics": 0, "apply": 5, "prologue": 6, "epilogue": 11, "backward": 2, "backward inside": 9,
                     "two gradients": 3}  # fmt: skip
    monkeypatch.undo()
    model, x = tiny("inverted", device)
    found = work(fuse(model, impl="triton"), x, monkeypatch)
    assert found == {"statistics": 3, "apply": 8, "prologue": 3, "epilogue": 8, "backward": 5, "backward inside": 6,
                     "two gradients": 3}  # fmt: skip


def test_hooks_of_the_user_see_whole_activations(device):
    plain, x = tiny("bottleneck", device)
    for kind in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        seen = {}
        for fused in (False, True):
            model = copy.deepcopy(plain)
            model = fuse(model, impl="triton") if fused else model
            shapes = seen.setdefault(fused, [])

            def hook(module, *args, shapes=shapes):
                tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else [arg])]
                assert all(torch.is_tensor(t) for t in tensors if t is not None)
                shapes.append([tuple(t.shape) for t in tensors if t is not None])

            block = model.blocks[0]
            for module in (block.conv1, block.conv2, block.bn3, block.shortcut[0]):
                getattr(module, kind)(hook)
            found = outcome(model, x, passes=1)
            seen[fused, "outcome"] = found
        assert seen[True] and sorted(seen[True]) == sorted(seen[False])  # bn3 runs with its addition
        assert_alike(seen[True, "outcome"], seen[False, "outcome"])
        for batch_norm in ("bn1", "bn2"):
            model = fuse(copy.deepcopy(plain), impl="triton")
            getattr(getattr(model.blocks[1], batch_norm), kind)(lambda *_: None)
            assert_alike(outcome(model, x, passes=1), seen[False, "outcome"])


class Odd(nn.Module):
    """Some layers, and a forward made of them."""

    def __init__(self, forward, **changed):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        self.one, self.two, self.three = (nn.BatchNorm2d(4) for _ in range(3))
        self.relu, self.clamp = nn.ReLU(inplace=True), nn.ReLU6()
        self.made = forward
        for name, module in changed.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.made(self, x)


def two_readers(m, x):
    y = F.relu(m.one(m.a(x)))
    return m.b(y) + m.c(y)


def twice_by_the_second(m, x):
    y = F.relu(m.one(m.a(x)))
    return m.b(y) + F.relu(m.two(y) + y)


def residual_is_the_input(m, x):
    y = m.a(x)
    return F.relu(m.one(y) + y)


def residual_before_conv(m, x):
    y = m.one(m.a(x))
    z = m.two(x) + y
    return m.b(y) * z


def three_readers(m, x):
    y = F.relu(m.one(m.a(x)))
    return F.relu(m.two(m.b(y)) + y) + m.c(y)


def added_into_another(m, x):
    y = m.a(x)
    z = y
    y += m.one(m.b(x))
    return m.c(y.sin()) + z


def residual_written_over(m, x):
    y = m.a(x)
    z = m.one(m.b(x)) + y
    y.mul_(2)
    return F.relu(z) + y


def input_written_over(m, x):
    y = m.a(x)
    z = m.one(y)
    y.mul_(2)
    return m.b(F.relu(z)) + y


def normalised_late(m, x):
    y, z = m.a(x), m.b(x)
    n = m.one(y)
    y.mul_(2)
    return F.relu(n + m.two(z)) + y


def two_norms(m, x):
    return F.relu(m.one(m.a(x)) + m.two(m.b(x)))


def norm_after_norm(m, x):
    return m.c(m.clamp(m.two(m.one(m.a(x)))))


def number_added(m, x):
    return F.relu(m.one(m.a(x)) + x.size(0))


def broadcast(m, x):
    return F.relu(m.one(m.a(x)) + x.mean((2, 3), keepdim=True))


def shared_layers(m, x):
    y = m.relu(m.one(m.a(x)))
    y = m.relu(m.two(m.a(y)))
    return m.c(m.relu(m.two(y)))


def returned_too(m, x):
    y = F.relu(m.one(m.a(x)))
    return m.b(y) + y.exp(), y


def concatenated(m, x):
    y = F.relu(m.one(m.a(x)))
    return m.b(torch.cat((y, m.two(m.c(y))), 1)[:, 2:6])


def plain_chain(m, x):
    return m.c(F.relu(m.two(m.b(F.relu(m.one(m.a(x)))))))


OVERWRITTEN = (input_written_over, normalised_late)
CONVS = {
    "bias": lambda: nn.Conv2d(4, 4, 1),
    "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
    "same": lambda: nn.Conv2d(4, 4, 3, padding="same", bias=False),
    "valid": lambda: nn.Conv2d(4, 4, 1, padding="valid", bias=False),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
}
ODD = [*(partial(Odd, forward) for forward in (
    two_readers, twice_by_the_second, residual_is_the_input, residual_before_conv, three_readers, added_into_another,
    residual_written_over, input_written_over, normalised_late, two_norms, norm_after_norm, number_added, broadcast,
    shared_layers, returned_too, concatenated,
))]  # fmt: skip
ODD += [lambda kind=kind, f=f, at=at: Odd(f, **{at: CONVS[kind]()}) for kind in CONVS
        for f, at in ((two_readers, "b"), (two_readers, "c"), (plain_chain, "b"))]  # fmt: skip
ODD += [lambda bn=bn: Odd(plain_chain, two=bn()) for bn in (
    lambda: nn.BatchNorm2d(4, momentum=None), lambda: nn.BatchNorm2d(4, track_running_stats=False),
    lambda: nn.BatchNorm2d(4, affine=False),
)]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_networks(device, number, monkeypatch):
    """By the kernels wherever they can run, and in PyTorch."""
    torch.manual_seed(0)
    start, x = ODD[number]().double().to(device), torch.randn(2, 4, 5, 4, dtype=torch.float64, device=device)

    def flat(model, training):
        model.train(training)
        with torch.no_grad():
            blind = model(x)
        found = model(x)
        found, blind = (y if isinstance(y, tuple) else (y,) for y in (found, blind))
        results = [*(y.detach() for y in found), *blind, *(b.clone() for b in model.buffers())]
        try:
            loss = sum(y.square().sum() for y in found)
            some = list(model.parameters())
            return results + [*torch.autograd.grad(loss, some, allow_unused=True, materialize_grads=True)]
        except RuntimeError as error:  # what BatchNorm needs is written over
            assert "modified by an inplace operation" in str(error) and ODD[number].args[0] in OVERWRITTEN
            return results

    for choice in ("triton", "torch"):
        monkeypatch.setattr("reprune_triton.fused.dispatch.choose", lambda *_, choice=choice: choice)
        plain, fused = copy.deepcopy(start), fuse(copy.deepcopy(start))
        for training in (True, False):
            assert_alike(flat(fused, training), flat(plain, training))


def test_frozen_parameters_and_partial_gradients(device):
    plain, x = tiny("bottleneck", device)
    for frozen in ("conv", "bn", "stem"):
        for model in (twins := (plain, fuse(copy.deepcopy(plain), "triton"))):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
        results = []
        for model in twins:
            some = [p for p in model.parameters() if p.requires_grad]
            results.append(torch.autograd.grad(model(x).square().sum(), some))
        assert_alike(*results)


def test_wrong_shapes_are_refused_as_in_pytorch(device):
    conv, bn = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(4)
    for module, channels in ((conv, 3), (bn, 7), (bn, 1)):
        model, x = fuse(nn.Sequential(module).to(device), "triton"), torch.randn(2, channels, 4, 4, device=device)
        with pytest.raises(RepruneError, match=f"x has {channels} channels"):
            model(x)
        with pytest.raises(RuntimeError):
            fuse(model)(x)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, scale=None):
        return self.bn(x) if scale is None else self.bn(x) * scale


class Checkpoints(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.bn, self.reentrant = nn.BatchNorm2d(3), reentrant

    def forward(self, x):
        return checkpoint(self.bn, x, use_reentrant=self.reentrant)


def test_forwards_that_a_trace_would_change_are_refused():
    with pytest.raises(RepruneError, match="optional argument scale"):
        fuse(Optional())
    for reentrant in (True, False):
        with pytest.raises(RepruneError, match="checkpoints activations"):
            fuse(Checkpoints(reentrant))


def test_a_pickle_is_the_network_before(tmp_path, device):
    plain, x = tiny("bottleneck", device)
    torch.save(fuse(copy.deepcopy(plain), "triton"), tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(again(x), plain(x)) and repr(again) == repr(plain)
    assert_alike(outcome(fuse(again, "triton"), x), outcome(plain, x))


def test_activations_are_not_held_for_the_second_reader(device, monkeypatch):
    model, x = tiny("bottleneck", device)
    fuse(model, "triton").eval()
    kept = []
    original = fusion.Pending.take
    monkeypatch.setattr(fusion.Pending, "take", lambda self: kept.append(self) or original(self))
    with torch.no_grad():
        model(x)
    assert len(kept) == 9 and all(pending.given is None for pending in kept)


def test_what_is_written_over_is_not_shared(device):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            y = self.bn(x)
            z = y.mul_(2)
            return self.conv(y) + z

    torch.manual_seed(0)
    plain, x = InPlace().double().to(device), torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device)
    fused = fuse(copy.deepcopy(plain), impl="triton")
    assert_alike(outcome(fused, x), outcome(plain, x))


def test_under_autocast_activations_are_narrow_floats(device):
    plain, x = tiny("bottleneck", device, torch.float32)
    fused = fuse(copy.deepcopy(plain), impl="triton")

    def run(model):
        with torch.autocast(device, torch.bfloat16):
            y = model(x)
        return [y.detach().float(), *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))]

    exact = [y.detach() for y in outcome(plain, x, passes=1)]
    for mine, theirs, truth in zip(run(fused), run(plain), exact, strict=False):
        scale = truth.abs().max()
        error, allowed = ((t - truth).abs().max() / scale for t in (mine, theirs))
        assert mine.dtype == theirs.dtype and error <= 3 * allowed + 0.03


def test_compiled_it_is_the_same(device):
    plain, x = tiny("bottleneck", device)
    expected = outcome(plain, x, passes=1)
    start = tiny("bottleneck", device)[0]
    for impl in ("auto", "triton"):
        torch._dynamo.reset()
        compiled = torch.compile(fuse(copy.deepcopy(start), impl), backend="aot_eager")
        assert_alike(outcome(compiled, x, passes=1), expected)


def test_an_eps_that_is_changed_later_counts(device):
    plain, x = tiny("bottleneck", device)
    fused = fuse(copy.deepcopy(plain), impl="triton")
    for model in (plain, fused):
        model.blocks[0].bn2.eps = 0.5
    assert_alike(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("name", TINY)
def test_through_the_kernels_a_pruned_network_trains_alike(device, name):
    """Narrow, then physically narrow, in float64: fused by the kernels, and as it is."""

    def run(impl):
        torch.manual_seed(0)
        model = TINY[name]().double().to(device)
        x, y = torch.randn(3, 3, 8, 8, dtype=torch.float64).to(device), torch.arange(3, device=device)
        model = model if impl is None else fuse(model, impl)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        pruner = REPrune(
            model, optimizer, example_inputs=x, sparsity=0.5, until=2, every=1, compact="auto", tie="index", round_to=1
        )  # fmt: skip
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            pruner.step()
        return losses, model.state_dict(), [key for key, why in pruner.explain().items() if why == "prunable"]

    (a, state, layers), (b, fused_state, fused_layers) = run(None), run("triton")
    assert layers == fused_layers and b == pytest.approx(a, rel=1e-9)
    assert all(torch.allclose(state[key], fused_state[key], rtol=1e-7, atol=1e-9) for key in state)


def test_many_steps_narrow_masked_and_compact(device):
    """In float64, all through the kernels but the masked one; fifty on a GPU, a few in the interpreter."""
    start, x = tiny("bottleneck", device)
    calm(start, None)
    found = analysis.prunable(start, tuple(x.shape))
    assert len(found.prunable) == 6
    active = some(found, 0.5, torch.Generator().manual_seed(0))
    slices = found.slices({name: index.to(device) for name, index in active.items()})
    labels = torch.arange(len(x), device=device)
    masked, narrow = copy.deepcopy(start), fuse(copy.deepcopy(start), "triton")
    small = fuse(compact(start, slices), "triton")
    oracle = Oracle(masked, sgd(masked), found)
    oracle.prune(active)
    optimizer, other = sgd(narrow), sgd(small)
    narrowing = Narrowing(narrow, optimizer, impl="triton")
    narrowing.set(slices)
    for _ in range(50 if device == "cuda" else 2):
        loss = oracle.step(x, labels)
        for model, its in ((narrow, optimizer), (small, other)):
            assert train_step(model, its, x, labels) == pytest.approx(loss, rel=1e-9)
    assert largest_difference(narrow.state_dict(), masked.state_dict()) < 1e-9
    assert largest_difference(small.state_dict(), compact(narrow, slices).state_dict()) < 1e-9
    for model in (masked, narrow, small):
        model.eval()
    assert torch.allclose(narrow(x), masked(x), rtol=1e-9) and torch.allclose(small(x), masked(x), rtol=1e-9)


def test_a_module_that_is_exchanged_is_the_one_that_runs():
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2))
    model = fuse(nn.Sequential(first, nn.Flatten(), nn.Linear(36, 2)), impl="torch").eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    for inside, number, other in ((model, 2, nn.Linear(36, 2)), (first, 3, nn.MaxPool2d(2))):
        inside[number] = other
        after = model(x)
        assert torch.equal(after, unfuse(copy.deepcopy(model))(x)) and not torch.equal(after, before)
        before = after


def test_a_copy_and_unfuse():
    torch.manual_seed(0)
    model = fuse(models.build("resnet8", num_classes=10), impl="torch")
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    model.eval(), twin.eval()
    assert not torch.equal(model(x), twin(x)), "the copy runs on its own weights"
    expected = model(x)
    assert unfuse(model) is model and "forward" not in vars(model) and "forward" not in vars(model.bn1)
    assert torch.equal(model(x), expected)


def test_fused_or_not_averages_copies_and_pickles_of_a_pruned_network_are_the_same():
    found = []
    for impl in (None, "torch"):
        model, x = tiny("bottleneck", "cpu")
        model = model if impl is None else fuse(model, impl)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        pruner = REPrune(model, optimizer, example_inputs=x, ema=ema, sparsity=0.5, until=2, every=1, tie="index")
        for _ in range(2):
            for _ in range(2):
                train_step(model, optimizer, x, torch.arange(3))
                ema.update_parameters(model)
            pruner.step()
        model.eval(), ema.eval()
        expected = model(x)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.allclose(same(x), expected, rtol=1e-9)
        assert torch.allclose(pruner.compact(ema)(x), ema(x), rtol=1e-9)
        slim = pruner.finalize().eval()
        assert torch.allclose(slim(x), expected, rtol=1e-9)
        train_step(slim.train(), optimizer, x, torch.arange(3))
        found.append([expected, ema(x), slim.eval()(x), *slim.state_dict().values()])
    assert pruner.history[-1].sparsity >= 0.5
    assert_alike(*found, rtol=1e-7, atol=1e-9)


def test_momentum_none_is_the_plain_average(device):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).to(device)
    fused = fuse(copy.deepcopy(plain), impl="triton")
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, device=device)
        assert torch.allclose(fused(x), plain(x), atol=1e-5)
    for a, b in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Branching(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.norm, self.on = nn.BatchNorm2d(3), on

    def forward(self, x):
        y = self.norm(x)
        return F.relu(y) if (self.training if self.on == "mode" else x.sum() > 0) else y


@pytest.mark.parametrize("on, message", [("mode", "another way in training"), ("values", "cannot trace Branching")])
def test_a_forward_that_cannot_be_traced_is_refused(on, message):
    model = Branching(on)
    with pytest.raises(RepruneError, match=message):
        fuse(model)
    assert "forward" not in vars(model.norm) and model.training


def test_a_batchnorm_that_others_read_or_that_runs_twice_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.one(x)
            z = torch.relu(y) + y  # y is read twice
            return self.two(torch.relu(self.two(z)))  # and `two` runs twice

    torch.manual_seed(0)
    plain, x = Net().eval(), torch.randn(2, 3, 4, 4)
    assert torch.equal(fuse(copy.deepcopy(plain), impl="torch")(x), plain(x))


