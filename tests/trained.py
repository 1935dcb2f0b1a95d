"""A small network that trains and is pruned under many an optimizer, for the tests of what can go wrong there."""

import torch
from torch import nn
from torch.nn import functional as F

from reprune_triton import REPrune

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


def after_an_event(make=sgd, **options):
    """A model that was trained and then pruned once; its optimizer and pruner."""
    model = network()
    optimizer = make(model.parameters())
    pruner = pruner_of(model, optimizer, **options)
    train(model, optimizer)
    pruner.step()
    return model, optimizer, pruner


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
