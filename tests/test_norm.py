"""BatchNorm, addition and activation in one operation are the three of PyTorch, and a fused network is the network."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from reprune_triton import REPrune, fuse, models, norm, unfuse
from reprune_triton.errors import RepruneError

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(3, 19, 5, 7), (2, 1, 3, 5), (2, 70, 4, 4), (1, 16, 1, 2), (9, 33, 13, 11), (2, 5, 1, 1)]


def operands(shape, device, dtype=torch.float64, mean=2.0, std=3.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    c = shape[1]
    x, residual = draw(*shape) * std + mean, draw(*shape)
    found = [x.to(dtype), residual.to(dtype), draw(c).float().to(dtype), draw(c).float().to(dtype)]
    return [tensor.to(device).requires_grad_() for tensor in found]


def outcome(x, residual, weight, bias, impl, act="relu", training=True, dtype=torch.float64):
    """Output, running averages and all gradients."""
    given = [tensor for tensor in (x, residual, weight, bias) if tensor is not None]
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
    x, weight, bias = inputs[0], inputs[-2], inputs[-1]
    residual = inputs[1] if len(inputs) == 4 else None
    running = [torch.full_like(weight, value).detach() for value in (1.0, 2.0)]
    y = norm.batch_norm_act(x, weight, bias, *running, residual, act, training, 0.3, 1e-5, impl)
    factors = torch.sin(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
    return [y.detach(), *running, *torch.autograd.grad((y * factors).sum(), inputs)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("act", norm.ACTIVATIONS)
def test_the_kernels_do_what_pytorch_does(device, act, with_residual, training):
    for shape in SHAPES:
        x, residual, weight, bias = operands(shape, device)
        residual = residual if with_residual else None
        expected = outcome(x, residual, weight, bias, "torch", act, training)
        found = outcome(x, residual, weight, bias, "triton", act, training)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (100.0, 0.5)])
def test_errors_are_no_larger_than_pytorchs(device, dtype, mean, std):
    """Against float64 on the same rounded numbers; with a mean far from zero too, where a sum of squares fails."""
    shape = (9, 20, 13, 11)
    rounded = [t.detach().to(dtype) for t in operands(shape, device, torch.float64, mean, std)]
    exact = outcome(*rounded, "torch", "none")
    found, peer = (outcome(*rounded, impl, "none", dtype=dtype) for impl in ("triton", "torch"))
    for mine, theirs, truth in zip(found, peer, exact, strict=True):
        scale = truth.abs().max()
        error, allowed = ((t.double() - truth).abs().max() / scale for t in (mine, theirs))
        # On a CPU PyTorch sums in float64, hence the second term. A sum of squares would be off by 1e-3.
        assert error <= 2 * allowed + max(torch.finfo(dtype).eps, 4e-6)


def test_many_chunks_are_merged(device):
    """More rows than one program takes, the last chunk not full; the statistics themselves, to the last digits."""
    from reprune_triton.kernels import norm_act

    x = torch.randn(2, 3, 231, 307, generator=torch.Generator().manual_seed(0)).to(device) + 50
    x = x.contiguous(memory_format=torch.channels_last)
    assert norm_act._Rows(x).chunks > 100
    mean, rstd, unbiased = norm_act.statistics(x, 1e-5)
    rows = x.double().permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(mean.double(), rows.mean(1), rtol=2e-7, atol=0)
    assert torch.allclose(unbiased.double(), rows.var(1), rtol=1e-6, atol=0)
    assert torch.allclose(rstd.double(), (rows.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    again = norm_act.statistics(x, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip((mean, rstd, unbiased), again, strict=True))


@pytest.mark.parametrize("act, with_residual", [("relu", True), ("relu6", False), ("none", True)])
def test_gradcheck(device, act, with_residual):
    x, residual, weight, bias = operands((2, 3, 2, 3), device)

    def function(x, residual, weight, bias):
        return norm.batch_norm_act(x, weight, bias, None, None, residual if with_residual else None, act, impl="triton")

    assert torch.autograd.gradcheck(function, (x, residual, weight, bias))


def test_the_operators_are_well_formed(device):
    x, residual, weight, bias = operands((2, 3, 4, 5), device, torch.float32)
    x, residual = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, residual))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for other in (residual, None):
        torch.library.opcheck(norm._norm_act, (x, other, weight, bias, 1e-5, "relu"), test_utils=tests)
        mean, rstd = torch.zeros(3, device=device), torch.ones(3, device=device)
        torch.library.opcheck(norm._normalise, (x, other, mean, rstd, weight, bias, "relu"), test_utils=tests)
        y = None if other is None else x.detach()
        given = [t.detach() for t in (x, x)], [t.detach() for t in (mean, rstd, weight, bias)]
        torch.library.opcheck(norm._backward, (*given[0], y, *given[1], "relu", True), test_utils=tests)


def test_nan_goes_through(device):
    x, residual, weight, bias = operands((2, 3, 4, 4), device, torch.float32)
    with torch.no_grad():
        x[0, 1, 0, 0] = float("nan")
    y = norm.batch_norm_act(x, weight, bias, None, None, residual, "relu", impl="triton")
    assert y[:, 1].isnan().all() and not y[:, 0].isnan().any()


def test_what_cannot_run_says_why(device):
    x, residual, weight, bias = operands((2, 3, 4, 4), device, torch.float32)
    with pytest.raises(RepruneError, match="act must be one of"):
        norm.batch_norm_act(x, weight, bias, None, None, act="silu")
    with pytest.raises(RepruneError, match="3 dimensions"):
        norm.batch_norm_act(x[0], weight, bias, None, None, impl="triton")
    with pytest.raises(RepruneError, match="no weight and bias"):
        norm.batch_norm_act(x, None, None, None, None, impl="triton")
    with pytest.raises(RepruneError, match="the residual is"):
        norm.batch_norm_act(x, weight, bias, None, None, residual[:1], impl="triton")
    for impl in ("torch", "triton"):
        with pytest.raises(ValueError, match="more than 1 value"):
            norm.batch_norm_act(x[:1, :, :1, :1], weight, bias, None, None, impl=impl)
    assert norm.batch_norm_act(x[:, :, :0], weight, bias, None, None, training=True, impl="auto").numel() == 0


# ---------------------------------------------------------------------- a whole network

NETS = {  # how to build it; how many operations remain behind BatchNorms that are not fused into them
    "resnet8": lambda: models.build("resnet8", num_classes=10),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.0),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=10, dropout=0.0).features,
}


@pytest.mark.parametrize("name", NETS)
def test_a_fused_network_is_the_network(name):
    torch.manual_seed(0)
    plain = NETS[name]().double()
    fused = fuse(copy.deepcopy(plain), impl="torch")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        a, b = plain(x), fused(x)
        assert torch.equal(a, b)
        grads = (torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((a, plain), (b, fused)))
        assert all(torch.equal(u, v) for u, v in zip(*grads, strict=True))
    assert list(plain.state_dict()) == list(fused.state_dict()) and repr(plain) == repr(fused)
    assert all(torch.equal(u, v) for u, v in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True))


def operations(model, x, impl):
    """The ReLUs and additions of activations that run apart from a BatchNorm, and the calls of the fused operation."""
    calls, apart = [], []
    original = norm.batch_norm_act
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "batch_norm_act", lambda *a: calls.append(a[5:7]) or original(*a))
        handles = [
            m.register_forward_hook(lambda *_: apart.append(1)) for m in model.modules() if isinstance(m, nn.ReLU)
        ]
        model(x)
        for handle in handles:
            handle.remove()
    return len(apart), [(residual is not None, act) for residual, act in calls]


def test_additions_and_activations_are_taken_in():
    model = fuse(torchvision.models.resnet50(num_classes=10), impl="torch")
    apart, calls = operations(model, torch.randn(2, 3, 32, 32), "torch")
    assert apart == 0
    assert calls.count((True, "relu")) == 16 and calls.count((False, "none")) == 4  # blocks, and their shortcuts
    assert calls.count((False, "relu")) == 33 and len(calls) == 53
    model = fuse(torchvision.models.mobilenet_v2(num_classes=10), impl="torch")
    _, calls = operations(model, torch.randn(2, 3, 32, 32), "torch")
    assert calls.count((True, "none")) == 10 and calls.count((False, "relu6")) == 35 and len(calls) == 52


def test_through_the_kernels_a_pruned_network_trains_alike(device):
    """Narrow, then physically narrow, in float64: fused by the kernels, and as it is."""

    def run(impl):
        torch.manual_seed(0)
        model = models.build("resnet8", num_classes=10).double().to(device)
        x, y = torch.randn(3, 3, 8, 8, dtype=torch.float64).to(device), torch.arange(3, device=device)
        model = model if impl is None else fuse(model, impl)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        pruner = REPrune(
            model, optimizer, example_inputs=x, sparsity=0.5, until=2, every=1, compact="auto", tie="index", round_to=1
        )  # fmt: skip
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            pruner.step()
        return losses, model.state_dict(), pruner.explain()

    (a, state, reasons), (b, fused_state, fused_reasons) = run(None), run("triton")
    assert reasons == fused_reasons and b == pytest.approx(a, rel=1e-9)
    assert all(torch.allclose(state[key], fused_state[key], rtol=1e-7, atol=1e-9) for key in state)


def test_a_copy_and_unfuse():
    torch.manual_seed(0)
    model = fuse(models.build("resnet8", num_classes=10), impl="torch")
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    model.eval(), twin.eval()
    assert not torch.equal(model(x), twin(x)), "the copy runs on its own weights"
    expected = model(x)
    assert unfuse(model) is model and "forward" not in vars(model) and "forward" not in vars(model.bn1)
    assert torch.equal(model(x), expected)


def test_momentum_none_is_the_plain_average(device):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).to(device)
    fused = fuse(copy.deepcopy(plain), impl="triton")
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, device=device)
        assert torch.allclose(fused(x), plain(x), atol=1e-5)
    for a, b in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Branching(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.norm, self.on = nn.BatchNorm2d(3), on

    def forward(self, x):
        y = self.norm(x)
        return F.relu(y) if (self.training if self.on == "mode" else x.sum() > 0) else y


@pytest.mark.parametrize("on, message", [("mode", "another way in training"), ("values", "cannot trace Branching")])
def test_a_forward_that_cannot_be_traced_is_refused(on, message):
    model = Branching(on)
    with pytest.raises(RepruneError, match=message):
        fuse(model)
    assert "forward" not in vars(model.norm) and model.training


def test_a_batchnorm_that_others_read_or_that_runs_twice_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.one(x)
            z = torch.relu(y) + y  # y is read twice
            return self.two(torch.relu(self.two(z)))  # and `two` runs twice

    torch.manual_seed(0)
    plain, x = Net().eval(), torch.randn(2, 3, 4, 4)
    assert torch.equal(fuse(copy.deepcopy(plain), impl="torch")(x), plain(x))


# ---------------------------------------------------------------------- ahead of time

PROGRAM = """
import json, sys
from reprune_triton.kernels import compiled, norm_act
types = {name: "*bf16" for name in ("x_ptr", "y_ptr", "residual_ptr", "grad_ptr", "grad_x_ptr", "grad_residual_ptr")}
types |= {name: "*fp32" for name in ("mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "partial_ptr", "sums_ptr")}
types |= {"combined_ptr": "*fp32", "unbiased_ptr": "*fp32", "eps": "fp32"}
types |= dict.fromkeys(("M", "C", "each", "chunks"), "i32")
for config in norm_act.configurations():
    names = config.kernel.arg_names
    aligned = [name for name in names if name.endswith("_ptr") or name == "C"]
    binary = compiled.build(config, sys.argv[1], types, aligned)
    code = compiled.machine_code(binary) if "cubin" in binary.asm else []
    print(json.dumps({"kernel": config.kernel.__name__, "constants": dict(config.constants),
                      "resources": compiled.resources(binary)._asdict(), "code": code}))
"""


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compile_all(target, cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{target}: {done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What PROGRAM prints, for every target; two compilers at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda target: compile_all(target, tmp_path_factory.mktemp(target)), TARGETS)
        return dict(zip(TARGETS, found, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_without_spills_and_reads_wide(target, built):
    rows = built[target]
    merging = {"combine_kernel", "merge_kernel"}
    kernels = merging | {"statistics_kernel", "apply_kernel", "sums_kernel", "gradient_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        name, found = f"{row['kernel']} {row['constants']}", row["resources"]
        assert found["spills"] == 0, name
        if target.startswith("sm"):
            assert found["registers"] <= 128, name  # four programs of 4 warps at once on an SM
            if row["kernel"] not in merging:  # bf16 activations: 8 values a load
                assert any(".128" in line for line in row["code"] if line.startswith("LDG")), name
                narrow = [line for line in row["code"] if line.startswith("LDG") and ".U16" in line]
                assert not narrow, name
