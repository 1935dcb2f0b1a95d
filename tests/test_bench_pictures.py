"""The pictures show what the rows say, and come out the same every time."""

import json
import statistics
from pathlib import Path

import pytest

from reprune_triton.errors import RepruneError

pytest.importorskip("matplotlib")
from reprune_triton.bench import arms, pictures  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def results(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def row(seed, accuracy=0.9, rates=(0.6, 0.8), **more):
    layers = {"a": 0.25 + seed / 10, "b": 0.5}
    return {
        "seed": seed, "accuracy": accuracy, "flops": 0.4 + seed / 100, "coverage": list(rates), "events": [2, 4],
        "layers": layers, "layer_coverage": {"a": list(rates), "b": [0.5, 1.0]},
    } | more  # fmt: skip


DENSE = row(0, coverage=[], events=[], layers={}, layer_coverage={}, flops=1.0)


def test_coverage_is_the_mean_of_the_seeds_within_a_deviation():
    by_arm = {"greedy": [row(0), row(1, rates=(0.7, 0.8))], "dense": [DENSE], "random": [row(0, rates=(0.5, 0.6))]}
    (axes,) = pictures.coverage(by_arm).axes
    assert [line.get_label() for line in axes.lines] == ["greedy", "random"]
    assert list(axes.lines[0].get_xdata()) == [2, 4] and list(axes.lines[0].get_ydata()) == pytest.approx([65, 80])
    low, high = (edge(axes.collections[0].get_paths()[0].vertices[:, 1]) for edge in (min, max))
    assert low == pytest.approx(65 - 50**0.5) and high == pytest.approx(80, abs=5)
    assert "%" in axes.get_ylabel() and axes.get_xlabel() == "epoch"


def test_heat_maps_have_the_means():
    for figure, wanted in (
        (pictures.layer_coverage([row(0), row(1, rates=(0.8, 0.9)), DENSE]), [[70, 85], [50, 100]]),
        (pictures.layer_sparsity({"one": [row(0), row(2)], "dense": [DENSE], "two": [row(0)]}), [[35, 25], [50, 50]]),
    ):
        axes = figure.axes[0]
        assert axes.images[0].get_array().tolist() == [pytest.approx(line) for line in wanted]
        assert [text.get_text() for text in axes.texts] == [f"{value:.0f}" for line in wanted for value in line]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
        assert "%" in figure.axes[1].get_ylabel()


def test_differences_are_paired_and_have_the_intervals_of_the_tables():
    base = [row(seed, accuracy=0.9 + seed / 50) for seed in range(3)]
    other = [row(seed, accuracy=value) for seed, value in ((0, 0.91), (1, 0.91), (2, 0.97), (7, 0.1))]
    (axes,) = pictures.accuracy({"base": base, "other": other, "once": [row(0)]}, "base").axes
    values = [1.0, -1.0, 3.0]  # in points; seed 7 has no partner
    assert [label.get_text() for label in axes.get_yticklabels()] == ["other"]
    bar = axes.containers[0]
    assert bar.lines[0].get_xdata()[0] == pytest.approx(statistics.mean(values))
    ends = bar.lines[2][0].get_segments()[0][:, 0]
    assert (ends[1] - ends[0]) / 2 == pytest.approx(arms.half_width(values))


def test_accuracy_against_flops():
    (axes,) = pictures.accuracy_flops({"ours": [row(0, 0.9), row(2, 0.94)], "dense": [DENSE]}).axes
    (x,), (y,) = axes.containers[0].lines[0].get_data()
    assert (x, y) == (pytest.approx(41), pytest.approx(92))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "dense"]


def test_parts_of_a_step_add_up():
    found = results("roofline.jsonl")
    (axes,) = pictures.step_parts(found).axes
    ends = [max(bars[i].get_x() + bars[i].get_width() for bars in axes.containers) for i in range(len(found))]
    assert ends == pytest.approx([row["roofline_ms"] for row in found])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [*pictures.PARTS, "the rest"] and "not measured" in axes.get_title(loc="left")
    known = {kind for kinds in pictures.PARTS.values() for kind in kinds}
    rest = {kind for row in found for kind in row["kinds_ms"]} - known
    assert rest == {"linear", "linear input", "linear weights", "pool", "pool backward"}
    parts = {"forward": 1.0, "backward": 2.5, "optimizer": 0.25}
    step = {"model": "m", "batch": 2, "cpu": "c", "net": "dense", "threads": 1, "parts_ms": parts}
    (axes,) = pictures.step_measured([step, step | {"threads": 2}, {"net": "narrow"}]).axes
    assert [text.get_text().strip() for text in axes.texts] == ["3.8", "3.8"]


def test_time_of_an_event_is_that_of_one_input_channel():
    found = results("event.jsonl")
    (axes,) = pictures.event_time(found).axes
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert set(lines) == {f"{side}, {k}x{k}" for side in ("ours", "SciPy", "fastcluster") for k in (1, 3)}
    wide = [r for r in found if r["row"] == "layer" and (r["n_out"], r["kh"]) == (512, 3)]
    assert lines["SciPy, 3x3"][512] == pytest.approx(statistics.median(1e3 * r["scipy_s"] / r["n_in"] for r in wide))


def test_files_are_the_same_every_time_and_text_is_text():
    rows = [row(0), row(1)]
    drawings = [pictures.coverage({"greedy": rows}) for _ in range(2)]
    assert pictures.svg(drawings[0]) == pictures.svg(drawings[1])
    assert pictures.png(drawings[0]) == pictures.png(drawings[1])
    text = pictures.svg(drawings[0])
    assert ">clusters covered, %</text>" in text and "'DejaVu Sans', Verdana" in text and "dc:date" not in text


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.coverage({"dense": [DENSE]}),
        lambda: pictures.layer_coverage([DENSE, {"coverage": [0.5]}]),
        lambda: pictures.layer_sparsity({"dense": [DENSE]}),
        lambda: pictures.accuracy({"base": [row(0)], "other": [row(0)]}, "base"),
        lambda: pictures.accuracy_flops({}),
        lambda: pictures.event_time([{"row": "total"}]),
        lambda: pictures.step_parts([{}]),
        lambda: pictures.step_measured([{}]),
    ],
)
def test_nothing_to_draw(draw):
    with pytest.raises(RepruneError, match="nothing to draw: no"):
        draw()
