"""All slices of a network in one launch: the same numbers as tensor by tensor."""

import contextlib
import copy
import ctypes
import functools
import gc
import signal
import threading
import types
import weakref

import apart
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reprune_triton import capture
from reprune_triton.errors import RepruneError
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.running import analysis
from reprune_triton.running.layers import Slice, gather
from reprune_triton.running.narrow import Narrowing
from reprune_triton.running.pack import Pack
from reprune_triton.training import models


def tensors(device, dtype):
    """Each with its cut: kernels of several sizes in both memory formats, matrices, vectors, whole ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, last=False):
        found = torch.randn(*shape, generator=generator).to(device, dtype)
        return (found.contiguous(memory_format=torch.channels_last) if last else found).requires_grad_()

    def index(n, k):
        return torch.randperm(n, generator=generator)[:k].sort().values.to(device)

    return [
        (draw(20, 70, 3, 3, last=True), [(0, index(20, 7)), (1, index(70, 66))]),
        (draw(20, 70, 3, 3), [(0, index(20, 17)), (1, index(70, 5))]),
        (draw(3, 5, 1, 3, last=True), [(1, index(5, 1))]),
        (draw(30, 9, 1, 1), [(0, index(30, 1))]),
        (draw(9, 1, 3, 3), [(0, index(9, 4))]),
        (draw(11, 150), [(1, index(150, 131))]),
        (draw(33), [(0, index(33, 19))]),
        (draw(12, 3, 2, 2, last=True), []),
    ]


def layout(t):
    """Strides, but of dimensions of one they say nothing."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16])
def test_slices_and_gradients_are_those_of_torch(device, dtype, wanted):
    pairs = tensors(device, dtype)
    some, cuts = [t for t, _ in pairs], [cut for _, cut in pairs]
    if wanted is not None and device == "cpu":  # the interpreter truncates what a GPU rounds
        with torch.no_grad():
            for t in some:
                t.copy_(t.bfloat16().clamp(-8, 8).div(8).mul(256).round().div(32))
    dtypes = [wanted or dtype] * len(some)
    found = Pack(cuts, "triton").gather(some, dtypes)
    assert found is not None
    expected = [gather(t, cut).to(d) for t, cut, d in zip(some, cuts, dtypes, strict=True)]
    factors = [torch.randint(-8, 8, t.shape).to(device, t.dtype) for t in expected]
    factors[1] = factors[1].contiguous(memory_format=torch.channels_last)  # gradients come as they like
    factors[5] = factors[5].T.contiguous().T
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and layout(a) == layout(b) and a.requires_grad
    mine, theirs = (torch.autograd.grad(outputs, some, factors) for outputs in (found, expected))
    for a, b, t in zip(mine, theirs, some, strict=True):
        assert torch.equal(a, b) and a.dtype == t.dtype and layout(a) == layout(t)


def test_index_lists_may_be_views_and_of_any_integers(device):
    tensor = torch.randn(8, 6, device=device, requires_grad=True)
    cut = [(0, torch.arange(8, device=device)[1::2]), (1, torch.arange(12, device=device).int().view(6, 2)[:3, 0])]
    (found,) = Pack([cut], "triton").gather([tensor], [torch.float32])
    assert torch.equal(found, gather(tensor, cut))
    (grad,) = torch.autograd.grad(found.sum(), tensor)
    wanted = torch.zeros_like(tensor)
    wanted[1::2, :5:2] = 1
    assert torch.equal(grad, wanted)


def test_what_needs_no_gradient_gets_none_and_what_is_unused_neither(device):
    a, b, c = (torch.randn(6, 3, device=device, requires_grad=grad) for grad in (True, False, True))
    cut = [(0, torch.tensor([1, 4], device=device))]
    x, y, z = Pack([cut] * 3, "triton").gather([a, b, c], [torch.float32] * 3)
    assert x.requires_grad and not y.requires_grad
    (x * y).sum().backward()
    assert c.grad is None and torch.equal(a.grad[[1, 4]], b[[1, 4]]) and a.grad[0].abs().max() == 0


def test_one_slice_may_change_while_others_are_saved(device):
    """BatchNorm updates its averages in place between a forward and a backward."""
    a, b = torch.randn(6, device=device, requires_grad=True), torch.zeros(6, device=device)
    pack = Pack([[(0, torch.tensor([0, 2, 5], device=device))]] * 2, "triton")
    x, y = pack.gather([a, b], [torch.float32] * 2)
    loss = x.square().sum()
    y.add_(1)
    loss.backward()
    pack.put_back(x, [(1, b, False), (0, a.grad, True)])
    assert b.tolist() == [1, 0, 1, 0, 0, 1] and a.grad.abs().max() == 0


def test_tensors_that_have_changed_are_looked_at_again(device):
    """A pack knows the tensors of the last time by few signs: where they are, and how they lie there."""
    weight, vector = nn.Parameter(torch.randn(6, 6, 2, 2, device=device)), nn.Parameter(torch.randn(6, device=device))
    index, state = torch.tensor([1, 2, 5], device=device), torch.randn(6, device=device)
    cuts = [[(0, index), (1, index)], [(0, index)]]
    pack = Pack(cuts, "triton")

    def check():
        some = [weight, vector]
        found = pack.gather(some, [t.dtype for t in some])
        for part, t, cut in zip(found, some, cuts, strict=True):
            assert torch.equal(part, gather(t, cut)) and part.requires_grad == t.requires_grad
        for part, t in zip(found, some, strict=True):
            if t.requires_grad:
                (grad,) = torch.autograd.grad(part.sum(), t)
                assert grad.shape == t.shape and grad.dtype == t.dtype and grad.sum() == part.numel()
        pack.put_back(found[0], [(1, state, False)])
        assert torch.equal(state[index], vector[index].to(state)) and len(state[state != 0]) == 6

    check()
    for parameter in (weight, vector):
        parameter.data = 2 * parameter.data
        check()
    last = weight.data.contiguous(memory_format=torch.channels_last).stride()
    weight.data = weight.data.as_strided(weight.shape, last)  # at the same place
    check()
    with torch.autocast(device, torch.bfloat16):  # changes nothing about the tensors
        check()
    vector.requires_grad_(False)
    check()
    vector.requires_grad_(True)
    vector.data, state.data = vector.data.double(), state.data.clone()
    check()


def test_gradients_may_come_in_groups(device, monkeypatch):
    """Each as soon as its own slices have theirs; a slice that nobody used has none."""
    monkeypatch.setattr("reprune_triton.running.pack._group_bytes", lambda: 60 * 1024)
    pairs = tensors(device, torch.float32)
    some, cuts = [t for t, _ in pairs], [cut for _, cut in pairs]
    pack = Pack(cuts, "triton")
    for unused in (1, 4, 1, 7):
        found = pack.gather(some, [torch.float32] * len(some))
        assert len({x.grad_fn for x in found}) == 2
        loss = sum(x.square().sum() for i, x in enumerate(found) if i != unused)
        expected = [gather(t, cut).square().sum() for t, cut in pairs]
        mine = torch.autograd.grad(loss, some, allow_unused=True)
        theirs = torch.autograd.grad(sum(x for i, x in enumerate(expected) if i != unused), some, allow_unused=True)
        assert mine[unused] is None and theirs[unused] is None
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert len(pack._copies) == 3, "a gather and two scatters, whatever was used"


def test_torch_is_left_to_it_where_the_kernels_cannot(device):
    t, cut = torch.randn(6, device=device), [(0, torch.tensor([0, 2], device=device))]
    assert Pack([cut], "torch").gather([t], [t.dtype]) is None
    assert (Pack([cut], "auto").gather([t], [t.dtype]) is None) == (device == "cpu")
    assert Pack([cut], "triton").gather([t.int()], [torch.int32]) is None
    assert Pack([cut], "triton").gather([t.expand(2, 6)[0:1, :].expand(3, 6)], [t.dtype]) is None
    assert Pack([], "triton").gather([], []) is None


# ---------------------------------------------------------------------- in a CUDA graph


class Graphs:
    """A GPU's, played: in a capture launches are noted and not done, and a replay does them, on the same addresses.
    What was launched with is spoilt when nothing holds it any more. Nothing tells memory of the host from the device's,
    so the copy to the device is none."""

    def __init__(self, patch):
        self.capturing, self.launches, self.run = False, [], Configuration.run
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(stream_id=7))
        patch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", lambda: self.capturing)
        patch.setattr(Configuration, "run", lambda *a: self.launch(*a))
        patch.setattr("reprune_triton.kernels.step.pack._LAUNCHED", set())

    def launch(self, config, programs, *arguments):
        if not self.capturing:
            self.run(config, programs, *arguments)
            return
        for argument in arguments:
            size = argument.numel() * argument.itemsize
            weakref.finalize(argument, ctypes.memset, argument.data_ptr(), 0, size)
        self.launches.append((config, programs, [(t.data_ptr(), t.numel(), t.dtype) for t in arguments]))

    @contextlib.contextmanager
    def capture(self):
        self.launches, self.capturing = [], True
        yield self.launches
        self.capturing = False

    def replay(self, launches):
        for config, programs, arguments in launches:
            own = []
            for address, count, dtype in arguments:
                memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
                own.append(torch.frombuffer(memory, dtype=dtype))
            self.run(config, programs, *own)


@pytest.fixture
def graphs(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU has graphs of its own")
    return Graphs(monkeypatch)


def test_graphs_replay_what_they_captured_whatever_came_after(graphs):
    """Two of them in turns, each with gradients of its own and two backwards; between them steps without one, other
    tensors, and the collector."""
    pairs = tensors("cpu", torch.float32)[2:7:2]
    some, cuts = [t for t, _ in pairs], [cut for _, cut in pairs]
    statistics = torch.randn(33)
    generator = torch.Generator().manual_seed(1)
    pack, dtypes = Pack(cuts, "triton"), [torch.float32] * len(some)

    def work(grads):
        found = pack.gather(some, dtypes)
        pack.put_back(found[0], [(2, statistics, False)])
        return found, [torch.autograd.grad(found, some, own, retain_graph=True) for own in grads]

    def draw():
        return [[torch.randn(x.shape, generator=generator) for x in pack.gather(some, dtypes)] for _ in range(2)]

    work(draw())
    captured = []
    for _ in range(2):
        grads = draw()
        with graphs.capture() as launches:
            captured.append((launches, grads, *work(grads)))
        assert len(launches) == 4
        work(draw())
        pack.gather([t.detach().double() for t in some], dtypes)  # other tables, of other tensors
        gc.collect()
        work(draw())
    for launches, grads, found, full in captured * 2:
        with torch.no_grad():
            for t in (*some, *(x for own in grads for x in own)):
                t.copy_(torch.randn(t.shape, generator=generator))
        for own in full:
            for t in own:
                t.zero_()  # as the graph does
        before = statistics.clone()
        graphs.replay(launches)
        for part, (t, cut) in zip(found, pairs, strict=True):
            assert torch.equal(part, gather(t, cut))
        for own, mine in zip(grads, full, strict=True):
            theirs = torch.autograd.grad([gather(t, cut) for t, cut in pairs], some, own)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        index = cuts[2][0][1]
        assert torch.equal(statistics, before.index_copy(0, index, some[2].detach()[index]))


def test_what_a_capture_meets_first(graphs, monkeypatch):
    """It goes tensor by tensor, where nothing of the pack is on the device; a kernel that is not cannot come there."""
    t, cut = torch.randn(6, requires_grad=True), [(0, torch.tensor([0, 2]))]
    pack = Pack([cut], "triton")
    with graphs.capture() as launches:
        assert pack.gather([t], [t.dtype]) is None and pack.hold([t]) is None
    found = pack.gather([t], [t.dtype])
    with graphs.capture(), pytest.raises(RepruneError, match="do a whole training step first"):
        pack.put_back(found[0], [(0, t, False)])
    assert not launches


def test_what_a_capture_held_that_failed_is_not_put_back(small, graphs):
    """It would have been there in a replay. The step is done without a graph, and is that of another model."""
    model, slices, x = small
    states = []

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    for failing in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        Narrowing(twin, optimizer, "triton").set(slices)
        for number in range(2):
            optimizer.zero_grad()
            F.cross_entropy(twin(x), torch.arange(4)).backward()
            if failing and number:
                handle = optimizer.register_step_pre_hook(fail)
                for _ in range(2):
                    with graphs.capture() as launches, pytest.raises(RuntimeError, match="not permitted"):
                        optimizer.step()
                    assert len(launches) == 1
                handle.remove()
            optimizer.step()
        momentum = [optimizer.state[p]["momentum_buffer"] for p in twin.parameters()]
        states.append([*twin.state_dict().values(), *momentum])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_capture_after_steps_on_the_default_stream(small, graphs, monkeypatch):
    """Works if nothing of them is left, and says what to do if something is: its gradients would go to that stream."""
    stream = types.SimpleNamespace(stream_id=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(graphs, "run", lambda *_: None)
    model, slices, x = copy.deepcopy(small[0]), *small[1:]
    Narrowing(model, None, "triton").set(slices)
    model(x).sum().backward()
    loss = model(x).sum()
    loss.backward()
    stream.stream_id = 7
    warm = model(x).sum()  # adds up on the stream of the loss before
    for _ in range(2):
        with graphs.capture(), pytest.raises(RepruneError, match="delete what holds it, such as the loss"):
            model(x)
    assert "weight" not in vars(model.conv1)
    del loss, warm
    with graphs.capture() as launches:
        loss = model(x).sum()
        loss.backward()
    assert len(launches) == 3
    with graphs.capture() as launches:  # the loss is of the stream of the capture
        model(x)
    assert len(launches) == 2
    assert not copy.deepcopy(model)._forward_pre_hooks.popitem()[1].__self__.graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_steps_are_the_same_bits(monkeypatch, dtype):
    """As without a graph, over several replays, with an event between two captures; and with as few launches."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    model, y = models.build("resnet8", num_classes=10).cuda(), torch.arange(8, device="cuda")
    model = model.to(memory_format=torch.channels_last)
    found = analysis.prunable(model, (8, 3, 16, 16))
    batches = [torch.randn(8, 3, 16, 16, device="cuda") for _ in range(4)]
    states, launches = [], []
    run = Configuration.run
    monkeypatch.setattr(Configuration, "run", lambda *a: launches.append(capture.capturing()) or run(*a))
    for captured in (False, True):
        twin, x = copy.deepcopy(model), batches[0].clone()
        optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.1, fused=True)
        narrowing = Narrowing(twin, optimizer)

        def step(twin=twin, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(twin(x).float(), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = []
        for every in (2, 3):
            active = {x.name: torch.arange(0, x.n_out, every, device="cuda") for x in found.prunable}
            narrowing.set(found.slices(active))
            capture.warm_up(step)
            launches.clear()
            replay = capture.capture(step) if captured else step
            assert not captured or launches == [True] * 5
            for batch in batches:
                x.copy_(batch)
                losses.append(replay().clone())
        states.append([*losses, *twin.state_dict().values()])
        states[-1] += [optimizer.state[p]["momentum_buffer"] for p in twin.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_captured_by_hand_after_steps_without_one():
    """With torch alone, on a stream of its own choice: nothing of the steps is left. With a loss left, it says so."""
    torch.manual_seed(0)
    model, y = models.build("resnet8", num_classes=10).cuda(), torch.arange(8, device="cuda")
    found, x = analysis.prunable(model, (8, 3, 16, 16)), torch.randn(8, 3, 16, 16, device="cuda")
    narrowing = Narrowing(model)
    narrowing.set(found.slices({x.name: torch.arange(0, x.n_out, 2, device="cuda") for x in found.prunable}))

    def step():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        step()
    graphed = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graphed):
        found = step().detach()
    graphed.replay()
    replayed = [found.clone(), *(p.grad.clone() for p in model.parameters())]
    loss = step()
    for one, other in zip(replayed, [loss, *(p.grad for p in model.parameters())], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    with pytest.raises(RepruneError, match="delete what holds it, such as the loss"):
        capture.capture(step)
    del loss
    capture.capture(step)()


# ---------------------------------------------------------------------- a whole network


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9)
        self.conv2, self.norm2 = nn.Conv2d(9, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).flatten(1))


@pytest.fixture
def small(device):
    torch.manual_seed(0)
    model, x = Small().to(device), torch.randn(4, 3, 4, 4, device=device)
    found = analysis.analyse(model, x)
    assert len(found.prunable) == 2
    return model, found.slices({x.name: torch.arange(0, x.n_out, 2, device=device) for x in found.prunable}), x


def trained(model, slices, x, impl, dtype=None, steps=3, make=None):
    """State of the model and of its optimizer after some steps, and the number of launches of the last one."""
    model = copy.deepcopy(model)
    make = make or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1))
    optimizer = make(model.parameters())
    Narrowing(model, optimizer, impl).set(slices)
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        run = Configuration.run
        patch.setattr(Configuration, "run", lambda *a: launches.append(a[0]) or run(*a))
        for _ in range(steps):
            launches.clear()
            optimizer.zero_grad()
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x).float(), torch.arange(4, device=x.device))
            loss.backward()
            optimizer.step()
    state = [t for p in model.parameters() for t in optimizer.state[p].values() if torch.is_tensor(t)]
    return [*model.state_dict().values(), *state], launches


@pytest.mark.parametrize("make", [None, lambda p: torch.optim.AdamW(p, 0.1)])
def test_a_network_trains_to_the_same_bits_in_five_launches(small, make):
    model, slices, x = small
    (mine, launches), (theirs, none) = (trained(model, slices, x, impl, make=make) for impl in ("triton", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert len(launches) == 5 and not none  # gather, statistics, gradients, hold, restore


def test_residual_blocks_train_to_the_same_bits(device):
    torch.manual_seed(0)
    model, x = models.build("resnet8", num_classes=10).double().to(device), torch.randn(4, 3, 8, 8).double().to(device)
    found = analysis.analyse(model, x)
    slices = found.slices({x.name: torch.arange(0, x.n_out, 3, device=device) for x in found.prunable})
    (mine, _), (theirs, _) = (trained(model, slices, x, impl, steps=1) for impl in ("triton", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_under_autocast_nothing_is_left_to_cast(small):
    """Whole weights arrive in bfloat16 too."""
    model, slices, x = small
    with torch.no_grad():  # numbers that the interpreter need not round
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    model = copy.deepcopy(model)
    Narrowing(model, None, "triton").set(slices)
    seen = {}

    def look(module, name, x):
        seen[name] = module.weight.dtype
        return type(module).forward(module, x)

    for name in ("conv1", "conv2", "head", "norm1"):  # hooks stand outside of ours, and see whole weights
        module = model.get_submodule(name)
        module.forward = functools.partial(look, module, name)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = model(x)
    plain = copy.deepcopy(small[0])
    Narrowing(plain, None, "torch").set(slices)
    with torch.autocast(x.device.type, torch.bfloat16):
        expected = plain(x)
    assert torch.equal(y, expected)
    assert seen == dict.fromkeys(("conv1", "conv2", "head"), torch.bfloat16) | {"norm1": torch.float32}
    y.float().sum().backward(), expected.float().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == torch.float32 and torch.allclose(a.grad, b.grad, rtol=1e-2, atol=1e-2)


def test_a_part_of_the_model_never_runs_on_old_slices(small):
    model, slices, x = small
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Narrowing(model, optimizer, "triton").set(slices)
    model(x).sum().backward()
    optimizer.step()
    expected = F.conv2d(x, gather(model.conv1.weight, [(0, slices["conv1"].out)]), padding=1)
    assert torch.equal(model.conv1(x), expected)
    with torch.no_grad():
        model.conv1.weight.data.mul_(2)  # which no version tells
        assert torch.equal(model.conv1(x), 2 * expected)
    model.conv1(x).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_copies_checkpointing_and_parts_without_autocast(small):
    model, slices, x = small
    Narrowing(model, None, "triton").set(slices)
    model(x)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin.conv1.weight.zero_()
        assert not torch.equal(twin(x), model.eval()(x)), "the copy gathers its own weights"
    model.train()
    saved = copy.deepcopy(model.state_dict())
    grads = []
    for checkpointed in (False, True):
        model.load_state_dict(saved)
        model.zero_grad()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    class Parts(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.body.conv1, x, use_reentrant=False)
            with torch.autocast(x.device.type, enabled=False):
                hidden = F.relu(self.body.norm1(hidden.float()))
                hidden = F.relu(self.body.norm2(self.body.conv2(hidden)))
            return self.body.head(hidden.flatten(1))

    results = []
    for impl in ("torch", "triton"):
        parts = Parts(copy.deepcopy(small[0]))
        for hooked in parts.modules():
            hooked._forward_hooks.clear(), hooked._forward_pre_hooks.clear()
        Narrowing(parts, None, impl).set({f"body.{name}": part for name, part in slices.items()})
        with torch.autocast(x.device.type, torch.bfloat16):
            y = parts(x)
        y.float().sum().backward()
        assert all(p.grad is not None for p in parts.parameters())
        results.append(y)
    assert torch.allclose(*results, rtol=0.1, atol=0.1)


def test_a_functional_call_and_an_exception(small):
    model, slices, x = small
    Narrowing(model, None, "triton").set(slices)
    model.eval()
    expected = model(x)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, doubled, (x,))
    assert not torch.equal(y, expected) and torch.equal(model(x), expected)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, 4, 4, device=x.device))
    assert torch.equal(model(x), expected) and "weight" not in vars(model.conv1)


class Checkpointed(Small):
    """Some of its modules run again in the backward."""

    reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=self.reentrant)
        x = F.relu(again(self.norm1, again(self.conv1, x)))
        return self.head(F.relu(self.norm2(again(self.conv2, x))).flatten(1))


def backwards(model, x, how):
    """Several ways to come to gradients, or to none."""
    checkpoint = torch.utils.checkpoint.checkpoint
    if how == "accumulated":
        for _ in range(2):
            model(x).sum().backward()
    elif how == "retained":
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    elif how == "of two forwards":
        (model(x) + model(-x)).sum().backward()
    elif how == "none":
        model(x)
    elif how == "no grad":
        with torch.no_grad():
            model(x)
    elif how == "of a part":
        model(x)
        model.conv1(x).sum().backward()
    elif how == "an exception":
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 3, 5, 5, device=x.device))
    elif how.startswith("checkpoint"):
        model.__class__, model.reentrant = Checkpointed, "reentrant" in how
        whole = how.endswith("whole")
        loss = (checkpoint(model, x, use_reentrant=False) if whole else model(x.requires_grad_())).sum()
        loss.backward(retain_graph=not model.reentrant)
        if not model.reentrant:
            loss.backward()
    elif how == "an event":
        model(x).sum().backward()
        model.narrowing.set({})


@pytest.mark.parametrize("how", [
    "accumulated", "retained", "of two forwards", "none", "no grad", "of a part", "an exception", "checkpoint",
    "checkpoint, reentrant", "checkpoint, whole", "an event",
])  # fmt: skip
def test_nothing_of_a_step_is_kept_after_it(small, monkeypatch, how):
    """Nor is anything in a cycle that only the collector finds: its nodes of autograd would add up later gradients on
    the stream of that step."""
    monkeypatch.setattr(Configuration, "run", lambda *_: None)  # what is computed does not matter
    model, slices, x = copy.deepcopy(small[0]), *small[1:]
    model.narrowing = Narrowing(model, None, "triton")
    model.narrowing.set(slices)
    kept = []

    def look(module, forward, h):
        part = module.__dict__["weight"]
        kept.append(weakref.ref(part))
        if isinstance(part.grad_fn, torch.autograd.function.BackwardCFunction):  # nodes in C++ know no weak references
            kept.append(weakref.ref(part.grad_fn))
        return forward(h)

    for name in ("conv1", "conv2", "norm1"):
        module = model.get_submodule(name)
        module.forward = functools.partial(look, module, module.forward)
    gc.collect()
    gc.disable()
    try:
        backwards(model, x, how)
        assert kept and all(thing() is None for thing in kept)
    finally:
        gc.enable()


def test_an_interrupt_in_a_forward_is_forgotten_in_the_next(small):
    """After KeyboardInterrupt torch calls no hook."""
    model, slices, x = small
    results = []
    for interrupted in (False, True):
        for impl in ("torch", "triton"):
            twin = copy.deepcopy(model)
            Narrowing(twin, None, impl).set(slices)
            if interrupted:
                twin.conv2.forward = lambda h: signal.raise_signal(signal.SIGINT)
                with pytest.raises(KeyboardInterrupt):
                    twin(x)
                del twin.conv2.forward
                twin.load_state_dict(model.state_dict())
            results.append(twin(x))
            assert "weight" not in vars(twin.conv2) and twin.norm2.num_features == 6
    assert all(torch.equal(a, results[0]) for a in results)


def test_checkpointing_gathers_again_what_the_forward_had(small):
    """Under autocast, with whole weights among them, in both ways, several times; and a part that ran alone."""
    model, slices, x = small
    slices = {"conv1": slices["conv1"], "norm1": slices["norm1"], "conv2": Slice(None, slices["conv2"].in_)}
    with torch.no_grad():  # numbers that the interpreter need not round
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    grads = []
    for reentrant in (None, False, True):
        twin = copy.deepcopy(model)
        Narrowing(twin, None, "triton").set(slices)
        twin.__class__, twin.reentrant = Checkpointed, reentrant
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = twin(x.requires_grad_()).float().square().sum() + twin.conv1(x).float().square().sum()
        for again in (True, False):
            loss.backward(retain_graph=again) if not reentrant else again or loss.backward()
        grads.append([p.grad.clone() / (1 if reentrant else 2) for p in twin.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


class Standardised(nn.Conv2d):
    def forward(self, x):
        assert self.weight.dtype == torch.float32, "it computes with its weight before autocast would cast it"
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_other_ways_to_run_a_model(small):
    """A convolution of another class, inference, fake tensors, vmap, and compiled code after an eager step."""
    model, slices, x = small
    other = copy.deepcopy(model)
    other.conv1.__class__ = Standardised
    results = []
    for impl in ("torch", "triton"):
        twin, odd = copy.deepcopy(model), copy.deepcopy(other)
        Narrowing(twin, None, impl).set(slices)
        Narrowing(odd, None, impl).set(slices)
        with torch.autocast(x.device.type, torch.bfloat16):
            odd(x)
        twin(x).sum().backward()
        with torch.inference_mode():
            found = [copy.deepcopy(twin).eval()(x)]
        twin.eval()
        found.append(torch.func.vmap(lambda image, twin=twin: twin(image[None])[0])(x))
        # Before 2.12 torch.compile breaks its graph at the hooks anyway.
        whole = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
        found.append(torch.compile(twin, backend="eager", fullgraph=whole)(x))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert twin(mode.from_tensor(x)).shape == found[0].shape
        results.append(found)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Meeting(nn.Conv2d):
    """Lets others in before it reads its weight, as `padding_mode="reflect"` does."""

    def forward(self, x):
        self.pause()
        return super().forward(x)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("where", ["inside", "between"])
def test_a_thread_gets_no_slices_of_another(small, impl, where):
    """One that measures comes by while another one trains: inside a module, and between modules."""
    model, slices, x = small
    model.eval()
    Narrowing(model, None, impl).set(slices)
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), model.parameters())
    waiting, done, found = threading.Event(), threading.Event(), []

    def measure():
        with torch.no_grad():
            found.append(model(x))

    other = threading.Thread(target=measure)

    def pause(*_):
        if threading.current_thread() is other:
            waiting.set()
            done.wait(10)
        elif not other.is_alive() and not found:
            other.start()
            waiting.wait(0.2 if where == "inside" else 10)  # inside it must wait for us

    if where == "inside":
        model.conv2.__class__, model.conv2.pause = Meeting, pause
    else:
        model.norm1.register_forward_pre_hook(pause)
    loss = model(x).square().sum()
    own = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    done.set()
    other.join()
    assert all(a is not None and torch.equal(a, b) for a, b in zip(own, gradients, strict=True))
    assert torch.equal(found[0], expected)
    assert not any("weight" in vars(module) for module in model.modules())


# ---------------------------------------------------------------------- ahead of time

PROGRAM = """
import json, sys
from reprune_triton.kernels import compiled
from reprune_triton.kernels.step import pack
for target in sys.argv[1:]:
    kinds = [(to_buffer, wide) for to_buffer in (True, False) for wide in (False, True)]
    binaries = [compiled.build(pack.configuration(*kind), target, {"buffer_ptr": "*u8"}) for kind in kinds]
    codes = compiled.machine_codes(binaries) if target.startswith("sm") else [[]] * len(binaries)
    for (_, wide), binary, code in zip(kinds, binaries, codes):
        print(json.dumps({"target": target, "wide": wide} | compiled.resources(binary, code)._asdict()))
"""


def test_it_compiles_without_spills():
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    rows = apart.run(PROGRAM, *targets)
    assert len(rows) == 4 * len(targets)
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 128, row
