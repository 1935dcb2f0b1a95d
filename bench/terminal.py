"""The options of the commands, their checks, and tables on the screen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reprune_triton import ops
from reprune_triton.errors import RepruneError

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": "resnet50", "help": "a name of training.models (default: %(default)s)"},
    "batch": {"type": int, "default": 256, "help": "images of a step (default: %(default)s)"},
    "size": {"type": int, "help": "side of the images (default: 224, or 32 for the CIFAR ResNets)"},
    "sparsity": {
        "type": float, "nargs": "+", "default": [0.0, 0.3, 0.51, 0.75],
        "help": "share of the prunable channels to leave out, of every layer (default: 0 0.3 0.51 0.75)",
    },
    "linkage": {"default": "ward", "choices": ops.LINKAGES, "help": "default: %(default)s"},
    "impl": {"default": "auto", "choices": ops.IMPLS, "help": "default: %(default)s"},
    "algorithm": {"default": "auto", "choices": ops.ALGORITHMS, "help": "of Triton (default: %(default)s)"},
    "device": {
        "default": "cuda" if torch.cuda.is_available() else "cpu",
        "help": "where our side runs; other libraries always use the CPU (default: %(default)s)",
    },
    "threads": {"type": int, "default": 1, "help": "CPU threads; other libraries have only one (default: %(default)s)"},
    "seed": {"type": int, "default": 0, "help": "of all random numbers (default: %(default)s)"},
    "json": {"metavar": "FILE", "help": "append the results to this file, one JSON row per line"},
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser, names: str, **defaults: Any) -> None:
    """Add the options of these names, a blank between them, and --json; `defaults` are the command's own."""
    for name in [*names.split(), "json"]:
        own = {"default": defaults[name]} if name in defaults else {}
        parser.add_argument(f"--{name}", **OPTIONS[name] | own)


def check_at_least_one(args: argparse.Namespace, names: str) -> None:
    """Raise RepruneError where an option of these names is given and less than 1."""
    for name in names.split():
        value = getattr(args, name.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise RepruneError(f"--{name} must be at least 1; got {number}")


def console(width: int) -> Console:
    """Return the screen's console, or one of this width: a file or a pipe has none of its own."""
    return Console(width=None if sys.stdout.isatty() else width)


def table(title: str, columns: Iterable[str], left: Container[str] = (), caption: str | None = None) -> Table:
    """Return an empty table; the columns in `left` are left-aligned, all others are numbers."""
    made = Table(title=title, caption=caption)
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right")
    return made
