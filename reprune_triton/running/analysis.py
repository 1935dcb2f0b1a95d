"""The analysis: which output channels can go, and who reads them.

The dependency analysis is torch-pruning's; this is the only module that knows that library. Where it is not installed,
`chains` does for networks of plain chains. Either works on a copy of the model and never edits it. The answer is then
proved by running, in plain PyTorch: dropping channels must give the same outputs as masking them (`_objection`).
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reprune_triton.errors import RepruneError
from reprune_triton.fused import fusion
from reprune_triton.running import chains
from reprune_triton.running.channels import (
    PRUNABLE,
    Channels,
    Cost,
    Finder,
    Prunable,
    Reader,
    call,
    matches,
    tensors,
)
from reprune_triton.running.layers import CHANNELWISE, READ_WIDTHS, is_depthwise, width_of
from reprune_triton.running.narrow import Narrowing, check_whole
from reprune_triton.selection import rng

# What operations raise, and a network's own checks, when shapes or types do not fit; and what is none of their doing.
_OBJECTIONS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)


_FAILURES = (torch.OutOfMemoryError, torch.AcceleratorError)


def analyse(model: nn.Module, example_inputs: Any, ignore: Sequence[str] = ()) -> Channels:
    """Find the prunable convs of `model`.

    A conv is prunable if its output reaches, through channel-wise operations only, the inputs of further layers in one
    chain: not an addition or concatenation with another branch, not the network's output. A conv read by several
    layers feeds a residual stream and stays too, as in the paper (first 3x3 of a BasicBlock; first 1x1 and the 3x3 of
    a Bottleneck).

    Args:
        model: any module; not changed.
        example_inputs: a tensor, or a tuple or dict of arguments, as the model's forward takes them; a batch of 1 or 2
            on the model's device is enough.
        ignore: conv names, or patterns with `*`, to leave alone.
    Raises:
        RepruneError: if the model has no Conv2d, cannot run on `example_inputs`, cannot be analysed, or is narrow
            already.
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise RepruneError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to prune")
    check_whole(model)
    with torch.inference_mode(False), _as_written(), rng.kept(p.device for p in model.parameters()):
        # Autograd's graph, which the analysis follows, cannot hold tensors of inference mode.
        inputs = _mapped(example_inputs, lambda x: x.clone() if x.is_inference() else x)
        return _analyse(_twin(model), inputs, ignore)


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """What torch.compile has compiled inside the model runs without it."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def _twin(model: nn.Module) -> nn.Module:
    try:
        return fusion.unfuse(copy.deepcopy(model)).eval()
    except Exception as error:
        raise RepruneError(
            f"{type(model).__name__} cannot be copied, which the analysis does first ({error}). Remove weight norm or "
            "pruning of the old kind (hooks), and attributes such as locks and open files."
        ) from error


def _analyse(twin: nn.Module, inputs: Any, ignore: Sequence[str]) -> Channels:
    for parameter in twin.parameters():
        parameter.requires_grad_(True)  # the analysis follows autograd's graph, through frozen layers too
    try:
        import torch_pruning  # noqa: F401  # imported here: the rest of the package runs without it
    except ImportError:
        find = chains.finder
    else:
        find = _by_torch_pruning
    return _proved(twin, inputs, unproved(twin, inputs, ignore, find))


def unproved(
    twin: nn.Module, inputs: Any, ignore: Sequence[str], finder: Callable[[nn.Module, Any], Finder]
) -> Channels:
    """What a dependency analysis says of a model, without the proof; it is run, but not changed."""
    costs, calls = _costs(twin, inputs)
    layers, reasons = _layers(twin, finder(twin, inputs), calls, ignore)
    out = {name: layer.name for layer in layers for name in (layer.name, *layer.followers)}
    into = {reader.name: layer.name for layer in layers for reader in layer.readers}
    return Channels(
        tuple(layers), reasons, tuple(Cost(name, macs, out.get(name), into.get(name)) for name, macs in costs.items())
    )


def prunable(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    """Return what `analyse` finds by chains, from shapes alone and without its proof.

    Args:
        shape: of the images, (B, C, H, W).
    Raises:
        RepruneError: if torch.fx cannot trace the model.
    """
    twin = fusion.unfuse(copy.deepcopy(model)).to("meta").eval()
    images = torch.empty(1, *shape[1:], device="meta")
    return unproved(twin, images, (), chains.finder)


def _costs(twin: nn.Module, inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds per sample, and the number of calls, of every conv and linear that `inputs` reach."""
    macs: dict[str, int] = {}
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module._parameters["weight"]
            assert weight is not None
            macs[name] = macs.get(name, 0) + output[0].numel() * weight[0].numel()
            calls[name] = calls.get(name, 0) + 1

        return hook

    handles = [
        module.register_forward_hook(count(name))
        for name, module in twin.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module._parameters.get("weight") is not None
    ]
    try:
        with torch.no_grad():
            call(twin, inputs)
    except Exception as error:
        raise RepruneError(
            f"{type(twin).__name__} does not run on example_inputs ({error}). "
            "Give a small batch such as the model is trained on, on the model's device."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return macs, calls


def _layers(
    twin: nn.Module, find: Finder, calls: Mapping[str, int], ignore: Sequence[str]
) -> tuple[list[Prunable], dict[str, str]]:
    """The prunable convs, and the reason of every conv."""
    owners: dict[int, list[str]] = {}
    for name, module in twin.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)

    def sharing(name: str, keys: Sequence[str] | None = None) -> list[str]:
        """The modules with which this one shares a parameter."""
        own = twin.get_submodule(name)._parameters
        return [x for key in own if keys is None or key in keys for x in owners.get(id(own[key]), []) if x != name]

    layers, reasons = [], {}
    for name, conv in ((n, m) for n, m in twin.named_modules() if isinstance(m, nn.Conv2d)):
        if matches(name, ignore):
            reasons[name] = "ignored, as asked"
        elif is_depthwise(conv):
            reasons[name] = "a depthwise convolution follows the layer it reads"
        elif conv.groups > 1:
            reasons[name] = f"a grouped convolution ({conv.groups} groups)"
        elif conv._parameters.get("weight") is None:
            reasons[name] = "its weight is not a plain parameter (weight norm or another parametrization)"
        elif shared := sharing(name, ["weight"]):
            reasons[name] = f"it shares its weight with {', '.join(shared)}"
        elif calls.get(name, 0) != 1:
            reasons[name] = f"called {calls.get(name, 0)} times in one forward, must be once"
        elif conv.out_channels == 1:
            reasons[name] = "it has one output channel only"
        elif isinstance(layer := find(name, conv), str):
            reasons[name] = layer
        else:
            with_it = (*layer.followers, *(reader.name for reader in layer.readers))
            both = next(((other, shared) for other in with_it if (shared := sharing(other))), None)
            reasons[name] = f"{both[0]} shares a parameter with {', '.join(both[1])}" if both else PRUNABLE
            layers += [] if both else [layer]
    return layers, reasons


def _by_torch_pruning(twin: nn.Module, inputs: Any) -> Finder:
    """By torch-pruning."""
    import torch_pruning

    names = {module: name for name, module in twin.named_modules()}
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(twin, inputs, verbose=False)
    except _FAILURES as error:
        raise _failure(twin, error) from error
    except Exception as error:
        raise RepruneError(
            f"the dependency analysis (torch-pruning) cannot follow {type(twin).__name__}'s operations: {error!r}. "
            "Networks that shuffle or regroup channels are not supported."
        ) from error

    def find(name: str, conv: nn.Conv2d) -> Prunable | str:
        if conv not in graph.module2node:
            return "torch-pruning does not see it called"
        prune, everything = torch_pruning.prune_conv_out_channels, list(range(conv.out_channels))
        group = graph.get_pruning_group(conv, prune, idxs=everything)
        layer = _layer(name, conv, group, names, graph.is_in_channel_pruning_fn)
        return layer if isinstance(layer, str) else replace(layer, norm=_norm(graph.module2node[conv], names))

    return find


def _layer(
    name: str, conv: nn.Conv2d, group: Any, names: dict[nn.Module, str], reads: Callable[[Any], bool]
) -> Prunable | str:
    """What goes with the output channels of `conv`; a string says why they cannot go."""
    followers, readers = [], []
    for dependency, indices in group:
        module = dependency.target.module
        if module is conv:
            continue
        if module not in names:  # an operation without weights, or a bare parameter
            kind = type(module).__name__
            moving = any(word in kind for word in ("Concat", "Split", "Slice", "Unbind", "Expand"))
            if moving or isinstance(module, Tensor):
                return f"its output goes through {kind.strip('_')}, which mixes or moves channels"
            continue
        target = names[module]
        repeat, rest = divmod(len(indices), conv.out_channels)
        if rest or list(indices) != list(range(len(indices))):
            return f"it writes only some of the channels that {target} reads (a concatenation)"
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue  # one slope for all channels
        width = width_of(module, READ_WIDTHS) or len(indices)
        takes = isinstance(module, CHANNELWISE) or is_depthwise(module) or reads(dependency.handler)
        if takes and len(indices) != width:
            return f"an operation on the way to {target} moves or joins channels"
        if isinstance(module, CHANNELWISE) or is_depthwise(module):
            followers.append(target)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and reads(dependency.handler):
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                return f"{target}, which reads it, is a grouped convolution"
            readers.append(Reader(target, repeat))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            return f"its output meets that of {target} (a residual connection or a gate)"
        else:
            return f"{target}, a {type(module).__name__}, works across channels"
    if not readers:
        return "no layer reads it: it is an output of the network"
    if len(readers) > 1:
        names_of = ", ".join(reader.name for reader in readers)
        return f"it is read by several layers ({names_of}): a stream that branches share stays"
    n_in, area = conv.in_channels, conv.kernel_size[0] * conv.kernel_size[1]
    return Prunable(name, conv.out_channels, n_in, area, None, tuple(followers), tuple(readers))


def _norm(node: Any, names: dict[nn.Module, str]) -> str | None:
    """The BatchNorm right behind a conv (channel-wise operations may stand between)."""
    while len(node.outputs) == 1:
        node = node.outputs[0]
        if isinstance(node.module, nn.modules.batchnorm._BatchNorm):
            return names[node.module] if node.module.weight is not None else None
        if node.module in names and not isinstance(node.module, CHANNELWISE):
            return None
    return None


def _proved(twin: nn.Module, inputs: Any, channels: Channels) -> Channels:
    """Refuse every layer for which running narrow and masking disagree, however convincing the graph looked."""
    dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
    tolerance = 1e-6
    try:
        with torch.no_grad():
            call(twin.double(), _doubled(inputs))
        inputs = _doubled(inputs)
    except _OBJECTIONS:  # the model casts to a type of its own, the device has no float64, or it does not fit there
        twin, tolerance = twin.to(dtype), 1e-2
    _randomize(twin)
    for training in (False, True):
        twin.train(training)
        for module in twin.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()  # narrow and masked activations cannot draw the same mask
        guilty: dict[str, str] = {}
        if together := _objection(twin, inputs, channels, channels.prunable, tolerance):
            alone = {x.name: _objection(twin, inputs, channels, (x,), tolerance) for x in channels.prunable}
            guilty = {name: why for name, why in alone.items() if why is not None}
            guilty = guilty or dict.fromkeys(alone, together)  # together only: none can be trusted
        channels = channels.only(lambda layer, guilty=guilty: guilty.get(layer.name))  # type: ignore[misc]
    return channels


@torch.no_grad()
def _randomize(twin: nn.Module) -> None:
    """Make every path count: a zero-initialised layer or scale would hide what stands before it."""
    generator = torch.Generator().manual_seed(0)
    for tensor in twin.parameters():
        if tensor.is_floating_point() and tensor.dim() > 1:
            values = torch.randn(tensor.shape, generator=generator) / (tensor.numel() / len(tensor)) ** 0.5
        else:
            values = torch.rand(tensor.shape, generator=generator) + 0.5
        if tensor.is_floating_point():
            tensor.copy_(values)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=generator) - 0.5)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)  # type: ignore[union-attr]


@torch.no_grad()
def _objection(
    twin: nn.Module, inputs: Any, channels: Channels, layers: Sequence[Prunable], tolerance: float
) -> str | None:
    """Drop every second channel of `layers`: why are the outputs not those with these channels masked at their
    readers? None if they are."""
    active = {layer.name: torch.arange(layer.n_out) for layer in channels.prunable}
    active |= {layer.name: torch.arange(0, layer.n_out, 2) for layer in layers}
    slices = channels.slices(active)
    if not slices:
        return None
    when = " while training" if twin.training else ""
    handles = []
    for layer in layers:
        for name, _ in layer.readers:
            hook = _masking(slices[name].in_)
            handles.append(twin.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        masked, again = (_attempt(twin, inputs) for _ in range(2))
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(masked, Exception) or isinstance(again, Exception):
        # In training BatchNorm refuses a batch of one value a channel: there is nothing to compare with.
        return None if twin.training else f"it cannot be checked with some of its channels at zero ({masked})"
    narrowing = Narrowing(twin, impl="torch")  # the analysis asks nothing of Triton
    narrowing.set(slices)
    try:
        narrow = _attempt(twin, inputs)
    finally:
        narrowing.close()
    if isinstance(narrow, Exception):  # shapes no longer fit: the graph was wrong
        return f"the network does not run without some of its channels{when} ({narrow})"
    why = f"dropping its channels changes more than masking them would: an operation mixes channels{when}"
    if [x.shape for x in masked] != [x.shape for x in narrow] or not masked:
        return why
    random = twin.training and not all(torch.equal(a, b) for a, b in zip(masked, again, strict=True))
    same = random or all(
        torch.allclose(a, b, rtol=tolerance, atol=1e-3 * tolerance * float(a.abs().max()))
        for a, b in zip(masked, narrow, strict=True)
        if a.numel()
    )
    return None if same else why


def _attempt(twin: nn.Module, inputs: Any) -> list[Tensor] | Exception:
    """The outputs; or what the network objects to.

    Raises:
        RepruneError: if it fails of something else, want of memory above all.
    """
    try:
        return tensors(call(twin, inputs))
    except Exception as error:
        if isinstance(error, _OBJECTIONS) and not isinstance(error, _FAILURES):
            return error
        raise _failure(twin, error) from error


def _failure(twin: nn.Module, error: Exception) -> RepruneError:
    return RepruneError(
        f"the analysis runs {type(twin).__name__}, whole and with channels left out, and that failed ({error!r}). "
        "If memory is short, give a smaller batch as example_inputs; name convs in ignore= that should stay whole."
    )


def _masking(index: Tensor | None) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        dim = 1 if isinstance(module, nn.Conv2d) else x.dim() - 1
        mask = x.new_zeros(x.shape[dim])
        mask[index] = 1
        shape = [1] * x.dim()
        shape[dim] = -1
        x = x * mask.view(shape)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    return hook


def _mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _mapped(value, change) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_mapped(value, change) for value in inputs)
    return change(inputs) if torch.is_tensor(inputs) else inputs


def _doubled(inputs: Any) -> Any:
    return _mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)
