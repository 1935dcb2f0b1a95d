"""Benchmark results as JSON rows, each complete in itself: what was measured, where, and on which code."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from reprune_triton.errors import RepruneError


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return device, CPU, versions and commit, for every row; `dirty` if the code is not that of the commit."""
    device = torch.device(device)
    # Rows that were just written there change nothing of what is measured.
    changes = _git("status", "--porcelain", "--untracked-files=normal", "--", ":/", ":(top,exclude)bench/results")
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }
    for package in ("triton", "scipy", "fastcluster"):
        row[package] = version(package)
    return row


def version(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def append(path: str | Path | None, row: dict[str, Any]) -> None:
    """Add one line to a file of JSON rows. None: nowhere."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


class Draft:
    """Rows at the end of a file that are not final: each `write` replaces those of the last one.

    The file is whole at any time: a process that is killed leaves what it wrote last.
    """

    def __init__(self, path: str | Path | None):
        """Begin a draft at the end of this file; None: nowhere."""
        self._path = None if path is None else Path(path)
        exists = self._path is not None and self._path.exists()
        self._before = self._path.read_text(encoding="utf-8") if self._path and exists else None

    def write(self, some: Sequence[dict[str, Any]]) -> None:
        if self._path is None:
            return
        if not some and self._before is None:
            self._path.unlink(missing_ok=True)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, sort_keys=True) + "\n" for row in some]
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        beside.write_text("".join([self._before or "", *lines]), encoding="utf-8")
        os.replace(beside, self._path)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if there is no file.

    Raises:
        RepruneError: for a line that is no row, by its number.
    """
    found = []
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["benchmark"], row["dirty"]
        except (ValueError, KeyError, TypeError) as error:
            raise RepruneError(f"{path}, line {number}, is not a row of a benchmark: {error!r}") from error
        found.append(row)
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout of this file; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
