"""One event over a whole network: the same filters from every implementation, and a fixed sequence of launches."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reprune_triton import REPrune, ops
from reprune_triton.errors import RepruneError
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.selection import event, reference, regrow
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.rng import derive_seeds, random_bits
from reprune_triton.selection.widths import Budget, Scales, Widths, at_flops, at_sparsity

SHAPES = ((12, 3, 3), (10, 4, 1), (33, 3, 1), (9, 3, 2), (1, 4, 1))  # n_out, n_in, k
TERMS = [(9, 0, None), (4, 1, 0), (2, 2, 1), (30, None, None)]
BUDGET = sum(unit * math.prod(SHAPES[i][0] for i in layers if i is not None) for unit, *layers in TERMS) // 2


def network(device, seed=0, dtypes=(torch.float32,)) -> list[ops.Layer]:
    """Layers with some of their filters and inputs active: of every shape the same ones, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number, (n_out, n_in, k) in enumerate(SHAPES):
        weight = torch.randn(n_out, n_in, k, k, generator=generator).to(device, dtypes[number % len(dtypes)])
        filters = None if number == 0 else torch.arange(n_out)[: max(1, n_out - 2)].to(device)
        inputs = None if number % 2 else torch.arange(n_in)[::2].contiguous().to(device)
        layers.append(ops.Layer(weight, filters, inputs, f"conv{number}"))
    return layers


def request(layers, seed=0, tie="random", budget=False, extra=0.15, **options) -> event.Request:
    device = layers[0].weight.device
    pool = Pool([layer.n_out for layer in layers], device)
    gammas = torch.rand(pool.total, generator=torch.Generator().manual_seed(seed)).to(device)
    active = torch.ones_like(gammas, dtype=torch.bool)
    for layer, row in zip(layers, pool.split(active), strict=True):
        if layer.filters is not None:
            row[layer.n :] = False
    most = Budget(pool, TERMS, BUDGET)

    def widths() -> Widths:
        scales = Scales(pool, gammas, active)
        if budget:
            return at_flops(scales, most, extra, 1, 1)
        return at_sparsity(scales, 0.5, extra, 1, 1)

    scores = {
        "norm": lambda: torch.cat([layer.rows().double().norm(dim=1) for layer in layers]),
        "gamma": lambda: gammas,
    }
    seeds = derive_seeds(seed, 3, len(layers), 2).tolist()
    return event.Request(
        layers, pool, widths, seeds, tie=tie, scores=scores.get(tie), regrow=extra > 0,
        **{"watched": [gammas, *(layer.weight for layer in layers)], **options},
    )  # fmt: skip


def run(*arguments, **options) -> event.Outcome:
    found = event.PreparedEvent(request(*arguments, **options))
    found.launch()
    return found.read()


def same(one: event.Outcome, other: event.Outcome) -> bool:
    heights = [(a.h, b.h) for a, b in zip(one.layers, other.layers, strict=True)]
    return (
        torch.equal(one.active.cpu(), other.active.cpu())
        and torch.equal(one.kept.cpu(), other.kept.cpu())
        and [layer[:4] for layer in one.layers] == [layer[:4] for layer in other.layers]
        and one.rank == other.rank
        and all(a == pytest.approx(b, rel=1e-5) for a, b in heights)
    )


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_comes_back_by_every_rule(impl, device):
    layers = network(device if impl == "triton" else "cpu")
    found = {rule: run(layers, extra=0.2, impl=impl, regrow_by=rule) for rule in regrow.RULES}
    usual = found["residual"]
    assert same(usual, run(layers, extra=0.2, impl=impl))
    pool = Pool([layer.n_out for layer in layers], layers[0].weight.device)
    seeds = request(layers).seeds
    for rule, outcome in found.items():
        assert torch.equal(outcome.kept, usual.kept) and [x.width for x in outcome.layers] == [
            x.width for x in usual.layers
        ]
        assert (rule == "residual") == torch.equal(outcome.active, usual.active)
        scores = torch.zeros(pool.total, dtype=torch.float64, device=pool.device)
        if rule == "coverage":  # over all filters, active or not, and the active input channels
            scores = regrow.distances([layer._replace(filters=None).points() for layer in layers], usual.kept, pool)
        if rule != "residual":
            bits = torch.cat([
                random_bits(seed, 0, layer.n_out, pool.device)
                for (_, seed), layer in zip(seeds, layers, strict=True)
            ])  # fmt: skip
            width = torch.tensor([x.width for x in usual.layers], device=pool.device)
            assert torch.equal(regrow.draw(scores, usual.kept, width, bits, pool), outcome.active)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_another_selection_keeps_the_largest_scores_and_counts_what_they_cover(impl, device):
    layers = network(device if impl == "triton" else "cpu")
    pool = Pool([layer.n_out for layer in layers], layers[0].weight.device)
    scores = torch.randint(5, (pool.total,), generator=torch.Generator().manual_seed(1)).to(pool.device)  # with ties
    wanted = request(layers, extra=0.0, impl=impl)
    found = event.PreparedEvent(dataclasses.replace(wanted, select="l1", scores=lambda: scores))
    found.launch()
    outcome, usual = found.read(), run(layers, extra=0.0, impl=impl)
    assert [layer.kept for layer in outcome.layers] == [layer.kept for layer in usual.layers]
    for layer, score, kept, got in zip(layers, *map(pool.split, (scores, outcome.kept)), outcome.layers, strict=True):
        active = range(layer.n_out) if layer.filters is None else layer.filters.tolist()
        best = sorted(active, key=lambda i, score=score: (-int(score[i]), i))[: got.kept]
        assert sorted(best) == kept.nonzero().flatten().tolist()
        ((_, clusters),) = ops.cluster_network([layer], [got.kept], impl=impl)
        at = [list(active).index(i) for i in best]
        assert got.covered == sum(len({int(row[i]) for i in at}) for row in clusters.labels)
        assert got.clusters == sum(len(set(row.tolist())) for row in clusters.labels)
    covered = [sum(layer.covered for layer in some.layers) for some in (outcome, usual)]
    assert covered[0] < covered[1], "greedy covers more"


@pytest.mark.parametrize(("tie", "budget"), [*((tie, False) for tie in ops.TIES), ("random", True)])
def test_the_kernels_choose_what_the_reference_chooses(tie, budget, device):
    layers = network(device)
    ours = run(layers, tie=tie, budget=budget, impl="triton")
    theirs = run(network("cpu"), tie=tie, budget=budget, impl="reference")
    assert same(ours, theirs)
    assert any(layer.width > layer.kept for layer in ours.layers) and any(layer.covered for layer in ours.layers)


def test_an_event_is_its_parts_one_by_one():
    """Widths, clusters, cover and draw, each called alone."""
    layers, seed = network("cpu", 5), 7
    ask = request(layers, seed)
    found = run(layers, seed, impl="reference")
    widths = ask.widths()
    kept, active = ask.pool.split(found.kept), ask.pool.split(found.active)
    for number, layer in enumerate(layers):
        keep = min(int(widths.keep[number]), layer.n)
        ((_, clusters),) = ops.cluster_network([layer], [keep], impl="reference")
        cover = ops.cover(clusters.labels, keep, seed=ask.seeds[number][0])
        candidates = torch.arange(layer.n_out) if layer.filters is None else layer.filters
        chosen = candidates[cover.order.long()]
        outcome = found.layers[number]
        assert sorted(chosen.tolist()) == kept[number].nonzero().flatten().tolist()
        assert outcome == (keep, max(int(widths.width[number]), keep), cover.covered, cover.clusters, clusters.h)
        assert bool((active[number] >= kept[number]).all()) and int(active[number].sum()) == outcome.width
    assert found.rank == int(widths.rank)


def test_without_regrowth_the_kept_are_the_active(device):
    found = run(network(device), extra=0.0, impl="triton")
    assert torch.equal(found.active, found.kept)


def test_layers_of_two_implementations(device):
    """float64 weights are the reference's, all others go through the kernels."""
    layers = network(device, dtypes=(torch.float32, torch.float64))
    if device == "cpu":  # where "auto" is the reference
        parts = {(number % 2 == 0, layers[0].weight.device): [] for number in range(2)}
        for number in range(len(layers)):
            parts[number % 2 == 0, layers[0].weight.device].append(number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "grouped", lambda *_: parts)
            found = run(layers)
    else:
        found = run(layers)
    assert same(found, run(network("cpu", dtypes=(torch.float32, torch.float64)), impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("where", ["gamma", "weight"])
def test_what_is_not_finite_is_left_to_the_check(where, impl, device):
    layers = network(device)
    ask = request(layers, impl=impl)
    (ask.watched[0] if where == "gamma" else ask.watched[3])[2] = math.nan

    def named() -> None:
        raise RepruneError("it is bn2.weight")

    for check, message in ((named, "it is bn2.weight"), (lambda: None, "(not finite|NaN)")):
        found = event.PreparedEvent(request(layers, impl=impl, watched=ask.watched, check=check))
        with pytest.raises(RepruneError, match=message):
            found.launch()
            found.read()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_event_can_be_launched_again(impl, device):
    """With other weights at the same addresses; nothing is left of the first time."""
    layers = network(device)
    found = event.PreparedEvent(request(layers, impl=impl))
    found.launch()
    first = found.read()
    for layer, other in zip(layers, network(device, 1), strict=True):
        layer.weight.copy_(other.weight / 8)  # lower cut heights than before
    found.launch()
    again = found.read()
    assert same(again, run(layers, impl=impl)) and not same(again, first)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_more_to_keep_than_there_are_is_all(impl, device):
    layers = network(device)
    ask = request(layers)
    wide = Widths(ask.pool.n_out, ask.pool.n_out, *ask.widths()[2:])
    found = event.PreparedEvent(event.Request(layers, ask.pool, lambda: wide, ask.seeds, impl=impl, regrow=False))
    found.launch()
    assert [layer.kept for layer in found.read().layers] == [layer.n for layer in layers]


# A fixed sequence that nothing waits for


class Recorder(TorchDispatchMode):
    """Every operation on tensors; none may look at values on the host, or have a size that depends on them."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "item",
        "index.Tensor_b",
    )

    def __init__(self):
        super().__init__()
        self.log: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        assert not any(name.split(".")[1].startswith(wait) for wait in self.WAITS), f"{name} waits for the device"
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cuda", f"{name} brings something to or from the device"
        self.log.append(name)
        return result


@contextlib.contextmanager
def played_gpu(monkeypatch):
    """Tensors on a GPU that is not there: shapes without values. Kernels are recorded, not run."""
    log: list[str] = []

    def record(self, programs, *arguments):
        assert all(argument.device.type == "cuda" for argument in arguments)
        log.append(f"{self.kernel.__name__} {programs} {[tuple(a.shape) for a in arguments]}")

    monkeypatch.setattr(Configuration, "run", record)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    with FakeTensorMode():
        yield log


def fake_network() -> list[ops.Layer]:
    return [
        ops.Layer(
            torch.empty(n_out, n_in, k, k, device="cuda"),
            torch.empty(max(1, n_out - 2), device="cuda", dtype=torch.int64),
            torch.empty(-(-n_in // 2), device="cuda", dtype=torch.int64), f"conv{number}",
        )
        for number, (n_out, n_in, k) in enumerate(SHAPES)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "tie, rule", [*((tie, "residual") for tie in ops.TIES), *(("random", rule) for rule in regrow.RULES[1:])]
)
@pytest.mark.parametrize("budget", [False, True], ids=["sparsity", "flops"])
def test_the_host_waits_once_and_the_sequence_is_fixed(tie, rule, budget, monkeypatch):
    with played_gpu(monkeypatch) as kernels:
        layers = fake_network()
        ask = dataclasses.replace(request_of_nothing(layers, tie, budget), regrow_by=rule)
        found = event.PreparedEvent(ask)
        assert not kernels, "nothing is launched while the host prepares"
        sequences = []
        for _ in range(2):
            kernels.clear()
            with Recorder() as recorder:
                found.launch()
            sequences.append((list(recorder.log), list(kernels)))
        assert sequences[0] == sequences[1]
        names = [line.split()[0] for line in kernels]
        assert names.count("magnitude_kernel") == names.count("cut_height_kernel") == names.count("label_kernel") == 1
        assert names[-3:] == ["membership_kernel", "cover_kernel", "bits_kernel"]
        # The host looks once: at all the numbers of an event together.
        looks = []
        monkeypatch.setattr(FakeTensor, "tolist", lambda self: looks.append(len(self)) or [0.0] * len(self))
        with Recorder():
            outcome = found.read()
    assert looks == [4 + (4 + 3) * len(SHAPES)] and [layer.kept for layer in outcome.layers] == [0] * len(SHAPES)


def request_of_nothing(layers, tie, budget) -> event.Request:
    pool = Pool([layer.n_out for layer in layers], layers[0].weight.device)
    gammas = torch.empty(pool.total, device="cuda")
    active = torch.empty(pool.total, device="cuda", dtype=torch.bool)
    most = Budget(pool, TERMS, BUDGET)

    def widths() -> Widths:
        scales = Scales(pool, gammas, active)
        if budget:
            return at_flops(scales, most, 0.15, 16, 1)
        return at_sparsity(scales, 0.5, 0.15, 16, 1)

    scores = None if tie in ("random", "index") else lambda: gammas
    seeds = derive_seeds(0, 3, len(layers), 2).tolist()
    weights = [layer.weight for layer in layers]
    return event.Request(layers, pool, widths, seeds, tie=tie, scores=scores, watched=[gammas, *weights])


def test_the_recorder_finds_what_waits(monkeypatch):
    with played_gpu(monkeypatch), Recorder():
        x = torch.empty(5, device="cuda")
        for wait in (lambda: x.cpu(), lambda: torch.tensor([1.0]).to("cuda"), lambda: x[x > 0], lambda: float(x[0])):
            with pytest.raises(Exception, match="waits|brings|nonzero|local_scalar"):
                wait()


def chain(device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out, k in ((3, 16, 3), (16, 70, 1), (70, 12, 3)):
        layers += [nn.Conv2d(n_in, n_out, k, padding=k // 2), nn.BatchNorm2d(n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)).to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model


def pruner_of(model: nn.Module, device="cpu", **options) -> REPrune:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(2, 3, 8, 8, device=device)
    model(x).sum().backward()
    optimizer.step()
    return REPrune(
        model, optimizer, example_inputs=x, **{"sparsity": 0.5, "every": 1, "until": 3, "round_to": 1, **options}
    )


def test_an_event_makes_lists_of_channels_without_looking_at_them(monkeypatch):
    """Applying the outcome takes sizes from it, and all indices stay where they are."""
    pruner = pruner_of(chain())
    outcomes, read, enforce = [], event.PreparedEvent.read, pruner._narrowing.enforce

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert not any(wait in str(operation) for wait in ("_local_scalar_dense", "nonzero")), operation
            return operation(*args, **(kwargs or {}))

    looks = Looks()

    def begin(found):
        outcomes.append(read(found))
        looks.__enter__()
        return outcomes[-1]

    def end(setting):
        enforce(setting)
        looks.__exit__(None, None, None)

    monkeypatch.setattr(event.PreparedEvent, "read", begin)
    monkeypatch.setattr(pruner._narrowing, "enforce", end)
    for _ in range(3):
        pruner.step()
        active = pruner._pool.split(outcomes[-1].active)
        for layer, mask in zip(pruner.channels.prunable, active, strict=True):
            assert pruner.active[layer.name].tolist() == mask.nonzero().flatten().tolist()
            assert pruner._state.pruned[layer.name].tolist() == (~mask).nonzero().flatten().tolist()
    assert len(outcomes) == 3
    assert any(len(index) for index in pruner._state.pruned.values())


def test_stages_are_those_of_the_module():
    marks: list[str] = []
    found = event.PreparedEvent(request(network("cpu")))
    found.launch(marks.append)
    assert tuple(marks) == event.STAGES


def test_reference_level_and_labels_are_its_cut():
    parent, height = reference.forest(torch.randn(3, 9, 2), "ward")
    for keep in (1, 4, 9):
        labels, h = reference.cut(parent, height, keep)
        found = reference.cut_height(height, keep)
        assert (found, h) == ((-1.0, 0.0) if keep == 9 else (h, found))
        assert torch.equal(labels, reference.labels(parent, height, found))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tie", ops.TIES)
def test_a_gpu_waits_once(tie):
    found = event.PreparedEvent(request(network("cuda"), tie=tie))
    found.launch()  # compiles
    wanted = found.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = event.PreparedEvent(request_on_gpu(tie))
        again.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(again.read(), wanted)


def request_on_gpu(tie) -> event.Request:
    """As `request`, made without waiting: so it is made before."""
    torch.cuda.set_sync_debug_mode("default")
    found = request(network("cuda"), tie=tie)
    torch.cuda.set_sync_debug_mode("error")
    return found


@pytest.mark.gpu
@needs_gpu
def test_a_step_waits_once():
    """One transfer to the host; whatever else waits would warn here."""
    model = chain("cuda")
    pruner = pruner_of(model, "cuda")
    pruner.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as found:
            pruner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in found if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("budget", [False, True], ids=["sparsity", "flops"])
def test_a_graph_holds_an_event(budget):
    """Captured once, replayed with other weights: what a new event finds. Between events shapes change, and with them
    the graph."""
    layers = network("cuda")
    found = event.PreparedEvent(request(layers, budget=budget))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.launch()
    torch.cuda.current_stream().wait_stream(stream)
    first = found.read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.launch()
    graph.replay()
    assert same(found.read(), first)
    for layer, other in zip(layers, network("cuda", 1), strict=True):
        layer.weight.copy_(other.weight)
    graph.replay()
    changed = found.read()
    assert same(changed, run(network("cuda", 1), budget=budget)) and not same(changed, first)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_and_a_cpu_choose_the_same_filters():
    for seed in range(5):
        assert same(run(network("cuda", seed), seed), run(network("cpu", seed), seed, impl="reference"))
