"""Run all that needs a GPU, in one go, from a bare checkout: kernels, benchmarks, tests, determinism, sanitizers.

Each part is a process with a time limit of its own. One that fails, hangs or breaks the device does not stop the
others, and what it has measured by then is on disk. The parts come in the order of what they are worth: the machine may
be taken away. With --first they are only those that decide what to build next.

A first run compiles and measures much that later ones find in caches, and every process needs 5 to 8 s until it has
PyTorch and a CUDA context. That is what the limits are for; those that must be had add up to less than nine minutes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from rich.console import Console

from reprune_triton import ops
from reprune_triton.bench import rows, terminal
from reprune_triton.errors import RepruneError

ROOT = Path(__file__).resolve().parents[1]
BENCH = (sys.executable, "-m", "reprune_triton.bench")
WAITING = (*BENCH, "--wait")  # imports what it needs, and begins when a line is written to it
MINUTES, FIRST_MINUTES = 9.0, 1.5
LEAST = 5.0  # seconds with which a part is still begun
GRACE = 10.0  # seconds that a part has to say its last words
MARGIN = 6.0  # seconds between the time a benchmark is told and its limit: for its start and the last turns
HEAD, TAIL = 200_000, 100_000  # characters of a part's output that are kept, of its begin and of its end
NO_TESTS = 5  # pytest's exit code
GOOD = ("measured", "held", "right")  # results of a row
NO_GRAPH = "a CUDA graph needs CUDA"

# (n_out, n_in, kh, kw). The small ones reach every kernel, with one warp and with several.
TINY_SHAPES = ((9, 1, 3, 3), (12, 1, 1, 1))
SMALL = (
    (40, 4, 3, 3), (33, 3, 1, 1), (70, 3, 3, 3), (130, 2, 5, 5), (90, 2, 2, 2), (100, 3, 1, 1), (520, 2, 1, 1),
    (1, 2, 3, 3),
)  # fmt: skip
RESNET18 = (
    (64, 3, 7, 7), *[(64, 64, 3, 3)] * 4, (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1), (256, 128, 3, 3),
    *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1), (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1),
)  # fmt: skip


class Sizes(NamedTuple):
    """The differences between a run and its rehearsal."""

    device: str
    model: str
    step: str  # options of the benchmarks
    sparsity: str
    event: str
    scaling: str
    smoke: str
    dispatch: str
    hours: str
    tests: str  # options of pytest
    bits: str
    patience: float  # by which the limits are multiplied
    environment: tuple[tuple[str, str], ...] = ()
    # What is measured in the time that is left.
    more_sparsities: str = ""
    more_networks: tuple[tuple[str, str], ...] = ()  # and their sparsities
    more_linkages: tuple[str, ...] = ()


REAL = Sizes(
    device="cuda", model="resnet50", step="--batch 256 --warmup 10 --steps 10 --runs 3", sparsity="0.51",
    event="--layers prunable --channels 8 --repeat 3", smoke="--batch 32", dispatch="--batch 256",
    scaling="--d 1 9 --sizes 64 256 1024 --counts 64 1024 4096 --seconds 0.2", hours="", tests="-n 8", bits="full",
    patience=1.0, more_sparsities="0.3 0.75", more_networks=(("mobilenet_v2", "0.65"), ("resnet18", "0.61")),
    more_linkages=tuple(linkage for linkage in ops.LINKAGES if linkage != "ward"),
)  # fmt: skip
TINY = Sizes(
    device="cpu", model="resnet8", step="--batch 4 --size 16 --warmup 1 --steps 2 --runs 1", sparsity="0.5",
    event="--layers prunable --channels 2 --repeat 1 --impl reference",
    smoke="--batch 1 --size 8 --shapes 1 --family norms copies",
    dispatch="--batch 2 --size 8 --shapes 1 --operation norm_act",
    scaling="--d 1 --sizes 8 --problems 1 --size 8 --counts 1 --seconds 0.1 --impl triton",
    hours="--epochs 4 --until 2 --every 1 --images 64 --gpus 1", tests="tests/fused/test_dispatch.py -n 1", bits="tiny",
    patience=8.0, environment=(("TRITON_INTERPRET", "1"),),
)  # fmt: skip


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
    parser.add_argument(
        "--minutes", type=float, help=f"for all parts together (default: {MINUTES:g}, with --first {FIRST_MINUTES:g})"
    )
    parser.add_argument(
        "--first", action="store_true", help="only what decides what to build next, the most important first"
    )
    parser.add_argument("--commit", help="for the rows, where git cannot tell")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter: a rehearsal"
    )
    parser.add_argument("--bits", choices=("tiny", "small", "full"), help="only print hashes of some fixed choices")
    parser.add_argument(
        "--compile", choices=("bench", "all"), help="only compile the kernels, those of benchmarks or of tests too"
    )
    parser.add_argument("--twice", action="store_true", help="with --bits: in two fresh processes, and compare")


def run(args: argparse.Namespace) -> None:
    if args.bits:
        same_bits(args.bits) if args.twice else print_bits(args.bits)
        return
    if args.compile:
        compile_all(args.compile)
        return
    if not args.out:
        raise RepruneError("--out DIR is needed: the log and the rows go there.")
    if not args.tiny and not torch.cuda.is_available():
        raise RepruneError("there is no CUDA device here. --tiny runs a rehearsal on the CPU.")
    out = Path(args.out).resolve()  # the parts run in the root of the checkout
    out.mkdir(parents=True, exist_ok=True)
    sizes, minutes = TINY if args.tiny else REAL, args.minutes or (FIRST_MINUTES if args.first else MINUTES)
    some = (first if args.first else parts)(out, sizes)
    with stopped_by_sigterm():
        results = run_parts(some, out, minutes, args.commit)
    failed = [str(result["part"]) for result in results if result["result"] in ("failed", "interrupted")]
    if failed:
        raise RepruneError(f"{len(failed)} of {len(results)} parts failed: {', '.join(failed)}. See {out / 'log.txt'}.")


def benchmark(out: Path, sizes: Sizes, name: str, words: str, limit: float, needs: float = LEAST) -> Part:
    """Return a part that is a benchmark of this project.

    words: the command and its options; a field of `sizes` stands for each {NAME}, or the folder for {out}.
    """
    filled = words.format_map(sizes._asdict() | {"seconds": "{seconds}", "out": "{out}"})
    command = [word.replace("{out}", str(out)) for word in filled.split()]
    skip = ""
    if sizes.device == "cpu" and any(word.endswith("-graph") for word in command):
        skip = NO_GRAPH
    elif sizes.device == "cpu" and any(word.endswith(("-compile", "-max-autotune")) for word in command):
        skip = "torch.compile on a CPU takes minutes"
    file = ("--json", str(out / f"{command[0]}.jsonl"))
    return Part(name, (*WAITING, *command, *file), limit * sizes.patience, needs, sizes.environment, skip)


SMOKE = "smoke --model {model} --device {device} {smoke}"
# The dense variants, and narrow ones at 0, have their turn beside every other sparsity.
STEP = "step --model {model} --sparsity {sparsity} --device {device} {step} --seconds {seconds} --variants "
EVENT = "event --model {model} --device {device} {event} "
DISPATCH = "dispatch --model {model} --device {device} {dispatch}"
TWO_BY_TWO = STEP + "dense dense-fused narrow narrow-fused"


def first(out: Path, sizes: Sizes) -> list[Part]:
    """Return the parts that answer: Is each kernel right? How long is an event? What does a step gain? Is dispatch
    biased? Does a graph hold an event?"""
    bench = functools.partial(benchmark, out, sizes)
    return [
        compiling(sizes, "bench", 30),
        bench("smoke", SMOKE, 30),
        bench("event", EVENT + "--total", 30),
        bench("step", STEP + "dense narrow narrow-fused", 45, 20),
        bench("graph narrow-fused", STEP + "narrow-fused-graph", 30, 12),
        bench("dispatch", DISPATCH, 20),
        bench("graph event", EVENT + "--graph", 20),
        bench("step compile", STEP + "dense-compile", 60, 20),
    ]


def parts(out: Path, sizes: Sizes) -> list[Part]:
    """Return all parts in order; the limits of those down to "same bits" add up to less than MINUTES."""
    bench = functools.partial(benchmark, out, sizes)

    def of(model: str, *shares: str) -> Sizes:
        return sizes._replace(model=model, sparsity=" ".join(("0", *shares)))

    found = [
        compiling(sizes, "all", 45),  # else all others would spend their time on it
        bench("smoke", SMOKE, 25),
        benchmark(out, of(sizes.model, sizes.sparsity), "step", TWO_BY_TWO, 80, 20),
        bench("event", EVENT, 40),
        bench("graph event", EVENT + "--graph", 15),
        bench("graph narrow-fused", STEP + "dense-graph dense-fused-graph narrow-fused-graph", 40, 20),
        bench("graph narrow", STEP + "dense-graph narrow-graph", 25, 20),
        bench("graph compact", STEP + "dense-graph compact-graph compact-fused-graph", 30, 20),
        bench("step compile", STEP + "dense-compile compact-compile", 85, 20),
        bench("dispatch", DISPATCH, 20),
        bench("scaling", "scaling --device {device} {scaling}", 25),
        bench("hours", "hours --model {model} --from {out}/step.jsonl --events {out}/event.jsonl {hours}", 10),
        testing(sizes, 70),
        Part("same bits", (*BENCH, "gpu", "--bits", sizes.bits, "--twice"), 25 * sizes.patience,
             environment=sizes.environment),
        *[sanitizing(sizes, tool, 60) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")],
    ]  # fmt: skip
    if sizes.more_sparsities:
        more = of(sizes.model, sizes.more_sparsities)
        found.append(benchmark(out, more, "step, other sparsities", TWO_BY_TWO, 120, 60))
    for other, share in sizes.more_networks:
        found.append(benchmark(out, of(other, share), f"step {other}", TWO_BY_TWO, 60, 40))
        found.append(benchmark(out, of(other, share), f"event {other}", EVENT, 40, 20))
    for linkage in sizes.more_linkages:
        found.append(bench(f"event {linkage}", f"{EVENT}--linkage {linkage} --total", 40, 20))
    if sizes.more_networks:
        found += [
            bench("event, all layers", EVENT + "--layers all --channels 4", 100, 40),
            bench(f"step {sizes.model} compact", STEP + "dense compact compact-fused", 60, 40),
            bench(f"step {sizes.model} tuned", STEP + "dense-max-autotune compact-max-autotune", 150, 120),
            bench("scaling, all sizes", "scaling --device {device}", 120),
        ]
    return found


def compiling(sizes: Sizes, what: str, limit: float) -> Part:
    skip = "the interpreter compiles nothing" if sizes.device == "cpu" else ""
    return Part("compile", (*BENCH, "gpu", "--compile", what), limit * sizes.patience, skip=skip)


def testing(sizes: Sizes, limit: float) -> Part:
    # Some modules of tests need packages that such a machine may not have.
    options = "-m gpu -q -rf --durations 15 -p no:cacheprovider -W default --continue-on-collection-errors"
    words = [*options.split(), *sizes.tests.split()]
    if not importlib.util.find_spec("xdist"):
        at = words.index("-n")
        del words[at : at + 2]
    return Part("tests", (sys.executable, "-m", "pytest", *words), limit * sizes.patience)


def sanitizing(sizes: Sizes, tool: str, limit: float) -> Part:
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    found = next((place for place in places if place and Path(place).exists()), None)
    options = f"--tool {tool} --error-exitcode 1 --target-processes application-only"
    skip = "" if found else "compute-sanitizer not found"
    if sizes.device == "cpu":
        skip = "nothing to check in the interpreter"
    command = (found or "", *options.split(), *BENCH, "gpu", "--bits", "small")
    return Part(tool, command, limit * sizes.patience, 30, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),), skip)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: the part that runs keeps what it has measured, and the summary is printed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_parts(some: list[Part], out: Path, minutes: float, commit: str | None = None) -> list[dict[str, Any]]:
    """Run part after part, and say in the end how each went."""
    deadline = time.monotonic() + 60 * minutes
    results: list[dict[str, Any]] = []
    interrupted, ahead = False, dict[str, Process]()  # the benchmark whose turn is next, by its part
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for number, part in enumerate(some):
            left = deadline - time.monotonic()
            process = ahead.pop(part.name, None)
            started, before, last = time.monotonic(), count_rows(out), ""
            if part.skip:
                result, why = "skipped", part.skip
            elif interrupted:
                result, why = "skipped", "interrupted"
            elif left < part.needs:
                result, why = "skipped", "no time left"
            else:
                try:
                    say(log, f"\n==== {part.name}: {' '.join(part.command)}\n")
                    limit = min(part.limit, left)
                    process = process or Process(part, limit)
                    for following in [other for other in some[number + 1 :] if not other.skip][:1]:
                        if following.command[: len(WAITING)] == WAITING:
                            ahead[following.name] = Process(following, min(following.limit, left))
                    result, why, last = execute(part, process, limit, log)
                except OSError as error:
                    result, why = "failed", str(error)
                except KeyboardInterrupt:
                    result, why, interrupted = "interrupted", "", True
            if process is not None:
                process.close()
            seconds = time.monotonic() - started
            for half in out.glob("*.jsonl.*"):  # of one that was killed as it wrote a draft
                half.unlink()
            if commit:
                fill_in_commit(out, commit)
            found = [row for file in row_files(out) for row in known_rows(file)[before.get(file, 0) :]]
            bad = sum(row.get("result", GOOD[0]) not in GOOD for row in found)
            notes = [why, f"{bad} of {len(found)} rows without a result" if bad else ""]
            if "pytest" in part.command:
                notes.append(last)
            why = ", ".join(filter(None, notes))
            say(log, f"==== {part.name}: {result}{why and f', {why}'} ({seconds:.1f} s, {len(found)} rows)\n")
            results.append({"part": part.name, "result": result, "why": why, "seconds": round(seconds, 1),
                            "limit": part.limit, "rows": len(found)})  # fmt: skip
            rows.append(out / "parts.jsonl", results[-1])
        for process in ahead.values():
            process.close()
        table = terminal.table("Summary", ("part", "seconds", "rows", "verdict"), ("part", "verdict"))
        for row in results:
            verdict = f"{row['result']}{row['why'] and ': '}{row['why']}"
            table.add_row(row["part"], f"{row['seconds']:.1f}", str(row["rows"] or ""), verdict)
        for file in (None, log):
            Console(file=file, width=110).print(table)
    return results


def row_files(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("*.jsonl") if path.name != "parts.jsonl")


def count_rows(out: Path) -> dict[Path, int]:
    return {path: len(known_rows(path)) for path in row_files(out)}


def known_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, but for a last one that was cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Process:
    """A part that has been started. If it is one of WAITING it does nothing that takes the device before `finish`."""

    def __init__(self, part: Part, limit: float):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(part.environment)
        self._popen = subprocess.Popen(
            [word.replace("{seconds}", f"{max(1.0, limit - MARGIN):.0f}") for word in part.command],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0,
        )  # fmt: skip
        self._ended = False

    def finish(self, limit: float, log: IO[str]) -> tuple[int | None, str]:
        """Let it begin and show its output; return its exit code, None if it took longer, and its last line."""
        process, said = self._popen, collections.deque[str](maxlen=1)
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError), process.stdin as begin:
            begin.write("\n")
        reader = threading.Thread(target=show, args=(process.stdout, log, said))
        reader.start()
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            self._stop()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            self.kill()
            reader.join()
        return code, said[0].strip(" =\n") if said else ""

    def _stop(self) -> None:
        """Let it say its last words: pytest what has failed so far, a benchmark nothing."""
        os.killpg(self._popen.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(GRACE)

    def kill(self) -> None:
        """End it, and all that it has started itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._ended = True

    def close(self) -> None:
        """End it, whether it has begun or not."""
        if not self._ended:
            self.kill()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def execute(part: Part, process: Process, limit: float, log: IO[str]) -> tuple[str, str, str]:
    """Return passed, failed or skipped; why; and the last line that the part has said."""
    code, last = process.finish(limit, log)
    if code is None:
        return "failed", f"out of time after {limit:.0f} s", last
    if code == NO_TESTS and "pytest" in part.command:
        return "skipped", "no tests", ""
    return ("passed", "", last) if code == 0 else ("failed", f"exit code {code}", last)


def show(output: IO[str], log: IO[str], said: collections.deque[str]) -> None:
    """Print and keep the begin of the output, and its end: the log must stay small. said: the last line."""
    room, late, late_size, lost = HEAD, collections.deque[str](), 0, 0
    with output:
        for line in output:
            if line.strip():
                said.append(line)
            if room > 0:
                say(log, line[:room])
                room -= len(line)
                continue
            late.append(line[-TAIL:])
            late_size += len(late[-1])
            while late_size > TAIL:
                late_size -= len(late.popleft())
                lost += 1
    if lost:
        say(log, f"[{lost} lines left out]\n")
    for line in late:
        say(log, line)


def say(log: IO[str], text: str) -> None:
    print(text, end="", flush=True)
    log.write(text)
    log.flush()


def fill_in_commit(out: Path, commit: str) -> None:
    """Add the commit to rows that lack it, as those of a machine without the repository do."""
    for path in row_files(out):
        found = known_rows(path)
        if any(not row["commit"] for row in found):
            path.unlink()
            rows.Draft(path).write([row if row["commit"] else row | {"commit": commit} for row in found])


def compile_all(what: str) -> None:
    """Compile into Triton's cache, where the launches of every later process find it, on all cores.

    What the benchmarks launch comes first, so that a run that is cut short has lost the least.
    """
    count, done, failed = len(jobs(what)), 0, list[str]()
    pool = concurrent.futures.ProcessPoolExecutor(
        min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn"), signal.signal,
        (signal.SIGINT, signal.SIG_IGN),  # what is being compiled is finished
    )  # fmt: skip
    try:
        for future in concurrent.futures.as_completed([pool.submit(compile_one, what, n) for n in range(count)]):
            error = future.exception()
            done += error is None
            failed += [] if error is None else [f"{type(error).__name__}: {error}"[:1000]]
    finally:
        pool.shutdown(cancel_futures=True)
        print(f"{done} of {count} kernels compiled.", flush=True)
    if failed:
        raise RepruneError("\n".join(dict.fromkeys(failed)))


@functools.cache
def jobs(what: str) -> list[tuple[Any, ...]]:
    """Return arguments of `compiled.warm`.

    For the benchmarks: bfloat16 and channels in multiples of 16, as networks have them, but for the images'. For the
    tests: also other types and any number of channels.
    """
    from reprune_triton.kernels.clustering import launch
    from reprune_triton.kernels.step import masked_conv, norm_act, pack

    bf16, odd = torch.bfloat16, 17
    found: list[tuple[Any, ...]] = [(config,) for config in launch.configurations()]  # some of them take longest
    found += [(config, bf16, 16, 16) for config in masked_conv.configurations(bf16)]
    found += [(config, bf16, 16, 16) for config in norm_act.configurations()]
    found += [(pack.configuration(to_buffer, wide),) for wide in (False, True) for to_buffer in (True, False)]
    found += [(config, bf16, odd, 16) for config in masked_conv.configurations(bf16) if _reads_images(config)]
    if what == "all":
        for dtype in (bf16, torch.float32, torch.float64):
            some = [*norm_act.configurations(dtype == torch.float64), *masked_conv.configurations(dtype)]
            found += [(config, dtype, odd, odd) for config in some]
    return found


def _reads_images(config: Any) -> bool:
    """Whether this kernel of masked_conv can be launched for the first convolution of a network."""
    constants = dict(config.constants)
    return not (constants["NORM"] or constants["POINTWISE"] or config.kernel.__name__ == "input_gradient_kernel")


def compile_one(what: str, number: int) -> None:
    from reprune_triton.kernels import compiled

    compiled.warm(*jobs(what)[number])


def print_bits(size: str) -> None:
    """Print a hash of parents, heights, labels and kept filters for a fixed set of clusterings."""
    device = "cuda" if torch.cuda.is_available() and size != "tiny" else "cpu"
    ward = [("ward", algorithm) for algorithm in ops.ALGORITHMS]
    others = [(linkage, "auto") for linkage in ops.LINKAGES if linkage != "ward"]
    sets: dict[str, list[tuple[Sequence[tuple[int, ...]], list[tuple[str, str]]]]] = {}
    sets |= {"tiny": [(TINY_SHAPES, ward[:1] + others[:1])], "small": [(SMALL, ward + others)]}
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
