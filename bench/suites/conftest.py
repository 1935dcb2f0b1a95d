"""Times every side of a piece of work, and in the end holds the ratios against those in bench/results/suites.jsonl."""

import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reprune_triton.bench import guard, rows

RECORD = Path(__file__).resolve().parents[1] / "results" / "suites.jsonl"
SECONDS, ROUNDS = 4.0, (7, 40)  # for one side; how often at least and at most
TIMED = pytest.StashKey[list[guard.Timed]]()
BEFORE = pytest.StashKey[guard.Recorded]()


def pytest_addoption(parser):
    group = parser.getgroup("reprune_triton")
    group.addoption("--recorded", default=str(RECORD), metavar="FILE", help="ratios to hold these against")
    group.addoption("--json", metavar="FILE", help="append the ratios to this file, one JSON row per line")


def pytest_configure(config):
    config.stash[TIMED] = []
    config.stash[BEFORE] = guard.recorded(config.getoption("--recorded"))
    torch.set_num_threads(1)  # the libraries beside us have only one


def pytest_collection_modifyitems(items):
    # Both sides have one thread and wait for nothing: the time of the process is that of a quiet machine, on any.
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=time.process_time))


@pytest.fixture
def side(benchmark, request):
    """side(group, name, work, peer=...): time one side of some work, once its result has been checked. What `fresh`
    returns is made anew for every round, not timed, and given to the work."""

    def measure(group, name, work, *, peer, fresh=None):
        def arguments():
            return (() if fresh is None else (fresh(),)), {}

        given, _ = arguments()
        began = time.process_time()
        work(*given)
        rounds = min(max(round(SECONDS / max(time.process_time() - began, 1e-3)), ROUNDS[0]), ROUNDS[1])
        benchmark.group = group
        benchmark.pedantic(work, setup=arguments, rounds=rounds)
        timed = guard.Timed(group, name, peer, benchmark.stats.stats.median, rounds)
        request.config.stash[TIMED].append(timed)

    return measure


def pytest_sessionfinish(session, exitstatus):
    found, path = guard.ratios(session.config.stash[TIMED]), session.config.getoption("--json")
    worse = guard.regressions(found, session.config.stash[BEFORE])
    if path and exitstatus == 0 and not worse:  # what got worse must not become what the next run is held against
        here = rows.environment()  # once: the first row changes the checkout
        for ratio in found:
            rows.append(path, here | guard.row(ratio))
    if worse:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(config):
    found, before = guard.ratios(config.stash[TIMED]), config.stash[BEFORE]
    if found:
        console = Console(width=160)
        console.print(guard.table(found, before))
        for sentence in guard.regressions(found, before):
            console.print(sentence, markup=False)
        if not before:
            console.print(f"{config.getoption('--recorded')} holds no ratios: nothing is guarded.", markup=False)
