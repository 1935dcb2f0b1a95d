"""A sample of `make emulate`: compiled kernels run on the CPU, where races and accesses out of bounds show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptxemu import library

ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/ptxemu", "tests/fused/test_conv.py", "tests/fused/test_norm.py", "tests/running/test_pack.py")
SAMPLE = "found or barriers or asynchronous or every_order or nan_goes_through or one_slice_may_change"


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not() or "")
@pytest.mark.parametrize("arch", [80, 90])
def test_a_sample_runs_without_a_finding(arch):
    """In a process of its own: here Triton interprets kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", str(arch), "-k", SAMPLE]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([*command, *FILES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert re.search(r"needs g\+\+ .*apt install g\+\+", library.why_not())
    environment = {**os.environ, "PATH": ""}
    command = [sys.executable, "-m", "pytest", "--emulate", "80", "tests/ptxemu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and library.why_not() in done.stderr
