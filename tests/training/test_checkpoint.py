"""Checkpoints: exact round trips, nothing lost whenever the writer dies, damage and other models refused by name."""

import collections
import json
import math
import os
import struct

import numpy as np
import pytest
import torch
from torch import nn

from reprune_triton.errors import RepruneError
from reprune_triton.training import checkpoint, models


def identical(a, b):
    if isinstance(a, torch.Tensor):
        alike = type(b) is torch.Tensor and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return alike and raw(a) == raw(b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    if type(a) is float:
        return type(b) is float and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


def raw(tensor):
    """The bytes, so that NaNs and signed zeros count too."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything():
    return {
        "none": None, "yes": True, "no": False, "int": -(2**70), "float": 0.1, "whole": 1.0, "minus zero": -0.0,
        "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "tiny": 5e-324, "text": 'é "quoted" \n\0', "": "empty key",
        "list": [1, [2.0, (3,)], []], "tuple": (), "dict": {}, 1: "int key", "1": "str key",
        "keys": {1: torch.ones(1), "1": torch.zeros(1), "__metadata__": torch.ones(2)},
        "tensors": (
            torch.tensor(3.5), torch.tensor(7), torch.randn(3, 4).bfloat16(), torch.randn(2).half(), torch.empty(0, 3),
            torch.tensor([True, False]), torch.tensor([math.nan, math.inf, -0.0]), torch.arange(3, dtype=torch.int32),
            torch.get_rng_state(), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            torch.zeros(2, dtype=torch.float8_e4m3fn).view(torch.uint8), torch.randn(2).double(),
        ),
        "like a tag": {"tensor": "state.keys.1", "float": "nan", "list": [1]},
    }  # fmt: skip


@pytest.mark.parametrize("state", [None, 1.5, [], torch.ones(2), everything()], ids=lambda s: type(s).__name__)
def test_round_trip_is_exact(tmp_path, state):
    checkpoint.write(tmp_path / "a.safetensors", state)
    assert identical(state, checkpoint.read(str(tmp_path / "a.safetensors")))


def test_views_and_shared_storage_keep_their_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"base": base, "again": base, "t": base.t(), "row": base[1], "e": base[:1].expand(3, 4)}
    checkpoint.write(tmp_path / "a.safetensors", state)
    back = checkpoint.read(tmp_path / "a.safetensors")
    assert torch.equal(back["t"], base.t()) and torch.equal(back["row"], base[1]) and torch.equal(back["again"], base)
    assert torch.equal(back["e"], base[:1].expand(3, 4))
    back["base"].zero_()
    assert back["again"].sum() == 66


def test_optimizer_and_model_states_round_trip(tmp_path):
    model = models.build("resnet8", 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(models.example_inputs("resnet8", size=8)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.write(tmp_path / "a.safetensors", state)
    back = checkpoint.read(tmp_path / "a.safetensors")
    assert back["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()  # int keys
    optimizer.load_state_dict(back["optimizer"])
    model.load_state_dict(back["model"])
    assert identical({**state["model"]}, back["model"]) and identical(state["optimizer"], back["optimizer"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, np.float64(1)]}, r"state.a.1 is a numpy.float64"),
        ({"a": {(1, 2): 3}}, r"state.a has the key \(1, 2\)"),
        ({True: 1}, "the key True"),
        ({"f": print}, "state.f is a builtins.builtin"),
        ({"s": torch.ones(2).to_sparse()}, "state.s is a sparse"),
        ({"n": collections.namedtuple("N", "a")(1)}, "state.n is a"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused_by_name(tmp_path, value, message):
    with pytest.raises(RepruneError, match=message):
        checkpoint.write(tmp_path / "a.safetensors", value)
    assert not list(tmp_path.iterdir())


# Damage


def test_truncation_at_every_position_is_found(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"epoch": 3, "w": torch.randn(40), "b": torch.ones(3)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(RepruneError, match=r"last\.safetensors: not a whole safetensors file"):
            checkpoint.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(RepruneError, match="not a whole"):
        checkpoint.read(path)


def test_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(RepruneError, match=r"a\.safetensors: no such checkpoint$"):
        checkpoint.read(path)
    path.mkdir()
    with pytest.raises(RepruneError, match="no such checkpoint"):
        checkpoint.read(path)
    path.rmdir()
    torch.save({"a": 1}, path)
    with pytest.raises(RepruneError, match="not a whole safetensors file"):
        checkpoint.read(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(RepruneError, match="of another program"):
        checkpoint.read(path)
    checkpoint.save(nn.Linear(2, 2), path)
    with pytest.raises(RepruneError, match="is reprune_triton narrow model 1, not a reprune_triton training state 1"):
        checkpoint.read(path)


def test_the_previous_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.safetensors"
    for epoch in range(3):
        checkpoint.write(path, {"epoch": epoch})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.previous.safetensors", "last.safetensors"]
    assert checkpoint.read(checkpoint.previous(path)) == {"epoch": 1}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RepruneError, match=f"cut short.*to resume from it: cp {checkpoint.previous(path)} {path}"):
        checkpoint.read(path)
    path.unlink()
    with pytest.raises(RepruneError, match="no such checkpoint. The checkpoint before it"):
        checkpoint.read(path)
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(RepruneError, match="no such checkpoint$"):
        checkpoint.read(path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_killed_at_any_step_a_whole_checkpoint_is_left(tmp_path, monkeypatch, links, damaged):
    """Dies before and after every step that touches the disk; what is found then must be a whole checkpoint."""
    real = {name: getattr(os, name) for name in ("replace", "link", "fsync")}

    def no_link(*_):
        raise OSError("no hard links here")

    def attempt(folder, die_at):
        path = folder / "last.safetensors"
        for epoch in (1, 2):
            checkpoint.write(path, {"epoch": epoch, "w": torch.full((50,), epoch)})
        if damaged:
            path.write_bytes(path.read_bytes()[:100])
        count = 0

        def watched(name):
            def step(*args, **kwargs):
                nonlocal count
                count += 1
                if count == die_at:
                    raise Killed
                out = (no_link if name == "link" and not links else real[name])(*args, **kwargs)
                count += 1
                if count == die_at:
                    raise Killed
                return out

            return step

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, watched(name))
            # A killed process tidies nothing up.
            patch.setattr(type(path), "unlink", lambda self, missing_ok=False: None)
            try:
                checkpoint.write(path, {"epoch": 3, "w": torch.full((50,), 3)})
            except Killed:
                finished = False
            else:
                finished = True
        whole = []
        for candidate in (path, checkpoint.previous(path)):
            try:
                state = checkpoint.read(candidate)
            except RepruneError:
                continue
            assert torch.equal(state["w"], torch.full((50,), state["epoch"]))
            whole.append(state["epoch"])
        assert whole, f"died at step {die_at}: no whole checkpoint is left"
        if not damaged:
            assert max(whole) >= 2
        checkpoint.write(path, {"epoch": 4})  # what was left lying about is no obstacle
        assert checkpoint.read(path) == {"epoch": 4}
        assert len(list(folder.iterdir())) == 2
        return finished, whole

    die_at, outcomes = 0, []
    while True:
        die_at += 1
        (tmp_path / str(die_at)).mkdir()
        finished, whole = attempt(tmp_path / str(die_at), die_at)
        outcomes.append(whole)
        if finished:
            break
    assert die_at > 8 and outcomes[-1] == ([3] if damaged else [3, 2])


def test_a_failed_write_leaves_no_litter(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write(path, {"epoch": 2})
    assert checkpoint.read(path) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


# Narrow models


def narrow_by_hand(model):
    """Keep 5 of 16 channels between the two convs of the first block."""
    block = model.stage1[0]
    kept = torch.tensor([0, 3, 4, 9, 15])
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach()[kept])
    block.conv1.out_channels = 5
    for name in ("weight", "bias"):
        setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name).detach()[kept]))
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, getattr(block.bn1, name)[kept])
    block.bn1.num_features = 5
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, kept])
    block.conv2.in_channels = 5
    return model


def test_narrow_model_round_trip(tmp_path):
    torch.manual_seed(0)
    slim = narrow_by_hand(models.build("resnet8", 3)).eval()
    x = models.example_inputs("resnet8")
    path = tmp_path / "slim.safetensors"
    extra = {"model": "resnet8", "num_classes": 3, "flops": 0.5, "layers": ["a", ("b", None)]}
    checkpoint.save(slim, path, extra=extra)
    assert identical(checkpoint.read_extra(path), extra)
    dense = models.build("resnet8", 3).eval()
    dense.fc.weight.requires_grad_(False)
    back = checkpoint.load(path, dense)
    assert back is dense and torch.equal(back(x), slim(x))
    assert repr(back) == repr(slim)  # the attributes too
    assert not back.fc.weight.requires_grad and back.fc.bias.requires_grad
    assert identical(dict(slim.state_dict()), dict(back.state_dict()))
    back(x).sum().backward()


@pytest.mark.parametrize("variant", [
    lambda slim: slim.to(memory_format=torch.channels_last), lambda slim: slim.half(),
    lambda slim: slim.requires_grad_(False),
], ids=["channels last", "half", "frozen"])  # fmt: skip
def test_narrow_models_of_all_kinds_round_trip(tmp_path, variant):
    torch.manual_seed(0)
    slim = variant(narrow_by_hand(models.build("resnet8", 3)).eval())
    x = models.example_inputs("resnet8").to(slim.fc.weight.dtype)
    checkpoint.save(slim, tmp_path / "a.safetensors")
    fresh = models.build("resnet8", 3).requires_grad_(slim.fc.weight.requires_grad).eval()
    back = checkpoint.load(tmp_path / "a.safetensors", fresh)
    assert torch.allclose(back(x), slim(x)) and back.fc.weight.dtype == slim.fc.weight.dtype
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in slim.parameters()]
    for key, value in slim.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_what_is_loaded_under_inference_mode_can_be_trained(tmp_path):
    checkpoint.save(models.build("resnet8", 3), tmp_path / "a.safetensors")
    model = models.build("resnet8", 3)
    with torch.inference_mode():
        checkpoint.load(tmp_path / "a.safetensors", model)
    model(models.example_inputs("resnet8", size=8)).sum().backward()


def test_narrow_depthwise_and_shared_and_bf16(tmp_path):
    def build(width):
        model = nn.Sequential(
            nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=width), nn.PReLU(width),
            nn.Linear(4, 4), nn.Linear(4, 4),
        )  # fmt: skip
        model[4].weight = model[3].weight
        return model.bfloat16()

    slim = build(4)
    checkpoint.save(slim, tmp_path / "a.safetensors")
    back = checkpoint.load(tmp_path / "a.safetensors", build(8).float())
    assert back[1].groups == 4 and back[2].num_parameters == 4
    assert back[3].weight is back[4].weight and back[0].weight.dtype == torch.bfloat16
    x = torch.randn(1, 3, 6, 6).bfloat16()
    assert torch.equal(back(x), slim(x))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (("resnet8", 3), ("resnet8", 2), "fc.out_features is 2, in the checkpoint 3"),
        (("resnet20", 3), ("resnet8", 3), "the checkpoint has stage1.1 .*, the model has not"),
        (("resnet8", 3), ("resnet20", 3), "the model has stage1.1 .*, the checkpoint has not"),
        (("resnet8", 3), ("timm:resnet18", 3), "the model is a ResNet, in the checkpoint a CifarResNet"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(tmp_path, saved, loaded, message):
    checkpoint.save(models.build(*saved), tmp_path / "a.safetensors")
    model = models.build(*loaded)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RepruneError, match=f"a.safetensors: .*another model: first difference: {message}"):
        checkpoint.load(tmp_path / "a.safetensors", model)
    assert identical(before, dict(model.state_dict()))


def test_other_tensors_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(nn.Sequential(nn.Linear(3, 2)), path)
    with pytest.raises(RepruneError, match="0.bias is in the checkpoint alone"):
        checkpoint.load(path, nn.Sequential(nn.Linear(3, 2, bias=False)))
    checkpoint.save(nn.Sequential(nn.Conv2d(3, 2, 3)), path)
    with pytest.raises(RepruneError, match=r"0.weight is \(2, 3, 1, 1\), in the checkpoint \(2, 3, 3, 3\)"):
        checkpoint.load(path, nn.Sequential(nn.Conv2d(3, 2, 1)))
    with pytest.raises(RepruneError, match="extra.t is a tensor"):
        checkpoint.save(nn.Linear(2, 2), path, extra={"t": torch.ones(1)})


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    checkpoint.save(nn.Linear(2, 2), path, extra={"x": math.nan})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
        json.loads(file.metadata()["reprune_triton"], parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_equal_states_make_equal_files(tmp_path):
    torch.manual_seed(0)
    state = everything()
    for i in range(10):
        checkpoint.write(tmp_path / f"{i}.safetensors", state)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
