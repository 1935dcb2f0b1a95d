"""A run's folder, and the signals that stop a run, so that no whole epoch is lost."""

import json
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from reprune_triton.errors import RepruneError
from reprune_triton.pruner import REPrune
from reprune_triton.training import checkpoint
from reprune_triton.training.options import Options, lasting

Record = dict[str, Any]  # one line of the log


@dataclass(frozen=True)
class Run:
    """A run's folder, with its log and its checkpoint, and all that these hold. Without a folder it does nothing."""

    options: Options
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    pruner: REPrune | None
    device: torch.device

    @property
    def last(self) -> Path:
        return Path(self.options.out or "") / "last.safetensors"

    def start(self) -> tuple[int, list[Record]]:
        """Return the number of epochs already done, and their log.

        Raises:
            RepruneError: if the folder holds a run, and it is not to be resumed or was started with other options.
        """
        if not self.options.out:
            return 0, []
        if self.options.resume:
            return self._resume()
        if self.last.exists() or checkpoint.previous(self.last).exists():
            raise RepruneError(f"{self.last.parent} holds a run already: go on with --resume, or choose another --out")
        self.save(0, [])  # so that a run stopped in its first epoch can be resumed like any other
        return 0, []

    def save(self, done: int, log: list[Record]) -> None:
        """Write the last line of the log, and a checkpoint after `done` epochs."""
        if not self.options.out:
            return
        # The log first: a resumed run drops a line without its checkpoint, but could not write a line that is missing.
        self.last.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line) + "\n" for line in log]
        with open(self._log, "a" if done else "w") as file:
            file.writelines(lines[-1:])
        cuda = self.device.type == "cuda"
        state = {
            "done": done,
            "options": lasting(self.options),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner else None,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device) if cuda else None},
        }
        checkpoint.write(self.last, state)

    def _resume(self) -> tuple[int, list[Record]]:
        state = checkpoint.read(self.last)
        # An option that is newer than the checkpoint had its default.
        here, there = lasting(self.options), lasting(Options()) | state["options"]
        other = [
            f"--{key.replace('_', '-')} was {there.get(key)}, is {here.get(key)}"
            for key in {**there, **here}
            if here.get(key) != there.get(key)
        ]
        if other:
            raise RepruneError(f"{self.last}: this run was started with other options: {'; '.join(other)}")
        if self.pruner:  # first, as it makes the model compact if that was after the last event
            self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

        log: list[Record] = []
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the machine went down in the middle of it
                break
            if record["epoch"] <= state["done"]:
                log.append(record)
        self._log.write_text("".join(json.dumps(line) + "\n" for line in log))
        return state["done"], log

    @property
    def _log(self) -> Path:
        return self.last.with_name("log.jsonl")


class Stopped(SystemExit):
    """SIGTERM or SIGINT came; `code` is 128 + its number. The checkpoint of the last whole epoch is on the disk."""


class Signals:
    """A guard that turns SIGTERM and SIGINT into `Stopped`, which `check` raises. A second signal acts at once."""

    def __init__(self) -> None:
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        if self.came is not None:
            raise Stopped(128 + self.came)
