"""Set-up shared by all tests."""

import functools
import os
import shutil
import tempfile
from importlib import metadata

import pytest
import torch

# The networks here are tiny. On a busy machine several threads wait for each other ten times longer than they work.
torch.set_num_threads(1)

CUDA = torch.cuda.is_available()


def mismatch(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter of this version cannot run on this NumPy.

    pyproject.toml cannot say so: on a GPU the two go together, and what NumPy must be cannot depend on Triton there.
    """
    if triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return (
            f"Triton {triton}'s interpreter makes numbers of arrays of one element, which NumPy {numpy} refuses: "
            "pip install 'numpy<2.4', or a newer Triton."
        )
    return None


def pytest_addoption(parser):
    group = parser.getgroup("emulator", "compiled kernels, executed on the CPU (tests/ptxemu)")
    group.addoption("--emulate", type=int, metavar="ARCH", help="run the tests of kernels in the emulator: 80 or 90")
    group.addoption("--seed", type=int, default=0, help="of the order in which the emulator's warps run")
    group.addoption("--inexact", action="store_true", help="the emulator rounds as carelessly as a GPU may")


def pytest_configure(config):
    """Triton reads this once, so it must be set before any kernel is imported."""
    arch = config.getoption("--emulate")
    if arch is not None:
        os.environ.pop("TRITON_INTERPRET", None)
        from ptxemu import driver, library

        if reason := library.why_not():
            raise pytest.UsageError(reason)
        driver.activate(arch, config.getoption("--seed"), config.getoption("--inexact"))
        from reprune_triton import availability

        availability.why_not = lambda device: None  # tensors on the CPU are taken
    elif not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
        if reason := mismatch(metadata.version("triton"), metadata.version("numpy")):
            raise pytest.UsageError(reason)
        import guard

        guard.install()
        if "TRITON_CACHE_DIR" not in os.environ:  # what one test compiles is there for the others, in any process
            cache = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="reprune-triton-")
            config.add_cleanup(functools.partial(shutil.rmtree, cache, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files whose tests share something, compiled kernels say, go to one process each, and first; then each test of the
    others goes to whichever process is free."""
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def shares(file):
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if shares(file) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(config, items):
    """In the emulator only what runs kernels: tests that ask for a device or for Triton, and its own."""
    if config.getoption("--emulate") is None:
        return

    def runs_kernels(item):
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return "device" in item.fixturenames or "triton" in parameters or "ptxemu" in item.path.parts

    config.hook.pytest_deselected(items=[item for item in items if not runs_kernels(item)])
    items[:] = filter(runs_kernels, items)


def pytest_ignore_collect(collection_path, config):
    """The emulator's own tests need a process in which kernels are compiled: see test_emulated.py."""
    return True if collection_path.name == "ptxemu" and config.getoption("--emulate") is None else None


@pytest.fixture(autouse=True)
def emulator(request):
    """In the emulator, a test fails if its kernels race, or touch memory that is not theirs or has no value yet."""
    if request.config.getoption("--emulate") is None:
        yield
        return
    from ptxemu import driver

    driver.clear()
    yield
    found = driver.summary()
    assert not found, f"\n{found}"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are not interpreted where there is a GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]),
    ]
)
def device(request) -> str:
    """Where the kernels run: interpreted or emulated on the CPU, or on a GPU."""
    return request.param


@pytest.fixture
def unplanned(monkeypatch):
    """Launches of convolutions are planned at every call: for tests that change what plans are made of."""
    from reprune_triton.kernels.step import masked_conv

    for name in ("_forward_plan", "_input_plan", "_weight_plan"):
        monkeypatch.setattr(masked_conv, name, getattr(masked_conv, name).__wrapped__)
