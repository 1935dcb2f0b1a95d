"""The trainer: it learns, prunes, writes what it says, and a stopped and resumed run ends where a whole one does."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from reprune_triton import train as command
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.training import checkpoint, data, loop, models
from reprune_triton.training.options import recipe
from reprune_triton.training.run import Stopped

pytest.importorskip("sklearn")
FAST = {"model": "resnet8", "epochs": 4, "batch": 256, "threads": 1, "device": "cpu"}
PRUNED = {"dense": {}, "pruned": {"sparsity": 0.5, "every": 1, "until": 3}}


class Crash(Exception):
    pass


def bits(value):
    """Every leaf of a state, with the tensors as bytes; the times of pruning events are left out."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items() if key not in ("ms", "stages")}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def timeless(record):
    return {key: value for key, value in record.items() if "second" not in key}


def crash_and_resume(tmp_path, common, after):
    """The results of a whole run and of one that died after so many epochs and was resumed: the same states."""

    def crash(record):
        if record["epoch"] == after:
            raise Crash

    whole = loop.train(recipe(**common, out=str(tmp_path / "whole")))
    with pytest.raises(Crash):
        loop.train(recipe(**common, out=str(tmp_path / "parts")), crash)
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:  # one line more than the checkpoint, and half a line
        log.write(json.dumps({"epoch": after + 1, "loss": 0.0}) + '\n{"epo')
    resumed = loop.train(recipe(**common, out=str(tmp_path / "parts"), resume=True))
    a, b = (checkpoint.read(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert bits(a) == bits(b)
    return whole, resumed


def test_it_learns_and_writes_what_it_says(tmp_path):
    seen = []
    result = loop.train(recipe(**FAST | {"batch": 64, "out": str(tmp_path)}), seen.append)
    assert result.accuracy > 0.8 and result.pruner is None and result.event_seconds == 0 and result.seconds > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == seen == result.log and [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["accuracy"] == result.accuracy and lines[-1]["loss"] < lines[0]["loss"]
    about = checkpoint.read_extra(tmp_path / "slim.safetensors")
    assert (about["model"], about["num_classes"], about["in_channels"], about["flops"]) == ("resnet8", 10, 1, 1.0)
    back = checkpoint.load(tmp_path / "slim.safetensors", models.build("resnet8", 10, 1))
    assert loop.evaluate(back, data.load("digits")) == result.accuracy
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_pruned_run_ends_narrow(tmp_path):
    result = loop.train(recipe(**FAST | PRUNED["pruned"] | {"batch": 64, "out": str(tmp_path)}))
    events = [line for line in result.log if "coverage" in line]
    assert [line["epoch"] for line in events] == [1, 2, 3] and result.event_seconds > 0
    assert 0.45 < events[-1]["sparsity"] < 0.55 and events[-1]["flops"] < 0.7 and 0 < events[-1]["coverage"] <= 1
    narrow = sum(p.numel() for p in result.model.parameters())
    assert narrow < 0.75 * sum(p.numel() for p in models.build("resnet8", 10, 1).parameters())
    # The narrow model is the same function, up to rounding: one image of 360 at most.
    assert result.accuracy > 0.7 and abs(result.accuracy - result.log[-1]["accuracy"]) < 0.003
    path = tmp_path / "slim.safetensors"
    about = checkpoint.read_extra(path)
    back = checkpoint.load(path, models.build(about["model"], about["num_classes"], about["in_channels"]))
    assert repr(back) == repr(result.model) and loop.evaluate(back, data.load("digits")) == result.accuracy


@pytest.mark.parametrize("kind, after", [("dense", 2), ("pruned", 2), ("pruned", 3)])  # 3: the model is narrow by then
def test_resume_is_bit_exact_after_a_crash(tmp_path, kind, after):
    common = FAST | PRUNED[kind] | {"mixup": 0.2, "smoothing": 0.1}
    whole, resumed = crash_and_resume(tmp_path, common, after)
    a, b = ((tmp_path / name / "slim.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b
    assert [timeless(r) for r in whole.log] == [timeless(r) for r in resumed.log]
    assert (tmp_path / "parts" / "log.jsonl").read_text().count("\n") == 4

    again = loop.train(recipe(**common, out=str(tmp_path / "parts"), resume=True))  # nothing is left to do
    assert again.accuracy == whole.accuracy and len(again.log) == 4


def test_a_checkpoint_of_before_an_option_was_there_is_gone_on_with(tmp_path):
    common = FAST | PRUNED["pruned"] | {"epochs": 3, "out": str(tmp_path)}

    def crash(record):
        raise Crash

    with pytest.raises(Crash):
        loop.train(recipe(**common), crash)
    state = checkpoint.read(tmp_path / "last.safetensors")
    for gone in ("paradigm", "regrow_by"):
        del state["options"][gone]
    checkpoint.write(tmp_path / "last.safetensors", state)
    with pytest.raises(RepruneError, match="--regrow-by was residual, is random"):
        loop.train(recipe(**common, resume=True, regrow_by="random"))
    assert len(loop.train(recipe(**common, resume=True)).log) == 3


def test_sigterm_stops_cleanly_and_resume_is_bit_exact(tmp_path):
    flags = "--model resnet8 --epochs 8 --batch 128 --threads 1 --device cpu --sparsity 0.4 --out".split()
    common = {"model": "resnet8", "epochs": 8, "batch": 128, "threads": 1, "device": "cpu", "sparsity": 0.4}
    parts = tmp_path / "parts"
    root = os.path.dirname(os.path.dirname(command.__file__))
    process = subprocess.Popen(
        [sys.executable, "-m", "reprune_triton.train", *flags, str(parts)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    log, limit = parts / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert err.strip().endswith(f"--out {parts} --resume")
    assert 2 <= checkpoint.read(parts / "last.safetensors")["done"] < 8 and not (parts / "slim.safetensors").exists()

    loop.train(recipe(**common, out=str(parts), resume=True))
    loop.train(recipe(**common, out=str(tmp_path / "whole")))
    a, b = (checkpoint.read(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert bits(a) == bits(b)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_in_the_first_epoch_can_be_resumed(tmp_path, monkeypatch, number, code):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    batches, given = data.Resident.train_batches, []

    def kill_in_the_second_batch(self, epoch):
        for i, batch in enumerate(batches(self, epoch)):
            if i == 1:
                os.kill(os.getpid(), number)
            given.append(i)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(data.Resident, "train_batches", kill_in_the_second_batch)
        with pytest.raises(Stopped) as stop:
            loop.train(recipe(**FAST, out=str(tmp_path)))
    assert stop.value.code == code and given == [0, 1]  # the batch it came in was finished
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert len(loop.train(recipe(**FAST, out=str(tmp_path), resume=True)).log) == 4


def test_resume_refuses_another_run_and_start_refuses_an_old_one(tmp_path):
    def run(**changes):
        return loop.train(recipe(**FAST | {"epochs": 1, "out": str(tmp_path / "a")} | changes))

    with pytest.raises(RepruneError, match="no such checkpoint"):
        run(resume=True)
    run()
    with pytest.raises(RepruneError, match="holds a run already: go on with --resume"):
        run()
    with pytest.raises(RepruneError, match="--weight-decay was 0.0005, is 0.1; --seed was 0, is 1"):
        run(resume=True, seed=1, weight_decay=0.1)
    run(resume=True, threads=2, workers=0)  # these do not matter
    last = tmp_path / "a" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(RepruneError, match="to resume from it: cp .*last.previous.safetensors .*last.safetensors"):
        run(resume=True)
    last.write_bytes(checkpoint.previous(last).read_bytes())
    assert len(run(resume=True).log) == 1


def test_learning_rate_is_a_function_of_the_step():
    options = recipe(epochs=10, warmup=2, lr=0.4)
    rates = [loop.learning_rate(step, 5, options) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == 0.4 and rates[30] == pytest.approx(0.2) and 0 < rates[49] < 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert loop.learning_rate(0, 5, recipe(epochs=10, warmup=0, lr=0.4)) == 0.4


def test_recipes_are_the_papers():
    imagenet = recipe("imagenet")
    assert (imagenet.epochs, imagenet.until, imagenet.every, imagenet.warmup) == (250, 180, 2, 8)
    assert (imagenet.momentum, imagenet.weight_decay, imagenet.smoothing, imagenet.mixup) == (0.875, 2**-15, 0.1, 0.2)
    assert imagenet.lr == 0.256 and recipe("imagenet", batch=1024).lr == 1.024
    assert recipe("imagenet", batch=1024, lr=0.5).lr == 0.5
    cifar = recipe("cifar10")
    assert (cifar.epochs, cifar.until, cifar.batch, cifar.lr, cifar.momentum, cifar.weight_decay) == (
        160, 96, 256, 0.1, 0.9, 5e-4)  # fmt: skip
    assert recipe("fashion-mnist", epochs=10).until == 6
    assert recipe("digits", epochs=100).until == 72 and recipe("digits", epochs=1).until == 1
    assert recipe("digits", "cifar").epochs == 160
    assert recipe("digits", epochs=3).warmup == 0 and recipe("digits", epochs=3, warmup=2).warmup == 2


def test_norms_and_biases_are_decayed_or_not():
    model = models.build("resnet8", 10)
    norms = sum(m.weight.numel() + m.bias.numel() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    decayed, bare = loop._groups(model, recipe("imagenet"))
    assert sum(p.numel() for p in bare["params"]) == norms + 10 and bare["weight_decay"] == 0
    assert decayed["weight_decay"] == 2**-15
    (group,) = loop._groups(model, recipe("cifar10"))
    assert len(group["params"]) == len(list(model.parameters()))


def test_three_stages_train_dense_prune_once_and_go_on(tmp_path):
    common = FAST | {"paradigm": "three-stage", "epochs": 3, "flops": 0.5, "batch": 64, "warmup": 1, "until": 1}
    result = loop.train(recipe(**common))
    assert [event.epoch for event in result.pruner.history] == [3] and len(result.log) == 6
    assert result.flops == result.pruner.history[0].flops <= 0.5 and result.accuracy > 0.8
    assert result.pruner.history[0].layers[0].kept == result.pruner.history[0].layers[0].width, "nothing comes back"
    rates = [line["lr"] for line in result.log]
    assert rates[:3] == rates[3:] and rates[2] < 0.01 < rates[0], "the learning rate starts anew"
    dense = loop.train(recipe(**FAST | {"epochs": 3, "batch": 64, "warmup": 1}))
    assert [timeless(r)["loss"] for r in dense.log] == [line["loss"] for line in result.log[:3]]
    for after in (2, 4):
        crash_and_resume(tmp_path / str(after), common | {"batch": 256}, after)


@pytest.mark.parametrize("target, share", [({"flops": 0.5}, None), ({"sparsity": 0.5}, 0.5)])
def test_a_thin_network_from_scratch(tmp_path, target, share):
    options = recipe(**FAST | target | {"paradigm": "scratch", "out": str(tmp_path)})
    result = loop.train(options)
    widths = [m.out_channels for name, m in result.model.named_modules() if name.endswith(".0.conv1")]
    assert result.pruner is None
    if share:
        assert widths == [8, 16, 32]
    else:
        assert 0.47 < result.flops <= 0.5, "as wide as the budget lets it be"
        shares = [width / full for width, full in zip(widths, (16, 32, 64), strict=True)]
        assert max(shares) - min(shares) <= 1 / 16
    example = models.example_inputs("resnet8", 1, 8)
    both = (result.model, models.build("resnet8", 10, 1))
    macs = [sum(cost.macs for cost in analysis.analyse(model, example).costs) for model in both]
    assert macs[0] / macs[1] == result.flops == checkpoint.read_extra(tmp_path / "slim.safetensors")["flops"]
    crash_and_resume(tmp_path, FAST | target | {"paradigm": "scratch"}, after=2)


def test_what_a_thin_network_cannot_be():
    for more, message in (
        ({"flops": 0.01}, "flops=0.01 is out of reach for a resnet8 from scratch: it still has 0."),
        ({}, "paradigm scratch needs sparsity or flops"),
        ({"flops": 0.5, "ignore": ("*",)}, "resnet8 has nothing to make narrow"),
    ):
        with pytest.raises(RepruneError, match=message):
            loop.train(recipe(**FAST | more | {"paradigm": "scratch"}))
    with pytest.raises(RepruneError, match="paradigm must be one of concurrent, three-stage, scratch"):
        recipe(**FAST | {"paradigm": "two-stage"})


def test_mixed_precision_and_channels_last_resume_bit_exactly(tmp_path):
    common = FAST | {"amp": "bf16", "channels_last": True, "epochs": 2}
    crash_and_resume(tmp_path, common, after=1)


def test_a_fused_run_is_the_same_run(tmp_path):
    """On the CPU fusing changes who calls what, and no number; and the narrow model is saved as an ordinary one."""
    runs = [loop.train(recipe(**FAST | PRUNED["pruned"], fuse=fuse, out=str(tmp_path / str(fuse))))
            for fuse in (False, True)]  # fmt: skip
    assert [timeless(r) for r in runs[0].log] == [timeless(r) for r in runs[1].log]
    assert all("forward" in vars(m) for m in runs[1].model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    path = tmp_path / "True" / "slim.safetensors"
    about = checkpoint.read_extra(path)
    back = checkpoint.load(path, models.build(about["model"], about["num_classes"], about["in_channels"]))
    assert loop.evaluate(back, data.load("digits")) == runs[0].accuracy


def test_a_replayed_run_is_the_same_run(tmp_path, monkeypatch):
    """Without a GPU a graph is played by what it would replay: on the same tensors, captured anew after every event."""
    captured, places, work_of = [], set(), loop._Step._work

    def capture(work):
        captured.append(work)
        return work

    def watched(step, x, y, share):
        if step.graph:
            rates = [group["lr"] for group in step.optimizer.param_groups]
            places.add(tuple(tensor.data_ptr() for tensor in (x, y, share, *rates)))
        return work_of(step, x, y, share)

    common = FAST | PRUNED["pruned"] | {"mixup": 0.2, "epochs": 5}
    plain = loop.train(recipe(**common))
    with pytest.raises(RepruneError, match="graph needs a CUDA device; this run is on cpu"):
        loop.train(recipe(**common, graph=True))
    with pytest.raises(RepruneError, match="graph does not go with fp16"):
        recipe(**common, graph=True, amp="fp16")
    monkeypatch.setattr(loop, "_graph", lambda options, device: bool(options.graph))
    monkeypatch.setattr(loop.capture, "warm_up", lambda work: work())
    monkeypatch.setattr(loop.capture, "capture", capture)
    monkeypatch.setattr(loop._Step, "_work", watched)
    graph = loop.train(recipe(**common, graph=True))
    assert len(captured) == 4 and len(places) == 1, "before the first event, and after each of three"
    for one, other in zip(plain.log, graph.log, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-6) and one.get("flops") == other.get("flops")
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    crash_and_resume(tmp_path, common | {"graph": True}, after=2)

    def crash(record):
        if record["epoch"] == 2:
            raise Crash

    with pytest.raises(Crash):  # begun without, gone on with
        loop.train(recipe(**common, out=str(tmp_path / "mixed")), crash)
    mixed = loop.train(recipe(**common, out=str(tmp_path / "mixed"), resume=True, graph=True))
    assert mixed.log[-1]["loss"] == pytest.approx(plain.log[-1]["loss"], rel=1e-4)


def test_where_there_are_graphs_they_are_used():
    device, cpu = torch.device("cuda", 0), torch.device("cpu")
    for graph, amp, where, expected in (
        (None, "off", device, True), (None, "bf16", device, True), (None, "fp16", device, False),
        (False, "off", device, False), (True, "bf16", device, True), (None, "off", cpu, False),
    ):  # fmt: skip
        assert loop._graph(recipe(graph=graph, amp=amp), where) is expected


class Waits(torch.nn.Module):
    """A network that a CUDA graph cannot hold."""

    capturing, captures = False, 0

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        if Waits.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.body(x)

    @classmethod
    def capture(cls, work):
        cls.capturing, cls.captures = True, cls.captures + 1
        try:
            return work()
        finally:
            cls.capturing = False


@pytest.mark.parametrize("graph", [None, True])
def test_a_step_that_cannot_be_captured_is_done_without(monkeypatch, graph):
    """Nothing of the run is another one's, unless the graph was asked for: then it says how to do without."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: Waits(build(*args)))
    common = FAST | PRUNED["pruned"] | {"mixup": 0.2}
    plain = loop.train(recipe(**common))
    monkeypatch.setattr(loop, "_graph", lambda options, device: True)
    monkeypatch.setattr(loop.capture, "warm_up", lambda work: work())
    monkeypatch.setattr(loop.capture, "capture", Waits.capture)
    monkeypatch.setattr(Waits, "captures", 0)
    options = recipe(**common, graph=graph)
    if graph:
        with pytest.raises(RepruneError, match="resnet8 cannot be captured .*not permitted.*: give --no-graph"):
            loop.train(options)
        return
    with pytest.warns(UserWarning, match="the run goes on without one, as with --no-graph") as warned:
        result = loop.train(options)
    assert len(warned) == 1 == Waits.captures
    for one, other in zip(plain.log, result.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one.get("flops") == other.get("flops")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_the_gpu_goes_on_without_a_graph(monkeypatch):
    """Where the network waits for the device, in its forward, as it has dropped something."""
    build = models.build

    class Looks(Waits):
        def forward(self, x):
            y = torch.nn.functional.dropout(self.body(x), 0.1, self.training)
            assert y.isfinite().all().item()
            return y

    monkeypatch.setattr(models, "build", lambda *args: Looks(build(*args)))
    common = FAST | PRUNED["pruned"] | {"device": "cuda", "batch": 64}
    plain = loop.train(recipe(**common, graph=False))
    with pytest.warns(UserWarning, match="the run goes on without one"):
        result = loop.train(recipe(**common))
    assert plain.log[0]["loss"] == pytest.approx(result.log[0]["loss"], rel=0.1)
    assert len(result.log) == 4 and result.accuracy > 0.3


def test_resume_restores_the_global_generator_too(tmp_path, monkeypatch):
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: torch.nn.Sequential(build(*args), torch.nn.Dropout(0.3)))
    common = FAST | {"epochs": 2}
    crash_and_resume(tmp_path, common, after=1)


def test_divergence_is_an_error_that_spares_the_checkpoint(tmp_path):
    with pytest.raises(RepruneError, match="loss is nan in epoch 1: lower --lr"):
        loop.train(recipe(**FAST | {"lr": math.inf, "warmup": 0, "out": str(tmp_path)}))
    assert checkpoint.read(tmp_path / "last.safetensors")["done"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "mnist"], "unknown data set 'mnist': there are digits"),
        (["--data", "cifar10", "--data-dir", "absent"], "cifar10: not found. Looked for"),
        (["--model", "resnet9000"], "unknown model 'resnet9000'"),
        (["--sparsity", "2"], "sparsity must be in"),
        (["--epochs", "2", "--warmup", "3"], "warmup within it"),
        (["--seed", "-1"], "seed must be in"),
        (["--smoothing", "1.5"], "smoothing must be in"),
        (["--lr", "-1"], "lr must not be negative"),
        (["--select", "l2"], "select must be one of"),
        (["--paradigm", "scratch", "--flops", "1.5"], "flops must be in"),
        (["--paradigm", "scratch", "--sparsity", "nan"], "sparsity must be in"),
        (["--paradigm", "scratch", "--flops", "0.5", "--round-to", "-3"], "round_to must be"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_command_line_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main(["--model", "resnet8", "--epochs", "1", "--batch", "256", "--device", "cpu", "--no-decay-norms"])
    out, err = capsys.readouterr()
    assert out.startswith("resnet8 on digits: accuracy ") and err == ""  # no progress bar where there is no terminal
    assert (tmp_path / "runs" / "digits-resnet8" / "slim.safetensors").exists()


def test_the_imagenet_recipe_on_folders(tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, grey in (("dark", 40), ("light", 200)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(8):
                image.new("RGB", (40, 40), (grey + i,) * 3).save(tmp_path / part / label / f"{i}.png")
    common = FAST | {"batch": 4, "size": 32, "workers": 0, "data_dir": str(tmp_path), "sparsity": 0.5, "every": 1}
    options = recipe("imagenet", **common, lr=0.05)
    assert options.amp == "bf16" and options.channels_last and options.mixup and not options.decay_norms
    result = loop.train(options)
    assert result.pruner.history[-1].epoch == 3 and result.accuracy > 0.7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp, graph", [("off", 0), ("bf16", 0), ("fp16", 0), ("off", 1), ("bf16", 1)])
def test_a_run_on_the_gpu_can_be_resumed(tmp_path, amp, graph):
    def crash(record):
        if record["epoch"] == 2:
            raise Crash

    common = FAST | PRUNED["pruned"] | {"device": "cuda", "amp": amp, "channels_last": True, "out": str(tmp_path)}
    common["graph"] = bool(graph)
    with pytest.raises(Crash):
        loop.train(recipe(**common), crash)
    result = loop.train(recipe(**common, resume=True))
    assert [line["epoch"] for line in result.log] == [1, 2, 3, 4] and result.accuracy > 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_a_replayed_run_on_the_gpu_is_the_same_run(mixup):
    common = FAST | PRUNED["pruned"] | {"device": "cuda", "mixup": mixup, "batch": 64}
    plain, graph = (loop.train(recipe(**common, graph=graph)) for graph in (False, True))
    for one, other in zip(plain.log, graph.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.1)  # the order of sums differs, and grows
    assert plain.log[0]["loss"] == pytest.approx(graph.log[0]["loss"], rel=1e-3)
