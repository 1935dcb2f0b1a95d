"""What a launch on a GPU would compile is what the ahead-of-time tests compile, once for each configuration."""

import apart

# What the programs print: [kernel, how often launched, hashes of the machine codes] of everything that was launched. A
# driver without a device: launches are compiled as for a GPU, arguments and all, but not run.
DRIVER = """
import hashlib
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)


driver.set_active(Driver())
from reprune_triton.running import analysis
from reprune_triton.kernels import compiled
from reprune_triton.kernels.clustering import launch
from reprune_triton.kernels.configuration import Configuration

kernels = {}


def digest(kernel):
    return hashlib.sha256(kernel.asm["cubin"]).hexdigest()


def compile_only(self, programs, *arguments):
    launched = self.kernel.warmup(*arguments, grid=(programs,), **dict(self.constants), **self.options())
    kernels.setdefault(self, []).append(digest(launched))


Configuration.run = compile_only
"""
EVENT = """
from reprune_triton import ops

for sizes in (((40, 3), (100, 3), (300, 1)), ((41, 3), (111, 3), (511, 1)), ((64, 3), (1, 3), (2, 2))):
    layers = [ops.Layer(torch.randn(n, 16, k, k)[:, 1:], torch.arange(n + 1)[1:] % n) for n, k in sizes]
    plan, keep = launch.prepare(layers, seeds=[(5, 1 << 40)] * 3), torch.zeros(4, dtype=torch.int32)[1:]
    forests = launch.cluster(plan)
    launch.cut_height(plan, forests, keep)
    labels, _ = launch.label(plan, forests)
    for order in (None, torch.zeros(plan.sizes.filters + 1, dtype=torch.int32)[1:]):
        launch.cover(plan, forests.report, launch.membership(plan, forests.report, labels), keep, order)
    launch.draw_bits(plan)
    launch.cut_layer(torch.zeros(33, dtype=torch.int32)[1:].view(2, 16), torch.zeros(33)[1:].view(2, 16), 1)
    launch.cover_layer(torch.zeros(33, dtype=torch.int32)[1:].view(2, 16), 1, 0, None)
    launch.cluster(launch.prepare(layers, "average"))
print(json.dumps([[config.kernel.__name__, len(hashes), sorted({*hashes, digest(compiled.build(config, "sm_90"))})]
                  for config, hashes in kernels.items()]))
"""


# Narrow training under autocast: activations, gradients and weights of two types, as they meet in a whole step.
STEP = """
import torchvision
from torch import nn
from reprune_triton import availability, fuse
from reprune_triton.running import analysis, chains, narrow

availability.why_not = lambda device: None  # so that tensors on the CPU are taken; what comes out is made of nothing
shortcut = nn.Sequential(nn.Conv2d(16, 128, 1, bias=False), nn.BatchNorm2d(128))
Bottleneck, Inverted = torchvision.models.resnet.Bottleneck, torchvision.models.mobilenetv2.InvertedResidual
blocks = [Bottleneck(16, 32, downsample=shortcut), Bottleneck(128, 32), Inverted(128, 128, 1, 2)]
stem = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))
fuse(model, "triton")
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
narrowing = narrow.Narrowing(model, optimizer, impl="triton")
found = analysis.prunable(model, (2, 16, 16, 16))
for channels, batch in ((256, 2), (16, 3)):
    narrowing.set(found.slices({x.name: torch.arange(min(x.n_out, channels)) for x in found.prunable}))
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(batch, 16, 16, 16))
    y.float().sum().backward()
    optimizer.step()
with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
    model.eval()(torch.randn(2, 16, 16, 16))
found = {}
for config, hashes in kernels.items():
    name, same = config.kernel.__name__, []
    if name != "copy_kernel":
        same.append(compiled.warm(config))  # was just compiled, unless it is something else
        if name not in found:
            same.append(compiled.build_training(config, "sm_90"))
    found.setdefault(name, []).append([name, len(hashes), sorted({*hashes, *map(digest, same)})])
print(json.dumps(sum(found.values(), [])))
"""

AGAIN = """
import json
import torch
import triton
from reprune_triton.bench.measure import host
from reprune_triton.kernels.clustering import launch
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.kernels.step import norm_act

taken = []


def launches(x, times=1):
    \"\"\"What Triton's launchers are given for this.\"\"\"
    taken.clear()
    for _ in range(times):
        norm_act.apply(x, None, *vectors, "relu")
    return [[show(argument) for argument in given] for given in taken]


def show(argument):
    if torch.is_tensor(argument):
        return str(argument.dtype)
    if argument is None or type(argument).__name__ == "LazyDict":
        return "metadata"  # which only hooks read
    return repr(argument) if isinstance(argument, (int, float, tuple)) else type(argument).__name__


with host.no_device() as names:
    vectors = torch.zeros(4, 16).unbind()
    x, other = (torch.zeros(2, 16, n, n).contiguous(memory_format=torch.channels_last) for n in (4, 5))
    one = torch.zeros(513)[1:].view(2, 4, 4, 16).permute(0, 3, 1, 2)  # not aligned
    configurations, create = [], Configuration._launch_first
    Configuration._launch_first = lambda self, *given: configurations.append(self) or create(self, *given)
    norm_act.apply(x, None, *vectors, "relu")
    binaries = configurations[0].binaries
    (binary, _, cache), = binaries.values()
    binary._run = lambda *given: taken.append(given)
    binaries.clear()
    found = {"first": launches(x), "looked for": len(binaries), "again": launches(x, 3)}
    hooked, hooks = [], triton.knobs.runtime.launch_enter_hook
    hooks.add(lambda metadata: hooked.append(metadata.get()["name"]))
    launches(x)
    metadata, enter = taken[0][6:8]
    enter(metadata)  # as the driver's launcher would
    hooks.calls.clear()
    found["hooked"] = hooked
    looked = []
    Configuration._launch_first = lambda *given: looked.append(1) or create(*given)
    for name, work in {
        "same": lambda: launches(x), "other size": lambda: launches(other), "once more": lambda: launches(other),
        "half": lambda: launches(x.half()), "not aligned": lambda: launches(one), "nor again": lambda: launches(one),
        "forgotten": lambda: norm_act.apply_kernel.device_caches.clear() or launches(x), "then": lambda: launches(x),
    }.items():
        looked.clear()
        work()
        found[name] = len(looked)
print(json.dumps(found))
"""


def test_a_launch_that_is_made_again_is_the_same():
    """Triton's own code finds the binary for what is new; what is given to its launcher then does not change."""
    (found,) = apart.run(AGAIN)
    assert len(found["first"]) == 1 and found["again"] == found["first"] * 3 and found["looked for"] == 1
    assert found["hooked"] == ["apply_kernel"]  # as a profiler's would be
    looked = {"same": 0, "other size": 1, "once more": 0, "half": 1, "not aligned": 1, "nor again": 1, "forgotten": 1}
    assert {name: found[name] for name in (*looked, "then")} == looked | {"then": 0}


def test_a_launch_compiles_what_was_tested_and_nothing_else():
    (found,) = apart.run(DRIVER + EVENT)
    kernels = {"magnitude_kernel", "chain_kernel", "reciprocal_kernel", "line_kernel", "cut_height_kernel"}
    kernels |= {"label_kernel", "membership_kernel", "cover_kernel", "bits_kernel"}
    assert {name for name, _, _ in found} == kernels
    for name, _, hashes in found:
        assert len(hashes) == 1, f"{name} was compiled in {len(hashes)} ways"
    assert max(launches for _, launches, _ in found) >= 6, "shared by networks of different sizes and alignments"


def test_a_training_step_compiles_once_for_all_widths_and_batches():
    """Every launch of it, with the types that its arguments have under autocast."""
    (found,) = apart.run(DRIVER + STEP)
    kernels = {"copy_kernel", "statistics_kernel", "merge_kernel", "apply_kernel", "sums_kernel", "gradient_kernel"}
    kernels |= {"forward_kernel", "input_gradient_kernel", "weight_gradient_kernel"}
    assert {name for name, _, _ in found} == kernels
    for name, _, hashes in found:
        assert len(hashes) == 1, f"{name} was compiled in {len(hashes)} ways"
