"""Programs in a process of their own, where Triton compiles kernels; in that of the tests it interprets them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, *arguments: str) -> list[Any]:
    """Return what it prints, a value in JSON a line.

    What one of them has compiled is there for the others, if conftest.py made a cache for this run of the tests. One
    from before may have old line numbers.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_CACHE_DIR": cache} | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_each(program: str, cases: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Run it with the arguments of each case, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda arguments: run(program, *arguments), cases))
