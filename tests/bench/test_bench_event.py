"""The benchmark of one event: rows, sampling, missing libraries, and that wrong results show no times."""

import argparse
import json
import sys
import types

import numpy as np
import pytest
import torch
from families import gaussian, problems
from played import play
from scipy.cluster.hierarchy import linkage as scipy_linkage

from reprune_triton import ops, pruner
from reprune_triton.bench import estimate, networks
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.measure import event as bench_event
from reprune_triton.bench.measure import peers
from reprune_triton.errors import RepruneError
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.running import analysis
from reprune_triton.selection import event as events
from reprune_triton.selection import regrow, steps
from reprune_triton.selection.widths import at_sparsity
from reprune_triton.training import models


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def event(*arguments: str) -> int:
    return main(["event", "--model", "resnet8", "--repeat", "1", *arguments])


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows(tmp_path, capsys):
    assert event("--json", str(tmp_path / "new" / "event.jsonl"), "--seed", "3") == 0
    rows = rows_of(tmp_path / "new" / "event.jsonl")
    assert [row["row"] for row in rows] == ["layer"] * 3 + ["KxK", "total"]
    total = rows[-1]
    for row in rows:
        assert row["checked"] and not row["extrapolated"] and row["seed"] == 3 and row["threads"] == 1
        assert row["impl"] == "reference" and row["algorithm"] == "auto" and row["rule"] == "prunable"
        assert row["near_ties"] == row["undecided"] == 0
        assert row["torch"] == torch.__version__ and row["scipy"] and row["cpu"] and "commit" in row and "dirty" in row
        assert row["scipy_s"] > 0 and row["fastcluster_s"] > 0 and row["cluster_s"] > 0
        assert not {"device_s", "scratch_mb", "floor_ms", "rounds"} & set(row), "of a GPU, or of Triton"
    assert total["scipy_s"] == pytest.approx(sum(row["scipy_s"] for row in rows[:3]))
    assert total["problems"] == 16 + 16 + 32
    for row in rows[:3]:
        assert not {"select_s", "event_s", "between_s"} & set(row), "one layer is no event"
    check_stages(rows[3:], [*events.STAGES, "apply"])
    assert (total["between_s"], total["share_of_training"]) == (92, pytest.approx(total["event_s"] / 92))
    assert not {"launches", "transfers"} & set(total), "of Triton, or of a GPU"
    assert "equal clusters at the cut in every channel" in " ".join(capsys.readouterr().out.split())
    assert event("--json", str(tmp_path / "new" / "event.jsonl")) == 0
    assert len(rows_of(tmp_path / "new" / "event.jsonl")) == 10, "rows are appended"


def check_stages(rows: list[dict], stages: list[str]) -> None:
    for row in rows:
        spent = {key.removeprefix("stage_").removesuffix("_s"): row[key] for key in row if key.startswith("stage_")}
        assert sorted(spent) == sorted(stages) and min(spent.values()) > 0
        assert row["select_s"] == pytest.approx(spent["membership"] + spent["cover"])
        assert row["event_s"] > max(spent.values())


def test_without_a_pruner_the_event_is_applied_to_nothing(tmp_path, capsys):
    arguments = ("--layers", "all", "--channels", "1", "--inputs", "2", "--between", "0.5")
    assert event(*arguments, "--json", str(tmp_path / "rows")) == 0
    rows = rows_of(tmp_path / "rows")
    check_stages(rows[-3:], list(events.STAGES))
    assert [row["row"] for row in rows[-3:]] == ["1x1", "KxK", "total"]
    assert rows[-1]["share_of_training"] == pytest.approx(rows[-1]["event_s"] / 0.5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "applied to no model" in printed and "of 0.5 s of training between two events" in printed


def test_a_pruner_is_run_where_it_prunes_these_layers(monkeypatch):
    stepped, step = [], bench_event.REPrune.step

    def counted(self):
        stepped.append([layer.name for layer in self.channels.prunable])
        assert all(state["momentum_buffer"] is not None for state in self.optimizer.state.values())
        return step(self)

    monkeypatch.setattr(bench_event.REPrune, "step", counted)
    assert event("--repeat", "2") == 0
    assert stepped == [["stage1.0.conv1", "stage2.0.conv1", "stage3.0.conv1"]] * 2
    assert event("--layers", "all") == event("--inputs", "1") == 0 and len(stepped) == 2


def other_filters(monkeypatch):
    cover = steps.Reference.cover
    monkeypatch.setattr(steps.Reference, "cover", lambda *given: ((found := cover(*given))[0].roll(1), found[1]))


def other_totals(monkeypatch):
    cover = steps.Reference.cover
    monkeypatch.setattr(steps.Reference, "cover", lambda *given: ((found := cover(*given))[0], found[1] + 1))


def other_seeds(monkeypatch):
    monkeypatch.setattr(bench_event, "seeds", lambda layers, args: [(5, 6)] * len(layers))


def fewer_come_back(monkeypatch):
    monkeypatch.setattr(regrow, "draw", lambda residual, kept, *rest: kept)


def one_more_to_keep(monkeypatch):
    count = at_sparsity

    def more(*given):
        found = count(*given)
        return found._replace(keep=found.keep + 1)

    for module in (pruner, bench_event):
        monkeypatch.setattr(module, "at_sparsity", more)


def chance(monkeypatch):
    turns, cover = [], steps.Reference.cover

    def changing(*given):
        turns.append(1)
        kept, totals = cover(*given)
        return (kept if len(turns) == 1 else kept.flip(0)), totals

    monkeypatch.setattr(steps.Reference, "cover", changing)


@pytest.mark.parametrize("inputs", [(), ("--inputs", "64")])  # of a pruner, and applied to no model
@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (other_filters, "other filters than the reference chooses"), (other_totals, "the widths do not add up"),
        (fewer_come_back, "the widths do not add up"), (one_more_to_keep, "the widths do not add up"),
        (chance, "two runs of the event chose other filters"),
    ],
)  # fmt: skip
def test_no_times_for_a_wrong_selection(tmp_path, capsys, monkeypatch, defect, message, inputs):
    defect(monkeypatch)
    assert event("--repeat", "2", *inputs, "--json", str(tmp_path / "rows")) == 1
    printed = capsys.readouterr()
    assert message in printed.err and "no times are shown" in printed.err and "Stages" not in printed.out
    assert not (tmp_path / "rows").exists()


def test_ties_are_those_of_the_seed(capsys, monkeypatch):
    """The pruner draws them as it always does: with others the filters are not the same."""
    other_seeds(monkeypatch)
    assert event() == 1
    assert "other filters than the reference chooses" in capsys.readouterr().err


def test_sums_are_one_call(tmp_path, monkeypatch):
    calls, cluster = [], ops.cluster_network

    def counted(layers, keeps, *rest):
        calls.append(sorted(layer.name for layer in layers))
        return cluster(layers, keeps, *rest)

    monkeypatch.setattr(ops, "cluster_network", counted)
    assert event("--layers", "all", "--inputs", "2", "--channels", "1", "--repeat", "2") == 0
    convs = [
        name for name, module in models.build("resnet8", 10).named_modules() if isinstance(module, torch.nn.Conv2d)
    ]
    shortcuts = sorted(name for name in convs if "shortcut" in name)
    for wanted in (sorted(convs), shortcuts, sorted({*convs} - {*shortcuts}), *([name] for name in convs[1:])):
        assert calls.count(wanted) == 2, wanted


@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_sampled_channels_are_declared(tmp_path, capsys, linkage):
    assert event("--channels", "2", "--linkage", linkage, "--json", str(tmp_path / "rows")) == 0
    assert all(row["extrapolated"] and row["peer_channels"] == 2 for row in rows_of(tmp_path / "rows"))
    assert "extrapolated" in capsys.readouterr().out


def test_1x1_layers_are_shown_apart(tmp_path):
    assert event("--layers", "all", "--channels", "1", "--inputs", "2", "--json", str(tmp_path / "rows")) == 0
    rows = rows_of(tmp_path / "rows")
    assert [row["row"] for row in rows] == ["layer"] * 9 + ["1x1", "KxK", "total"]
    assert [row["layers"] for row in rows[9:]] == [2, 7, 9] and all(row["inputs"] == 2 for row in rows)


@pytest.mark.parametrize("model", ["resnet8", "resnet18", "resnet50"])
def test_rule_for_resnets_is_what_the_analysis_finds(model):
    if model != "resnet8":
        pytest.importorskip("torchvision")
    network = models.build(model, 10)
    found = analysis.analyse(network, models.example_inputs(model, size=32)).prunable
    wanted = []  # the paper's rule: all convs of a block but the last
    for name, block in network.named_modules():
        convs = [f"{name}.conv{number}" for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
        wanted += convs[:-1] if name else []
    assert wanted == [layer.name for layer in found]


def test_triton_shows_its_rounds(tmp_path, capsys, monkeypatch):
    choose = networks.choose
    monkeypatch.setattr(networks, "choose", lambda args: choose(args)[:2])
    arguments = ("--impl", "triton", "--algorithm", "reciprocal", "--inputs", "1")
    if torch.cuda.is_available():
        arguments += ("--device", "cuda")
    assert event(*arguments, "--json", str(tmp_path / "rows")) == 0
    rows = rows_of(tmp_path / "rows")
    assert {(row["impl"], row["algorithm"]) for row in rows} == {("triton", "reciprocal")}
    printed = capsys.readouterr().out
    assert all(2 < row["rounds"] < 64 for row in rows) and "rounds" in printed
    assert "--algorithm is of clustering alone" in printed
    assert ("launches" in rows[-1]) == torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_launches_are_a_fixed_sequence(monkeypatch):
    launches, run = [], Configuration.run

    def counted(self, programs, *arguments):
        launches[-1] += programs > 0
        run(self, programs, *arguments)

    monkeypatch.setattr(Configuration, "run", counted)
    for seed in range(2):
        args = argparse.Namespace(device="cpu", seed=seed, sparsity=0.5, linkage="ward", impl="triton")
        layers = [layer._replace(weight=layer.weight + seed) for layer in few_layers(args)]
        launches.append(0)
        bench_event.alone(layers, args).fresh()()
    assert launches == [8, 8], "two to cluster, and one for every other step"


def test_floor_of_the_sums(monkeypatch, capsys):
    layers = [ops.Layer(torch.zeros(4, 3, k, k), name=str(k)) for k in (1, 3)]
    parts = [bench_event.Part(row, layers, {"cluster_s": 0.25}) for row in ("layer", "total")]
    args = argparse.Namespace(linkage="ward", algorithm="chain")
    console = bench_event.Console()
    asked = []

    def computed(*given):
        asked.append(given)
        return [types.SimpleNamespace(ms=30.0), types.SimpleNamespace(ms=70.0)]

    cost = types.SimpleNamespace(estimate=computed)
    monkeypatch.setitem(sys.modules, "reprune_triton.bench.estimate.cost", cost)
    monkeypatch.setattr(estimate, "cost", cost, raising=False)
    bench_event.add_floor(console, parts, args)
    assert asked == [(layers, "ward", "chain")] and "share" not in parts[0].figures
    assert parts[1].figures["floor_ms"] == 100 and parts[1].figures["share"] == pytest.approx(0.4)
    cost.estimate = lambda *given: 1 / 0
    bench_event.add_floor(console, parts, args)
    assert "No estimate of the floor: ZeroDivisionError" in capsys.readouterr().out


def few_layers(args: argparse.Namespace) -> list[ops.Layer]:
    generator = torch.Generator().manual_seed(0)
    return [ops.Layer(torch.randn(n, 1, k, k, generator=generator), name=f"{k}x{k}") for n, k in ((6, 1), (7, 3))]


def check_rows_of_a_gpu(rows: list[dict], layers: list[str], repeat: int) -> None:
    assert [row["row"] for row in rows] == [*layers, "1x1", "KxK", "total", "1x1 on the CPU"]
    for row in rows[:-1]:
        assert row["impl"] == "triton" and row["device_s"] > 0 and row["scratch_mb"] > 0 and row["rounds"] > 2
        assert row["repeat"] == repeat
        assert ("event_s" in row) == (row["row"] != "layer")
    check_stages(rows[-4:-1], list(events.STAGES))
    total = rows[-2]
    assert total["launches"] > 0 and total["transfers"] > 0 and total["synchronisations"] > 0
    for row in rows[-4:-1]:
        assert row["floor_ms"] > 0 and row["share"] == pytest.approx(row["floor_ms"] / 1e3 / row["cluster_s"])
    last = rows[-1]
    assert (last["impl"], last["device"], last["cuda"], last["repeat"]) == ("reference", "cpu", None, min(repeat, 3))
    assert last["scipy_s"] == rows[-4]["scipy_s"] and not {"device_s", "rounds", "share"} & set(last)


class Profiler:
    """The profiler's own wait is in every session; the second one is that of the event."""

    sessions = 0

    def __init__(self, activities):
        assert len(activities) == 2

    def __enter__(self):
        Profiler.sessions += 1
        return self

    def __exit__(self, *error):
        pass

    def events(self):
        names = ["cudaDeviceSynchronize", "Activity Buffer Request"]
        if Profiler.sessions == 2:
            names += ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "aten::sort", "cudaMemcpyAsync"]
            names += ["Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pinned -> Device)", "cudaStreamSynchronize"]
        return [types.SimpleNamespace(name=name) for name in names]


@pytest.fixture
def played_gpu(monkeypatch):
    """With a GPU that is played: everything around the kernels."""
    played = play(monkeypatch)
    Profiler.sessions = 0
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(networks, "choose", few_layers)
    monkeypatch.setattr(bench_event, "add_floor", lambda console, parts, args: [
        part.figures.update(floor_ms=1.0, share=1e-3 / part.figures["cluster_s"])
        for part in parts if part.row in ("1x1", "KxK", "total")
    ])  # fmt: skip
    return played


def on_played_gpu(path, *arguments: str, repeat: int = 1) -> int:
    arguments += ("--layers", "all", "--device", "cuda", "--impl", "triton", "--json", str(path))
    return main(["event", "--repeat", str(repeat), *arguments])


def test_what_a_gpu_adds(tmp_path, capsys, played_gpu):
    assert on_played_gpu(tmp_path / "rows", repeat=2) == 0
    assert played_gpu.device == 0
    rows = rows_of(tmp_path / "rows")
    check_rows_of_a_gpu(rows, ["layer"] * 2, 2)
    assert all(row["device"] == "played" and row["device_s"] == 0.002 and row["scratch_mb"] == 3 for row in rows[:-1])
    total = rows[-2]
    assert (total["launches"], total["transfers"], total["synchronisations"]) == (3, 1, 1)
    printed = capsys.readouterr().out
    for heading in ("on the device", "MB", "rounds", "floor", "1x1 on the CPU",
                    "3 kernel launches, 1 copies to the host, 1 synchronising calls"):  # fmt: skip
        assert heading in printed


@pytest.mark.parametrize("nothing", [False, True], ids=["fails", "sees nothing"])
def test_times_are_not_lost_over_a_profiler(tmp_path, capsys, monkeypatch, played_gpu, nothing):
    def fail(*given, **named):
        raise RuntimeError("not now")

    if nothing:
        monkeypatch.setattr(Profiler, "events", lambda self: [])
    else:
        monkeypatch.setattr(torch.profiler, "profile", fail)
    assert on_played_gpu(tmp_path / "rows", "--total") == 0
    (total,) = rows_of(tmp_path / "rows")
    assert total["event_s"] > 0 and total.keys().isdisjoint({"launches", "transfers"})
    printed = capsys.readouterr().out
    assert f"Launches are not counted: {'the profiler saw none' if nothing else 'RuntimeError: not now'}" in printed


def test_what_a_graph_holds(tmp_path, capsys, monkeypatch, played_gpu):
    """The played one replays nothing: what it finds is given to it here."""
    captured, launch, read = [], events.PreparedEvent.launch, events.PreparedEvent.read

    def noted(self, *given):
        if played_gpu.capturing:
            captured.append(self)
        launch(self, *given)

    monkeypatch.setattr(events.PreparedEvent, "launch", noted)
    path = tmp_path / "rows"
    found = []

    def outcome(self):
        if self not in captured:
            found.append(read(self))
        return found[-1]

    monkeypatch.setattr(events.PreparedEvent, "read", outcome)
    assert on_played_gpu(path, "--graph", repeat=3) == 0
    (row,) = rows_of(path)
    assert (row["row"], row["result"], row["layers"], row["graph_s"]) == ("graph", "held", 2, 0.002)
    assert "A CUDA graph holds the event" in capsys.readouterr().out
    assert len(captured) == 1 and played_gpu.replays == 2 * 4 and len(found) == 2
    assert not torch.equal(found[0].kept, found[1].kept), "for two sets of weights"

    monkeypatch.setattr(events.PreparedEvent, "read", read)
    assert on_played_gpu(path, "--graph") == 1
    assert "a CUDA graph of the event chose other filters, for other weights" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda self, *pool, **options: 1 / 0)
    assert on_played_gpu(path, "--graph") == 1
    assert "the event is in no CUDA graph: ZeroDivisionError" in capsys.readouterr().err
    assert len(rows_of(path)) == 1


def test_a_graph_needs_a_gpu(capsys):
    assert event("--graph") == 1
    assert "a CUDA graph needs CUDA" in capsys.readouterr().err


def test_the_whole_event_alone(tmp_path):
    assert event("--total", "--json", str(tmp_path / "rows")) == 0
    (row,) = rows_of(tmp_path / "rows")
    assert row["row"] == "total" and row["layers"] == 3 and row["event_s"] > 0 and row["scipy_s"] > 0


def test_what_is_known_is_on_disk(tmp_path, monkeypatch):
    """The whole event first, then its parts: whoever is stopped or killed has lost only what was running."""
    path, known, time_ours = tmp_path / "rows", [], bench_event.time_ours

    def stopped(*given):
        known.append([row["row"] for row in rows_of(path)] if path.exists() else [])
        if len(known) == 4:
            raise KeyboardInterrupt
        return time_ours(*given)

    monkeypatch.setattr(bench_event, "time_ours", stopped)
    with pytest.raises(KeyboardInterrupt):
        event("--layers", "all", "--inputs", "1", "--json", str(path))
    assert known == [[], ["total"], ["layer", "total"], ["layer", "layer", "total"]]
    assert [row["row"] for row in rows_of(path)] == known[-1] and rows_of(path)[-1]["event_s"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")
def test_an_event_on_a_gpu(tmp_path):
    assert main(["event", "--model", "resnet8", "--layers", "all", "--device", "cuda", "--repeat", "4",
                 "--json", str(tmp_path / "rows")]) == 0  # fmt: skip
    check_rows_of_a_gpu(rows_of(tmp_path / "rows"), ["layer"] * 9, 4)


def test_a_missing_library_leaves_its_column_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastcluster", None)
    assert event("--json", str(tmp_path / "rows")) == 0
    assert "fastcluster is not installed" in capsys.readouterr().out
    assert all("fastcluster_s" not in row and "scipy_s" in row for row in rows_of(tmp_path / "rows"))


def heights(merges, clusters):
    return merges._replace(height=merges.height * 1.001), clusters


def labels(merges, clusters):
    return merges, clusters._replace(labels=clusters.labels.roll(1, dims=1))


def parents(merges, clusters):
    return merges._replace(parent=merges.parent.flip(1)), clusters


def one_bit(merges, clusters):
    height = merges.height.clone()
    height[0, -1] = height[0, -1].nextafter(torch.tensor(torch.inf))
    return merges._replace(height=height), clusters


@pytest.mark.parametrize("change", [heights, labels, parents, one_bit])
def test_no_times_for_wrong_results(tmp_path, capsys, monkeypatch, change):
    cluster = ops.cluster_network

    def wrong(layers, *rest):
        found = cluster(layers, *rest)
        return [change(*result) for result in found] if change is not one_bit or len(layers) == 1 else found

    monkeypatch.setattr(ops, "cluster_network", wrong)
    assert event("--json", str(tmp_path / "rows")) == 1
    printed = capsys.readouterr()
    assert "no times are shown" in printed.err and "KxK" not in printed.out
    assert not (tmp_path / "rows").exists()


def result_of(points: np.ndarray, keep: int, linkage: str = "ward") -> tuple[ops.Merges, ops.Clusters]:
    merges = ops.ward(torch.from_numpy(points), linkage)
    return merges, ops.cut(merges, keep)


def check(points, theirs, merges, clusters):
    return peers.check_same("here", points, theirs, np.arange(len(points)), merges, clusters)


def near_tie(fourth: float, linkage: str, keep: int):
    """0, 1, 2 and a fourth point: 1 and 2 are nearest by a hair, and ours takes 0 and 1."""
    points, mine = (np.array([[[0], [1], [2 + step], [fourth]]]) for step in (-1e-9, 1e-9))
    theirs, (merges, clusters) = scipy_linkage(points[0], linkage), result_of(mine, keep, linkage)
    other_heights = np.abs(merges.to_scipy()[0, :, 2] - theirs[:, 2]).max() > 0.01
    same_cut = peers.same_partition(peers.after(theirs, 4 - keep), clusters.labels[0].numpy())
    return other_heights, same_cut, check(points, [theirs], merges, clusters)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("linkage", ["ward", "complete", "average"])
def test_a_near_tie_is_counted_and_not_refused(linkage, keep):
    other_heights, _, doubts = near_tie(3.5, linkage, keep)
    assert other_heights and doubts == ({0}, set()), "with 2 and 3.5 left over, they merge"
    other_heights, same_cut, doubts = near_tie(40, linkage, keep)
    assert not other_heights and same_cut == (keep < 3)
    assert doubts == (set() if same_cut else {0}, set()), "equal heights, but other clusters after the first merge"


def test_a_tie_at_the_cut_is_undecided():
    assert near_tie(40, "single", 3) == (False, False, (set(), {0}))


@pytest.mark.parametrize("linkage", ops.LINKAGES)
@pytest.mark.parametrize("d", [1, 9])
def test_replay_agrees_with_right_merges_and_objects_to_wrong_ones(linkage, d):
    for seed in range(5):
        points = problems(gaussian, 1, 60, d, seed)
        Z = scipy_linkage(points[0], linkage)
        assert peers.replay(points[0], Z, linkage) is None
        single = result_of(points.astype(np.float32), 30, linkage)[0].to_scipy()[0]
        assert peers.replay(points[0], single, linkage) is None
        other = scipy_linkage(points[0], "complete" if linkage == "single" else "single")
        assert peers.replay(points[0], other, linkage)
        assert "costs" in peers.replay(points[0], Z * [1, 1, 1.001, 1], linkage)
        moved = points[0].copy()
        moved[7] = moved[7] * 1.01
        assert peers.replay(moved, Z, linkage)


@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_a_wrong_merge_is_refused_though_it_costs_what_it_says(linkage):
    """0 and 1 merge before 4 and 4.5, which are nearer: the heights are those of the merges, but not the right ones."""
    points = np.array([[[0.0], [1.0], [4.0], [4.5]]])
    merges, clusters = result_of(points, 3, linkage)
    right = scipy_linkage(points[0], linkage)
    assert check(points, [right], merges, clusters) == (set(), set())
    far = points.copy()
    far[0, 2:] = [[4.0], [6.0]]  # what ours clusters
    wrong, cut = result_of(far, 3, linkage)
    with pytest.raises(RepruneError, match="channel 0: merge heights differ by .* no times are shown"):
        check(points, [right], wrong, cut)
    # Merge 2 and 4 first: cost 2, while 0 and 1 are open at 1.
    Z = np.array([[0, 2, 4.0, 2], [1, 4, 5.0, 3], [3, 5, 6.0, 4]])
    assert "was open" in peers.replay(points[0], Z, linkage)


def test_the_cut_must_be_that_of_the_merges():
    points = problems(gaussian, 3, 30, 9, 1)
    merges, clusters = result_of(points, 15)
    theirs = [scipy_linkage(x, "ward") for x in points]
    assert check(points, theirs, merges, clusters) == (set(), set())
    wrong = clusters.labels.clone()
    wrong[1, 3] = (wrong[1, 3] + 1) % 15
    with pytest.raises(RepruneError, match="channel 1: the cut is not that of the merges"):
        check(points, theirs, merges, clusters._replace(labels=wrong))


def test_refused_settings(capsys):
    assert event("--channels", "0") == event("--between", "0") == 1
    assert event("--sparsity", "1.5") == 1
    assert "sparsity is 1.5" in capsys.readouterr().err
    assert event("--algorithm", "chain") == 1
    with pytest.raises(SystemExit):
        main(["nothing"])
