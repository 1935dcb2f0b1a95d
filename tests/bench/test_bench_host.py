"""The benchmark of the host: rows, and that it is the real launches that are timed. In a process of its own, where
Triton does not interpret."""

import json
import os
import subprocess
import sys

import pytest
import torch

from reprune_triton.bench.__main__ import main

SMALL = ("--model", "resnet8", "--size", "8", "--warmup", "1", "--steps", "2")


def test_rows(tmp_path):
    path = tmp_path / "rows"
    command = [sys.executable, "-m", "reprune_triton.bench", "host", *SMALL, "--json", str(path)]
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == ["dense", "dense-fused", "narrow", "narrow-fused"]
    for row in rows.values():
        assert row["benchmark"] == "host" and 0 < row["fastest_ms"] <= row["host_ms"]
        assert row["ratio"] == pytest.approx(row["host_ms"] / rows["dense"]["host_ms"])
    launches = {name: row["launches"] for name, row in rows.items()}
    assert launches["dense"] == 0 < launches["narrow"] < launches["dense-fused"] < launches["narrow-fused"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_not_timed(capsys):
    assert main(["host", *SMALL]) == 1 and "TRITON_INTERPRET" in capsys.readouterr().err


def test_only_what_the_host_asks_for_itself(capsys):
    assert main(["host", *SMALL, "--variants", "dense-graph"]) == 1
    assert "dense-graph" in capsys.readouterr().err
