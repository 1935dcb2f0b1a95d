"""The benchmark of one event: rows, sampling, missing libraries, and that wrong results show no times."""

import json
import sys

import pytest
import torch

from reprune_triton import ops
from reprune_triton.bench.__main__ import main


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def event(*arguments: str) -> int:
    return main(["event", "--model", "resnet8", "--repeat", "1", *arguments])


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows(tmp_path, capsys):
    assert event("--json", str(tmp_path / "new" / "event.jsonl"), "--seed", "3") == 0
    rows = rows_of(tmp_path / "new" / "event.jsonl")
    assert [row["row"] for row in rows] == ["layer"] * 3 + ["KxK", "total"]
    total = rows[-1]
    for row in rows:
        assert row["checked"] and not row["extrapolated"] and row["seed"] == 3 and row["threads"] == 1
        assert row["torch"] == torch.__version__ and row["scipy"] and row["cpu"] and "commit" in row and "dirty" in row
        assert row["scipy_s"] > 0 and row["fastcluster_s"] > 0 and row["cluster_s"] > 0
    assert total["event_s"] == pytest.approx(sum(row["cluster_s"] + row["select_s"] for row in rows[:3]))
    assert total["scipy_s"] == pytest.approx(sum(row["scipy_s"] for row in rows[:3]))
    assert total["problems"] == 16 + 16 + 32
    assert "equal clusters at the cut in every channel" in capsys.readouterr().out
    assert event("--json", str(tmp_path / "new" / "event.jsonl")) == 0
    assert len(rows_of(tmp_path / "new" / "event.jsonl")) == 10, "rows are appended"


@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_sampled_channels_are_declared(tmp_path, capsys, linkage):
    assert event("--channels", "2", "--linkage", linkage, "--json", str(tmp_path / "rows")) == 0
    assert all(row["extrapolated"] and row["peer_channels"] == 2 for row in rows_of(tmp_path / "rows"))
    assert "extrapolated" in capsys.readouterr().out


def test_1x1_layers_are_shown_apart(tmp_path, capsys):
    pytest.importorskip("torchvision")
    arguments = ["event", "--model", "resnet50", "--channels", "1", "--repeat", "1", "--json", str(tmp_path / "rows")]
    import reprune_triton.channels as channels

    class Few:
        def __init__(self, found):
            self.prunable = found.prunable[:4]

    analyse = channels.analyse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "analyse", lambda *given: Few(analyse(*given)))
        assert main(arguments) == 0
    assert [row["row"] for row in rows_of(tmp_path / "rows")][4:] == ["1x1", "KxK", "total"]


def test_a_missing_library_leaves_its_column_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastcluster", None)
    assert event("--json", str(tmp_path / "rows")) == 0
    assert "fastcluster is not installed" in capsys.readouterr().out
    assert all("fastcluster_s" not in row and "scipy_s" in row for row in rows_of(tmp_path / "rows"))


@pytest.mark.parametrize("what", ["heights", "labels"])
def test_no_times_for_wrong_results(tmp_path, capsys, monkeypatch, what):
    ward, cut = ops.ward, ops.cut

    def wrong_ward(*given):
        merges = ward(*given)
        return merges._replace(height=merges.height * 1.001)

    def wrong_cut(*given):
        clusters = cut(*given)
        return clusters._replace(labels=clusters.labels.roll(1, dims=1))

    monkeypatch.setattr(ops, *{"heights": ("ward", wrong_ward), "labels": ("cut", wrong_cut)}[what])
    assert event("--json", str(tmp_path / "rows")) == 1
    printed = capsys.readouterr()
    assert "no times are shown" in printed.err and "KxK" not in printed.out
    assert not (tmp_path / "rows").exists()


def test_refused_settings(capsys):
    assert event("--channels", "0") == 1
    assert event("--sparsity", "1.5") == 1
    assert "sparsity is 1.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["nothing"])
