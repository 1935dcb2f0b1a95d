"""Choose between our kernels and PyTorch by measurement, once for every shape, and keep the choices on disk.

A shape is measured when a GPU first sees it: both implementations, forward and backward, on made-up numbers. The name
of the file has the device, the versions and a hash of our sources in it, so a run that is resumed goes on with the same
implementations, and with the same bits. Kernels of ours that give other results than PyTorch are never chosen, however
fast. A shape that cannot be measured, mostly because memory is short, is left to PyTorch and not written; it is tried
again after the next `share`, `TRIES` times in all. float64, which serves to check results, is always PyTorch's.

Under torch.distributed no process measures by itself, as another may not see that shape. For a shape that has not been
measured the choice for the most similar one that has been is taken. `share`, which `REPrune.step` calls in all
processes, measures in the first process the shapes that are new there, and gives its table to all processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from reprune_triton import availability
from reprune_triton.selection import ranks

WARM_UP, REPEATS = 3, 10
TRIES = 3  # to measure a case, in one process
# How far a number of ours may be from PyTorch's: this share of its size plus of the root mean square of its channel.
# Rounding in types of 16 bits and in TF32 makes a tenth of that; a wrong number is off by about the root mean square.
TOLERANCE = 0.05
LONGEST = 1 << 27  # cycles, less than a tenth of a second
PIECE = 1 << 22  # numbers that are compared at once
UNKNOWN = "torch"  # the choice where nothing is known

# Returns for each implementation a function that runs it, forward and backward, and returns all its results.
Candidates = Callable[[], Mapping[str, Callable[[], list[Tensor]]]]


class Case(NamedTuple):
    """All that a choice depends on."""

    operation: str
    dtype: str
    form: tuple[int, ...]  # batch, height, width and options
    channels: tuple[int, ...]
    settings: tuple[int, ...]  # see `settings`

    def distance(self, other: Case) -> float:
        """Return how far apart the channels are, in logarithms; infinity if anything else differs."""
        if len(self.channels) != len(other.channels) or self._replace(channels=()) != other._replace(channels=()):
            return math.inf
        return sum(abs(math.log(a / b)) for a, b in zip(self.channels, other.channels, strict=True))


class Table:
    """The choices for one kind of device.

    Args:
        path: the file that keeps them; None: they are kept in memory only.
        clock: returns the milliseconds of one run of a candidate.
    """

    def __init__(self, path: Path | None, clock: Callable[[Callable[[], Any]], float]):
        self.path, self._clock = path, clock
        self.choices: dict[Case, str] = {} if path is None else _read(path)
        self.known: dict[Any, str] = {}  # some of them, by keys that are quicker to make than cases
        self._assumed: dict[Case, str] = {}  # for cases that are not measured, until `share`
        self._wanted: dict[Case, Candidates] = {}  # those of them that `share` is to measure
        self._failures: Counter[Case] = Counter()

    def choose(self, case: Case, candidates: Callable[[], Candidates], now: Callable[[], bool]) -> str:
        """Return the implementation for this case.

        Args:
            candidates: returns what is run, if the case has to be measured.
            now: whether that may be done now; if not, the choice is that of the nearest case that is known.
        """
        found = self.choices.get(case)
        if found is not None:
            return found
        found = self._assumed.get(case)
        if found is not None and case not in self._wanted:
            return found
        if now():
            self._wanted.pop(case, None)
            self._learn(case, candidates())
        elif found is None:
            self._wanted[case] = candidates()
            distance, nearest = min(
                ((case.distance(known), name) for known, name in self.choices.items()), default=(math.inf, UNKNOWN)
            )
            self._assumed[case] = nearest if distance < math.inf else UNKNOWN
        return self.choices.get(case) or self._assumed[case]

    def share(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Measure in the first process of the group what is wanted there, and give its table to all processes.

        All processes call it. Cases that could not be measured may be tried again from then on; without a group nothing
        else happens.

        Args:
            device: that of this process's model.
        """
        if group is None:
            self._assumed = {case: UNKNOWN for case, count in self._failures.items() if count == TRIES}
            return
        if dist.get_rank(group) == 0:
            for case, candidates in list(self._wanted.items()):
                self._learn(case, candidates)
            self._wanted = {case: self._wanted[case] for case, count in self._failures.items() if count < TRIES}
        else:
            self._wanted = {}
        given = self.choices, dict.fromkeys(self._failures, UNKNOWN)
        self.choices, self._assumed = ranks.broadcast(given, group, device)
        self.known = {}

    def _learn(self, case: Case, candidates: Candidates) -> None:
        """Measure a case, and keep the choice."""
        found = self._measure(case, candidates)
        if found is None:
            self._failures[case] += 1
            self._assumed[case] = UNKNOWN
            return
        self._failures.pop(case, None)
        self.choices[case] = found
        if self.path is not None:
            _write(self.path, _read(self.path) | {case: found})

    @torch.enable_grad()
    def _measure(self, case: Case, candidates: Candidates) -> str | None:
        """Return the faster implementation; None if it cannot be measured."""
        try:
            runs = candidates()
            results = {name: run() for name, run in runs.items()}
            wrong = [name for name in runs if not agree(results[name], results[UNKNOWN])]
            del results
            if wrong:
                warnings.warn(
                    f"{wrong[0]} and PyTorch disagree for {case.operation} {case.dtype} {case.form} of {case.channels} "
                    "channels, and PyTorch is taken. This is a defect of reprune_triton: please report it.",
                    stacklevel=2,
                )
                return UNKNOWN
            for run in runs.values():
                for _ in range(WARM_UP):
                    run()
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(REPEATS):
                for name, run in runs.items():  # in turn, so that a slower device slows all of them
                    times[name].append(self._clock(run))
            return min(times, key=lambda name: statistics.median(times[name]))
        except Exception as error:  # mostly out of memory; none must end a training
            warnings.warn(f"{case} could not be measured, and PyTorch is taken: {error!r}", stacklevel=2)
            return None


def agree(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether every number is as near to PyTorch's as TOLERANCE asks; computed in pieces, to save memory."""
    return all(_near(a.detach(), b.detach()) for a, b in zip(mine, theirs, strict=True))


def _near(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False
    others = [dim for dim in range(theirs.dim()) if dim != 1]  # a vector is one channel
    zero = torch.zeros((), device=theirs.device)
    squares = sum((_wide(b).square().sum(others, keepdim=True) for (b,) in _pieces(theirs)), zero)
    typical = (squares * (squares.numel() / theirs.numel())).sqrt()
    beyond = [
        ((_wide(a) - _wide(b)).abs_() - TOLERANCE * (_wide(b).abs() + typical)).max() for a, b in _pieces(mine, theirs)
    ]
    return bool(torch.stack(beyond).max() <= 0)  # False for NaN


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same parts of all tensors, each with all channels and at most PIECE numbers."""
    shape = tensors[0].shape
    dim = max((dim for dim in range(len(shape)) if dim != 1), key=shape.__getitem__)
    if tensors[0].numel() <= PIECE or shape[dim] == 1:
        yield tensors
        return
    for part in zip(*(tensor.chunk(2, dim) for tensor in tensors), strict=True):
        yield from _pieces(*part)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------- on disk


def _read(path: Path) -> dict[Case, str]:
    """Return the choices in a file; none if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {Case(op, dtype, *map(tuple, numbers)): name for op, dtype, *numbers, name in found}
    except (OSError, ValueError, TypeError):
        return {}


def _write(path: Path, choices: Mapping[Case, str]) -> None:
    """Write the choices to a file, atomically. Where that fails they last as long as the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump([[*case, name] for case, name in choices.items()], file)
        os.replace(file.name, path)
    except OSError:
        pass


# ---------------------------------------------------------------------- the tables of the devices here

_TABLES: dict[torch.device, Table | None] = {}


def table(device: torch.device) -> Table | None:
    """Return the table of this device; None where there is nothing to choose, which is everywhere but on CUDA."""
    try:
        return _TABLES[device]
    except KeyError:
        found = None
        if device.type == "cuda":  # also without Triton, where nothing is measured: `share` needs all processes
            without = availability.why_not(device) is not None
            found = Table(None if without else _path(torch.cuda.get_device_name(device)), Clock(device))
        _TABLES[device] = found
        return found


def share(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Do `Table.share` where there is a table.

    Args:
        device: that of this process's model.
    """
    found = table(device)
    if found is not None:
        found.share(group, device)


def recall(device: torch.device, key: Any) -> str | None:
    """Return what `choose` has returned for this key; None if it has to be asked."""
    found = table(device)
    return None if found is None else found.known.get(key)


def choose(x: Tensor, case: Case, candidates: Callable[[], Candidates], key: Any) -> str:
    """Return the implementation for an operation on x, on any device; see `Table.choose`.

    Args:
        key: one by which `recall` will find the same choice.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype == torch.float64:
        return UNKNOWN
    found = table(x.device)
    if found is None:
        return UNKNOWN
    choice = found.choose(case, candidates, _now)
    if case in found.choices:
        found.known[key] = choice
    return choice


def settings(dtype: torch.dtype) -> tuple[int, ...]:
    """Return the settings that decide which code PyTorch runs for this type, or how exact ours has to be."""
    conv = matmul = 0
    if dtype == torch.float32:
        precision = torch._C._get_fp32_precision_getter
        conv, matmul = int(precision("cuda", "conv") == "tf32"), int(precision("cuda", "matmul") == "tf32")
    deterministic = torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()
    # The limit is None where PyTorch is built without CUDA.
    benchmark = torch.backends.cudnn.benchmark_limit or 0 if torch._C._get_cudnn_benchmark() else -1
    return conv, matmul, int(torch._C._get_cudnn_enabled()), int(deterministic), benchmark


def state() -> tuple[Any, ...]:
    """Return the state of PyTorch that a choice depends on, for keys: it is quicker to get than `settings`."""
    precision, benchmark = torch._C._get_fp32_precision_getter, torch._C._get_cudnn_benchmark()
    return (
        precision("cuda", "conv"), precision("cuda", "matmul"), torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_deterministic(), torch._C._get_deterministic_algorithms(), torch.is_grad_enabled(),
        benchmark and torch.backends.cudnn.benchmark_limit,
    )  # fmt: skip


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _now() -> bool:
    """Whether a case may be measured now: there is one process, and no CUDA graph is captured."""
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return alone and not torch.cuda.is_current_stream_capturing()


def numbers(x: Tensor) -> Callable[..., Tensor]:
    """Return a function that makes up numbers, on x's device and in its type, without the global generator.

    Their size is between 1 and 2 times `scale`, and their sign is random. So when they are normalised they stay away
    from zero, where the last bit decides whether an activation has a gradient.
    """
    generator = torch.Generator(x.device).manual_seed(0)

    def draw(
        *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, grad: bool = False, last: bool = True
    ) -> Tensor:
        format = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        found = torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=format)
        found.uniform_(-1, 1, generator=generator)
        found.add_(torch.copysign(found.new_ones(()), found)).mul_(scale)
        return found.requires_grad_(grad)

    return draw


def with_gradients(ys: Sequence[Tensor], inputs: list[Tensor], backs: list[Tensor], grad: bool) -> list[Tensor]:
    """Return the first of the ys and, if `grad`, the gradients of the inputs when those of the ys are `backs`."""
    return [ys[0].detach(), *(torch.autograd.grad(ys, inputs, backs) if grad else ())]


def _path(device: str) -> Path:
    """Return the file for a device of this name, these versions and these sources."""
    import triton

    from reprune_triton.kernels import configuration

    kernels, here = Path(configuration.__file__), Path(__file__).parent
    files = [kernels, *sorted((kernels.parent / "step").glob("*.py")), *sorted(here.glob("*.py"))]
    sources = b"".join(file.read_bytes() for file in files)
    versions = [hashlib.sha256(sources).hexdigest()[:12], f"torch{torch.__version__}", f"triton{triton.__version__}"]
    versions.append(f"hip{torch.version.hip}" if torch.version.hip else f"cuda{torch.version.cuda}")
    name = "-".join([device, *versions, f"cudnn{torch.backends.cudnn.version()}"])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "reprune_triton" / (re.sub(r"[^\w.+-]", "_", name) + ".json")


class Clock:
    """Milliseconds of one run on a device, by its own clock, without the time of the host.

    A device that has nothing to do waits for each operation that the host launches, and then the time between two
    events is Python's. So it spins for some cycles first, until the host has launched everything. If it has begun the
    run before that, it spins twice as long from then on, and the run is timed again. A run that itself waits for the
    device cannot be launched ahead; after the longest spin its time, with that of the host, is taken as it is.
    """

    def __init__(self, device: torch.device):
        self._device, self._cycles = device, 1 << 20  # about half a millisecond

    def __call__(self, run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            while True:
                torch.cuda._sleep(self._cycles)
                begin.record()
                run()
                end.record()
                late = begin.query()
                end.synchronize()
                if not late or self._cycles >= LONGEST:
                    return begin.elapsed_time(end)
                self._cycles *= 2
