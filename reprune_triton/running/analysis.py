"""Find which output channels can go, and who reads them.

The dependency analysis is torch-pruning's, which no other module knows. Where it is not installed, `chains` does it for
networks of plain chains. Either runs a copy of the model and does not change it. The answer is then proved by running
in plain PyTorch: dropping channels must give the same outputs as masking them (`_objection`).
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    mapped,
    matches,
    tensors,
)
from reprune_triton.running.layers import READERS, Kind, has_one_slope, is_depthwise, ranking_norm, width_read
from reprune_triton.running.narrow import Narrowing
from reprune_triton.running.shadows import check_whole
from reprune_triton.selection import rng

# What operations, and a network's own checks, raise when shapes or types do not fit.
_OBJECTIONS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)
# RuntimeErrors that have another reason.
_FAILURES = (torch.OutOfMemoryError, torch.AcceleratorError)


def analyse(model: nn.Module, example_inputs: Any, ignore: Sequence[str] = ()) -> Channels:
    """Find the prunable convs of `model`.

    A conv is prunable if one conv or linear reads its channels, and all operations between treat every channel alone:
    no addition or concatenation with another branch. A conv that several layers read feeds a residual stream and is not
    pruned, nor is one whose channels are the network's output. That leaves the convs that the paper prunes: the first
    3x3 of a BasicBlock; the first 1x1 and the 3x3 of a Bottleneck.

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
        # The analysis follows autograd's graph, through frozen layers too; it cannot hold tensors of inference mode.
        inputs = mapped(example_inputs, lambda x: x.clone() if x.is_inference() else x)
        twin = _twin(model)
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        try:
            import torch_pruning  # noqa: F401  # imported here: the rest of the package runs without it
        except ImportError:
            find = chains.finder
        else:
            find = _by_torch_pruning
        return _proved(twin, inputs, unproved(twin, inputs, ignore, find))


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Make modules that torch.compile has compiled run as they are written."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model, not fused, in evaluation mode."""
    try:
        return fusion.unfuse(copy.deepcopy(model)).eval()
    except Exception as error:
        raise RepruneError(
            f"{type(model).__name__} cannot be copied, which the analysis does first ({error}). Remove weight norm or "
            "pruning of the old kind (hooks), and attributes such as locks and open files."
        ) from error


def unproved(
    twin: nn.Module, inputs: Any, ignore: Sequence[str], finder: Callable[[nn.Module, Any], Finder]
) -> Channels:
    """Return what a dependency analysis finds, without the proof. The model is run, but not changed."""
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
    """Return the multiply-adds per sample, and the number of calls, of every conv and linear that `inputs` reach."""
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
        if isinstance(module, READERS) and module._parameters.get("weight") is not None
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
    """Return the prunable convs, and for every conv "prunable" or why it is not."""
    owners: dict[int, list[str]] = {}
    for name, module in twin.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)

    def sharing(name: str, keys: Sequence[str] | None = None) -> list[str]:
        """Return the modules with which this one shares a parameter."""
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
    """`chains.finder` by torch-pruning."""
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
        norm = ranking_norm(_chain_after(graph.module2node[conv], names))
        return _layer(name, conv, group, names, graph.is_in_channel_pruning_fn, norm)

    return find


def _layer(
    name: str, conv: nn.Conv2d, group: Any, names: dict[nn.Module, str], reads: Callable[[Any], bool],
    norm: str | None,
) -> Prunable | str:  # fmt: skip
    """Return what goes with the output channels of `conv`, or why they cannot go.

    Args:
        group: torch-pruning's, of all output channels: pairs of a dependency and channel indices.
        reads: whether a dependency's handler prunes input channels.
    """
    followers, readers = [], []
    for dependency, indices in group:
        module = dependency.target.module
        if module is conv:
            continue
        if module not in names:  # an operation without weights, or a bare parameter
            operation = type(module).__name__.strip("_")
            moving = any(word in operation for word in ("Concat", "Split", "Slice", "Unbind", "Expand"))
            if moving or isinstance(module, Tensor):
                return f"its output goes through {operation}, which mixes or moves channels"
            continue
        target = names[module]
        repeat, rest = divmod(len(indices), conv.out_channels)
        if rest or list(indices) != list(range(len(indices))):
            return f"it writes only some of the channels that {target} reads (a concatenation)"
        if has_one_slope(module):
            continue
        kind = Kind.of(module)
        if kind is None:
            return f"{target}, a {type(module).__name__}, works across channels"
        if not kind.follows and not reads(dependency.handler):
            return f"its output meets that of {target} (a residual connection or a gate)"
        if len(indices) != width_read(module, kind):
            return f"an operation on the way to {target} moves or joins channels"
        if kind.follows:
            followers.append(target)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            return f"{target}, which reads it, is a grouped convolution"
        else:
            readers.append(Reader(target, repeat))
    if not readers:
        return "no layer reads it: it is an output of the network"
    if len(readers) > 1:
        names_of = ", ".join(reader.name for reader in readers)
        return f"it is read by several layers ({names_of}): a stream that branches share stays"
    return Prunable.of(name, conv, norm, followers, readers)


def _chain_after(node: Any, names: dict[nn.Module, str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules after this node of torch-pruning's graph, until one is read by several."""
    while len(node.outputs) == 1:
        node = node.outputs[0]
        if node.module in names:
            yield names[node.module], node.module


def _proved(twin: nn.Module, inputs: Any, channels: Channels) -> Channels:
    """Refuse every layer for which dropping and masking channels disagree, whatever the dependency analysis says."""
    dtype = next(p.dtype for p in twin.parameters() if p.is_floating_point())
    tolerance = 1e-6
    try:
        doubled = mapped(inputs, lambda x: x.double() if x.is_floating_point() else x)
        with torch.no_grad():
            call(twin.double(), doubled)
        inputs = doubled
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
            guilty = guilty or dict.fromkeys(alone, together)  # each is right alone, so any may be wrong
        channels = channels.only(lambda layer, guilty=guilty: guilty.get(layer.name))  # type: ignore[misc]
    return channels


@torch.no_grad()
def _randomize(twin: nn.Module) -> None:
    """Give all parameters and statistics random values: a layer or scale of zeros would hide what is before it."""
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
    """Drop every second channel of `layers`, and mask them at their readers instead.

    Return why the outputs differ; None if they do not.
    """
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
        # In training BatchNorm refuses a batch of one value per channel: there is nothing to compare with.
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
    """Return the outputs; or the exception, if shapes or types do not fit.

    Raises:
        RepruneError: if it fails for another reason, such as too little memory.
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
    """Return a forward pre-hook of a reader that sets to zero all of its input channels but these."""

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
