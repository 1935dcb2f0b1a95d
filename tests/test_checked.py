"""What is checked again at every event and at the end: who trains, what the model is made of, and its averages."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from trained import (
    Net,
    Rule,
    Several,
    Unhooked,
    X,
    Y,
    after_an_event,
    network,
    pruner_of,
    same,
    sgd,
    train,
    values,
)

from reprune_triton import RepruneError
from reprune_triton.running.optimizers import Optimizers


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
    model, optimizer, pruner = after_an_event(until=1)
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
    model, optimizer, pruner = after_an_event()
    change(model)
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(RepruneError, match=message):
            call()
    assert pruner.epoch == 1


def test_what_profilers_leave_on_modules_is_no_change_of_theirs():
    model, optimizer, pruner = after_an_event()
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
    model, optimizer, pruner = after_an_event()
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
    with pytest.warns(UserWarning, match=f"after epoch 3, .*until=9: {pruned} .*{asked} was asked for") as came:
        pruner.finalize()
    assert came[0].filename == __file__  # the caller's line, not the pruner's


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
