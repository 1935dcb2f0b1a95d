"""The pictures show what the rows say, and come out the same every time."""

import json
import statistics
from pathlib import Path

import pytest

from reprune_triton.errors import RepruneError

pytest.importorskip("matplotlib")
from reprune_triton.bench.study import arms, pictures  # noqa: E402

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


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


def test_only_epochs_that_all_seeds_have_are_averaged():
    more = row(1, rates=(0.2, 0.9, 0.9), events=[1, 4, 6])
    (axes,) = pictures.coverage({"greedy": [row(0), more, {"seed": 2}], "none": [row(0), row(1, events=[1, 3])]}).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [4] and list(line.get_ydata()) == pytest.approx([85])
    more["layer_coverage"] = {"b": [0.0, 0.5, 0.5], "c": [1, 1, 1]}
    heat = pictures.layer_coverage([row(0), more]).axes[0]
    assert heat.images[0].get_array().tolist() == [[pytest.approx(75)]]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["b"]


def test_each_arm_has_a_look_of_its_own():
    many = {f"arm {number}": [row(0), row(1)] for number in range(7)}  # no question has more
    for draw in (pictures.coverage, pictures.accuracy_flops):
        axes = draw(many).axes[0]
        lines = axes.lines if draw is pictures.coverage else [bars.lines[0] for bars in axes.containers]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 7, draw


def test_arms_may_have_other_layers():
    some = {"one": [row(0)], "two": [row(0, layers={"b": 0.25, "c": 0.75})]}
    axes = pictures.layer_sparsity(some).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.images[0].get_array().tolist() == [[25, None], [50, 25], [None, 75]]
    assert [text.get_text() for text in axes.texts] == ["25", "50", "25", "75"]


@pytest.mark.parametrize("count", [1, 12, 60])
def test_no_text_lies_on_other_text_or_is_cut_off(count):
    names = [f"arm {number}, of a long name" for number in range(count)]
    by_arm = {name: [row(0), row(1)] for name in names}
    rates = [number / count for number in range(count)]
    layers = {f"layer1.{number}": rates for number in range(8)}
    events = row(0, rates, events=[2 * number for number in range(count)], layer_coverage=layers)
    figures = [pictures.layer_coverage([events])]
    if count > 1:
        figures.append(pictures.accuracy(by_arm, names[0]))
    if count < 60:
        figures += [draw(by_arm) for draw in (pictures.coverage, pictures.accuracy_flops, pictures.layer_sparsity)]
    if count == 1:
        figures += [pictures.step_parts(results("roofline.jsonl")), pictures.event_time(results("event.jsonl"))]
    for figure in figures:
        check_texts(figure)


def check_texts(figure):
    """By the boxes around all words; those that stand aslant may have boxes that overlap."""
    pictures.svg(figure)  # lays it out, for good
    figure.draw_without_rendering()  # measures its words
    page, texts = figure.bbox, []
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [*axes.texts, axes._left_title, *(legend.get_texts() if legend else [])]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())  # what is beyond is not drawn
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [axis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text() and text.get_visible()}
    for text, box in boxes.items():
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, text
    level = [(text, box) for text, box in boxes.items() if not text.get_rotation() % 90]
    for number, (text, box) in enumerate(level):
        for other, second in level[:number]:
            across = min(box.x1, second.x1) - max(box.x0, second.x0)
            up = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(across, up) < 1, (text, other)


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
    one = axes.containers[1]  # a single seed has no interval
    assert one.lines[0].get_xdata()[0] == pytest.approx(0) and not one.has_xerr
    values = [1.0, -1.0, 3.0]  # in points; seed 7 has no partner
    assert [label.get_text() for label in axes.get_yticklabels()] == ["other", "once (1 seed)"]
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
    odd = [found[0] | {"model": "other", "kinds_ms": {"conv": 1.0, "a new kind": 2.0}}]
    assert len(axes := pictures.step_parts([*found, *found, *odd]).axes) == 2, "every model has its panel"
    (odd_panel,) = (panel for panel in axes if "other" in panel.get_title(loc="left"))
    assert [text.get_text() for text in odd_panel.get_legend().get_texts()] == ["convolution, forward", "the rest"]
    assert [text.get_text() for text in odd_panel.texts] == ["3.0"]
    bars = [label.get_text() for panel in axes if panel is not odd_panel for label in panel.get_yticklabels()]
    assert len(bars) == len(found) and sum("fused 1x1 (not built)" in bar for bar in bars) == 4
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
    assert "1 thread of" in axes.get_title(loc="left")


def test_every_device_has_its_panel():
    layer = {"row": "layer", "benchmark": "event", "linkage": "ward", "impl": "reference", "device": "cpu",
             "threads": 2, "cpu": "c", "algorithm": "auto", "kh": 1, "kw": 3, "n_out": 8, "n_in": 4,
             "cluster_s": 0.002}  # fmt: skip
    on_gpu = layer | {"device": "H100", "impl": "triton", "scipy_s": 0.4, "fastcluster_s": None}
    chain = on_gpu | {"algorithm": "chain", "cluster_s": 0.004}
    panels = pictures.event_time([layer, on_gpu, chain, {"row": "total"}]).axes
    drawn = [{item.get_label(): (*item.get_xdata(), *item.get_ydata()) for item in axes.lines} for axes in panels]
    assert drawn[0] == {"ours, 1x3": (8, 0.5)}
    assert drawn[1] == {"ours, 1x3": (8, 0.5), "SciPy, 1x3": (8, 100), "ours, chain, 1x3": (8, 1)}
    titles = [axes.get_title(loc="left") for axes in panels]
    assert "2 threads of c" in titles[0] and "triton, H100; SciPy: 1 thread of c" in titles[1]


def test_files_are_the_same_every_time_and_text_is_text():
    rows = [row(0), row(1)]
    drawings = [pictures.coverage({"greedy": rows}) for _ in range(2)]
    assert pictures.svg(drawings[0]) == pictures.svg(drawings[1])
    assert pictures.svg(drawings[0]) == pictures.svg(drawings[1]), "again"
    heat = pictures.layer_coverage(rows)  # a second layout would move its colours
    assert pictures.svg(heat) == pictures.svg(heat)
    text = pictures.svg(drawings[0])
    assert ">clusters covered, %</text>" in text and "'DejaVu Sans', Verdana" in text and "dc:date" not in text


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.coverage({"dense": [DENSE]}),
        lambda: pictures.layer_coverage([DENSE, {"coverage": [0.5]}]),
        lambda: pictures.layer_sparsity({"dense": [DENSE]}),
        lambda: pictures.accuracy({"base": [row(0)], "other": [row(1)]}, "base"),
        lambda: pictures.accuracy({"other": [row(1)]}, "base"),
        lambda: pictures.accuracy_flops({}),
        lambda: pictures.accuracy_flops({"none": [], "no flops": [{"accuracy": 0.5}]}),
        lambda: pictures.event_time([{"row": "total"}]),
        lambda: pictures.step_parts([{}]),
        lambda: pictures.step_measured([{}]),
    ],
)
def test_nothing_to_draw(draw):
    with pytest.raises(RepruneError, match="nothing to draw: no"):
        draw()
