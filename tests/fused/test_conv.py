"""The convolution of active channels is PyTorch's own on the gathered weight, and so is what is fused around it."""

import re
from functools import partial

import apart
import pytest
import torch
import triton
from torch.nn import functional as F

from reprune_triton import ops
from reprune_triton.errors import RepruneError
from reprune_triton.fused import conv
from reprune_triton.fused.norm import ACTIVATIONS, Norm

# B, input and output channels, H, W, kernel, stride, padding, dilation
CASES = {
    "1x1": (2, 19, 37, 5, 7, (1, 1), 1, 0, 1),
    "1x1 of one channel": (3, 1, 1, 5, 3, (1, 1), 1, 0, 1),
    "1x1, stride 2": (2, 5, 34, 6, 5, (1, 1), 2, 0, 1),
    "1x1, padded": (1, 3, 4, 3, 4, (1, 1), 1, 1, 1),
    "3x3": (2, 19, 5, 6, 5, (3, 3), 1, 1, 1),
    "3x3, stride 2": (3, 7, 3, 7, 8, (3, 3), 2, 1, 1),
    "3x3, dilation 2": (1, 4, 6, 7, 6, (3, 3), 1, 2, 2),
    "3x3, stride 2, dilation 2": (1, 3, 2, 9, 8, (3, 3), 2, 2, 2),
    "3x3, stride 3, dilation 2": (1, 2, 3, 11, 8, (3, 3), (3, 2), (2, 0), (2, 3)),
    "5x5, no padding": (2, 3, 4, 6, 7, (5, 5), 1, 0, 1),
    "1x3": (2, 5, 4, 4, 7, (1, 3), (2, 1), (0, 1), (1, 2)),
    "3x1, more padding than kernel": (1, 2, 3, 4, 3, (3, 1), 1, (3, 1), 1),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(case, device, dtype=torch.float64):
    B, n_in, n_out, H, W, kernel, *moves = case
    x, weight = draw(B, n_in, H, W) * 3 + 1, draw(n_out, n_in, *kernel, seed=1)
    return x.to(device, dtype), weight.to(device, dtype), moves


def vectors(C, device, dtype=torch.float64):
    """mean, rstd, gamma and beta; some gammas are negative."""
    mean, rstd, gamma, beta = (draw(C, seed=seed).to(device, dtype) for seed in range(2, 6))
    return mean, rstd.abs() + 0.1, gamma, beta


def outcome(function, *inputs):
    """What a function returns, and the gradients of its first result with some factors."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y, *others = function(*inputs)
    factors = torch.sin(torch.arange(1, y.numel() + 1, device=y.device)).view(y.shape).to(y.dtype)
    return [y.detach(), *others, *torch.autograd.grad((y * factors).sum(), inputs, materialize_grads=True)]


def close(found, expected):
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_do_what_pytorch_does(device, name):
    x, weight, moves = operands(CASES[name], device)
    found = outcome(lambda x, w: [ops.masked_conv2d(x, w, None, None, *moves, impl="triton")], x, weight)
    assert close(found, outcome(lambda x, w: [F.conv2d(x, w, None, *moves)], x, weight))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_pruned_positions_have_no_gradient(device, impl):
    x, full = draw(2, 3, 4, 5).to(device), draw(9, 7, 3, 3).to(device)
    out, into = torch.tensor([0, 3, 4, 8], device=device), torch.tensor([1, 2, 6], device=device)

    def reference(x, weight):
        return [F.conv2d(x, weight[out][:, into], padding=1)]

    for given in (full, full.contiguous(memory_format=torch.channels_last)):
        found = outcome(lambda x, w: [ops.masked_conv2d(x, w, out, into, padding=1, impl=impl)], x, given)
        assert close(found, outcome(reference, x, full))
        pruned = torch.ones_like(full, dtype=torch.bool)
        pruned[out[:, None], into] = False
        assert (found[2][pruned] == 0).all() and (found[2][~pruned] != 0).all()
    rows = ops.masked_conv2d(draw(2, 7, 4, 5).to(device), full, out_index=out, impl=impl)
    assert torch.allclose(rows, F.conv2d(draw(2, 7, 4, 5).to(device), full[out]))
    columns = ops.masked_conv2d(x, full, in_index=into, impl=impl)
    assert torch.allclose(columns, F.conv2d(x, full[:, into]))


@pytest.mark.parametrize("name", ["1x1", "1x1 of one channel", "1x1, padded", "3x3", "3x3, stride 2", "1x3"])
@pytest.mark.parametrize("batch", [True, False])
def test_normalisation_and_activation_in_front(device, name, batch):
    """By the formula, with the statistics as functions of x; by both implementations."""
    x, weight, moves = operands(CASES[name], device)
    mean, rstd, gamma, beta = vectors(x.shape[1], device)
    if batch:
        mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()

    def formula(x, weight, gamma, beta, clamp):
        own = [x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()] if batch else [mean, rstd]
        a, b, c, d = (vector[:, None, None] for vector in (*own, gamma, beta))
        value = (x - a) * b * c + d
        return [F.conv2d(clamp(value), weight, None, *moves)]

    for act, clamp in (("none", lambda v: v), ("relu", F.relu), ("relu6", F.relu6)):
        expected = outcome(partial(formula, clamp=clamp), x, weight, gamma, beta)
        for impl in ("torch", "triton"):

            def function(x, weight, gamma, beta, act=act, impl=impl):
                norm = Norm(mean, rstd, gamma, beta, act, batch)
                return [conv.norm_act_conv2d(x, weight, norm, *moves, impl=impl)[0]]

            assert close(outcome(function, x, weight, gamma, beta), expected), (act, impl)


@pytest.mark.parametrize("name", ["1x1", "1x1 of one channel", "3x3", "3x3, stride 2"])
@pytest.mark.parametrize("normalised", [True, False])
def test_statistics_behind(device, name, normalised):
    x, weight, moves = operands(CASES[name], device)
    norm = Norm(*vectors(x.shape[1], device), "relu", False) if normalised else None
    for impl in ("torch", "triton"):
        y, stats = conv.norm_act_conv2d(x, weight.requires_grad_(), norm, *moves, stats_eps=1e-3, impl=impl)
        assert y.requires_grad and not any(vector.requires_grad for vector in stats)
        expected = [y.mean((0, 2, 3)), (y.var((0, 2, 3), correction=0) + 1e-3).rsqrt(), y.var((0, 2, 3))]
        assert close(stats, expected), impl


@pytest.mark.parametrize("name", ["1x1", "1x1, stride 2", "3x3", "3x3, stride 2"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_a_normalisation_that_is_written(device, name, with_residual, batch):
    """For a residual, for another reader, for both; with the gradients of both readers, and of one alone."""
    x, weight, moves = operands(CASES[name], device)
    mean, rstd, gamma, beta = vectors(x.shape[1], device)
    moves = tuple(conv._pair(key, size) for key, size in zip(("stride", "padding", "dilation"), moves, strict=True))
    if batch:
        mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    inputs = [x, weight, gamma, beta] + [draw(*x.shape, seed=9).to(device)] * with_residual

    def formula(act, x, weight, gamma, beta, residual=None):
        own = [x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()] if batch else [mean, rstd]
        a, b, c, d = (vector[:, None, None] for vector in (*own, gamma, beta))
        value = ACTIVATIONS[act]((x - a) * b * c + d + (0 if residual is None else residual))
        return F.conv2d(value, weight, None, *moves), value

    def found(act, how, shared, x, weight, gamma, beta, residual=None):
        own = Norm(mean, rstd, gamma, beta, act, batch)
        y, stats, written = conv.run(x, weight, own, moves, 1e-3, how, residual, shared)
        assert (written is not None) == shared
        assert torch.allclose(stats[0], y.mean((0, 2, 3))) and not stats[0].requires_grad
        return y, written

    for act in ACTIVATIONS:
        for how, used in [(how, used) for how in ("mixed", "triton") for used in ((0, 1), (0,), (1,))]:
            shared = 1 in used

            def some(function, used=used):
                def run(*given):
                    outputs = function(*given)
                    return [sum(((i + 1) * torch.sin(outputs[i] + i)).sum() for i in used)]

                return run

            expected = outcome(some(partial(formula, act)), *inputs)
            assert all(gradient.any() for gradient in expected[3 if used == (1,) else 1 :])
            mine = outcome(some(partial(found, act, how, shared)), *inputs)
            assert close(mine, expected), (act, how, used)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_thousands_of_tiles_are_merged(device, dtype):
    """In three rounds, the last chunk not full; as exact as two passes, with a mean far from zero."""
    from reprune_triton.kernels.step import norm_act

    x = (draw(140001, 2) + 50).to(device, dtype)
    assert -(-len(x) // 2) > norm_act.CHUNKS**2
    pairs = torch.cat((x, x[-1:])).view(-1, 2, 2)
    chunks = torch.stack((pairs.mean(1), (pairs - pairs.mean(1, keepdim=True)).square().sum(1)), 1)
    mean, rstd, unbiased = norm_act.merge(chunks, len(x), 2, 1e-5)
    exact = x.double()
    near = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0}
    assert torch.allclose(mean.double(), exact.mean(0), **near)
    assert torch.allclose(unbiased.double(), exact.var(0), **near)
    assert torch.allclose(rstd.double(), (exact.var(0, correction=0) + 1e-5).rsqrt(), **near)


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


@pytest.fixture
def float32_convolutions():
    """How PyTorch computes them, and so we; put back afterwards."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield torch.backends.cudnn.conv
    torch.backends.cudnn.conv.fp32_precision = before


def nearest_tf32(x):
    """Of two that are as near, the one further from zero."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


class _Tf32(torch.autograd.Function):
    """Rounds a tensor, or the gradient that comes back through it."""

    @staticmethod
    def forward(ctx, x, there):
        ctx.there = there
        return nearest_tf32(x) if there else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.there else nearest_tf32(grad), None


def as_cudnn(x, weight, *others):
    """A convolution as cuDNN computes it with TF32, where there is no cuDNN."""
    return _Tf32.apply(torch.conv2d(_Tf32.apply(x, True), _Tf32.apply(weight, True), *others), False)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, as the interpreter
@pytest.mark.parametrize("kernel", [1, 3])
def test_operands_are_rounded_to_tf32(device, kernel, float32_convolutions):
    """To the nearest, where tensor cores by themselves cut off: with errors three times as large, all one way."""
    float32_convolutions.fp32_precision = "tf32"
    x, weight, moves = operands((2, 35, 20, 5, 6, (kernel, kernel), 1, kernel // 2, 1), device, torch.float32)
    x[0, :2, 0, 0] = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11])  # in the middle
    grad = draw(2, 20, 5, 6, seed=7).to(device, torch.float32)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = ops.masked_conv2d(x, weight, None, None, *moves, impl="triton")
    found = [y, *torch.autograd.grad(y, (x, weight), grad)]
    wide = [nearest_tf32(tensor.detach()).double().requires_grad_() for tensor in (x, weight)]
    exact = F.conv2d(*wide, None, *moves)
    exact = [exact, *torch.autograd.grad(exact, wide, nearest_tf32(grad).double())]
    for mine, truth in zip(found, exact, strict=True):
        assert (mine - truth).abs().max() <= 1e-5 * truth.abs().max()
    bad = x.detach().clone()
    bad[0, 3, 2, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what a GPU computes
    bad[1, 3, 2, 2] = torch.inf
    y = ops.masked_conv2d(bad, weight.detach(), None, None, *moves, impl="triton")
    assert y[0, :, 2, 2].isnan().all() and y[1, :, 2, 2].isinf().all()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    "kind, tile", [("bf16", "small"), ("bf16", "large"), ("fp16", "large"), ("tf32", "large"), ("ieee", "exact")]
)
def test_errors_are_no_larger_than_pytorchs(device, kind, tile, kernel, float32_convolutions, unplanned, monkeypatch):
    """Against float64 on the same rounded numbers, gradients and statistics too, with every tile there is."""
    from reprune_triton.kernels.step import masked_conv

    float32_convolutions.fp32_precision = "ieee" if kind == "ieee" else "tf32"
    monkeypatch.setattr(masked_conv, "_FEW", 0 if tile == "large" else 1000)
    dtype, channels = TYPES[kind], 17 if tile == "exact" else 70
    x, weight, moves = operands((2, channels, channels, 9, 8, (kernel, kernel), 1, kernel // 2, 1), device, dtype)
    mean, rstd, gamma, beta = vectors(channels, device, torch.float32)

    def function(impl):
        def run(x, weight, gamma, beta):
            wide = torch.promote_types(x.dtype, torch.float32)
            norm = Norm(mean.to(wide), rstd.to(wide), gamma, beta, "relu", True)
            y, stats = conv.norm_act_conv2d(x, weight, norm, *moves, stats_eps=1e-5, impl=impl)
            return [y, *stats]

        return run

    found = outcome(function("triton"), x, weight, gamma, beta)
    with monkeypatch.context() as patch:
        if kind == "tf32" and device == "cpu":
            patch.setattr(F, "conv2d", as_cudnn)
        peer = outcome(function("torch"), x, weight, gamma, beta)
    exact = outcome(function("torch"), *(tensor.double() for tensor in (x, weight, gamma, beta)))
    names = ("y", "mean", "rstd", "unbiased", "dx", "dw", "dgamma", "dbeta")
    eps = torch.finfo(dtype).eps * (2 if device == "cpu" else 1)  # the interpreter does not round to bfloat16: it cuts
    for name, mine, theirs, truth in zip(names, found, peer, exact, strict=True):
        scale = truth.abs().max()
        error, allowed = ((tensor.double() - truth).abs().max() / scale for tensor in (mine, theirs))
        assert error <= 2 * allowed + max(eps, 4e-6), name
    stored = found[0].double()
    for mine, truth in zip(found[1:4], conv._statistics(stored, 1e-5), strict=True):  # of y as it is stored, to the end
        assert (mine - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_the_same_bits_every_time(device):
    x, weight, moves = operands((2, 20, 33, 9, 7, (3, 3), 1, 1, 1), device, torch.float32)
    norm = Norm(*vectors(20, device, torch.float32), "relu", False)

    def function(x, weight):
        y, stats = conv.norm_act_conv2d(x, weight, norm, *moves, stats_eps=1e-5, impl="triton")
        return [y, *stats]

    first, second = (outcome(function, x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [True, False])
def test_gradcheck(device, batch):
    x, weight = draw(1, 2, 2, 2).to(device), draw(1, 2, 2, 1, seed=1).to(device)
    mean, rstd, gamma, beta = vectors(2, device)

    def function(x, weight, gamma, beta):
        own = x.detach().mean((0, 2, 3)), (x.detach().var((0, 2, 3), correction=0) + 1e-5).rsqrt()
        norm = Norm(*(own if batch else (mean, rstd)), gamma, beta, "relu", batch)
        return conv.norm_act_conv2d(x, weight, norm, 1, 1, 1, impl="triton")[0]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, weight, gamma, beta)])


def test_the_operators_are_well_formed(device):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight, _ = operands((2, 3, 4, 5, 6, (3, 3), 2, 1, 1), device, torch.float32)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    grad = draw(2, 4, 3, 3).to(device, torch.float32).contiguous(memory_format=torch.channels_last)
    moves = [2, 2], [1, 1], [1, 1]
    for norm, eps in ((vectors(3, device, torch.float32), 1e-5), ((None, None, None, None), None)):
        differentiable = [t if t is None else t.clone().requires_grad_(i > 1) for i, t in enumerate(norm)]
        given = (x.clone().requires_grad_(), weight.clone().requires_grad_(), *differentiable)
        torch.library.opcheck(conv._conv.op, (*given, "relu", True, *moves, eps), test_utils=tests)
        torch.library.opcheck(conv._weight_gradient.op, (grad, x, *norm, "relu", [3, 3], *moves), test_utils=tests)
    torch.library.opcheck(conv._input_gradient.op, (grad, weight, [5, 6], *moves), test_utils=tests)
    for other, y in ((None, None), (x, None), (None, x), (x, x)):
        given = (grad, weight, other, x, y, *vectors(3, device, torch.float32), "relu", *moves)
        torch.library.opcheck(conv._before_gradient.op, given, test_utils=tests)


def test_only_the_gradients_that_are_asked_for(device, monkeypatch):
    x, weight, moves = operands(CASES["3x3"], device)
    calls = []
    for name in ("_input_gradient", "_weight_gradient"):
        original = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    ops.masked_conv2d(x, weight.clone().requires_grad_(), None, None, *moves, impl="triton").sum().backward()
    assert calls == ["_weight_gradient"]
    ops.masked_conv2d(x.clone().requires_grad_(), weight, None, None, *moves, impl="triton").sum().backward()
    assert calls[1:] == ["_input_gradient"]


def test_under_autocast_it_casts_as_conv2d(device):
    x, weight, moves = operands(CASES["3x3"], device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        found = outcome(lambda x, w: [ops.masked_conv2d(x, w, None, None, *moves, impl="triton")], x, weight)
        expected = outcome(lambda x, w: [F.conv2d(x, w, None, *moves)], x, weight)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert found[0].dtype == torch.bfloat16
    assert all((a - b).abs().max() <= 0.02 * b.abs().max() for a, b in zip(found, expected, strict=True))
    with pytest.raises(RepruneError, match="x is torch.bfloat16, and the weight torch.float32"):
        ops.masked_conv2d(x.bfloat16(), weight, None, None, *moves, impl="triton")


def test_nan_goes_through(device):
    x, weight, moves = operands((1, 3, 4, 6, 6, (3, 3), 1, 1, 1), device, torch.float32)
    x[0, 1, 2, 2] = float("nan")
    for norm in (None, Norm(*vectors(3, device, torch.float32), "relu6", False)):
        y, stats = conv.norm_act_conv2d(x, weight, norm, *moves, stats_eps=1e-5, impl="triton")
        window = torch.zeros(6, 6, dtype=torch.bool, device=device)
        window[1:4, 1:4] = True
        assert (y.isnan() == window).all() and all(vector.isnan().all() for vector in stats)


def test_auto_takes_torch_as_long_as_nothing_is_measured(device):
    x, weight, moves = operands(CASES["3x3"], device, torch.float32)
    assert torch.equal(ops.masked_conv2d(x, weight, None, None, *moves), F.conv2d(x, weight, None, *moves))


def test_what_cannot_run_says_why(device):
    x, weight, _ = operands(CASES["3x3"], device, torch.float32)

    def refused(match, *given, error=RepruneError, **options):
        with pytest.raises(error, match=match):
            conv.norm_act_conv2d(*given, **({"impl": "triton"} | options))

    norm = Norm(*vectors(19, device, torch.float32), "relu", True)
    refused("impl must be one of", x, weight, None, impl="cuda")
    refused("act must be one of", x, weight, norm._replace(act="silu"))
    refused("Grouped and depthwise convolutions stay", x, weight[:, :1], None, impl="auto")
    refused("3 dimensions", x[0], weight, None)
    refused("x is torch.int32", x.int(), weight.int(), None)
    refused("output is empty", x[:, :, :2, :2], weight, None)
    refused("output is empty", x[:0], weight, None)
    refused("2.30 or more pixels", x[:1, :, :1, :1].expand(1 << 20, 19, 40, 40), weight, None)
    refused("must have 19 numbers", x, weight, norm._replace(beta=norm.beta[:5]))
    refused('impl="torch" or "auto"', x[0], weight, None)
    for bad in ((1, 2, 3), 0, "same"):
        refused("stride must be one or two whole numbers, at least 1", x, weight, None, stride=bad)
    for impl in ("torch", "triton"):
        refused("more than 1 value", x[:1, :, :3, :3], weight, None, error=ValueError, stats_eps=1e-5, impl=impl)


# ---------------------------------------------------------------------- ahead of time

PROGRAM = """
import json, sys
import torch
from reprune_triton.kernels import compiled
from reprune_triton.kernels.step import masked_conv
target, name, tf32 = sys.argv[1], sys.argv[2], sys.argv[3] == "tf32"
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
configurations = list(masked_conv.configurations(dtype, tf32))
binaries = [compiled.build_training(config, target, name) for config in configurations]
codes = compiled.machine_codes(binaries) if target.startswith("sm") else [[]] * len(binaries)
for config, binary, code in zip(configurations, binaries, codes):
    print(json.dumps({"kernel": config.kernel.__name__, "constants": dict(config.constants), "warps": config.warps,
                      "resources": compiled.resources(binary, code)._asdict(), "code": code}))
"""
BUILDS = [
    ("sm_100", "bf16", ""), ("sm_90", "bf16", ""), ("sm_80", "bf16", ""), ("gfx942", "bf16", ""),
    ("sm_90", "fp32", "tf32"), ("sm_90", "fp32", ""),
]  # fmt: skip
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@pytest.fixture(scope="module")
def built():
    """What PROGRAM prints, for every target and type."""
    return dict(zip(BUILDS, apart.run_each(PROGRAM, BUILDS), strict=True))


def main_loop(code, instruction):
    """The instructions of the innermost loop with this one."""
    labels = {line[:-1]: at for at, line in enumerate(code) if line.endswith(":")}
    found = []
    for at, line in enumerate(code):
        target = re.match(r"BRA.*?(\.L_x_\d+)", line)
        begin = labels.get(target[1], at) if target else at
        body = code[begin:at]
        if any(line.startswith(instruction) for line in body):
            found.append(body)
    return min(found, key=len, default=[])


# Registers of a thread, by warps: little more than Triton 3.8 needs. That of torch 2.11 takes all there are, and on
# sm_80 and sm_100 spills a few in two of the kernels.
CURRENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
REGISTERS = {4: 250, 8: 192} if CURRENT else {4: 255, 8: 255}


@pytest.mark.parametrize("build", BUILDS, ids="-".join)
def test_every_configuration_compiles_within_its_budget(build, built):
    target, dtype, tf32 = build
    kernels = {"forward_kernel", "input_gradient_kernel", "weight_gradient_kernel"}
    assert {row["kernel"] for row in built[build]} == kernels
    for row in built[build]:
        name, found = f"{row['kernel']} {row['constants']}", row["resources"]
        assert found["spills"] <= (0 if CURRENT or target == "sm_90" else 8), name
        assert row["warps"] == 4 or (row["warps"] == 8 and row["constants"]["POINTWISE"]), name
        if target == "gfx942":
            assert found["registers"] <= 512 and found["shared"] <= 64 << 10, name
            continue
        assert found["registers"] <= REGISTERS[row["warps"]], name
        assert found["shared"] <= 120 << 10, name
        if dtype == "bf16" or tf32:
            loop = main_loop(row["code"], TENSOR_CORES[target])
            assert any(line.startswith("LDGSTS") for line in loop), name  # copies that nothing waits for
            narrow = [line for line in loop if line.startswith("LDG") and (".U16" in line or ".U8" in line)]
            assert not narrow, name


def test_what_a_launch_picks_is_compiled_here():
    from reprune_triton.kernels.step import masked_conv as kernels

    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float64, True)):
        known = set(kernels.configurations(dtype, tf32))
        for pointwise in (0, 1):
            for pixels, channels in [(10, 3), (10, 300), (10**6, 3), (10**6, 64), (10**6, 65), (10**6, 2048)]:
                for norm in (0, 1):
                    flags = {"POINTWISE": pointwise, "NORM": norm}
                    tile = kernels.tile(pixels, channels, bool(pointwise))
                    picked = [(kernels.forward_kernel, flags | {"STATS": stats}, tile) for stats in (0, 1)]
                    tile = kernels.input_tile(pixels, channels, bool(pointwise), bool(norm))
                    behind = {"FROM_Y": norm, "OTHER": norm}
                    picked.append((kernels.input_gradient_kernel, flags | behind, tile))
                    for filters in (16, 256):
                        tile = kernels.weight_tile(filters, channels, bool(pointwise))
                        picked.append((kernels.weight_gradient_kernel, flags, tile))
                    assert known >= {kernels.configuration(k, f, dtype, tf32, t) for k, f, t in picked}
