"""Which convs are prunable, why the others are not, and what the network costs."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reprune_triton import availability, fuse
from reprune_triton.errors import RepruneError
from reprune_triton.fused import conv as conv_module
from reprune_triton.fused import norm
from reprune_triton.running import analysis, channels, narrow, shadows
from reprune_triton.running.compact import compact
from reprune_triton.running.narrow import Narrowing
from reprune_triton.running.pack import Pack
from reprune_triton.training import models


def names(found):
    return [layer.name for layer in found.prunable]


def halves(found):
    return {layer.name: torch.arange(0, layer.n_out, 2) for layer in found.prunable}


@pytest.mark.parametrize("build, problems", [
    (lambda: torchvision.models.resnet50(), 16896),  # the figure of the design
    (lambda: torchvision.models.resnet18(), 1472),
])  # fmt: skip
def test_resnets_follow_the_paper(build, problems):
    found = analysis.analyse(build(), torch.randn(1, 3, 32, 32))
    inner = {50: ("conv1", "conv2"), 18: ("conv1",)}[50 if problems == 16896 else 18]
    assert names(found) == [n for n in found.reasons if n.startswith("layer") and n.endswith(inner)]
    assert sum(layer.n_in for layer in found.prunable) == problems
    for layer in found.prunable:
        assert layer.norm == layer.name.replace("conv", "bn") and layer.followers == (layer.norm,)
        assert [r.repeat for r in layer.readers] == [1]
    assert "residual" in found.reasons["layer1.0.conv3" if problems == 16896 else "layer1.0.conv2"]
    assert found.reasons["conv1"] != channels.PRUNABLE


def test_cifar_resnet_prunes_the_first_conv_of_each_block():
    found = analysis.analyse(models.build("resnet20", num_classes=10), torch.randn(1, 3, 32, 32))
    assert len(found.prunable) == 9


def test_depthwise_convs_follow_and_flattened_channels_spread():
    found = analysis.analyse(torchvision.models.mobilenet_v2(), torch.randn(1, 3, 32, 32))
    layer = next(x for x in found.prunable if x.name == "features.2.conv.0.0")
    assert layer.followers == ("features.2.conv.0.1", "features.2.conv.1.0", "features.2.conv.1.1")
    assert layer.norm == "features.2.conv.0.1" and layer.readers == (("features.2.conv.2", 1),)
    assert "depthwise" in found.reasons["features.2.conv.1.0"]

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )
    found = analysis.analyse(net, torch.randn(2, 3, 8, 8))
    assert found.prunable[0].readers == (("5", 4),)
    slices = found.slices({"0": torch.tensor([1, 6])})
    assert slices["5"].in_.tolist() == [4, 5, 6, 7, 24, 25, 26, 27]
    assert slices["0"].out.tolist() == slices["1"].out.tolist() == [1, 6] and slices["0"].in_ is None


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def conv(a, b, k=1, **kw):
    return nn.Conv2d(a, b, k, padding=k // 2, **kw)


REFUSED = {
    "output": (Net(lambda s, x: s.a(x), a=conv(3, 8)), "output of the network"),
    "also an output": (Net(lambda s, x: ((y := s.a(x)), s.b(y)), a=conv(3, 8), b=conv(8, 4)), "mixes channels"),
    "residual": (Net(lambda s, x: s.c(s.a(x) + s.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)), "meets that of b"),
    "concatenation": (Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 8), b=conv(3, 8),
                          c=conv(16, 2)), "Concat|concatenation"),
    "channel mean": (Net(lambda s, x: s.b((y := s.a(x)) - y.mean(1, True)), a=conv(3, 8), b=conv(8, 2)), "mixes"),
    "channel softmax": (Net(lambda s, x: s.b(s.a(x).softmax(1)), a=conv(3, 8), b=conv(8, 2)), "mixes"),
    "flip": (Net(lambda s, x: s.b(s.a(x).flip(1)), a=conv(3, 8), b=conv(8, 2)), "mixes"),
    "group norm": (Net(lambda s, x: s.b(s.n(s.a(x))), a=conv(3, 8), n=nn.GroupNorm(2, 8), b=conv(8, 2)), "GroupNorm"),
    "grouped reader": (Net(lambda s, x: s.b(s.a(x)), a=conv(3, 8), b=conv(8, 8, groups=2)), "grouped convolution"),
    "called twice": (Net(lambda s, x: s.b(s.a(s.a(x))), a=conv(3, 3), b=conv(3, 2)), "called 2 times"),
    "unused": (Net(lambda s, x: s.b(x), a=conv(3, 3), b=conv(3, 2)), "called 0 times"),
    "one channel": (Net(lambda s, x: s.b(s.a(x)), a=conv(3, 1), b=conv(1, 2)), "one output channel"),
    "parametrized": (Net(lambda s, x: s.b(s.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 8)), b=conv(8, 2)),
                     "plain parameter"),
}  # fmt: skip


REFUSED |= {
    "pixel shuffle": (Net(lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2)), a=conv(3, 8), b=conv(2, 2)), "moves or joins"),
    "glu": (Net(lambda s, x: s.b(F.glu(s.a(x), 1)), a=conv(3, 8), b=conv(4, 2)), "moves or joins"),
    "aux head": (Net(lambda s, x: [y := s.a(x), s.b(y), *([s.c(y.mean((2, 3)))] if s.training else [])][1:],
                     a=conv(3, 8), b=conv(8, 2), c=nn.Linear(8, 2)), "while training"),
    "feature": (Net(lambda s, x: [y := s.a(x), s.b(y), *([y] if s.training else [])][1:], a=conv(3, 8), b=conv(8, 2)),
                "while training"),
    "zero head": (Net(lambda s, x: s.c(s.b(s.a(x).flip(1))), a=conv(3, 8), b=conv(8, 4), c=conv(4, 2)), "mixes"),
}  # fmt: skip
nn.init.zeros_(REFUSED["zero head"][0].c.weight)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_says_why(case):
    pytest.importorskip("torch_pruning", reason="these are its reasons; test_chains.py has the others")
    net, reason = REFUSED[case]
    found = analysis.analyse(net, torch.randn(2, 3, 8, 8))
    assert "a" not in names(found)
    assert re.search(reason, found.reasons["a"]), found.reasons


def test_shared_weights_stay():
    net = Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 3), b=conv(3, 3), c=conv(3, 2))
    net.b.weight = net.a.weight
    assert "shares its weight with b" in analysis.analyse(net, torch.randn(2, 3, 8, 8)).reasons["a"]


def test_a_reader_or_follower_that_shares_a_parameter_stays():
    net = Net(lambda s, x: s.c(s.b(s.a(x)).relu()), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    net.c.weight = net.b.weight
    assert "b shares a parameter with c" in analysis.analyse(net, torch.randn(2, 3, 8, 8)).reasons["a"]


def test_odd_but_good_models_are_understood():
    cast = Net(lambda s, x: s.b(s.a(x.float()).relu()), a=conv(3, 8), b=conv(8, 2))
    keyword = Net(lambda s, x: s.b(input=s.a(x).relu()), a=conv(3, 8), b=conv(8, 2))
    dropout = Net(lambda s, x: s.b(F.dropout(s.a(x), 0.5, s.training)), a=conv(3, 8), b=conv(8, 2))
    for net in (cast, keyword, dropout):
        assert names(analysis.analyse(net, torch.randn(2, 3, 8, 8))) == ["a"]


def test_ignore_takes_names_and_patterns():
    net, x = models.build("resnet20", num_classes=10), torch.randn(1, 3, 16, 16)
    everything = names(analysis.analyse(net, x))
    found = analysis.analyse(net, x, ignore=[everything[0], everything[-1][:-1] + "?"])
    assert found.reasons[everything[0]] == "ignored, as asked"
    assert everything[0] not in names(found) and everything[-1] not in names(found)


def test_the_model_is_not_changed():
    net = torchvision.models.mobilenet_v2().train()
    for p in list(net.parameters())[:3]:
        p.requires_grad_(False)
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    analysis.analyse(net, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert [p.requires_grad for p in net.parameters()] == flags and all(m.training for m in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn"])
def test_flops_are_those_of_the_physical_network(name):
    net = torchvision.models.get_model(name, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    found = analysis.analyse(net, x)
    active = halves(found)
    for index, model in (({}, net), (active, compact(net, found.slices(active)))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x)
        widths = {layer.name: len(index.get(layer.name, range(layer.n_out))) for layer in found.prunable}
        assert counter.get_total_flops() == 2 * sum(found.macs(widths).values())  # it counts adds and multiplies apart
    assert found.flops({layer.name: layer.n_out for layer in found.prunable}) == 1.0


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False),
    nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.PReLU(8), nn.PReLU(),
])  # fmt: skip
def test_channelwise_modules_follow(norm):
    net = Net(lambda s, x: s.b(F.relu(s.n(s.a(x)))), a=conv(3, 8, 3), n=norm, b=conv(8, 2)).train()
    x = torch.randn(4, 3, 8, 8)
    found = analysis.analyse(net, x)
    assert names(found) == ["a"] and found.reasons["a"] == channels.PRUNABLE
    has_scale = isinstance(norm, nn.BatchNorm2d) and norm.affine
    assert found.prunable[0].norm == ("n" if has_scale else None)
    slim = compact(net, found.slices(halves(found)))
    Narrowing(net).set(found.slices(halves(found)))
    assert torch.equal(net(x), slim(x))  # in training mode, with batch statistics
    assert torch.equal(net.eval()(x), slim.eval()(x))


RESHAPED = {  # what is done with activations of 8x4x4, and the layer behind it
    "view of the batch": (lambda s, x: s.f(x.view(x.size(0), -1)), 128),
    "reshape": (lambda s, x: s.f(x.reshape(x.shape[0], -1)), 128),
    "channels last": (lambda s, x: s.f(x.permute(0, 2, 3, 1)).mean((1, 2)), 8),
    "tokens": (lambda s, x: s.f(x.flatten(2).transpose(1, 2)).mean(1), 8),
    "dropout2d": (lambda s, x: s.f(F.dropout2d(x, 0.3, s.training).flatten(1)), 128),
    "where": (lambda s, x: s.f(torch.where(x > 0.1, x, torch.zeros_like(x)).flatten(1)), 128),
}  # fmt: skip


@pytest.mark.parametrize("case", RESHAPED)
def test_channels_are_followed_through_reshapes(case):
    pytest.importorskip("torch_pruning", reason="chains end at most of them")
    tail, features = RESHAPED[case]
    net = Net(
        lambda s, x: tail(s, F.max_pool2d(F.relu(s.m(s.b(F.relu(s.n(s.a(x)))))), 2)), a=conv(3, 8, 3),
        n=nn.BatchNorm2d(8), b=conv(8, 8, 3), m=nn.BatchNorm2d(8), f=nn.Linear(features, 4),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    found = analysis.analyse(net, x)
    assert names(found) == ["a", "b"], found.reasons
    assert found.prunable[1].readers == (("f", features // 8),)
    slim = compact(net, found.slices(halves(found)))
    Narrowing(net).set(found.slices(halves(found)))
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = slim.train()(x)
        torch.manual_seed(seed)
        assert torch.allclose(net.train()(x), expected, atol=1e-6)
    assert slim.f.in_features == features // 2 and torch.allclose(net.eval()(x), slim.eval()(x), atol=1e-6)


def test_reshapes_that_name_the_width_and_norms_that_two_share_keep_it():
    pytest.importorskip("torch_pruning", reason="these are its reasons")
    fixed = Net(lambda s, x: s.f(s.b(s.a(x)).view(-1, 8 * 64)), a=conv(3, 8), b=conv(8, 8), f=nn.Linear(512, 4))
    shared = Net(
        lambda s, x: s.f(s.n(s.b(s.n(s.a(x)))).mean((2, 3))), a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8),
        f=nn.Linear(8, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    found = analysis.analyse(fixed, x)
    assert names(found) == ["a"] and "does not run without some of its channels" in found.reasons["b"]
    found = analysis.analyse(shared, x)
    assert not names(found) and all("output" in found.reasons[name] for name in ("a", "b")), found.reasons


def test_inputs_may_be_a_tuple_or_a_dict():
    net = Net(lambda s, x: s.b(F.relu(s.n(s.a(x)))), a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 2))
    x = torch.randn(2, 3, 8, 8)
    assert names(analysis.analyse(net, (x,))) == names(analysis.analyse(net, {"x": x})) == ["a"]


def test_errors_name_the_way_out():
    with pytest.raises(RepruneError, match="no nn.Conv2d"):
        analysis.analyse(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(RepruneError, match="does not run on example_inputs"):
        analysis.analyse(models.build("resnet8", num_classes=10), torch.randn(1, 4, 8, 8))
    pytest.importorskip("torch_pruning", reason="chains end where channels are shuffled: test_chains.py")
    with pytest.raises(RepruneError, match="shuffle or regroup"):
        analysis.analyse(torchvision.models.shufflenet_v2_x0_5(), torch.randn(1, 3, 64, 64))


class Failing(nn.BatchNorm2d):
    """Fails once the network is narrow."""

    def forward(self, x):
        if x.shape[1] < 8:
            raise self.error
        return super().forward(x)


def failing(error):
    net = Net(lambda s, x: s.b(s.f(s.a(x))), a=conv(3, 8), f=Failing(8), b=conv(8, 2))
    net.f.error = error
    return analysis.analyse(net, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("device-side assert"), OSError("no compiler"),
    MemoryError(), ImportError("triton"),
])  # fmt: skip
def test_what_is_none_of_the_networks_doing_is_an_error_with_its_cause(error):
    with pytest.raises(RepruneError, match="left out, and that failed .*smaller batch as example_inputs") as caught:
        failing(error)
    assert type(caught.value.__cause__) is type(error) and repr(error) in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("8 channels, please"), AssertionError(8)])
def test_what_the_network_objects_to_is_the_reason(error):
    found = failing(error)
    assert not found.prunable and f"does not run without some of its channels ({error})" in found.reasons["a"]


def test_what_fails_while_training_only_is_no_objection_but_want_of_memory_is():
    """Such as BatchNorm, which refuses to train on one value a channel."""
    for error in (ValueError("Expected more than 1 value per channel"), torch.OutOfMemoryError("CUDA out of memory")):
        def forward(s, x, error=error):
            if s.training:
                raise error
            return s.b(s.a(x))

        net = Net(forward, a=conv(3, 8), b=conv(8, 2))
        if isinstance(error, ValueError):
            assert names(analysis.analyse(net, torch.randn(2, 3, 8, 8))) == ["a"]
        else:
            with pytest.raises(RepruneError, match="CUDA out of memory"):
                analysis.analyse(net, torch.randn(2, 3, 8, 8))


def test_it_runs_without_triton_whatever_the_model_is_fused_by(monkeypatch):
    """The twin is the unfused model, and its slices are gathered tensor by tensor."""
    net = models.build("resnet8", num_classes=10)
    x = torch.randn(2, 3, 16, 16)
    expected = analysis.analyse(net, x)

    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    def pack(cuts, impl):
        assert impl == "torch"
        return Pack(cuts, impl)

    for module, name in ((norm, "choose"), (conv_module, "choose"), (availability, "why_not")):
        monkeypatch.setattr(module, name, fail)
    for module in (narrow, shadows):
        monkeypatch.setattr(module, "Pack", pack)
    for impl in ("triton", "auto"):
        fuse(net, impl)
        assert analysis.analyse(net, x) == expected
    with pytest.raises(RuntimeError, match="C compiler"):
        net(x)


def test_what_is_compiled_inside_runs_as_written():
    """A compiler that fails, and that would see every shape of the analysis."""
    def backend(graph, inputs):
        raise OSError("no C++ compiler")

    net = Net(lambda s, x: s.b(s.c(s.a(x))), a=conv(3, 8), c=nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), b=conv(8, 2))
    net.c = torch.compile(net.c, backend=backend)
    assert names(analysis.analyse(net, torch.randn(2, 3, 8, 8))) == ["a"]
    with pytest.raises(Exception, match=r"no C\+\+ compiler"), torch.no_grad():
        net(torch.randn(2, 3, 8, 8))
