"""Find which output channels can go in networks of plain chains, from one trace by torch.fx.

    conv -> BatchNorm, activation, pool, depthwise conv, ... -> the next conv, or through one flatten a linear

This is the dependency analysis where torch-pruning is not installed (see `analysis`). It needs nothing but PyTorch, and
no values of tensors.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from reprune_triton.errors import RepruneError
from reprune_triton.running.channels import Finder, Prunable, Reader, call, tensors
from reprune_triton.running.layers import CHANNELWISE, READERS, Kind, has_one_slope, ranking_norm, width_read

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Mish, nn.Hardtanh,
)  # fmt: skip
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
DROPOUTS = nn.modules.dropout._DropoutNd
# Functions and methods by name, without underscores: those of `operator` and in-place ones have the same names.
KINDS = {
    "act": {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh"},
    "add": {"add"},
    "mul": {"mul"},
    "view": {"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "permute", "transpose"},
    "pool": {"max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d"},
    "dropout": {"dropout", "dropout2d"},
}
_HINT = "which only torch-pruning could follow (pip install torch-pruning)"


def finder(twin: nn.Module, inputs: Any) -> Finder:
    """Return a function that finds what goes with the output channels of a conv, or says why they cannot go.

    Raises:
        RepruneError: if torch.fx cannot trace the model.
    """
    graph, modules = _trace(twin, inputs), dict(twin.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}

    def find(name: str, conv: nn.Conv2d) -> Prunable | str:
        if calls[name] != 1:
            return f"it is called in a way {_HINT}"
        return _follow(nodes[name], name, conv, modules, calls)

    return find


def kind_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return conv, linear, norm, one of KINDS, or other."""
    if node.op != "call_module":
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).strip("_")
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*READERS, *CHANNELWISE))  # also of a class of the user's
        return known or super().is_leaf_module(m, module_qualified_name)


def _trace(twin: nn.Module, inputs: Any) -> fx.Graph:
    """Return the calls of the forward. Arguments without tensors have the values of `inputs`, or their defaults."""
    given = call(inspect.signature(twin.forward).bind, inputs)
    given.apply_defaults()
    try:
        values = {name: value for name, value in given.arguments.items() if not tensors(value)}
        with warnings.catch_warnings(action="ignore"):  # torch.fx says that the trace holds for these values only
            return _Tracer().trace(twin, values)
    except Exception as error:
        raise RepruneError(
            f"torch-pruning is not installed, and torch.fx, which does without it, cannot trace {type(twin).__name__} "
            f"({error}): pip install torch-pruning."
        ) from error


def _follow(
    node: fx.Node, name: str, conv: nn.Conv2d, modules: Mapping[str, nn.Module], calls: Mapping[str, int]
) -> Prunable | str:
    """Return what goes with the output channels of this conv, which `node` calls; or why they cannot go."""
    followers: list[str] = []
    flat = False
    while True:
        following = _only_reader(node, modules)
        if isinstance(following, str):
            return following
        node = following
        module = modules[str(node.target)] if node.op == "call_module" else None
        target = str(node.target) if module is not None else node.name
        if module is not None and calls[target] > 1 and any(True for _ in module.parameters()):
            return f"{target}, which reads it, is called {calls[target]} times in one forward, must be once"
        if _passes(node, module):
            continue
        if _flattens(node, module):
            flat = True
            continue
        kind = None if module is None else Kind.of(module)
        if module is None or kind is None:
            return _obstacle(node, module, target)
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not kind.follows:
            return f"{target}, which reads it, is a grouped convolution"
        if not kind.follows and isinstance(module, nn.Linear) != flat:
            return _obstacle(node, module, target)
        repeat, rest = divmod(width_read(module, kind), conv.out_channels)
        if rest or (repeat > 1 and (kind.follows or not flat)):
            return f"an operation on the way to {target} moves or joins channels"
        if kind.follows:
            followers.append(target)
            continue
        norm = ranking_norm((follower, modules[follower]) for follower in followers)
        return Prunable.of(name, conv, norm, followers, [Reader(target, repeat)])


def _only_reader(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | str:
    """Return the one node that reads the values of this node's output; or why the chain ends here."""
    readers = [user for user in node.users if not _reads_form(user)]
    if not readers or any(reader.op == "output" for reader in readers):
        return "no layer reads it: it is an output of the network" if len(readers) < 2 else "it is an output, too"
    if len(readers) == 1:
        return readers[0]
    names = [str(x.target) if x.op == "call_module" else x.name for x in readers]
    if all(kind_of(reader, modules) in ("conv", "linear") for reader in readers):
        return f"it is read by several layers ({', '.join(names)}): a stream that branches share stays"
    return f"it branches (into {', '.join(names)}), {_HINT}"


def _reads_form(node: fx.Node) -> bool:
    """Whether this asks a tensor for its shape or type only."""
    calls = node.op == "call_method" and node.target in ("size", "dim", "numel")
    return calls or (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"))


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether this treats every channel alone, and all in the same way."""
    if module is not None:
        return isinstance(module, (*ACTIVATIONS, *POOLS, DROPOUTS, nn.Identity)) or has_one_slope(module)
    kind = kind_of(node, {})
    if kind in ("add", "mul"):
        return len(node.all_input_nodes) == 1 and sum(isinstance(x, fx.Node) for x in node.args) == 1  # with a number
    return kind in ("act", "pool", "dropout") or (_averages(node) and _keeps_dimensions(node))


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether this makes features of channels, with the features of a channel side by side."""
    if module is not None:
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    arguments = _named(node, ("input", "start_dim", "end_dim"))
    if _is(node, "flatten"):
        return (arguments.get("start_dim"), arguments.get("end_dim", -1)) == (1, -1)
    if _is(node, "view") or _is(node, "reshape"):
        sizes = node.args[1] if len(node.args) == 2 else node.args[1:]
        return isinstance(sizes, (tuple, list)) and len(sizes) == 2 and bool(sizes[1] == -1)
    return _averages(node) and not _keeps_dimensions(node)


def _averages(node: fx.Node) -> bool:
    """Whether this is the mean over height and width."""
    dims = _named(node, ("input", "dim", "keepdim")).get("dim")
    return _is(node, "mean") and isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]


def _keeps_dimensions(node: fx.Node) -> bool:
    return bool(_named(node, ("input", "dim", "keepdim")).get("keepdim"))


def _is(node: fx.Node, name: str) -> bool:
    return node.op in ("call_function", "call_method") and getattr(node.target, "__name__", node.target) == name


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _obstacle(node: fx.Node, module: nn.Module | None, target: str) -> str:
    """Return why the channels cannot go through this operation."""
    if module is None and kind_of(node, {}) in ("add", "mul"):
        return f"its output meets another in {target} (a residual connection or a gate)"
    if module is None and any(_is(node, name) for name in ("cat", "concat", "stack", "split", "chunk", "unbind")):
        return f"its output goes through {target}, which mixes or moves channels"
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return f"{target}, a {type(module).__name__}, works across channels"
    return f"its output goes through {target}, {_HINT}"
