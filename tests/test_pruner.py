"""The story of an event, the schedule, and everything a user does with a pruner."""

import copy
import io
import json
import math
import random

import numpy as np
import pytest
import torch
import torchvision
from rich.console import Console
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn
from torch.nn import functional as F

from reprune_triton import REPrune, RepruneError, ops
from reprune_triton.running import analysis
from reprune_triton.selection import event as event_module
from reprune_triton.training import checkpoint, models

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 10


def network(name="resnet8", seed=0):
    torch.manual_seed(seed)
    model = models.build(name, num_classes=10)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def prune(model, optimizer, epochs=4, **options):
    pruner = REPrune(model, optimizer, example_inputs=X[:2], **{"every": 1, "until": 4, "sparsity": 0.5, **options})
    for _ in range(epochs):
        train(model, optimizer)
        pruner.step()
    return pruner


def by_the_book(weight, keep):
    """Steps 2 to 5 of docs/method.md for one layer with SciPy and Python sets; ties to the lowest index."""
    n, n_in = weight.shape[:2]
    c = n - keep
    trees = [linkage(weight[:, j].flatten(1).double().numpy(), "ward") for j in range(n_in)]
    h = max(tree[c - 1, 2] for tree in trees) if c else -1.0
    labels = [fcluster(tree, h * (1 + 1e-6), "distance") if c else np.arange(n) for tree in trees]
    universe = {(j, labels[j][i]) for j in range(n_in) for i in range(n)}
    covered, chosen = set(), []
    for _ in range(keep):
        gains = [-1 if i in chosen else len({(j, labels[j][i]) for j in range(n_in)} - covered) for i in range(n)]
        best = gains.index(max(gains))
        chosen.append(best)
        covered |= {(j, labels[j][best]) for j in range(n_in)}
    return sorted(chosen), len(covered) / len(universe), 0.5 * h * h if c else 0.0


def test_two_events_by_the_book():
    """The first over all channels, the second over the active filters and their active inputs."""
    torch.manual_seed(0)
    model = torchvision.models.vgg11_bn(num_classes=10)  # layers feed each other: input channels are pruned too
    model.classifier = nn.Linear(512 * 49, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    few = ["features.4", "features.8"]
    options = {"sparsity": dict.fromkeys(few, 0.5), "tie": "index", "regrow": 0.3, "until": 2, "every": 1}
    pruner = REPrune(model, None, example_inputs=torch.randn(2, 3, 32, 32), **options)
    second = model.get_submodule("features.8").weight.detach()
    for epoch in (1, 2):
        before = {name: index.clone() for name, index in pruner.active.items()}
        event = pruner.step()
        inputs = {"features.4": torch.arange(64), "features.8": before["features.4"]}
        for record in event.layers:
            weight = model.get_submodule(record.name).weight.detach()[before[record.name]][:, inputs[record.name]]
            delta = 0.3 * (1 + math.cos(math.pi * epoch / 2)) / 2
            assert record.kept == record.n_out // 2
            assert record.width == record.n_out - math.ceil((0.5 - delta) * record.n_out)
            chosen, coverage, h = by_the_book(weight, record.kept)
            kept = set(before[record.name][chosen].tolist())
            assert kept <= set(pruner.active[record.name].tolist())
            assert len(pruner.active[record.name]) == record.width
            assert record.coverage == pytest.approx(coverage, abs=1e-12) and record.h == pytest.approx(h, rel=1e-5)
    assert [record.width for record in event.layers] == [64, 128]  # the target, with nothing regrown
    assert torch.equal(second, model.get_submodule("features.8").weight)


def test_events_happen_when_due_and_end_at_the_target():
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, epochs=9, every=3, until=7, regrow=0.3)
    assert [event.epoch for event in pruner.history] == [3, 6, 7]  # at until too, so that the target is met
    last = pruner.history[-1]
    assert all(layer.kept == layer.width for layer in last.layers)
    n = sum(layer.n_out for layer in last.layers)
    assert last.target == 0.5 and n * 0.5 - len(last.layers) <= n * last.sparsity <= n * 0.5 + 1
    # The schedule sets the width of the network in training; rounding and floors add less than a channel a layer.
    for event in pruner.history:
        delta = 0.3 * (1 + math.cos(math.pi * event.epoch / 7)) / 2
        assert event.sparsity == pytest.approx(0.5 - delta, abs=len(last.layers) / n)
        assert 0 < event.coverage <= 1 and event.ms > 0


def test_history_is_complete_and_consistent():
    model, optimizer = network()
    pruner = prune(model, optimizer)
    for event in pruner.history:
        assert list(event.stages) == ["sparsity", "cluster", "cut", "membership", "cover", "regrow", "apply"]
        assert all(ms >= 0 for ms in event.stages.values()) and sum(event.stages.values()) <= event.ms
        assert {layer.name for layer in event.layers} == {n for n, why in pruner.explain().items() if why == "prunable"}
        for layer in event.layers:
            assert 1 <= layer.kept <= layer.width <= layer.n_out
            assert layer.sparsity == 1 - layer.width / layer.n_out
            assert 0 < layer.coverage <= 1 and layer.h >= 0
            assert layer.flops <= layer.width / layer.n_out
    widths = {layer.name: layer.width for layer in pruner.history[-1].layers}
    assert pruner.history[-1].flops == pruner.channels.flops(widths)
    last = pruner.history[-1]
    assert repr(pruner) == (
        f"<REPrune of CifarResNet: epoch 4/4, {len(last.layers)}/{len(pruner.explain())} convs, "
        f"{sum(widths.values())}/{sum(x.n_out for x in last.layers)} channels, {last.flops:.1%} FLOPs>"
    )


def test_a_summary_fits_into_80_columns():
    model, optimizer = network()
    pruner = prune(model, optimizer)
    console = Console(record=True, width=80, file=io.StringIO())
    pruner.summary(console)
    lines = console.export_text().splitlines()
    text = "\n".join(lines)
    assert repr(pruner) in lines and max(map(len, lines)) <= 80
    # Nothing is cut off or broken: every heading and number is there in one piece.
    for event in pruner.history:
        assert all(f"{share:.1%}" in text for share in (event.sparsity, event.flops, event.coverage))
        assert all(stage in text and f" {ms:.1f} " in text for stage, ms in event.stages.items())
    for layer in pruner.history[-1].layers:
        assert any(line.split()[:3] == [layer.name, str(layer.n_out), str(layer.kept)] for line in lines)
        assert f"{layer.h:.3g}" in text


def test_one_seed_one_result_whatever_else_is_random():
    results = []
    for noise, seed in ((0, 3), (7, 3), (0, 4)):
        model, optimizer = network()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        pruner = prune(model, optimizer, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)  # pruning draws nothing from the program's own stream
        results.append(torch.cat([*pruner.active.values()]).tolist())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("options", [
    {"linkage": "single"}, {"linkage": "complete"}, {"linkage": "average"},
    {"tie": "index"}, {"tie": "norm"}, {"tie": "gamma"}, {"regrow": 0.0}, {"impl": "reference"},
])  # fmt: skip
def test_every_option_prunes_to_the_target(options):
    model, optimizer = network()
    pruner = prune(model, optimizer, **options)
    assert pruner.history[-1].sparsity == pytest.approx(0.5, abs=0.03)


def test_flops_budget_is_met():
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, sparsity=None, flops=0.44)
    assert 0.44 - 0.02 < pruner.history[-1].flops <= 0.44
    assert all(0.2 < event.target < 0.7 for event in pruner.history)
    assert pruner.history[0].flops > pruner.history[-1].flops


def test_the_smallest_flops_budget_leaves_one_group_per_layer():
    model, optimizer = network("resnet20")
    least = REPrune(model, None, example_inputs=X[:2], sparsity=0.5, until=4).channels
    budget = least.flops({layer.name: 4 for layer in least.prunable})
    pruner = prune(model, optimizer, sparsity=None, flops=budget, round_to=4)
    assert {layer.width for layer in pruner.history[-1].layers} == {4}


def test_widths_are_aligned_and_floored():
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, sparsity=0.9, round_to=8, min_keep=10)
    widths = [(layer.width, layer.n_out) for layer in pruner.history[-1].layers]
    assert all(width >= 10 and (width % 8 == 0 or width == n) for width, n in widths), widths
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, sparsity=0.97)
    assert min(layer.width for layer in pruner.history[-1].layers) == 1  # never none
    assert torch.isfinite(pruner.finalize()(X)).all()


def test_sparsity_per_layer_serves_models_without_batchnorm():
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.ReLU(), nn.Conv2d(20, 10, 3),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        return net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)

    model, optimizer = build()
    with pytest.raises(RepruneError, match=r"sparsity=\{'0': 0.5"):
        REPrune(model, optimizer, example_inputs=X, sparsity=0.5, until=4)
    pruner = prune(model, optimizer, sparsity={"0": 0.25, "*": 0.5}, tie="norm")
    assert [len(pruner.active[name]) for name in ("0", "2")] == [12, 10]
    slim = pruner.finalize()
    assert torch.equal(slim(X), model(X))


def test_other_selections_keep_as_many_filters():
    """By their scores; the schedule, widths and regrowth are those of coverage."""
    found = {}
    for select in ("coverage", "l1", "gamma", "random"):
        actives = []
        for _ in range(2):
            model, optimizer = network("resnet20")
            train(model, optimizer)
            before = copy.deepcopy(model.state_dict())
            pruner = prune(model, optimizer, epochs=0, until=1, select=select, seed=3)
            found[select] = pruner.step()
            actives.append(pruner.active)
        for layer in pruner.channels.prunable:
            kept = actives[0][layer.name]
            assert torch.equal(kept, actives[1][layer.name]), "the same seed, the same filters"
            weight, gamma = before[f"{layer.name}.weight"], before[f"{layer.norm}.weight"]
            score = {"l1": weight.double().abs().sum((1, 2, 3)), "gamma": gamma.abs()}.get(select)
            if score is not None:
                assert torch.equal(score.argsort(descending=True, stable=True)[: len(kept)].sort().values, kept)
    widths = {select: [layer.kept for layer in event.layers] for select, event in found.items()}
    assert all(row == widths["coverage"] for row in widths.values())
    assert all(event.coverage < found["coverage"].coverage for name, event in found.items() if name != "coverage")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(RepruneError, match='select="gamma" needs a BatchNorm'):
        REPrune(net, None, example_inputs=X, sparsity={"0": 0.5}, until=4, select="gamma")
    with pytest.raises(RepruneError, match="select must be one of coverage, l1"):
        REPrune(net, None, example_inputs=X, sparsity={"0": 0.5}, until=4, select="l2")


def test_other_filters_come_back_by_another_rule():
    found = {}
    for rule in ("residual", "coverage", "random"):
        model, optimizer = network("resnet20")
        pruner = prune(model, optimizer, epochs=2, regrow=0.4, regrow_by=rule)
        found[rule] = pruner.active
        assert pruner.history[0].sparsity < 0.45, "something came back"
    for one, other in (("residual", "coverage"), ("residual", "random"), ("coverage", "random")):
        assert any(not torch.equal(found[one][name], found[other][name]) for name in found[one])
    with pytest.raises(RepruneError, match="regrow_by must be one of residual, coverage, random; got 'gram'"):
        prune(*network("resnet20"), regrow_by="gram")


def test_the_regrown_come_back_as_they_left_and_without_momentum():
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, epochs=2, regrow=0.4)
    then, gone = copy.deepcopy(model.state_dict()), copy.deepcopy(pruner.active)
    train(model, optimizer, 5)
    event = pruner.step()
    found = 0
    for layer, record in zip(pruner.channels.prunable, event.layers, strict=True):
        back = [i for i in pruner.active[layer.name].tolist() if i not in gone[layer.name].tolist()]
        found += len(back)
        assert len(back) <= record.width - record.kept
        for name in (layer.name, *layer.followers):
            for key, tensor in model.get_submodule(name).state_dict().items():
                if tensor.dim():
                    assert torch.equal(tensor[back], then[f"{name}.{key}"][back]), (name, key)
        momentum = optimizer.state[model.get_submodule(layer.name).weight]["momentum_buffer"]
        assert momentum[back].abs().sum() == 0 and momentum.abs().sum() > 0
        if back:
            sample = momentum, back
    assert found > 0
    train(model, optimizer, 1)
    momentum, back = sample
    assert momentum[back].abs().sum() > 0  # they train again


def test_the_redrawn_lose_their_momentum(monkeypatch):
    """A filter that coverage drops and regrowth draws at the same event has left and come back, too."""
    outcomes, read = [], event_module.PreparedEvent.read
    monkeypatch.setattr(event_module.PreparedEvent, "read", lambda self: outcomes.append(read(self)) or outcomes[-1])
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer, epochs=1, regrow=0.4)
    drawn = 0
    kept, active = (pruner._pool.split(mask) for mask in (outcomes[0].kept, outcomes[0].active))
    for layer, own, now in zip(pruner.channels.prunable, kept, active, strict=True):
        momentum = optimizer.state[model.get_submodule(layer.name).weight]["momentum_buffer"]
        assert momentum[now & ~own].abs().sum() == 0
        assert momentum[own].abs().sum(dim=(1, 2, 3)).min() > 0
        drawn += int((now & ~own).any())
    assert drawn > 5


def run(epochs, save_after=None, path=None, resume=False, order=("model", "optimizer", "pruner")):
    model, optimizer = network("resnet20", seed=9 if resume else 0)
    options = {"sparsity": 0.5, "every": 2, "until": 6, "example_inputs": X[:2]}
    pruner = REPrune(model, optimizer, **options)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    if resume:
        state = checkpoint.read(path)
        for part in order:
            parts[part].load_state_dict(state[part])
    while pruner.epoch < epochs:
        train(model, optimizer)
        pruner.step()
        if pruner.epoch == save_after:
            checkpoint.write(path, {name: part.state_dict() for name, part in parts.items()})
    momentum = {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
    return pruner, {**model.state_dict(), **momentum}


@pytest.mark.parametrize("order", [("model", "optimizer", "pruner"), ("pruner", "optimizer", "model")])
@pytest.mark.parametrize("save_after", [2, 3])
def test_resume_is_bit_identical(tmp_path, order, save_after):
    pruner, whole = run(7, save_after, tmp_path / "c.safetensors")
    resumed_pruner, resumed = run(7, path=tmp_path / "c.safetensors", resume=True, order=order)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert [e.epoch for e in pruner.history] == [2, 4, 6]
    for a, b in zip(pruner.history, resumed_pruner.history, strict=True):
        assert [(x.name, x.kept, x.width, x.coverage, x.h) for x in a.layers] == [
            (x.name, x.kept, x.width, x.coverage, x.h) for x in b.layers
        ]


def test_state_is_tensors_and_plain_values():
    model, optimizer = network()
    state = prune(model, optimizer).state_dict()

    def plain(value):
        if torch.is_tensor(value):
            return value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        assert value is None or isinstance(value, (bool, int, float, str)), type(value)
        return value

    json.dumps(plain(state))


def test_finalize_hands_over_to_the_narrow_network():
    model, optimizer = network("resnet20")
    pruner = prune(model, optimizer)
    twin, twin_optimizer = network("resnet20")  # goes on training with full-shape parameters
    twin.load_state_dict(model.state_dict()), twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_pruner = REPrune(twin, twin_optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=4)
    twin_pruner.load_state_dict(pruner.state_dict())
    slim = pruner.finalize()
    assert type(slim) is type(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in slim.modules())
    assert torch.equal(slim(X), model(X))
    assert sum(p.numel() for p in slim.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())
    for layer in pruner.channels.prunable:
        conv, reader = slim.get_submodule(layer.name), slim.get_submodule(layer.readers[0].name)
        assert conv.out_channels == reader.in_channels == len(conv.weight) == len(pruner.active[layer.name])
        assert slim.get_submodule(layer.norm).num_features == conv.out_channels
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in slim.parameters()}
    twin(X)  # `slim` saw this batch above, and BatchNorm keeps count
    for _ in range(3):
        train(slim, optimizer, 1)
        train(twin, twin_optimizer, 1)
    expected = twin_pruner.compact().state_dict()
    assert all(torch.allclose(value, expected[key], atol=1e-6) for key, value in slim.state_dict().items())


def test_an_ema_is_compacted_alike():
    model, optimizer = network()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=2)
    for _ in range(2):
        train(model, optimizer)
        ema.update_parameters(model)
        pruner.step()
    slim = pruner.compact(ema.module)
    assert {k: v.shape for k, v in slim.state_dict().items()} == {
        k: v.shape for k, v in pruner.finalize().state_dict().items()
    }
    assert torch.isfinite(slim.eval()(X)).all()


def test_distributed_data_parallel_is_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, optimizer = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        pruner = REPrune(wrapped, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=3)
        for _ in range(3):
            train(wrapped, optimizer)
            pruner.step()
        assert pruner.finalize().state_dict().keys() == model.state_dict().keys()
        with pytest.raises(RepruneError, match="wrap what it returns anew"):
            REPrune(wrapped, None, example_inputs=X[:2], sparsity=0.5, until=3, compact="auto")
    finally:
        torch.distributed.destroy_process_group()


def test_the_narrow_network_saves_loads_and_exports(tmp_path):
    model, optimizer = network("resnet20")
    slim = prune(model, optimizer).finalize().eval()
    expected = slim(X)
    checkpoint.save(slim, tmp_path / "slim.safetensors")
    again = checkpoint.load(tmp_path / "slim.safetensors", models.build("resnet20", num_classes=10)).eval()
    assert torch.equal(again(X), expected)

    exported = torch.export.export(slim, (X,))
    assert torch.allclose(exported.module()(X), expected, atol=1e-5)

    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(slim, (X,), tmp_path / "slim.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert np.allclose(found, expected.detach().numpy(), atol=1e-4)


def test_a_compiled_model_follows_every_event():
    model, optimizer = network()
    compiled = torch.compile(model, backend="eager")
    pruner = REPrune(compiled, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=2)
    for _ in range(2):
        train(compiled.train(), optimizer)
        with torch.no_grad():
            before = compiled.eval()(X)  # compiled with the channels of before the event
            pruner.step()
            assert torch.equal(compiled(X), model(X)) and not torch.equal(compiled(X), before)


def test_a_model_compiled_in_place_and_a_compiled_step():
    model, optimizer = small()
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=2, regrow=0.0)
    model.compile(backend="eager")
    step = torch.compile(optimizer.step, backend="eager")
    pruner.step()
    gone, before = pruner._state.pruned["conv1"], model.conv1.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        found, expected = model(X), pruner.compact()(X)
        assert torch.allclose(found, expected, atol=1e-5)
        F.cross_entropy(found, Y).backward()
        step()
    assert len(gone) and torch.equal(model.conv1.weight[gone], before[gone])
    assert not torch.equal(model.conv1.weight, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_traces_of_a_narrow_model_are_that_model():
    """While it is pruned, and when it is final; made in the ways that there are."""
    model, optimizer = small()
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=1)
    train(model, optimizer)
    pruner.step()
    expected = model.eval()(X)
    for make in (lambda x: torch.jit.trace(x, X[:2]), torch.fx.symbolic_trace):
        assert torch.allclose(make(model)(X), expected, atol=1e-6)
    slim, any_batch = pruner.finalize().eval(), ({0: torch.export.Dim("b")},)
    for make in (
        torch.jit.script, lambda x: torch.jit.trace(x, X[:2]), torch.fx.symbolic_trace,
        lambda x: torch.export.export(x, (X[:2],), dynamic_shapes=any_batch).module(),
    ):  # fmt: skip
        assert torch.allclose(make(slim)(X), expected, atol=1e-6)


def test_features_taken_from_inside_are_those_of_the_narrow_model():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, optimizer = network()
    pruner = prune(model, optimizer)
    model.eval()
    nodes = {"stage1.0.conv2": "a", "stage3": "b"}
    wide = extraction.create_feature_extractor(model, nodes)(X)
    slim = extraction.create_feature_extractor(pruner.compact().eval(), nodes)(X)
    first = nn.Sequential(*list(model.children())[:-1])(X)  # or the modules one by one
    assert all(torch.allclose(wide[key], slim[key], atol=1e-5) for key in ("a", "b"))
    assert torch.allclose(first, nn.Sequential(*list(pruner.compact().eval().children())[:-1])(X), atol=1e-5)


def test_what_a_model_says_of_its_features_stays_true():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", features_only=True, out_indices=(0, 1, 2))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    pruner = REPrune(model, None, example_inputs=torch.randn(2, 3, 32, 32), sparsity=0.5, every=1, until=1)
    pruner.step()
    slim = pruner.finalize().eval()
    assert [x.shape[1] for x in slim(torch.randn(2, 3, 32, 32))] == slim.feature_info.channels() == [64, 64, 128]
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("wrap, prefix", [
    (nn.DataParallel, "module."),
    (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    (lambda model: nn.DataParallel(torch.compile(model, backend="eager")), "module._orig_mod."),
])  # fmt: skip
def test_names_are_those_of_the_model_inside_its_wrappers(wrap, prefix):
    """And options may have the wrapped ones."""
    model, optimizer = network()
    wrapped = wrap(model)
    assert f"{prefix}stage1.0.conv1" in dict(wrapped.named_modules())
    shares = {f"{prefix}stage2.*": 0.25, "stage3.*": 0.5}
    ignore = f"{prefix}stage1.0.conv1"
    options = {"example_inputs": X[:2], "every": 1, "until": 1, "ignore": ignore}
    pruner = REPrune(wrapped, optimizer, **options, sparsity=shares)
    assert pruner.explain().keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert pruner.explain()["stage1.0.conv1"] == "ignored, as asked"
    train(wrapped, optimizer)
    assert [(x.name, x.width) for x in pruner.step().layers] == [("stage2.0.conv1", 24), ("stage3.0.conv1", 32)]
    bare, _ = network(seed=1)
    bare.load_state_dict(model.state_dict())
    options["ignore"] = "stage1.0.conv1"
    resumed = REPrune(bare, None, **options, sparsity={"stage2.*": 0.25, "stage3.*": 0.5})
    resumed.load_state_dict(pruner.state_dict())
    assert torch.equal(bare.eval()(X), wrapped.eval()(X)) and torch.equal(pruner.compact(model)(X), bare(X))
    assert type(pruner.finalize()) is type(model)


class Noisy(nn.Module):
    """Draws from every generator there is, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3)
        self.own = torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)

    def forward(self, x):
        own, numpys, pythons = self.own
        noise = torch.rand(()) + np.random.rand() + random.random()
        noise = noise + torch.rand((), generator=own) + numpys.random() + pythons.random()
        x = nn.functional.dropout(self.bn1(self.conv1(x)).relu(), 0.01 * float(noise), self.training)
        return self.conv2(x).mean((2, 3))


class Langevin(torch.optim.SGD):
    """Draws from all of them, too."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad += 1e-9 * (torch.randn_like(p) + np.random.rand() + random.random())
        return super().step(closure)


def test_the_programs_generators_are_left_as_they_are():
    """And the model's own."""
    model = Noisy()
    optimizer = Langevin(model.parameters(), 0.05)
    nn.init.uniform_(model.bn1.weight)

    def states():
        own, numpys, pythons = model.own
        return (
            torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(), own.get_state().tolist(),
            numpys.bit_generator.state, pythons.getstate(),
        )  # fmt: skip

    before = states()
    analysis.analyse(model, X[:2])
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=2)
    assert states() == before
    pruner.step(), pruner.compact(), pruner.step(), pruner.finalize()
    assert states() == before


def test_a_pruner_works_under_inference_mode():
    """As an evaluation does that ends with a step: what is made there can be trained."""
    model, optimizer = network()
    with torch.inference_mode():
        x = X[:2] * 1
        pruner = REPrune(model, optimizer, example_inputs=x, sparsity=0.5, every=1, until=2)
    for _ in range(2):
        train(model.train(), optimizer)
        with torch.inference_mode():
            model.eval()(X)
            pruner.step()
            model(X)  # the first forward on the new channels
            pruner.optimizer = optimizer  # tried out again
            twin = pruner.compact()
            state = pruner.state_dict()
    train(model.train(), optimizer)
    with torch.inference_mode():
        pruner.load_state_dict(state)
        slim = pruner.finalize()
    for found in (slim, model, twin):
        train(found, optimizer, 1)
    assert not any(t.is_inference() for t in (*slim.state_dict().values(), *slim.parameters()))


def test_an_event_under_inference_mode_makes_the_model_narrow_in_place():
    model, optimizer = network()
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=1, compact="auto")
    train(model, optimizer)
    with torch.inference_mode():
        pruner.step()
    train(model, optimizer)


def test_an_ema_wrapper_is_unwrapped():
    model, optimizer = network()
    ema = torch.optim.swa_utils.AveragedModel(model)
    pruner = prune(model, optimizer)
    ema.update_parameters(model)
    assert pruner.compact(ema).state_dict().keys() == model.state_dict().keys()
    assert sum(p.numel() for p in pruner.compact(ema).parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(RepruneError, match="has no module stage1.0.bn1"):
        pruner.compact(nn.Sequential(model))


def test_an_event_that_fails_can_be_repeated():
    model, optimizer = network()
    pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=1)
    train(model, optimizer)
    weight = model.get_submodule("stage1.0.conv1").weight
    good = weight.detach().clone()
    weight.data[0] = float("inf")
    with pytest.raises(RepruneError, match="holds NaN or inf at epoch 1"):
        pruner.step()
    weight.data.copy_(good)
    assert pruner.step().epoch == 1


def test_only_averages_of_gradients_are_zeroed():
    model, _ = network()
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.01)
    pruner = prune(model, optimizer, regrow=0.0)
    layer = pruner.channels.prunable[0]
    gone = [i for i in range(layer.n_out) if i not in pruner.active[layer.name].tolist()]
    average = optimizer.state[model.get_submodule(layer.norm).weight]["ax"]
    assert average[gone].abs().min() > 0


class TestErrors:
    def test_optimizers_that_cannot_follow(self):
        model, _ = network()
        for kind in (torch.optim.LBFGS, torch.optim.Adafactor):
            with pytest.raises(RepruneError, match="use SGD, AdamW"):
                REPrune(model, kind(model.parameters()), example_inputs=X[:2], sparsity=0.5, until=4)
        part = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], 0.1)
        with pytest.raises(RepruneError, match="does not train stage1.0.bn1.weight"):
            REPrune(model, part, example_inputs=X[:2], sparsity=0.5, until=4)

    def test_the_order_of_patterns_counts(self):
        options = {"example_inputs": X[:2], "every": 1, "until": 4}
        a, b = {"stage1.*": 0.25, "*": 0.5}, {"*": 0.5, "stage1.*": 0.25}
        state = REPrune(*network(), sparsity=a, **options).state_dict()
        with pytest.raises(RepruneError, match="saved with sparsity"):
            REPrune(*network(), sparsity=b, **options).load_state_dict(state)
        REPrune(*network(), sparsity=a, **options).load_state_dict(state)

    @pytest.mark.parametrize("options, message", [
        ({}, "give one of sparsity= .* and flops="),
        ({"sparsity": 0.5, "flops": 0.5}, "give one of"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).*got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": float("nan")}, "sparsity must be in"),
        ({"sparsity": "half"}, "sparsity must be in"),
        ({"sparsity": {"stage1.*": 1.5}}, r"sparsity of stage1.\* must be"),
        ({"sparsity": {"nowhere": 0.5}}, "sparsity= names 'nowhere', which fits no conv"),
        ({"flops": 0.0}, r"flops must be in \(0, 1\]"),
        ({"flops": 1.5}, "flops must be in"),
        ({"flops": 0.01}, "out of reach: .*still has 0.09"),
        ({"sparsity": 0.5, "until": None}, "until= is missing"),
        ({"sparsity": 0.5, "every": 0}, "every must be a whole number of at least 1; got 0"),
        ({"sparsity": 0.5, "until": 2.5}, "until must be a whole number"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to must be"),
        ({"sparsity": 0.5, "min_keep": -1}, "min_keep must be"),
        ({"sparsity": 0.5, "regrow": 1.0}, r"regrow must be in \[0, 1\)"),
        ({"sparsity": 0.5, "linkage": "centroid"}, "linkage must be one of ward, .*got 'centroid'"),
        ({"sparsity": 0.5, "tie": "first"}, "tie must be one of random, "),
        ({"sparsity": 0.5, "impl": "cuda"}, "impl must be one of auto, "),
        ({"sparsity": 0.5, "ignore": ["stage1.0.conv1", "stage.1"]}, "ignore= names 'stage.1', which fits no conv"),
        ({"sparsity": 0.5, "ration": 1}, "unknown option ration; there are sparsity, flops"),
        ({"sparsity": 0.5, "ignore": "*"}, r"nothing to prune in CifarResNet(.|\n)*stage1.0.conv1: ignored, as asked"),
    ])  # fmt: skip
    def test_options(self, options, message):
        model, optimizer = network()
        with pytest.raises(RepruneError, match=message):
            REPrune(model, optimizer, example_inputs=X[:2], **{"until": 4, **options})

    def test_nan_names_the_layer(self):
        model, optimizer = network()
        pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=4)
        train(model, optimizer)
        with torch.no_grad():
            model.get_submodule("stage2.0.conv1").weight[3, 2, 1, 1] = float("nan")
        with pytest.raises(RepruneError, match="stage2.0.conv1.weight holds NaN or inf at epoch 1"):
            pruner.step()

    def test_untrained_scales(self):
        model, optimizer = network()
        pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=1)
        with pytest.raises(RepruneError, match="BatchNorm scales are equal .*Train before the first pruning event"):
            pruner.step()
        train(model, optimizer)
        assert pruner.step().sparsity == pytest.approx(0.5, abs=0.03)

    def test_after_the_end(self):
        model, optimizer = network()
        pruner = prune(model, optimizer)
        pruner.finalize()
        with pytest.raises(RepruneError, match=r"step\(\) after finalize\(\)"):
            pruner.step()
        with pytest.raises(RepruneError, match="called before"):
            pruner.finalize()
        with pytest.raises(RepruneError, match="saved after finalize"):
            fresh = REPrune(*network(), example_inputs=X[:2], sparsity=0.5, every=1, until=4)
            fresh.load_state_dict(pruner.state_dict())

    def test_a_state_of_another_model_or_options(self):
        state = prune(*network()).state_dict()
        with pytest.raises(RepruneError, match="another model: stage1.1.conv1 has 16 filters here and no prunable"):
            REPrune(*network("resnet20"), example_inputs=X[:2], sparsity=0.5, every=1, until=4).load_state_dict(state)
        with pytest.raises(RepruneError, match="saved with sparsity=0.5, and this pruner has sparsity=0.6"):
            REPrune(*network(), example_inputs=X[:2], sparsity=0.6, every=1, until=4).load_state_dict(state)
        with pytest.raises(RepruneError, match="not a pruner's state_dict"):
            REPrune(*network(), example_inputs=X[:2], sparsity=0.5, until=4).load_state_dict({"epoch": 1})

    def test_a_model_that_is_being_pruned(self):
        model, optimizer = network()
        pruner = prune(model, optimizer)
        for again in (model, copy.deepcopy(model)):
            with pytest.raises(RepruneError, match="runs on part of its channels already"):
                REPrune(again, None, example_inputs=X[:2], sparsity=0.5, until=4)
        REPrune(pruner.finalize(), optimizer, example_inputs=X[:2], sparsity=0.2, until=4)

    def test_an_optimizer_of_another_model(self):
        with pytest.raises(RepruneError, match="trains none of this model's parameters"):
            REPrune(network()[0], network()[1], example_inputs=X[:2], sparsity=0.5, until=4)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")]),
    ],
)
def test_the_kernels_prune_like_the_reference(device):
    """Two events, the second over active filters and inputs; tie="index", so that only the clustering decides."""
    def pruned(impl):
        torch.manual_seed(0)
        layers = []
        for n_in, n_out, k in ((3, 12, 3), (12, 10, 1), (10, 8, 3)):
            layers += [nn.Conv2d(n_in, n_out, k, padding=k // 2, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(device)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
        options = {"sparsity": 0.4, "tie": "index", "regrow": 0.2, "until": 2, "every": 1, "round_to": 1}
        pruner = REPrune(model, None, example_inputs=X[:2].to(device), impl=impl, **options)
        return [pruner.step() for _ in range(2)], pruner.active

    events, active = pruned("triton")
    expected_events, expected = pruned("reference")
    assert {name: index.tolist() for name, index in active.items()} == {n: i.tolist() for n, i in expected.items()}
    for event, wanted in zip(events, expected_events, strict=True):
        assert event.coverage == wanted.coverage and 0 < event.stages["cluster"] < event.ms
        for layer, wanted_layer in zip(event.layers, wanted.layers, strict=True):
            assert layer.h == pytest.approx(wanted_layer.h, rel=1e-5) and layer.kept == wanted_layer.kept
    assert any(layer.width < layer.n_out for layer in events[0].layers)


def test_a_dead_network_is_pruned_as_far_as_asked():
    for zero in (0.1, 0.6, 1.0):
        model, _ = network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0).data[: int(zero * len(module.weight))] = 0
        pruner = REPrune(model, None, example_inputs=X[:2], sparsity=0.25, every=1, until=1)
        assert pruner.step().sparsity == pytest.approx(0.25, abs=0.02)


def test_where_half_of_the_scales_are_zero_half_of_each_layer_goes():
    model, _ = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0).data[::2] = 0
    event = REPrune(model, None, example_inputs=X[:2], sparsity=0.5, every=1, until=1).step()
    assert event.sparsity == 0.5 and all(layer.width == layer.n_out // 2 for layer in event.layers)


class Small(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3)))


def small(kind=Small, **options):
    torch.manual_seed(0)
    model = kind(**options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0), nn.init.normal_(module.bias)
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


DEGENERATE = {
    "identical": lambda w: w[:1].expand_as(w),
    "zero": torch.zeros_like,
    "two distinct": lambda w: w[torch.arange(len(w)) % 2],
    "one-hot": lambda w: nn.init.dirac_(torch.empty_like(w)),
    "two levels": torch.sign,
    "huge": lambda w: w * 1e18,
    "tiny": lambda w: w * 1e-20,
    "subnormal": lambda w: w * 1e-40,
    "one filter far away": lambda w: torch.cat([w[:1] * 1e12, w[1:]]),
    "thirty decades": lambda w: w * torch.logspace(-15, 15, len(w))[:, None, None, None],
    "cancellation": lambda w: w + 1e4,
}


@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_degenerate_weights_are_pruned_as_far_as_asked(linkage):
    """To a network that runs, and computes when it is narrow what it computes while it is pruned."""
    model, _ = small(width=16)
    start = REPrune(model, None, example_inputs=X[:2], sparsity=0.5, every=1, until=1, linkage=linkage)
    for name, fill in DEGENERATE.items():
        pruner = copy.deepcopy(start)
        twin = pruner.model
        with torch.no_grad():
            for conv in (twin.conv1, twin.conv2):
                conv.weight.copy_(fill(conv.weight.clone()))
        event = pruner.step()
        assert event.sparsity == 0.5, name
        assert all(0 < x.coverage <= 1 and 0 <= x.h < math.inf for x in event.layers), name
        if name in ("identical", "zero", "two distinct"):
            assert event.coverage == 1 and all(x.h == 0 for x in event.layers), name
        expected = twin.eval()(X)
        assert torch.equal(pruner.finalize().eval()(X), expected) and torch.isfinite(expected).all(), name


class Bytes(Small):
    """Takes images as bytes, and normalises them inside."""

    def forward(self, x):
        return super().forward((x.float() / 255 - 0.5) / 0.25)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = Small(), nn.Linear(10, 10)

    def forward(self, x):
        return self.head(self.net(x))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield X.double()
    torch.set_default_dtype(torch.float32)


def check_run(model, optimizer, x, part=None, **options):
    """Train, prune twice, and end with the network that was there."""
    pruner = REPrune(part or model, optimizer, example_inputs=x[:2], sparsity=0.5, every=1, until=2, **options)
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), Y).backward()
            optimizer.step()
        event = pruner.step()
    expected = model.eval()(x)
    slim = pruner.finalize()
    assert event.sparsity == 0.5 and sum(len(index) for index in pruner.active.values()) == 8
    if part is None:
        assert torch.allclose(slim.eval()(x), expected, atol=1e-5 if x.dtype != torch.float64 else 1e-12)
    return slim


def test_images_may_be_bytes():
    check_run(*small(Bytes), torch.randint(0, 255, (16, 3, 8, 8), dtype=torch.uint8))


def test_inputs_may_be_strided_and_ask_for_gradients():
    check_run(*small(), X.permute(0, 1, 3, 2).requires_grad_())


def test_the_default_type_may_be_float64(double):
    slim = check_run(*small(), double)
    assert slim.conv1.weight.dtype == torch.float64


def test_all_of_it_may_run_inside_autocast():
    model, optimizer = small()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache would keep weights from before steps
        slim = check_run(model, optimizer, X)
    assert all(p.dtype == torch.float32 for p in slim.parameters())


def test_a_part_of_a_model_is_made_narrow_in_place():
    model, optimizer = small(Part)
    assert check_run(model, optimizer, X, model.net, compact="auto") is model.net
    assert model.net.conv1.out_channels == len(model.net.conv1.weight) < 8
    train(model, optimizer)


def test_two_pruners_share_an_optimizer():
    models_, x = [small()[0], small(width=12)[0]], X
    optimizer = torch.optim.AdamW([p for model in models_ for p in model.parameters()], 0.01, weight_decay=0.1)
    options = {"example_inputs": x[:2], "sparsity": 0.5, "every": 1, "until": 2, "regrow": 0.2}
    pruners = [REPrune(model, optimizer, **options) for model in models_]

    def both(steps=2):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(sum(model.train()(x) for model in models_), Y).backward()
            optimizer.step()

    def frozen():
        return [
            pruner.model.get_submodule(layer.name).weight[pruner._state.pruned[layer.name]].clone()
            for pruner in pruners
            for layer in pruner.channels.prunable
        ]

    for _ in range(2):
        both()
        for pruner in pruners:
            pruner.step()
        before = frozen()
        both()
        assert all(torch.equal(a, b) for a, b in zip(before, frozen(), strict=True))
    for i, pruner in enumerate(pruners):  # one ends before the other
        expected = models_[i].eval()(x)
        models_[i] = pruner.finalize()
        assert torch.allclose(models_[i].eval()(x), expected, atol=1e-5)
        both()
    assert len(optimizer.state) == sum(len(list(model.parameters())) for model in models_)


def test_a_state_of_an_older_format_is_refused():
    pruner = prune(*network(), epochs=1)
    with pytest.raises(RepruneError, match="of format"):
        pruner.load_state_dict({**pruner.state_dict(), "format": 1})


def ema_of(model):
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))


def run_compacting(compact, epochs=6):
    """Losses of a run with momentum, schedule and EMA, which goes on after its last event in epoch 3."""
    model, optimizer = network("resnet20")
    ema, scheduler = ema_of(model), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    pruner = REPrune(
        model, optimizer, example_inputs=X[:2], ema=ema, sparsity=0.5, every=1, until=3, compact=compact
    )  # fmt: skip
    losses = []
    for _ in range(epochs):
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
            losses.append(loss.item())
        scheduler.step()
        pruner.step()
    return pruner, model, ema, losses


def test_compact_auto_swaps_in_the_narrow_network_and_the_loss_goes_on():
    pruner, model, ema, losses = run_compacting("auto")
    wide, full, full_ema, expected = run_compacting("off")
    assert losses[:9] == expected[:9]  # up to the last event nothing differs, from there on the order of sums may
    assert losses == pytest.approx(expected, rel=1e-4)
    assert pruner.finalize() is model and pruner.epoch == 6
    own = {id(p) for group in pruner.optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in model.parameters()}
    assert {id(p) for p in pruner.optimizer.state} == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *ema.modules()))
    for mine, theirs in ((model, full), (ema, full_ema)):
        slim, twin = pruner.compact(mine).state_dict(), wide.compact(theirs).state_dict()
        assert slim.keys() == twin.keys()
        assert all(torch.allclose(slim[key], twin[key], rtol=1e-3, atol=1e-4) for key in slim)
    for layer in pruner.channels.prunable:
        conv = model.get_submodule(layer.name)
        assert conv.out_channels == len(conv.weight) == len(pruner.active[layer.name]) < layer.n_out


@pytest.mark.parametrize("order", [("pruner", "model", "optimizer"), ("optimizer", "pruner", "model")])
def test_a_compacted_run_resumes_bit_by_bit(tmp_path, order):
    def parts():
        model, optimizer = network()
        pruner = REPrune(model, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=2, compact="auto")
        return {"model": model, "optimizer": optimizer, "pruner": pruner}

    def go_on(found, epochs):
        for _ in range(epochs):
            train(found["model"], found["optimizer"])
            found["pruner"].step()

    whole, resumed = parts(), parts()
    go_on(whole, 3)
    checkpoint.write(tmp_path / "c.safetensors", {name: part.state_dict() for name, part in whole.items()})
    go_on(whole, 2)
    state = checkpoint.read(tmp_path / "c.safetensors")
    for name in order:
        resumed[name].load_state_dict(state[name])
    go_on(resumed, 2)
    assert resumed["pruner"].epoch == 5
    for name in ("model", "optimizer"):
        a, b = (torch.utils._pytree.tree_leaves(found[name].state_dict()) for found in (whole, resumed))
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))
    with pytest.raises(RepruneError, match="build model and pruner anew"):
        resumed["pruner"].load_state_dict(state["pruner"])


def test_a_compiled_model_runs_on_when_it_is_compacted():
    model, optimizer = network()
    fast = torch.compile(model, backend="eager")
    pruner = REPrune(fast, optimizer, example_inputs=X[:2], sparsity=0.5, every=1, until=1, compact="auto")
    train(fast, optimizer)
    pruner.step()
    train(fast, optimizer)
    model.eval(), fast.eval()
    assert torch.allclose(fast(X), model(X), atol=1e-6)
