"""Time one pruning event: clustering and cut of all layers in one call, beside other libraries; then the whole event,
stage by stage, as the pruner runs it.

Times are only shown once the results are the same: the heights of every merge, and the clusters at the cut. Where two
merges are closer than float32 can tell, ours may take the other one; then all merges of that problem are carried out
again in float64, and each must have been a cheapest one at its turn. Of the whole event the filters must be those that
the reference chooses from these merges.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import nn

from reprune_triton import REPrune, capture, ops
from reprune_triton.bench import networks, rows, terminal
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure.peers import TOLERANCE, Peers, Result
from reprune_triton.errors import RepruneError
from reprune_triton.running import layers
from reprune_triton.selection import event as events
from reprune_triton.selection import problems, reference
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.rng import derive_seeds
from reprune_triton.selection.widths import Scales, Widths, at_sparsity, regrow_share
from reprune_triton.training import models

EPOCH, UNTIL, REGROW = 1, 2, 0.3  # of the whole event: half of the regrowth is left
BETWEEN = 92.0
Row = dict[str, Any]
OF_ALL = ("between_s", "share_of_training")  # figures of the whole event alone
# What the profiler calls the work of an event, by how the names begin.
WORK = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "transfers": ("Memcpy DtoH",),
    "synchronisations": (
        "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize",
        "cuEventSynchronize", "cuCtxSynchronize",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model linkage impl algorithm device threads seed", device="cpu")
    parser.add_argument(
        "--layers", default="prunable", choices=networks.RULES,
        help="prunable: what the pruner would prune; all: every conv that is not grouped (default: prunable)",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", type=float, default=0.5, help="of every layer; in the whole event, of all layers (default: 0.5)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="our times are medians of this many runs (default: 3)")
    parser.add_argument(
        "--channels", type=int, metavar="K", help="the others cluster only K input channels per layer, extrapolated"
    )
    parser.add_argument(
        "--inputs", type=int, metavar="K", help="nobody clusters more than the first K input channels: a trial run"
    )
    parser.add_argument(
        "--between", type=float, default=BETWEEN, metavar="SECONDS",
        help="of training between two events, of which the event's share is shown (default: 92, a published time for "
        "two epochs of ResNet-50 on ImageNet on 8 GPUs)",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--total", action="store_true", help="only the whole event, not layer by layer")
    what.add_argument("--graph", action="store_true", help="only whether a CUDA graph holds the event, and its time")


@dataclass
class Part:
    """Some layers of the event, clustered and cut in one call."""

    row: str  # "layer" or the name of a sum
    layers: list[ops.Layer]
    figures: dict[str, float] = field(default_factory=dict)  # times end in _s: seconds


def run(args: argparse.Namespace) -> None:
    terminal.check_at_least_one(args, "threads repeat channels inputs")
    if not args.between > 0:
        raise RepruneError("--between must be more than 0 seconds.")
    console = terminal.console(200)
    devices.use(args.device)
    torch.set_num_threads(args.threads)
    layers = networks.choose(args)
    if args.graph:
        hold(console, layers, args)
        return
    draft = rows.Draft(args.json)
    try:
        measure(console, layers, draft, args)
    except RepruneError:  # what is wrong has no times at all; what is only stopped keeps those it has
        draft.write([])
        raise


def measure(console: Console, layers: list[ops.Layer], draft: rows.Draft, args: argparse.Namespace) -> None:
    """Measure the whole event, then its parts; each is on disk as soon as it is known."""
    cuda = torch.device(args.device).type == "cuda"
    keeps = {layer.name: ops.keep_count(layer.n, args.sparsity) for layer in layers}
    sums = [("1x1", [layer for layer in layers if layer.d == 1]), ("KxK", [layer for layer in layers if layer.d > 1])]
    parts = [Part("layer", [layer]) for layer in layers] + [Part(row, some) for row, some in sums if some]
    total = Part("total", layers)
    parts = [total] if args.total else [*parts, total]
    impl = "+".join(sorted({"triton" if problems.uses_triton(layer, args.impl) else "reference" for layer in layers}))

    warm_up = layers[0]._replace(inputs=torch.arange(min(2, layers[0].problems)))
    ops.cluster_network([warm_up], [keeps[warm_up.name]], args.linkage, args.impl, args.algorithm)
    total.figures, results = time_ours(layers, keeps, args)
    peers = Peers(layers, args)
    for name in ("SciPy", "fastcluster"):
        if name not in peers.names:
            console.print(f"{name} is not installed: its column is left out. pip install {name.lower()}")
    peers.check(results)

    here = rows.environment(args.device)

    def note() -> None:
        draft.write([here | line for line in lines(parts, keeps, impl, peers, args)])

    merges = merges_of_an_event(layers, results, args)
    subject = of_a_pruner(layers, args) if runs_a_pruner(args) else alone(layers, args)
    total.figures |= peers.seconds(total.layers) | time_event(subject, merges, args) | {"between_s": args.between}
    total.figures["share_of_training"] = total.figures["event_s"] / args.between
    note()
    for part in parts[:-1]:
        if len(part.layers) == len(layers):
            part.figures = {key: total.figures[key] for key in total.figures if key not in OF_ALL}
            continue
        figures, again = time_ours(part.layers, keeps, args)
        for name in again:
            check_same_bits(name, again[name], results[name])
        if part.row != "layer":
            figures |= time_event(alone(part.layers, args), merges, args)
        part.figures = figures | peers.seconds(part.layers)
        note()
    if cuda and sums[0][1] and not args.total:
        on_cpu = Part("1x1 on the CPU", [layer._replace(weight=layer.weight.cpu()) for layer in sums[0][1]])
        plain = argparse.Namespace(**vars(args) | plain_settings(args))
        figures, again = time_ours(on_cpu.layers, keeps, plain)
        peers.check(again)
        on_cpu.figures = figures | peers.seconds(on_cpu.layers)
        parts.append(on_cpu)
        note()
    if impl == "triton":
        add_rounds(parts, layers, args)
        if cuda:
            add_counts(console, total, subject)
            add_floor(console, parts, args)
    note()
    report(console, lines(parts, keeps, impl, peers, args), peers, here["device"], args)


def plain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the row "1x1 on the CPU", which shows how much of the gain is the algorithm's alone."""
    return {"impl": "reference", "algorithm": "auto", "device": "cpu", "repeat": min(args.repeat, 3)}


def time_ours(
    layers: list[ops.Layer], keeps: dict[str, int], args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Result]]:
    """Cluster and cut the layers in one call."""
    device, wanted = torch.device(args.device), [keeps[layer.name] for layer in layers]
    cuda = device.type == "cuda"
    turns: list[dict[str, float]] = []
    for _ in range(args.repeat + cuda):
        turn = {}
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            begin.record()
        started = time.perf_counter()
        found = ops.cluster_network(layers, wanted, args.linkage, args.impl, args.algorithm)
        if cuda:
            end.record()
            torch.cuda.synchronize(device)
            turn["device_s"] = begin.elapsed_time(end) / 1e3
            turn["scratch_mb"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        turn["cluster_s"] = time.perf_counter() - started
        turns.append(turn)
    del turns[:cuda]  # on a GPU the first one compiles
    figures = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    names = [layer.name for layer in layers]
    return figures, dict(zip(names, found, strict=True))


class Whole(NamedTuple):
    """One event that has been run."""

    stages: dict[str, float]  # ms
    ms: float  # by the clock
    outcome: events.Outcome
    gammas: torch.Tensor  # (T,) the BatchNorm scales that it counted


class Subject(NamedTuple):
    """Layers on which the whole event can be run."""

    layers: list[ops.Layer]
    fresh: Callable[[], Callable[[], Whole]]  # prepares what is not timed, and gives the event to run


class Watched(REPrune):
    """A pruner that keeps what its event found."""

    outcome: events.Outcome

    def _gone(self, outcome: events.Outcome) -> layers.Slices:
        self.outcome = outcome
        return super()._gone(outcome)


def runs_a_pruner(args: argparse.Namespace) -> bool:
    """Whether the layers are those of a pruner: all that are prunable, over all their inputs."""
    return args.layers == "prunable" and args.inputs is None


def of_a_pruner(layers: list[ops.Layer], args: argparse.Namespace) -> Subject:
    """Return the event as `REPrune.step`, each time of a new pruner; its analysis of the model is not timed."""

    def fresh() -> Callable[[], Whole]:
        model = networks.build(args.model, args.seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
                nn.init.uniform_(module.weight)
        model.to(args.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        pruner = Watched(
            model, optimizer, example_inputs=models.example_inputs(args.model).to(args.device), sparsity=args.sparsity,
            every=EPOCH, until=UNTIL, regrow=REGROW, linkage=args.linkage, round_to=1, seed=args.seed, impl=args.impl,
        )  # fmt: skip

        def step() -> Whole:
            event = pruner.step()
            assert event is not None
            return Whole(event.stages, event.ms, pruner.outcome, pruner._gammas())

        return step

    return Subject(layers, fresh)


def alone(layers: list[ops.Layer], args: argparse.Namespace) -> Subject:
    """Return the event without a model to apply it to."""
    request, gammas = request_of(layers, args)

    def run_event() -> Whole:
        started = time.perf_counter()
        found = events.PreparedEvent(request)
        clock = events.Clock(request.pool.device)
        found.launch(clock)
        outcome = found.read()
        return Whole(clock.ms(), (time.perf_counter() - started) * 1e3, outcome, gammas)

    return Subject(layers, lambda: run_event)


def request_of(layers: list[ops.Layer], args: argparse.Namespace) -> tuple[events.Request, torch.Tensor]:
    """Return an event over these layers as a pruner would ask for it, and the scales (T,) that it counts."""
    pool = Pool([layer.n_out for layer in layers], layers[0].weight.device)
    gammas = torch.rand(pool.total, generator=torch.Generator().manual_seed(args.seed)).to(pool.device)
    active = torch.ones_like(gammas, dtype=torch.bool)

    def widths() -> Widths:
        return at_sparsity(Scales(pool, gammas, active), args.sparsity, extra(), 1, 1)

    watched = [gammas, *(layer.weight for layer in layers)]
    return events.Request(layers, pool, widths, seeds(layers, args), args.linkage, args.impl, watched=watched), gammas


def extra() -> float:
    """Return the share of channels that regrow."""
    return regrow_share(EPOCH, UNTIL, REGROW)


def seeds(layers: list[ops.Layer], args: argparse.Namespace) -> list[tuple[int, int]]:
    return derive_seeds(args.seed, EPOCH, len(layers), 2).tolist()


def time_event(subject: Subject, merges: Mapping[str, ops.Merges], args: argparse.Namespace) -> dict[str, float]:
    """Return medians of the whole event and of its stages, in seconds, once its filters are the right ones."""
    cuda = torch.device(args.device).type == "cuda"
    runs: list[Whole] = []
    for _ in range(args.repeat + cuda):
        event = subject.fresh()
        if cuda:
            torch.cuda.synchronize(args.device)
        runs.append(event())
    check_selection(subject.layers, merges, runs[0], args)
    if not all(same_outcome(run.outcome, runs[0].outcome) for run in runs):
        raise RepruneError("two runs of the event chose other filters; no times are shown.")
    del runs[:cuda]  # on a GPU the first one compiles
    figures = {
        f"stage_{stage}_s": statistics.median(run.stages[stage] for run in runs) / 1e3 for stage in runs[0].stages
    }
    figures["select_s"] = figures["stage_membership_s"] + figures["stage_cover_s"]
    figures["event_s"] = statistics.median(run.ms for run in runs) / 1e3
    return figures


def same_outcome(one: events.Outcome, other: events.Outcome) -> bool:
    masks = (one.kept, other.kept), (one.active, other.active)
    return one.layers == other.layers and all(torch.equal(a, b) for a, b in masks)


def merges_of_an_event(
    layers: list[ops.Layer], results: dict[str, Result], args: argparse.Namespace
) -> dict[str, ops.Merges]:
    """Return the merges of a whole event: those that were checked, unless these are of another algorithm."""
    if args.algorithm == "auto":
        return {name: merges for name, (merges, _) in results.items()}
    found = ops.ward_network(layers, args.linkage, args.impl)
    return {layer.name: merges for layer, merges in zip(layers, found, strict=True)}


def check_selection(
    layers: list[ops.Layer], merges: Mapping[str, ops.Merges], whole: Whole, args: argparse.Namespace
) -> None:
    """Cut and choose again with the reference, layer by layer, and count the widths again; raise where they differ."""
    pool = Pool([layer.n_out for layer in layers])
    outcome, gammas = whole.outcome, pool.split(whole.gammas.detach().cpu())
    kept, active = pool.split(outcome.kept.cpu()), pool.split(outcome.active.cpu())
    keeps, widths = (widths_at(gammas, share) for share in (args.sparsity, max(args.sparsity - extra(), 0)))
    for number, (layer, found) in enumerate(zip(layers, outcome.layers, strict=True)):
        parent, height = (tensor.cpu() for tensor in merges[layer.name][:2])
        labels, _ = reference.cut(parent, height, found.kept)
        seed = seeds(layers, args)[number][0]
        order, _, covered, clusters = reference.cover(labels, found.kept, "random", seed, None)
        chosen = torch.zeros_like(kept[number])
        chosen[order] = True
        if not torch.equal(chosen, kept[number]):
            raise RepruneError(f"{layer.name}: other filters than the reference chooses; no times are shown.")
        counted = (int(kept[number].sum()), int(active[number].sum()), covered, clusters)
        if found[:4] != counted or counted[:2] != (keeps[number], widths[number]) or (chosen & ~active[number]).any():
            raise RepruneError(f"{layer.name}: the widths do not add up; no times are shown.")


def widths_at(gammas: Sequence[torch.Tensor], share: float) -> list[int]:
    """Count the filters of each layer above the quantile of all scales, one at least."""
    ordered = torch.cat(list(gammas)).sort().values.tolist()
    rank = len(ordered) - ops.keep_count(len(ordered), share)
    threshold = ordered[rank - 1] if rank else -1.0
    return [max(1, int((own > threshold).sum())) for own in gammas]


def add_counts(console: Console, total: Part, subject: Subject) -> None:
    """Count what one whole event asks of the GPU."""
    event = subject.fresh()
    try:
        before, after_it = (profiled(work) for work in (lambda: None, event))  # the profiler itself waits in the end
    except Exception as error:  # measurements on a lent GPU must not be lost over it
        console.print(f"Launches are not counted: {type(error).__name__}: {error}", markup=False)
        return
    if after_it["launches"]:
        total.figures |= {key: after_it[key] - before[key] for key in WORK}
    else:
        console.print("Launches are not counted: the profiler saw none. CUPTI may be missing.")


def profiled(work: Callable[[], object]) -> dict[str, int]:
    """Count each kind of WORK by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    names = [event.name for event in profiler.events()]
    return {key: sum(name.startswith(begin) for name in names) for key, begin in WORK.items()}


def hold(console: Console, layers: list[ops.Layer], args: argparse.Namespace) -> None:
    """Time the event without `apply` as a CUDA graph.

    It must find what the event finds, for the weights of the capture and for others. A process does nothing else: a
    capture that fails leaves CUDA in no state to go on in.

    Raises:
        RepruneError: if it cannot be captured, or finds something else.
    """
    if torch.device(args.device).type != "cuda":
        raise RepruneError("a CUDA graph needs CUDA: --device cuda.")
    request, _ = request_of(layers, args)
    plain, captured, spent = events.PreparedEvent(request), events.PreparedEvent(request), list[float]()
    try:
        capture.warm_up(captured.launch)
        replay = capture.capture(captured.launch)
    except Exception as error:
        raise RepruneError(f"the event is in no CUDA graph: {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(args.seed + 1)
    for other in (False, True):
        for layer in layers if other else ():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        plain.launch()
        wanted = plain.read()
        spent += devices.time_each(replay, args.repeat + 1, torch.device(args.device))[1:]
        if not same_outcome(captured.read(), wanted):
            which = "other weights" if other else "the weights of its capture"
            raise RepruneError(f"a CUDA graph of the event chose other filters, for {which}; no times are shown.")
    figures = {"graph_s": statistics.median(spent) / 1e3, "layers": len(layers), "result": "held"}
    about = {"benchmark": "event", "row": "graph", "model": args.model, "rule": args.layers, "seed": args.seed,
             "sparsity": args.sparsity, "linkage": args.linkage, "impl": "triton"}  # fmt: skip
    rows.append(args.json, rows.environment(args.device) | about | figures)
    ms = f"{statistics.median(spent):.3f} ms on the device"
    console.print(f"A CUDA graph holds the event, applied to no model: {ms}.")


def check_same_bits(name: str, one: Result, other: Result) -> None:
    (merges, clusters), (merges_too, clusters_too) = one, other
    pairs = [(merges.parent, merges_too.parent), (merges.height, merges_too.height)]
    if not all(torch.equal(a, b) for a, b in (*pairs, (clusters.labels, clusters_too.labels))):
        raise RepruneError(f"{name}: other bits alone than with the whole network; no times are shown.")


def add_rounds(parts: list[Part], layers: list[ops.Layer], args: argparse.Namespace) -> None:
    """Add the median number of rounds that the kernels took for a problem; of a chain, searches."""
    from reprune_triton.kernels.clustering import launch

    rounds = launch.cluster(launch.prepare(layers, args.linkage, args.algorithm)).work[:, 0].cpu()
    split = rounds.split([layer.problems for layer in layers])
    of_layer = {layer.name: some for layer, some in zip(layers, split, strict=True)}
    for part in parts:
        if part.row != "1x1 on the CPU":
            part.figures["rounds"] = float(np.median(np.concatenate([of_layer[layer.name] for layer in part.layers])))


def add_floor(console: Console, parts: list[Part], args: argparse.Namespace) -> None:
    """Add the time that the instructions alone would take, if every scheduler issued one in every cycle."""
    from reprune_triton.bench.estimate import cost

    for part in parts:
        if part.row not in ("layer", "1x1 on the CPU"):
            try:
                floor = sum(x.ms for x in cost.estimate(part.layers, args.linkage, args.algorithm))
            except Exception as error:  # measurements on a lent GPU must not be lost over an estimate
                console.print(f"No estimate of the floor: {type(error).__name__}: {error}", markup=False)
                return
            part.figures |= {"floor_ms": floor, "share": floor / 1e3 / part.figures["cluster_s"]}


def lines(
    parts: list[Part], keeps: dict[str, int], impl: str, peers: Peers, args: argparse.Namespace
) -> list[Row]:
    """Return a row for every part that has figures, without the environment."""
    settings: dict[str, Any] = {
        "benchmark": "event", "model": args.model, "rule": args.layers, "sparsity": args.sparsity,
        "linkage": args.linkage, "impl": impl, "algorithm": args.algorithm, "seed": args.seed, "repeat": args.repeat,
        "inputs": args.inputs, "peer_channels": args.channels, "checked": bool(peers.names),
        "extrapolated": args.channels is not None and any(args.channels < x.problems for p in parts for x in p.layers),
        "near_ties": len(peers.doubts.near_ties), "undecided": len(peers.doubts.undecided),
    }  # fmt: skip
    found = []
    for part in parts:
        about: dict[str, Any] = {"layers": len(part.layers), "problems": sum(layer.problems for layer in part.layers)}
        if part.row == "layer":
            (layer,) = part.layers
            n_out, _, kh, kw = layer.weight.shape
            about = {"layer": layer.name, "n_out": n_out, "n_in": layer.problems, "kh": kh, "kw": kw}
            about["keep"] = keeps[layer.name]
        own = plain_settings(args) | {"cuda": None} if part.row == "1x1 on the CPU" else {}
        if part.figures:
            found.append(settings | own | {"row": part.row} | about | part.figures)
    return found


def report(console: Console, found: list[Row], peers: Peers, device: str, args: argparse.Namespace) -> None:
    """Print the rows as a table, and what was checked."""
    total = next(row for row in found if row["row"] == "total")
    sampled = f", extrapolated from {args.channels} channels per layer" if total["extrapolated"] else ""
    algorithm = "" if args.algorithm == "auto" else f" ({args.algorithm})"
    trial = "" if args.inputs is None else f", only {args.inputs} input channels"

    def shown(key: str, form: Callable[[float], str], row: Row) -> str:
        return form(row[key]) if key in row else ""

    def ratio(key: str, row: Row) -> str:
        return f"{row[key] / row['cluster_s']:.2f}x"

    columns: dict[str, Callable[[Row], str]] = {
        "layer": lambda row: row.get("layer") or f"{row['row']}: {row['layers']} layers",
        "n_out": lambda row: str(row.get("n_out", "")),
        "n_in": lambda row: str(row.get("n_in") or row["problems"]),
        "kernel": lambda row: f"{row['kh']}x{row['kw']}" if "kh" in row else "",
        "keep": lambda row: str(row.get("keep", "")),
        "clustering, cut": lambda row: seconds(row["cluster_s"]),
    }
    for key, heading, form in (
        ("select_s", "selection", seconds), ("device_s", "on the device", seconds),
        ("scratch_mb", "MB", "{:.1f}".format), ("rounds", "rounds", "{:g}".format),
        ("floor_ms", "floor, ms", "{:.3f}".format), ("share", "floor / time", "{:.0%}".format),
        *((f"{name.lower()}_s", name, seconds) for name in peers.names),
    ):  # fmt: skip
        if key in total:
            columns[heading] = functools.partial(shown, key, form)
    for name in peers.names:
        columns[f"{name} / ours"] = functools.partial(ratio, f"{name.lower()}_s")
    table = terminal.table(
        f"One pruning event of {args.model} ({args.layers} layers{trial}): {args.linkage}, sparsity "
        f"{args.sparsity}, {total['impl']}{algorithm} on {device}, {torch.get_num_threads()} CPU thread(s), seconds",
        columns, ("layer",),
        "Sums are one call for their layers. Selection: in the whole event. Others / ours: their clustering alone, our "
        "clustering and cut. 1x1 kernels are points on a line: that part of the gain is the algorithm's. Other "
        f"libraries{sampled}: one call per input channel on {rows.cpu_name()}.",
    )  # fmt: skip
    for row, following in zip(found, [*found[1:], None], strict=True):
        last = row["row"] == "layer" and following is not None and following["row"] != "layer"
        table.add_row(*(cell(row) for cell in columns.values()), end_section=last)
    console.print(table)
    report_stages(console, total, peers.names, args)
    if peers.names:
        near_ties, undecided = peers.doubts
        console.print(
            f"Checked first: equal merge heights (to {TOLERANCE:g} of the largest) and equal clusters at the cut in "
            f"every channel compared, but for {len(near_ties)} in which float32 took another merge that is as cheap "
            f"(all their merges were replayed in float64), and {len(undecided)} with two merges at the cut too close "
            "to tell apart."
        )
    else:
        console.print("Nothing was compared. pip install scipy fastcluster")
    console.print("The filters of the whole event are those that the reference chooses from the same merges.")


def report_stages(console: Console, figures: Row, peers: list[str], args: argparse.Namespace) -> None:
    """Print the stages of the whole event, what it asks of the device, and its share of a training."""
    stages = [key for key in figures if key.startswith("stage_")]
    table = terminal.table("Stages", ("stage", "ms", "share"), ("stage",))
    for key in (*stages, "event_s"):
        name = "all, by the clock" if key == "event_s" else key.removeprefix("stage_").removesuffix("_s")
        share = f"{figures[key] / figures['event_s']:.1%}"
        table.add_row(name, f"{figures[key] * 1e3:.3f}", share, end_section=key == stages[-1])
    console.print(table)
    if "transfers" in figures:
        console.print(
            f"One event: {figures['launches']} kernel launches, {figures['transfers']} copies to the host, "
            f"{figures['synchronisations']} synchronising calls."
        )
    if args.algorithm != "auto":
        console.print("The whole event chooses the algorithm itself: --algorithm is of clustering alone.")
    others = "".join(f"; {name}'s clustering alone {seconds(figures[f'{name.lower()}_s'])} s" for name in peers)
    what = "REPrune.step" if runs_a_pruner(args) else "applied to no model"
    console.print(f"The whole event ({what}, median of {args.repeat}): {seconds(figures['event_s'])} s{others}.")
    share = f"{100 * figures['share_of_training']:.2g} %"
    console.print(f"That is {share} of {args.between:g} s of training between two events.")


def seconds(t: float) -> str:
    return f"{t:.4f}" if t >= 0.1 else f"{t:.6f}"
