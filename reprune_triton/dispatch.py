"""Ours or PyTorch's, whichever is faster: measured once for every shape, and kept on disk.

A shape is measured when a GPU first sees it: both implementations, forward and backward, on made-up numbers, a few
milliseconds in all. The file goes by device, versions and our kernels' source, so a run that is resumed goes on with
the same implementations, and with the same bits. An implementation of ours that gives other results than PyTorch's is
never chosen, however fast.

Under torch.distributed no process measures by itself, since others might not see that shape: one that is not known
goes the way of the nearest that is. `share`, which `REPrune.step` calls in all processes, measures in the first process
what it has met since the last time, and gives all of them its table.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

WARM_UP, REPEATS = 3, 10
TOLERANCE = 0.05  # between the results, relative in the L2 norm; 16 bits round to far less
UNKNOWN = "torch"

# Makes one run, forward and backward, of every implementation; a run returns all its results.
Candidates = Callable[[], Mapping[str, Callable[[], list[Tensor]]]]


class Case(NamedTuple):
    """What a choice depends on."""

    operation: str
    dtype: str
    form: tuple[int, ...]  # batch, height, width and options
    channels: tuple[int, ...]

    def distance(self, other: Case) -> float:
        """How far apart the channels are, in logarithms; infinite if anything else differs."""
        if self[:3] != other[:3] or len(self.channels) != len(other.channels):
            return math.inf
        return sum(abs(math.log(a / b)) for a, b in zip(self.channels, other.channels, strict=True))


class Table:
    """The choices for one kind of device.

    Args:
        path: the file that keeps them; None: memory alone.
        clock: milliseconds of one run of a candidate.
    """

    def __init__(self, path: Path | None, clock: Callable[[Callable[[], Any]], float]):
        self.path, self._clock = path, clock
        self.choices: dict[Case, str] = {} if path is None else _read(path)
        self._wanted: dict[Case, Candidates] = {}

    def choose(self, case: Case, candidates: Callable[[], Candidates], now: Callable[[], bool]) -> str:
        """The implementation for this case.

        candidates: asked for what is run, if it has to be measured.
        now: whether that may be done here and now; else the nearest case that is known decides.
        """
        if case not in self.choices:
            if not now():
                self._wanted[case] = candidates()
                nearest = min(self.choices, key=case.distance, default=case)
                return self.choices[nearest] if case.distance(nearest) < math.inf and nearest != case else UNKNOWN
            self._learn({case: self._measure(case, candidates())})
        return self.choices[case]

    def share(self, group: dist.ProcessGroup | None) -> None:
        """All processes of the group: measure in the first what is wanted there, and take over its table."""
        if dist.get_rank(group) == 0:
            self._learn({case: self._measure(case, candidates) for case, candidates in self._wanted.items()})
        given = [self.choices]
        dist.broadcast_object_list(given, group=group, group_src=0)
        self.choices, self._wanted = given[0], {}

    def _learn(self, found: dict[Case, str]) -> None:
        self.choices |= found
        if found and self.path is not None:
            _write(self.path, _read(self.path) | found)

    @torch.enable_grad()
    def _measure(self, case: Case, candidates: Candidates) -> str:
        try:
            runs = candidates()
            results = {name: run() for name, run in runs.items()}
            wrong = [name for name in runs if not _agree(results[name], results[UNKNOWN])]
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
                for name, run in runs.items():  # in turn: what slows the device down slows all of them
                    times[name].append(self._clock(run))
            return min(times, key=lambda name: statistics.median(times[name]))
        except Exception as error:  # out of memory, most of all; whatever it is, it must not end a training
            warnings.warn(f"{case} could not be measured, and PyTorch is taken: {error!r}", stacklevel=2)
            return UNKNOWN


def _agree(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        bool((a.double() - b.double()).norm() <= TOLERANCE * b.double().norm())
        for a, b in zip(mine, theirs, strict=True)
    )


# ---------------------------------------------------------------------- on disk


def _read(path: Path) -> dict[Case, str]:
    """What a file knows; nothing if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {Case(op, dtype, tuple(form), tuple(channels)): name for op, dtype, form, channels, name in found}
    except (OSError, ValueError, TypeError):
        return {}


def _write(path: Path, choices: Mapping[Case, str]) -> None:
    """Atomically; where nothing can be written, choices last as long as the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump([[*case, name] for case, name in choices.items()], file)
        os.replace(file.name, path)
    except OSError:
        pass


# ---------------------------------------------------------------------- of the GPUs here

_TABLES: dict[torch.device, Table | None] = {}


def table(device: torch.device) -> Table | None:
    """Of this device; None where there is nothing to choose, which is everywhere but on CUDA."""
    if device not in _TABLES:
        found = None
        if device.type == "cuda":
            found = Table(_path(torch.cuda.get_device_name(device)), lambda run: _milliseconds(run, device))
        _TABLES[device] = found
    return _TABLES[device]


def share(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """`Table.share`, on a GPU."""
    found = table(device) if group is not None else None
    if found is not None:
        found.share(group)


def choose(x: Tensor, case: Case, candidates: Callable[[], Candidates]) -> str:
    """The implementation for an operation on x, wherever that is; see `Table.choose`."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return UNKNOWN  # torch.compile fuses by itself
    found = table(x.device)
    return UNKNOWN if found is None else found.choose(case, candidates, _now)


def _now() -> bool:
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return alone and not torch.cuda.is_current_stream_capturing()


def numbers(x: Tensor) -> Callable[..., Tensor]:
    """Makes numbers up, on x's device and in its type, channels_last, and leaves the global generator alone."""
    generator = torch.Generator(x.device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        found = torch.randn(*shape, generator=generator, device=x.device).to(dtype or x.dtype)
        found = found.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else found
        return found.requires_grad_(grad)

    return draw


def with_gradients(ys: Sequence[Tensor], inputs: list[Tensor], backs: list[Tensor], grad: bool) -> list[Tensor]:
    """The first of the ys, and if `grad` the gradients of the inputs for these gradients of the ys."""
    return [ys[0].detach(), *(torch.autograd.grad(ys, inputs, backs) if grad else ())]


def _path(device: str) -> Path:
    import triton

    from reprune_triton.kernels import masked_conv, norm_act

    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (norm_act, masked_conv))
    versions = [hashlib.sha256(sources).hexdigest()[:12], f"torch{torch.__version__}", f"triton{triton.__version__}"]
    versions.append(f"cuda{torch.version.cuda}")
    name = "-".join([device, *versions, f"cudnn{torch.backends.cudnn.version()}"])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "reprune_triton" / (re.sub(r"[^\w.+-]", "_", name) + ".json")


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """By the device's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)
