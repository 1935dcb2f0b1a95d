"""Checkpoints without pickle: a training state, or a compact model, in one safetensors file.

The tensors are the file's entries; all else (the tree of the state, the structure of the model) is JSON in the file's
metadata. Files are replaced atomically: a reader finds the old one or the new one, also after a crash of the machine.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from reprune_triton.errors import RepruneError

WIDTHS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters",
    "num_channels",
)  # fmt: skip
_STATE, _MODEL = "reprune_triton training state 1", "reprune_triton narrow model 1"


# A training state


def write(path: str | Path, state: Any) -> None:
    """Write a nested state: dicts with str or int keys, lists, tuples, None, bool, int, float, str and tensors.

    The file that it replaces stays beside it as NAME.previous.safetensors. At every instant one of the two is whole.

    Raises:
        RepruneError: with the place of a value that cannot be saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "state", tensors)
    _write(Path(path), tensors, _STATE, tree, keep_previous=True)


def read(path: str | Path) -> Any:
    """Return the state that `write` was given, with the same types (subclasses of dict become dict), on the CPU.

    Raises:
        RepruneError: if the file is missing, damaged or not such a state.
    """
    try:
        tensors, tree = _read(Path(path), _STATE)
    except RepruneError as error:
        before = previous(path)
        try:
            _read(before, _STATE)
        except RepruneError:
            raise error from None
        raise RepruneError(
            f"{error}. The checkpoint before it, {before}, is whole; to resume from it: cp {before} {path}"
        ) from error
    return _decode(tree, tensors)


def previous(path: str | Path) -> Path:
    """Return where the checkpoint before this one is kept."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.previous.safetensors")


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON for a value: itself if JSON keeps it exactly, else {kind: content}. Tensors go to `tensors`."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise RepruneError(f"{where} is a sparse, quantized or meta tensor: save a dense one")
        name = where if where not in tensors else f"{where}#{len(tensors)}"  # 1 and "1" may both be keys
        tensors[name] = value
        rows_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return {"channels_last" if rows_last and not value.is_contiguous() else "tensor": name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise RepruneError(f"{where} has the key {key!r}: only str and int keys can be saved")
        return {"dict": [[key, _encode(item, f"{where}.{key}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return {"list" if type(value) is list else "tuple": items}
    raise RepruneError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint does not hold: turn it "
        "into tensors, numbers, strings, lists, tuples and dicts"
    )


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    match kind:
        case "float":
            return float(content)
        case "tensor":
            return tensors[content]
        case "channels_last":
            return tensors[content].contiguous(memory_format=torch.channels_last)
        case "dict":
            return {key: _decode(item, tensors) for key, item in content}
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
    raise KeyError(kind)


# A narrow model


def save(model: nn.Module, path: str | Path, extra: Any = None) -> None:
    """Write a model whose layers may be narrower than its class builds them, with `extra`: plain values about it.

    Raises:
        RepruneError: if the model's state or `extra` holds what cannot be saved.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise RepruneError(f"{name} of the model is a {type(value).__name__}: only tensors can be saved")
        tensors[name] = value
    leftover: dict[str, torch.Tensor] = {}
    content = {"modules": _shapes(model), "extra": _encode(extra, "extra", leftover)}
    if leftover:
        raise RepruneError(f"{next(iter(leftover))} is a tensor: extra is for plain values")
    _write(Path(path), tensors, _MODEL, content, keep_previous=False)


@torch.inference_mode(False)  # parameters made under inference mode could not be trained
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Make `model`, freshly built and dense, the compact model that `save` wrote, in place, and return it.

    Every parameter keeps its device and requires_grad, and takes values, shape and dtype of the file.

    Raises:
        RepruneError: if the file is missing, damaged or of another model. Nothing has changed then.
    """
    path = Path(path)
    tensors, content = _read(path, _MODEL)
    recorded = content["modules"]
    for difference in _differences(model, recorded, tensors):
        raise RepruneError(f"{path}: this is a checkpoint of another model: first difference: {difference}")

    made: dict[int, nn.Parameter] = {}  # a parameter shared by two modules stays shared
    for prefix, module in model.named_modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                value = tensors[_join(prefix, name)].to(old.device)
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = tensors[_join(prefix, name)].to(buffer.device)
        for attribute, width in recorded[prefix][1].items():
            setattr(module, attribute, width)
    return model


def read_extra(path: str | Path) -> Any:
    """Return the `extra` that `save` was given, such as what it takes to build the dense model for `load`.

    Raises:
        RepruneError: if the file is missing, damaged or not such a model.
    """
    return _decode(_read(Path(path), _MODEL)[1]["extra"], {})


def _shapes(model: nn.Module) -> dict[str, list[Any]]:
    """Return for every module its class, and its attributes that say how wide it is."""
    return {
        name: [type(module).__name__, {key: w for key in WIDTHS if type(w := getattr(module, key, None)) is int}]
        for name, module in model.named_modules()
    }


def _differences(model: nn.Module, recorded: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """Yield the reasons why `model` cannot become the checkpoint's, in the order of the model."""
    for name, (kind, widths) in _shapes(model).items():
        if name not in recorded:
            yield f"the model has {name} ({kind}), the checkpoint has not"
            continue
        saved_kind, saved_widths = recorded[name]
        if kind != saved_kind:
            yield f"{name or 'the model'} is a {kind}, in the checkpoint a {saved_kind}"
        for key in {**widths, **saved_widths}:
            if saved_widths.get(key, math.inf) > widths.get(key, -1):
                yield f"{name}.{key} is {widths.get(key)}, in the checkpoint {saved_widths.get(key)}"
    for name in recorded:
        if name not in dict(model.named_modules()):
            yield f"the checkpoint has {name} ({recorded[name][0]}), the model has not"
    dense = model.state_dict()
    for name in {**dense, **tensors}:
        if name not in tensors or name not in dense:
            yield f"{name} is in the {'model' if name in dense else 'checkpoint'} alone"
            continue
        shape, saved = tuple(dense[name].shape), tuple(tensors[name].shape)
        if len(shape) != len(saved) or any(new > old for new, old in zip(saved, shape, strict=True)):
            yield f"{name} is {shape}, in the checkpoint {saved}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# Files


def _write(path: Path, tensors: dict[str, torch.Tensor], kind: str, content: Any, keep_previous: bool) -> None:
    # Copies, as safetensors takes neither views of a larger tensor nor two names for one storage.
    own = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}
    # One key: safetensors writes several in random order, and equal contents should give equal files.
    raw = serialize(own, {"reprune_triton": json.dumps({"kind": kind, "content": content})})
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, aside = (path.with_name(f".{path.name}.{word}") for word in ("new", "old"))
    try:
        with open(fresh, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # The old file becomes NAME.previous only after the new one is in place: the old one may be damaged, and then
        # NAME.previous is the only whole one until the new one is there.
        keep = keep_previous and path.exists()
        if keep:
            aside.unlink(missing_ok=True)
            try:
                os.link(path, aside)
            except OSError:  # a file system without hard links
                shutil.copy2(path, aside)
        os.replace(fresh, path)
        if keep:
            os.replace(aside, previous(path))
    finally:
        fresh.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    if not path.is_file():
        raise RepruneError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("reprune_triton", "{}"))
            # Copies, as the file is mapped into memory but may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise RepruneError(f"{path}: not a whole safetensors file, cut short or damaged ({error})") from error
    if metadata.get("kind") != kind:
        what = metadata.get("kind", "a safetensors file of another program")
        raise RepruneError(f"{path}: this is {what}, not a {kind}")
    return tensors, metadata["content"]
