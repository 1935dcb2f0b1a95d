"""The benchmark of a training step, and the hours that are added up from it: rows, budgets, and that what computes
something else is not timed."""

import argparse
import json
import math

import pytest
import torch
from torch import nn

from reprune_triton import capture
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.estimate import hours, roofline
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure import step, variants
from reprune_triton.errors import RepruneError
from reprune_triton.fused import fusion
from reprune_triton.running import compact, layers, shadows

TINY = ("--model", "resnet8", "--device", "cpu", "--batch", "4", "--size", "16", "--warmup", "1", "--steps", "2")
ALL = ("dense", "dense-fused", "narrow", "narrow-fused", "compact")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device: roofline.Ceilings("a test", 1e11, 1e10, False))


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    path = tmp_path / "rows"
    path.unlink(missing_ok=True)
    code = main(["step", *TINY, "--json", str(path), *arguments])
    return code, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rows(tmp_path, capsys):
    code, rows = run(tmp_path, "--sparsity", "0", "0.5", "0.75", "--runs", "3", "--seed", "2", "--threads", "1")
    assert code == 0
    assert [(row["beside"], row["sparsity"], row["variant"]) for row in rows] == [
        (s, at, v) for s in (0.5, 0.75) for at, names in ((0.0, ALL[:4]), (s, ALL[2:])) for v in names
    ]
    for row in rows:
        dense, narrow = row["sparsity"] == 0.0, row["net"] == "narrow"
        assert row["result"] == "measured" and dense >= (row["net"] == "dense")
        assert row["fused"] == row["variant"].endswith("fused") and row["backend"] == "eager"
        assert row["ms"] == sorted(row["runs_ms"])[1] and row["runs"] == 3
        assert set(row["parts_ms"]) == {"forward", "backward", "optimizer"} and min(row["parts_ms"].values()) > 0
        assert row["images_per_s"] == pytest.approx(4e3 / row["ms"])
        assert row["spread"] == pytest.approx((max(row["runs_ms"]) - min(row["runs_ms"])) / row["ms"])
        assert (row["flops_left"] < 1) == (not dense) and row["dtype"] == "float32" and row["round_to"] == 1
        assert (row["seed"], row["batch"], row["size"], row["warmup"], row["steps"]) == (2, 4, 16, 1, 2)
        assert row["difference"] < 1e-5 and row["difference_float64"] < 1e-12 and "peak_mb" not in row
        assert row["difference_gradient"] < 1e-3 and row["autocast_alone_gradient"] == 0.0
        assert row["share"] == pytest.approx(row["roofline_ms"] / row["ms"]) and row["roofline"] == "eager"
        assert row["torch"] == torch.__version__ and row["threads"] == 1 and row["cpu"] and "commit" in row
        beside = {r["variant"]: r for r in rows if (r["beside"], r["sparsity"]) == (row["beside"], 0.0)}
        plain, same = beside["dense"], beside["dense-fused" if row["fused"] else "dense"]
        whole = pytest.approx(beside[row["variant"]]["ms"] / row["ms"]) if narrow else None
        assert row["ratio_whole"] == whole
        assert row["ratio_dense"] == pytest.approx(same["ms"] / row["ms"])
        assert row["ratio_best"] == pytest.approx(plain["ms"] / row["ms"])
    by_width = {row["variant"] + str(row["sparsity"]): row["roofline_ms"] for row in rows}
    assert by_width["narrow0.75"] < by_width["narrow0.5"] < by_width["narrow0.0"] == by_width["dense0.0"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "roofline" in printed and "narrow at 0" in printed and "narrow-fused at 0" in printed


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch):
    """Also one that is killed: after each turn its rows are on disk."""
    turn, known = step.Group._turn, []

    def stopped(group, runner, number):
        rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
        known.append([row.get("runs", row["result"]) for row in rows])
        if (number, str(runner.variant)) == (1, "narrow"):
            raise KeyboardInterrupt
        turn(group, runner, number)

    monkeypatch.setattr(step.Group, "_turn", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *"--sparsity 0.5 --runs 3 --variants dense narrow compact".split())
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["variant"], row["runs"]) for row in rows] == [("dense", 2), ("narrow", 1), ("compact", 1)]
    unfinished = "unfinished"
    assert known == [[unfinished] * 3, [1, unfinished, unfinished], [1, 1, unfinished], [1, 1, 1], [2, 1, 1]]


def test_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "FORWARD", (1, 3))
    options = "--sparsity 0.5 --runs 1 --forward --variants dense narrow compact".split()
    code, rows = run(tmp_path, *options)
    found = [row for row in rows if row["row"] == "forward"]
    assert code == 0 and [(row["images"], row["variant"]) for row in found] == [
        (batch, v) for batch in (1, 3) for v in ("dense", "narrow", "compact")
    ]
    for row in found:
        assert row["result"] == "measured" and row["latency_ms"] > 0 and row["difference"] < 1e-5
        assert row["images_per_s"] == pytest.approx(row["images"] / row["ms"] * 1e3)


def test_sparsity_0(tmp_path):
    code, rows = run(tmp_path, "--sparsity", "0", "--runs", "1")
    assert code == 0 and [row["variant"] for row in rows] == list(ALL[:4])
    code, rows = run(tmp_path, "--sparsity", "0.5", "--runs", "1")
    assert code == 0 and [(row["variant"], row["ratio_whole"]) for row in rows] == [(variant, None) for variant in ALL]


def test_narrow_at_0_casts_as_any_narrow_one(monkeypatch):
    """On CUDA. Then nothing but the pruned channels is between it and narrow at another sparsity."""
    kinds = (nn.Conv2d, nn.Linear)
    monkeypatch.setattr(shadows.Gathering, "casts", lambda self, module: type(module) in kinds)
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=2, seed=0), torch.device("cpu"))
    whole = {x.name: torch.arange(x.n_out) for x in task.channels.prunable}
    runner = variants.Runner(task, variants.parse("narrow"), 0.0, whole)
    modules = [runner.model, *(module for module in runner.model.modules() if type(module) in kinds)]
    assert all(shadows.own_hooks(module._forward_pre_hooks) for module in modules)
    assert not any(shadows.own_hooks(m._forward_pre_hooks) for m in runner.model.modules() if m not in modules)


def test_forward_of_narrow_at_0(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "FORWARD", (1,))
    options = "--sparsity 0 0.5 --runs 1 --forward --variants dense narrow".split()
    code, rows = run(tmp_path, *options)
    found = [(row["variant"], row["sparsity"], row["result"]) for row in rows if row["row"] == "forward"]
    assert code == 0 and found == [(v, s, "measured") for v, s in (("dense", 0.0), ("narrow", 0.0), ("narrow", 0.5))]


def other_biases(monkeypatch):
    """A gather that takes the wrong channels of a BatchNorm."""
    cuts = layers.possible_cuts

    def wrong(module, part):
        found = cuts(module, part)
        if isinstance(module, nn.BatchNorm2d):
            found["bias"] = [(dim, index.flip(0)) for dim, index in found["bias"]]
        return found

    monkeypatch.setattr(shadows, "possible_cuts", wrong)


def no_gradient(monkeypatch):
    """A gather that lets no gradient through to the weights: the first outputs are right."""
    gather = layers.gather
    monkeypatch.setattr(shadows, "gather", lambda tensor, where: gather(tensor.detach(), where))


@pytest.mark.parametrize("broken", [other_biases, no_gradient])
def test_wrong_outputs_are_not_timed(tmp_path, capsys, monkeypatch, broken):
    broken(monkeypatch)
    code, rows = run(tmp_path, "--sparsity", "0.5", "--runs", "1", "--variants", "dense", "narrow")
    assert code == 1 and [row["result"] for row in rows] == ["measured", "refused"]
    assert "ms" not in rows[1] and "not timed" in rows[1]["why"] and "not timed" in capsys.readouterr().err


def under_autocast(monkeypatch):
    """As on CUDA."""
    make_task = variants.make_task
    monkeypatch.setattr(step, "make_task", lambda *given: make_task(*given)._replace(amp=torch.bfloat16))


def as_compiled(monkeypatch, change):
    """What torch.compile would return is the model after `change`."""

    def compiled(model, backend):
        if backend == "compile":
            change(model)
        return model

    monkeypatch.setattr(variants, "_compiled", compiled)


COMPILED = ("dense-compile", "narrow-compile", "narrow-fused-compile", "compact-compile")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["conv1.weight", "stage1.0.conv2.weight", "stage2.0.bn1.weight", "stage2.0.bn1.bias"])
def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch, name, autocast):
    if autocast:
        under_autocast(monkeypatch)
    options = ("--sparsity", "0.5", "--runs", "1", "--variants", *COMPILED)
    as_compiled(monkeypatch, lambda model: None)
    code, rows = run(tmp_path, *options)
    assert code == 0 and [row["result"] for row in rows] == ["measured"] * 4
    assert all((row["autocast_alone_gradient"] > 1e-3) == autocast for row in rows)
    assert all(row["difference_gradient"] <= max(1e-3, 1.5 * row["autocast_alone_gradient"]) for row in rows)

    as_compiled(monkeypatch, lambda model: model.get_parameter(name).register_hook(torch.zeros_like))
    code, rows = run(tmp_path, *options)
    assert code == 1 and [row["result"] for row in rows] == ["refused"] * 4
    assert all(row["why"].startswith(f"its gradient of {name} is") and "not timed" in row["why"] for row in rows)


def test_a_gradient_that_is_missing_is_not_timed(tmp_path, monkeypatch):
    as_compiled(monkeypatch, lambda model: model.get_parameter("conv1.weight").requires_grad_(False))
    code, rows = run(tmp_path, "--sparsity", "0", "--runs", "1", "--variants", "dense-compile")
    assert code == 1 and "conv1.weight" in rows[0]["why"]


@pytest.mark.parametrize("model", ["resnet20", "mobilenet_v2"])
def test_rounding_says_little_at_the_weights_of_the_checks(model):
    """Else gradients in bfloat16 could not be told from wrong ones: in a deep network as it is built they cannot."""
    task = variants.make_task(argparse.Namespace(model=model, size=64, batch=8, seed=0), torch.device("cpu"))
    wanted = variants.wanted_step(task._replace(amp=torch.bfloat16), {})
    own = sorted(wanted.own_gradients.values())
    assert wanted.own < 0.02 and own[len(own) // 2] < 0.3


def test_all_are_timed_from_the_weights_as_they_are_built():
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=2, seed=0), torch.device("cpu"))
    active = {x.name: torch.arange(x.n_out // 2) for x in task.channels.prunable}
    wanted = variants.wanted_step(task, active)
    timed = []

    class Stopped(variants.Runner):
        def time(self, steps):
            slim = compact.compact(task.dense, self.slices) if self.variant.net == "compact" else task.dense
            state = self.model.state_dict()
            timed.append(all(torch.equal(tensor, state[name]) for name, tensor in slim.state_dict().items()))
            assert not any(x["momentum_buffer"].any() for x in self.optimizer.state.values())
            return [1.0]

    for variant in ("narrow", "narrow-fused", "compact"):
        Stopped(task, variants.parse(variant), 0.5, active).prepare(wanted, 1)
    assert timed == [True] * 3


def test_memory_is_counted_beside_the_same_in_all_backends(monkeypatch):
    """Beside weights, momentum and gradients, and nothing that only one backend has."""
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=2, seed=0), torch.device("cpu"))
    wanted, beside, taken = variants.wanted_step(task, {}), [], []

    def captured(work):
        taken.append(len(beside))
        return work

    def memory(device):
        parameters = list(runner.model.parameters())
        state = [runner.optimizer.state.get(p, {}).get("momentum_buffer") for p in parameters]
        beside.append(all(x is not None for x in (*state, *(p.grad for p in parameters))))
        return len(beside)

    monkeypatch.setattr(capture, "capture", captured)
    monkeypatch.setattr(capture, "warm_up", lambda work, times: work())
    monkeypatch.setattr(devices, "memory", memory)
    monkeypatch.setattr(devices, "peak", lambda device, before: {"peak_mb": before})
    monkeypatch.setattr(variants, "_compiled", lambda model, backend: model)
    for backend in variants.BACKENDS:
        beside.clear()
        runner = variants.Runner(task, variants.Variant("dense", False, backend), 0.0, {})
        if backend == "graph":
            runner._capture()
        else:
            runner.prepare(wanted, 1)
        assert beside == [True] * (backend != "max-autotune")
        assert ("peak_mb" in runner.figures) == (backend != "max-autotune")
    assert taken == [1], "the capture is what is counted"


@pytest.mark.parametrize("name", ["dense-graph", "narrow-graph", "narrow-fused-graph", "compact-fused-graph"])
def test_what_is_captured_is_what_is_wanted(monkeypatch, name):
    """With the optimizer of `train --graph`, whose learning rate is a tensor; a replay does the work again."""
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=4, seed=0), torch.device("cpu"))
    variant = variants.parse(name)
    share = 0.0 if variant.net == "dense" else 0.5
    active = {x.name: torch.arange(x.n_out // 2) for x in task.channels.prunable} if share else {}
    monkeypatch.setattr(capture, "warm_up", lambda work, times: [work() for _ in range(times)])
    monkeypatch.setattr(capture, "capture", lambda work: work)
    runner = variants.Runner(task, variant, share, active)
    (group,) = runner.optimizer.param_groups
    assert group["fused"] and isinstance(group["lr"], torch.Tensor)
    runner._capture()
    runner.begin(task.probe)
    there = {} if variant.net == "compact" else runner.slices
    outputs = runner.step()[0]
    found = variants.wanted_step(task, active).check(
        outputs, variants.gradients(runner.model, runner.optimizer, there)
    )
    assert found["difference"] < 1e-5 and found["difference_gradient"] < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps(tmp_path):
    names = ("dense", *(f"{net}-graph" for net in (*step.TWO_BY_TWO, "compact", "compact-fused")))
    size = ("--model", "resnet18", "--device", "cuda", "--batch", "64", "--size", "64", "--round-to", "1")
    code, rows = run(tmp_path, *size, "--sparsity", "0.5", "--runs", "1", "--variants", *names)
    assert code == 0 and [row["result"] for row in rows] == ["measured"] * 7
    assert all(row["peak_mb"] > 10 for row in rows)


def test_a_loss_that_is_not_finite_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "LEARNING_RATE", math.inf)
    monkeypatch.setattr(variants, "check_exactly", lambda *given: 0.0)
    code, rows = run(tmp_path, "--sparsity", "0", "--runs", "1", "--variants", "dense")
    assert code == 1 and rows[0]["result"] == "refused" and "nan" in rows[0]["why"]


def test_what_fails_does_not_stop_the_rest(tmp_path, monkeypatch):
    def no_memory(model, backend):
        if backend == "compile":
            raise RuntimeError("out of memory")
        return model

    monkeypatch.setattr(variants, "_compiled", no_memory)
    options = ("--variants", "dense-compile", "dense", "compact")
    code, rows = run(tmp_path, "--sparsity", "0.5", "--runs", "1", *options)
    assert code == 0 and [row["result"] for row in rows] == ["failed", "measured", "measured"]
    assert rows[0]["why"] == "RuntimeError: out of memory" and "ms" not in rows[0]
    if not torch.cuda.is_available():
        code, rows = run(tmp_path, "--sparsity", "0", "--runs", "1", "--variants", "dense-graph")
        assert code == 0 and rows[0]["result"] == "failed"


def test_what_runs_out_of_memory_gives_back_what_it_held(tmp_path, monkeypatch):
    def no_memory(model, backend):
        if backend != "compile" or model.get_parameter("stage1.0.conv1.weight").shape[0] == 16:
            return model
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        finally:
            raise RuntimeError("the end of a capture")

    monkeypatch.setattr(variants, "_compiled", no_memory)
    made = watch(monkeypatch)
    options = ("--variants", "dense", "dense-compile", "compact-compile", "narrow-compile")
    code, rows = run(tmp_path, "--sparsity", "0.5", "0.75", "--runs", "1", *options)
    assert code == 0 and [row["result"] for row in rows] == ["measured", "measured", "failed", "measured"] * 2
    assert [row["why"] for row in rows if row["result"] == "failed"] == ["out of memory"] * 2
    failed = [runner for runner in made if runner.result == "failed"]
    assert len(failed) == 2 and not any(hasattr(runner, "model") for runner in failed)


def watch(monkeypatch) -> list[variants.Runner]:
    """All that are made."""
    made, make = [], variants.Runner.__init__
    monkeypatch.setattr(variants.Runner, "__init__", lambda self, *given: made.append(self) or make(self, *given))
    return made


def test_only_one_backend_holds_memory(tmp_path, monkeypatch):
    """Beside eager ones, which hold none between their steps."""
    made, time, reset, resets = watch(monkeypatch), variants.Runner.time, torch.compiler.reset, []

    def alone(runner, steps):
        holding = {r.variant.backend for r in made if hasattr(r, "model")} - {"eager"}
        assert holding <= {runner.variant.backend}
        return time(runner, steps)

    monkeypatch.setattr(variants.Runner, "time", alone)
    monkeypatch.setattr(variants, "_compiled", lambda model, backend: model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1) or reset())
    names = [f"{net}-{backend}" for backend in variants.COMPILED for net in ("dense", "narrow", "compact")]
    options = ("--runs", "1", "--variants", "dense", *names, "compact")
    code, rows = run(tmp_path, "--sparsity", "0.5", "0.75", *options)
    assert code == 0 and [row["result"] for row in rows] == ["measured"] * 16 and len(resets) == 4
    assert [row["variant"] for row in rows] == ["dense", "compact", *names] * 2
    assert sum(runner.variant == ("dense", False, "eager") for runner in made) == 1, "it is not prepared again"
    for row in rows:
        beside = [r for r in rows if r["beside"] == row["beside"] and r["net"] == "dense"]
        (same,) = (r for r in beside if r["backend"] == row["backend"])
        assert row["ratio_dense"] == pytest.approx(same["ms"] / row["ms"])
        assert row["ratio_best"] == pytest.approx(min(r["ms"] for r in beside) / row["ms"])


def test_what_is_asked_for_most_is_prepared_first(tmp_path, monkeypatch):
    prepared, prepare = [], step.Group._prepare

    def noted(group, runner):
        prepared.append((str(runner.variant), runner.share))
        prepare(group, runner)

    monkeypatch.setattr(step.Group, "_prepare", noted)
    code, rows = run(tmp_path, "--sparsity", "0", "0.5", "--runs", "1", "--variants", "dense", "narrow", "compact")
    assert code == 0 and prepared == [("narrow", 0.5), ("compact", 0.5), ("dense", 0.0), ("narrow", 0.0)]
    assert [(row["variant"], row["sparsity"]) for row in rows] == [
        ("dense", 0.0), ("narrow", 0.0), ("narrow", 0.5), ("compact", 0.5),
    ]  # fmt: skip


def test_who_is_ready_has_one_run_however_late(tmp_path, monkeypatch):
    prepare = step.Group._prepare

    def late(group, runner):
        prepare(group, runner)
        group.deadline = -math.inf

    monkeypatch.setattr(step.Group, "_prepare", late)
    code, rows = run(tmp_path, "--sparsity", "0.5", "--runs", "3", "--variants", "dense", "narrow")
    assert code == 0 and [(row["variant"], row["result"], row.get("runs")) for row in rows] == [
        ("dense", "skipped", None), ("narrow", "measured", 1),
    ]  # fmt: skip


def test_no_time_left(tmp_path):
    code, rows = run(tmp_path, "--sparsity", "0.5", "--seconds", "1e-6")
    assert code == 0 and {(row["result"], row["why"]) for row in rows} == {("skipped", "no time left")}


def test_names_of_variants():
    for name in (*step.DEFAULTS["cuda"], *step.DEFAULTS["cpu"], "narrow-fused-graph"):
        assert str(variants.parse(name)) == name
    assert variants.parse("narrow-fused-graph") == ("narrow", True, "graph")
    for name in ("wide", "dense-fast", "dense-fused-eager-x", ""):
        with pytest.raises(RepruneError, match="unknown variant"):
            variants.parse(name)


def test_sparsity_for_flops():
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=2, seed=0), torch.device("cpu"))
    share = step.at_flops(task.channels, 0.6, 1)

    def left(at: float) -> float:
        return task.channels.flops(roofline.widths_at(task.channels, at, 1))

    assert left(share) <= 0.6 < left(share - 1e-4)
    assert step.at_flops(task.channels, 1.0, 1) == 0.0
    for flops in (0.0, 1e-3):
        with pytest.raises(RepruneError):
            step.at_flops(task.channels, flops, 1)


def test_the_networks_are_left_alone():
    task = variants.make_task(argparse.Namespace(model="resnet8", size=16, batch=2, seed=0), torch.device("cpu"))
    active = {x.name: torch.arange(x.n_out // 2) for x in task.channels.prunable}
    before = {name: tensor.clone() for name, tensor in task.dense.state_dict().items()}
    runner = variants.Runner(task, variants.parse("narrow-fused"), 0.5, active)
    assert runner.attempt(lambda: runner.prepare(variants.wanted_step(task, active), 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.dense.state_dict().items())
    assert fusion._FUSED not in task.dense.__dict__ and fusion._FUSED in runner.model.__dict__
    assert {name: p.shape for name, p in runner.model.named_parameters()} == {
        name: p.shape for name, p in task.dense.named_parameters()
    }, "narrow is with parameters of full shape"


def test_refusals(capsys):
    for arguments in (("--batch", "0"), ("--variants", "wide"), ("--flops", "2"), ("--sparsity", "1")):
        assert main(["step", *TINY, *arguments]) == 1
    assert "--flops must be" in capsys.readouterr().err


# Hours


def test_schedule_by_hand():
    """8 epochs, events after 2, 4 and 5; delta = 0.4 (1 + cos(pi t / 5)) / 2."""
    found = hours.schedule(8, 5, 2, 0.5, 0.4)
    deltas = [0.4 * (1 + math.cos(math.pi * t / 5)) / 2 for t in (2, 4)]
    assert [phase.epochs for phase in found] == [2, 2, 1, 3]
    assert [phase.sparsity for phase in found] == pytest.approx([0.0, 0.5 - deltas[0], 0.5 - deltas[1], 0.5])
    assert [phase.final for phase in found] == [False, False, False, True]
    assert [phase.event for phase in found] == [False, True, True, True]
    assert hours.schedule(4, 2, 1, 0.1, 0.4)[1].sparsity == 0.0, "never denser than dense"
    assert sum(phase.epochs for phase in hours.schedule(250, 180, 2, 0.5, 0.3)) == 250
    assert sum(phase.event for phase in hours.schedule(250, 180, 2, 0.5, 0.3)) == 90


HERE = {"device": "cpu", "cpu": "a CPU", "torch": "2", "cuda": None, "threads": 1, "commit": "abc", "dirty": False}


def a_step(variant: str, sparsity: float, ms: float, **more) -> dict:
    parsed = variants.parse(variant)
    return HERE | parsed._asdict() | {
        "benchmark": "step", "row": "step", "result": "measured", "model": "resnet50", "batch": 10, "size": 224,
        "dtype": "float32", "variant": variant, "sparsity": sparsity, "flops_left": 1 - sparsity, "ms": ms,
    } | more  # fmt: skip


def an_event(**more) -> dict:
    return HERE | {"benchmark": "event", "row": "total", "model": "resnet50", "rule": "prunable", "linkage": "ward",
                   "event_s": 7.0, "time": "2026"} | more  # fmt: skip


STEPS = [a_step("dense", 0.0, 1000.0), a_step("narrow", 0.5, 600.0), a_step("compact", 0.5, 500.0),
         a_step("compact-compile", 0.5, 400.0), a_step("dense-compile", 0.0, 900.0)]  # fmt: skip
SHORT = "--epochs 8 --until 5 --every 2 --regrow 0.4 --images 95 --gpus 2".split()


def add_up(tmp_path, steps: list[dict], events: list[dict], *arguments: str) -> tuple[int, list[dict]]:
    for name, some in (("steps", steps), ("events", events)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    out = tmp_path / "hours"
    out.unlink(missing_ok=True)
    files = ("--from", str(tmp_path / "steps"), "--events", str(tmp_path / "events"), "--json", str(out))
    code = main(["hours", *files, *SHORT, *arguments])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_hours_by_hand(tmp_path, capsys):
    code, (row,) = add_up(tmp_path, STEPS, [an_event(event_s=1.0, time="2025"), an_event()])
    steps = 5  # 95 images on 2 devices of 10: 4.75
    deltas = [0.4 * (1 + math.cos(math.pi * t / 5)) / 2 for t in (2, 4)]
    early = [1.0 - 0.4 * (0.5 - delta) / 0.5 for delta in deltas]  # between 1 s dense and 0.6 s at half
    seconds = steps * (2 * 1.0 + 2 * early[0] + 1 * early[1] + 3 * 0.4) + 3 * 7.0
    assert code == 0 and row["hours"] == pytest.approx(seconds / 3600)
    assert row["steps_per_epoch"] == steps and row["events"] == 3 and row["final"] == "compact-compile"
    alike = seconds + steps * 3 * (0.5 - 0.4)  # saved by pruning: eager to the end, as the dense one
    assert row["dense_hours"] == pytest.approx(8 * steps / 3600) and row["saved"] == pytest.approx(1 - alike / 40)
    assert row["best_dense"] == "dense-compile" and row["saved_of_best"] == pytest.approx(1 - seconds / 36)
    assert row["computed"] is True and row["measured_on_cpu"] is True and row["paper_hours"]["0.56"] == 38.75
    printed = " ".join(capsys.readouterr().out.split())
    assert "11.4% at -56%" in printed and "a CPU" in printed


def test_hours_with_narrow_at_0(tmp_path):
    """Where nothing is pruned yet a training is dense; the line of narrow begins where it was measured."""
    _, (row,) = add_up(tmp_path, [*STEPS, a_step("narrow", 0.0, 800.0)], [an_event()])
    deltas = [0.4 * (1 + math.cos(math.pi * t / 5)) / 2 for t in (2, 4)]
    early = [0.8 - 0.2 * (0.5 - delta) / 0.5 for delta in deltas]
    seconds = 5 * (2 * 1.0 + 2 * early[0] + 1 * early[1] + 3 * 0.4) + 3 * 7.0
    assert row["sparsity"] == 0.5 and row["hours"] == pytest.approx(seconds / 3600)
    assert row["dense_hours"] == pytest.approx(8 * 5 / 3600)


def test_the_best_dense_step_is_a_median_too(tmp_path):
    _, (row,) = add_up(tmp_path, [*STEPS, *(a_step("dense-compile", 0.0, ms) for ms in (950.0, 2000.0))], [an_event()])
    assert row["best_dense_hours"] == pytest.approx(8 * 5 * 0.95 / 3600)


def test_without_a_compact_step_it_stays_narrow(tmp_path):
    _, (row,) = add_up(tmp_path, STEPS[:2], [an_event()])
    assert row["final"] == "narrow" and row["best_dense"] == "dense"


@pytest.mark.parametrize(
    ("steps", "events", "options", "said"),
    [
        ([*STEPS, a_step("narrow", 0.3, 1.0, device="A100")], [an_event()], (), "differ in device"),
        ([*STEPS, a_step("narrow", 0.3, 1.0, threads=2)], [an_event()], (), "differ in threads"),
        ([*STEPS, a_step("narrow", 0.3, 1.0, batch=20)], [an_event()], (), "choose one with --batch"),
        (STEPS[1:], [an_event()], (), "no measured step of dense, beside narrow"),
        (STEPS[:1], [an_event()], (), "no measured step of a narrow variant"),
        (STEPS, [an_event()], ("--sparsity", "0.7"), "at a sparsity of 0.7"),
        (STEPS, [an_event(device="A100")], (), "no event of resnet50 was measured on cpu, a CPU"),
        (STEPS, [an_event(cpu="another")], (), "no event"),
        (STEPS, [an_event(model="resnet18")], (), "no event"),
        ([row | {"result": "failed"} for row in STEPS], [an_event()], (), "no measured step of resnet50"),
        (STEPS, [an_event()], ("--until", "9"), "--until"),
        (STEPS, [an_event()], ("--model", "resnet18"), "no measured step of resnet18"),
    ],
)
def test_hours_refuse(tmp_path, capsys, steps, events, options, said):
    code, rows = add_up(tmp_path, steps, events, *options)
    assert code == 1 and not rows and said in " ".join(capsys.readouterr().err.split())


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert main(["hours", "--from", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
