"""BatchNorm, addition and activation in one operation are the three of PyTorch, and a fused network is the network."""

import apart
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reprune_triton.errors import RepruneError
from reprune_triton.fused import norm

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
    from reprune_triton.kernels.step import norm_act

    x = torch.randn(2, 3, 163, 167, generator=torch.Generator().manual_seed(0)).to(device) + 50
    x = x.contiguous(memory_format=torch.channels_last)
    rows = norm_act._Rows(x.shape, x.dtype)
    assert rows.chunks > 100 and rows.each > dict(rows.constants)["BLOCK_M"] and rows.M % rows.each > 0
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("act", norm.ACTIVATIONS)
def test_two_readers_share_one_tensor_and_their_gradients_are_added(device, act, with_residual, training):
    def run(x, residual, weight, bias, kernels, used):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias, residual)[: 4 if with_residual else 3]]
        running = [torch.full((x.shape[1],), value, dtype=x.dtype, device=device) for value in (1.0, 2.0)]
        bn = norm.BatchNorm(*inputs[1:3], *running, training, 0.3, 1e-5, act)
        given = inputs[3] if with_residual else None
        if kernels:
            both = norm.normalise_twice(inputs[0], norm.normaliser(inputs[0], bn), given)
            assert both[0].data_ptr() == both[1].data_ptr() and both[0] is not both[1]
        else:
            both = (norm.by_pytorch(inputs[0], given, bn),) * 2
        loss = sum((y * torch.sin(torch.arange(y.numel(), device=device)).view_as(y) * (i + 1)).sum()
                   for i, y in enumerate(both) if i in used)  # fmt: skip
        return [both[0].detach(), *torch.autograd.grad(loss, inputs)]

    for shape in (SHAPES[0], SHAPES[2]):  # channels that fill no block, and more than one
        given = operands(shape, device)
        for used in ((0, 1), (0,), (1,)):
            found, expected = (run(*given, kernels, used) for kernels in (True, False))
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (shape, used)


def test_statistics_that_are_known_are_not_counted_again(device, monkeypatch):
    x, residual, weight, bias = operands((3, 4, 5, 6), device)
    bn = norm.BatchNorm(weight, bias, torch.zeros_like(bias), torch.ones_like(bias), True, 0.3, 1e-5, "relu")
    stats = norm.measure(x.detach(), 1e-5)
    expected = outcome(x, residual, weight, bias, "torch")
    monkeypatch.setattr(norm, "measure", None)
    y = norm.normalise(x, norm.normaliser(x, bn, stats), residual)
    assert torch.allclose(y, expected[0])
    assert torch.allclose(bn.running_mean, 0.3 * x.mean((0, 2, 3)))
    assert torch.allclose(bn.running_var, 0.7 + 0.3 * x.var((0, 2, 3)))


def test_the_operators_are_well_formed(device):
    x, residual, weight, bias = (t.detach() for t in operands((2, 3, 4, 5), device, torch.float32))
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(norm.measure.op, (x, 1e-5), test_utils=tests)
    mean, rstd = torch.zeros(3, device=device), torch.ones(3, device=device)
    for other, y in ((None, None), (residual, x), (None, x), (residual, None)):
        torch.library.opcheck(norm.apply_norm.op, (x, other, mean, rstd, weight, bias, "relu"), test_utils=tests)
        given = (x, other, x, y, mean, rstd, weight, bias, "relu", True)
        torch.library.opcheck(norm.norm_act_backward.op, given, test_utils=tests)


def test_whoever_looks_at_operators_sees_ours(device):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 4, 5, device=device)
    seen = []
    with Names():
        looked_at = norm.measure(x, 1e-5)
    assert "reprune.statistics.default" in seen
    assert all(torch.equal(a, b) for a, b in zip(norm.measure(x, 1e-5), looked_at, strict=True))
    with FakeTensorMode() as mode:
        assert norm.measure(mode.from_tensor(x), 1e-5)[0].shape == (3,)


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


# ---------------------------------------------------------------------- ahead of time

PROGRAM = """
import json, sys
from reprune_triton.kernels import compiled
from reprune_triton.kernels.step import norm_act
configurations = list(norm_act.configurations())
binaries = [compiled.build_training(config, sys.argv[1]) for config in configurations]
codes = compiled.machine_codes(binaries) if sys.argv[1].startswith("sm") else [[]] * len(binaries)
for config, binary, code in zip(configurations, binaries, codes):
    print(json.dumps({"kernel": config.kernel.__name__, "constants": dict(config.constants),
                      "resources": compiled.resources(binary, code)._asdict(), "code": code}))
"""


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def built():
    """What PROGRAM prints, for every target."""
    return dict(zip(TARGETS, apart.run_each(PROGRAM, [[target] for target in TARGETS]), strict=True))


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
