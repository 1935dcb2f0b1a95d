"""The faster implementation is taken, a wrong one never; choices last, and processes share them."""

import contextlib
import functools
import json
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from played import play
from torch.utils._python_dispatch import TorchDispatchMode

from reprune_triton import availability, ops
from reprune_triton.fused import conv, dispatch, norm
from reprune_triton.fused.dispatch import Case, Table

CASE = Case("norm_act", "bfloat16", (4, 8, 8, 1), (64,), (0, 1))
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


def candidates(slow="torch", wrong=None):
    """Runs whose clock is their name; and how often they were made."""
    made = []

    def make():
        made.append(1)
        results = {name: [torch.ones(3) * (2 if name == wrong else 1)] for name in ("torch", "triton")}
        runs = {name: lambda name=name: results[name] for name in results}
        make.names = {id(run): name for name, run in runs.items()}
        return runs

    make.made = made
    return make, lambda run: 2.0 if make.names[id(run)] == slow else 1.0


@pytest.mark.parametrize("slow, fast", [("torch", "triton"), ("triton", "torch")])
def test_the_faster_one_is_measured_once_and_kept(tmp_path, slow, fast):
    make, clock = candidates(slow)
    path = tmp_path / "deep" / "table.json"
    table = Table(path, clock)
    assert [table.choose(CASE, lambda: make, lambda: True) for _ in range(3)] == [fast] * 3 and len(make.made) == 1
    assert table.choose(CASE._replace(channels=(32,)), lambda: make, lambda: True) == fast and len(make.made) == 2
    again = Table(path, clock)
    assert again.choose(CASE, lambda: make, lambda: True) == fast and len(make.made) == 2
    assert len(json.loads(path.read_text())) == 2


def test_a_wrong_one_is_never_taken_however_fast():
    make, clock = candidates("torch", wrong="triton")
    with pytest.warns(UserWarning, match="triton and PyTorch disagree for norm_act"):
        assert Table(None, clock).choose(CASE, lambda: make, lambda: True) == "torch"


def test_what_could_not_be_measured_is_not_written_and_tried_again_a_few_times(tmp_path):
    make, clock = candidates()
    table, path, tries = Table(tmp_path / "table.json", clock), tmp_path / "table.json", []

    def ask(fails: bool) -> str:
        def attempt():
            tries.append(1)
            if fails:
                raise torch.OutOfMemoryError("no memory")
            return make()

        return table.choose(CASE, lambda: attempt, lambda: True)

    with pytest.warns(UserWarning, match="no memory"):
        assert ask(fails=True) == "torch"
    assert [ask(fails=False) for _ in range(5)] == ["torch"] * 5 and len(tries) == 1 and not path.exists()
    table.share(None, CPU)
    assert [ask(fails=False) for _ in range(5)] == ["triton"] * 5 and len(tries) == 2 and path.exists()

    table, tries = Table(tmp_path / "another.json", clock), []
    for _ in range(10):
        with pytest.warns(UserWarning, match="no memory") if len(tries) < dispatch.TRIES else contextlib.nullcontext():
            assert [ask(fails=True) for _ in range(3)] == ["torch"] * 3
        table.share(None, CPU)
    assert len(tries) == dispatch.TRIES and not (tmp_path / "another.json").exists()


def test_where_nothing_may_be_measured_the_nearest_decides():
    make, clock = candidates("torch")
    table = Table(None, clock)
    assert table.choose(CASE, lambda: make, lambda: False) == "torch" and not make.made
    table.choices = {CASE._replace(channels=(16,)): "triton", CASE._replace(channels=(512,)): "torch"}
    table.share(None, CPU)
    assert table.choose(CASE, lambda: make, lambda: False) == "triton"
    assert table.choose(CASE._replace(channels=(400,)), lambda: make, lambda: False) == "torch"
    assert table.choose(CASE._replace(form=(4, 8, 8, 0)), lambda: make, lambda: False) == "torch"
    assert table.choose(CASE._replace(settings=(1, 1)), lambda: make, lambda: False) == "torch"
    assert not make.made


def test_the_nearest_is_looked_for_once(monkeypatch):
    """A table of hundreds of cases, and an unknown one that is asked for at every step."""
    make, clock = candidates()
    table, looked = Table(None, clock), []
    table.choices = {CASE._replace(channels=(n,)): "triton" for n in range(100, 400)}
    distance = Case.distance
    monkeypatch.setattr(Case, "distance", lambda self, other: looked.append(1) or distance(self, other))
    assert table.choose(CASE, lambda: make, lambda: False) == "triton"
    once = len(looked)
    assert [table.choose(CASE, lambda: make, lambda: False) for _ in range(10)] == ["triton"] * 10
    assert len(looked) == once > 0
    assert table.choose(CASE, lambda: make, lambda: True) == "triton" and len(make.made) == 1  # after a graph's capture


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('[["norm_act", 3')
    make, clock = candidates()
    assert Table(path, clock).choose(CASE, lambda: make, lambda: True) == "triton"
    assert len(json.loads(path.read_text())) == 1


def share(rank, address, out):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    make, clock = candidates("torch" if rank == 0 else "triton")
    hard, tries = CASE._replace(channels=(63,)), []

    def fails():
        tries.append(1)
        raise torch.OutOfMemoryError("no memory")

    table = Table(None, clock)
    for _ in range(5):
        if rank == 0:  # the first process alone has met these cases
            table.choose(CASE, lambda: make, lambda: False)
            table.choose(hard, lambda: fails, lambda: False)
        warned = rank == 0 and len(tries) < dispatch.TRIES
        with pytest.warns(UserWarning, match="no memory") if warned else contextlib.nullcontext():
            table.share(dist.group.WORLD, CPU)
    found = table.choices[CASE], table.choose(hard, lambda: fails, lambda: False), len(tries), hard in table.choices
    (out / str(rank)).write_text(repr(found))
    dist.destroy_process_group()


def test_all_processes_take_the_first_ones_table(tmp_path):
    """Also that a case could not be measured there: the nearest, which is known, might fail for the same reason."""
    mp.spawn(share, (f"file://{tmp_path / 'meet'}", tmp_path), 2)
    found = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert found == [repr(("triton", "torch", tries, False)) for tries in (dispatch.TRIES, 0)]


@pytest.fixture
def table(monkeypatch):
    """Of the CPU, where kernels are interpreted; all candidates take the same time."""
    found = Table(None, lambda run: 1.0)
    monkeypatch.setattr(dispatch, "_TABLES", {CPU: found})
    monkeypatch.setattr(dispatch, "_now", lambda: True)
    monkeypatch.setattr(dispatch, "WARM_UP", 0)
    monkeypatch.setattr(dispatch, "REPEATS", 1)
    return found


@contextlib.contextmanager
def setting(target, name, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
def test_a_choice_depends_on_all_that_decides_which_code_runs(table):
    x, vector = torch.ones(2, 3, 4, 4), torch.ones(3)
    last = x.contiguous(memory_format=torch.channels_last)
    one, three = torch.ones(2, 3, 1, 1), torch.ones(2, 3, 3, 3)

    def measured(x=x, weight=one) -> set[str]:
        before = set(table.choices)
        for _ in range(2):
            ops.masked_conv2d(x, weight)
            norm.batch_norm_act(x, vector, vector, None, None, residual=x)
        return {case.operation for case in set(table.choices) - before}

    cudnn, both = torch.backends.cudnn, {"conv", "norm_act"}
    assert measured() == both and measured() == set()
    for change in (
        setting(cudnn.conv, "fp32_precision", "ieee"), setting(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        setting(cudnn, "benchmark", True), setting(cudnn, "deterministic", True), setting(cudnn, "enabled", False),
    ):  # fmt: skip
        with change:
            assert measured() == both
        assert measured() == set()
    with setting(cudnn, "benchmark", True), setting(cudnn, "benchmark_limit", 3):
        assert measured() == both
    with setting(cudnn, "deterministic", True):
        assert measured() == set()  # as above
    with deterministic():
        assert measured() == set()  # cuDNN is told the same
    assert measured(last) == both
    assert measured(weight=three) == {"conv"} and measured(weight=three.contiguous(memory_format=torch.channels_last))
    with setting(cudnn.conv, "fp32_precision", "ieee"):  # which only float32 goes by
        assert measured(x.bfloat16(), one.bfloat16()) == both
    assert measured(x.bfloat16(), one.bfloat16()) == set()


@interpreted
def test_what_is_shared_is_taken_from_then_on(table, monkeypatch):
    """Also for shapes whose choice has been asked for before."""
    x, vector = torch.ones(2, 3, 4, 4), torch.ones(3)
    bn = norm.BatchNorm(vector, vector, None, None, True, 0.1, 1e-5, "none")
    asked = functools.partial(norm.choose, x, None, bn, "auto"), functools.partial(
        conv.choose, x, torch.ones(2, 3, 1, 1), None, ((1, 1), (0, 0), (1, 1)), None, "auto"
    )
    for _ in range(2):
        assert [ask() for ask in asked] == ["torch", "mixed"] and set(table.choices.values()) == {"torch"}
    monkeypatch.setattr(dispatch.ranks, "broadcast", lambda given, *_: (dict.fromkeys(given[0], "triton"), {}))
    monkeypatch.setattr(dispatch.dist, "get_rank", lambda group: 1)
    table.share(object(), CPU)
    assert [ask() for ask in asked] == ["triton"] * 2


def test_settings_where_pytorch_is_built_without_cuda(monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_get_cudnn_benchmark_limit", raising=False)
    monkeypatch.setattr(type(torch.backends.cudnn), "benchmark_limit", None)
    with setting(torch.backends.cudnn, "benchmark", True):
        some = dispatch.settings(torch.float32)
    assert some != dispatch.settings(torch.float32) and all(type(number) is int for number in some)


def test_on_a_gpu_without_triton_there_is_nothing_to_share(monkeypatch):
    play(monkeypatch)
    monkeypatch.setattr(dispatch, "_TABLES", {})
    monkeypatch.setattr(availability, "_INSTALLED", False)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    availability._tried.cache_clear()
    try:
        dispatch.share(None, torch.device("cuda", 0))
        assert dispatch.table(torch.device("cuda", 0)).path is None
    finally:
        availability._tried.cache_clear()


@interpreted
def test_float64_is_not_measured(table):
    x, vector = torch.ones(2, 3, 4, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = norm.batch_norm_act(x, vector, vector, None, None)
    assert torch.equal(y, norm.batch_norm_act(x, vector, vector, None, None, impl="torch"))
    own = norm.Norm(vector, vector, vector, vector, "relu", False)
    weight = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    y, stats = conv.norm_act_conv2d(x + x.new_tensor([0, 1, 2, 3]), weight, own, stats_eps=1e-5)
    by_torch = conv.norm_act_conv2d(x + x.new_tensor([0, 1, 2, 3]), weight, own, stats_eps=1e-5, impl="torch")
    assert torch.equal(y, by_torch[0]) and all(map(torch.equal, stats, by_torch[1]))
    assert not table.choices and not table._assumed
    ops.masked_conv2d(x.float(), weight.float())
    assert len(table.choices) == 1


# ---------------------------------------------------------------------- what is right


def rounded(x, kind):
    """What a GPU's tensor cores read of it."""
    if kind == "tf32":  # cut off, which is worse than rounded
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(getattr(torch, kind))


def planted():
    """Faults of one tile, row, channel or number each, by name; they change a result (B, C, H, W) in place."""

    def rows(x):
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])

    def write(x, where, value):
        flat = rows(x).clone()
        flat[where] = value(flat)
        x.copy_(flat.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2))

    tile = slice(512, 512 + 32), slice(16, 32)
    return {
        "a tile of zeros": lambda x: write(x, tile, lambda flat: 0.0),
        "a tile of another place": lambda x: write(x, tile, lambda flat: flat[1024 : 1024 + 32, 16:32]),
        "a tile without a part of its sum": lambda x: write(x, tile, lambda flat: 0.8 * flat[tile]),
        "a tile not a number": lambda x: write(x, tile, lambda flat: float("nan")),
        "a row": lambda x: write(x, 77, lambda flat: flat[78]),
        "a channel": lambda x: write(x, (slice(None), 5), lambda flat: flat[:, 6]),
        "a number": lambda x: write(x, (77, 5), lambda flat: 4 * flat[:, 5].std()),
    }


@pytest.fixture(scope="module")
def product():
    """A convolution whose sums are rounded as a GPU's are, and exact; (B, C, H, W)."""
    draw = dispatch.numbers(torch.empty(0))
    x, w = draw(32, 48, 16, 16), draw(64, 48, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), w.double()).float()
    found = {}
    for kind in ("bfloat16", "float16", "tf32"):
        parts = rounded(x, kind), rounded(w, kind)
        ours = torch.nn.functional.conv2d(*(part.double() for part in parts))
        theirs = torch.nn.functional.conv2d(*(rounded(part, kind).double() for part in (x, w)))
        theirs *= 1 + (2**-11) * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
        if kind == "tf32":
            found[kind] = ours.float(), exact
        else:
            found[kind] = ours.to(parts[0].dtype), theirs.to(parts[0].dtype)
    return found


@pytest.mark.parametrize("piece", [1 << 12, 1 << 22])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
def test_rounding_passes_and_one_wrong_place_does_not(monkeypatch, product, kind, piece):
    monkeypatch.setattr(dispatch, "PIECE", piece)
    ours, theirs = product[kind]
    assert not torch.equal(ours, theirs) and dispatch.agree([ours, theirs], [theirs, ours])
    for name, fault in planted().items():
        wrong = ours.clone()
        fault(wrong)
        share = float((wrong != ours).float().mean())
        assert 0 < share < 0.02, name
        assert not dispatch.agree([wrong], [theirs]), name
    vector = torch.rand(64)
    assert dispatch.agree([vector * 1.001], [vector]) and not dispatch.agree([vector.roll(1)], [vector])
    assert not dispatch.agree([vector], [vector[:32]])


def test_comparing_takes_little_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "PIECE", 1 << 10)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (list, tuple)) else (found,):
                if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                    made.append(x.numel())
            return found

    for shape in ((64, 8, 8, 8), (1, 8, 64, 64), (512, 64, 1, 1), (1 << 15,)):
        x = torch.rand(shape).bfloat16()
        other = x.clone()
        given = {tensor.untyped_storage().data_ptr() for tensor in (x, other)}
        with Watch():
            assert dispatch.agree([x], [other])
        assert 0 < max(made) <= 1 << 10 < x.numel()
        made.clear()


# ---------------------------------------------------------------------- the clock


class Played:
    """A GPU and its host in one thread: times are of both, in milliseconds."""

    def __init__(self, monkeypatch, ghz=1.7):
        self.host, self.free, self.spins = 0.0, 0.0, []
        monkeypatch.setattr(torch._C, "_cuda_sleep", lambda cycles: self.spin(cycles, ghz), raising=False)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: PlayedEvent(self))
        monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: 0)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: 0)

    def spin(self, cycles, ghz):
        self.spins.append(cycles)
        self.enqueue(0.01, cycles / (ghz * 1e6))

    def enqueue(self, host, device):
        """The host takes its time to ask for something, and the device to do it, when it is through with the rest."""
        self.host += host
        self.free = max(self.host, self.free) + device

    def operation(self, host, device, launches=10):
        return lambda: [self.enqueue(host / launches, device / launches) for _ in range(launches)]


class PlayedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.enqueue(0.005, 0.0)
        self.at = self.gpu.free

    def query(self):
        return self.at <= self.gpu.host

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("host, device", [(0.3, 0.1), (5.0, 0.2), (0.1, 3.0), (0.01, 0.01)])
def test_the_clock_shows_the_devices_time_and_not_the_hosts(monkeypatch, host, device):
    gpu = Played(monkeypatch)
    clock = dispatch.Clock(torch.device("cuda", 0))
    assert [clock(gpu.operation(host, device)) for _ in range(3)] == [pytest.approx(device)] * 3
    assert gpu.spins[-3:] == [gpu.spins[-1]] * 3  # which was long enough


def test_the_faster_one_for_the_device_is_taken_not_for_the_host(monkeypatch):
    gpu = Played(monkeypatch)
    runs = {"torch": gpu.operation(0.05, 0.2), "triton": gpu.operation(0.5, 0.1)}
    results = {name: lambda run=run: [run() and torch.ones(1)] for name, run in runs.items()}
    table = Table(None, dispatch.Clock(torch.device("cuda", 0)))
    assert table.choose(CASE, lambda: lambda: results, lambda: True) == "triton"


def test_a_run_that_waits_for_the_device_is_timed_with_the_host(monkeypatch):
    gpu = Played(monkeypatch)

    def waits():
        gpu.host = max(gpu.host, gpu.free)
        gpu.enqueue(0.3, 0.1)

    clock = dispatch.Clock(torch.device("cuda", 0))
    assert clock(waits) == pytest.approx(0.4, abs=0.02) and max(gpu.spins) == dispatch.LONGEST


# ---------------------------------------------------------------------- on made-up numbers


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_measured_agrees(device, grad):
    """The candidates of both operations, of every kind, through the kernels: no warning, and the generator is left."""
    x, weight = torch.empty(2, 5, 4, 3, device=device), torch.empty(7, 5, 1, 1, device=device)
    kind, one = torch.float32, (1, 1)
    norm_of = norm.Norm(*torch.rand(4, 5, device=device).unbind(), "relu", True)
    batch, given = (norm.BatchNorm(*[None] * 4, training, 0.1, 1e-5, "relu6") for training in (True, False))
    given = given._replace(running_mean=weight, running_var=weight)
    state = torch.get_rng_state()
    for make in (
        norm._candidates(x, x, batch, grad, False, True),
        norm._candidates(x, x, batch._replace(act="none"), grad, True, False),
        norm._candidates(x, None, given, grad, False, False),
        conv._candidates(x, kind, weight, None, (one, (0, 0), one), None, None, False, (False, grad)),
        conv._candidates(x, kind, weight, norm_of, ((2, 2), (0, 0), one), 1e-5, None, False, (grad, grad)),
        conv._candidates(x, kind, weight, norm_of, (one, (0, 0), one), None, x, True, (grad, False)),
    ):
        runs = make()
        results = [runs[name]() for name in ("torch", "triton")]
        assert dispatch.agree(*results) and len(results[0]) == len(results[1]) > (1 if grad else 0)
        assert not dispatch.agree([2 * x for x in results[0]], results[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_auto_takes_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_TABLES", {})
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(64, device="cuda")
    for choice in ("triton", "torch"):
        norm.batch_norm_act(x, vector, vector, None, None, act="relu")
        ops.masked_conv2d(x, x.new_ones(32, 64, 1, 1))
        table = dispatch.table(x.device)
        assert {case.operation for case in table.choices} == {"norm_act", "conv"} and list(tmp_path.rglob("*.json"))
        table.choices = dict.fromkeys(table.choices, choice)
        y, expected = (norm.batch_norm_act(x, vector, vector, None, None, act="relu", impl=i) for i in ("auto", choice))
        assert torch.equal(y, expected)
