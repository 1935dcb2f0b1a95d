"""List the operations of a network, with the size of all that is read and written.

It comes from one trace by torch.fx, on shapes alone: nothing is computed, and nothing but PyTorch is needed.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from reprune_triton.fused import fusion
from reprune_triton.running.chains import kind_of

IMAGES = -1  # as the source of an operation


class Op(NamedTuple):
    """One operation on a whole batch. Sizes are numbers of elements."""

    name: str  # of the module, or of the traced operation
    kind: str  # see `chains.kind_of`
    inputs: tuple[int, ...]  # every tensor that it reads
    sources: tuple[int, ...]  # the numbers of the operations that made them, or IMAGES
    output: int
    users: int  # how many operations read the output
    weights: int = 0
    macs: int = 0  # multiply-adds; of convs and linears only
    pointwise: bool = False  # a 1x1 conv that is not grouped
    seen: float = 1.0  # the share of its input that a conv looks at; a stride may be larger than the kernel
    act: bool = False  # of a norm: with the activation after it
    residual: bool = False  # ... with the addition after it, whose other term is the last of the inputs


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
    """List what the forward of `model` does with images (B, C, H, W), in order.

    Args:
        fused: a BatchNorm takes in the addition and the activation after it, as `reprune_triton.fuse` does.
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
    op = Op(name, kind_of(node, modules), inputs, sources, sizes[node], users)
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
