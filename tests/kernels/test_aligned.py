"""What real networks run: bfloat16 with channels in multiples of 16, which is compiled in a way of its own.

Loads are wide and asynchronous there, and tensor cores multiply. Every number is held against float64 on the same
operands, and may be off by the rounding of what is stored and of its own sum, no more: one wrong tile is one too many.
"""

import itertools

import pytest
import torch
import triton
from torch.nn import functional as F

from reprune_triton.kernels.step import masked_conv, norm_act

COMPILED = isinstance(masked_conv.forward_kernel, triton.JITFunction)
# Of bfloat16: to the nearest, but the interpreter cuts off.
U = 2.0**-8 if COMPILED else 2.0**-7
ONE = 2.0**-23  # of float32; the sums of tensor cores are cut off too
PIXELS = {"cuda": (8, 28, 28), "cpu": (2, 9, 7)}
CHANNELS = {  # in, out
    "cuda": [(64, 256), (96, 64), (160, 96), (256, 160)],
    "cpu": [(160, 96), (32, 48)],
}
LIMITS = {"none": (-torch.inf, torch.inf), "relu": (0, torch.inf), "relu6": (0, 6)}


def draw(device, *shape, seed=0):
    """bfloat16, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
    return found.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else found


def vectors(device, C):
    """mean, rstd, gamma and beta; some gammas are negative."""
    mean, rstd, gamma, beta = (draw(device, C, seed=seed).float() for seed in range(2, 6))
    return mean / 4, rstd.abs() + 0.1, gamma, beta / 4


def stored(x):
    """As bfloat16."""
    x = x.float()
    return x.bfloat16() if COMPILED else (x.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


def columns(*vectors):
    return [vector.double()[:, None, None] for vector in vectors]


def activated(x, norm):
    """What the prologue multiplies, to the last bit: all is rounded to float32, once each."""
    mean, rstd, gamma, beta = (vector[:, None, None] for vector in norm[:4])
    value = (x.float() - mean).double() * (rstd * gamma).double() + beta.double()
    return stored(value.clamp(*LIMITS[norm.act]))


def assert_near(what, found, exact, slack):
    """Every number within its own bound."""
    found, exact = found.double(), exact.double()
    off = (found - exact).abs() > slack
    assert not off.any(), f"{what}: {int(off.sum())} of {off.numel()}, the first {found[off][0]}, not {exact[off][0]}"


def of_sum(terms, magnitude):
    """How far a sum of products in float32 may be off: tensor cores add 8 at a time.

    magnitude: the same sum of |products|.
    """
    return (terms / 8 + 16) * ONE * magnitude


def convolved(x, w, moves):
    """The convolution, and its gradients for a gradient of y, in float64."""
    x, w = (tensor.detach().double().requires_grad_() for tensor in (x, w))
    y = F.conv2d(x, w, None, *moves)
    return y, lambda grad: torch.autograd.grad(y, (x, w), grad.double(), retain_graph=True)


CASES = list(itertools.product((1, 3), (1, 2), ("nothing", "norm", "residual"), ("small", "large")))
SAMPLE = [(1, 1, "norm", "large"), (3, 2, "residual", "small")]  # the interpreter knows no other way to compile


@pytest.mark.parametrize("kernel, stride, before, tile", CASES)
def test_convolutions(device, kernel, stride, before, tile, unplanned, monkeypatch):
    """Forward with statistics, and both gradients; after nothing, a BatchNorm, or one with a residual and a reader."""
    if not COMPILED and (kernel, stride, before, tile) not in SAMPLE:
        pytest.skip("compiled kernels only")
    monkeypatch.setattr(masked_conv, "_FEW", 0 if tile == "large" else 1 << 30)
    B, H, W = PIXELS[str(device)]
    if str(device) == "cpu":
        monkeypatch.setattr(masked_conv, "PROGRAMS", 1)  # so that a loop over few pixels turns more than once
    for n_in, n_out in CHANNELS[str(device)]:
        if str(device) == "cpu" and (n_in > 100) != (kernel == 1):
            continue
        moves = (stride, stride), (kernel // 2,) * 2, (1, 1)
        x, w = draw(device, B, n_in, H, W), draw(device, n_out, n_in, kernel, kernel, seed=1)
        norm = masked_conv.Prologue(*vectors(device, n_in), "relu")
        prologue = norm if before == "norm" else None
        a = x if prologue is None else activated(x, norm)
        exact, gradients = convolved(a, w, moves)
        size, gradients_of_size = convolved(a.abs(), w.abs(), moves)
        grad = draw(device, *exact.shape, seed=6)

        # y, with and without statistics: the same bits, every time
        y, stats = masked_conv.forward(x, w, prologue, *moves, 1e-5)
        again, same = masked_conv.forward(x, w, prologue, *moves, 1e-5)
        alone, nothing = masked_conv.forward(x, w, prologue, *moves, None)
        assert torch.equal(y, again) and torch.equal(y, alone) and nothing is None
        assert all(torch.equal(one, other) for one, other in zip(stats, same, strict=True))
        assert_near("y", y, exact, U * exact.abs() + of_sum(n_in * kernel**2, size))
        rows = y.double().transpose(0, 1).flatten(1)
        mean, variance, count = rows.mean(1), rows.var(1, correction=0), rows.shape[1]
        assert_near("mean", stats[0], mean, 16 * ONE * rows.abs().mean(1))
        rstd = (variance + 1e-5).rsqrt()
        assert_near("rstd", stats[1], rstd, 32 * ONE * rstd)
        unbiased = variance * count / (count - 1)
        assert_near("variance", stats[2], unbiased, 64 * ONE * unbiased)

        # the gradient of the weight
        dw, again = (masked_conv.weight_gradient(grad, x, prologue, (kernel, kernel), *moves) for _ in range(2))
        (dx, exact_dw), (dx_size, dw_size) = gradients(grad), gradients_of_size(grad.abs())
        assert torch.equal(dw, again)
        assert_near("dw", dw, exact_dw, U * exact_dw.abs() + of_sum(count, dw_size))

        # the gradient of the input, or behind the activation in front of it
        slack = of_sum(n_out * kernel**2, dx_size)
        behind = None
        if before != "nothing":
            residual, other = draw(device, *x.shape, seed=7), draw(device, *x.shape, seed=8)
            mean, rstd, gamma, beta = columns(*norm[:4])
            normal = (x.double() - mean) * rstd
            value = normal * gamma + beta
            doubtful = value.abs() < 16 * ONE * (normal.abs() * gamma.abs() + beta.abs())
            behind = masked_conv.Before(norm, x, None, None)
            if before == "residual":
                value = stored((value + residual.double()).clamp(min=0)).double()
                doubtful = torch.zeros_like(doubtful)
                behind = behind._replace(y=stored(value), other=other)
                dx, dx_size = dx + other.double(), dx_size + other.double().abs()
            dx, dx_size, slack = (torch.where(value <= 0, 0, x) for x in (dx, dx_size, slack))
        found, again = (masked_conv.input_gradient(grad, w, (H, W), *moves, behind) for _ in range(2))
        assert torch.equal(found[0], again[0]) and (found[1] is again[1] is None or torch.equal(found[1], again[1]))
        if behind is None:
            assert_near("dx", found[0], dx, U * dx.abs() + slack)
            continue
        assert doubtful.sum() <= 3
        slack_of_g = U * dx.abs() + slack + 4 * ONE * dx_size
        assert_near("g", found[0].masked_fill(doubtful, 0), dx.masked_fill(doubtful, 0), slack_of_g)
        for name, sums, factor in (("dgamma", found[1][0], normal), ("dbeta", found[1][1], torch.ones_like(normal))):
            unsure = (slack + 64 * ONE * dx_size) * factor.abs() + doubtful * dx_size * factor.abs()
            assert_near(name, sums, (dx * factor).sum((0, 2, 3)), unsure.sum((0, 2, 3)))


@pytest.mark.parametrize("act", norm_act.ACTIVATIONS)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_normalisation(device, act, batch, residual):
    """Statistics, forward and backward; with a residual also another gradient."""
    B, H, W = PIXELS[str(device)]
    for C in (64, 96, 160, 256) if str(device) == "cuda" else (16, 32, 96) if COMPILED else (32,):
        x, grad = draw(device, B, C, H, W), draw(device, B, C, H, W, seed=6)
        added, other = (draw(device, B, C, H, W, seed=seed) if residual else None for seed in (7, 8))
        mean, rstd, gamma, beta = vectors(device, C)
        rows = x.double().transpose(0, 1).flatten(1)
        if batch:
            mean, rstd, unbiased = norm_act.statistics(x, 1e-5)
            assert_near("mean", mean, rows.mean(1), 16 * ONE * rows.abs().mean(1))
            assert_near("variance", unbiased, rows.var(1), 64 * ONE * rows.var(1))
            assert_near("rstd", rstd, (rows.var(1, correction=0) + 1e-5).rsqrt(), 32 * ONE * rstd.double())
        y, again = (norm_act.apply(x, added, mean, rstd, gamma, beta, act) for _ in range(2))
        a, b, c, d = columns(mean, rstd, gamma, beta)
        normal = (x.double() - a) * b
        value = normal * c + d + (added.double() if residual else 0)
        size = normal.abs() * c.abs() + d.abs() + (added.double().abs() if residual else 0)
        low, high = LIMITS[act]
        exact = value.clamp(low, high)
        assert torch.equal(y, again)
        assert_near("y", y, exact, U * exact.abs() + 8 * ONE * size)

        shown = y if residual and act != "none" else None
        given = grad, other, x, shown, mean, rstd, gamma, beta, act, batch
        (dx, g, sums), (*again, same) = norm_act.backward(*given), norm_act.backward(*given)
        assert torch.equal(dx, again[0]) and torch.equal(sums, same)
        assert (g is None) == (other is None and shown is None)
        value = value if shown is None else y.double()
        doubtful = ((value - low).abs() < 8 * ONE * size) | ((value - high).abs() < 8 * ONE * size)
        doubtful &= shown is None
        assert doubtful.sum() <= 3
        exact = grad.double() + (other.double() if residual else 0)
        exact = torch.where((value <= low) | (value >= high), 0, exact)
        if g is not None:
            assert_near("g", g.masked_fill(doubtful, 0), exact.masked_fill(doubtful, 0), (U + ONE) * exact.abs())
        for name, found, factor in (("dgamma", sums[0], normal), ("dbeta", sums[1], torch.ones_like(normal))):
            unsure = (128 * ONE + doubtful.double()) * (exact.abs() + doubtful * grad.double().abs()) * factor.abs()
            assert_near(name, found, (exact * factor).sum((0, 2, 3)), unsure.sum((0, 2, 3)))
        used = exact if g is None else g.double()
        with_normal, alone = columns(*(sums.double() / rows.shape[1] * batch))
        exact = (used - alone - normal * with_normal) * b * c
        size = (used.abs() + alone.abs() + (normal * with_normal).abs()) * (b * c).abs()
        slack = U * exact.abs() + 16 * ONE * size
        assert_near("dx", dx.masked_fill(doubtful, 0), exact.masked_fill(doubtful, 0), slack)
