"""The check of every kernel on real shapes: that none is left out, and that one wrong number is seen."""

import argparse
import json

import pytest
import torch

from reprune_triton.bench.__main__ import main
from reprune_triton.bench.measure import smoke
from reprune_triton.kernels.clustering import launch
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.kernels.step import masked_conv, norm_act, pack

TINY = "smoke --model resnet8 --batch 1 --size 8 --shapes 1 --columns 1".split()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` runs it there")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kernel_is_checked():
    args = argparse.Namespace(model="resnet50", batch=32, size=224, device="cpu", shapes=None, columns=8, seed=0)
    families = [[check.kernel for check in family(args)] for family in smoke.FAMILIES.values()]
    configurations = [
        *launch.configurations(), *masked_conv.configurations(), *norm_act.configurations(),
        pack.configuration(True, False),
    ]  # fmt: skip
    assert {kernel for names in families for kernel in names} == {config.kernel.__name__ for config in configurations}
    convs = smoke.convolutions(args)
    assert len(convs) > 20 and all(conv.w[1] % 16 == 0 for conv in convs[1:]) and {conv.stride for conv in convs} == {
        (1, 1), (2, 2)
    }  # fmt: skip
    assert {conv.w[2] for conv in convs} == {1, 3, 7}
    for names in families:
        assert len(list(dict.fromkeys(names))) == sum(a != b for a, b in zip(names, [None, *names], strict=False)), (
            "all checks of a kernel follow each other"
        )


@pytest.mark.parametrize("family", ["forward", "gradients", "clustering"])
def test_kernels_are_right(tmp_path, capfd, monkeypatch, family):
    """The two other families are part of the rehearsal of `make gpu`."""
    launched, run = set(), Configuration.run

    def noted(config, *given):
        launched.add(config.kernel.__name__)
        run(config, *given)

    monkeypatch.setattr(Configuration, "run", noted)
    assert main([*TINY, "--family", family, "--json", str(tmp_path / "rows")]) == 0
    rows, printed = lines(tmp_path / "rows"), capfd.readouterr().out
    for row in rows:
        assert row["result"] == "right" and row["error"] <= row["allowed"] and row["shapes"] > 0
        assert row["kernel"] in launched and f"{row['kernel']}: right" in printed and "commit" in row
    assert len(rows) == len({row["kernel"] for row in rows}) == {"forward": 1, "gradients": 2}.get(family, len(rows))


def test_one_wrong_number_is_seen(tmp_path, capfd, monkeypatch):
    """The other kernels are checked all the same; also where one fails."""
    apply, statistics = norm_act.apply, norm_act.statistics

    def wrong(*given):
        found = apply(*given)
        found[0, 0, 0, 0] += 0.25
        return found

    monkeypatch.setattr(norm_act, "apply", wrong)
    monkeypatch.setattr(norm_act, "statistics", lambda x, eps: 1 / 0)
    assert main([*TINY, "--family", "norms", "--json", str(tmp_path / "rows")]) == 1
    rows = {row["kernel"]: row for row in lines(tmp_path / "rows")}
    assert {name: row["result"] for name, row in rows.items() if row["result"] != "right"} == {
        "statistics_kernel": "failed", "apply_kernel": "wrong",
    }  # fmt: skip
    assert "ZeroDivisionError" in rows["statistics_kernel"]["why"] and "may be" in rows["apply_kernel"]["why"]
    assert len(rows) == 6 and statistics
    assert "not right: statistics_kernel, apply_kernel" in capfd.readouterr().err


def test_nan_is_wrong():
    exact = torch.ones(3, dtype=torch.float64)
    ours = torch.tensor([1.0, float("nan"), 1.0])
    found = smoke.worst([smoke.Check("kernel", "shape", lambda: smoke.apart(ours, exact, exact.float()))])
    assert found["result"] == "wrong"
    assert smoke.worst([smoke.Check("kernel", "shape", lambda: (0.0, 0.0))])["result"] == "right"
    assert smoke.worst([smoke.Check("kernel", "shape", lambda: (0.1, 0.0))])["result"] == "wrong"


def test_signs_are_the_same_in_float32():
    """Behind the normalisations that are made up, where activations and their gradients turn on and off."""
    draw = smoke.Numbers(argparse.Namespace(device="cpu", seed=0))
    x, norm = draw((64, 16, 8, 8)), draw.norm(16)
    single = (x.float() - norm[0][:, None, None]) * norm[1][:, None, None] * norm[2][:, None, None]
    single += norm[3][:, None, None]
    exact = smoke.normalised(x, norm)
    assert ((single > 0) == (exact > 0)).all() and (exact != 0).all() and 0.1 < (exact > 0).double().mean() < 0.9


def test_refusals(capsys):
    assert main(["smoke", "--columns", "0", "--device", "cpu"]) == 1
    assert "must be at least 1" in capsys.readouterr().err
