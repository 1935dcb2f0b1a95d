"""Which channels belong to which weights, and what hangs on parameters: nothing of it is lost without a word."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.fx.experimental import optimization
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from reprune_triton import REPrune, RepruneError, capture
from reprune_triton.running import copies

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self, **norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, **norm)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, **norm)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


def network(seed=0, **norm):
    torch.manual_seed(seed)
    model = Net(**norm)
    for module in (model.bn1, model.bn2):
        nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def start(model=None, **options):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    options = {"sparsity": 0.5, "every": 1, "until": 6, "regrow": 0.4} | options
    return model, optimizer, REPrune(model, optimizer, example_inputs=X[:2], **options)


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(X), Y).backward()
        optimizer.step()


def go_on(model, optimizer, pruner, epochs):
    for _ in range(epochs):
        train(model, optimizer)
        pruner.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kept", [copy.deepcopy, through_a_file])
def test_a_state_dict_brings_its_channels_back(kept):
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    best, active = kept(model.state_dict()), {name: index.tolist() for name, index in pruner.active.items()}
    expected = model.eval()(X)
    go_on(model, optimizer, pruner, 4)
    assert {name: index.tolist() for name, index in pruner.active.items()} != active
    assert not torch.allclose(model.eval()(X), expected)
    model.load_state_dict(best)
    assert torch.equal(model.eval()(X), expected) and pruner.epoch == 6
    with pytest.warns(UserWarning, match=r"loaded that were saved before the last.*%.*sparsity=0.5 was asked for"):
        slim = pruner.finalize().eval()
    assert torch.allclose(slim(X), expected, atol=1e-6)
    assert slim.conv1.out_channels == len(active["conv1"])
    Net().load_state_dict(best, strict=True)  # for all others it is an ordinary state


def test_the_two_states_of_one_epoch_bring_it_back():
    """As plain dicts, which say nothing of channels: the pruner's state does."""
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    best = {key: value.clone() for key, value in model.state_dict().items()}, pruner.state_dict()
    expected = model.eval()(X)
    go_on(model, optimizer, pruner, 4)
    model.load_state_dict(best[0]), pruner.load_state_dict(best[1])
    assert torch.equal(model.eval()(X), expected)


def test_a_kept_copy_stays_on_its_channels():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    best = copy.deepcopy(model)
    expected = best.eval()(X)
    go_on(model, optimizer, pruner, 3)
    assert torch.equal(best(X), expected)
    assert torch.allclose(pruner.compact(best)(X), expected, atol=1e-6)
    assert best.state_dict()._metadata[""] != model.state_dict()._metadata[""]
    again = copy.deepcopy(best)
    assert torch.equal(again(X), expected) and torch.equal(pickle.loads(pickle.dumps(best))(X), expected)


def test_a_copy_that_is_trained_apart_stays_on_its_channels():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    other = copy.deepcopy(model)
    other_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    train(other, other_optimizer)
    widths = pruner.compact(other).conv1.out_channels, pruner.compact(other).conv2.out_channels
    go_on(model, optimizer, pruner, 4)
    train(other, other_optimizer)
    found = pruner.compact(other)
    assert (found.conv1.out_channels, found.conv2.out_channels) == widths
    assert torch.allclose(found.eval()(X), other.eval()(X), atol=1e-6)


@pytest.mark.parametrize("when", ["declared", "before", "between"])
def test_an_average_follows_the_channels_of_its_model(when):
    """Evaluated directly, or made narrow, it is one function; where it equals the model, the model's."""
    model = network()
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}
    ema = None if when == "between" else AveragedModel(model, **how)
    model, optimizer, pruner = start(model, **({"ema": ema} if when == "declared" else {}))
    go_on(model, optimizer, pruner, 1)
    ema = AveragedModel(model, **how) if ema is None else ema
    if when == "before":
        pruner.compact(ema)  # from here on it is known
    for _ in range(4):
        train(model, optimizer)
        ema.update_parameters(model)
        pruner.step()
        assert torch.allclose(ema.eval()(X), pruner.compact(ema).eval()(X), atol=1e-6)
    for _ in range(40):
        ema.update_parameters(model)
    assert torch.allclose(ema.eval()(X), model.eval()(X), atol=1e-5)
    assert torch.allclose(pruner.compact(ema).eval()(X), model.eval()(X), atol=1e-5)


def test_an_event_looks_at_the_copies_of_others_alone(monkeypatch):
    """Each look waits for the device; those made to see whether the model can be copied are none of them."""
    looks = []
    monkeypatch.setattr(copies.Belonging, "_look", lambda self: looks.append(1))
    model, optimizer, pruner = start()
    gc.disable()  # whenever it would have come
    try:
        go_on(model, optimizer, pruner, 3)
        assert not looks
        kept = copy.deepcopy(model)
        pruner.step()
        assert len(looks) == 1 and copies.of(kept) is not None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_copy_in_a_captured_step_does_not_wait_for_the_device(monkeypatch):
    """A teacher, say."""
    with torch.enable_grad():
        model, optimizer, pruner = start()
        go_on(model, optimizer, pruner, 1)
        kept = copy.deepcopy(model).eval()
        expected = kept(X)
        go_on(model, optimizer, pruner, 1)
    monkeypatch.setattr(capture, "capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("it waits"))
    assert torch.equal(kept(X), expected)


def test_statistics_of_an_average_are_those_of_the_narrow_one():
    model = network()
    swa = AveragedModel(model)
    model, optimizer, pruner = start(model, ema=swa)
    for _ in range(3):
        train(model, optimizer)
        swa.update_parameters(model)
        pruner.step()
    narrow = pruner.compact(swa)
    update_bn([(X, Y)], narrow), update_bn([(X, Y)], swa)
    assert torch.allclose(pruner.compact(swa).eval()(X), narrow.eval()(X), atol=1e-6)


def clipped(model):
    calls = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: calls.append(1) or grad.clamp(-1e-3, 1e-3))
    model.fc.weight.no_decay = True
    model.conv1.weight.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    return calls


@pytest.mark.parametrize("how", ["off", "auto"])
def test_what_hangs_on_parameters_goes_with_them(how):
    model, optimizer, pruner = start(compact=how, until=2)
    calls = clipped(model)
    kept = list(model.parameters())
    go_on(model, optimizer, pruner, 2)
    slim = pruner.finalize()
    assert all((a is b) == (how == "auto") for a, b in zip(kept, slim.parameters(), strict=True))
    calls.clear()
    F.cross_entropy(slim.train()(X), Y).backward()
    assert calls.count(1) == len(kept) and calls.count(2) == 1 and slim.fc.weight.no_decay
    assert max(float(p.grad.abs().max()) for p in slim.parameters()) <= 1e-3 + 1e-9
    norm = nn.utils.clip_grad_norm_(list(slim.parameters()) if how == "off" else kept, 1e-5)  # a list held since before
    assert norm > 1e-5
    assert nn.utils.get_total_norm([p.grad for p in slim.parameters()]) < 1.1e-5
    train(slim, optimizer)


@pytest.mark.filterwarnings("ignore:.* before the last pruning event")
@pytest.mark.parametrize("how", ["off", "auto"])
def test_gradients_that_no_step_has_used_are_carried(how):
    """As where they are accumulated over batches."""
    model, optimizer, pruner = start(compact=how, until=9)
    go_on(model, optimizer, pruner, 2)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(X), Y).backward()
    active = pruner.active["conv1"]
    grad, whole = model.conv1.weight.grad[active].clone(), model.fc.bias.grad.clone()
    slim = pruner.finalize()
    assert torch.equal(slim.conv1.weight.grad, grad) and torch.equal(slim.fc.bias.grad, whole)
    optimizer.step()
    train(slim, optimizer)


def test_a_backward_from_before_the_parameters_were_made_narrow_is_refused():
    model, optimizer, pruner = start(compact="auto", until=1)
    train(model, optimizer)
    late = F.cross_entropy(model(X), Y)
    pruner.step()
    loss = F.cross_entropy(model(X), Y)  # with the other one still there
    loss.backward()
    with pytest.raises(RepruneError, match="from before compact"):
        late.backward()


def test_a_hook_of_the_user_sees_whole_parameters():
    """Wherever it stands among ours."""
    model, optimizer, pruner = start()
    seen = []

    def look(module, *_):
        seen.append(module.weight.shape[0])
        module.weight.data.clamp_(-0.01, 0.01)

    model.conv2.register_forward_hook(look)
    model.conv2.register_forward_hook(lambda module, args, kwargs, out: look(module), with_kwargs=True)
    model.conv2.register_full_backward_hook(look)
    model.register_forward_hook(lambda module, *_: look(module.conv2), always_call=True)
    go_on(model, optimizer, pruner, 2)
    model.conv1.register_forward_hook(look, prepend=True)
    model.conv1.register_forward_pre_hook(look)
    model.bn1.register_forward_pre_hook(look)
    with torch.no_grad():
        model.conv2.weight.mul_(3)
    model(X)
    assert set(seen) == {8} and model.conv2.weight.abs().max() <= 0.01
    with torch.no_grad():
        assert torch.allclose(pruner.compact().eval()(X), model.eval()(X), atol=1e-6)


def test_a_hook_of_the_user_sees_whole_parameters_where_a_part_runs_alone():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    seen = []
    model.conv2.register_forward_hook(lambda module, *_: seen.append(module.weight.shape[0]), prepend=True)
    nn.Sequential(model.conv1, model.bn1, model.conv2)(X)
    assert seen == [8]


def folded(model):
    for i in (1, 2):
        conv, norm = getattr(model, f"conv{i}"), getattr(model, f"bn{i}")
        setattr(model, f"conv{i}", fuse_conv_bn_eval(conv, norm)), setattr(model, f"bn{i}", nn.Identity())
    return model


def test_a_copy_with_its_norms_folded_runs_on_the_channels():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    expected = model.eval()(X)
    for source in (model, pruner.compact()):
        assert torch.allclose(folded(copy.deepcopy(source).eval())(X), expected, atol=1e-5)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("when", ["before the event", "after it"])
def test_a_copy_with_its_norms_folded_stays_on_its_channels(when):
    """As long as it is kept, the training goes on; and it can be made narrow."""
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    kept, expected = copy.deepcopy(model).eval(), model.eval()(X)
    kept = folded(kept) if when == "before the event" else kept
    go_on(model, optimizer, pruner, 1)
    kept = folded(kept) if when == "after it" else kept
    assert not torch.allclose(model.eval()(X), expected, atol=1e-3)
    assert torch.allclose(kept(X), expected, atol=1e-5)
    slim = pruner.compact(kept)
    assert slim.conv1.out_channels < 8 and torch.allclose(slim(X), expected, atol=1e-5)


def test_copies_that_have_become_other_networks_do_not_stop_an_event():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    kept = [copy.deepcopy(model) for _ in range(2)]
    expected = model.eval()(X)
    del kept[0].bn2, kept[0].conv2
    kept[1].bn1 = nn.BatchNorm2d(8, affine=False)
    fx = optimization.fuse(model.eval())
    go_on(model, optimizer, pruner, 2)
    assert torch.allclose(fx(X), expected, atol=1e-5)
    with pytest.raises(RepruneError, match=r"has no module bn2"):
        pruner.compact(kept[0])


def test_threads_may_share_a_narrow_model():
    model, optimizer, pruner = start()
    go_on(model, optimizer, pruner, 2)
    expected, wrong = model.eval()(X), []

    def run():
        try:
            for _ in range(60):
                with torch.no_grad():
                    if not torch.equal(model(X), expected):
                        wrong.append("another result")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any("weight" in vars(module) for module in model.modules())
    train(model, optimizer)


@pytest.mark.parametrize("norm", [
    {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.01, "eps": 1e-3},
])  # fmt: skip
def test_kinds_of_batchnorm(norm):
    model, optimizer, pruner = start(network(**norm))
    go_on(model, optimizer, pruner, 2)
    slim, other = pruner.compact(), torch.randn(8, 3, 6, 6)
    assert torch.allclose(model.train()(other), slim.train()(other), atol=1e-5)
    assert torch.allclose(model.eval()(X), slim.eval()(X), atol=1e-5)


def test_a_frozen_model_is_pruned_and_a_subclass_of_tensor_is_an_input():
    class Image(torch.Tensor):
        pass

    model = network().requires_grad_(False)
    pruner = REPrune(model, None, example_inputs=X[:2].as_subclass(Image), sparsity=0.5, every=1, until=1)
    assert pruner.explain()["conv1"] == "prunable" and pruner.step().sparsity > 0.4
    expected = model.eval()(X)
    assert torch.allclose(pruner.finalize().eval()(X), expected, atol=1e-6)


def test_a_model_is_pruned_round_after_round():
    model, optimizer = network(), None
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    widths = []
    for _ in range(2):
        pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.3, every=1, until=1)
        train(model, optimizer)
        pruner.step()
        expected = model.eval()(X)
        model = pruner.finalize()
        assert torch.allclose(model.eval()(X), expected, atol=1e-6)
        widths.append(model.conv1.out_channels + model.conv2.out_channels)
    assert widths[1] < widths[0] < 16 and len(optimizer.state) == len(list(model.parameters()))
