"""The analysis without torch-pruning: the same layers on networks of chains, and true reasons for all others."""

import re
import sys

import pytest
import torch
import torchvision
from running.test_channels import REFUSED, Net, conv, names
from torch import nn
from torch.nn import functional as F

from reprune_triton import REPrune, fuse
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis, chains
from reprune_triton.training import models

NETWORKS = (
    "resnet8", "resnet20", "resnet56", "resnet18", "resnet34", "resnet50", "vgg11_bn", "vgg16", "mobilenet_v2",
    "efficientnet_b0", "densenet121",
)  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """As if torch-pruning was not installed."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)


class Other(nn.Module):
    """Chains that end in different ways."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.grouped, self.twice = nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1)
        self.last, self.act, self.fc = nn.Conv2d(6, 4, 1), nn.PReLU(4), nn.Linear(4 * 16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.left(x) * torch.sigmoid(self.right(x))
        x = self.twice(self.twice(self.grouped(x)))
        return self.fc(torch.flatten(F.avg_pool2d(self.act(self.last(x)), 2), 1))


def built(name):
    torch.manual_seed(0)
    if name == "other":
        return Other(), torch.randn(2, 3, 8, 8)
    return models.build(name, 10), torch.randn(1, 3, *[32] * 2 if "vgg" not in name else [32, 32])


@pytest.mark.parametrize("name", [*NETWORKS, "other"])
def test_they_are_those_of_torch_pruning(name):
    pytest.importorskip("torch_pruning")
    model, x = built(name)

    def found(finder):
        twin = analysis._twin(model)
        return analysis.unproved(twin.requires_grad_(), x, (), finder)

    theirs, ours = found(analysis._by_torch_pruning), found(chains.finder)
    assert ours.prunable == theirs.prunable and ours.costs == theirs.costs and theirs.prunable
    assert list(ours.reasons) == list(theirs.reasons)
    assert name != "other" or names(ours) == ["last"]
    assert analysis.prunable(model, (4, *x.shape[1:])) == ours
    if name in ("resnet8", "resnet18"):
        assert analysis.prunable(fuse(model), (4, *x.shape[1:])) == ours


def test_the_proof_is_the_same(alone):
    model, x = built("mobilenet_v2")
    found = analysis.analyse(model, x)
    assert len(found.prunable) == 20 and found == analysis.prunable(model, x.shape)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_says_why(case, alone):
    net, reason = REFUSED[case]
    found = analysis.analyse(net, torch.randn(2, 3, 8, 8))
    assert "a" not in names(found)
    why = found.reasons["a"]
    assert re.search(reason, why) or why.endswith(chains._HINT) or re.search("an output|meets another|cat", why), why


class Flipping(nn.BatchNorm2d):
    """Not what its class promises."""

    def forward(self, x):
        return super().forward(x).flip(1)


def test_the_answer_is_proved(alone):
    net = Net(lambda s, x: s.b(s.n(s.a(x))), a=conv(3, 8), n=Flipping(8), b=conv(8, 2))
    x = torch.randn(2, 3, 8, 8)
    assert names(analysis.prunable(net, x.shape)) == ["a"]
    assert "mixes channels" in analysis.analyse(net, x).reasons["a"]


class Plain(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Optional(Net):
    def forward(self, x, features=False, scale=None):
        x = self.a(x)
        x = x if scale is None else x * scale
        return (self.b(x), x) if features else self.b(x)


TAKEN = {
    "view": lambda s, x: s.c((y := s.a(x).relu()).view(y.size(0), -1)),
    "reshape": lambda s, x: s.c(torch.reshape(y := s.a(x).relu(), (y.shape[0], -1))),
    "flatten": lambda s, x: s.c(s.a(x).flatten(start_dim=1)),
    "mean": lambda s, x: s.m(s.a(x).mean((2, 3))),
    "mean of a map": lambda s, x: s.b(s.a(x).mean([-1, -2], keepdim=True)),
    "numbers": lambda s, x: s.b(2 * s.a(x) * 0.5 + 1),
    "slope": lambda s, x: s.b(s.p(s.a(x))),
    "own class": lambda s, x: s.b(s.own(s.a(x))),
    "functions": lambda s, x: s.b(F.max_pool2d(F.dropout(F.hardswish(s.a(x)), 0.5, s.training), 2)),
    "whole channels dropped": lambda s, x: s.b(F.dropout2d(s.a(x).relu(), 0.5, s.training)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_chains_of_all_kinds_are_understood(case, alone):
    net = Net(
        TAKEN[case], a=conv(3, 8), b=conv(8, 2), c=nn.Linear(8 * 64, 2), m=nn.Linear(8, 2), p=nn.PReLU(),
        own=Plain(8, 4, 1),
    )  # fmt: skip
    if case == "own class":
        net.b = conv(4, 2)
    found = analysis.analyse(net, torch.randn(2, 3, 8, 8))
    assert names(found) == (["a", "own"] if case == "own class" else ["a"]), found.reasons


def test_arguments_left_out_are_as_the_forward_has_them(alone):
    net, x = Optional(None, a=conv(3, 8), b=conv(8, 2)), torch.randn(2, 3, 8, 8)
    for inputs in (x, (x,), {"x": x}, (x, False), {"x": x, "scale": None}):
        assert names(analysis.analyse(net, inputs)) == ["a"]
    assert "an output, too" in analysis.analyse(net, (x, True)).reasons["a"]


def test_a_forward_that_cannot_be_traced_says_what_would_help(alone):
    net = Net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else s.a(x), a=conv(3, 8), b=conv(8, 2))
    with pytest.raises(RepruneError, match="pip install torch-pruning") as caught:
        analysis.analyse(net, torch.ones(2, 3, 8, 8))
    assert isinstance(caught.value.__cause__, torch.fx.proxy.TraceError)


def test_a_pruner_works_without_it(alone):
    torch.manual_seed(0)
    model, x = models.build("resnet8", 10), torch.randn(8, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    pruner = REPrune(model, None, example_inputs=x[:1], sparsity=0.5, every=1, until=1)
    pruner.step()
    y = model.eval()(x)
    assert torch.allclose(pruner.finalize().eval()(x), y, atol=1e-6) and pruner.history[0].sparsity >= 0.5


def test_what_the_other_cannot_follow():
    """Channels that are shuffled: chains end there, others are found."""
    found = analysis.prunable(torchvision.models.shufflenet_v2_x0_5(), (1, 3, 64, 64))
    assert names(found) and "stage2.0.branch2.5" not in names(found)
