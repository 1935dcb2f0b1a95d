"""Everything that needs a GPU, in one go, from a bare checkout: tests, determinism, sanitizers, benchmarks.

Each part is a process with a time limit of its own. One that fails or runs out of time does not stop the others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from reprune_triton import ops
from reprune_triton.bench import rows
from reprune_triton.errors import RepruneError

ROOT = Path(__file__).resolve().parents[1]
BENCH = (sys.executable, "-m", "reprune_triton.bench")
LEAST = 5.0  # seconds with which a part is still begun
GRACE = 10.0  # seconds that a part has to say its last words
MARGIN = 30.0  # seconds between the time a benchmark is told and its limit: for its start and the last variant
NO_TESTS = 5  # pytest's exit code
ResultRow = dict[str, str | float]

# (n_out, n_in, kh, kw). The small ones reach every kernel, with one warp and with several.
TINY = ((9, 1, 3, 3), (12, 1, 1, 1))
SMALL = (
    (40, 4, 3, 3), (33, 3, 1, 1), (70, 3, 3, 3), (130, 2, 5, 5), (90, 2, 2, 2), (100, 3, 1, 1), (520, 2, 1, 1),
    (1, 2, 3, 3),
)  # fmt: skip
RESNET18 = (
    (64, 3, 7, 7), *[(64, 64, 3, 3)] * 4, (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1), (256, 128, 3, 3),
    *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1), (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1),
)  # fmt: skip


FINAL = "dense dense-graph compact compact-graph compact-fused-graph dense-compile compact-compile"


class Part(NamedTuple):
    """One process."""

    name: str
    command: tuple[str, ...]  # "{seconds}" stands for the time that it has
    limit: float  # seconds
    needs: float = LEAST  # seconds with which it is still worth while
    environment: tuple[tuple[str, str], ...] = ()
    skip: str = ""  # why it cannot run here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="log.txt, parts.jsonl and the rows of the benchmarks go here")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--commit", help="for the rows, where git cannot tell")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter: a rehearsal"
    )
    parser.add_argument("--bits", choices=("tiny", "small", "full"), help="only print hashes of some fixed choices")
    parser.add_argument("--compile", action="store_true", help="only compile the kernels of training")
    parser.add_argument("--twice", action="store_true", help="with --bits: in two fresh processes, and compare")


def run(args: argparse.Namespace) -> None:
    if args.bits:
        same_bits(args.bits) if args.twice else print_bits(args.bits)
        return
    if args.compile:
        compile_all()
        return
    if not args.out:
        raise RepruneError("--out DIR is needed: the log and the rows go there.")
    if not args.tiny and not torch.cuda.is_available():
        raise RepruneError("there is no CUDA device here. --tiny runs a rehearsal on the CPU.")
    out = Path(args.out).resolve()  # the parts run in the root of the checkout
    out.mkdir(parents=True, exist_ok=True)
    results = run_parts(tiny_parts(out) if args.tiny else parts(out), out, args.minutes)
    if args.commit:
        fill_in_commit(out, args.commit)
    failed = [str(result["part"]) for result in results if result["result"] == "failed"]
    if failed:
        raise RepruneError(f"{len(failed)} of {len(results)} parts failed: {', '.join(failed)}. See {out / 'log.txt'}.")


def parts(out: Path) -> list[Part]:
    # Some modules of tests need packages that such a machine may not have.
    options = "-m gpu -q -rf --durations 15 -p no:cacheprovider -W default --continue-on-collection-errors"
    found = [
        Part("compile", (*BENCH, "gpu", "--compile"), 90),  # else tests and steps would spend their time on it
        Part("tests", (sys.executable, "-m", "pytest", *options.split()), 240),
        Part("same bits", (*BENCH, "gpu", "--bits", "full", "--twice"), 90),
    ]

    def step(model: str, name: str, variants: str, sparsity: str, seconds: int, needs: float = 50) -> Part:
        """The dense variants, and narrow ones at 0, have their turn beside every other sparsity."""
        options = "--device cuda --batch 256 --warmup 10 --steps 10 --runs 3 --seconds {seconds} --variants " + variants
        command = (*BENCH, "step", *f"--model {model} --sparsity {sparsity} {options}".split())
        return Part(f"step {model}{name}", (*command, "--json", str(out / "step.jsonl")), seconds + MARGIN, needs)

    two_by_two = "dense dense-fused narrow narrow-fused"
    found.append(step("resnet50", "", two_by_two, "0 0.51 0.3 0.75", 85))
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    sanitizer = next((place for place in places if place and Path(place).exists()), None)
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        options = f"--tool {tool} --error-exitcode 1 --target-processes application-only"
        command = (sanitizer or "", *options.split(), *BENCH, "gpu", "--bits", "small")
        skip = "" if sanitizer else "compute-sanitizer not found"
        found.append(Part(tool, command, 60, environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),), skip=skip))

    def event(model: str, layers: str, *options: str, limit: float = 60, needs: float = LEAST, skip: str = "") -> Part:
        command = (*BENCH, *f"event --model {model} --layers {layers} --device cuda --repeat 10".split(), *options)
        name = " ".join(("event", model, layers, *(option.removeprefix("--") for option in options)))
        return Part(name, (*command, "--json", str(out / "event.jsonl")), limit, needs, skip=skip)

    found += [
        # Every repeat analyses the model anew, which is not timed.
        event("resnet50", "prunable", "--channels", "8", "--repeat", "5", limit=90, skip=without_torch_pruning()),
        event("resnet50", "resnet", "--channels", "8", limit=90),
        step("resnet50", " final", FINAL, "0.51", 80),
        hours(out, "resnet50"),
        step("mobilenet_v2", "", f"{two_by_two} compact-graph", "0 0.65", 25),
        step("resnet18", "", f"{two_by_two} compact-graph", "0 0.61", 20),
        event("resnet18", "resnet", "--channels", "8"),
        event("resnet56", "resnet"),
        event("resnet50", "all", "--channels", "4", limit=100),
        Part("scaling", (*BENCH, "scaling", "--device", "cuda", "--json", str(out / "scaling.jsonl")), 120),
    ]
    found += [event("resnet56", "resnet", "--linkage", linkage) for linkage in ops.LINKAGES if linkage != "ward"]
    found.append(step("resnet50", " tuned", "dense dense-max-autotune compact-max-autotune", "0.51", 150, needs=120))
    found.append(event("resnet50", "resnet", limit=200, needs=100))  # every channel of SciPy's
    return found


def hours(out: Path, model: str, *options: str) -> Part:
    """Of the steps and events that were measured before."""
    command = (*BENCH, "hours", "--model", model, "--from", str(out / "step.jsonl"), *options)
    where = ("--events", str(out / "event.jsonl"), "--json", str(out / "hours.jsonl"))
    return Part("hours", (*command, *where), 30)


def tiny_parts(out: Path) -> list[Part]:
    interpreted, event_rows, scaling_rows = ("--impl", "triton"), str(out / "event.jsonl"), str(out / "scaling.jsonl")
    event = (*BENCH, *"event --model resnet8 --layers resnet --inputs 1 --repeat 1".split(), *interpreted)
    sizes = "--sizes 8 16 --problems 1 --size 8 --counts 1 2 --d 1 --seconds 0.2".split()
    found = [
        Part("tests", (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", "tests/test_train.py"), 60),
        Part("same bits", (*BENCH, "gpu", "--bits", "tiny", "--twice"), 60),
        Part("memcheck", (), 60, skip="nothing to check in the interpreter"),
        Part("event resnet8", (*event, "--algorithm", "reciprocal", "--json", event_rows), 60),
        Part("scaling", (*BENCH, "scaling", *sizes, *interpreted, "--json", scaling_rows), 60),
        Part("event resnet8 average", (*event, "--linkage", "average", "--json", event_rows), 60),
        # A pruner takes all inputs, which are too many for the interpreter.
        Part(
            "event resnet8 prunable",
            (*BENCH, *"event --model resnet8 --repeat 1 --impl reference --json".split(), event_rows),
            60, skip=without_torch_pruning(),
        ),
        Part(
            "step resnet8",
            (*BENCH, *"step --model resnet8 --device cpu --batch 4 --size 16 --sparsity 0.5".split(),
             *"--warmup 1 --steps 2 --runs 1 --json".split(), str(out / "step.jsonl")), 60,
        ),
        hours(out, "resnet8", *"--epochs 4 --until 2 --every 1 --images 64 --gpus 1".split()),
    ]  # fmt: skip
    return [part._replace(environment=(("TRITON_INTERPRET", "1"),)) for part in found]


def without_torch_pruning() -> str:
    """Why no pruner can be run here."""
    return "" if importlib.util.find_spec("torch_pruning") else "torch-pruning is not installed"


def run_parts(some: list[Part], out: Path, minutes: float) -> list[ResultRow]:
    """Run part after part, and say in the end how each went."""
    deadline = time.monotonic() + 60 * minutes
    results: list[ResultRow] = []
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for part in some:
            left = deadline - time.monotonic()
            started = time.monotonic()
            if part.skip:
                result, why = "skipped", part.skip
            elif left < part.needs:
                result, why = "skipped", "no time left"
            else:
                say(log, f"\n==== {part.name}: {' '.join(part.command)}\n")
                result, why = execute(part, min(part.limit, left), log)
            seconds = time.monotonic() - started
            say(log, f"==== {part.name}: {result}{why and f', {why}'} ({seconds:.1f} s)\n")
            results.append({"part": part.name, "result": result, "why": why, "seconds": round(seconds, 1)})
            rows.append(out / "parts.jsonl", results[-1])
        table = Table(title="Parts")
        for column in ("part", "result", "why", "seconds"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for row in results:
            table.add_row(*(str(row[key]) for key in ("part", "result", "why", "seconds")))
        for file in (None, log):
            Console(file=file, width=110).print(table)
    return results


def execute(part: Part, limit: float, log: IO[str]) -> tuple[str, str]:
    """passed, failed or skipped, and why."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(part.environment)
    try:
        process = subprocess.Popen(
            [word.replace("{seconds}", f"{max(1.0, limit - MARGIN):.0f}") for word in part.command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0,
        )  # fmt: skip
    except OSError as error:
        return "failed", str(error)
    assert process.stdout
    reader = threading.Thread(target=show, args=(process.stdout, log))
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:  # also what it has started itself, and left behind
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        reader.join()
    if code is None:
        return "failed", f"out of time after {limit:.0f} s"
    if code == NO_TESTS and "pytest" in part.command:
        return "skipped", "no tests"
    return ("passed", "") if code == 0 else ("failed", f"exit code {code}")


def show(output: IO[str], log: IO[str]) -> None:
    with output:
        for line in output:
            say(log, line)


def say(log: IO[str], text: str) -> None:
    print(text, end="", flush=True)
    log.write(text)
    log.flush()


def fill_in_commit(out: Path, commit: str) -> None:
    """On a machine without the repository the rows do not know it."""
    for path in (out / f"{name}.jsonl" for name in ("event", "scaling", "step", "hours")):
        if path.exists():
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            path.unlink()
            for row in found:
                rows.append(path, row if row["commit"] else row | {"commit": commit})


def compile_all() -> None:
    """Into Triton's cache, where the launches of every later process find it; by all cores together."""
    workers = min(16, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        print(f"{sum(pool.map(compile_each, [workers] * workers, range(workers)))} kernels compiled.")


def compile_each(step: int, first: int) -> int:
    """Every `step`th kernel of training from the `first` on; how many they are.

    In bfloat16 for channels in multiples of 16, as networks have them, and for any number of channels as tests do.
    """
    from reprune_triton.kernels import compiled, masked_conv, norm_act

    jobs = []
    for dtype, channels in ((torch.bfloat16, 16), (torch.bfloat16, 17), (torch.float32, 17), (torch.float64, 17)):
        some = [*norm_act.configurations(dtype == torch.float64), *masked_conv.configurations(dtype)]
        jobs += [(config, dtype, channels) for config in some]
    for job in jobs[first::step]:
        compiled.warm(*job)
    return len(jobs[first::step])


def print_bits(size: str) -> None:
    """A hash of parents, heights, labels and kept filters for a fixed set of clusterings."""
    device = "cuda" if torch.cuda.is_available() and size != "tiny" else "cpu"
    ward = [("ward", algorithm) for algorithm in ops.ALGORITHMS]
    others = [(linkage, "auto") for linkage in ops.LINKAGES if linkage != "ward"]
    sets: dict[str, list[tuple[Sequence[tuple[int, ...]], list[tuple[str, str]]]]] = {}
    sets |= {"tiny": [(TINY, ward[:1] + others[:1])], "small": [(SMALL, ward + others)]}
    sets["full"] = [*sets["small"], (RESNET18, ward)]
    for shapes, cases in sets[size]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        layers = [ops.Layer(weight, name=str(tuple(weight.shape))) for weight in weights]
        keeps = [(len(weight) + 1) // 2 for weight in weights]
        for linkage, algorithm in cases:
            digest = hashlib.sha256()
            found = ops.cluster_network(layers, keeps, linkage, "triton", algorithm)
            for seed, ((merges, clusters), keep) in enumerate(zip(found, keeps, strict=True)):
                kept = ops.cover(clusters.labels, keep, seed=seed, impl="triton").order
                for tensor in (merges.parent, merges.height, clusters.labels, kept):
                    digest.update(tensor.cpu().numpy().tobytes())
            print(f"{len(layers)} layers, {linkage}, {algorithm}: {digest.hexdigest()}", flush=True)


def same_bits(size: str) -> None:
    found = []
    for _ in range(2):
        done = subprocess.run([*BENCH, "gpu", "--bits", size], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RepruneError("the clustering failed; see above.")
        found.append(done.stdout.splitlines())
    print("\n".join(found[0]))
    differ = [f"{a} and {b}" for a, b in zip(*found, strict=True) if a != b]
    if differ:
        raise RepruneError(f"two runs gave other bits: {'; '.join(differ)}")
    print(f"{len(found[0])} clusterings of two processes: the same bits.")
