"""The demo: its table and rows, and that a network which loads back differently is not passed off as good."""

import json

import pytest
import torch

from reprune_triton.bench.__main__ import main
from reprune_triton.training import checkpoint, models


def demo(tmp_path, *arguments):
    return main(["demo", "--model", "resnet8", "--epochs", "3", "--flops", "0.6", "--out", str(tmp_path), *arguments])


def test_rows_and_table(tmp_path, capsys):
    assert demo(tmp_path, "--seeds", "1", "2", "--json", str(tmp_path / "rows.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == [(1, "dense"), (1, "pruned"), (2, "dense"), (2, "pruned")]
    dense, pruned = rows[:2]
    assert dense["flops"] == 1.0 and dense["coverage"] is None and dense["event_seconds"] == 0
    assert pruned["flops"] <= 0.6 and pruned["macs"] / dense["macs"] == pytest.approx(pruned["flops"])
    assert dense["parameters"] == sum(p.numel() for p in models.build("resnet8", 10, 1).parameters())
    assert pruned["parameters"] < dense["parameters"] and 0 < pruned["coverage"] <= 1
    for row in rows:
        assert row["device"] == "cpu" and row["torch"] == torch.__version__ and row["cpu"] and "commit" in row
        assert row["latency_ms_batch1"] > 0 and row["latency_ms_batch256"] > 0 and row["epochs"] == 3
    saved = checkpoint.load(pruned["exported"], models.build("resnet8", 10, 1))
    assert sum(p.numel() for p in saved.parameters()) == pruned["parameters"]
    out = capsys.readouterr().out
    assert "±" in out and "coverage rate" in out and "resnet8-digits-seed2.safetensors" in out.replace("\n", "")


def test_a_network_that_loads_back_differently_is_an_error(tmp_path, monkeypatch, capsys):
    load = checkpoint.load

    def broken(path, model):
        model = load(path, model)
        with torch.no_grad():
            model.fc.bias += 0.01
        return model

    monkeypatch.setattr(checkpoint, "load", broken)
    assert demo(tmp_path) == 1
    assert "does not give the outputs of the trained one" in capsys.readouterr().err
