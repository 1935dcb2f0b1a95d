"""What a network computes, with the size of all that is read and written, and which convs have channels to lose.

Both come from one trace by torch.fx, on shapes alone: nothing is computed, and nothing but PyTorch is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from reprune_triton import fusion
from reprune_triton.channels import PRUNABLE, Channels, Cost, Prunable, Reader
from reprune_triton.narrow import CHANNELWISE, is_depthwise

IMAGES = -1  # as the source of an operation
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Mish, nn.Hardtanh,
)  # fmt: skip
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
DROPOUTS = nn.modules.dropout._DropoutNd
# Functions and methods by name; those of `operator` and in-place ones are called alike.
KINDS = {
    "act": {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh"},
    "add": {"add"},
    "mul": {"mul"},
    "view": {"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "permute", "transpose"},
    "pool": {"max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d"},
    "dropout": {"dropout"},
}


class Op(NamedTuple):
    """One operation on a whole batch. Sizes are numbers of elements."""

    name: str  # of the module, or of the traced operation
    kind: str  # conv, linear, norm, one of KINDS, or other
    inputs: tuple[int, ...]  # every tensor that it reads
    sources: tuple[int, ...]  # the numbers of the operations that made them, or IMAGES
    output: int
    users: int  # how many operations read the output
    weights: int = 0
    macs: int = 0  # multiply-adds; of convs and linears only
    pointwise: bool = False  # a 1x1 conv that is not grouped
    seen: float = 1.0  # the share of its input that a conv looks at; a stride may be larger than the kernel
    act: bool = False  # of a norm: with the activation behind it
    residual: bool = False  # ... with the addition behind it, whose other term is the last of the inputs


class _Sizes(fx.Interpreter):
    """Runs the graph on shapes, and keeps how many elements every operation writes."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            self.found[n] = result.numel()
        return result


def operations(model: nn.Module, shape: tuple[int, ...], fused: bool = False) -> list[Op]:
    """What the forward of `model` does with images (B, C, H, W), in order.

    Args:
        fused: a BatchNorm takes in the addition and the activation behind it, as `reprune_triton.fuse` does.
    Raises:
        RepruneError: if torch.fx cannot trace the model.
    """
    # In training BatchNorm refuses a batch of one value a channel.
    twin = fusion.unfuse(copy.deepcopy(model)).to("meta").eval()
    traced = fx.GraphModule(twin, fusion.trace(twin))
    graph, modules = traced.graph, dict(twin.named_modules())
    sizes = _Sizes(traced)
    sizes.run(torch.empty(shape, device="meta"))
    if fused:
        fusion.take_in(graph, modules)
    numbers: dict[fx.Node, int] = {}
    found: list[Op] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            numbers[node] = IMAGES
        elif node.op.startswith("call_"):
            reads = [x for x in node.all_input_nodes if x in numbers]
            sizes.found.setdefault(node, sizes.found.get(node.all_input_nodes[0], 0))  # a BatchNorm that has taken in
            if reads:
                numbers[node] = len(found)
                found.append(_op(node, modules, reads, numbers, sizes.found))
    return found


def _op(
    node: fx.Node, modules: dict[str, nn.Module], reads: list[fx.Node], numbers: dict[fx.Node, int],
    sizes: dict[fx.Node, int],
) -> Op:  # fmt: skip
    module = modules[str(node.target)] if node.op == "call_module" else None
    name = str(node.target) if module is not None else node.name
    inputs, sources = tuple(sizes[x] for x in reads), tuple(numbers[x] for x in reads)
    users = sum(user.op != "output" for user in node.users) or 1  # the gradient of an output comes from the loss
    op = Op(name, _kind(node, modules), inputs, sources, sizes[node], users)
    if module is not None and op.kind in ("conv", "linear", "norm"):
        op = op._replace(weights=sum(p.numel() for p in module.parameters()))
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        op = op._replace(macs=sizes[node] * module.weight[0].numel())
    if isinstance(module, nn.Conv2d):
        seen = 1.0
        for kernel, stride in zip(module.kernel_size, module.stride, strict=True):
            seen *= min(1.0, kernel / stride)
        op = op._replace(pointwise=module.kernel_size == (1, 1) and module.groups == 1, seen=seen)
    if op.kind == "norm":
        op = op._replace(act="act" in node.kwargs, residual="residual" in node.kwargs)
    return op


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op != "call_module":
        name = str(node.target if node.op == "call_method" else node.target.__name__).strip("_")  # type: ignore[union-attr]
        name = {"iadd": "add", "imul": "mul"}.get(name, name)
        return next((kind for kind, names in KINDS.items() if name in names), "other")
    module = modules[str(node.target)]
    for kind, types in (
        ("conv", nn.Conv2d), ("linear", nn.Linear), ("norm", CHANNELWISE), ("act", ACTIVATIONS), ("pool", POOLS),
        ("dropout", DROPOUTS), ("view", (nn.Identity, nn.Flatten)),
    ):  # fmt: skip
        if isinstance(module, types):
            return kind
    return "other"


def prunable(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    """What `channels.analyse` finds, without torch-pruning and on shapes alone, for networks of plain chains.

    A conv is prunable if from it one way leads, without branches and through operations on each channel alone, to the
    next conv or linear. Known are BatchNorms, activations, pools, dropout, depthwise convs and one flatten; whatever
    else there is, its conv stays. Why, `reasons` does not say.
    """
    twin = fusion.unfuse(copy.deepcopy(model)).to("meta")
    graph, modules = fusion.trace(twin), dict(twin.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    layers: list[Prunable] = []
    for node in graph.nodes:
        conv = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.out_channels > 1 and calls.count(node.target) == 1:
            layers += _layer(node, conv, modules)
    order = list(modules)
    layers.sort(key=lambda layer: order.index(layer.name))
    out = {name: layer.name for layer in layers for name in (layer.name, *layer.followers)}
    into = {reader.name: layer.name for layer in layers for reader in layer.readers}
    macs: dict[str, int] = {}
    for op in operations(model, (1, *shape[1:])):
        if op.macs:
            macs[op.name] = macs.get(op.name, 0) + op.macs
    costs = tuple(Cost(name, count, out.get(name), into.get(name)) for name, count in macs.items())
    return Channels(tuple(layers), {layer.name: PRUNABLE for layer in layers}, costs)


def _layer(node: fx.Node, conv: nn.Conv2d, modules: dict[str, nn.Module]) -> Iterator[Prunable]:
    """This conv, if its channels can go."""
    followers: list[str] = []
    flat = False
    at = node
    while len(at.users) == 1:
        at = next(iter(at.users))
        kind, name = _kind(at, modules), str(at.target)
        module = modules.get(name) if at.op == "call_module" else None
        if kind == "norm" or (module is not None and is_depthwise(module)):
            followers.append(name)
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and not flat:
            repeat = 1
            break
        elif isinstance(module, nn.Linear) and flat and module.in_features % conv.out_channels == 0:
            repeat = module.in_features // conv.out_channels
            break
        elif isinstance(module, nn.Flatten) or (kind == "view" and "flatten" in name):
            flat = True
        elif kind not in ("act", "pool", "dropout") and not isinstance(module, nn.Identity):
            return
    else:
        return
    norms = [name for name in followers[:1] if isinstance(modules[name], nn.modules.batchnorm._BatchNorm)]
    area = conv.kernel_size[0] * conv.kernel_size[1]
    yield Prunable(
        str(node.target), conv.out_channels, conv.in_channels, area, norms[0] if norms else None, tuple(followers),
        (Reader(str(at.target), repeat),),
    )  # fmt: skip
