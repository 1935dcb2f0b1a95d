"""Training narrow is training the full network with its channels masked after BatchNorm and activation."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.running.compact import compact
from reprune_triton.running.layers import Slice
from reprune_triton.running.narrow import Narrowing
from reprune_triton.running.shadows import Gathering
from reprune_triton.training import models


def vgg16_bn():
    net = torchvision.models.vgg16_bn(num_classes=10)
    net.classifier[0] = nn.Linear(512 * 7 * 7, 32)  # same flatten, less memory
    net.classifier[3] = nn.Linear(32, 32)
    net.classifier[6] = nn.Linear(32, 10)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two networks cannot draw the same random mask
    return net


def mobilenet_v2():
    net = torchvision.models.mobilenet_v2(num_classes=10)
    net.classifier[0].p = 0.0
    return net


NETS = {  # how to build it, image size, the last BatchNorm of a residual branch, steps
    "resnet8": (lambda: models.build("resnet8", num_classes=10), 16, "bn2", 10),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 48, "bn2", 4),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 48, "bn3", 3),
    "vgg16_bn": (vgg16_bn, 32, None, 3),
    "mobilenet_v2": (mobilenet_v2, 48, "conv.3", 4),
}


class Oracle:
    """The full network: BatchNorm outputs times a mask, and every pruned entry put back after every step."""

    def __init__(self, model, optimizer, found):
        self.model, self.optimizer, self.found = model, optimizer, found
        device = next(model.parameters()).device
        self.masks = {layer.name: torch.ones(layer.n_out, device=device) for layer in found.prunable}
        for layer in found.prunable:
            for name in layer.followers:
                module = model.get_submodule(name)
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(self.mask_output(layer.name))

    def mask_output(self, name):
        return lambda module, args, out: out * self.masks[name].view(1, -1, 1, 1).to(out.dtype)

    def entry_masks(self):
        """Per parameter or buffer a 0/1 tensor of its shape: 0 where the entry belongs to a pruned channel."""
        state = dict(self.model.state_dict(keep_vars=True))
        ones = {key: torch.ones_like(t, dtype=torch.float64) for key, t in state.items() if t.dim()}
        for layer in self.found.prunable:
            mask = self.masks[layer.name].double()
            for name in (layer.name, *layer.followers):
                for key in ("weight", "bias", "running_mean", "running_var"):
                    if f"{name}.{key}" in ones:
                        t = ones[f"{name}.{key}"]
                        t *= mask.view(-1, *[1] * (t.dim() - 1))
            for name, repeat in layer.readers:
                t = ones[f"{name}.weight"]
                t *= mask.repeat_interleave(repeat).view(1, -1, *[1] * (t.dim() - 2))
        return ones

    def prune(self, active):
        self.masks = {n: torch.zeros_like(m).index_fill_(0, active[n].to(m.device), 1) for n, m in self.masks.items()}
        self.forget()

    @torch.no_grad()
    def forget(self):
        masks = self.entry_masks()
        for name, p in self.model.named_parameters():
            if p in self.optimizer.state:
                self.optimizer.state[p]["momentum_buffer"].mul_(masks[name])

    def step(self, x, y):
        before = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        loss = train_step(self.model, self.optimizer, x, y)
        with torch.no_grad():
            now = self.model.state_dict()
            for key, mask in self.entry_masks().items():
                now[key].copy_(torch.where(mask.bool(), now[key], before[key]))
        self.forget()
        return loss


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)


def some(found, share, generator):
    return {
        layer.name: torch.randperm(layer.n_out, generator=generator)[: max(1, int(layer.n_out * share))].sort().values
        for layer in found.prunable
    }


def largest_difference(a, b):
    """Over all tensors: the largest difference, relative to the tensor's largest entry where that is over 1."""
    return max(
        float((x.double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp_min(1))
        for k, x in a.items()
        if x.numel()
    )


def calm(model, branch_end):
    """A fresh ResNet-50 on four images is chaotic: rounding grows a hundredfold a step. Start as well-trained networks
    are: residual branches small, no division by a tiny variance."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            if branch_end and name.endswith(branch_end):
                nn.init.constant_(module.weight, 0.2)


@pytest.mark.parametrize("name", NETS)
def test_narrow_equals_masked_after_activation(name):
    torch.manual_seed(0)
    build, size, branch_end, steps = NETS[name]
    model = build().double()
    x0 = torch.randn(2, 3, size, size, dtype=torch.float64)
    found = analysis.analyse(model, x0)
    assert found.prunable
    calm(model, branch_end)
    batches = [(torch.randn(4, 3, size, size, dtype=torch.float64), torch.randint(0, 10, (4,))) for _ in range(5)]

    optimizer = sgd(model)
    for x, y in batches[:2]:  # momentum is not zero when channels go
        train_step(model, optimizer, x, y)
    full = copy.deepcopy(model)
    full_optimizer = sgd(full)
    full_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    oracle, narrowing = Oracle(full, full_optimizer, found), Narrowing(model, optimizer)

    generator = torch.Generator().manual_seed(1)
    for active in (some(found, 0.4, generator), some(found, 0.7, generator)):  # pruned, then partly regrown
        oracle.prune(active)
        narrowing.set(found.slices(active))
        for step in range(steps):
            x, y = batches[step % 5]
            assert abs(train_step(model, optimizer, x, y) - oracle.step(x, y)) < 1e-12, step
        assert largest_difference(model.state_dict(), full.state_dict()) < 1e-12
        momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
        expected = {n: full_optimizer.state[p]["momentum_buffer"] for n, p in full.named_parameters()}
        assert largest_difference(momentum, expected) < 1e-12

    slim = compact(model, found.slices(active))
    model.eval(), slim.eval(), full.eval()
    with torch.no_grad():
        assert torch.equal(slim(x), model(x))
        assert torch.allclose(slim(x), full(x), rtol=0, atol=1e-11)


def test_masking_weights_only_is_another_function():
    """BatchNorm maps a zero channel to beta - gamma * mean / std, so zero weights are not a missing channel."""
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=10).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = analysis.analyse(model, x)
    optimizer = sgd(model)
    for _ in range(3):
        train_step(model, optimizer, x, torch.arange(4))
    active = some(found, 0.5, torch.Generator().manual_seed(1))
    wrong = copy.deepcopy(model).eval()
    with torch.no_grad():
        for layer in found.prunable:
            mask = torch.zeros(layer.n_out, 1, 1, 1, dtype=torch.float64)
            mask[active[layer.name]] = 1
            wrong.get_submodule(layer.name).weight.mul_(mask)
    slim = compact(model, found.slices(active)).eval()
    with torch.no_grad():
        assert (slim(x) - wrong(x)).abs().max() > 1e-4


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=10)
    x = torch.randn(4, 3, 16, 16)
    found = analysis.analyse(model, x)
    return model, found, some(found, 0.5, torch.Generator().manual_seed(2)), x


def test_activations_are_narrow_and_parameters_are_not(pruned):
    model, found, active, x = pruned
    keys = {k: v.shape for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    widths = {}
    for layer in found.prunable:
        model.get_submodule(layer.name).register_forward_hook(
            lambda m, a, out, name=layer.name: widths.__setitem__(name, out.shape[1])
        )
    Narrowing(model).set(found.slices(active))
    model(x).sum().backward()
    assert widths == {name: len(index) for name, index in active.items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for layer in found.prunable:
        grad = model.get_submodule(layer.name).weight.grad
        pruned_rows = [i for i in range(layer.n_out) if i not in active[layer.name].tolist()]
        assert grad.shape == model.get_submodule(layer.name).weight.shape
        assert grad[pruned_rows].abs().max() == 0 and grad[active[layer.name]].abs().max() > 0


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
])  # fmt: skip
def test_pruned_channels_are_frozen_under_every_optimizer(pruned, make):
    model, found, active, x = pruned
    optimizer = make(model.parameters())
    train_step(model, optimizer, x, torch.arange(4))
    narrowing = Narrowing(model, optimizer)
    narrowing.set(found.slices(active))
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        train_step(model, optimizer, x, torch.arange(4))
    for layer in found.prunable:
        pruned_rows = [i for i in range(layer.n_out) if i not in active[layer.name].tolist()]
        for name in (layer.name, *layer.followers):
            for key in ("weight", "running_mean", "running_var", "bias"):
                if f"{name}.{key}" in before:
                    now, then = model.state_dict()[f"{name}.{key}"], before[f"{name}.{key}"]
                    assert torch.equal(now[pruned_rows], then[pruned_rows]), (name, key)
                    assert not torch.equal(now, then), (name, key)
        reader = model.get_submodule(layer.readers[0].name).weight
        assert torch.equal(reader[:, pruned_rows], before[f"{layer.readers[0].name}.weight"][:, pruned_rows])
        for value in optimizer.state[model.get_submodule(layer.name).weight].values():
            if value.dim():
                assert value[pruned_rows].abs().max() == 0
    narrowing.set({})  # everything is back
    train_step(model, optimizer, x, torch.arange(4))
    weight = found.prunable[0].name + ".weight"
    assert not torch.equal(model.state_dict()[weight][pruned_rows[:1]], before[weight][pruned_rows[:1]])


def test_channels_last_stays(pruned):
    model, found, active, x = pruned
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    outputs = []
    for layer in found.prunable:
        model.get_submodule(layer.name).register_forward_hook(lambda m, a, out: outputs.append(out))
    Narrowing(model).set(found.slices(active))
    model(x)
    slim = compact(model, found.slices(active))
    tensors = outputs + [slim.get_submodule(layer.name).weight for layer in found.prunable]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def test_a_deep_copy_is_narrow_too_and_trains_apart(pruned):
    model, found, active, x = pruned
    Narrowing(model).set(found.slices(active))
    twin = copy.deepcopy(model)
    model.eval(), twin.eval()
    assert torch.equal(model(x), twin(x))
    twin.train()
    twin(x)
    name = found.prunable[0].norm
    assert not torch.equal(twin.get_submodule(name).running_mean, model.get_submodule(name).running_mean)


def test_an_exception_in_forward_leaves_no_slice_behind(pruned):
    model, found, active, x = pruned
    Narrowing(model).set(found.slices(active))
    expected = model.eval()(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 16, 16))
    layer = model.get_submodule(found.prunable[0].name)
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 7, 16, 16))
    assert "weight" not in vars(layer)
    assert torch.equal(model(x), expected)


def test_close_gives_the_dense_network_back(pruned):
    model, found, active, x = pruned
    model.eval()
    dense = model(x)
    narrowing = Narrowing(model, torch.optim.SGD(model.parameters(), 0.1))
    narrowing.set(found.slices(active))
    assert not torch.allclose(model(x), dense)
    narrowing.close()
    assert torch.equal(model(x), dense)


def test_a_module_that_cannot_be_sliced_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    with pytest.raises(RepruneError, match="GroupNorm"):
        Narrowing(model).set({"1": Slice(torch.arange(4))})


def test_only_what_has_an_entry_for_every_channel_is_cut(pruned):
    """Profilers leave counters on every module, and users what they like."""
    model, found, active, x = pruned
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros((), dtype=torch.float64))
        if isinstance(module, nn.BatchNorm2d):
            module.register_buffer("histogram", torch.arange(module.num_features))
            module.register_parameter("temperature", nn.Parameter(torch.ones(1)))
            module.register_parameter("importance", nn.Parameter(torch.arange(float(module.num_features))))
    assert analysis.analyse(model, x).prunable == found.prunable
    Narrowing(model).set(found.slices(active))
    slim = compact(model, found.slices(active))
    assert torch.equal(slim.eval()(x), model.eval()(x))
    for layer in found.prunable:
        norm, kept = slim.get_submodule(layer.norm), active[layer.name]
        assert norm.total_ops.shape == norm.temperature.shape == (1,) and len(norm.histogram) == layer.n_out
        assert torch.equal(norm.importance, kept.float()) and len(norm.running_var) == len(kept)


def test_it_runs_under_autocast_and_checkpointing(pruned):
    model, found, active, x = pruned
    Narrowing(model).set(found.slices(active))
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).float().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiled_code_asks_nothing_of_a_gpus_streams(monkeypatch, pruned):
    """Its graph would break there."""
    model, found, active, x = pruned
    Narrowing(model, impl="torch").set(found.slices(active))
    expected = model.eval()(x)

    def refuse(self):
        raise AssertionError("the stream")

    monkeypatch.setattr(Gathering, "_stream", refuse)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(x), expected, atol=1e-6)


def test_compiled_code_of_a_dense_model_is_not_that_of_a_narrow_one(pruned):
    """They are of one class, and by default torch.compile does not ask which has hooks."""
    model, found, active, x = pruned
    dense = copy.deepcopy(model).eval()
    Narrowing(model).set(found.slices(active))
    expected = model.eval()(x)
    with torch.no_grad():
        assert torch.allclose(torch.compile(dense, backend="eager")(x), dense(x))
        assert torch.allclose(torch.compile(model, backend="eager")(x), expected, atol=1e-6)
