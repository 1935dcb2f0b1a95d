"""Compare the choices of `fused.dispatch` between our kernels and PyTorch with the times of CUDA graphs.

Dispatch chooses by a clock in which the host may have a part. In a graph's replay it has none, so a bias shows.

The shapes are those that a training step of the network, fused, asks for. On a CPU, where nothing is chosen, both
times are by the same clock: a rehearsal.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reprune_triton import capture, fuse
from reprune_triton.bench import rows, terminal
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure import variants
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.training import models

RUNS = 10  # of a graph
REPLAYS = 5
OPERATIONS = ("conv", "norm_act")
ALIKE = 0.02  # of the time: less is no difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model batch size device seed")
    parser.add_argument("--shapes", type=int, default=16, help="how many, from all over the network (default: 16)")
    parser.add_argument("--operation", choices=OPERATIONS, help="only this one (default: all)")


def run(args: argparse.Namespace) -> None:
    args.size = args.size or models.image_size(args.model)
    terminal.check_at_least_one(args, "batch size shapes")
    device = devices.use(args.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in a training
    cases = met(args, device)
    wanted = [case for case in cases if args.operation in (None, case.operation)]
    some = [wanted[number * len(wanted) // args.shapes] for number in range(args.shapes)]
    settings = rows.environment(device) | {
        "benchmark": "dispatch", "model": args.model, "batch": args.batch, "size": args.size, "seed": args.seed,
    }  # fmt: skip
    lines, failed = list[dict[str, Any]](), list[dict[str, Any]]()
    for case in dict.fromkeys(some):
        line = settings | compare(case, cases[case], device)
        rows.append(args.json, line)
        if line["result"] == "failed":
            print(f"{case.operation} {case.form} {case.channels}: failed, {line['why']}", flush=True)
            failed.append(line)
            continue
        spent = ", ".join(f"{name} {line['clock_ms'][name]:.3f} / {line['replay_ms'][name]:.3f} ms" for name in NAMES)
        verdict = "right" if line["right"] else f"{line['loss']:.0%} slower than the other"
        print(f"{case.operation} {case.form} {case.channels}: {spent}: {line['chosen']}, {verdict}", flush=True)
        lines.append(line)
    if failed:  # a capture that fails may be the cause of all that come after it
        raise RepruneError(f"{len(failed)} shapes could not be compared, the first one for: {failed[0]['why']}")
    found = [math.log(ratio(line["clock_ms"]) / ratio(line["replay_ms"])) for line in lines]
    right = sum(line["right"] for line in lines)
    print(
        f"{right} of {len(lines)} choices are right, to {ALIKE:.0%}. By dispatch's clock ours takes "
        f"{math.exp(statistics.mean(found)):.3f} times as long, beside PyTorch, as replayed."
    )


NAMES = (dispatch.UNKNOWN, "triton")


def ratio(ms: dict[str, float]) -> float:
    return ms["triton"] / ms[dispatch.UNKNOWN]


class Asked(dispatch.Table):
    """Takes PyTorch for every case, and keeps what would be run."""

    def __init__(self) -> None:
        super().__init__(None, on_host)
        self.cases: dict[dispatch.Case, dispatch.Candidates] = {}

    def choose(
        self, case: dispatch.Case, candidates: Callable[[], dispatch.Candidates], now: Callable[[], bool]
    ) -> str:
        self.cases.setdefault(case, candidates())
        return dispatch.UNKNOWN


def met(args: argparse.Namespace, device: torch.device) -> dict[dispatch.Case, dispatch.Candidates]:
    """Return what a step asks `dispatch` for, and what that would run."""
    task, asked = variants.make_task(args, device), Asked()
    model = fuse(task.dense)
    dispatch._TABLES[device] = asked
    try:
        variants.train_step(task, model, variants.sgd(model))
    finally:
        del dispatch._TABLES[device]  # whoever asks next has the usual one
    if not asked.cases:
        raise RepruneError(f"{args.model} has nothing to choose for: the kernels cannot run here.")
    return asked.cases


def compare(case: dispatch.Case, candidates: dispatch.Candidates, device: torch.device) -> dict[str, Any]:
    """Return the row of a case."""
    made: dict[str, Callable[[], list[Tensor]]] = {}
    spent: dict[str, list[float]] = {name: [] for name in NAMES}
    clock = clock_of(device)

    def kept() -> dict[str, Callable[[], list[Tensor]]]:
        made.update(candidates())
        return made

    def timed(run: Callable[[], Any]) -> float:
        (name,) = (name for name in made if made[name] is run)
        spent[name].append(clock(run))
        return spent[name][-1]

    line: dict[str, Any] = {"operation": case.operation, "dtype": case.dtype, "form": case.form,
                            "channels": case.channels}  # fmt: skip
    chosen = dispatch.Table(None, timed)._measure(case, kept)
    if not spent["triton"]:
        return line | {"result": "failed", "why": "dispatch could not compare the two; see its warning"}
    try:
        replay = {name: replayed(run, device) for name, run in made.items()}
    except Exception as error:
        return line | {"result": "failed", "why": f"no CUDA graph: {variants.reason(error)}"}
    assert chosen is not None
    faster = min(replay, key=replay.__getitem__)
    loss = replay[chosen] / replay[faster] - 1
    return line | {
        "clock_ms": {name: statistics.median(some) for name, some in spent.items()}, "replay_ms": replay,
        "chosen": chosen, "faster": faster, "loss": loss, "right": loss <= ALIKE, "result": "measured", "why": "",
    }  # fmt: skip


def clock_of(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Return dispatch's own clock."""
    return dispatch.Clock(device) if device.type == "cuda" else on_host


def on_host(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def replayed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one run."""
    if device.type != "cuda":
        return statistics.median(on_host(run) for _ in range(REPLAYS))

    def several() -> None:
        for _ in range(RUNS):
            run()

    capture.warm_up(several)
    return statistics.median(devices.time_each(capture.capture(several), REPLAYS, device)) / RUNS
